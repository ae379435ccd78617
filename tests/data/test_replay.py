"""Replay of what a run has really read: which documents, in which order, and what a checkpoint keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.ledger import Ledger
from trainer.data.replay.opening import StageFolder
from trainer.data.stream import TokenStream

NAMES = ("prose", "code", "law")
DOCUMENTS = {name: ragged(40, first=2000 * n, seed=n) for n, name in enumerate(NAMES)}
BATCH, LENGTH = 6, 16
REPLAY = {"name": "again", "share": 0.5, "replay": {"of": ["prose"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay")
    for name, documents in DOCUMENTS.items():
        write_tokens(path / name, documents)
    write_words(path)
    return path


def config(folder: Path, *names: str, **more: Any) -> DataConfig:
    """The sources of these names, and those of `more`: {"replay": {...}}."""
    sources = [{"name": name, "path": str(folder / name)} for name in names]
    sources += more.pop("others", [])
    data = {"tokenizer": str(folder / "words.json"), "sequence_length": LENGTH, "sources": sources, **more}
    return DataConfig.model_validate(data)


def build(one: DataConfig, state: dict[str, Any] | None = None, **more: Any) -> TokenStream:
    return TokenStream(one, seed=more.pop("seed", 1), global_batch=BATCH, state=state, **more)


def saved(stream: TokenStream, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(stream.state(step)))
    return found


def first_stage(folder: Path, *names: str, steps: int = 4) -> dict[str, Any]:
    """The state after a few steps on these sources."""
    return saved(build(config(folder, *(names or ("prose",))), stage="one"), steps)


def rows(stream: TokenStream, step: int, name: str) -> list[list[int]]:
    """The sequences of a source in a step."""
    (batch,) = stream.micro_batches(step, data_rank=0, data_size=1, micro_batch=BATCH)
    number = stream.source_names.index(name)
    return [
        row
        for row, source in zip(batch.tokens.tolist(), batch.sources[:, 0].tolist(), strict=True)
        if source == number
    ]


def replayed(stream: TokenStream, steps: range, name: str = "again") -> list[int]:
    return [token for step in steps for row in rows(stream, step, name) for token in row]


def whole_documents(state: dict[str, Any], *names: str) -> set[int]:
    """Tokens of the documents of these sources that had been read to their end."""
    ledger = Ledger.of(state)
    return {t for name in names for number in ledger.documents_read(name) for t in DOCUMENTS[name][number]}


def test_it_reads_the_documents_that_were_read_and_no_others(folder: Path) -> None:
    state = first_stage(folder)
    stream = build(config(folder, "code", others=[REPLAY]), state, stage="two")
    tokens = replayed(stream, range(4, 40))
    seen = whole_documents(state, "prose")
    assert 0 < len(seen) < sum(map(len, DOCUMENTS["prose"]))
    assert set(tokens) == seen


def test_an_epoch_of_it_has_every_document_once_in_an_order_of_its_own(folder: Path) -> None:
    state = first_stage(folder)
    stream = build(config(folder, "code", others=[REPLAY]), state, stage="two")
    tokens, seen = replayed(stream, range(4, 40)), whole_documents(state, "prose")
    epochs = [tokens[at : at + len(seen)] for at in range(0, len(tokens) - len(seen), len(seen))]
    assert len(epochs) > 2
    assert all(set(epoch) == seen for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_sources_are_pooled(folder: Path) -> None:
    state = first_stage(folder, "prose", "law", steps=3)
    pooled = REPLAY | {"replay": {"of": ["law", "prose"]}}
    stream = build(config(folder, "code", others=[pooled]), state, stage="two")
    assert set(replayed(stream, range(3, 40))) == whole_documents(state, "prose", "law")


def test_what_was_read_in_whole_epochs_is_replayed_whole(folder: Path) -> None:
    state = first_stage(folder, steps=20)
    assert Ledger.of(state).source("prose").epochs > 1
    stream = build(config(folder, "code", others=[REPLAY]), state, stage="two")
    assert len(set(replayed(stream, range(20, 60)))) == sum(map(len, DOCUMENTS["prose"]))


def test_the_place_of_the_source_itself_does_not_move(folder: Path) -> None:
    state = first_stage(folder)
    stream = build(config(folder, "prose", others=[REPLAY]), state, stage="two")
    before, after = (Ledger.of(one).source("prose").tokens for one in (state, stream.state(10)))
    assert after - before == 6 * BATCH * LENGTH // 2
    plain = build(config(folder, "prose"), state, stage="two")
    own = [row for step in range(4, 10) for row in rows(stream, step, "prose")]
    assert own == [row for step in range(4, 7) for row in rows(plain, step, "prose")]


def test_the_batch_stays_as_large_as_it_was(folder: Path) -> None:
    stream = build(config(folder, "code", others=[REPLAY]), first_stage(folder), stage="two")
    assert [len(rows(stream, step, "again")) for step in (4, 5, 6)] == [3, 3, 3]
    assert [len(rows(stream, step, "code")) for step in (4, 5, 6)] == [3, 3, 3]


@pytest.mark.parametrize("at", [5, 9, 23])
def test_a_resume_in_mid_stage_replays_the_same(folder: Path, at: int) -> None:
    own = config(folder, "prose", "code", others=[REPLAY])
    stream = build(own, first_stage(folder), stage="two")
    again = build(own, saved(stream, at), stage="two")
    for step in range(at, at + 4):
        assert (again.plan(step).sources == stream.plan(step).sources).all()
        assert rows(again, step, "again") == rows(stream, step, "again")
    assert saved(again, at + 4) == saved(stream, at + 4)


def test_a_later_stage_replays_what_was_read_by_then(folder: Path) -> None:
    own = config(folder, "prose", others=[REPLAY])
    state = first_stage(folder, steps=2)
    middle = saved(build(own, state, stage="two"), 8)
    for begins, stage in (("a name", "three"), ("the folder", "two")):
        place = StageFolder(folder, new_stage=begins == "the folder")
        last = build(own, middle, stage=stage, folder=place)
        tokens = set(replayed(last, range(8, 40)))
        assert tokens == whole_documents(middle, "prose")
        assert len(tokens) > len(whole_documents(state, "prose"))
    assert Ledger.of(last.state(40)).source("again").tokens == (40 - 2) * BATCH * LENGTH // 2


def test_an_earlier_run_of_another_seed_can_be_replayed(folder: Path) -> None:
    state = first_stage(folder)
    stream = build(config(folder, "code", others=[REPLAY]), state, seed=9, stage="two")
    assert set(replayed(stream, range(4, 40))) == whole_documents(state, "prose")


def test_left_out_it_needs_no_ledger_and_takes_no_part(folder: Path) -> None:
    without = {"weights": {"again": 0}}
    stream = build(config(folder, "prose", others=[REPLAY], mixture=without), stage="one")
    assert set(stream.plan(0).sources.tolist()) == {0}
    state = saved(stream, 4)
    again = build(config(folder, "prose", others=[REPLAY]), state, stage="two")
    assert set(replayed(again, range(4, 40))) == whole_documents(state, "prose")
    with pytest.raises(ValueError, match="nothing to replay when the stage began"):
        stream.set_weights(4, {"prose": 0.5, "again": 0.5})


def test_a_controller_may_bring_in_what_was_left_out_of_the_start(folder: Path) -> None:
    weighted = {"name": "again", "replay": {"of": ["prose"]}}
    state = first_stage(folder)
    without = config(folder, "code", others=[weighted], mixture={"weights": {"again": 0}})
    stream = build(without, state, stage="two")
    stream.set_weights(6, {"code": 0.5, "again": 0.5})
    assert set(replayed(stream, range(6, 40))) == whole_documents(state, "prose")
    again = build(without, saved(stream, 9), stage="two")
    again.set_weights(9, {"code": 0.5, "again": 0.5})
    assert rows(again, 9, "again") == rows(stream, 9, "again")


def test_what_was_empty_when_the_stage_began_is_so_after_a_restart(folder: Path) -> None:
    weighted = {"name": "again", "replay": {"of": ["prose"]}}
    without = config(folder, "prose", others=[weighted], mixture={"weights": {"again": 0}})
    state = saved(build(without, stage="one"), 5)
    stream = build(without, state, stage="one")
    assert "replay" not in saved(stream, 6)
    with pytest.raises(ValueError, match="nothing to replay when the stage began"):
        stream.set_weights(5, {"prose": 0.5, "again": 0.5})
    given = config(folder, "prose", others=[weighted])
    assert set(replayed(build(given, state, stage="one"), range(5, 40))) == whole_documents(state, "prose")


def test_another_seed_in_mid_stage_begins_a_set_at_its_own_first_token(folder: Path) -> None:
    own = config(folder, "code", others=[REPLAY])
    two = saved(build(own, first_stage(folder), stage="two"), 9)
    three = saved(build(own, two, stage="three"), 14)
    stream = build(own, three, stage="three", seed=7)
    assert saved(stream, 16)["replay"]["again"]["set"]["begin"] == 0
    assert Ledger.of(stream.state(16)).source("again").epochs > 0
    assert set(replayed(stream, range(14, 50))) == whole_documents(three, "prose")


def test_moved_files_are_found_through_a_source_of_their_name(folder: Path, tmp_path: Path) -> None:
    state = first_stage(folder)
    moved = json.loads(json.dumps(state).replace(str(folder / "prose"), str(tmp_path / "gone")))
    own = config(folder, "code", others=[REPLAY])
    with pytest.raises(ValueError, match=r"gone\.idx does not exist.*\[\[data\.sources\]\] of that name"):
        build(own, moved, stage="two")
    named = config(folder, "code", "prose", others=[REPLAY], mixture={"weights": {"prose": 0}})
    stream, plain = build(named, moved, stage="two"), build(own, state, stage="two")
    assert replayed(stream, range(4, 9)) == replayed(plain, range(4, 9))


def test_a_large_ledger_is_found_again_at_once(tmp_path: Path) -> None:
    count = 300_000
    lengths = np.random.default_rng(0).integers(1, 30, count).astype(np.int32)
    np.zeros(int(lengths.sum()), dtype=np.uint16).tofile(tmp_path / "big.bin")
    from trainer.data.indexed import write_index

    with open(tmp_path / "big.idx", "wb") as file:
        write_index(file, np.uint16, [lengths])
    write_words(tmp_path)
    state = first_stage_of_big(tmp_path, int(lengths.sum()) // 2)
    own = config(tmp_path, "big", others=[REPLAY | {"replay": {"of": ["big"]}}])
    stream = build(own, state, stage="two")
    stream.plan(4)
    (counted,) = saved(stream, 5)["replay"]["again"]["set"]["counted"]
    assert counted[0] == len(Ledger.of(state).documents_read("big"))
    again = build(own, saved(stream, 5), stage="two")
    assert (again.plan(5).spans[1].begins == stream.plan(5).spans[1].begins).all()


def first_stage_of_big(folder: Path, tokens: int) -> dict[str, Any]:
    state = saved(build(config(folder, "big"), stage="one"), 4)
    state["sources"][0] |= {"tokens": tokens, "passed": None}
    return state
