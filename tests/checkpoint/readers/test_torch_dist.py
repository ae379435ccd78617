"""Every state of genuine torch_dist checkpoints is read bit for bit, whatever the layout and the sharding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from checkpoint.opening import Opened, UnreadableError, open_checkpoint
from checkpoint.readers.torch_dist_model import Chunk, Model, Place, orders
from checkpoint.readers.torch_dist_shards import Whole
from checkpoint.whole import read_whole
from parallel.layout import Layout
from tests.foreign.megatron import ITERATION, SAMPLES, Dist, Run, save_torch_dist
from tests.foreign.oracle import BETAS, EPS, LR, STATES, STEP, WEIGHT_DECAY, Oracle

BF16, FP32 = Oracle(hidden=64, vocab=515, precision="bf16"), Oracle(hidden=64, vocab=515)
TIED = Oracle(hidden=64, vocab=515, tied=True)
MOE = Oracle(hidden=64, vocab=515, layers=2, experts=4, precision="bf16")
WIDE = Oracle(hidden=192, vocab=515, layers=2, precision="bf16")
FULLY, NAMED = Dist("fully_reshardable"), Dist(homogeneous=False)
TP2_PP2 = Run(Layout(tensor=2, pipeline=2), 4)
VPP2 = Run(Layout(pipeline=2, virtual_pipeline=2), 2)
EP2 = Run(Layout(expert=2), 2)
EP2_TP2_PP2 = Run(Layout(tensor=2, pipeline=2, expert=2, sequence_parallel=True), 8)
PLAIN = Layout(tensor=2, pipeline=2, distributed_optimizer=False)

QUICK = {
    "dp_reshardable, TP2 PP2, bf16": (BF16, TP2_PP2, Dist()),
    "dp_reshardable, VPP2, tied, fp32": (TIED, VPP2, Dist()),
    "dp_reshardable, EP2, bf16": (MOE, EP2, Dist()),
    "dp_reshardable, DP3, several buckets": (WIDE, Run(Layout(), 3, bucket=100_000), Dist()),
    "fully_reshardable, TP2 PP2, fp32": (FP32, TP2_PP2, FULLY),
    "fully_reshardable, EP2, a key for every layer": (MOE, EP2, Dist("fully_reshardable", homogeneous=False)),
}
LONG = {
    "dp_reshardable, TP2 PP2, a key for every layer": (BF16, TP2_PP2, NAMED),
    "dp_reshardable, EP2, a key for every layer": (MOE, EP2, NAMED),
    "dp_reshardable, EP2 TP2 PP2": (MOE, EP2_TP2_PP2, Dist()),
    "dp_reshardable, experts in the one optimizer": (MOE, Run(Layout(), 2), Dist()),
    "dp_reshardable, tied, PP2 DP3": (TIED, Run(Layout(pipeline=2), 6), Dist()),
    "dp_reshardable, uneven stages": (
        BF16,
        Run(Layout(pipeline=2), 2, config={"num_layers_in_first_pipeline_stage": 1}),
        Dist(),
    ),
    "fully_reshardable, VPP2, tied, fp32": (TIED, VPP2, FULLY),
    "fully_reshardable, EP2 TP2 PP2": (MOE, EP2_TP2_PP2, FULLY),
    "plain optimizer, TP2 PP2, bf16": (BF16, Run(PLAIN, 4), Dist()),
}


def assert_equal(opened: Opened, oracle: Oracle, states: tuple[str, ...] = STATES) -> None:
    """Exactly these states of all parameters are there, and every one is the oracle's."""
    assert not opened.problems
    tensors = opened.manifest.by_key()
    assert set(tensors) == {(name, state) for name in oracle.shapes() for state in states}
    for (name, state), tensor in tensors.items():
        assert torch.equal(read_whole(opened.folder, tensor), oracle.value(name, state)), (name, state)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_every_state_is_read_bit_for_bit(case: str, tmp_path: Path) -> None:
    oracle, run, dist = (QUICK | LONG)[case]
    assert_equal(open_checkpoint(save_torch_dist(tmp_path, oracle, run, dist)), oracle)


def test_a_checkpoint_without_optimizer_has_the_weights(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path, BF16, Run(Layout(tensor=2), 2), Dist(optimizer=False))
    opened = open_checkpoint(folder)
    assert_equal(opened, BF16, ("weight",))
    assert opened.format == "Megatron torch_dist, TP2 PP1, without optimizer, bf16"


def test_a_plain_optimizer_in_fp32_has_no_masters(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path, FP32, Run(Layout(distributed_optimizer=False), 1))
    assert_equal(open_checkpoint(folder), FP32, ("weight", "exp_avg", "exp_avg_sq"))


