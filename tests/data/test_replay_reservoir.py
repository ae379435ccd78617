"""The reservoir: a bounded sample of what has been read, refreshed while the stage runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpora import ragged, write_tokens
from tests.data.test_replay import (
    BATCH,
    DOCUMENTS,
    LENGTH,
    build,
    config,
    first_stage,
    folder,
    replayed,
    rows,
    saved,
)
from trainer.data.indexed import IndexedReader
from trainer.data.ledger import Ledger
from trainer.data.replay.opening import StageFolder
from trainer.data.replay.reservoir import Reservoir
from trainer.data.replay.sampling import draw_sample
from trainer.data.replay.seen import Seen, SeenDocuments
from trainer.data.stream import TokenStream

__all__ = ["folder"]
TOKENS, EVERY, FIRST = 150, 4, 3
LEAD = EVERY // 2


def source(**replay: Any) -> dict[str, Any]:
    kept = {"of": ["prose", "code"], "reservoir_tokens": TOKENS, "refresh_every": EVERY, **replay}
    return {"name": "again", "per_batch": 3, "replay": kept}


def open_run(folder: Path, run: Path, state: dict[str, Any] | None = None, **more: Any) -> TokenStream:
    own = config(folder, "prose", "code", others=[source(**more)])
    found = state or first_stage(folder, steps=FIRST)
    return build(own, found, stage="two", folder=StageFolder(run))


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "replay").glob("*"))


def read_to_their_end(stream: TokenStream, step: int) -> set[tuple[str, int]]:
    ledger = Ledger.of(stream.state(step))
    return {(name, int(n)) for name in ("prose", "code") for n in documents_of(ledger, name)}


def documents_of(ledger: Ledger, name: str) -> list[int]:
    found: list[int] = ledger.documents_read(name).tolist()
    return found


def number_of() -> dict[int, tuple[str, int]]:
    """By token, the document that has it."""
    return {t: (name, n) for name, texts in DOCUMENTS.items() for n, text in enumerate(texts) for t in text}


def test_it_holds_whole_documents_that_were_read_up_to_its_size(folder: Path, tmp_path: Path) -> None:
    stream = open_run(folder, tmp_path, of=["prose"], refresh_every=None)
    stream.plan(FIRST)
    (index,) = (tmp_path / "replay").glob("*.idx")
    corpus = IndexedReader(index.with_suffix(""))
    owner = number_of()
    held = [corpus[n].tolist() for n in range(len(corpus))]
    assert all(text == DOCUMENTS[owner[text[0]][0]][owner[text[0]][1]] for text in held)
    assert {owner[text[0]] for text in held} <= read_to_their_end(stream, FIRST)
    assert len(held) == len({text[0] for text in held}) > 1
    assert TOKENS - 40 < corpus.num_tokens <= TOKENS
    assert set(replayed(stream, range(FIRST, FIRST + 20))) == {t for text in held for t in text}


def test_a_sample_is_of_what_had_been_read_some_steps_before(folder: Path, tmp_path: Path) -> None:
    stream, owner = open_run(folder, tmp_path), number_of()
    sets = []
    for first in range(FIRST, FIRST + 5 * EVERY, EVERY):
        found = {owner[t] for t in replayed(stream, range(first, first + EVERY))}
        sets.append(found)
        assert found <= read_to_their_end(stream, max(FIRST, first - LEAD))
    assert len({frozenset(one) for one in sets}) > 2
    assert any(name == "code" for name, _ in sets[-1])


def test_resumes_anywhere_replay_the_same(folder: Path, tmp_path: Path) -> None:
    stream = open_run(folder, tmp_path / "whole")
    last = FIRST + 4 * EVERY
    whole = {step: rows(stream, step, "again") for step in range(FIRST, last)}
    for at in (FIRST, FIRST + 1, FIRST + LEAD, FIRST + 3, FIRST + EVERY, FIRST + EVERY + LEAD):
        again = open_run(folder, tmp_path / str(at), saved(stream, at))
        for step in range(at, min(at + EVERY + 1, last)):
            assert rows(again, step, "again") == whole[step]
        assert saved(again, last) == saved(stream, last)


def test_only_the_newest_samples_stay_and_a_roll_back_writes_the_others_again(
    folder: Path, tmp_path: Path
) -> None:
    stream = open_run(folder, tmp_path)
    state, early = saved(stream, FIRST + 1), rows(stream, FIRST + 1, "again")
    for step in range(FIRST, FIRST + 6 * EVERY):
        stream.plan(step)
    steps = {int(name.split("-")[1]) for name in files(tmp_path)}
    assert steps <= {FIRST + n * EVERY for n in (3, 4, 5, 6)}
    assert len(steps) >= 3
    assert rows(open_run(folder, tmp_path, state), FIRST + 1, "again") == early


def test_another_history_never_takes_a_left_over_sample(folder: Path, tmp_path: Path) -> None:
    stream = open_run(folder, tmp_path)
    state = saved(stream, FIRST)
    for step in range(FIRST, FIRST + EVERY + 1):
        stream.plan(step)
    other = open_run(folder, tmp_path, state)
    other.set_weights(FIRST, {"prose": 0.0, "code": 1.0, "again": 0.0})
    border = FIRST + EVERY
    owner = number_of()
    found = {
        owner[t] for step in range(FIRST, border + EVERY) for row in rows(other, step, "again") for t in row
    }
    assert found <= read_to_their_end(other, border)


def test_other_ranks_wait_for_the_one_that_writes(folder: Path, tmp_path: Path) -> None:
    writer = open_run(folder, tmp_path)
    own = config(folder, "prose", "code", others=[source()])
    place = StageFolder(tmp_path, writes=False)
    reader = build(own, first_stage(folder, steps=FIRST), stage="two", folder=place)
    for step in range(FIRST, FIRST + 3 * EVERY):
        assert rows(writer, step, "again") == rows(reader, step, "again")


def test_nobody_waits_for_ever(folder: Path, tmp_path: Path) -> None:
    seen = [Seen("prose", str(folder / "prose"), 1, 100, 50)]
    waiting = Reservoir(tmp_path, "again", tokens=9, seed=1, open_parts=lambda *_: [], writes=False)
    with pytest.raises(ValueError, match=r"not been written within 0 s: the first rank.*run\.dir must lie"):
        waiting.open(4, seen, patience=0.1)


def test_it_needs_the_folder_of_a_run(folder: Path) -> None:
    own = config(folder, "prose", "code", others=[source()])
    with pytest.raises(ValueError, match="needs the folder of a run"):
        build(own, first_stage(folder, steps=FIRST), stage="two")


def test_the_ledger_tells_what_was_replayed(folder: Path, tmp_path: Path) -> None:
    stream, owner = open_run(folder, tmp_path), number_of()
    last = FIRST + EVERY + 3
    tokens = Counter(replayed(stream, range(FIRST + EVERY, last)))
    ledger = Ledger.of(stream.state(last))
    found = ledger.documents_replayed("again")
    whole = {(name, n) for name, n in set(owner.values()) if min(tokens[t] for t in DOCUMENTS[name][n]) > 0}
    assert {(name, int(n)) for name, numbers in found.documents.items() for n in numbers} == whole
    entry = ledger.source("again")
    assert entry.tokens == (last - FIRST) * 3 * LENGTH
    assert entry.epochs == pytest.approx(3 * 3 * LENGTH / entry.epoch_tokens)
    segment = ledger.segments[-1]
    assert segment.shares()["again"] == (3 / BATCH, 3 / BATCH)
    with pytest.raises(ValueError, match="replays others"):
        ledger.documents_read("again")


def seen_documents(folder: Path, count: int) -> SeenDocuments:
    path = write_tokens(folder / "many", ragged(count, longest=4, first=0))
    corpus = IndexedReader(path)
    return SeenDocuments(Seen("many", path, 1, corpus.num_tokens, corpus.num_tokens), corpus)


def test_every_document_is_as_likely_in_the_sample(tmp_path: Path) -> None:
    part = seen_documents(tmp_path, 200)
    drawn = [draw_sample([part], tokens=100, seed=seed, name="again").documents for seed in range(600)]
    counts = np.bincount(np.concatenate(drawn), minlength=200)
    expected = counts.mean()
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_sample_is_the_same_whether_its_source_is_looked_at_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = seen_documents(tmp_path, 500)
    whole = draw_sample([part, part], tokens=120, seed=1, name="again")
    monkeypatch.setattr("trainer.data.replay.seen.CHUNK", 7)
    pieces = draw_sample([part, part], tokens=120, seed=1, name="again")
    assert whole.documents.tolist() == pieces.documents.tolist()
    assert whole.lengths.sum() <= 120


def test_a_sample_grows_by_what_is_read_and_loses_by_nothing_else(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "many", ragged(500, longest=4))
    corpus = IndexedReader(path)
    parts = [
        SeenDocuments(Seen("many", path, 1, corpus.num_tokens, tokens), corpus)
        for tokens in (corpus.num_tokens // 2, corpus.num_tokens)
    ]
    before, after = (draw_sample([one], tokens=200, seed=1, name="again") for one in parts)
    new = set(after.documents.tolist()) - set(before.documents.tolist())
    early = {int(n) for documents, _ in parts[0].chunks() for n in documents}
    assert new
    assert not new & early


def test_another_seed_in_mid_stage_never_replays_what_was_not_read(folder: Path, tmp_path: Path) -> None:
    """The places of the new orders say nothing of the old ones."""
    stream = open_run(folder, tmp_path)
    state = saved(stream, FIRST + 3)
    own = config(folder, "prose", "code", others=[source()])
    with pytest.raises(ValueError, match=r"another run\.seed than before; set them back"):
        build(own, state, stage="two", folder=StageFolder(tmp_path), seed=7)


def test_a_source_of_another_seed_that_nobody_reads_on_stays_in_the_sample(
    folder: Path, tmp_path: Path
) -> None:
    own = config(folder, "code", others=[source()])
    stream = build(own, first_stage(folder), stage="two", folder=StageFolder(tmp_path), seed=7)
    for step in (4, 4 + EVERY, 4 + 2 * EVERY):
        seen = stream.state(step)["replay"]["again"]["set"]["seen"]
        assert next(one["tokens"] for one in seen if one["name"] == "prose") == 4 * BATCH * LENGTH


def test_left_out_of_the_mixture_it_deals_no_step_twice(folder: Path, tmp_path: Path) -> None:
    """What its samples are of is noted as the stage goes by, or a save would deal the whole stage again."""
    again = source(refresh_every=50)
    own = config(folder, "prose", "code", others=[again], mixture={"weights": {"again": 0}})
    stream = build(own, first_stage(folder), stage="two", folder=StageFolder(tmp_path))
    for step in range(4, 150):
        stream.plan(step)
    dealt = stream._dealer._fitting
    again_dealt: list[int] = []
    stream._dealer._fitting = lambda cursor: again_dealt.append(cursor.step) or dealt(cursor)  # type: ignore[method-assign,func-returns-value]
    stream.state(150)
    assert again_dealt == []
    assert files(tmp_path) == []


def test_what_a_killed_writer_left_is_removed(folder: Path, tmp_path: Path) -> None:
    open_run(folder, tmp_path).plan(FIRST)
    (index,) = (tmp_path / "replay").glob("*.idx")
    index.with_name(f".{index.stem}.0123abcd.partial.bin").write_bytes(b"half")
    index.unlink()
    open_run(folder, tmp_path).plan(FIRST)
    assert files(tmp_path) == [f"{index.stem}.bin", index.name]


def test_sources_of_like_names_keep_their_own_samples(folder: Path, tmp_path: Path) -> None:
    one = source(of=["prose"], refresh_every=None) | {"name": "a b", "per_batch": 1}
    other = source() | {"name": "a_b", "per_batch": 1}
    own = config(folder, "prose", "code", others=[one, other])
    stream = build(own, first_stage(folder), stage="two", folder=StageFolder(tmp_path))
    for step in range(4, 4 + 4 * EVERY):
        stream.plan(step)
    assert any(name.startswith("a_b-") and "-000000004-" in name for name in files(tmp_path))
