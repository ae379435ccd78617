"""Which parameters the patterns of a run file mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from trainer.data.config import DataConfig
from trainer.updates.config import UpdatesConfig


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Logical names that one of the patterns matches as a whole."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if any(pattern.fullmatch(name) for pattern in compiled)}


def frozen_names(config: UpdatesConfig, names: Sequence[str]) -> set[str]:
    """Parameters that stay as they are."""
    return matching(config.freeze, names)


def anchored_names(config: UpdatesConfig, names: Sequence[str]) -> set[str]:
    """Parameters that the anchor holds: those that it names, or all; never a frozen one."""
    if config.anchor is None:
        return set()
    chosen = matching(config.anchor.only, names) if config.anchor.only else set(names)
    return chosen - frozen_names(config, names)


def update_problems(config: UpdatesConfig, names: Sequence[str], data: DataConfig) -> list[str]:
    """What is wrong with `[updates]` for a model with these parameters and data; empty when nothing is."""
    problems = _unmatched("updates.freeze", config.freeze, names)
    trained = set(names) - frozen_names(config, names)
    if not trained:
        problems.append("updates.freeze: freezes every parameter, so that there is nothing to train")
    anchor = config.anchor
    if anchor is not None:
        unmatched = _unmatched("updates.anchor.only", anchor.only, names)
        if not unmatched and not anchored_names(config, names):
            unmatched.append("updates.anchor.only: all of these parameters are frozen; leave one of them out")
        problems += unmatched + _unknown_sources(anchor.sources, data)
    return problems


def _unmatched(key: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    return [
        f"{key}: {pattern!r} matches no parameter; the nearest are {', '.join(_nearest(pattern, names))} "
        "(the pattern has to match the whole name)"
        for pattern in patterns
        if not matching([pattern], names)
    ]


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(pattern.replace("\\", ""), names, n=3, cutoff=0.0)


def _unknown_sources(sources: Iterable[str], data: DataConfig) -> list[str]:
    known = [*(one.name for one in data.sources if one.path), *(one.name for one in data.validation)]
    unknown = [name for name in sources if name not in known]
    if not unknown:
        return []
    return [f"updates.anchor.sources: {', '.join(unknown)}: not among the run's sets {', '.join(known)}"]
