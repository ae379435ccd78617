"""What a run file asks of the dealing of its sequences, and whether its capped sources last for it."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.data.config import DataConfig
from trainer.data.dealing import Terms
from trainer.data.mixture_config import by_weight, cap_tokens, own_count
from trainer.data.weights import quantise, resolve_weights


def terms_of(
    config: DataConfig, sizes: Mapping[str, int], *, seed: int, global_batch: int, stage: str = ""
) -> Terms:
    """The terms of a stage whose sources have so many tokens.

    Raises:
        ValueError: as `resolve_weights`.
    """
    shares = resolve_weights(config.mixture, config.sources, sizes, global_batch=global_batch)
    counts = {source.name: own_count(config.mixture, source) for source in config.sources}
    fixed = {name: count for name, count in counts.items() if count is not None}
    free = {name: 0.0 if name in fixed else share for name, share in shares.items()}
    return Terms(
        seed=seed,
        stage=stage,
        sequence_length=config.sequence_length,
        global_batch=global_batch,
        weights=quantise(free) if any(free.values()) else dict.fromkeys(free, 0),
        sizes=dict(sizes),
        caps={one.name: cap_tokens(one.max_epochs, sizes[one.name]) for one in config.sources},
        fixed=fixed,
        moving=frozenset(source.name for source in config.sources if source.replay is not None),
    )


def groups_of(config: DataConfig) -> dict[str, str | None]:
    """By source, whom it leaves its sequences to: its group; one with a share of its own is a group itself.

    So what a source that goes by weight leaves does not change the shares, as long as another one is there.
    """
    return {
        source.name: source.group if by_weight(config.mixture, source) else f"share of {source.name}"
        for source in config.sources
    }
