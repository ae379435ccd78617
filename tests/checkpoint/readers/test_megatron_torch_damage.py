"""What is missing, cut short, mixed up or changed in a Megatron checkpoint is named, by file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.opening import UnreadableError, open_checkpoint
from checkpoint.readers.megatron_torch import read, recognise
from checkpoint.whole import read_whole
from parallel.layout import Layout
from tests.foreign.megatron import ITERATION, Run, save_torch
from tests.foreign.oracle import Oracle

ORACLE = Oracle(layers=2, precision="bf16")
RUN = Run(Layout(tensor=2, pipeline=2), 4)
MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
RANK = "mp_rank_01_001"
NORM = "decoder.layers.0.pre_mlp_layernorm.weight"


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_torch(tmp_path_factory.mktemp("megatron"), ORACLE, RUN)


@pytest.fixture
def copy(genuine: Path, tmp_path: Path) -> Path:
    """A copy to damage: the folder of the iteration."""
    return shutil.copytree(genuine, tmp_path / "copy") / ITERATION


def problems(folder: Path) -> list[str]:
    return read(folder).problems


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [remove, empty, cut])
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / RANK / name)
    found = problems(copy)
    assert any(str(copy / RANK / name) in problem for problem in found), found


def test_the_undamaged_one_has_no_problems(copy: Path) -> None:
    assert problems(copy) == []


def test_a_missing_rank_says_what_the_run_had(copy: Path) -> None:
    shutil.rmtree(copy / RANK)
    assert any(str(copy / RANK) in problem and "TP2 PP2" in problem for problem in problems(copy))


def test_nothing_of_a_damaged_checkpoint_is_taken_for_whole(copy: Path) -> None:
    (copy / RANK / OPTIMIZER).unlink()
    assert open_checkpoint(copy).problems


def test_a_checkpoint_without_any_readable_rank_is_refused(copy: Path) -> None:
    for path in copy.glob(f"*/{MODEL}"):
        cut(path)
    with pytest.raises(UnreadableError, match="mp_rank_00_000"):
        open_checkpoint(copy)


def test_files_of_different_steps_are_named(copy: Path) -> None:
    rewrite(copy / RANK / MODEL, lambda content: content.update(iteration=8))
    assert any("iteration is 7 in" in p and f"8 in {RANK}" in p for p in problems(copy))


def test_a_rank_of_another_run_is_named(copy: Path) -> None:
    shutil.copytree(copy / RANK, copy / "mp_rank_02_001")
    assert any("mp_rank_02_001 cannot be of this run" in problem for problem in problems(copy))


def test_a_folder_whose_name_lacks_the_pipeline_rank_is_named(copy: Path) -> None:
    (copy / RANK).rename(copy / "mp_rank_01")
    found = problems(copy)
    assert any("mp_rank_01 cannot be of this run" in problem for problem in found)


def test_too_few_layers_are_named(copy: Path) -> None:
    for path in copy.glob(f"*/{MODEL}"):
        rewrite(path, lambda content: setattr(content["args"], "num_layers", 3))
    assert any("hold 2 layers, the arguments say 3" in problem for problem in problems(copy))


def test_a_stage_whose_ranks_differ_in_layers_is_named(copy: Path) -> None:
    def drop(content: Any) -> None:
        content["model"] = {k: v for k, v in content["model"].items() if "layers." not in k}

    rewrite(copy / RANK / MODEL, drop)
    assert any(RANK in problem and "0 layers" in problem for problem in problems(copy))


def flip(copy: Path, state: str, name: str) -> None:
    """Flip the lowest bit that shows in bf16 of one element of a rank's weight, or a master's."""
    if state == "weight":
        rewrite(
            copy / RANK / MODEL, lambda content: content["model"][name].view(torch.int16)[3].bitwise_xor_(1)
        )
        return

    def change(content: Any) -> None:
        (buffer,) = content[0].values()
        buffer["param"].view(torch.int32)[-100].bitwise_xor_(1 << 20)

    rewrite(copy / RANK / OPTIMIZER, change)


@pytest.mark.parametrize(("state", "name"), [("weight", NORM), ("master", "layers.0.input_layernorm.weight")])
def test_a_flipped_bit_is_named_with_parameter_and_place(state: str, name: str, copy: Path) -> None:
    """The first registered of the last stage's parameters is the last of its buffer."""
    flip(copy, state, name)
    (problem,) = problems(copy)
    assert str(copy / RANK / OPTIMIZER) in problem
    assert f"{name}, but 1 of 192" in problem


def test_the_optimizer_of_another_rank_is_named(copy: Path) -> None:
    """Same sizes, other values."""
    shutil.copy(copy / "mp_rank_00_001" / OPTIMIZER, copy / RANK / OPTIMIZER)
    found = problems(copy)
    assert any("should be the master of output_layer.weight" in problem for problem in found), found


