"""The data position of a run, as a checkpoint keeps it: how far each source is read, and how so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.dealing import Cursor, Terms
from trainer.data.segments import Segment
from trainer.data.weights import WHOLE, quantise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How far an order of documents was read that nobody goes on with: another seed, or other data."""

    name: str
    seed: int
    epoch_tokens: int
    tokens: int


@dataclass(frozen=True)
class Position:
    """What a run's dealing begins from.

    A source that is not in the present mixture keeps its place, for the day it comes back.

    Attributes:
        terms: what the run file asks now.
        tokenizer: fingerprint of what made the tokens.
        paths: by source, also of those that are not in the mixture, where its documents were.
        start: the cursor to begin from.
        absent: of sources that are not in the mixture, (tokens in an epoch, tokens read).
        replaced: readings that have come to an end.
    """

    terms: Terms
    tokenizer: str
    paths: dict[str, str]
    start: Cursor
    absent: dict[str, tuple[int, int]] = field(default_factory=dict)
    replaced: tuple[Reading, ...] = ()

    @staticmethod
    def begin(terms: Terms, *, tokenizer: str, paths: dict[str, str], first_step: int = 0) -> Position:
        """The position of a run that has read nothing before `first_step`."""
        return Position(terms, tokenizer, paths, Cursor.beginning(terms, first_step, {}))

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """What a checkpoint at this cursor keeps: JSON, the same for every layout."""
        terms = self.terms
        read = dict(zip(terms.names, cursor.read, strict=True))
        places = {name: (terms.sizes[name], read[name]) for name in terms.names} | self.absent
        segments = cursor.segments(terms)
        numbers = {name: number for number, name in enumerate(places)}
        return {
            "step": cursor.step,
            "seed": terms.seed,
            "stage": terms.stage,
            "sequence_length": terms.sequence_length,
            "global_batch": terms.global_batch,
            "tokenizer": self.tokenizer,
            "mixture_step": cursor.began,
            "sources": [
                {"name": name, "path": self.paths.get(name, ""), "epoch_tokens": size, "tokens": tokens}
                for name, (size, tokens) in places.items()
            ],
            "mixture": [[name, terms.weights[name], terms.caps[name]] for name in terms.names],
            "weights": list(cursor.weights),
            "left": sorted(cursor.left),
            "segments": [segment.to_json(numbers) for segment in segments],
            "replaced": [vars(reading) for reading in self.replaced],
        } | ({"per_batch": terms.fixed} if terms.fixed else {})

    def resume(self, state: Mapping[str, Any]) -> Position:
        """This run's position when it goes on from `state`.

        On the same terms the segment under way goes on. Otherwise a new one begins, without debts, and every
        source goes on from the token that it had reached.

        Raises:
            ValueError: the run of `state` had another tokenizer, so its ids meant other text.
        """
        self._check_tokenizer(state)
        state = modernise(state)
        saved = {one["name"]: one for one in state["sources"]}
        replaced = self._replaced(state)
        gone = {reading.name for reading in replaced}
        absent = {
            name: (one["epoch_tokens"], 0 if name in gone else one["tokens"])
            for name, one in saved.items()
            if name not in self.terms.weights
        }
        segments = segments_of(state)
        if self._same_terms(state):
            start = self._going_on(state, segments)
        else:
            read = {name: one["tokens"] for name, one in saved.items() if name not in gone}
            start = Cursor.beginning(self.terms, state["step"], read, segments)
        paths = {name: one["path"] for name, one in saved.items() if "path" in one} | self.paths
        past = tuple(Reading(**one) for one in state["replaced"])
        return Position(self.terms, self.tokenizer, paths, start, absent, (*past, *replaced))

    def _check_tokenizer(self, state: Mapping[str, Any]) -> None:
        made = state.get("tokenizer", self.tokenizer)  # checkpoints of the first versions do not say
        if made != self.tokenizer:
            raise ValueError(
                f"data.tokenizer: its fingerprint is {self.tokenizer}, that of the checkpoint's run was "
                f"{made}: the weights have learnt other ids. Set data.tokenizer and data.eod back, or begin "
                'a new run from the weights alone: start.policy = "weights" with start.vocabulary = "change"'
            )

    def _same_terms(self, state: Mapping[str, Any]) -> bool:
        """Whether the run of `state` dealt its sequences in the very way this one does."""
        terms = self.terms
        sizes = {one["name"]: one["epoch_tokens"] for one in state["sources"]}
        return (
            (terms.seed, terms.stage, terms.sequence_length, terms.global_batch)
            == (state["seed"], state["stage"], state["sequence_length"], state["global_batch"])
            and [[name, terms.weights[name], terms.caps[name]] for name in terms.names] == state["mixture"]
            and all(terms.sizes[name] == sizes[name] for name in terms.names if name not in terms.moving)
            and terms.fixed == state.get("per_batch", {})
        )

    def _going_on(self, state: Mapping[str, Any], segments: tuple[Segment, ...]) -> Cursor:
        """The cursor that `state` was made of."""
        names = self.terms.names
        asked, dealt, closed = dict[str, int](), dict[str, int](), segments
        if state["mixture_step"] < state["step"]:
            asked, dealt, closed = segments[-1].asked, segments[-1].dealt, segments[:-1]
        read = {one["name"]: one["tokens"] for one in state["sources"]}
        return Cursor(
            step=state["step"],
            began=state["mixture_step"],
            weights=tuple(state["weights"]),
            asked=tuple(asked.get(name, 0) for name in names),
            dealt=tuple(dealt.get(name, 0) for name in names),
            read=tuple(read[name] for name in names),
            left=frozenset(state["left"]),
            closed=closed,
        )

    def _replaced(self, state: Mapping[str, Any]) -> list[Reading]:
        """Sources that start over, with a warning."""
        terms, seed = self.terms, state["seed"]
        readings = [
            Reading(one["name"], seed, one["epoch_tokens"], one["tokens"])
            for one in state["sources"]
            if one["tokens"]
        ]
        if seed != terms.seed:
            logger.warning(
                "run.seed is %d, the checkpoint's was %d: every source starts over, in another order",
                terms.seed,
                seed,
            )
            return readings
        sizes = {name: size for name, size in terms.sizes.items() if name not in terms.moving}
        others = [one for one in readings if sizes.get(one.name, one.epoch_tokens) != one.epoch_tokens]
        for one in others:
            logger.warning(
                "source %r has %d tokens, the checkpoint's had %d: other data, so it starts from its "
                "beginning",
                one.name,
                terms.sizes[one.name],
                one.epoch_tokens,
            )
        return others


def segments_of(state: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The segments of a state of today's form."""
    names = [one["name"] for one in state["sources"]]
    return tuple(Segment.from_json(entry, names) for entry in state["segments"])


def modernise(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state in today's form. The first versions knew only the last mixture, and weights unlike ours.

    What was read before that mixture is counted in no segment; the mixture itself ends at the checkpoint.
    """
    if "segments" in state:
        return state
    mixed = [one for one in state["sources"] if one["weight"]]
    units = quantise({one["name"]: one["weight"] for one in mixed})
    dealt = {
        one["name"]: (one["tokens"] - one["tokens_at_mixture_step"]) // state["sequence_length"]
        for one in mixed
    }
    began, total = state["mixture_step"], sum(dealt.values())
    asked = {name: one * total for name, one in units.items()}
    assert sum(asked.values()) == total * WHOLE
    steps = state["step"] - began
    segment = Segment(began, steps, "", state["sequence_length"], asked, dealt)
    numbers = {one["name"]: number for number, one in enumerate(state["sources"])}
    return {
        **state,
        "stage": "",
        "mixture": [],  # so that a new segment begins: these lags are not whole units
        "weights": [],
        "left": [],
        "segments": [segment.to_json(numbers)] if steps else [],
        "replaced": [],
    }
