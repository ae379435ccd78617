"""Sources with a share or a number of sequences of their own, and those that divide the rest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.data.corpora import ragged, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.dealing import CapsReachedError, Cursor, Dealer, Terms
from trainer.data.ledger import Ledger
from trainer.data.mixture import spread_out
from trainer.data.mixture_config import batch_problems
from trainer.data.stream import TokenStream
from trainer.data.weights import WHOLE, quantise, resolve_weights

NAMES = ("prose", "code", "law")
SIZES = dict.fromkeys(NAMES, 1000)
BATCH = 12


def config(mixture: dict[str, Any] | None = None, **sources: dict[str, Any]) -> DataConfig:
    entries = [{"name": name, "path": name, **sources.get(name, {})} for name in NAMES]
    return DataConfig.model_validate({"sources": entries, "mixture": mixture or {}})


def resolved(mixture: dict[str, Any] | None = None, **sources: dict[str, Any]) -> dict[str, float]:
    one = config(mixture, **sources)
    return resolve_weights(one.mixture, one.sources, SIZES, global_batch=BATCH)


def dealer(fixed: dict[str, int], weights: dict[str, float], caps: dict[str, int] | None = None) -> Dealer:
    units = quantise({name: weights.get(name, 0.0) for name in NAMES})
    limits = {name: (caps or {}).get(name) for name in NAMES}
    terms = Terms(1, "", 8, BATCH, units, SIZES, limits, fixed)
    return Dealer(terms, Cursor.beginning(terms, 0, {}), dict.fromkeys(NAMES))


def dealt(one: Dealer, step: int) -> Counter[str]:
    return Counter(NAMES[source] for source in one.deal(step)[1].tolist())


def test_a_share_is_of_all_sequences_and_the_others_divide_the_rest() -> None:
    found = resolved(prose={"share": 0.25}, code={"weight": 2})
    assert found == pytest.approx({"prose": 0.25, "code": 0.5, "law": 0.25})


def test_the_newest_shares_are_known_long_after_without_dealing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = dealer({}, {"prose": 1.0, "code": 1.0})
    one.set_weights(5, {"prose": 3.0, "code": 1.0, "law": 0.0})
    for step in range(5 * Dealer.REMEMBERED):
        one.deal(step)
    monkeypatch.setattr("trainer.data.dealing.deal", lambda *_: pytest.fail("dealt again"))
    shares = one.shares(one.at(one.newest_change))
    assert shares == pytest.approx({"prose": 0.75, "code": 0.25, "law": 0.0})


def test_a_number_of_sequences_is_of_the_batch() -> None:
    found = resolved(prose={"share": 0.25}, code={"per_batch": 6})
    assert found == pytest.approx({"prose": 0.25, "code": 0.5, "law": 0.25})


def test_shares_stand_beside_the_groups() -> None:
    found = resolved(
        {"groups": {"g": 3, "h": 1}}, prose={"share": 0.2}, code={"group": "g"}, law={"group": "h"}
    )
    assert found == pytest.approx({"prose": 0.2, "code": 0.6, "law": 0.2})


def test_a_mixture_gives_a_source_another_share_or_leaves_it_out() -> None:
    changed = resolved({"shares": {"prose": 0.5}}, prose={"share": 0.25})
    assert changed == pytest.approx({"prose": 0.5, "code": 0.25, "law": 0.25})
    without = resolved({"weights": {"prose": 0}}, prose={"per_batch": 3})
    assert without == pytest.approx({"prose": 0, "code": 0.5, "law": 0.5})


@pytest.mark.parametrize(
    ("mixture", "sources", "words"),
    [
        ({}, {"prose": {"share": 0.7}, "code": {"share": 0.4}}, ["shares sum to 1.1", "prose 0.7", "lower"]),
        ({"weights": {"prose": 2}}, {"prose": {"share": 0.5}}, ["'prose' has a share", "0 to leave"]),
        ({"shares": {"prose": 0.5}}, {"prose": {"per_batch": 2}}, ["per_batch = 2 already"]),
        ({"shares": {"prise": 0.5}}, {}, ["no source is named 'prise'", "'prose'"]),
        ({}, {"prose": {"share": 1.0}}, ["leave nothing for code, law", "weight 0"]),
        (
            {},
            {"prose": {"per_batch": 12}},
            ["per_batch 12, of train.global_batch = 12", "nothing for code, law"],
        ),
        ({}, {"prose": {"per_batch": 13}}, ["come to 1.083 of the batch"]),
        ({}, {"prose": {"share": 0.5}, "law": {"per_batch": 6}}, ["leave nothing for code"]),
        (
            {"weights": {"code": 0, "law": 0}},
            {"prose": {"per_batch": 6}},
            ["come to 0.5 of the batch", "no source with a weight"],
        ),
    ],
)
def test_what_does_not_add_up_is_one_clear_error(
    mixture: dict[str, Any], sources: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="cannot be dealt") as caught:
        resolved(mixture, **sources)
    assert str(caught.value).count("\n- ") == 1
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"share": 0.2, "per_batch": 3}, "both share and per_batch"),
        ({"share": 0.2, "weight": 3}, "so its weight means nothing"),
        ({"per_batch": 2, "group": "g"}, "so its group means nothing"),
    ],
)
def test_a_source_says_its_part_once(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(prose=source)


def test_tenths_add_up_to_the_whole() -> None:
    entries = [{"name": str(n), "path": "x", "share": 0.1} for n in range(10)]
    one = DataConfig.model_validate({"sources": entries})
    assert batch_problems(one.mixture, one.sources, 4) == []


@given(count=st.integers(2, 64), micro=st.integers(1, 8), ranks=st.integers(2, 16), more=st.integers(1, 8))
def test_a_fixed_number_never_falls_to_one_data_rank(count: int, micro: int, ranks: int, more: int) -> None:
    batch = micro * ranks * more
    count = min(count, batch)
    places = spread_out(count, batch)
    assert len(set(places.tolist())) == count
    assert places.min() >= 0
    assert places.max() < batch
    assert len(set((places // micro % ranks).tolist())) > 1


weights = st.dictionaries(st.sampled_from(NAMES[1:]), st.floats(0.01, 1.0), min_size=1)


@given(k=st.integers(1, BATCH - 1), changes=st.lists(weights, min_size=1, max_size=6))
def test_every_batch_has_exactly_as_many_whatever_a_controller_asks(
    k: int, changes: list[dict[str, float]]
) -> None:
    one = dealer({"prose": k}, {"code": 1.0, "law": 1.0})
    for step, asked in enumerate(changes):
        wanted = {"prose": 0.9} | {name: asked.get(name, 0.0) for name in NAMES[1:]}
        one.set_weights(step, wanted)
        assert dealt(one, step)["prose"] == k
        shares = one.shares(one.at(step))
        assert shares["prose"] == k / BATCH
        assert sum(shares.values()) == pytest.approx(1.0)
        cursor = one.at(step + 1)
        assert cursor.lags[0] == 0
        assert sum(cursor.asked) == (step + 1) * BATCH * WHOLE
        assert min(cursor.lags) > -WHOLE


def test_a_capped_source_with_fixed_places_leaves_them_to_the_others() -> None:
    one = dealer({"prose": 4}, {"code": 3.0, "law": 1.0}, {"prose": 3 * 4 * 8})
    assert [dealt(one, step)["prose"] for step in range(5)] == [4, 4, 4, 0, 0]
    assert one.shares(one.at(4)) == {"prose": 0.0, "code": 0.75, "law": 0.25}


def test_what_a_capped_source_leaves_goes_to_those_by_weight_not_to_shares(tmp_path: Path) -> None:
    stream = build(tmp_path, [{"share": 0.25}, {"max_epochs": 0.5}, {}])
    stream.plan(100)
    assert stream.weights_at(100) == pytest.approx({"prose": 0.25, "code": 0.0, "law": 0.75})


def test_fixed_places_are_nobodys_when_all_others_have_reached_their_caps() -> None:
    one = dealer({"prose": 4}, {"code": 1.0}, {"code": 2 * 8 * 8})
    with pytest.raises(CapsReachedError, match="every source without per_batch"):
        one.deal(3)


def build(folder: Path, more: list[dict[str, Any]], state: dict[str, Any] | None = None) -> TokenStream:
    if not (folder / "words.json").exists():
        write_words(folder)
        for n, name in enumerate(NAMES):
            write_tokens(folder / name, ragged(30, first=2000 * n, seed=n))
    sources = [
        {"name": name, "path": str(folder / name), **own} for name, own in zip(NAMES, more, strict=True)
    ]
    data = {"tokenizer": str(folder / "words.json"), "sequence_length": 8, "sources": sources}
    return TokenStream(DataConfig.model_validate(data), seed=1, global_batch=BATCH, state=state)


def test_a_restart_keeps_the_fixed_places(tmp_path: Path) -> None:
    more = [{"per_batch": 3}, {"weight": 0.3}, {"weight": 0.7}]
    whole = build(tmp_path, more)
    state = json.loads(json.dumps(whole.state(5)))
    again = build(tmp_path, more, state)
    assert again.state(9) == whole.state(9)
    assert (again.plan(7).sources == whole.plan(7).sources).all()
    (segment,) = Ledger.of(again.state(9)).segments
    assert segment.shares()["prose"] == (0.25, 0.25)


def test_another_number_begins_a_segment(tmp_path: Path) -> None:
    state = build(tmp_path, [{"per_batch": 3}, {}, {}]).state(5)
    again = build(tmp_path, [{"per_batch": 4}, {}, {}], state)
    assert [one.steps for one in Ledger.of(again.state(7)).segments] == [5, 2]


def test_without_fixed_places_the_state_does_not_speak_of_them(tmp_path: Path) -> None:
    assert "per_batch" not in build(tmp_path, [{}, {}, {}]).state(2)
