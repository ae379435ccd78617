"""Transforms of samples: documents with their metadata, loss weights, and somebody else's code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.corpora import ragged, write_tokens, write_words
from tests.data.test_stream import assert_same, gather
from trainer.data.batch import COLUMNS, MicroBatch
from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader
from trainer.data.order import SourceOrder
from trainer.data.stream import TokenStream
from trainer.data.transforms.places import Places
from trainer.data.transforms.prefixed import PrefixedDocuments
from trainer.data.transforms.protocol import Sample

META = 5000
"""Token ids from here on are metadata."""
METADATA = [{"kind": "metadata"}]
HERE = "tests.data.test_transforms:"
hypothetical = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Corpus:
    """A source with metadata, `web`, and one without, `prose`; no token id occurs twice."""

    folder: Path
    tokenizer: str
    texts: list[list[int]]
    metadata: list[list[int]]

    def config(self, **changes: Any) -> DataConfig:
        sources = [
            {"name": "web", "path": str(self.folder / "web"), "group": "pages", "tags": {"language": "de"}},
            {"name": "prose", "path": str(self.folder / "prose"), "group": "books"},
        ]
        values: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "sequence_length": 16,
            "sources": sources[:1],
            "transforms": METADATA,
        } | changes
        if values["sources"] == "both":
            values["sources"] = sources
            values["mixture"] = {"groups": {"pages": 0.5, "books": 0.5}}
        else:
            values["sources"] = [one | {"group": None} for one in values["sources"]]
        return DataConfig.model_validate(values)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("transforms")
    texts = ragged(40, longest=20)
    ends = np.cumsum(np.random.default_rng(1).integers(0, 7, 40)).tolist()
    metadata = [list(range(META + a, META + b)) for a, b in zip([0, *ends], ends, strict=False)]
    write_tokens(folder / "web", texts)
    write_tokens(folder / "web.meta", metadata)
    write_tokens(folder / "prose", ragged(20, first=2000))
    return Corpus(folder, write_words(folder), texts, metadata)


def stream(config: DataConfig, batch: int = 4, **more: Any) -> TokenStream:
    return TokenStream(config, seed=3, global_batch=batch, **more)


def read(tokens: TokenStream, steps: int, batch: int = 4, first: int = 0) -> list[MicroBatch]:
    return [gather(tokens, step, micro_batch=batch) for step in range(first, first + steps)]


def flat(batches: list[MicroBatch], column: str) -> list[Any]:
    found: list[Any] = torch.cat([getattr(one, column).flatten() for one in batches]).tolist()
    return found


@given(length=st.integers(1, 40), batch=st.sampled_from([1, 3, 4]))
@hypothetical
def test_every_text_token_is_learnt_once_and_no_metadata(corpus: Corpus, length: int, batch: int) -> None:
    total = sum(map(len, corpus.texts)) + sum(map(len, corpus.metadata))
    steps = -(-total // (length * batch))
    tokens = stream(corpus.config(sequence_length=length), batch)
    whole = read(tokens, steps, batch)
    weights = flat(whole, "loss_weights")
    assert [tokens.valid_tokens(step) for step in range(steps)] == [int(b.loss_weights.sum()) for b in whole]
    labels, here = flat(whole, "labels")[: total - 1], flat(whole, "tokens")[:total]
    learnt = Counter(label for label, weight in zip(labels, weights, strict=False) if weight)
    pairs = zip(corpus.texts, corpus.metadata, strict=True)
    assert learnt == Counter(t for text, before in pairs for t in (text if before else text[1:]))
    assert sorted(here) == sorted(t for one in corpus.texts + corpus.metadata for t in one)


def test_metadata_stands_before_its_document(corpus: Corpus) -> None:
    """One context sees both: the same document number, positions that go on."""
    whole = {
        number: before + text
        for number, (before, text) in enumerate(zip(corpus.metadata, corpus.texts, strict=True))
    }
    owner = {token: (number, at) for number, tokens in whole.items() for at, token in enumerate(tokens)}
    for batch in read(stream(corpus.config()), 8):
        for row in range(len(batch.tokens)):
            places = [owner[token] for token in batch.tokens[row].tolist()]
            documents, positions = batch.documents[row].tolist(), batch.positions[row].tolist()
            for at in range(1, len(places)):
                (before, offset), (number, here) = places[at - 1], places[at]
                assert (documents[at] == documents[at - 1]) == (number == before)
                if number == before:
                    assert here == offset + 1
                    assert positions[at] == positions[at - 1] + 1


def test_a_batch_does_not_depend_on_the_layout(corpus: Corpus) -> None:
    config = corpus.config(sources="both", transforms=[*METADATA, {"kind": "loss_weight", "factor": 0.3}])
    for step in (0, 5):
        expected = gather(stream(config), step, micro_batch=4)
        assert_same(gather(stream(config), step, data_size=2, micro_batch=1), expected)


@given(length=st.integers(3, 20), steps=st.integers(0, 30), more=st.integers(0, 12))
@hypothetical
def test_a_resume_goes_on_bit_for_bit(corpus: Corpus, length: int, steps: int, more: int) -> None:
    config = corpus.config(sequence_length=length)
    straight = stream(config)
    state = json.loads(json.dumps(straight.state(steps)))
    resumed = stream(config, state=state)
    assert resumed.state(steps) == state
    for step in (steps, steps + more):
        assert_same(gather(resumed, step, micro_batch=4), gather(straight, step, micro_batch=4))
    assert resumed.state(steps + more) == straight.state(steps + more)


def test_without_transforms_every_bit_stays(corpus: Corpus) -> None:
    """An empty list, as a cooldown stage has it, is no list at all."""
    plain, bare = corpus.config(transforms=[]), corpus.config().model_dump()
    del bare["transforms"]
    one, other = stream(plain), stream(DataConfig.model_validate(bare))
    for step in (0, 7):
        assert_same(gather(one, step, micro_batch=4), gather(other, step, micro_batch=4))
    assert one.state(7) == other.state(7)
    assert not {"view", "fed"} & one.state(7)["sources"][0].keys()
    assert isinstance(one.weight_of(0), int)


def test_a_stage_takes_sources_by_name_group_and_tag(corpus: Corpus) -> None:
    for pattern in ("web", "w*", "group:pages", "tag:language=de"):
        one = {"kind": "loss_weight", "factor": 0.5, "sources": [pattern]}
        (batch,) = read(stream(corpus.config(sources="both", transforms=[one])), 1)
        weights = {source: set(batch.loss_weights[batch.sources == source].tolist()) for source in (0, 1)}
        assert weights == {0: {0.0, 0.5}, 1: {0.0, 1.0}}


def test_loss_weights_change_nothing_else(corpus: Corpus) -> None:
    lighter = {"kind": "loss_weight", "factor": 0.3, "sources": ["web"]}
    plain = stream(corpus.config(sources="both"))
    weighted = stream(corpus.config(sources="both", transforms=[*METADATA, lighter, lighter]))
    for step in (0, 9):
        one, other = (gather(x, step, micro_batch=4) for x in (plain, weighted))
        for name in COLUMNS:
            if name != "loss_weights":
                assert torch.equal(getattr(one, name), getattr(other, name))
        expected = one.loss_weights.clone()
        expected[one.sources == 0] *= 0.3
        expected[one.sources == 0] *= 0.3
        assert torch.equal(other.loss_weights, expected)
        assert weighted.weight_of(step) == pytest.approx(float(expected.double().sum()), rel=1e-12)


def test_groups_and_objectives_are_told(corpus: Corpus) -> None:
    (batch,) = read(stream(corpus.config(sources="both")), 1)
    assert torch.equal(batch.groups, batch.sources)  # pages and books, in the order of the sources
    assert not batch.objectives.any()
    (batch,) = read(stream(corpus.config()), 1)
    assert set(batch.groups.flatten().tolist()) == {-1}


class Halves:
    """Halves the loss weights of odd sequences, marks them, and shifts the ids of the first token."""

    reweights = True

    def __init__(self, options: dict[str, Any]) -> None:
        self.by = options.get("by", 0.5)

    def __call__(self, sample: Sample) -> None:
        if sample.number % 2:
            sample.loss_weights[:] *= self.by
            sample.objectives[:] = 1
            sample.tokens[0] = 7


class Silent(Halves):
    """Says that it leaves loss weights alone, and does so with by = 1."""

    reweights = False


def plugin(name: str, **options: Any) -> list[dict[str, Any]]:
    return [*METADATA, {"kind": "plugin", "plugin": HERE + name, "options": options}]


@pytest.mark.parametrize(("data_size", "micro_batch"), [(1, 4), (2, 1), (4, 1)])
def test_a_plugin_changes_samples_alike_on_every_layout(
    corpus: Corpus, data_size: int, micro_batch: int
) -> None:
    tokens, plain = stream(corpus.config(transforms=plugin("Halves"))), stream(corpus.config())
    for step in (0, 3):
        before = gather(plain, step, micro_batch=4)
        after = gather(tokens, step, data_size=data_size, micro_batch=micro_batch)
        assert torch.equal(after.loss_weights[0::2], before.loss_weights[0::2])
        assert torch.equal(after.loss_weights[1::2], before.loss_weights[1::2] / 2)
        assert after.objectives[:, 0].tolist() == [0, 1, 0, 1]
        assert after.tokens[1::2, 0].tolist() == [7, 7]
        assert torch.equal(after.labels, before.labels)
        assert tokens.weight_of(step) is None  # the ranks count it


def test_a_plugin_that_keeps_loss_weights_keeps_their_sum_known(corpus: Corpus) -> None:
    tokens = stream(corpus.config(transforms=plugin("Silent", by=1.0)))
    assert tokens.weight_of(1) == float(gather(tokens, 1, micro_batch=4).loss_weights.sum())


class Broken:
    reweights = True

    def __init__(self, options: dict[str, Any]) -> None:
        self.how = options["how"]

    def __call__(self, sample: Sample) -> None:
        if self.how == "raise":
            raise KeyError("oops")
        if self.how == "id":
            sample.labels[3] = 10_000
        if self.how == "negative":
            sample.loss_weights[0] = -1
        if self.how == "positions":
            sample.positions[0] = 3


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (plugin("Broken", how="raise"), r"source 'web', sequence \d: KeyError: 'oops'"),
        (plugin("Broken", how="id"), "labels has ids .* to 10000, the tokenizer ids 0 to 9999"),
        (plugin("Broken", how="negative"), "loss_weights has a number below 0"),
        (plugin("Broken", how="positions"), "read-only"),
        (plugin("Silent", by=0.5), "loss_weights has changed, and the plug-in's reweights is False"),
    ],
)
def test_what_a_plugin_does_wrong_is_named(
    corpus: Corpus, transform: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        read(stream(corpus.config(transforms=transform)), 1)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"kind": "loss_weight"}, "kind loss_weight needs factor"),
        ({"kind": "plugin"}, "kind plugin needs plugin"),
        ({"kind": "metadata", "factor": 0.5}, "factor is a key of kind loss_weight"),
        ({"kind": "loss_weight", "factor": 1, "options": {"a": 1}}, "options is a key of kind plugin"),
        ({"kind": "loss_weight", "factor": -1}, "greater than or equal to 0"),
        ({"kind": "loss_weight", "factor": 1, "sources": []}, "at least 1 item"),
    ],
)
def test_a_transform_that_contradicts_itself_is_refused(
    corpus: Corpus, transform: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        corpus.config(transforms=[transform])


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ([{"kind": "metadata", "sources": ["wob"]}], r"transforms\.0: sources has 'wob', which is no source"),
        ([{"kind": "metadata", "sources": ["prose"]}], r"source 'prose' has no metadata: .*data prepare"),
        ([*METADATA, *METADATA], "source 'web' has two of kind metadata; keep one"),
        ([{"kind": "plugin", "plugin": "nobody"}], "no entry point of the group 'ratoon.transforms'"),
        ([{"kind": "plugin", "plugin": HERE + "Broken"}], "cannot be opened: KeyError: 'how'"),
        ([{"kind": "plugin", "plugin": HERE + "META"}], "is no callable"),
    ],
)
def test_a_transform_without_what_it_needs_is_refused(
    corpus: Corpus, transforms: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stream(corpus.config(sources="both", transforms=transforms))


def test_no_source_with_metadata_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    bare = write_tokens(tmp_path / "bare", ragged(5))
    with pytest.raises(ValueError, match=r"no source has metadata, .*--metadata KEY --overwrite"):
        stream(corpus.config(sources=[{"name": "bare", "path": bare}]))


def test_metadata_of_other_documents_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "web", corpus.texts)
    write_tokens(tmp_path / "web.meta", corpus.metadata[1:])
    with pytest.raises(ValueError, match=r"metadata of 39 documents, .* has 40 documents; they were not"):
        stream(corpus.config(sources=[{"name": "web", "path": path}]))


@given(places=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
@hypothetical
def test_places_translate_there_and_back(corpus: Corpus, places: list[int]) -> None:
    """From any place to any other, against a walk over every token."""
    view = PrefixedDocuments(
        IndexedReader(corpus.folder / "web"), IndexedReader(str(corpus.folder / "web") + ".meta")
    )
    spans = SourceOrder(view, seed=3, name="web").spans(0, 3001)
    tokens = np.concatenate(
        [view.tokens[np.arange(b, b + n)] for b, n in zip(spans.begins, spans.lengths, strict=True)]
    )
    before = np.concatenate([[0], np.cumsum(tokens < META)])
    translated = Places(view, seed=3, name="web")
    for place in places:
        text = translated.text_before(place)
        assert text == before[place]
        back = translated.place_of(text)
        assert back <= place
        assert translated.text_before(back) == text
        documents, total, texts = translated.passed(place)
        again = Places(view, seed=3, name="web")
        again.go_on(place, [documents, total, texts])
        assert again.text_before(place) == text
