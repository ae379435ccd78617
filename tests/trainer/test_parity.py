"""The logits gate: equal models pass on every layout, and each kind of change is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.families.cases import FAMILIES, build_model
from tests.families.compare import fill
from tests.families.reference import Tensors, weights
from tests.ranks import run_ranks
from trainer.build import build_engine, execution_here
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.parity.gate import measure
from trainer.parity.report import ParityReport
from trainer.parity.suspects import configuration_suspects, weight_suspects

LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Saved:
    folder: Path
    model: Architecture
    weights: Tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def save(name: str) -> Saved:
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            model = build_model(FAMILIES[name])
            model.save_pretrained(folder)
            made[name] = Saved(folder, ModelConfig(hf=str(folder)).resolve(0), weights(model))
        return made[name]

    return save


def compare_on(
    layout: Layout, world_size: int, saved: Saved, precision: str = "fp32", **model: Any
) -> ParityReport:
    changed = saved.model.model_copy(update=model)
    reports = run_ranks(_measure, world_size, layout, changed, saved.weights, saved.folder, precision)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def _measure(
    layout: Layout, model: Architecture, tensors: Tensors, folder: Path, precision: str
) -> ParityReport:
    torch.set_num_threads(1)
    mesh = build_mesh(layout)
    execution = execution_here(precision=precision)
    engine = build_engine(mesh, model, OptimizerConfig(), execution, sequence_length=LENGTH, seed=1)
    fill(engine, tensors)
    return measure(engine, folder, length=LENGTH)


LAYOUTS = {
    "one rank": (Layout(), 1),
    "TP2 SP": (Layout(tensor=2, sequence_parallel=True), 2),
    "PP2 VPP2": (Layout(pipeline=2, virtual_pipeline=2), 2),
    "CP2 DP2": (Layout(context=2), 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_model_has_the_same_logits_on_every_layout(saved: Callable[[str], Saved], name: str) -> None:
    report = compare_on(*LAYOUTS[name], saved("llama"))
    assert report.same, report.sentence()
    assert report.first is None, report.first
    assert report.logits.relative < 1e-5
    assert len(report.differences) == 2 + 3 * 4


def test_experts_too(saved: Callable[[str], Saved]) -> None:
    report = compare_on(Layout(expert=2), 2, saved("qwen3_moe, normed"))
    assert report.same, report.sentence()
    assert report.first is None, report.first


def test_bf16_is_measured_against_what_bf16_costs_anyway(saved: Callable[[str], Saved]) -> None:
    report = compare_on(Layout(), 1, saved("llama"), precision="bf16")
    assert report.same, report.sentence()
    assert 1e-3 < report.logits.allowed < 1e-1


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ({"rope_theta": 500.0}, "layer 0 attention", "the RoPE base: model.rope_theta is 500.0 here"),
        ({"norm_epsilon": 1e-2}, "layer 0 attention", "the norm's epsilon"),
        ({"activation": "geglu"}, "layer 0 mlp", "the activation"),
    ],
)
def test_a_changed_setting_is_named_with_the_first_place(
    saved: Callable[[str], Saved], change: dict[str, Any], place: str, words: str
) -> None:
    there = saved("llama")
    report = compare_on(Layout(), 1, there, **change)
    assert not report.same
    assert report.first is not None
    assert report.first.point == place
    assert f"the first to differ: {place}" in report.sentence()
    found = configuration_suspects(there.model.model_copy(update=change), there.model)
    assert len(found) == 1
    assert words in found[0]
    assert json.loads(json.dumps(report.to_json()))["first"] == place


def test_a_permuted_projection_is_named(saved: Callable[[str], Saved]) -> None:
    there = saved("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = there.weights[name]
    head = there.model.head_dim
    wrong = weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    changed = dataclasses.replace(there, weights={**there.weights, name: wrong})
    report = compare_on(Layout(), 1, changed)
    assert report.first is not None
    assert report.first.point == "layer 1 attention"
    found = weight_suspects({**there.weights, name: wrong}, there.weights, there.model)
    assert len(found) == 1
    assert "RoPE halves" in found[0]
    assert name in found[0]
