"""The batches of a run: which tokens make up step k, for whoever asks, in whatever layout.

Three pieces, each with a small explicit state, follow each other: the dealer says which source each sequence
of a step comes from (`Dealer`), the source's order says which tokens its k-th sequence holds (`SourceOrder`),
and packing cuts them out (`pack`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.batch import COLUMNS, NEXT_TOKEN, NO_GROUP, MicroBatch
from trainer.data.config import DataConfig, SourceConfig
from trainer.data.corpus import OpenedCorpora, open_corpora
from trainer.data.dealing import Cursor, Dealer
from trainer.data.mixture import rank_among_equals
from trainer.data.order import SourceOrder, Spans, cut, file_spans
from trainer.data.packing import pack
from trainer.data.position import Position
from trainer.data.reader import Documents
from trainer.data.replay.opening import ReplaySetting, StageFolder, open_replays
from trainer.data.terms import groups_of, terms_of
from trainer.data.tokenizer import Tokenizer
from trainer.data.transforms.reading import Transforms
from trainer.data.transforms.state import Positions


@dataclass(frozen=True)
class StepPlan:
    """Where the sequences of one step come from; no token has been read yet."""

    sources: NDArray[np.int32]
    """[global_batch] index of the source of each sequence"""
    rows: NDArray[np.int64]
    """[global_batch] number of the sequence inside its source's spans"""
    spans: dict[int, Spans]
    """by source: its tokens of this step, and the one behind them that is the last label"""
    corpora: dict[int, Documents]
    """by source: what its spans are of"""

    @property
    def learnt(self) -> dict[int, int]:
        """By source, labels of the whole step that count."""
        return {source: spans.learnt for source, spans in self.spans.items()}


