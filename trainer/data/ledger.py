"""The token ledger: what a run has read, as its checkpoint's data position tells it.

Nothing is counted while a run trains. Which documents were read follows from a source's order and the number
of its tokens read, both exact; so restarts, layouts and steps that were done again after a roll-back leave no
trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.indexed import IndexedReader
from trainer.data.order import SourceOrder
from trainer.data.position import Reading, modernise, segments_of
from trainer.data.replay.pool import pool_of_all, pool_of_sample
from trainer.data.replay.sampling import draw_sample
from trainer.data.replay.seen import SeenDocuments
from trainer.data.replay.source import ReplaySet, replay_order
from trainer.data.segments import Segment
from trainer.data.weights import WHOLE


@dataclass(frozen=True)
class SourceEntry:
    """What a run has read of one source, over all its stages.

    Attributes:
        name: of the source.
        path: prefix of its files, as the run file had it; empty where the checkpoint does not say.
        epoch_tokens: tokens of all its documents.
        tokens: tokens read of them.
        asked: share of the tokens that it was to have, over all segments.
        realised: share of the tokens that it had, over all segments.
        replays: of a replay source what it reads at present; `epoch_tokens` are those of that.
        reservoir_tokens: where that is a sample, the most tokens of it.
        metadata: tokens that stood before the documents, in stages with metadata.
    """

    name: str
    path: str
    epoch_tokens: int
    tokens: int
    asked: float
    realised: float
    replays: ReplaySet | None = None
    reservoir_tokens: int | None = None
    metadata: int = 0

    @property
    def fed(self) -> int:
        """Tokens that the model was fed of this source."""
        return self.tokens + self.metadata

    @property
    def epochs(self) -> float:
        """Passes over its documents; of a replay source, over those of the present set."""
        begin = self.replays.begin if self.replays is not None else 0
        return (self.tokens - begin) / self.epoch_tokens


@dataclass(frozen=True)
class Replayed:
    """What has been read of the present set of a replay source.

    Attributes:
        documents: by the source that they come from, the numbers of those read to their end, in rising order.
        available: how many documents the set has.
    """

    documents: dict[str, NDArray[np.int64]]
    available: int


@dataclass(frozen=True)
class Ledger:
    """All that a run had read before a step.

    Attributes:
        step: nothing of it has been read.
        seed: of the sources' orders.
        sources: those of the present mixture first, in its order.
        segments: the stretches over which shares are counted, in order.
        replaced: what was read of documents that nobody goes on with: in another order, or other data under
            the same name.
    """

    step: int
    seed: int
    sources: tuple[SourceEntry, ...]
    segments: tuple[Segment, ...]
    replaced: tuple[Reading, ...]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Ledger:
        """From what a checkpoint keeps under `data`, of any version."""
        state = modernise(state)
        segments = segments_of(state)
        shares, replays = overall_shares(segments), state.get("replay", {})
        sources = tuple(
            SourceEntry(
                name=one["name"],
                path=one.get("path", ""),
                epoch_tokens=one["epoch_tokens"],
                tokens=one["tokens"],
                asked=shares.get(one["name"], (0.0, 0.0))[0],
                realised=shares.get(one["name"], (0.0, 0.0))[1],
                metadata=one.get("fed", one["tokens"]) - one["tokens"],
                **(_replay_of(replays[one["name"]]) if one["name"] in replays else {}),
            )
            for one in state["sources"]
        )
        replaced = tuple(Reading(**one) for one in state["replaced"])
        return cls(state["step"], state["seed"], sources, segments, replaced)

    def source(self, name: str) -> SourceEntry:
        """The entry of a source. Raises ValueError when the run has none of that name."""
        for entry in self.sources:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.sources)
        raise ValueError(f"no source {name!r} in this run, there are: {known}")

    def documents_read(
        self, name: str, *, times: int = 1, corpus: IndexedReader | None = None
    ) -> NDArray[np.int64]:
        """Documents of a source that were read to their end at least so many times.

        Args:
            name: of the source.
            times: passes.
            corpus: its documents, where they are open already or lie elsewhere by now.

        Returns:
            Their numbers in the source's files, int64 [documents], in rising order.

        Raises:
            ValueError: there is no such source, or its documents are gone or are others by now.
        """
        entry = self.source(name)
        if entry.replays is not None:
            raise ValueError(f"source {name!r} replays others; documents_replayed says which of theirs")
        corpus = corpus if corpus is not None else _open(name, entry.path)
        _check_size(name, corpus, entry.epoch_tokens)
        order = SourceOrder(corpus, seed=self.seed, name=name)
        return order.documents_read(entry.tokens, times=times)

    def documents_replayed(self, name: str, *, times: int = 1) -> Replayed:
        """Documents of the present set of a replay source that were read to their end so many times.

        Raises:
            ValueError: there is no such source, it replays nothing, or the documents are gone by now.
        """
        entry = self.source(name)
        if entry.replays is None:
            raise ValueError(f"source {name!r} is read from files; documents_read says which documents")
        parts = []
        for seen in entry.replays.seen:
            corpus = _open(seen.name, seen.path)
            _check_size(seen.name, corpus, seen.epoch_tokens)
            parts.append(SeenDocuments(seen, corpus))
        if entry.reservoir_tokens is None:
            pool = pool_of_all(parts)
        else:
            sample = draw_sample(parts, tokens=entry.reservoir_tokens, seed=self.seed, name=name)
            pool = pool_of_sample(parts, sample)
        order = replay_order(pool, self.seed, name, entry.replays)
        which, numbers = pool.locate(order.documents_read(entry.tokens - entry.replays.begin, times=times))
        documents = {part.seen.name: np.sort(numbers[which == n]) for n, part in enumerate(parts)}
        return Replayed(documents, len(pool))


def _replay_of(found: Mapping[str, Any]) -> dict[str, Any]:
    config = found["config"]
    return {"replays": ReplaySet.from_json(found["set"]), "reservoir_tokens": config["reservoir_tokens"]}


def _open(name: str, path: str) -> IndexedReader:
    if not path:
        raise ValueError(f"source {name!r}: the checkpoint does not say where its documents lie")
    return IndexedReader(path)


def _check_size(name: str, corpus: IndexedReader, tokens: int) -> None:
    if corpus.num_tokens != tokens:
        raise ValueError(
            f"source {name!r}: {corpus.prefix} has {corpus.num_tokens} tokens, the run read from {tokens}: "
            "other data by now"
        )


def overall_shares(segments: tuple[Segment, ...]) -> dict[str, tuple[float, float]]:
    """By source, its share of the tokens of all segments: asked and realised."""
    asked, dealt, total = dict[str, int](), dict[str, int](), 0
    for segment in segments:
        total += segment.sequences * segment.length
        for name, units in segment.asked.items():
            asked[name] = asked.get(name, 0) + units * segment.length
            dealt[name] = dealt.get(name, 0) + segment.dealt[name] * segment.length
    return {name: (asked[name] / (WHOLE * total), dealt[name] / total) for name in asked if total}
