"""Every state of genuine Megatron checkpoints of the format `torch` is read bit for bit, on any layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.opening import Opened, UnreadableError, open_checkpoint
from checkpoint.whole import read_whole
from parallel.layout import Layout
from tests.foreign.megatron import ITERATION, SAMPLES, TRACKER, Run, save_torch
from tests.foreign.oracle import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Oracle

BF16, MOE = Oracle(precision="bf16"), Oracle(precision="bf16", experts=4)
ALL = {"weight", "master", "exp_avg", "exp_avg_sq"}
BUCKET = 100_000  # elements: several buckets, some of them padded
PLAIN = Layout(distributed_optimizer=False)

CASES = {
    "TP2 PP2": (BF16, Run(Layout(tensor=2, pipeline=2), 4)),
    "TP2 PP2, tied, buckets, fp32": (Oracle(tied=True), Run(Layout(tensor=2, pipeline=2), 4, bucket=BUCKET)),
    "VPP2, fp32": (Oracle(), Run(Layout(pipeline=2, virtual_pipeline=2), 2)),
    "VPP2, tied": (
        Oracle(tied=True, precision="bf16", hidden=256),
        Run(Layout(pipeline=2, virtual_pipeline=2), 2),
    ),
    "DP3, tied, buckets": (Oracle(tied=True, precision="bf16"), Run(Layout(), 3, bucket=BUCKET)),
    "DP2, one bucket, fp32": (Oracle(), Run(Layout(), 2)),
    "EP2": (MOE, Run(Layout(expert=2), 2)),
    "EP2 DP2, buckets": (MOE, Run(Layout(expert=2), 4, bucket=BUCKET)),
    "EP2 TP2 PP2": (MOE, Run(Layout(tensor=2, pipeline=2, expert=2, sequence_parallel=True), 8)),
    "experts, EP1, fp32": (Oracle(experts=4), Run()),
    "plain, TP2 PP2": (BF16, Run(Layout(tensor=2, pipeline=2, distributed_optimizer=False), 4)),
    "plain, EP2": (MOE, Run(Layout(expert=2, distributed_optimizer=False), 2)),
    "plain, VPP2, tied": (
        Oracle(tied=True, precision="bf16"),
        Run(Layout(pipeline=2, virtual_pipeline=2, distributed_optimizer=False), 2),
    ),
    "1 and 3 layers": (BF16, Run(Layout(pipeline=2), 2, config={"num_layers_in_first_pipeline_stage": 1})),
    "stages that count embedding and loss": (
        BF16,
        Run(
            Layout(pipeline=2, virtual_pipeline=3),
            2,
            config={
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
        ),
    ),
    "stages by a given layout": (
        BF16,
        Run(
            Layout(pipeline=2, virtual_pipeline=2), 2, config={"pipeline_model_parallel_layout": "E|ttt||tL"}
        ),
    ),
}
"""A chunk of the last two has no layers."""


def assert_equal(opened: Opened, oracle: Oracle, states: set[str] = ALL) -> None:
    """Exactly these states of all parameters are there, and every one is the oracle's."""
    assert not opened.problems
    tensors = opened.manifest.by_key()
    assert set(tensors) == {(name, state) for name in oracle.shapes() for state in states}
    for (name, state), tensor in tensors.items():
        assert torch.equal(read_whole(opened.folder, tensor), oracle.value(name, state)), (name, state)


@pytest.mark.parametrize("case", CASES)
def test_every_state_is_read_bit_for_bit(case: str, tmp_path: Path) -> None:
    oracle, run = CASES[case]
    opened = open_checkpoint(save_torch(tmp_path, oracle, run))
    assert_equal(opened, oracle)
    assert opened.manifest.state["scalars"] == {"updates": STEP, "lr": LR}
    groups = opened.manifest.state["groups"]
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {name: oracle.weight_decay(name) for name in oracle.shapes()}


