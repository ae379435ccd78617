"""What a run file asks of the dealing of its sequences, and whether its capped sources last for it."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.data.config import DataConfig
from trainer.data.dealing import Terms
from trainer.data.mixture_config import cap_tokens
from trainer.data.weights import quantise, resolve_weights


def terms_of(
    config: DataConfig, sizes: Mapping[str, int], *, seed: int, global_batch: int, stage: str = ""
) -> Terms:
    """The terms of a stage whose sources have so many tokens.

    Raises:
        ValueError: as `resolve_weights`.
    """
    return Terms(
        seed=seed,
        stage=stage,
        sequence_length=config.sequence_length,
        global_batch=global_batch,
        weights=quantise(resolve_weights(config.mixture, config.sources, sizes)),
        sizes=dict(sizes),
        caps={one.name: cap_tokens(one.max_epochs, sizes[one.name]) for one in config.sources},
    )
