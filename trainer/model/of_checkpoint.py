"""Which model a checkpoint says it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.huggingface import from_huggingface

if TYPE_CHECKING:
    from checkpoint.opening import Opened


def architecture_of(opened: Opened) -> Architecture | None:
    """The architecture in full; None where the checkpoint does not say.

    Raises:
        ValueError: its config.json is of a model that Ratoon does not compute.
    """
    if own := opened.manifest.state.get("model"):
        return Architecture.model_validate(own)
    config = opened.source.model_config if opened.source is not None else None
    if config is None:
        return None
    return ModelConfig(**from_huggingface(config, str(opened.folder / "config.json"))).resolve()
