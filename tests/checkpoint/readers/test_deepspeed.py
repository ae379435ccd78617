"""Every state of genuine DeepSpeed checkpoints is read bit for bit, whatever the stage and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.opening import Opened, open_checkpoint
from checkpoint.whole import read_whole
from tests.foreign.deepspeed import SAMPLES, Run, resume_and_step, save
from tests.foreign.deepspeed_optimizers import moments
from tests.foreign.oracle import LR, STEP, WEIGHT_DECAY, Oracle

ALL = {"weight", "master", "exp_avg", "exp_avg_sq"}
SHARDED = ALL - {"weight"}
FROZEN = r"layers\.0\."
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # with ZeRO 1 and bf16: another optimizer class


def zero(**settings: object) -> dict[str, object]:
    return {"zero_optimization": settings}


QUICK = {
    "zero 2, 3 ranks, fp32": (Oracle(), Run(2, world=3), ALL),
    "zero 3, 2 ranks, bf16": (Oracle(precision="bf16"), Run(3), SHARDED),
}
LONG = {
    "zero 0, fp32": (Oracle(), Run(0), ALL - {"master"}),
    "zero 0, bf16": (Oracle(precision="bf16"), Run(0), ALL),
    "zero 1, tied": (Oracle(tied=True), Run(1), ALL),
    "zero 1, BF16_Optimizer": (Oracle(precision="bf16"), Run(1, config=FP32_SUMS), ALL),
    "zero 2, hidden 256, bf16": (Oracle(hidden=256, precision="bf16"), Run(2), ALL),
    "zero 2, elastic": (Oracle(), Run(2, config=zero(elastic_checkpoint=True)), ALL),
    "zero 2, reordered": (Oracle(), Run(2, world=3, config=zero(round_robin_gradients=True)), ALL),
    "zero 3, 3 ranks, fp32": (Oracle(tied=True), Run(3, world=3), SHARDED),
    "zero 3, sub-groups": (Oracle(), Run(3, world=3, config=zero(sub_group_size=200_000)), SHARDED),
    "zero 2, SGD": (Oracle(), Run(2, optimizer="sgd"), {"weight", "master", "momentum_buffer"}),
    "zero 3, Lion": (Oracle(), Run(3, optimizer="lion"), {"master", "exp_avg"}),
}


def assert_equal(opened: Opened, oracle: Oracle, states: set[str], names: set[str] | None = None) -> None:
    """Exactly these states of these parameters are there, and every one is the oracle's."""
    assert not opened.problems
    tensors = opened.manifest.by_key()
    assert set(tensors) == {(name, state) for name in names or oracle.shapes() for state in states}
    for (name, state), tensor in tensors.items():
        value = oracle.value(name, "exp_avg" if state == "momentum_buffer" else state)
        assert torch.equal(read_whole(opened.folder, tensor), value), (name, state)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_every_state_is_read_bit_for_bit(case: str, tmp_path: Path) -> None:
    oracle, run, states = (QUICK | LONG)[case]
    assert_equal(open_checkpoint(save(tmp_path, oracle, run)), oracle, states)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_itself_goes_on_as_the_oracle(stage: int, tmp_path: Path) -> None:
    """What the readers are tested with are checkpoints of the oracle by DeepSpeed's own loader, too."""
    oracle, run = Oracle(), Run(stage)
    resumed = resume_and_step(save(tmp_path, oracle, run), oracle, run)
    for (name, state), value in resumed.states.items():
        assert torch.equal(value, oracle.stepped(name)[state]), (name, state)


MUON_3 = zero(save_muon_momentum_buffer_in_memory=True, reduce_scatter=False)


@pytest.mark.long
@pytest.mark.parametrize("run", [Run(2, optimizer="muon"), Run(3, optimizer="muon", config=MUON_3)], ids=str)
def test_the_states_of_muon_are_read_under_its_own_words(run: Run, tmp_path: Path) -> None:
    oracle = Oracle()
    opened = open_checkpoint(save(tmp_path, oracle, run))
    tensors = opened.manifest.by_key()
    assert not opened.problems
    for name in oracle.shapes():
        kept = moments("muon", name)
        assert {state for other, state in tensors if other == name} - {"weight", "master"} == set(kept)
        for state, moment in kept.items():
            assert torch.equal(read_whole(opened.folder, tensors[name, state]), oracle.value(name, moment))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO 2 in bf16, with client state."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return save(folder, Oracle(precision="bf16"), Run(2), tokens_seen=123, note="hello")


def test_groups_keep_their_own_settings(saved: Path) -> None:
    groups = open_checkpoint(saved).manifest.state["groups"]
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {n: WEIGHT_DECAY if len(s) > 1 else 0.0 for n, s in Oracle().shapes().items()}


def test_counters_steps_and_client_state_are_carried(saved: Path) -> None:
    manifest = open_checkpoint(saved).manifest
    source = manifest.state["source"]
    assert manifest.step == STEP
    assert manifest.state["scalars"] == {"updates": STEP, "lr": LR}
    assert (source["global_samples"], source["skipped_steps"]) == (SAMPLES, 1)
    assert source["lr_scheduler"] == {"last_batch_iteration": STEP}
    assert source["client_state"] == {"tokens_seen": 123, "note": "hello"}


def test_the_folder_of_a_tag_can_be_given(saved: Path) -> None:
    tag = (saved / "latest").read_text()
    assert open_checkpoint(saved / tag).manifest.tensors == open_checkpoint(saved).manifest.tensors


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_have_weights_only(stage: int, tmp_path: Path) -> None:
    oracle = Oracle(precision="bf16")
    opened = open_checkpoint(save(tmp_path, oracle, Run(stage, frozen=FROZEN)))
    tensors = opened.manifest.by_key()
    frozen = {name for name in oracle.shapes() if ".layers.0." in name}
    assert {state for name, state in tensors if name in frozen} == {"weight"}
    for name in frozen:
        assert torch.equal(read_whole(opened.folder, tensors[name, "weight"]), oracle.value(name, "weight"))