def test_ranks_that_share_the_writing_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--ckpt-fully-parallel-save`, Megatron-LM's default: the index has another order then."""
    save = dist_checkpointing.save

    def save_in_parallel(state: dict[str, object], folder: str, **options: object) -> None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), group)
        save(state, folder, strategy, **options)

    monkeypatch.setattr(dist_checkpointing, "save", save_in_parallel)
    run = Run(Layout(tensor=2), 4, bucket=20_000)
    assert_equal(open_checkpoint(save_torch_dist(tmp_path, BF16, run)), BF16)


def test_norms_that_are_fused_are_tried_at_both_places() -> None:
    """Transformer Engine registers the norm with the matrix behind it; modules of their own come first."""
    names = [
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "embedding.word_embeddings.weight",
    ]
    whole = {name: Whole(name, "float32", (1, 2), ()) for name in names}
    slots = list(Model(whole).slots(Chunk(range(1), is_first=True, is_last=True), Place()))
    found = [[names.index(shard.name) for shard in order] for order in orders(slots, names)]
    assert found == [[3, 0, 1, 2], [3, 1, 0, 2]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dp_reshardable on two tensor ranks and two data ranks."""
    run = Run(Layout(tensor=2), 4, bucket=20_000)
    return save_torch_dist(tmp_path_factory.mktemp("saved"), BF16, run)


def copied(saved: Path, folder: Path) -> Path:
    """The folder of the iteration, to be damaged."""
    return shutil.copytree(saved / ITERATION, folder / ITERATION)


def test_groups_and_numbers_are_those_of_the_run(saved: Path) -> None:
    state = open_checkpoint(saved).manifest.state
    assert state["scalars"] == {"updates": STEP, "lr": LR}
    decayed = {name: group["weight_decay"] for group in state["groups"] for name in group["names"]}
    assert decayed == {name: BF16.weight_decay(name) for name in BF16.shapes()}
    assert all(tuple(group["betas"]) == BETAS and group["eps"] == EPS for group in state["groups"])
    assert state["source"]["opt_param_scheduler"]["num_steps"] == SAMPLES
    assert state["source"]["args"]["weight_decay"] == WEIGHT_DECAY


def test_groups_of_a_plain_optimizer_have_its_count_of_updates(tmp_path: Path) -> None:
    run = Run(Layout(distributed_optimizer=False), 1)
    state = open_checkpoint(save_torch_dist(tmp_path, BF16, run)).manifest.state
    assert state["scalars"]["updates"] == STEP
    assert {name for group in state["groups"] for name in group["names"]} == set(BF16.shapes())


def test_what_is_not_carried_is_named(saved: Path) -> None:
    left_out = open_checkpoint(saved).left_out
    assert [line.split(":")[0] for line in left_out] == [
        "_extra_state of modules",
        "rng_state",
    ]


def test_states_of_norms_on_other_tensor_ranks_are_copies(saved: Path) -> None:
    tensors = open_checkpoint(saved).manifest.by_key()
    assert len(tensors["model.norm.weight", "exp_avg"].replicas) == 1
    assert not tensors["lm_head.weight", "exp_avg"].replicas


def test_the_folder_of_an_iteration_and_the_one_above_are_the_same(saved: Path) -> None:
    assert open_checkpoint(saved).digest == open_checkpoint(saved / ITERATION).digest
    assert open_checkpoint(saved).manifest.step == STEP


def test_the_common_state_of_later_versions_is_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In megatron-core 0.19 `dist_checkpointing.save` adds a ShardedObject of it; here the test does."""
    before = open_checkpoint(save_torch_dist(tmp_path / "before", BF16, Run(), FULLY))
    common = torch.load(before.folder / "common.pt", weights_only=False)
    save = dist_checkpointing.save

    def save_with_object(state: dict[str, object], folder: str, **options: object) -> None:
        state["common_state"] = ShardedObject("common_state", common, (1,), (0,))
        save(state, folder, **options)

    monkeypatch.setattr(dist_checkpointing, "save", save_with_object)
    folder = save_torch_dist(tmp_path / "after", BF16, Run(), FULLY)
    (folder / ITERATION / "common.pt").unlink()
    after = open_checkpoint(folder)
    assert_equal(after, BF16)
    assert (after.format, after.left_out) == (before.format, before.left_out)
    assert after.manifest.state == before.manifest.state


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_files_are_named(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    victim = folder / "__1_0.distcp"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 5000 if damage == "truncated" else 0])
    problems = open_checkpoint(folder).problems
    assert problems
    assert any(str(victim) in problem for problem in problems)


def test_a_missing_common_file_is_a_problem(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "common.pt").unlink()
    facts = {"num_attention_heads": 8, "num_query_groups": 4, "head_dim": 8, "vocab_size": 515, "gated": 1}
    problems = open_checkpoint(folder, facts=facts).problems
    assert [problem.split(",")[0] for problem in problems] == [f"{folder / 'common.pt'} is missing"]


def test_a_save_that_was_not_finished_is_a_problem(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "metadata.json").unlink()
    assert any("written last" in problem for problem in open_checkpoint(folder).problems)
    (folder / ".metadata").unlink()
    with pytest.raises(UnreadableError, match="was not finished"):
        open_checkpoint(folder)


def test_another_backend_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UnreadableError, match="'zarr', expected 'torch_dist'"):
        open_checkpoint(folder)


def test_masters_that_are_not_the_weights_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    master = open_checkpoint(folder).manifest.by_key()["model.layers.2.mlp.down_proj.weight", "master"]
    for piece in master.pieces:
        with open(piece.file, "r+b") as file:
            file.seek(piece.start)
            file.write(bytes(piece.num_bytes))
    problems = open_checkpoint(folder).problems
    assert problems
    assert all("files of different saves mixed, or a file that was changed" in line for line in problems)
