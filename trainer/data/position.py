"""The data position of a run: how far each source has been read, and when the present mixture began."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a mixture began. Everything later follows from it and the step.

    A source that is not in the present mixture keeps its place, for the day it comes back.
    """

    seed: int
    sequence_length: int
    global_batch: int
    weights: dict[str, float]
    """by source of the present mixture, in its order"""
    sizes: dict[str, int]
    """tokens in one epoch, by source"""
    starts: dict[str, int]
    """tokens already read when the mixture began, by source"""
    tokenizer: str
    """fingerprint of what made the tokens"""
    first_step: int = 0
    """step at which the mixture began"""

    @staticmethod
    def begin(
        *,
        seed: int,
        sequence_length: int,
        global_batch: int,
        weights: dict[str, float],
        sizes: dict[str, int],
        tokenizer: str,
        first_step: int = 0,
    ) -> Position:
        """The position of a run that has read nothing before `first_step`."""
        starts = dict.fromkeys(weights, 0)
        return Position(seed, sequence_length, global_batch, weights, sizes, starts, tokenizer, first_step)

    def state(self, step: int, counts: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint before `step` keeps, as JSON.

        `counts` are the sequences of each source of the mixture since it began.
        """
        read = dict(self.starts)
        for name, count in zip(self.weights, counts, strict=True):
            read[name] += count * self.sequence_length
        return {
            "step": step,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "global_batch": self.global_batch,
            "mixture_step": self.first_step,
            "tokenizer": self.tokenizer,
            "sources": [
                {
                    "name": name,
                    "weight": self.weights.get(name, 0.0),
                    "epoch_tokens": self.sizes[name],
                    "tokens_at_mixture_step": self.starts[name],
                    "tokens": read[name],
                }
                for name in read
            ],
        }

    def same_mixture(self, state: Mapping[str, Any]) -> bool:
        """Whether the run of `state` dealt its sequences in the very way this one does."""
        return (
            (self.seed, self.sequence_length, self.global_batch)
            == (state["seed"], state["sequence_length"], state["global_batch"])
            and list(self.weights.items())
            == [(s["name"], s["weight"]) for s in state["sources"] if s["weight"]]
            and all(self.sizes[s["name"]] == s["epoch_tokens"] for s in state["sources"] if s["weight"])
        )

    def counts(self, state: Mapping[str, Any]) -> list[int]:
        """Sequences of each source since the mixture began, out of a state of the same mixture."""
        return [
            (one["tokens"] - one["tokens_at_mixture_step"]) // self.sequence_length
            for one in state["sources"]
            if one["weight"]
        ]

    def resume(self, state: Mapping[str, Any]) -> Position:
        """This run's position when it goes on from `state`.

        Raises:
            ValueError: the run of `state` had another tokenizer, so its ids meant other text.
        """
        made = state.get("tokenizer", self.tokenizer)  # checkpoints of the first versions do not say
        if made != self.tokenizer:
            raise ValueError(
                f"data.tokenizer: its fingerprint is {self.tokenizer}, that of the checkpoint's run was "
                f"{made}: the weights have learnt other ids. Set data.tokenizer and data.eod back, or begin "
                'a new run from the weights alone: checkpoint.load with start.policy = "weights"'
            )
        saved = {one["name"]: one for one in state["sources"]}
        if state["seed"] != self.seed:
            logger.warning(
                "run.seed is %d, the checkpoint's was %d: every source starts over, in another order",
                self.seed,
                state["seed"],
            )
            return replace(self, first_step=state["step"])
        same = self.same_mixture(state)
        key = "tokens_at_mixture_step" if same else "tokens"
        starts = self.starts | {name: one[key] for name, one in saved.items()}
        sizes = {name: one["epoch_tokens"] for name, one in saved.items()} | self.sizes
        for name in self.weights.keys() & saved.keys():
            if self.sizes[name] != saved[name]["epoch_tokens"]:
                logger.warning(
                    "source %r has %d tokens, the checkpoint's had %d: other data, so it starts from its "
                    "beginning",
                    name,
                    self.sizes[name],
                    saved[name]["epoch_tokens"],
                )
                starts[name] = 0
        return replace(self, starts=starts, sizes=sizes, first_step=state["mixture_step" if same else "step"])
