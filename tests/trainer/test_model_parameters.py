"""Logical names and per-rank counts against the parameters that a real engine holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.ranks import run_ranks
from trainer.build import build_engine
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.parameters import logical_parameters, parameters_per_rank
from trainer.model.transformer import Execution
from trainer.optimizer import OptimizerConfig

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"preset": "tiny"},
    "untied": {"preset": "tiny", "tie_word_embeddings": False},
    "qwen2": {"preset": "tiny", "qkv_bias": True},
    "qwen3": {"preset": "tiny", "qk_norm": True},
    "gpt": {"preset": "tiny", "linear_bias": True, "normalization": "LayerNorm", "activation": "gelu"},
    "mixtral": {"preset": "tiny-moe"},
}
TP2_PP2 = Layout(tensor=2, pipeline=2, sequence_parallel=True)


def architecture(name: str) -> Architecture:
    return ModelConfig(**MODELS[name]).resolve(257)


def holdings(model: Architecture, layout: Layout) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """(pipeline stage, parameters in memory, logical shapes) of this rank."""
    mesh = build_mesh(layout)
    engine = build_engine(mesh, model, OptimizerConfig(), Execution(), sequence_length=64, seed=1)
    held = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
    return mesh.pipeline_rank, held, {b.name: b.shape for entry in engine.named for b in entry.blocks}


@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_the_logical_parameters(name: str) -> None:
    """Names and shapes over all ranks; the number on each stage has the vocabulary padded to 258."""
    model = architecture(name)
    expected = parameters_per_rank(model, TP2_PP2)
    union: dict[str, tuple[int, ...]] = {}
    for stage, held, shapes in run_ranks(holdings, 4, model, TP2_PP2):
        assert held == expected[stage].total
        union |= shapes
    assert union == logical_parameters(model)


def test_expert_ranks_share_the_experts() -> None:
    model = architecture("mixtral")
    layout = Layout(expert=2)
    for _, held, _ in run_ranks(holdings, 2, model, layout):
        assert held == parameters_per_rank(model, layout)[0].total


def test_one_rank_holds_everything_once() -> None:
    for name in MODELS:
        model = architecture(name)
        total = sum(math.prod(shape) for shape in logical_parameters(model).values())
        assert parameters_per_rank(model, Layout())[0].total == total
