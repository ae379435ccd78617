"""The guarantees of the ledger, over random histories of a run.

A history is a list of things that happen to a run. The model that it is held against knows nothing of orders,
places and segments: it takes the documents out of the batches that were really dealt, token by token.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.ledger import Ledger
from trainer.data.mixture_config import cap_tokens
from trainer.data.stream import TokenStream
from trainer.data.weights import WHOLE

NAMES = ("prose", "code", "law", "maths")
History = list[tuple[tuple[str, Any], int]]
CAPS = {"code": 1.5, "maths": 3.0}
LENGTHS, BATCH = (8, 16), 12
LAYOUTS = [(1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]
"""data-parallel size and micro-batch"""


@dataclass(frozen=True)
class Corpus:
    folder: Path
    tokenizer: str
    documents: dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Four sources of 12 documents; no token id occurs twice."""
    folder = tmp_path_factory.mktemp("histories")
    documents = {name: ragged(12, first=2000 * n, seed=n) for n, name in enumerate(NAMES)}
    for name, texts in documents.items():
        write_tokens(folder / name, texts)
    return Corpus(folder, write_words(folder), documents)


weights = st.fixed_dictionaries({name: st.floats(0.01, 1.0) for name in NAMES})
events = st.one_of(
    st.tuples(st.just("layout"), st.sampled_from(LAYOUTS)),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("roll back"), st.integers(0, 10)),
    st.tuples(st.just("run file"), weights),
    st.tuples(st.just("sources"), st.sets(st.sampled_from(NAMES), min_size=1)),
    st.tuples(st.just("controller"), weights),
    st.tuples(st.just("length"), st.sampled_from(LENGTHS)),
)
histories = st.lists(st.tuples(events, st.integers(0, 8)), min_size=3, max_size=12)
"""what happens, and the steps that are made after it"""


@dataclass
class Run:
    """A run that a history happens to, and the batches it has really dealt: [step] of (source, tokens)."""

    corpus: Corpus
    names: list[str] = field(default_factory=lambda: ["prose", "code"])
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 1.0))
    length: int = 8
    layout: tuple[int, int] = (1, 12)
    step: int = 0
    dealt: list[list[tuple[str, list[int]]]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)

    def open(self, state: dict[str, Any] | None) -> None:
        entries = [
            {
                "name": name,
                "path": str(self.corpus.folder / name),
                "weight": self.weights[name],
                "max_epochs": CAPS.get(name),
            }
            for name in self.names
        ]
        config = DataConfig.model_validate(
            {"tokenizer": self.corpus.tokenizer, "sequence_length": self.length, "sources": entries}
        )
        self.stream = TokenStream(config, seed=3, global_batch=BATCH, state=state)

        if not self.saved:
            self.saved = [self.save()]

    def save(self) -> str:
        """A checkpoint of now."""
        return json.dumps(self.stream.state(self.step), sort_keys=True)

    def deal(self, steps: int) -> None:
        """Make steps, with a checkpoint behind each."""
        data_size, micro_batch = self.layout
        for _ in range(steps):
            rows: list[tuple[str, list[int]]] = []
            shares = [
                self.stream.micro_batches(
                    self.step, data_rank=rank, data_size=data_size, micro_batch=micro_batch
                )
                for rank in range(data_size)
            ]
            for number in range(len(shares[0])):
                for share in shares:
                    batch = share[number]
                    for tokens, sources in zip(batch.tokens.tolist(), batch.sources.tolist(), strict=True):
                        rows.append((self.names[sources[0]], tokens))
            self.dealt.append(rows)
            self.step += 1
            self.saved.append(self.save())

    def happen(self, event: str, value: Any) -> None:
        if event == "layout":
            self.layout = value
        elif event == "controller":
            self.stream.set_weights(self.step, {name: value[name] for name in self.names})
        elif event == "roll back":
            self.step = max(0, self.step - value)
            del self.dealt[self.step :], self.saved[self.step + 1 :]
            self.open(json.loads(self.saved[self.step]))
        else:
            state = json.loads(self.save())
            if event == "run file":
                self.weights = value
            elif event == "sources":
                self.names = sorted(value | {"prose"})  # one without a cap
            elif event == "length":
                self.length = value
            self.open(state)


def play(corpus: Corpus, history: History) -> Run:
    run = Run(corpus)
    run.open(None)
    for (event, value), steps in history:
        run.happen(event, value)
        run.deal(steps)
    return run