def test_a_plain_optimizer_in_float32_has_no_masters(tmp_path: Path) -> None:
    opened = open_checkpoint(save_torch(tmp_path, Oracle(), Run(PLAIN)))
    assert_equal(opened, Oracle(), ALL - {"master"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TP2 PP2 in bf16."""
    return save_torch(tmp_path_factory.mktemp("megatron"), BF16, Run(Layout(tensor=2, pipeline=2), 4))


def test_groups_counters_and_arguments_are_carried(saved: Path) -> None:
    manifest = open_checkpoint(saved).manifest
    state = manifest.state
    assert manifest.step == STEP
    for group in state["groups"]:
        assert (group["lr"], group["betas"], group["eps"]) == (LR, list(BETAS), EPS)
    source = state["source"]
    assert source["opt_param_scheduler"]["num_steps"] == SAMPLES
    assert source["args"]["consumed_train_samples"] == SAMPLES
    assert source["args"]["weight_decay"] == WEIGHT_DECAY
    assert source["args"]["params_dtype"] == "bfloat16"
    assert state["per_parameter"] == {}
    assert any("rng_state" in line for line in state["left_out"])


def test_facts_come_from_the_arguments(saved: Path) -> None:
    model = BF16.architecture()
    facts = open_checkpoint(saved).manifest.state["facts"]
    expected = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "gated": 1,
        "tie_word_embeddings": 0,
    }
    assert expected.items() <= facts.items()


def test_a_vocabulary_that_the_arguments_do_not_tell_can_be_given(tmp_path: Path) -> None:
    save_torch(tmp_path, BF16, Run(says_vocabulary=False))
    with pytest.raises(UnreadableError, match="vocab_size"):
        open_checkpoint(tmp_path)
    assert_equal(open_checkpoint(tmp_path, facts={"vocab_size": BF16.vocab}), BF16)


def test_the_folder_of_an_iteration_can_be_given(saved: Path) -> None:
    assert open_checkpoint(saved / ITERATION).manifest.tensors == open_checkpoint(saved).manifest.tensors


def test_of_several_iterations_the_tracked_one_is_read(saved: Path, tmp_path: Path) -> None:
    for name in ("iter_0000003", "iter_0000007", "iter_0000012"):
        shutil.copytree(saved / ITERATION, tmp_path / name)
    assert open_checkpoint(tmp_path).folder == tmp_path / "iter_0000012"
    (tmp_path / TRACKER).write_text("3\n")
    assert open_checkpoint(tmp_path).folder == tmp_path / "iter_0000003"
    (tmp_path / "release").symlink_to(saved / ITERATION)
    (tmp_path / TRACKER).write_text("release")
    assert open_checkpoint(tmp_path).folder == tmp_path / "release"


def rewrite(folder: Path, change: Any, name: str = "model_optim_rng.pt") -> None:
    """Change what every rank's file holds, with torch."""
    for path in sorted(folder.glob(f"{ITERATION}/*/{name}")):
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def test_a_checkpoint_without_optimizer_has_weights(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "weights")
    rewrite(folder, lambda content: content.pop("optimizer"))
    opened = open_checkpoint(folder)
    assert "without optimizer" in opened.format
    assert_equal(opened, BF16, {"weight"})


def test_groups_with_settings_of_their_own_are_told_apart(saved: Path, tmp_path: Path) -> None:
    """As with --decoupled-lr: embedding and output have a group with another learning rate."""
    folder = shutil.copytree(saved, tmp_path / "decoupled")

    def decouple(content: dict[str, Any]) -> None:
        decayed, vectors = content["optimizer"]["optimizer"]["param_groups"]
        own = decayed | {"is_decoupled_lr": True, "lr": 5e-4}
        content["optimizer"]["optimizer"]["param_groups"] = [decayed, own, vectors]

    rewrite(folder, decouple)
    groups = open_checkpoint(folder).manifest.state["groups"]
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    assert rates == {name: 5e-4 if name in tables else LR for name in BF16.shapes()}


def test_groups_that_nothing_tells_apart_are_left_out_by_name(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "alike")

    def double(content: dict[str, Any]) -> None:
        groups = content["optimizer"]["optimizer"]["param_groups"]
        groups.append(dict(groups[0], lr=1.0))

    rewrite(folder, double)
    opened = open_checkpoint(folder)
    assert_equal(opened, BF16)
    assert opened.manifest.state["scalars"] == {"updates": STEP}
    assert any("3 parameter groups" in line for line in opened.left_out)


def test_frozen_parameters_have_weights_only(saved: Path, tmp_path: Path) -> None:
    """Parameters that the optimizer does not have, between others that it has."""
    folder = shutil.copytree(saved, tmp_path / "frozen")

    def freeze(content: dict[str, Any]) -> None:
        model = {}
        for name, value in content["model"].items():
            model[name] = value
            if name.endswith("layers.0.self_attention.linear_proj.weight"):
                model[name.replace("linear_proj", "q_layernorm")] = torch.full((24,), 3.0).bfloat16()
        content["model"] = model

    rewrite(folder, freeze)
    opened = open_checkpoint(folder)
    states = {state for name, state in opened.manifest.by_key() if "q_norm" in name}
    assert (states, opened.problems) == ({"weight"}, ())
