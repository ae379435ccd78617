"""The ledger, and the weights of a stream that it tells of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader, write_index
from trainer.data.ledger import Ledger
from trainer.data.order import BLOCK, SourceOrder
from trainer.data.prefetch import Prefetcher
from trainer.data.stream import TokenStream

LENGTH, BATCH = 8, 10


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Any]:
    sources = [
        {"name": name, "path": write_tokens(tmp_path / name, ragged(60, first=3000 * n, seed=n))}
        for n, name in enumerate(("prose", "code", "law"))
    ]
    return {"tokenizer": write_words(tmp_path), "sequence_length": LENGTH, "sources": sources}


def build(entries: dict[str, Any], state: dict[str, Any] | None = None, **more: Any) -> TokenStream:
    options = {"seed": more.pop("seed", 1), "stage": more.pop("stage", "")}
    config = DataConfig.model_validate(entries | more)
    return TokenStream(config, global_batch=BATCH, state=state, **options)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, sort_keys=True))  # type: ignore[no-any-return]


def test_changes_of_the_weights_share_a_segment_and_keep_debts(entries: dict[str, Any]) -> None:
    stream = build(entries)
    for step in range(0, 1000, 10):
        share = 0.3 + 0.4 * (step % 7) / 7
        stream.set_weights(step, {"prose": share, "code": 0.999 - share, "law": 0.001})
        stream.plan(step + 9)
    (segment,) = Ledger.of(stream.state(1000)).segments
    assert segment.dealt["law"] == 10
    shares = segment.shares()
    assert shares["law"][0] == pytest.approx(0.001)
    assert shares["prose"][0] == pytest.approx(shares["prose"][1], abs=1 / 5000)


def test_a_resumed_stream_goes_on_with_the_weights_that_were_set(entries: dict[str, Any]) -> None:
    whole = build(entries)
    whole.set_weights(3, {"prose": 1, "code": 2, "law": 5})
    whole.plan(20)
    whole.set_weights(21, {"prose": 5, "code": 2, "law": 1})
    for at in (2, 3, 12, 21, 30):
        resumed = build(entries, through_json(whole.state(at)))
        if at < 3:
            resumed.set_weights(3, {"prose": 1, "code": 2, "law": 5})
        if at < 21:
            resumed.set_weights(21, {"prose": 5, "code": 2, "law": 1})
        assert resumed.plan(35).sources.tolist() == whole.plan(35).sources.tolist()
        assert resumed.state(36) == whole.state(36)


def test_weights_that_cannot_be_set(entries: dict[str, Any]) -> None:
    stream = build(entries)
    even = dict.fromkeys(("prose", "code", "law"), 1.0)
    stream.set_weights(5, even)
    assert stream.weights == pytest.approx(dict.fromkeys(even, 1 / 3))
    with pytest.raises(ValueError, match="those of step 5 are set"):
        stream.set_weights(4, even)
    with pytest.raises(ValueError, match=r"'cod'; did you mean 'code'.*'code' has no weight"):
        stream.set_weights(6, {"prose": 1, "cod": 1, "law": 1})
    with pytest.raises(ValueError, match="sum to zero"):
        stream.set_weights(6, dict.fromkeys(even, 0.0))


def test_a_step_whose_weights_are_undecided_is_not_built_ahead(entries: dict[str, Any]) -> None:
    stream = build(entries)
    build_step, border = lambda step: stream.plan(step).sources.tolist(), lambda step: step == 1
    with Prefetcher(build_step, undecided=border) as prefetcher:
        prefetcher.get(0)
        stream.set_weights(1, {"prose": 0, "code": 0, "law": 1})
        assert prefetcher.get(1) == [2] * BATCH


def test_another_stage_is_another_segment(entries: dict[str, Any]) -> None:
    state = build(entries, stage="first").state(7)
    going_on, another = build(entries, state, stage="first"), build(entries, state, stage="second")
    assert len(Ledger.of(going_on.state(9)).segments) == 1
    assert [(one.stage, one.steps) for one in Ledger.of(another.state(9)).segments] == [
        ("first", 7),
        ("second", 2),
    ]


def test_what_another_seed_had_read_is_told(entries: dict[str, Any]) -> None:
    state = build(entries).state(7)
    ledger = Ledger.of(through_json(build(entries, state, seed=2).state(7)))
    assert {one.name: one.tokens for one in ledger.sources} == dict.fromkeys(("prose", "code", "law"), 0)
    assert sum(one.tokens for one in ledger.replaced) == 7 * BATCH * LENGTH


def test_documents_of_other_data_are_not_named(entries: dict[str, Any], tmp_path: Path) -> None:
    ledger = Ledger.of(build(entries).state(7))
    write_tokens(tmp_path / "code", ragged(50, first=3000, seed=5))
    with pytest.raises(ValueError, match="other data by now"):
        ledger.documents_read("code")
    with pytest.raises(ValueError, match="no source 'x'"):
        ledger.documents_read("x")


OLD = {
    "step": 10,
    "seed": 1,
    "sequence_length": LENGTH,
    "global_batch": BATCH,
    "mixture_step": 4,
    "sources": [
        {"name": "prose", "weight": 2.0, "tokens_at_mixture_step": 320, "tokens": 640},
        {"name": "code", "weight": 1.0, "tokens_at_mixture_step": 0, "tokens": 160},
        {"name": "law", "weight": 0.0, "tokens_at_mixture_step": 80, "tokens": 80},
    ],
}


def test_the_first_versions_checkpoints_still_load(entries: dict[str, Any]) -> None:
    sizes = {one["name"]: IndexedReader(one["path"]).num_tokens for one in entries["sources"]}
    old = OLD | {"sources": [one | {"epoch_tokens": sizes[str(one["name"])]} for one in OLD["sources"]]}  # type: ignore[attr-defined]
    stream = build(entries, old)
    ledger = Ledger.of(through_json(stream.state(12)))
    assert [(one.step, one.steps, one.sequences) for one in ledger.segments] == [(4, 6, 60), (10, 2, 20)]
    assert sum(one.tokens for one in ledger.sources) == 640 + 160 + 80 + 2 * BATCH * LENGTH
    assert ledger.segments[0].shares()["prose"] == pytest.approx((2 / 3, 2 / 3))


def test_a_place_in_the_middle_of_an_epoch_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = IndexedReader(write_tokens(tmp_path / "long", ragged(20 * BLOCK, longest=3)))
    walked = SourceOrder(corpus, seed=1, name="long")
    at = corpus.num_tokens + corpus.num_tokens // 2
    expected = walked.spans(at, 50)
    passed = walked.passed(at)
    assert passed is not None
    asked: list[int] = []
    spans = IndexedReader.spans

    def counting(reader: IndexedReader, documents: Any) -> Any:
        asked.append(len(documents))
        return spans(reader, documents)

    monkeypatch.setattr(IndexedReader, "spans", counting)
    fresh = SourceOrder(corpus, seed=1, name="long")
    fresh.go_on(at, passed)
    assert fresh.spans(at, 50).documents.tolist() == expected.documents.tolist()
    assert sum(asked) <= 3 * BLOCK
    before = fresh.spans(at - corpus.num_tokens // 4, 9).begins.tolist()
    assert before == walked.spans(at - corpus.num_tokens // 4, 9).begins.tolist()


START = """
import json, resource, sys, time
from trainer.data.config import DataConfig
from trainer.data.stream import TokenStream
folder, state = sys.argv[1], json.load(open(sys.argv[2]))
names = [f"s{n}" for n in range(500)]
sources = [
    {"name": name, "path": f"{folder}/{name}", "weight": 1 + n % 37, "max_epochs": 4}
    for n, name in enumerate(names)
]
config = DataConfig(sequence_length=4096, sources=sources)
began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream = TokenStream(config, seed=1, global_batch=512, state=state)
first = state["step"] if state else 0
stream.plan(first)
started = time.process_time() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
for step in range(first + 1, first + 11):
    stream.plan(step)
planned = (time.process_time() - began) / 10
json.dump(stream.state(first + 11), open(sys.argv[2], "w"))
print(json.dumps([started, planned, (peak - before) / 1024, peak / 1024]))
"""


def test_500_sources_of_a_million_documents_start_at_once(tmp_path: Path) -> None:
    """Anew and in mid-epoch: under 2 s of processor time and 300 MB beyond the imports."""
    lengths = np.random.default_rng(0).integers(50, 950, 1_000_000).astype(np.int32)
    with open(tmp_path / "one.idx", "wb") as file:
        write_index(file, np.uint16, [lengths])
    with open(tmp_path / "one.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))
    for number in range(500):
        for suffix in (".idx", ".bin"):
            (tmp_path / f"s{number}{suffix}").symlink_to(tmp_path / f"one{suffix}")
    state = tmp_path / "state.json"
    state.write_text("null")
    for _ in range(2):
        command = [sys.executable, "-c", START, str(tmp_path), str(state)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        started, planned, grown, _ = json.loads(done.stdout)
        assert started < 2
        assert grown < 300
        assert planned < 0.2