def ledger_of(run: Run) -> Ledger:
    return Ledger.of(json.loads(run.save()))


def tokens_dealt(run: Run) -> dict[str, list[int]]:
    """By source, its tokens in the order in which they were dealt."""
    tokens: dict[str, list[int]] = {name: [] for name in NAMES}
    for step in run.dealt:
        for name, row in step:
            tokens[name] += row
    return tokens


hypothetical = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(history=histories)
@hypothetical
def test_every_history(corpus: Corpus, history: History) -> None:
    """Documents once an epoch, shares within a sequence, caps kept, and the ledger says what was dealt."""
    run = play(corpus, history)
    tokens = tokens_dealt(run)
    ledger = ledger_of(run)
    documents_once_an_epoch(corpus, tokens)
    caps_kept(corpus, tokens)
    ledger_tells_what_was_dealt(corpus, ledger, tokens)
    segments_tell_what_was_dealt(run, ledger)


def documents_once_an_epoch(corpus: Corpus, tokens: dict[str, list[int]]) -> None:
    for name, read in tokens.items():
        size = sum(map(len, corpus.documents[name]))
        every = sorted(t for document in corpus.documents[name] for t in document)
        for first in range(0, len(read) - size + 1, size):
            assert sorted(read[first : first + size]) == every
        rest = read[len(read) // size * size :]
        assert len(set(rest)) == len(rest)


def caps_kept(corpus: Corpus, tokens: dict[str, list[int]]) -> None:
    for name, cap in CAPS.items():
        most = cap_tokens(cap, sum(map(len, corpus.documents[name])))
        assert most is not None
        assert len(tokens[name]) <= most


def ledger_tells_what_was_dealt(corpus: Corpus, ledger: Ledger, tokens: dict[str, list[int]]) -> None:
    for entry in ledger.sources:
        seen = Counter(tokens[entry.name])
        assert entry.tokens == seen.total()
        for times in (1, 2, 3):
            whole = [
                number
                for number, document in enumerate(corpus.documents[entry.name])
                if min(seen[token] for token in document) >= times
            ]
            assert ledger.documents_read(entry.name, times=times).tolist() == whole
    listed = {entry.name for entry in ledger.sources}
    assert not any(read for name, read in tokens.items() if name not in listed)


def segments_tell_what_was_dealt(run: Run, ledger: Ledger) -> None:
    """They follow each other without a gap, and each has the sequences that were dealt in its steps."""
    at = 0
    for segment in ledger.segments:
        assert segment.step == at
        at += segment.steps
        counts = Counter(name for step in run.dealt[segment.step : at] for name, _ in step)
        assert counts == Counter({name: count for name, count in segment.dealt.items() if count})
        assert sum(segment.asked.values()) == segment.sequences * WHOLE
        for name, asked in segment.asked.items():
            assert asked - segment.dealt[name] * WHOLE > -WHOLE
    assert at == run.step


@given(history=histories)
@hypothetical
def test_without_a_controller_every_prefix_keeps_to_the_weights(corpus: Corpus, history: History) -> None:
    """In every segment, at every sequence of it, each source within one sequence of its share."""
    run = play(corpus, [one for one in history if one[0][0] != "controller"])
    for segment in ledger_of(run).segments:
        steps = run.dealt[segment.step : segment.step + segment.steps]
        order = [name for step in steps for name, _ in step]
        for name, asked in segment.asked.items():
            taken = np.cumsum([one == name for one in order])
            weight = asked // segment.sequences
            assert asked == weight * segment.sequences
            wanted = np.arange(1, len(order) + 1) * weight
            assert np.abs(taken * WHOLE - wanted).max() < WHOLE


@given(history=histories, at=st.integers(0, 100), layout=st.sampled_from(LAYOUTS))
@settings(hypothetical, max_examples=100)
def test_restarts_and_layouts_leave_no_trace(
    corpus: Corpus, history: History, at: int, layout: tuple[int, int]
) -> None:
    """A history with a restart on another layout somewhere in it: the same tokens, the same ledger."""
    at %= len(history) + 1
    again: History = [(("restart", None), 0), (("layout", layout), 0)]
    plain, disturbed = play(corpus, history), play(corpus, [*history[:at], *again, *history[at:]])
    assert plain.dealt == disturbed.dealt
    assert ledger_of(plain) == ledger_of(disturbed)
