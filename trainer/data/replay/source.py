"""A replay source while a stage runs: which documents it has from which step on, and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.order import SourceOrder
from trainer.data.reader import Documents
from trainer.data.replay.config import ReplayConfig
from trainer.data.replay.pool import Pool, pool_of_all
from trainer.data.replay.reservoir import Reservoir, nothing_seen
from trainer.data.replay.seen import OpenParts, Seen

TokensRead = Callable[[int], Mapping[str, int]]
"""Tokens read of every source before a step."""


@dataclass(frozen=True)
class ReplaySet:
    """What is replayed from a step on.

    Attributes:
        step: the first one.
        begin: tokens that the source had replayed before it.
        seen: what its documents are taken from.
        counted: by source, how many documents these are and how many tokens they hold, where somebody has
            counted; of reservoirs nobody has to.
    """

    step: int
    begin: int
    seen: tuple[Seen, ...]
    counted: tuple[tuple[int, int], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        seen = [one.to_json() for one in self.seen]
        return {"step": self.step, "begin": self.begin, "seen": seen, "counted": self.counted}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ReplaySet:
        """What `to_json` wrote."""
        counted = found["counted"]
        return cls(
            found["step"],
            found["begin"],
            tuple(Seen(**one) for one in found["seen"]),
            None if counted is None else tuple((documents, tokens) for documents, tokens in counted),
        )


def replay_order(documents: Documents, seed: int, name: str, chosen: ReplaySet) -> SourceOrder:
    """The order of a set, from its own first token on: another one for every set."""
    return SourceOrder(documents, seed=seed, name=f"{name}@{chosen.step}")


class Replay:
    """The documents and orders of one replay source, as pure functions of the step.

    Without `refresh_every` there is one set, taken when the stage began. With it, a new one is read from
    every `refresh_every`-th step of the stage on: a sample of what had been read `lead` steps before, so that
    there is time to write it.
    """

    def __init__(
        self,
        name: str,
        config: ReplayConfig,
        first: ReplaySet,
        *,
        seed: int,
        tokens_read: TokensRead,
        open_parts: OpenParts,
        reservoir: Reservoir | None,
        held: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a stage with the set `first`, or go on with what a checkpoint `held` (`state`).

        Args:
            first: what the first step made here reads.
            tokens_read: of all steps up to the one that is asked for.
        """
        self.name, self.config = name, config
        self._seed, self._tokens_read = seed, tokens_read
        self._open_parts, self._reservoir = open_parts, reservoir
        self._first = int(held["first"]) if held else first.step
        self._sets = {first.step: first}
        self._taken = {first.step: first.seen}
        self._base = first.seen
        if held and held["next"]:
            self._taken[held["next"]["step"]] = tuple(Seen(**one) for one in held["next"]["seen"])
        self._orders: dict[int, SourceOrder] = {}
        self.needed = False
        """Whether the stage began with a share for it."""

    def begin(self, step: int) -> None:
        """The stage reads it from `step` on. Raises ValueError where its documents cannot be read."""
        self.needed = True
        if self._reservoir is None:
            self.order(step)
        self.prepare(step)

    @property
    def lead(self) -> int:
        """Steps between the end of what a sample is taken from, and the first step that reads it."""
        return max(1, (self.config.refresh_every or 0) // 2)

    def at(self, step: int) -> ReplaySet:
        """The set that `step` reads."""
        border = self._border(step)
        if border not in self._sets:
            begin = self._tokens_read(border)[self.name]
            self._sets[border] = ReplaySet(border, begin, self._seen_for(border))
        return self._sets[border]

    def order(self, step: int) -> SourceOrder:
        """The order of the documents that `step` reads; waits for those of a reservoir."""
        chosen = self.at(step)
        if chosen.step not in self._orders:
            self._orders = {at: one for at, one in self._orders.items() if at == max(self._orders)}
            documents = self._open_pool(chosen) if self._reservoir is None else self._open_sample(chosen)
            self._orders[chosen.step] = replay_order(documents, self._seed, self.name, chosen)
        return self._orders[chosen.step]

    def prepare(self, step: int) -> None:
        """Begin to write what the next steps read, where it can be known at `step`."""
        if self._reservoir is None:
            return
        chosen = self.at(step)
        samples = {chosen.step: chosen.seen}  # asked for later, it is dealt all over again
        if (border := self._next(step)) is not None:
            samples[border] = self._seen_for(border)
        if self.needed or self._orders:
            for first, seen in samples.items():
                self._reservoir.prepare(first, seen)

    def forget_after(self, step: int) -> None:
        """What is read from `step` on is about to change."""
        self._sets = {at: one for at, one in self._sets.items() if at <= max(step, min(self._sets))}
        self._taken = {
            at: one for at, one in self._taken.items() if at in self._sets or at - self.lead <= step
        }
        self._orders = {at: one for at, one in self._orders.items() if at in self._sets}

    def state(self, step: int) -> dict[str, Any]:
        """All that decides what is replayed from `step` on: JSON."""
        border = self._next(step)
        return {
            "first": self._first,
            "config": self.config.model_dump(mode="json"),
            "set": self.at(step).to_json(),
            "next": None
            if border is None
            else {"step": border, "seen": [one.to_json() for one in self._seen_for(border)]},
        }

    def _border(self, step: int) -> int:
        every = self.config.refresh_every
        return self._first if every is None else self._first + (step - self._first) // every * every

    def _next(self, step: int) -> int | None:
        """The next border, once what its sample is taken from has been read."""
        if self.config.refresh_every is None:
            return None
        border = self._border(step) + self.config.refresh_every
        return border if step >= border - self.lead else None

    def _seen_for(self, border: int) -> tuple[Seen, ...]:
        if border not in self._taken:
            read = self._tokens_read(border - self.lead)
            self._taken[border] = tuple(
                replace(one, tokens=read[one.name]) if one.seed == self._seed else one for one in self._base
            )  # nobody goes on with an order of another seed
        return self._taken[border]

    def _open_sample(self, chosen: ReplaySet) -> Documents:
        assert self._reservoir is not None, "there is a pool otherwise"
        documents = self._reservoir.open(chosen.step, chosen.seen)
        self._reservoir.remove_before(chosen.step - 2 * (self.config.refresh_every or 0))
        return documents

    def _open_pool(self, chosen: ReplaySet) -> Pool:
        parts = self._open_parts(chosen.seen, chosen.counted)
        pool = pool_of_all(parts)
        if pool.num_tokens == 0:
            raise ValueError(nothing_seen(self.name, chosen.seen))
        counted = tuple((part.count, part.num_tokens) for part in parts)
        self._sets[chosen.step] = replace(chosen, counted=counted)
        return pool
