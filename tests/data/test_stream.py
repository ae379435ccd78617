"""The batches of a run."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.corpora import EOD, ragged, write_tokens, write_words
from trainer.data import corpus
from trainer.data.batch import COLUMNS, MicroBatch
from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader
from trainer.data.stream import Batches, TokenStream, ValidationStream, open_validation
from trainer.data.tokenizer import Tokenizer

FIELDS = tuple(COLUMNS)
LENGTH, BATCH = 16, 8


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Any]:
    """Two sources without a common token id, and one validation set."""
    sources = []
    for name, first, weight in (("prose", 0, 0.7), ("code", 5000, 0.3)):
        path = write_tokens(tmp_path / name, ragged(60, first=first, seed=first))
        sources.append({"name": name, "path": path, "weight": weight})
    held_out = write_tokens(tmp_path / "held", ragged(21, first=8000, seed=9))
    return {
        "tokenizer": write_words(tmp_path),
        "sequence_length": LENGTH,
        "sources": sources,
        "validation": [{"name": "held", "path": held_out}],
    }


def build(entries: dict[str, Any], **changes: Any) -> TokenStream:
    options = {"seed": 5, "global_batch": BATCH} | {
        k: changes.pop(k) for k in ("seed", "state") if k in changes
    }
    return TokenStream(DataConfig(**(entries | changes)), **options)


def gather(stream: Batches, step: int, *, data_size: int = 1, micro_batch: int = BATCH) -> MicroBatch:
    """The step as one micro-batch, put together from what each rank was dealt."""
    dealt = [
        stream.micro_batches(step, data_rank=rank, data_size=data_size, micro_batch=micro_batch)
        for rank in range(data_size)
    ]
    in_order = [dealt[rank][m] for m in range(len(dealt[0])) for rank in range(data_size)]
    return MicroBatch(*(torch.cat([getattr(one, name) for one in in_order]) for name in FIELDS))


def assert_same(one: MicroBatch, other: MicroBatch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(("data_size", "micro_batch"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_tokens_do_not_depend_on_the_layout(
    entries: dict[str, Any], data_size: int, micro_batch: int
) -> None:
    for step in (0, 3, 50):
        expected = gather(build(entries), step)
        assert_same(gather(build(entries), step, data_size=data_size, micro_batch=micro_batch), expected)


def test_a_step_does_not_depend_on_the_steps_before(entries: dict[str, Any]) -> None:
    walked = build(entries)
    for step in range(20):
        last = gather(walked, step)
    assert_same(gather(build(entries), 19), last)
    assert_same(gather(walked, 4), gather(build(entries), 4))


def test_types_and_shapes(entries: dict[str, Any]) -> None:
    (batch, second) = build(entries).micro_batches(0, data_rank=1, data_size=2, micro_batch=2)
    for one in (batch, second):
        assert {tuple(getattr(one, name).shape) for name in FIELDS} == {(2, LENGTH)}
    kinds = [getattr(batch, name).dtype for name in FIELDS]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.int64] + [torch.int32] * 4


def test_every_token_once_an_epoch_and_every_neighbour_learnt_once(entries: dict[str, Any]) -> None:
    stream = build(entries, sources=entries["sources"][:1])
    documents = ragged(60, first=0, seed=0)
    total = sum(map(len, documents))
    steps = -(-total // (LENGTH * BATCH))
    whole = [gather(stream, step) for step in range(steps)]
    tokens = torch.cat([batch.tokens.flatten() for batch in whole])[:total]
    assert sorted(tokens.tolist()) == sorted(t for document in documents for t in document)
    labels = torch.cat([batch.labels.flatten() for batch in whole])[:total]
    weighted = torch.cat([batch.loss_weights.flatten() for batch in whole])[:total] > 0
    assert sorted(labels[weighted].tolist()) == sorted(t for document in documents for t in document[1:])


def test_valid_tokens_is_the_sum_of_the_weights(entries: dict[str, Any]) -> None:
    stream = build(entries)
    for step in range(12):
        assert stream.valid_tokens(step) == gather(stream, step).loss_weights.sum().item()


def test_tokens_come_from_the_source_they_name(entries: dict[str, Any]) -> None:
    batch = gather(build(entries), 2)
    assert torch.equal(batch.sources == 1, batch.tokens >= 5000)
    assert build(entries).source_names == ("prose", "code")


def test_seeds_give_other_orders(entries: dict[str, Any]) -> None:
    assert not torch.equal(gather(build(entries), 0).tokens, gather(build(entries, seed=6), 0).tokens)


def test_without_a_document_mask_only_positions_and_documents_change(entries: dict[str, Any]) -> None:
    masked, plain = gather(build(entries), 0), gather(build(entries, document_mask=False), 0)
    for name in ("tokens", "labels", "loss_weights", "sources"):
        assert torch.equal(getattr(masked, name), getattr(plain, name))
    assert plain.positions.tolist() == [list(range(LENGTH))] * BATCH
    assert not plain.documents.any()


def test_an_uneven_layout_is_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="global_batch 8 is not a multiple of data-parallel size 3"):
        build(entries).micro_batches(0, data_rank=0, data_size=3, micro_batch=1)


def test_an_id_beyond_the_tokenizer_names_the_source(entries: dict[str, Any], tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "wide", [[1, 2, EOD + 1, 4]])
    stream = build(entries, sources=[{"name": "wide", "path": path}])
    with pytest.raises(ValueError, match=r"source 'wide' .*token id 10000, the tokenizer has ids 0 to 9999"):
        gather(stream, 0)


def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(entries: dict[str, Any]) -> None:
    whole = build(entries)
    state = json.loads(json.dumps(whole.state(7), sort_keys=True))
    resumed = build(entries, state=state)
    for step in (7, 8, 30):
        assert_same(gather(resumed, step), gather(whole, step))
    assert resumed.state(9) == whole.state(9)


def consumed(stream: TokenStream, step: int) -> dict[str, int]:
    return {one["name"]: one["tokens"] for one in stream.state(step)["sources"]}


def test_a_changed_mixture_goes_on_where_each_source_stood(entries: dict[str, Any]) -> None:
    prose, code = entries["sources"]
    alone = build(entries, sources=[prose])
    both = build(entries, sources=[prose, code], state=alone.state(5))
    assert consumed(both, 5) == {"prose": 5 * BATCH * LENGTH, "code": 0}
    batch = gather(both, 5)
    own = batch.tokens[batch.sources == 0]
    following = gather(alone, 5).tokens.flatten()
    assert own.tolist() == following[: len(own)].tolist()
    share = (batch.sources == 1).float().mean().item()
    assert abs(share - 0.3) * BATCH < 1


def test_a_source_that_pauses_keeps_its_place(entries: dict[str, Any]) -> None:
    prose = entries["sources"][0]
    before = build(entries)
    paused = build(entries, sources=[prose], state=before.state(4))
    back = build(entries, state=paused.state(9))
    assert consumed(back, 9)["code"] == consumed(before, 4)["code"]
    assert consumed(back, 9)["prose"] == consumed(before, 4)["prose"] + 5 * BATCH * LENGTH


def test_a_new_sequence_length_goes_on_at_the_same_token(entries: dict[str, Any]) -> None:
    first = build(entries, sources=entries["sources"][:1])
    longer = build(entries, sources=entries["sources"][:1], sequence_length=32, state=first.state(3))
    assert gather(longer, 3).tokens.flatten()[:128].tolist() == gather(first, 3).tokens.flatten().tolist()


def test_a_step_before_the_mixture_is_refused(entries: dict[str, Any]) -> None:
    resumed = build(entries, sources=entries["sources"][:1], state=build(entries).state(5))
    with pytest.raises(ValueError, match="this mixture began at step 5"):
        gather(resumed, 4)


def test_other_data_under_the_same_name_start_over(
    entries: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = build(entries).state(5)
    other = write_tokens(tmp_path / "other", ragged(30, first=5000, seed=2))
    with caplog.at_level(logging.WARNING):
        resumed = build(
            entries, sources=[entries["sources"][0], entries["sources"][1] | {"path": other}], state=state
        )
    assert consumed(resumed, 5)["code"] == 0
    assert "source 'code' has" in caplog.text


def test_another_tokenizer_cannot_go_on(entries: dict[str, Any]) -> None:
    state = build(entries).state(5)
    with pytest.raises(ValueError, match=r"data\.tokenizer.*data\.eod.*policy = .weights."):
        build(entries, eod="w7", state=state)


def test_a_state_that_does_not_know_its_tokenizer_is_accepted(entries: dict[str, Any]) -> None:
    state = build(entries).state(5)
    del state["tokenizer"]
    assert_same(gather(build(entries, state=state), 5), gather(build(entries), 5))


def held(entries: dict[str, Any], global_batch: int = 4) -> ValidationStream:
    return ValidationStream(DataConfig(**entries), "held", global_batch=global_batch)


@pytest.mark.parametrize("global_batch", [1, 4, 64])
def test_validation_reads_the_file_once_in_order(entries: dict[str, Any], global_batch: int) -> None:
    stream = held(entries, global_batch)
    documents = ragged(21, first=8000, seed=9)
    whole = [gather(stream, step, micro_batch=1) for step in range(stream.steps)]
    tokens = torch.cat([batch.tokens.flatten() for batch in whole]).tolist()
    expected = [t for document in documents for t in document]
    assert tokens[: len(expected)] == expected
    assert set(tokens[len(expected) :]) <= {EOD}
    weighted = torch.cat([batch.loss_weights.flatten() for batch in whole]) > 0
    labels = torch.cat([batch.labels.flatten() for batch in whole])
    assert labels[weighted].tolist() == [t for document in documents for t in document[1:]]
    assert sum(stream.valid_tokens(step) for step in range(stream.steps)) == int(weighted.sum())


def test_validation_does_not_depend_on_the_layout(entries: dict[str, Any]) -> None:
    stream = held(entries)
    for step in range(stream.steps):
        expected = gather(stream, step, micro_batch=4)
        assert_same(gather(stream, step, data_size=2, micro_batch=1), expected)


def test_validation_padding_is_a_document_of_its_own(entries: dict[str, Any]) -> None:
    stream = held(entries, 64)
    batch = gather(stream, 0, micro_batch=64)
    total = sum(map(len, ragged(21, first=8000, seed=9)))
    row, column = divmod(total, LENGTH)
    assert column > 0
    last, pad = batch.documents[row, column - 1], batch.documents[row, column:]
    assert (pad == last + 1).all()
    assert batch.positions[row, column:].tolist() == list(range(LENGTH - column))
    assert not batch.loss_weights[row, column - 1 :].any()


def test_validation_opens_every_file_once(
    entries: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [{"name": f"v{n}", "path": write_tokens(tmp_path / f"v{n}", ragged(3, first=n))} for n in range(9)]
    opened: list[str] = []
    real = corpus.open_corpus

    def counting(prefix: str, tokenizer: Tokenizer) -> IndexedReader:
        opened.append(prefix)
        return real(prefix, tokenizer)

    monkeypatch.setattr(corpus, "open_corpus", counting)
    streams = open_validation(DataConfig(**(entries | {"validation": sets})), global_batch=2)
    assert opened == [one["path"] for one in sets]
    assert [stream.name for stream in streams] == [one["name"] for one in sets]
    for n, stream in enumerate(streams):
        assert gather(stream, 0, micro_batch=2).tokens[0, 0] == n


def test_an_unknown_validation_set_is_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no validation set 'x'.*'held'"):
        ValidationStream(DataConfig(**entries), "x", global_batch=4)


def test_many_sources_start_at_once(entries: dict[str, Any], tmp_path: Path) -> None:
    """A step of 200 sources plans only what it reads: each epoch's order is never listed."""
    sources = [
        {"name": f"s{n}", "path": write_tokens(tmp_path / f"s{n}", ragged(3, seed=n)), "weight": 1 + n}
        for n in range(200)
    ]
    stream = build(entries, sources=sources)
    batch = gather(stream, 1000)
    assert len(np.unique(batch.sources.numpy())) == BATCH
