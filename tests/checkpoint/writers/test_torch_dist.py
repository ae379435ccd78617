"""Written torch_dist folders: megatron-core's own loader takes them, optimizer included, on any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from checkpoint.convert.run import convert, prepare
from checkpoint.manifest import LogicalTensor, Manifest
from checkpoint.opening import open_checkpoint
from checkpoint.readers.dcp_metadata import read_dcp_metadata
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.torch_dist_groups import Groups
from parallel.layout import Layout
from tests.foreign import dcp, deepspeed, huggingface, native
from tests.foreign.megatron import ITERATION, SAMPLES, Dist, Run, load_and_step, save_torch, save_torch_dist
from tests.foreign.oracle import LR, STATES, STEP, WEIGHT_DECAY, Oracle
from tests.foreign.test_megatron import wrong
from tests.ranks import run_ranks

BF16, FP32 = Oracle(precision="bf16"), Oracle()
TIED, EXPERTS = Oracle(precision="bf16", tied=True), Oracle(precision="bf16", experts=4)
TP2_PP2, DP2 = Run(Layout(tensor=2, pipeline=2), 4), Run(Layout(), 2)
VPP2, EP2 = Run(Layout(pipeline=2, virtual_pipeline=2), 2), Run(Layout(expert=2), 2)
HEADS = {"num_attention_heads": 8, "num_query_groups": 4}  # which DCP and DeepSpeed do not say
ADAM = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}
SHARDING = Dist("fully_reshardable")

Make = Callable[[Path, Oracle], object]


def from_ratoon(folder: Path, oracle: Oracle) -> object:
    return native.save(folder, oracle, EP2 if oracle.experts else Run(Layout(tensor=2), 2))


def from_fsdp(folder: Path, oracle: Oracle) -> object:
    return dcp.save(folder, oracle, dcp.Run((3,)))


def from_deepspeed(folder: Path, oracle: Oracle) -> object:
    return deepspeed.save(folder, oracle, deepspeed.Run(3, 3))


def written(tmp_path: Path, oracle: Oracle, make: Make, **facts: int) -> Path:
    make(tmp_path / "source", oracle)
    said = {} if make is from_ratoon else HEADS
    conversion = prepare(tmp_path / "source", "torch_dist", WriteOptions(facts={**said, **facts}))
    assert conversion.plan.lost == []
    convert(conversion, tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize(
    ("oracle", "make", "run"),
    [
        (BF16, from_ratoon, TP2_PP2),
        pytest.param(FP32, from_fsdp, DP2, marks=pytest.mark.long),
        (EXPERTS, from_ratoon, EP2),
        pytest.param(BF16, from_deepspeed, VPP2, marks=pytest.mark.long),
        pytest.param(TIED, from_ratoon, TP2_PP2, marks=pytest.mark.long),
        pytest.param(TIED, from_ratoon, DP2, marks=pytest.mark.long),
        pytest.param(FP32, from_fsdp, TP2_PP2, marks=pytest.mark.long),
    ],
)
def test_megatron_core_loads_it_and_steps_as_the_oracle(
    oracle: Oracle, make: Make, run: Run, tmp_path: Path
) -> None:
    folder = written(tmp_path, oracle, make)
    assert wrong(load_and_step(folder / ITERATION, oracle, run, SHARDING), oracle) == set()


def test_layers_that_are_cut_into_chunks_load_too(tmp_path: Path) -> None:
    native.save(tmp_path / "source", BF16, DP2)
    convert(
        prepare(tmp_path / "source", "torch_dist", WriteOptions(shard_bytes=1 << 17)), tmp_path / "target"
    )
    folder = tmp_path / "target" / ITERATION
    stored = read_dcp_metadata(folder).tensors["decoder.layers.mlp.linear_fc1.weight"]
    layers, rows, _ = stored.chunks[0].box.size
    assert layers == 1
    assert rows < stored.shape[1]
    assert wrong(load_and_step(folder, BF16, TP2_PP2, SHARDING), BF16) == set()


def test_experts_without_expert_parallelism(tmp_path: Path) -> None:
    folder = written(tmp_path, EXPERTS, from_ratoon, expert_model_parallel_size=1)
    stepped = load_and_step(folder / ITERATION, EXPERTS, Run(Layout(pipeline=2), 2), SHARDING)
    assert wrong(stepped, EXPERTS) == set()


@pytest.mark.parametrize("oracle", [BF16, EXPERTS])
def test_our_reader_finds_the_oracle_in_it(oracle: Oracle, tmp_path: Path) -> None:
    folder = written(tmp_path, oracle, from_ratoon)
    opened = open_checkpoint(folder)
    assert not opened.problems
    held = {(t.name, t.state): read_whole(opened.folder, t) for t in opened.manifest.tensors}
    assert held.keys() == {(name, state) for name in oracle.shapes() for state in STATES}
    assert all(torch.equal(tensor, oracle.value(*key)) for key, tensor in held.items())


def test_weights_alone_are_a_release(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "source", BF16)
    conversion = prepare(tmp_path / "source", "torch_dist", WriteOptions())
    assert conversion.plan.lost == []
    convert(conversion, tmp_path / "target")
    assert (tmp_path / "target" / "latest_checkpointed_iteration.txt").read_text() == "release"
    opened = open_checkpoint(tmp_path / "target")
    assert {tensor.state for tensor in opened.manifest.tensors} == {"weight"}
    args = common(tmp_path / "target" / "release")["args"]
    assert (args.position_embedding_type, args.rotary_base, args.normalization) == ("rope", 10000, "RMSNorm")


def test_a_checkpoint_of_megatron_keeps_its_scheduler_and_arguments(tmp_path: Path) -> None:
    save_torch(tmp_path / "source", BF16, TP2_PP2)
    conversion = prepare(tmp_path / "source", "torch_dist", WriteOptions())
    assert conversion.plan.lost == []
    convert(conversion, tmp_path / "target")
    source = open_checkpoint(tmp_path / "target").manifest.state["source"]
    assert source["opt_param_scheduler"]["num_steps"] == source["args"]["consumed_train_samples"] == SAMPLES


def common(folder: Path) -> dict[str, Any]:
    held = torch.load(folder / "common.pt", weights_only=False)
    assert isinstance(held, dict)
    return held


@pytest.mark.parametrize("own", [True, False])
def test_the_scheduler_of_megatron_goes_on_behind_the_samples_seen(own: bool, tmp_path: Path) -> None:
    folder = written(tmp_path, BF16, from_ratoon, consumed_train_samples=SAMPLES) / ITERATION
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "wd_mult": 1.0, "lr_mult": 1.0}
    optimizer = torch.optim.SGD([group])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=2 * LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=2 * SAMPLES,
        lr_decay_style="linear",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=not own,
        override_opt_param_scheduler=own,
    )
    held = common(folder)
    scheduler.load_state_dict(held["opt_param_scheduler"])
    scheduler.step(0)  # loading sets the weight decay only for the next step
    assert scheduler.num_steps == held["args"].consumed_train_samples == SAMPLES
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR)  # the line is halfway down
    assert optimizer.param_groups[0]["weight_decay"] == (0.0 if own else WEIGHT_DECAY)


def test_without_samples_there_is_no_scheduler_and_the_remedy_is_named(tmp_path: Path) -> None:
    from_ratoon(tmp_path / "source", BF16)
    conversion = prepare(tmp_path / "source", "torch_dist", WriteOptions())
    assert any("--fact consumed_train_samples=N" in note for note in conversion.plan.notes)
    convert(conversion, tmp_path / "target")
    assert "opt_param_scheduler" not in common(tmp_path / "target" / ITERATION)


def test_layers_with_keys_of_their_own_are_stacked(tmp_path: Path) -> None:
    save_torch_dist(tmp_path / "source", BF16, Run(), Dist(homogeneous=False))
    convert(prepare(tmp_path / "source", "torch_dist", WriteOptions()), tmp_path / "target")
    assert (
        "decoder.layers.mlp.linear_fc2.weight" in read_dcp_metadata(tmp_path / "target" / ITERATION).tensors
    )


@pytest.mark.long
@pytest.mark.parametrize(("oracle", "run"), [(BF16, TP2_PP2), (EXPERTS, EP2)])
def test_layers_are_given_keys_of_their_own_on_demand(oracle: Oracle, run: Run, tmp_path: Path) -> None:
    folder = written(tmp_path, oracle, from_ratoon, homogeneous_layers=0)
    stepped = load_and_step(folder / ITERATION, oracle, run, Dist("fully_reshardable", homogeneous=False))
    assert wrong(stepped, oracle) == set()


def test_layers_that_differ_have_keys_of_their_own(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "source", EXPERTS)
    opened = open_checkpoint(tmp_path / "source")
    manifest = opened.manifest
    dense = tuple(t for t in manifest.tensors if ".layers.0.mlp." not in t.name)
    mixed = replace(opened, manifest=replace(manifest, tensors=dense))
    convert(prepare(mixed, "torch_dist", WriteOptions()), tmp_path / "target", verify=False)
    tensors = read_dcp_metadata(tmp_path / "target" / "release").tensors
    assert tensors["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"].shape == (4, 192, 72)
    assert common(tmp_path / "target" / "release")["content_metadata"]["non_homogeneous_layers"]


TE_MODULES = ("self_attention.linear_qkv", "self_attention.core_attention", "mlp.linear_fc2")


def load_extra_states(folder: str) -> list[Any]:
    wanted = {
        f"{module}/{layer}": ShardedObject(f"decoder.layers.{module}._extra_state", None, (4,), (layer,))
        for module in TE_MODULES
        for layer in range(4)
    }
    wanted["norm"] = ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,))
    loaded = dist_checkpointing.load(wanted, folder)
    return [loaded[key] for key in wanted]


def test_modules_of_transformer_engine_find_their_extra_state(tmp_path: Path) -> None:
    folder = written(tmp_path, BF16, from_ratoon) / ITERATION
    assert run_ranks(load_extra_states, 1, str(folder)) == [[None] * 13]


def test_norms_have_the_keys_of_both_kinds_of_modules_and_one_copy_of_the_bytes(tmp_path: Path) -> None:
    tensors = read_dcp_metadata(written(tmp_path, BF16, from_ratoon) / ITERATION).tensors
    for state in ("", "optimizer.state.exp_avg."):
        fused = tensors[f"{state}decoder.layers.self_attention.linear_qkv.layer_norm_weight"]
        assert tensors[f"{state}decoder.layers.input_layernorm.weight"] == fused


def manifest(groups: list[dict[str, Any]], **state: Any) -> Manifest:
    """Of one matrix and one vector with moments."""
    tensors = [
        LogicalTensor(name, word, shape, "float32", ())
        for name, shape in {"m.weight": (2, 2), "v.weight": (2,)}.items()
        for word in ("weight", "exp_avg", "exp_avg_sq")
    ]
    return Manifest(STEP, 1, tuple(tensors), {"groups": groups, "scalars": {"updates": STEP}, **state})


def grouped(source: Manifest) -> Groups:
    groups = Groups(source, experts_apart=False)
    for name in ("m.weight", "v.weight"):
        groups.add(name, [name])
    return groups


def test_groups_are_those_that_megatron_core_looks_for() -> None:
    decayed, other = {"names": ["m.weight"], **ADAM, "weight_decay": 0.1}, {"names": ["v.weight"], **ADAM}
    found = grouped(manifest([decayed, {**other, "weight_decay": 0.0}]))
    saved = found.state()["optimizer"]["param_groups"]
    assert [(g["wd_mult"], g["weight_decay"], g["lr"], g["step"]) for g in saved] == [
        (1.0, 0.1, ADAM["lr"], STEP),
        (0.0, 0.0, ADAM["lr"], STEP),
    ]
    assert found.lost == []


def test_settings_that_megatron_core_would_not_keep_are_lost() -> None:
    everything = {"names": ["m.weight", "v.weight"], **ADAM, "weight_decay": 0.1}
    found = grouped(manifest([everything], per_parameter={"scale": {"m.weight": 2.0}}))
    found.state()
    assert found.lost == [
        "scale of m.weight: megatron-core keeps no such number",
        "weight_decay 0.1 of v.weight: megatron-core never decays vectors",
    ]


def test_counts_of_updates_that_differ_are_lost() -> None:
    steps = {"step": {"m.weight": 3, "v.weight": 4}}
    found = grouped(manifest([], per_parameter=steps))
    found.state()
    assert found.lost == [
        "counts of updates: megatron-core has one for all parameters, found are 3 (m.weight), 4 (v.weight)"
    ]