def test_masters_that_are_shifted_are_named(copy: Path) -> None:
    def shift(content: Any) -> None:
        (buffer,) = content[0].values()
        buffer["param"] = buffer["param"].roll(64)

    rewrite(copy / RANK / OPTIMIZER, shift)
    assert any(f"{OPTIMIZER}: buffer 0 (bfloat16)" in problem for problem in problems(copy))


@pytest.mark.parametrize("change", [lambda flat: torch.cat([flat, flat]), lambda flat: flat[:150]])
def test_a_buffer_of_another_size_is_named(
    change: Callable[[torch.Tensor], torch.Tensor], copy: Path
) -> None:
    def resize(content: Any) -> None:
        (buffer,) = content[0].values()
        buffer.update({key: change(value) for key, value in buffer.items() if torch.is_tensor(value)})

    rewrite(copy / RANK / OPTIMIZER, resize)
    assert any(f"{OPTIMIZER}: buffer 0 (bfloat16)" in problem for problem in problems(copy))


def test_masters_without_their_weights_are_refused_in_a_plain_optimizer(tmp_path: Path) -> None:
    run = Run(Layout(distributed_optimizer=False))
    folder = save_torch(tmp_path, ORACLE, run)

    def mix(content: Any) -> None:
        group = content["optimizer"]["fp32_from_fp16_params"][0]
        group[0] = torch.randn_like(group[0])

    path = folder / ITERATION / "mp_rank_00" / MODEL
    rewrite(path, mix)
    assert any(str(path) in problem and "shapes and masters" in problem for problem in problems(folder))


def test_a_changed_master_of_a_plain_optimizer_is_named(tmp_path: Path) -> None:
    folder = save_torch(tmp_path, ORACLE, Run(Layout(distributed_optimizer=False)))

    def change(content: Any) -> None:
        content["optimizer"]["fp32_from_fp16_params"][1][0].view(-1)[5] += 1

    rewrite(folder / ITERATION / "mp_rank_00" / MODEL, change)
    (problem,) = problems(folder)
    assert "1 of 192 compared elements of decoder.layers.0.input_layernorm.weight" in problem


def test_frozen_parameters_of_a_plain_optimizer_in_float32_are_not_guessed(tmp_path: Path) -> None:
    folder = save_torch(tmp_path, Oracle(layers=2), Run(Layout(distributed_optimizer=False)))

    def freeze(content: Any) -> None:
        content["optimizer"]["param_groups"][1]["params"].pop(0)

    rewrite(folder / ITERATION / "mp_rank_00" / MODEL, freeze)
    assert any("nothing tells which" in problem for problem in problems(folder))


def split_group(content: Any) -> None:
    """Halve a plain optimizer's first group, by every other parameter, without a rule."""
    state = content["optimizer"].get("optimizer", content["optimizer"])
    first, *rest = state["param_groups"]
    halves = [dict(first, params=first["params"][k::2], lr=1e-4 * (k + 1)) for k in (0, 1)]
    state["param_groups"] = [*halves, *rest]
    masters = content["optimizer"].get("fp32_from_fp16_params")
    if masters:
        masters[:1] = [masters[0][0::2], masters[0][1::2]]


def test_groups_without_a_rule_are_confirmed_by_values(tmp_path: Path) -> None:
    folder = save_torch(tmp_path, ORACLE, Run(Layout(distributed_optimizer=False)))
    rewrite(folder / ITERATION / "mp_rank_00" / MODEL, split_group)
    opened = open_checkpoint(folder)
    assert opened.problems == ()
    for (name, state), tensor in opened.manifest.by_key().items():
        assert torch.equal(read_whole(opened.folder, tensor), ORACLE.value(name, state)), (name, state)


def test_groups_without_a_rule_in_float32_are_not_guessed(tmp_path: Path) -> None:
    folder = save_torch(tmp_path, Oracle(layers=2), Run(Layout(distributed_optimizer=False)))
    rewrite(folder / ITERATION / "mp_rank_00" / MODEL, split_group)
    assert any("nothing tells which of them are whose" in problem for problem in problems(folder))


def test_buffers_of_before_2024_are_refused_with_a_remedy(copy: Path) -> None:
    rewrite(copy / RANK / OPTIMIZER, lambda content: content.pop("buckets_coalesced"))
    assert any("--ckpt-convert-update-legacy-dist-opt-format" in problem for problem in problems(copy))


def test_norms_stored_minus_one_are_refused(copy: Path) -> None:
    for path in copy.glob(f"*/{MODEL}"):
        rewrite(path, lambda content: setattr(content["args"], "apply_layernorm_1p", True))
    assert any("apply_layernorm_1p" in problem for problem in problems(copy))


def test_an_empty_folder_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    assert not recognise(tmp_path)
    assert not recognise(tmp_path / "nowhere")
