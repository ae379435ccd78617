"""A run that starts from a Hugging Face model: its weights, the gate before the first step, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from rich.console import Console

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.writers.options import WriteOptions
from launch.check_command import origin_in_words, totals_table
from launch.errors import RankError
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.foreign.huggingface import save
from tests.foreign.oracle import Oracle
from tests.proof.gather import different, whole_tensors
from tests.proof.runs import Resumed, look_and_run, read_checkpoint, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.build import build_engine, execution_here
from trainer.config import architecture
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.parity.gate import measure

ORACLE = Oracle(hidden=64, vocab=263)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> transformers.PreTrainedModel:
    """Saved as "llama"; as "other" with a config.json that means another model of the same shapes."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**ORACLE.huggingface_config())
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "llama")
    shutil.copytree(folder / "llama", folder / "other")
    file = folder / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    return model


def start(folder: Path, name: str, layout: Layout, ranks: int, **changes: Any) -> list[Resumed]:
    given = {
        "model": {"hf": str(folder / "llama")},
        "checkpoint__load": folder / "llama",
        "train__steps": 1,
        "schedule": {"kind": "constant", "warmup_steps": 0},
    }
    return run_ranks(look_and_run, ranks, run_config(folder, layout, run__name=name, **given | changes))


def test_weights_come_in_on_any_layout(folder: Path, model: transformers.PreTrainedModel) -> None:
    found = start(folder, "weights", Layout(tensor=2, pipeline=2), 4)
    held = whole_tensors([one.slices for one in found])
    weights = {name: tensor for (name, state), tensor in held.items() if state == "weight"}
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name].data) for name in expected)
    assert (found[0].step, found[0].updates) == (0, 0)


def test_the_first_step_comes_after_the_gate(folder: Path, model: transformers.PreTrainedModel) -> None:
    text = " ".join(start(folder, "gate", Layout(tensor=2), 2, checkpoint__parity="always")[0].notes)
    assert "exp_avg, exp_avg_sq start fresh" in text
    assert "differ from transformers by" in text


def test_the_gate_can_be_turned_off(folder: Path, model: transformers.PreTrainedModel) -> None:
    text = " ".join(start(folder, "off", Layout(), 1, checkpoint__parity="never")[0].notes)
    assert "transformers by" not in text


def test_another_model_is_refused_before_the_first_step(
    folder: Path, model: transformers.PreTrainedModel
) -> None:
    with pytest.raises(RankError) as error:
        start(folder, "wrong", Layout(), 1, checkpoint__load=folder / "other")
    assert error.value.message is not None
    assert "the first to differ: layer 0 attention" in error.value.message
    assert (
        "Suspects: the norm's epsilon: model.norm_epsilon is 1e-05 here and 0.1 there" in error.value.message
    )
    assert "checkpoint.parity = never" in error.value.message
    assert not (folder / "wrong" / "checkpoints").exists()


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2)], ids=["1", "TP2", "PP2"])
def test_the_gate_changes_nothing(folder: Path, model: transformers.PreTrainedModel, layout: Layout) -> None:
    """Dropout draws from the random streams, so that a draw too many shows."""
    changes = {
        "model": {"hf": str(folder / "llama"), "attention_dropout": 0.1, "hidden_dropout": 0.1},
        "train__steps": 2,
        "run__deterministic": True,
    }
    ranks, name = layout.tensor * layout.pipeline, f"tp{layout.tensor}-pp{layout.pipeline}"
    saved = []
    for wish in ("always", "never"):
        start(folder, f"{name}-{wish}", layout, ranks, checkpoint__parity=wish, **changes)
        saved.append(folder / f"{name}-{wish}" / "checkpoints" / "step-00000002")
    one, other = (read_checkpoint(path) for path in saved)
    assert not different(one, other)
    blobs = [
        {(blob.rank, blob.name): blob.hash for blob in read_manifest(path)[1].rank_blobs} for path in saved
    ]
    assert blobs[0] == blobs[1]
    assert blobs[0]


def test_the_gate_leaves_experts_and_training_flags(folder: Path) -> None:
    experts = save(folder / "experts", Oracle(hidden=64, vocab=263, experts=4))
    before, after = run_ranks(_flags_and_buffers, 1, experts)[0]
    assert all(before[0])
    assert before == after


def _flags_and_buffers(folder: Path) -> list[tuple[list[bool], dict[str, Any]]]:
    torch.set_num_threads(1)
    mesh, model = build_mesh(Layout()), ModelConfig(hf=str(folder)).resolve(0)
    engine = build_engine(
        mesh, model, OptimizerConfig(), execution_here(precision="fp32"), sequence_length=32, seed=1
    )
    found = []
    for _ in range(2):
        flags = [module.training for chunk in engine.wrapped for module in chunk.modules()]
        buffers = {name: buffer.tolist() for name, buffer in engine.chunks[0].named_buffers()}
        found.append((flags, buffers))
        measure(engine, folder, length=32)
    return found


def test_experts_come_in_on_expert_ranks(folder: Path) -> None:
    experts = save(folder / "for-ep", Oracle(hidden=64, vocab=263, experts=4))
    changes = {"model": {"hf": str(experts)}, "checkpoint__load": experts, "checkpoint__parity": "always"}
    found = start(folder, "ep", Layout(expert=2), 2, **changes)
    assert "differ from transformers by" in " ".join(found[0].notes)
    assert list(found[0].records.losses) == [1]


def test_what_was_converted_from_the_folder_starts_as_the_folder(
    folder: Path, model: transformers.PreTrainedModel
) -> None:
    convert(prepare(folder / "llama", "universal", WriteOptions()), folder / "universal")
    found = start(folder, "universal-run", Layout(), 1, checkpoint__load=folder / "universal")[0]
    assert "exp_avg, exp_avg_sq start fresh" in " ".join(found.notes)
    direct = start(folder, "direct-run", Layout(), 1)[0]
    assert found.records.losses == direct.records.losses


def test_without_transformers_auto_goes_on_and_always_does_not(
    folder: Path, model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else real(name, *more)
    )
    text = " ".join(start(folder, "missing", Layout(tensor=2), 2)[1].notes)
    assert "logits not compared with transformers: transformers is not installed" in text
    with pytest.raises(RankError) as error:
        start(folder, "missing-always", Layout(tensor=2), 2, checkpoint__parity="always")
    assert error.value.message is not None
    assert "checkpoint.parity = always, but transformers is not installed" in error.value.message
    assert "pip install" in error.value.message


def test_short_memory_leaves_the_comparison_out(
    folder: Path, model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()._replace(available=1_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    text = " ".join(start(folder, "short", Layout(), 1)[0].notes)
    assert "logits not compared with transformers: transformers would need" in text


def test_check_says_what_it_starts_from(folder: Path, model: transformers.PreTrainedModel) -> None:
    config = run_config(folder, model={"hf": str(folder / "llama")}, checkpoint__load=folder / "llama")
    console = Console(width=300)
    with console.capture() as capture:
        console.print(totals_table(config, architecture(config), 1, origin_in_words(config)))
    line = next(line for line in capture.get().splitlines() if "starts from" in line)
    assert f"{folder / 'llama'}: Hugging Face safetensors, 1 file" in line
    assert "weights alone; step 0" in line
