"""megatron-core on the host: everything replaced exists, everything is put back, nobody else notices."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from parallel import host
from parallel.host import SUBSTITUTIONS, Substitution

MODULES = sorted({s.module for s in SUBSTITUTIONS})


@pytest.fixture(autouse=True)
def inactive() -> Iterator[None]:
    """Start and end without stand-ins, whatever ran before."""
    host.deactivate()
    yield
    host.deactivate()


def everything() -> dict[tuple[str, str], int]:
    """Identity of all that torch, its tensors and the adapted modules define."""
    owners: dict[str, Any] = {name: importlib.import_module(name) for name in MODULES}
    owners |= {"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor}
    return {
        (where, name): id(value) for where, owner in owners.items() for name, value in vars(owner).items()
    }


def inside_megatron(source: str) -> Callable[..., Any]:
    """The function `f` of some source that counts as megatron-core's code."""
    module = types.ModuleType("megatron.core.optimizer.invented")
    exec(source, module.__dict__)
    return module.f


@pytest.mark.parametrize("substitution", SUBSTITUTIONS, ids=lambda s: f"{s.module}.{s.symbol}")
def test_every_symbol_exists_in_the_installed_version(substitution: Substitution) -> None:
    assert hasattr(importlib.import_module(substitution.module), substitution.symbol)
    assert substitution.why


@pytest.mark.parametrize("module", [s.module for s in SUBSTITUTIONS if s.symbol == "torch"])
def test_no_module_gets_a_view_of_torch_for_nothing(module: str) -> None:
    """Each asks for CUDA by name somewhere, so that the list does not outlive its reasons."""
    source = importlib.import_module(module).__spec__.loader.get_source(module)
    assert any(word in source for word in ("cuda", "pin_memory", "torch.matmul"))


def test_a_symbol_that_is_gone_is_a_clear_error_and_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = everything()
    gone = (
        Substitution("megatron.core.utils", "sum_on_device", "sums on CUDA", lambda original: original),
        Substitution("megatron.core.tensor_parallel.random", "seed_device", "seeds CUDA", lambda o: o),
    )
    monkeypatch.setattr(host, "SUBSTITUTIONS", SUBSTITUTIONS + gone)
    with pytest.raises(RuntimeError, match=r"megatron-core~=0\.16\.1") as error:
        host.activate()
    assert "megatron.core.utils.sum_on_device (sums on CUDA)" in str(error.value)
    assert "megatron.core.tensor_parallel.random.seed_device (seeds CUDA)" in str(error.value)
    assert everything() == before


def test_it_can_be_undone() -> None:
    before = everything()
    assert host.activate()
    during = everything()
    changed = {key for key in before.keys() | during.keys() if before.get(key) != during.get(key)}
    assert {(s.module, s.symbol) for s in SUBSTITUTIONS} <= changed
    assert not [key for key in changed if key[0] in ("torch", "torch.cuda")]
    assert {name for where, name in changed if where == "torch.Tensor"} <= {"type", "cuda", "matmul"}
    host.deactivate()
    assert everything() == before


def test_twice_is_once() -> None:
    before = everything()
    assert host.activate()
    during = everything()
    assert host.activate()
    assert everything() == during
    host.deactivate()
    assert everything() == before


def test_a_block_leaves_what_was_active_before_it() -> None:
    before = everything()
    with host.active() as active:
        assert active
        during = everything()
        with host.active():
            assert everything() == during
        assert everything() == during
    assert everything() == before


def test_nothing_happens_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = everything()
    assert not host.needed()
    assert not host.activate()
    with host.active() as active:
        assert not active
    assert everything() == before


def test_tensors_are_what_they_were_for_everybody_else() -> None:
    one = torch.ones(2)
    with pytest.raises((RuntimeError, AssertionError)) as before:
        one.cuda()
    with host.active():
        assert one.type() == "torch.FloatTensor"
        assert one.type(torch.float64).dtype == torch.float64
        with pytest.raises(type(before.value)):
            one.cuda()
        with pytest.raises(type(before.value)):
            torch.zeros(1, device="cuda")


def test_megatron_takes_the_host_for_the_device() -> None:
    with host.active():
        assert inside_megatron("def f(t): return t.type()")(torch.ones(2)) == "torch.cuda.FloatTensor"
        assert inside_megatron("def f(t): return t.cuda()")(torch.ones(2)).device == host.HOST
        assert (
            inside_megatron("def f(t): return t.type('torch.HalfTensor')")(torch.ones(1)).dtype == torch.half
        )


@pytest.mark.parametrize(
    "call",
    [
        "torch.zeros(2, device='cuda')",
        "torch.zeros(2, device=torch.device('cuda'))",
        "torch.tensor([1.0], dtype=torch.float, device='cuda')",
        "torch.empty(2, device=torch.cuda.current_device(), pin_memory=True)",
        "torch.full((2,), 3.0, device='cuda:0')",
    ],
)
def test_the_view_of_torch_allocates_on_the_host(call: str) -> None:
    with host.active():
        view = importlib.import_module("megatron.core.optimizer.clip_grads").torch
        assert view is not torch
        assert eval(call, {"torch": view}).device == host.HOST


def test_streams_and_events_have_always_finished() -> None:
    with host.active():
        view = importlib.import_module("megatron.core.distributed.param_and_grad_buffer").torch
        stream = view.cuda.Stream()
        with view.cuda.stream(stream):
            event = stream.record_event()
        stream.wait_event(event)
        stream.wait_stream(view.cuda.current_stream())
        view.cuda.synchronize()
        assert event.query()


def test_random_states_are_the_hosts() -> None:
    with host.active():
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        state = random._get_cuda_rng_state()
        first = torch.rand(3)
        random._set_cuda_rng_state(state)
        assert torch.equal(torch.rand(3), first)
