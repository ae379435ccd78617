"""`[optimizer]`: decay groups that take every parameter once, and megatron-core's words for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.ranks import run_ranks
from trainer.build import build_engine
from trainer.model.config import ModelConfig, presets
from trainer.model.parameters import logical_parameters
from trainer.model.transformer import Execution
from trainer.optimizer import (
    PARAMETER_GROUPS,
    OptimizerConfig,
    megatron_optimizer_config,
    parameter_group,
    weight_decay,
)

GPT = {"preset": "tiny", "linear_bias": True, "normalization": "LayerNorm", "activation": "gelu"}
MODELS: list[dict[str, Any]] = [{"preset": name} for name in presets()] + [
    GPT,
    {"preset": "tiny", "qk_norm": True, "normalization": "LayerNorm", "tie_word_embeddings": False},
]


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_every_parameter_belongs_to_exactly_one_group(fields: dict[str, Any]) -> None:
    names = logical_parameters(ModelConfig(**fields, num_layers=2).resolve(257))
    assert {parameter_group(name) for name in names} <= PARAMETER_GROUPS.keys()


def test_a_parameter_of_no_group_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.mystery matches no group"):
        parameter_group("model.mystery")


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.input_layernorm.bias", False),
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.mlp.experts.3.down_proj.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", True),
        ("model.embed_tokens.weight", True),
    ],
)
def test_matrices_decay_and_nothing_else(name: str, decays: bool) -> None:
    assert weight_decay(OptimizerConfig(weight_decay=0.1), name) == (0.1 if decays else 0.0)


def test_embeddings_can_be_left_out() -> None:
    config = OptimizerConfig(decay_embeddings=False)
    assert weight_decay(config, "model.embed_tokens.weight") == 0.0
    assert weight_decay(config, "lm_head.weight") == config.weight_decay


def decays_of_a_real_optimizer(decay_embeddings: bool) -> dict[float, int]:
    """Weight decay -> number of elements, over the parameter groups that megatron-core made."""
    model = ModelConfig(**GPT).resolve(257)
    config = OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings)
    engine = build_engine(build_mesh(Layout()), model, config, Execution(), sequence_length=64, seed=1)
    sizes: dict[float, int] = {}
    for group in engine.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        sizes[group["weight_decay"]] = sizes.get(group["weight_decay"], 0) + count
    return sizes


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_megatrons_parameter_groups_decay_as_said(decay_embeddings: bool) -> None:
    config = OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings)
    expected: dict[float, int] = {}
    for name, shape in logical_parameters(ModelConfig(**GPT).resolve(257)).items():
        decay = weight_decay(config, name)
        expected[decay] = expected.get(decay, 0) + torch.Size(shape).numel()
    assert run_ranks(decays_of_a_real_optimizer, 1, decay_embeddings)[0] == expected


def test_megatrons_config() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, clip=0.5)
    theirs = megatron_optimizer_config(config, Execution("bf16"), Layout(distributed_optimizer=True))
    assert (theirs.lr, theirs.min_lr, theirs.adam_eps) == (1e-3, 1e-5, 1e-6)
    assert (theirs.adam_beta1, theirs.adam_beta2) == (0.8, 0.9)
    assert (theirs.weight_decay, theirs.clip_grad) == (0.2, 0.5)
    assert (theirs.bf16, theirs.use_distributed_optimizer) == (True, True)


@pytest.mark.parametrize("clip", [None, 0])
def test_clipping_can_be_off(clip: float | None) -> None:
    assert megatron_optimizer_config(OptimizerConfig(clip=clip), Execution(), Layout()).clip_grad == 0.0


@pytest.mark.parametrize(
    "fields", [{"lr": 0}, {"min_lr": 1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}, {"momentum": 0.9}]
)
def test_impossible_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimizerConfig(**fields)
