"""Which model a checkpoint says it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.huggingface import from_huggingface

if TYPE_CHECKING:
    from checkpoint.opening import Opened

_MEGATRON = {
    "rotary_base": "rope_theta",
    "norm_epsilon": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",
    "moe_router_topk": "experts_per_token",
}
"""Megatron-LM's arguments (megatron/training/arguments.py) that no shape gives away -> our fields."""


def architecture_of(opened: Opened) -> Architecture | None:
    """The architecture in full; None where the checkpoint does not say.

    Raises:
        ValueError: its config.json is of a model that Ratoon does not compute.
    """
    if own := opened.manifest.state.get("model"):
        return Architecture.model_validate(own)
    config = opened.manifest.state.get("model_config")
    if config is None:
        return None
    return ModelConfig(**from_huggingface(config, str(opened.folder / "config.json"))).resolve()


def stated_fields(opened: Opened) -> dict[str, Any]:
    """Fields of `Architecture` that the checkpoint states: all, some (as Megatron's arguments), or none.

    A config.json that Ratoon cannot read states nothing: nobody has asked for that model.
    """
    if own := opened.manifest.state.get("model"):
        return {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    try:
        model = architecture_of(opened)
    except ValueError:
        return {}
    if model is not None:
        return model.model_dump()
    source = opened.manifest.state.get("source")
    arguments = source.get("args") if isinstance(source, Mapping) else None
    if not isinstance(arguments, Mapping):
        return {}
    wanted = {field: arguments.get(argument) for argument, field in _MEGATRON.items()}
    if not arguments.get("num_experts"):
        wanted.pop("experts_per_token")
    return {field: value for field, value in wanted.items() if type(value) in (int, float)}
