"""`replay` of a source: whose documents are read again, and whether a sample of them is kept on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from parallel.settings import Settings


class ReplayConfig(Settings):
    """Documents that this run has read, in place of a corpus of their own.

    Attributes:
        of: sources that they come from, of this run or of the one that it starts from.
        reservoir_tokens: keep a uniform sample of them, of at most so many tokens, in the run's folder.
        refresh_every: steps after which a new sample is taken, what was read since then included; None takes
            one when the stage begins.
    """

    of: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    reservoir_tokens: int | None = Field(default=None, gt=0)
    refresh_every: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ReplayConfig:
        if len(set(self.of)) < len(self.of):
            raise ValueError("of names a source twice; name each once")
        if self.refresh_every is not None and self.reservoir_tokens is None:
            raise ValueError(
                f"refresh_every = {self.refresh_every} needs reservoir_tokens: without a reservoir the "
                "documents are those that were read when the stage began; set reservoir_tokens, or leave "
                "refresh_every out"
            )
        return self
