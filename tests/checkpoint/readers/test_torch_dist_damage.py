"""What megatron-core 0.16 shifted in genuine fully_reshardable checkpoints is found, and repaired."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from checkpoint.boxes import cover_fault
from checkpoint.convert.run import convert, prepare
from checkpoint.load import load
from checkpoint.opening import WEIGHTS_REMEDY, Opened, open_checkpoint
from checkpoint.verification.report import verify_checkpoint
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from parallel.layout import Layout
from parallel.slices import TensorSlice
from tests.checkpoint.models import Grid, slices_of
from tests.foreign.megatron import Dist, Run, save_torch_dist
from tests.foreign.oracle import STATES, Oracle

CAUSE = "bucket padding shifted: megatron-core before PR 5077"
FULLY = Dist("fully_reshardable")
WIDE = Oracle(hidden=192, vocab=515, layers=2, precision="bf16")
MOE = Oracle(hidden=192, vocab=515, layers=2, experts=4, precision="bf16")
TIED = Oracle(hidden=64, vocab=515, tied=True)
DP3 = Run(Layout(), 3, bucket=100_000)

LONG = {
    "TP2": (WIDE, Run(Layout(tensor=2), 6, bucket=100_000)),
    "fp32": (Oracle(hidden=192, vocab=515, layers=2), DP3),
    "experts": (MOE, Run(Layout(expert=2), 6, bucket=50_000)),
    "a bucket of a tied embedding's own, VPP2": (TIED, Run(Layout(pipeline=2, virtual_pipeline=2), 6)),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_checkpoint(save_torch_dist(tmp_path_factory.mktemp("damaged"), WIDE, DP3, FULLY))


def logical(problem: str) -> set[str]:
    """Logical tensors of the stored one that a problem names: of one layer, all that is fused."""
    name, _, rest = problem.partition(" ")
    layer = rest[1:].split(":")[0]
    if not name.startswith("decoder.layers."):
        return {
            {"embedding.word_embeddings.weight": "embed_tokens", "decoder.final_layernorm.weight": "norm"}[
                name
            ]
        }
    fused = {
        "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2.weight": ("mlp.down_proj",),
        "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj.weight": ("self_attn.o_proj",),
        "input_layernorm.weight": ("input_layernorm",),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm",),
    }
    return {f"layers.{layer}.{part}" for part in fused[name.removeprefix("decoder.layers.")]}


def assert_repaired(opened: Opened, oracle: Oracle) -> None:
    """What is whole is the oracle's; what is not is named, with the cause, and nothing else."""
    lost = set()
    for tensor in opened.manifest.tensors:
        if cover_fault(tensor.shape, [piece.box for piece in tensor.pieces]) is None:
            held = read_whole(opened.folder, tensor)
            assert torch.equal(held, oracle.value(tensor.name, tensor.state)), (tensor.name, tensor.state)
        else:
            lost.add(tensor.name)
    named = set().union(*(logical(problem) for problem in opened.problems))
    assert {name.removeprefix("model.").removesuffix(".weight") for name in lost} <= named
    assert all(problem.endswith(CAUSE) for problem in opened.problems)
    assert lost


def test_what_was_saved_as_a_neighbour_is_found_and_the_rest_named(damaged: Opened) -> None:
    assert_repaired(damaged, WIDE)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_every_layout_is_repaired(case: str, tmp_path: Path) -> None:
    oracle, run = LONG[case]
    assert_repaired(open_checkpoint(save_torch_dist(tmp_path, oracle, run, FULLY)), oracle)


def test_most_tensors_are_repaired(damaged: Opened) -> None:
    """Only the starts of the buckets behind the first one are lost: 192 elements of padding each."""
    (note,) = [note for note in damaged.notes if note.startswith("damage repaired")]
    assert "decoder.layers.self_attention.linear_proj.weight (2 parts)" in note
    assert "decoder.layers.input_layernorm.weight (2 parts)" in note
    assert len(damaged.problems) == 4
    assert all(": 192 of " in problem and "saved nowhere" in problem for problem in damaged.problems)


