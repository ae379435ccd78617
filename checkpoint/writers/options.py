"""What a user may ask of a writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

STATES = ("weight", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class WriteOptions:
    """Choices that are not in the source.

    Attributes:
        states: to write; None writes all that the source has and the target can hold.
        dtype: of weights; None keeps the source's.
        shard_bytes: about the size of a large output file.
        spec: naming of the target: a shipped spec or a file; None is the writer's usual one.
        facts: numbers that the naming needs and the source does not say.
        carry: folder with config.json, tokenizer files and generation config to copy along; None takes the
            source's own, if it has them.
        layout: degrees (tensor, pipeline, expert) that `ranks` cuts by.
    """

    states: tuple[str, ...] | None = None
    dtype: str | None = None
    shard_bytes: int = 4 << 30
    spec: str | None = None
    facts: Mapping[str, int] = field(default_factory=dict)
    carry: Path | None = None
    layout: Mapping[str, int] = field(default_factory=dict)
