"""What a run file says about shares, resolved to weights."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.data.corpora import write_tokens
from trainer.data.config import DataConfig
from trainer.data.corpus import data_problems
from trainer.data.weights import WHOLE, pass_on, quantise, resolve_weights

SIZES = {"a": 100, "b": 10_000, "c": 1_000_000}


def config(mixture: dict[str, Any], **sources: dict[str, Any]) -> DataConfig:
    entries = [{"name": name, "path": name, **sources.get(name, {})} for name in SIZES]
    return DataConfig.model_validate({"sources": entries, "mixture": mixture})


def resolved(mixture: dict[str, Any], **sources: dict[str, Any]) -> dict[str, float]:
    one = config(mixture, **sources)
    return resolve_weights(one.mixture, one.sources, SIZES)


def test_own_weights_without_a_mixture() -> None:
    assert resolved({}, a={"weight": 2}) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})


def test_the_mixture_overrides_and_leaves_out() -> None:
    found = resolved({"weights": {"a": 3, "b": 0}}, b={"weight": 9})
    assert found == pytest.approx({"a": 0.75, "b": 0, "c": 0.25})


@pytest.mark.parametrize(
    ("temperature", "parts"), [(1, (1, 100, 10_000)), (2, (1, 10, 100)), (1e9, (1, 1, 1))]
)
def test_temperature_draws_by_a_root_of_the_size(temperature: float, parts: tuple[int, ...]) -> None:
    expected = dict(zip(SIZES, [part / sum(parts) for part in parts], strict=True))
    assert resolved({"temperature": temperature}) == pytest.approx(expected, rel=1e-6)


def test_weights_multiply_what_temperature_gives() -> None:
    found = resolved({"temperature": 2, "weights": {"a": 10, "c": 0}})
    assert found == pytest.approx({"a": 0.5, "b": 0.5, "c": 0})


def test_shares_of_groups_do_not_depend_on_their_sources() -> None:
    groups = {"small": 1, "large": {"share": 3, "temperature": 2}}
    members = {"a": {"group": "small"}, "b": {"group": "large"}, "c": {"group": "large"}}
    found = resolved({"groups": groups}, **members)
    assert found == pytest.approx({"a": 0.25, "b": 0.75 / 11, "c": 7.5 / 11})
    assert list(found) == list(SIZES)


WRONG: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"weights": {"aa": 1}}, {}, ["no source is named 'aa'; did you mean 'a'?"]),
    ({"weights": dict.fromkeys(SIZES, 0)}, {}, ["data.mixture.weights: they sum to zero"]),
    ({"groups": {"web": 1}}, {name: {"group": "web"} for name in "bc"}, ["sources 'a': has no group"]),
    (
        {"groups": {"web": 1, "books": 1}},
        {"a": {"group": "web"}, "b": {"group": "books"}, "c": {"group": "bok"}},
        ["group 'bok' is not in data.mixture.groups; did you mean 'books'?"],
    ),
    (
        {"groups": {"web": 0}},
        {name: {"group": "web"} for name in "abc"},
        ["data.mixture.groups: the shares sum to zero"],
    ),
    (
        {"groups": {"web": 1, "wob": 1}},
        {name: {"group": "web"} for name in "abc"},
        ["groups.wob: share 1, but no source is in it; did you mean 'web'?"],
    ),
    (
        {"groups": {"web": 1}, "weights": dict.fromkeys("abc", 0)},
        {name: {"group": "web"} for name in "abc"},
        ["groups.web: share 1, but its sources' weights sum to zero"],
    ),
]


@pytest.mark.parametrize(("mixture", "sources", "expected"), WRONG)
def test_what_cannot_be_dealt_is_known_before_a_run(
    mixture: dict[str, Any], sources: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    one = config(mixture, **sources)
    found = [problem for problem in one.problems() if "do not exist" not in problem]
    assert len(found) == len(expected)
    for part, text in zip(expected, found, strict=True):
        assert part in text
    with pytest.raises(ValueError, match="the mixture cannot be dealt"):
        resolve_weights(one.mixture, one.sources, SIZES)


def test_an_empty_corpus_is_named(tmp_path: Path) -> None:
    one = config({})
    with pytest.raises(ValueError, match="'b': holds no tokens"):
        resolve_weights(one.mixture, one.sources, SIZES | {"b": 0})
    empty = write_tokens(tmp_path / "empty", [])
    (problem,) = data_problems(DataConfig.model_validate({"sources": [{"name": "e", "path": empty}]}))
    assert "data.sources 'e': " in problem
    assert "holds no tokens" in problem


@pytest.mark.parametrize(
    "mixture", [{"weights": {"a": -1}}, {"temperature": 0}, {"groups": {"g": -0.5}}, {"groups": {"g": "x"}}]
)
def test_numbers_are_checked(mixture: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(mixture)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e12), min_size=1).filter(lambda d: any(d.values())))
def test_units_sum_to_the_whole_and_keep_the_proportions(weights: dict[str, float]) -> None:
    units, total = quantise(weights), sum(weights.values())
    assert sum(units.values()) == WHOLE
    for name, one in weights.items():
        assert (units[name] > 0) == (one > 0)
        assert abs(units[name] - one / total * WHOLE) < 1 + len(weights)


def test_who_leaves_leaves_to_the_group() -> None:
    units = quantise({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    groups = {"a": "x", "b": "x", "c": "y", "d": "y"}
    inside = pass_on(units, ["c"], groups)
    assert inside == {"a": units["a"], "b": units["b"], "c": 0, "d": units["c"] + units["d"]}
    across = pass_on(units, ["c", "d"], groups)
    assert across["b"] == pytest.approx(2 * across["a"], abs=2)
    assert sum(across.values()) == WHOLE
    with pytest.raises(ValueError, match="no source is left"):
        pass_on(units, list(units), groups)
