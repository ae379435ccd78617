"""What holds of replay over random histories of a run, held against the batches really dealt."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.ledger import Ledger
from trainer.data.replay.opening import StageFolder
from trainer.data.stream import TokenStream

NAMES = ("prose", "code")
DOCUMENTS = {name: ragged(12, first=2000 * n, seed=n, longest=20) for n, name in enumerate(NAMES)}
LENGTH, BATCH, FIRST = 8, 12, 2
LAYOUTS = [(1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]
"""data-parallel size and micro-batch"""
RESERVOIR = {"reservoir_tokens": 60, "refresh_every": 3}
History = list[tuple[tuple[str, Any], int]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay-histories")
    for name, texts in DOCUMENTS.items():
        write_tokens(folder / name, texts)
    write_words(folder)
    return folder


weights = st.fixed_dictionaries({name: st.floats(0.01, 1.0) for name in NAMES})
events = st.one_of(
    st.tuples(st.just("layout"), st.sampled_from(LAYOUTS)),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("roll back"), st.integers(0, 8)),
    st.tuples(st.just("run file"), weights),
    st.tuples(st.just("controller"), weights),
)
histories = st.lists(st.tuples(events, st.integers(0, 5)), min_size=2, max_size=8)
"""what happens, and the steps that are made after it"""


@dataclass
class Run:
    """The second stage of a run, which replays; `dealt` is of both: [step] of (source, tokens)."""

    corpora: Path
    folder: Path
    replay: dict[str, Any]
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 1.0))
    layout: tuple[int, int] = (1, 12)
    step: int = 0
    dealt: list[list[tuple[str, list[int]]]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)

    def open(self, stage: str, state: dict[str, Any] | None) -> None:
        sources = [
            {"name": name, "path": str(self.corpora / name), "weight": self.weights[name]} for name in NAMES
        ]
        if stage == "two":
            sources.append(self.replay)
        self.names = [str(one["name"]) for one in sources]
        data = {"tokenizer": str(self.corpora / "words.json"), "sequence_length": LENGTH, "sources": sources}
        self.stream = TokenStream(
            DataConfig.model_validate(data),
            seed=3,
            global_batch=BATCH,
            state=state,
            stage=stage,
            folder=StageFolder(self.folder),
        )

    def save(self) -> str:
        return json.dumps(self.stream.state(self.step), sort_keys=True)

    def deal(self, steps: int) -> None:
        data_size, micro_batch = self.layout
        for _ in range(steps):
            batches = [
                self.stream.micro_batches(
                    self.step, data_rank=rank, data_size=data_size, micro_batch=micro_batch
                )
                for rank in range(data_size)
            ]
            rows = [
                (self.names[sources[0]], tokens)
                for number in range(len(batches[0]))
                for share in batches
                for tokens, sources in zip(
                    share[number].tokens.tolist(), share[number].sources.tolist(), strict=True
                )
            ]
            self.dealt.append(rows)
            self.step += 1
            self.saved.append(self.save())

    def happen(self, event: str, value: Any) -> None:
        if event == "layout":
            self.layout = value
        elif event == "controller":
            self.stream.set_weights(self.step, value | {"again": 0.7})
            self.saved[self.step - 1] = self.save()  # who rolls back to here has these weights
        elif event == "roll back":
            self.step = max(FIRST, self.step - value)
            del self.dealt[self.step :], self.saved[self.step :]
            self.open("two", json.loads(self.saved[self.step - 1]))
            self.saved[self.step - 1] = self.save()
        else:
            state = json.loads(self.save())
            if event == "run file":
                self.weights = value
            self.open("two", state)
            self.saved[self.step - 1] = self.save()


def play(corpora: Path, folder: str, replay: dict[str, Any], history: History) -> Run:
    run = Run(corpora, Path(folder), {"name": "again", **replay})
    run.open("one", None)
    run.deal(FIRST)
    run.open("two", json.loads(run.saved[-1]))
    run.saved[-1] = run.save()
    for (event, value), steps in history:
        run.happen(event, value)
        run.deal(steps)
    return run


replays = st.builds(
    lambda k, more: {"per_batch": k, "replay": {"of": list(NAMES), **more}},
    st.integers(1, BATCH - 1),
    st.sampled_from([{}, RESERVOIR]),
)
hypothetical = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def new_folder() -> tempfile.TemporaryDirectory[str]:
    """A sample may still be written there when nobody needs it any more."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def seen_before(run: Run, step: int) -> set[int]:
    """Tokens of the documents that were read to their end in the steps before."""
    read = {token for rows in run.dealt[:step] for name, row in rows if name != "again" for token in row}
    return {t for texts in DOCUMENTS.values() for text in texts if read.issuperset(text) for t in text}


@given(history=histories, replay=replays)
@hypothetical
def test_every_history(corpora: Path, history: History, replay: dict[str, Any]) -> None:
    """Exactly k sequences a step, of nothing but what had been read; all of it once an epoch; as counted."""
    with new_folder() as folder:
        run = play(corpora, folder, replay, history)
        ledger = Ledger.of(json.loads(run.save()))
    first = seen_before(run, FIRST)
    for step, rows in enumerate(run.dealt[FIRST:], start=FIRST):
        again = [row for name, row in rows if name == "again"]
        assert len(again) == replay["per_batch"]
        allowed = seen_before(run, step) if "refresh_every" in replay["replay"] else first
        assert allowed.issuperset(token for row in again for token in row)
    tokens = [t for rows in run.dealt for name, row in rows if name == "again" for t in row]
    assert ledger.source("again").tokens == len(tokens)
    if "refresh_every" not in replay["replay"]:
        for at in range(0, len(tokens) - len(first) + 1, len(first)):
            assert set(tokens[at : at + len(first)]) == first
    for name in NAMES:
        own = Counter(t for rows in run.dealt for source, row in rows if source == name for t in row)
        assert ledger.source(name).tokens == own.total()
        assert max(own.values(), default=0) - min(own[t] for x in DOCUMENTS[name] for t in x) <= 1


@given(history=histories, replay=replays, at=st.integers(0, 100), layout=st.sampled_from(LAYOUTS))
@example(
    history=[(("controller", {"prose": 1.0, "code": 0.5}), 0), (("roll back", 0), 1)],
    replay={"per_batch": 11, "replay": {"of": list(NAMES)}},
    at=1,
    layout=(1, 12),
)
@settings(hypothetical, max_examples=40)
def test_restarts_and_layouts_leave_no_trace(
    corpora: Path, history: History, replay: dict[str, Any], at: int, layout: tuple[int, int]
) -> None:
    at %= len(history) + 1
    more: History = [(("restart", None), 0), (("layout", layout), 0)]
    with new_folder() as folder, new_folder() as other:
        plain = play(corpora, folder, replay, history)
        disturbed = play(corpora, other, replay, [*history[:at], *more, *history[at:]])
    assert plain.dealt == disturbed.dealt
    assert Ledger.of(json.loads(plain.save())) == Ledger.of(json.loads(disturbed.save()))