def test_a_weight_of_ones_does_not_hide_the_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of a new model fit wherever they are looked for; what lies around them tells where they are."""
    value = Oracle.value

    def with_ones(oracle: Oracle, name: str, state: str) -> torch.Tensor:
        held = value(oracle, name, state)
        return torch.ones_like(held) if "norm" in name and state in ("weight", "master") else held

    monkeypatch.setattr(Oracle, "value", with_ones)
    opened = open_checkpoint(save_torch_dist(tmp_path, WIDE, DP3, FULLY))
    assert_repaired(opened, WIDE)


def test_buckets_without_padding_are_left_alone(tmp_path: Path) -> None:
    """Three data ranks, but one bucket: its padding has nothing behind it."""
    opened = open_checkpoint(save_torch_dist(tmp_path, WIDE, Run(Layout(), 3), FULLY))
    assert not opened.problems
    assert not [note for note in opened.notes if "damage" in note]
    for name in WIDE.shapes():
        for state in STATES:
            held = read_whole(opened.folder, opened.manifest.by_key()[name, state])
            assert torch.equal(held, WIDE.value(name, state))


def test_other_contradictions_are_not_taken_for_a_shift(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path, WIDE, Run(Layout(distributed_optimizer=False), 1))
    master = open_checkpoint(folder).manifest.by_key()["model.layers.1.mlp.down_proj.weight", "master"]
    for piece in master.pieces:
        with open(piece.file, "r+b") as file:
            file.seek(piece.start)
            file.write(bytes(piece.num_bytes))
    opened = open_checkpoint(folder)
    (problem,) = opened.problems
    assert opened.optimizer_problems == (), "the weight may be what is wrong"
    assert opened.remedy == ""
    assert problem.startswith("decoder.layers.mlp.linear_fc2.weight: 1 of 2 chunks of the master")
    assert problem.endswith("likely cause: files of different saves mixed, or a file that was changed")


def empty(oracle: Oracle) -> list[TensorSlice]:
    tensors = {(name, state): oracle.value(name, state) for name in oracle.shapes() for state in STATES}
    slices = slices_of(tensors, Grid(), 0)
    for piece in slices:
        piece.data.fill_(7)
    return slices


def test_a_load_is_refused_and_says_that_weights_can_be_had(damaged: Opened) -> None:
    slices = empty(WIDE)
    with pytest.raises(ValueError, match="saved nowhere") as caught:
        load(damaged, slices)
    assert str(caught.value).endswith(f"{WEIGHTS_REMEDY}. The model has not been touched.")
    assert all(bool((piece.data == 7).all()) for piece in slices)


@pytest.mark.parametrize("verify", ["read", "full"])
def test_weights_alone_are_loaded(verify: Literal["read", "full"], damaged: Opened) -> None:
    slices = empty(WIDE)
    state = load(damaged, slices, weights_only=True, verify=verify)
    assert dict(state.derived) == {"master": "weight"}
    assert state.fresh == ("exp_avg", "exp_avg_sq")
    assert "not carried: masters and optimizer states: damaged (4 problems)" in state.notes
    for piece in slices:
        weight = WIDE.value(piece.name, "weight")
        wanted = weight if piece.state in ("weight", "master") else torch.full_like(weight, 7)
        assert torch.equal(piece.data, wanted.to(piece.data.dtype).flatten()), (piece.name, piece.state)


def test_weights_alone_are_converted(damaged: Opened, tmp_path: Path) -> None:
    options = WriteOptions(states=("weight",))
    convert(prepare(damaged, "universal", options), tmp_path / "weights")
    found = open_checkpoint(tmp_path / "weights")
    assert {(t.name, t.state) for t in found.manifest.tensors} == {(name, "weight") for name in WIDE.shapes()}
    for tensor in found.manifest.tensors:
        assert torch.equal(read_whole(found.folder, tensor), WIDE.value(tensor.name, "weight"))


@pytest.mark.parametrize("states", [None, ("weight", "master")])
def test_a_conversion_of_more_is_refused_and_names_the_remedy(
    states: tuple[str, ...] | None, damaged: Opened
) -> None:
    with pytest.raises(ValueError, match="--states weight"):
        prepare(damaged, "universal", WriteOptions(states=states))


def test_verification_names_the_remedy(damaged: Opened) -> None:
    report = verify_checkpoint(damaged)
    assert not report.is_sound
    assert [finding.what for finding in report.findings if finding.severity == "note"] == [WEIGHTS_REMEDY]


def test_damage_of_weights_is_refused_as_before(damaged: Opened, tmp_path: Path) -> None:
    copy = tmp_path / damaged.folder.name
    shutil.copytree(damaged.folder, copy)
    weight = open_checkpoint(copy).manifest.by_key()["model.embed_tokens.weight", "weight"]
    file = Path(weight.pieces[0].file)
    file.write_bytes(file.read_bytes()[: weight.pieces[0].start + 10])
    opened = open_checkpoint(copy)
    assert opened.remedy == ""
    with pytest.raises(ValueError, match="it is truncated"):
        load(opened, empty(WIDE), weights_only=True)
    with pytest.raises(ValueError, match="it is truncated"):
        prepare(opened, "universal", WriteOptions(states=("weight",)))