class Batches(ABC):
    """Deals planned steps out to data ranks and micro-batches; what training and validation share."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        names: tuple[str, ...],
        global_batch: int,
    ) -> None:
        self.source_names = names
        self.tokenizer = tokenizer
        self.global_batch = global_batch
        self.sequence_length = config.sequence_length
        self._document_mask = config.document_mask
        self._groups = [NO_GROUP] * len(names)
        self._transforms: Transforms | None = None
        self._plans: dict[int, StepPlan] = {}
        self._lock = threading.Lock()  # the next step is planned in a thread while this one is looked at

    def plan(self, step: int) -> StepPlan:
        """Where the sequences of `step` come from."""
        with self._lock:
            if step not in self._plans:
                self._plans = dict(list(self._plans.items())[-1:])
                self._plans[step] = self._plan(step)
            return self._plans[step]

    @abstractmethod
    def _plan(self, step: int) -> StepPlan: ...

    def valid_tokens(self, step: int) -> int:
        """Labels that count over the whole step: all data ranks, all micro-batches. Reads no token."""
        return sum(self.plan(step).learnt.values())

    def weight_of(self, step: int) -> float | None:
        """Sum of the loss weights over the whole step. Reads no token.

        None where only the tokens tell it, since a transform may change the weights by what they are.
        """
        if self._transforms is None:
            return self.valid_tokens(step)
        return self._transforms.total(self.plan(step).learnt)

    def micro_batches(
        self, step: int, *, data_rank: int, data_size: int, micro_batch: int
    ) -> list[MicroBatch]:
        """The micro-batches of `step` for one of `data_size` data-parallel ranks.

        A pure function; micro-batch m of rank r holds sequences (m * data_size + r) * micro_batch + j of the
        step.

        Raises:
            ValueError: the global batch does not divide evenly, or the data hold an id the tokenizer lacks.
        """
        group = data_size * micro_batch
        if self.global_batch % group:
            raise ValueError(
                f"train.global_batch {self.global_batch} is not a multiple of data-parallel size {data_size} "
                f"x train.micro_batch {micro_batch} = {group}; change one of the three"
            )
        slots = np.arange(self.global_batch).reshape(-1, data_size, micro_batch)[:, data_rank].reshape(-1)
        full = self._read(step, slots)
        return [
            MicroBatch(*(one[at : at + micro_batch] for one in full))
            for at in range(0, len(slots), micro_batch)
        ]

    def _read(self, step: int, slots: NDArray[np.int64]) -> list[torch.Tensor]:
        """The fields of a MicroBatch for these sequences of the step, [slots, s] each."""
        plan = self.plan(step)
        shape = (len(slots), self.sequence_length)
        columns: dict[str, NDArray[Any]] = {name: np.empty(shape, kind) for name, kind in COLUMNS.items()}
        columns["objectives"][:] = NEXT_TOKEN
        for source in np.unique(plan.sources[slots]).tolist():
            chosen = np.flatnonzero(plan.sources[slots] == source)
            packed = pack(
                plan.corpora[source].tokens,
                plan.spans[source],
                plan.rows[slots[chosen]],
                length=self.sequence_length,
                fill=self.tokenizer.eod_id,
                document_mask=self._document_mask,
            )
            self._check_ids(plan, source, packed.tokens, packed.labels[:, -1])
            for name, column in vars(packed).items():
                columns[name][chosen] = column
            columns["sources"][chosen] = source
            columns["groups"][chosen] = self._groups[source]
            if self._transforms is not None:
                numbers = step * self.global_batch + slots[chosen]
                self._transforms.change(source, columns, chosen, numbers.tolist())
        return [torch.from_numpy(column) for column in columns.values()]

    def _check_ids(self, plan: StepPlan, source: int, *ids: NDArray[np.int64]) -> None:
        low, high = min(int(one.min()) for one in ids), max(int(one.max()) for one in ids)
        if low < 0 or high >= self.tokenizer.vocab_size:
            raise ValueError(
                f"source {self.source_names[source]!r} ({plan.corpora[source].prefix}): holds token id "
                f"{low if low < 0 else high}, the tokenizer has ids 0 to {self.tokenizer.vocab_size - 1}; "
                "prepare the data with the tokenizer of this run"
            )


class TokenStream(Batches):
    """The training batches."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        state: Mapping[str, Any] | None = None,
        first_step: int = 0,
        stage: str = "",
        folder: StageFolder | None = None,
    ) -> None:
        """Open the sources; `state` is what `state()` returned in the run that this one goes on from.

        Without a state every source begins at its beginning, at step `first_step`. Samples to replay need a
        `folder`.

        With the same stage, sources, weights, caps, sequence length and global batch, a resumed run goes on
        as if it had never stopped. Where one of them has changed, a new segment begins at the step of the
        state, and each source goes on from the token that it had reached.

        Raises:
            ValueError: lists everything that is wrong with the files or the mixture; or the other run's
                tokenizer was another.
        """
        tokenizer, opened = open_corpora(config, "sources")
        names = tuple(source.name for source in config.sources)
        super().__init__(config, tokenizer, names=names, global_batch=global_batch)
        read_from_files = [source.name for source in config.sources if source.replay is None]
        corpora: dict[str, Documents] = dict(zip(read_from_files, opened, strict=True))
        transforms = Transforms(config, corpora, tokenizer, seed=seed) if config.transforms else None
        self._transforms, self._positions = transforms, Positions(transforms.places if transforms else {})
        self._groups = [_group(config, source) for source in config.sources]
        documents = transforms.documents if transforms else corpora
        sizes = {name: documents[name].num_tokens if name in documents else 1 for name in names}
        self._position = Position.begin(
            terms_of(config, sizes, seed=seed, global_batch=global_batch, stage=stage),
            tokenizer=tokenizer.fingerprint,
            paths={source.name: source.path or "" for source in config.sources},
            first_step=first_step,
        )
        here = state
        if state is not None:
            texts = {name: corpus.num_tokens for name, corpus in corpora.items()}
            here = self._positions.enter(state, texts, seed=seed)
            self._position = self._position.resume(here)
        start = self._position.start
        self._dealer = Dealer(self._position.terms, start, groups_of(config))
        self._orders = {name: SourceOrder(one, seed=seed, name=name) for name, one in documents.items()}
        setting = ReplaySetting(config, tokenizer, corpora, seed, stage, state, folder)
        self._past_replays: Mapping[str, Any] = (state or {}).get("replay", {})
        self._replays = open_replays(setting, start.step, self._tokens_read)
        self._go_on(here["sources"] if here is not None else [])

    def _go_on(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Let each source find its place at once where it goes on from what the state says."""
        passed = {one["name"]: (one["tokens"], one["epoch_tokens"], one.get("passed")) for one in saved}
        start = self._position.start
        for name, read in zip(self.source_names, start.read, strict=True):
            tokens, size, place = passed.get(name, (0, 0, None))
            if place is None or tokens != read or not self._is_open(name, start):
                continue
            order, begin = self._order(name, start.step)
            if size == order.corpus.num_tokens:
                order.go_on(read - begin, (place[0], place[1]))

    def _tokens_read(self, step: int) -> dict[str, int]:
        """By source, absent ones included, tokens read before `step`; metadata is not counted."""
        absent = {name: tokens for name, (_, tokens) in self._position.absent.items()}
        read = dict(zip(self.source_names, self._dealer.at(step).read, strict=True))
        places = self._transforms.places if self._transforms is not None else {}
        return absent | read | {name: one.text_before(read[name]) for name, one in places.items()}

    def _order(self, name: str, step: int) -> tuple[SourceOrder, int]:
        """What a source is read from in `step`, and the tokens that had been read of it when that began."""
        replay = self._replays.get(name)
        return (self._orders[name], 0) if replay is None else (replay.order(step), replay.at(step).begin)

    def _is_open(self, name: str, cursor: Cursor) -> bool:
        """Whether the documents of a source are there; those of a replay come when they are first read."""
        if name in self._orders:
            return True
        replay, read = self._replays.get(name), dict(zip(self.source_names, cursor.read, strict=True))
        return replay is not None and (replay.needed or read[name] > replay.at(cursor.step).begin)

    def state(self, step: int) -> dict[str, Any]:
        """The data position before `step`: JSON, independent of the layout."""
        with self._lock:
            cursor = self._dealer.at(step)
            state = self._position.state(cursor)
            for entry, read in zip(state["sources"], cursor.read, strict=False):
                if self._is_open(entry["name"], cursor):
                    order, begin = self._order(entry["name"], step)
                    entry["epoch_tokens"] = order.corpus.num_tokens
                    entry["passed"] = order.passed(read - begin)  # or a resume would walk there
            state = self._positions.leave(state)
            replays = {name: replay.state(step) for name, replay in self._replays.items()}
            return state | ({"replay": past} if (past := {**self._past_replays, **replays}) else {})

    @property
    def weights(self) -> dict[str, float]:
        """Shares asked of the sources since the weights were last set; those that have left since count too.

        `weights_at` says what is dealt at a step.
        """
        with self._lock:
            return self._dealer.shares(self._dealer.at(self._dealer.newest_change))

    def weights_at(self, step: int) -> dict[str, float]:
        """Shares asked of the sources before `step`, summing to 1; 0 for one whose cap has been reached."""
        with self._lock:
            return self._dealer.shares(self._dealer.at(step))

    @property
    def nothing_to_replay(self) -> tuple[str, ...]:
        """Sources left out of the mixture that had nothing to replay when the stage began."""
        return tuple(
            name for name in self.source_names if name not in self._orders and name not in self._replays
        )

    def set_weights(self, step: int, weights: Mapping[str, float]) -> None:
        """From `step` on, deal the sources with these relative weights; call it alike on every rank.

        Those with `per_batch` keep their sequences, and the others divide the rest. What each source has been
        asked for and not been dealt is carried over. Nobody may have built batches of `step` ahead
        (`Prefetcher`, `undecided`).

        Raises:
            ValueError: as `Dealer.set_weights`.
        """
        with self._lock:
            for source in self.nothing_to_replay:
                if weights.get(source):
                    raise ValueError(
                        f"source {source!r}: there was nothing to replay when the stage began, so it cannot "
                        "be given a weight; take it out of what sets the weights of this stage"
                    )
            self._dealer.set_weights(step, weights)
            for replay in self._replays.values():
                replay.forget_after(step)
            self._plans = {at: plan for at, plan in self._plans.items() if at < step}

    def _plan(self, step: int) -> StepPlan:
        cursor, sources = self._dealer.deal(step)
        spans: dict[int, Spans] = {}
        corpora: dict[int, Documents] = {}
        for source, count in enumerate(np.bincount(sources).tolist()):
            if count:
                order, begin = self._order(self.source_names[source], step)
                wanted = count * self.sequence_length + 1
                found = order.spans(cursor.read[source] - begin, wanted)
                spans[source] = found if self._transforms is None else self._transforms.mark(source, found)
                corpora[source] = order.corpus
        for replay in self._replays.values():
            replay.prepare(step)
        return StepPlan(sources, rank_among_equals(sources), spans, corpora)


def _group(config: DataConfig, source: SourceConfig) -> int:
    return NO_GROUP if source.group is None else config.group_names.index(source.group)


class ValidationStream(Batches):
    """One held-out set in file order, once: every token but the first of a document is a label exactly once.

    It is cut into steps of `global_batch` sequences like training, so that every data rank and every pipeline
    sees the number of micro-batches it is used to. What is missing in the last step is padding without loss
    weight.
    """

    def __init__(
        self, config: DataConfig, name: str, *, global_batch: int, opened: OpenedCorpora | None = None
    ) -> None:
        """Take the validation set called `name`, out of `opened` where all sets have been opened already.

        Raises:
            ValueError: there is no such set, or lists everything that is wrong with the files.
        """
        names = [one.name for one in config.validation]
        if name not in names:
            raise ValueError(f"no validation set {name!r}; [[data.validation]] has {names}")
        tokenizer, corpora = opened or open_corpora(config, "validation")
        corpus = corpora[names.index(name)]
        super().__init__(config, tokenizer, names=(name,), global_batch=global_batch)
        self.name = name
        self._corpus = corpus
        self._spans = file_spans(corpus)
        sequences = max(1, -(-(corpus.num_tokens - 1) // config.sequence_length))
        self.steps = -(-sequences // global_batch)
        """Steps that cover the whole set."""

    def _plan(self, step: int) -> StepPlan:
        if not 0 <= step < self.steps:
            raise ValueError(f"validation set {self.name!r} has steps 0 to {self.steps - 1}, not {step}")
        count = self.global_batch * self.sequence_length
        spans = cut(self._spans, step * count, count + 1)
        rows = np.arange(self.global_batch, dtype=np.int64)
        return StepPlan(np.zeros(self.global_batch, np.int32), rows, {0: spans}, {0: self._corpus})


def open_validation(config: DataConfig, *, global_batch: int) -> list[ValidationStream]:
    """A stream of each validation set, in their order; opens every file once.

    Raises:
        ValueError: lists everything that is wrong with the files.
    """
    if not config.validation:
        return []
    opened = open_corpora(config, "validation")
    return [
        ValidationStream(config, entry.name, global_batch=global_batch, opened=opened)
        for entry in config.validation
    ]
