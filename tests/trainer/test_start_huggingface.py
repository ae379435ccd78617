"""A run that starts from a Hugging Face model: its weights, the gate before the first step, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launch.ranks import RankError
from parallel.layout import Layout
from tests.foreign.oracle import Oracle
from tests.proof.gather import whole_tensors
from tests.proof.runs import Resumed, look_and_run, run_config, write_corpora
from tests.ranks import run_ranks

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
    assert "checkpoint.parity = never" in error.value.message
    assert not (folder / "wrong" / "checkpoints").exists()
