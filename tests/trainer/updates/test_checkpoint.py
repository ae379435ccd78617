"""The further states in checkpoints: resumed in mid-window, on other layouts, filled where lacking."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import step_name
from checkpoint.load import load
from checkpoint.opening import open_checkpoint
from checkpoint.save import Saver
from checkpoint.writers.options import WriteOptions
from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import Wholes, copy_slices, different, whole_tensors
from tests.proof.worlds import World, build, step
from tests.ranks import run_ranks
from tests.trainer.updates.worlds import Setup, start

BEFORE, STEPS = 2, 4  # saved after two steps, in the middle of a window of three
EWC = {"kind": "ewc", "strength": 30.0, "sources": ["old"], "batches": 2, "only": [".*_proj.weight"]}
REPTILE = {"kind": "reptile", "every": 3, "epsilon": 0.3}
SETUPS = {
    "ewc, reptile": Setup(freeze=(".*norm.*",), anchor=EWC, slow=REPTILE),
    "si, ema": Setup(anchor={"kind": "si", "strength": 5.0}, slow={"kind": "ema", "decay": 0.9, "every": 3}),
}
WORLDS = {
    "one rank": World(),
    "DP2": World(2),
    "DP2, plain": World(2, Layout(distributed_optimizer=False)),
    "TP2": World(2, Layout(tensor=2, sequence_parallel=True)),
    "PP2": World(2, Layout(pipeline=2)),
}
RESUMED = [("one rank", "fp32"), ("DP2", "bf16"), pytest.param("DP2, plain", "bf16", marks=pytest.mark.long)]
MOVES = [
    ("DP2", "TP2"),
    pytest.param("TP2", "PP2", marks=pytest.mark.long),
    ("PP2", "DP2"),
    pytest.param("DP2, plain", "DP2", marks=pytest.mark.long),
]
ADDED = {"anchor", "importance", "path_integral", "ema", "slow"}


@dataclass(frozen=True)
class Seen:
    """One rank of a part of a run: slices at its start and end, losses, notes, states that were absent."""

    begun: list[TensorSlice]
    ended: list[TensorSlice]
    losses: list[float]
    notes: list[str]
    absent: frozenset[tuple[str, str]]


def part(
    setup: Setup,
    *,
    folder: Path | None = None,
    first: int = 0,
    last: int = STEPS,
    save: Path | None = None,
    **begin: Any,
) -> Seen:
    """Steps `first` to `last`, from the checkpoint in `folder` or from nothing; a target for `run_ranks`.

    Args:
        begin: for `Updates.begin`; weights_only for `load`.
    """
    engine = build(setup.world)
    updates = setup.open(engine)
    if folder is None:
        absent, notes = frozenset[tuple[str, str]](), start(updates)
    else:
        only = begin.pop("weights_only", False)
        found = load(folder, engine.slices(), weights_only=only)
        absent = found.absent
        state = None if only else found.state.get("hooks")
        notes = start(updates, absent, **{"new_stage": False, "state": state, **begin})
        engine.updates = 0 if only else first
    begun = copy_slices(engine)
    losses = [step(engine, number).loss for number in range(first, last)]
    if save is not None:
        with_state = {"hooks": updates.state(), "model": setup.world.architecture.model_dump(mode="json")}
        saver = Saver(save, rank=engine.mesh.rank, world_size=engine.mesh.world_size, background=False)
        saver.save(last, engine.slices(), with_state)
        saver.close()
    seen = Seen(begun, copy_slices(engine), losses, notes, absent)
    destroy_mesh()
    return seen


def begun(ranks: list[Seen]) -> Wholes:
    return whole_tensors([rank.begun for rank in ranks])


def ended(ranks: list[Seen]) -> Wholes:
    return whole_tensors([rank.ended for rank in ranks])


def on(world: str, method: str | Setup, precision: str = "fp32", **how: Any) -> list[Seen]:
    setup = SETUPS[method] if isinstance(method, str) else method
    setup = replace(setup, world=replace(WORLDS[world], precision=precision))
    return run_ranks(functools.partial(part, setup, **how), setup.world.ranks)


@functools.cache
def saved(world: str, method: str, precision: str = "fp32") -> tuple[Path, list[Seen]]:
    """A checkpoint after two steps, and the run that made it."""
    folder = Path(tempfile.mkdtemp())
    return folder, on(world, method, precision, last=BEFORE, save=folder)


@functools.cache
def whole_run(world: str, method: str, precision: str = "fp32") -> list[Seen]:
    return on(world, method, precision)


@pytest.mark.parametrize("method", SETUPS)
@pytest.mark.parametrize(("world", "precision"), RESUMED)
def test_a_run_that_stops_in_mid_window_goes_on_bit_for_bit(world: str, precision: str, method: str) -> None:
    folder, before = saved(world, method, precision)
    after = on(world, method, precision, folder=folder, first=BEFORE)
    whole = whole_run(world, method, precision)
    assert before[0].losses + after[0].losses == whole[0].losses
    assert different(ended(after), ended(whole)) == []
    assert not after[0].absent


@pytest.mark.parametrize("method", SETUPS)
@pytest.mark.parametrize(("origin", "target"), MOVES)
def test_the_states_move_to_another_layout(origin: str, target: str, method: str) -> None:
    """Every bit of them; the steps after it are those of the other run to the rounding of fp32."""
    folder, before = saved(origin, method)
    after = on(target, method, folder=folder, first=BEFORE)
    assert ADDED & {state for _, state in begun(after)}
    assert different(begun(after), ended(before)) == []
    assert after[0].losses == pytest.approx(whole_run("one rank", method)[0].losses[BEFORE:], rel=1e-5)


def without(state: str) -> list[Seen]:
    """A run with anchor and average that goes on from one that had nothing of the kind."""
    folder = Path(tempfile.mkdtemp())
    on("DP2", Setup(), last=BEFORE, save=folder)
    return on("DP2", "si, ema" if state == "ema" else "ewc, reptile", folder=folder, first=BEFORE)


@pytest.mark.parametrize("state", ["anchor", "slow", "ema"])
def test_states_that_the_checkpoint_lacks_are_the_weights_loaded(state: str) -> None:
    found = begun(without(state))
    having = [name for name, other in found if other == state]
    assert having
    assert all(torch.equal(found[name, state], found[name, "weight"]) for name in having)


def test_importance_that_the_checkpoint_lacks_is_measured() -> None:
    seen = without("anchor")
    importance = {name: value for (name, state), value in begun(seen).items() if state == "importance"}
    assert all(bool((value > 0).any()) for value in importance.values())
    assert "measured the Fisher matrix on 2 gradients of old" in seen[0].notes


def test_one_more_pattern_gets_its_anchor_and_the_rest_keep_theirs() -> None:
    """The matrices of q, k and v share memory: what was not held has no anchor in the checkpoint."""
    q, k = (f".*{name}_proj.weight" for name in "qk")
    anchor = {"kind": "l2", "strength": 3.0}
    folder = Path(tempfile.mkdtemp())
    first = on("DP2", Setup(anchor=anchor | {"only": [q]}), last=BEFORE, save=folder)
    found = begun(on("DP2", Setup(anchor=anchor | {"only": [q, k]}), folder=folder, first=BEFORE))
    for name in {name for name, state in found if state == "anchor"}:
        origin = begun(first) if "q_proj" in name else ended(first)
        assert torch.equal(found[name, "anchor"], origin[name, "weight"]), name


def test_weights_alone_begin_everything_anew() -> None:
    folder, before = saved("DP2", "si, ema")
    seen = on("DP2", "si, ema", folder=folder, weights_only=True, new_stage=True)
    found = begun(seen)
    assert {state for _, state in seen[0].absent} == {"anchor", "importance", "path_integral", "ema"}
    for (name, state), value in found.items():
        if state in ("anchor", "ema"):
            assert torch.equal(value, ended(before)[name, "weight"])
        if state in ("importance", "path_integral"):
            assert not value.any()


def test_si_is_consolidated_when_the_next_stage_begins() -> None:
    """Zenke et al. 2017, equation 5, with the parts of the path on which the loss has risen left out."""
    folder, before = saved("DP2", "si, ema")
    seen = on("DP2", "si, ema", folder=folder, first=BEFORE, last=BEFORE + 1, new_stage=True)
    old, new = ended(before), begun(seen)
    for name in {name for name, _ in old}:
        moved = (old[name, "weight"] - old[name, "anchor"]).double()
        expected = old[name, "path_integral"].double().clamp(min=0) / (moved**2 + 1e-3)
        torch.testing.assert_close(new[name, "importance"].double(), expected, rtol=1e-6, atol=1e-12)
        assert torch.equal(new[name, "anchor"], old[name, "weight"])
        assert not new[name, "path_integral"].any()
    assert seen[0].notes == []


@pytest.mark.parametrize(
    ("changes", "origin"), [({}, "weight"), ({"keep": True}, "anchor")], ids=["its own start", "keep"]
)
def test_a_stage_takes_its_start_or_keeps_the_anchor(changes: dict[str, Any], origin: str) -> None:
    folder, before = saved("DP2", "ewc, reptile")
    setup = replace(SETUPS["ewc, reptile"], anchor=EWC | changes)
    seen = on("DP2", setup, folder=folder, first=BEFORE, last=BEFORE + 1, new_stage=True)
    found, old = begun(seen), ended(before)
    held = [name for name, state in found if state == "anchor"]
    assert all(torch.equal(found[name, "anchor"], old[name, origin]) for name in held)
    same = all(torch.equal(found[name, "importance"], old[name, "importance"]) for name in held)
    assert same == bool(changes)


def test_importance_is_retained_in_part() -> None:
    """Online EWC: the new one is what a fresh measurement gives, and half of the old."""
    folder, before = saved("DP2", "ewc, reptile")
    fresh, online = (
        begun(
            on(
                "DP2",
                replace(SETUPS["ewc, reptile"], anchor=EWC | {"retain": retain}),
                folder=folder,
                first=BEFORE,
                last=BEFORE + 1,
                new_stage=True,
            )
        )
        for retain in (0.0, 0.5)
    )
    for (name, state), old in ended(before).items():
        if state == "importance":
            torch.testing.assert_close(online[name, state], fresh[name, state] + 0.5 * old)


STATES = {"anchor", "importance", "path_integral", "ema"}


@pytest.mark.parametrize("target", ["huggingface", "torch_dist"])
def test_formats_without_a_place_for_them_say_what_they_leave_behind(target: str, tmp_path: Path) -> None:
    folder, _ = saved("DP2", "si, ema")
    conversion = prepare(folder / step_name(BEFORE), target, WriteOptions())
    assert all(any(line.startswith(state) for line in conversion.plan.lost) for state in STATES)
    convert(conversion, tmp_path / "converted", drop=True)


@pytest.mark.parametrize("target", ["deepspeed_universal", "dcp", "universal", "ranks"])
@pytest.mark.parametrize("method", SETUPS)
def test_formats_with_a_place_for_them_carry_them(target: str, method: str, tmp_path: Path) -> None:
    folder, _ = saved("DP2", method)
    source = open_checkpoint(folder / step_name(BEFORE))
    convert(prepare(source, target, WriteOptions(layout={"tensor": 2})), tmp_path / "converted")
    held = {key for key in source.manifest.by_key() if key[1] in ADDED}
    assert held <= open_checkpoint(tmp_path / "converted").manifest.by_key().keys()
