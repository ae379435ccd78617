"""DeepSpeed itself resumes what was written for it, under every ZeRO stage, and makes the next update.

DeepSpeed updates flat fp32 buffers by the very torch.optim.AdamW that makes `Oracle.stepped`, number by
number: the results are compared bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.convert.run import convert, prepare
from checkpoint.opening import open_checkpoint
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from tests.foreign.deepspeed import (
    Resumed,
    Run,
    load_universal_and_step,
    load_universal_weights,
    save,
    save_weights,
)
from tests.foreign.deepspeed_pipeline import SPEC, load_universal_pipeline, save_pipeline
from tests.foreign.oracle import LR, STEP, WEIGHT_DECAY, Oracle

STAGES = [pytest.param(1, marks=pytest.mark.long), 2, 3]


def to_universal(source: Path, target: Path, spec: Path | None = None) -> Path:
    options = WriteOptions(spec=str(spec) if spec else None)
    convert(prepare(source, "deepspeed_universal", options, spec=spec), target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The universal folder of a run of ZeRO 2 on 3 ranks."""
    path = tmp_path_factory.mktemp("universal")
    return to_universal(save(path / "saved", Oracle(), Run(2, world=3)), path / "universal")


def wrong(resumed: Resumed, oracle: Oracle) -> list[tuple[str, str]]:
    return [
        (name, state)
        for (name, state), value in resumed.states.items()
        if not torch.equal(value, oracle.stepped(name)[state])
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_resumes_and_steps_as_the_oracle(stage: int, folder: Path) -> None:
    oracle = Oracle()
    resumed = load_universal_and_step(folder, oracle, Run(stage))
    assert {name for name, _ in resumed.states} == set(oracle.shapes())
    assert not wrong(resumed, oracle)
    assert resumed.global_steps == STEP + 1
    decays = {name: settings["weight_decay"] for names, settings in resumed.groups for name in names}
    assert decays == {n: WEIGHT_DECAY if len(s) > 1 else 0.0 for n, s in oracle.shapes().items()}
    assert {settings["lr"] for _, settings in resumed.groups} == {LR}


@pytest.mark.long
def test_the_note_about_shared_steps_is_needed(folder: Path) -> None:
    """Without what the writer's note asks for, torch's AdamW under ZeRO 3 counts two steps for one."""
    resumed = load_universal_and_step(folder, Oracle(), Run(3), separate=False)
    names = {name for name, _ in wrong(resumed, Oracle())}
    assert names == {name for name, shape in Oracle().shapes().items() if len(shape) == 1}


@pytest.mark.long
def test_deepspeeds_own_adam_resumes_under_zero_3(tmp_path: Path) -> None:
    """Its steps are whole numbers, which nothing has to separate. It is C++ with fused multiply-add."""
    oracle = Oracle()
    run = Run(3, optimizer="cpu_adam", config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    universal = to_universal(save(tmp_path / "saved", oracle, run), tmp_path / "universal")
    resumed = load_universal_and_step(universal, oracle, run, separate=False)
    for (name, state), value in resumed.states.items():
        assert torch.allclose(value, oracle.stepped(name)[state], rtol=1e-5, atol=1e-8), (name, state)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_take_the_momentum_of_sgd(stage: int, tmp_path: Path) -> None:
    oracle = Oracle(layers=1)
    saved = save(tmp_path / "saved", oracle, Run(3, optimizer="sgd"))
    universal = to_universal(saved, tmp_path / "universal")
    resumed = load_universal_and_step(universal, oracle, Run(stage, optimizer="sgd"))
    for name in oracle.shapes():
        gradient = oracle.value(name, "grad") + oracle.weight_decay(name) * oracle.value(name, "master")
        expected = 0.9 * oracle.value(name, "exp_avg") + gradient
        found = resumed.states[name, "momentum_buffer"]
        # two roundings of fp32 where torch may fuse them
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8), name


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_alone_are_loaded_as_the_note_says(stage: int, tmp_path: Path) -> None:
    oracle = Oracle(layers=1)
    save_weights(tmp_path / "saved", oracle)
    conversion = prepare(tmp_path / "saved", "deepspeed_universal", WriteOptions())
    assert conversion.plan.notes == ["there is no optimizer state: load it with load_module_only=True"]
    convert(conversion, tmp_path / "universal")
    load_universal_weights(tmp_path / "universal", oracle, Run(stage))


@pytest.mark.long
def test_the_momentum_of_muon_is_listed_as_lost(tmp_path: Path) -> None:
    saved = save(tmp_path / "saved", Oracle(layers=1), Run(2, optimizer="muon"))
    planned = prepare(saved, "deepspeed_universal", WriteOptions()).plan
    assert any("momentum_buffer" in line for line in planned.lost)
    assert not any("momentum_buffer" in file.path for file in planned.files)


@pytest.mark.long
@pytest.mark.parametrize(("stages", "world"), [(1, 2), (2, 4), (3, 3)])
def test_a_tied_pipeline_resumes_on_other_stages(stages: int, world: int, tmp_path: Path) -> None:
    oracle = Oracle(tied=True)
    spec = tmp_path / "spec.toml"
    spec.write_text(SPEC)
    saved = save_pipeline(tmp_path / "saved", oracle, Run(1, world=4))
    universal = to_universal(saved, tmp_path / "universal", spec)
    load_universal_pipeline(universal, oracle, Run(1, world=world), stages)


def test_what_was_written_is_read_back_bit_for_bit(folder: Path) -> None:
    oracle, opened = Oracle(), open_checkpoint(folder)
    tensors = opened.manifest.by_key()
    assert set(tensors) == {(n, s) for n in oracle.shapes() for s in ("master", "exp_avg", "exp_avg_sq")}
    for (name, state), tensor in tensors.items():
        assert torch.equal(read_whole(opened.folder, tensor), oracle.value(name, state)), (name, state)


def test_groups_and_counters_are_read_back(folder: Path) -> None:
    manifest = open_checkpoint(folder).manifest
    decays = {n: group["weight_decay"] for group in manifest.state["groups"] for n in group["names"]}
    assert decays == {n: WEIGHT_DECAY if len(s) > 1 else 0.0 for n, s in Oracle().shapes().items()}
    assert manifest.state["scalars"] == {"updates": STEP, "lr": LR}
    assert manifest.step == STEP


def test_no_file_is_larger_than_its_tensor(folder: Path) -> None:
    """No flat shard of a rank is taken along."""
    for path in folder.rglob("*.pt"):
        if path.name in ("optimizer_state.pt", "step.pt") or path.name.endswith("_model_states.pt"):
            assert path.stat().st_size < 1 << 17, path
