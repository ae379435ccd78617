"""The table of methods says what was measured, and its runs are real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.continual_table import bed
from tools.continual_table.__main__ import chosen, measure, seeds_of, tree_of
from tools.continual_table.arm import REPLAY, Arm
from tools.continual_table.bed import Bed, merged
from tools.continual_table.claims import (
    Claim,
    Sign,
    beside_front,
    forgotten,
    judge,
    least_step,
    measure_noise,
)
from tools.continual_table.markdown import BEGIN, END, claim_table, numbers, replaced, run_table, summary
from tools.continual_table.methods import CLAIMS, arms
from tools.continual_table.outcome import Outcome, Seed

NOISE = {"forgetting": 0.1, "new": 0.2}


def claim(sign: Sign = "below 0") -> Claim:
    """Of the forgetting of an arm."""
    return Claim("method", "says", "number", lambda seed: forgotten(seed, "arm"), sign, "forgetting")


def outcome(prose: float, code: float, cpu: float = 1.0) -> Outcome:
    return Outcome(end={"prose": prose, "code": code}, cpu=cpu)


def seed(arm: float) -> Seed:
    """A base with losses 4 and 6, and an arm that has forgotten so much."""
    return {
        "base": outcome(4.0, 6.0),
        "arm": outcome(4.0 + arm, 5.0, cpu=3.0),
        "replay-25": outcome(4.3, 5.2),
        "replay-25-again": outcome(4.2, 5.4),
    }


@pytest.mark.parametrize(
    ("sign", "values", "verdict"),
    [
        ("below 0", (-0.3, -0.2, -0.4), "yes"),
        ("below 0", (-0.3, -0.01, -0.02), "yes, within noise"),
        ("below 0", (-0.3, 0.01, -0.4), "2 of 3"),
        ("below 0", (0.3, 0.0, 0.4), "no"),
        ("above 0", (0.3, 0.2, 0.4), "yes"),
        ("above 0", (0.0, 0.2, -0.4), "1 of 3"),
        ("within noise", (0.1, -0.1, 0.0), "yes"),
        ("within noise", (0.11, -0.1, 0.0), "2 of 3"),
        ("0", (0.0, 0.0, 0.0), "yes"),
        ("0", (1e-9, 0.0, 0.0), "2 of 3"),
        ("below 0", (float("nan"), -0.2, -0.4), "2 of 3"),
    ],
)
def test_a_claim_is_judged_by_every_seed(sign: Sign, values: tuple[float, ...], verdict: str) -> None:
    assert judge(claim(sign), values, NOISE).verdict == verdict


def test_forgetting_is_counted_from_the_base() -> None:
    assert forgotten(seed(0.5), "arm") == pytest.approx(0.5)


def test_noise_is_the_largest_difference_of_two_equal_runs() -> None:
    assert measure_noise([seed(0.0)]) == pytest.approx({"forgetting": 0.1, "new": 0.2})


def test_a_ladder_is_as_steep_as_its_least_step() -> None:
    assert least_step([1.0, 3.0, 3.5]) == 0.5
    assert least_step([1.0, 3.0, 2.5]) == -0.5


@pytest.mark.parametrize(("x", "front"), [(0.5, 2.5), (1.0, 2.0), (1.5, 1.75), (3.0, 1.0), (-1.0, 4.0)])
def test_a_point_is_compared_at_the_same_new_loss(x: float, front: float) -> None:
    line = [(2.0, 1.5), (0.0, 3.0), (1.0, 2.0)]
    assert beside_front(line, (x, front - 0.25)) == pytest.approx(-0.25)


def test_a_row_has_the_median_and_every_seed() -> None:
    assert numbers((0.1, -0.3, 0.2)) == "+0.100 (+0.100, -0.300, +0.200)"
    found = judge(claim(), [-0.3, -0.2, 0.4], NOISE)
    assert claim_table([found, found]).splitlines()[2:] == [
        "| method | says | number | -0.200 (-0.300, -0.200, +0.400) | 2 of 3 |",
        "|  | says | number | -0.200 (-0.300, -0.200, +0.400) | 2 of 3 |",
    ]


def test_what_does_not_hold_is_said_before_the_table() -> None:
    held, missed = (judge(claim(), [value, value], NOISE) for value in (-0.3, 0.3))
    said = summary([held, missed], NOISE)
    assert said.startswith(
        "1 of 2 expectations hold for every seed. Not for every seed: method: number (no)."
    )


def test_runs_are_listed_with_their_losses() -> None:
    assert "| `arm` | +0.500 (+0.500) | 5.000 (5.000) | 3 |" in run_table([seed(0.5)]).splitlines()


def test_only_what_is_between_the_markers_is_replaced() -> None:
    document = f"before\n{BEGIN}\nold | table\n{END}\nafter\n"
    once = replaced(document, "new\n")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replaced(once, "new") == once


@pytest.mark.parametrize("document", ["", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", BEGIN])
def test_a_document_without_a_place_for_it_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        replaced(document, "table")


def test_every_number_is_in_the_json() -> None:
    seeds = {7: seed(0.5), 8: seed(-0.5)}
    tree = json.loads(json.dumps(tree_of([judge(claim(), [0.5, -0.5], NOISE)], seeds, NOISE)))
    assert tree["claims"][0]["values"] == {"7": 0.5, "8": -0.5}
    assert tree["seeds"]["8"]["arm"]["end"] == {"prose": 3.5, "code": 5.0}
    assert tree["noise"] == NOISE
    assert seeds_of(tree) == seeds


@pytest.fixture
def every(tmp_path: Path) -> list[Arm]:
    return arms(Bed(tmp_path, tmp_path, 1, bed.TINY))


def test_no_arm_comes_before_what_it_needs(every: list[Arm]) -> None:
    done: set[str] = set()
    for arm in every:
        assert done.issuperset(arm.needs)
        assert arm.name not in done
        done.add(arm.name)


def test_what_a_chosen_arm_needs_comes_along(every: list[Arm]) -> None:
    assert [arm.name for arm in chosen(every, ["metadata-hot"])] == ["metadata", "metadata-hot"]
    with pytest.raises(ValueError, match="no run is called nothing"):
        chosen(every, ["nothing"])


def test_claims_are_about_arms_that_there_are(every: list[Arm]) -> None:
    class Names(dict[str, Outcome]):
        def __missing__(self, name: str) -> Outcome:
            asked.add(name)
            raise KeyError(name)

    asked: set[str] = set()
    values: list[Callable[[Seed], float]] = [one.value for one in CLAIMS]
    for value in values:
        with pytest.raises(KeyError):
            value(Names())
    assert asked <= {arm.name for arm in every}


def test_tables_are_merged_and_lists_replaced() -> None:
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}


def test_a_slice_of_the_experiment_runs(tmp_path: Path) -> None:
    outcomes = measure(tmp_path, [1], bed.TINY, ["plain", "freeze"])[1]
    assert list(outcomes) == ["base", "plain", "freeze"]
    plain, freeze = outcomes["plain"], outcomes["freeze"]
    assert plain.curves["plain"]["prose"][0] == (6, outcomes["base"].end["prose"])
    assert plain.end["code"] < outcomes["base"].end["code"]
    assert [step for step, _ in plain.curves["plain"]["prose"]][:3] == [6, 7, 8]
    assert plain.auxiliary.keys() == {"z"}
    assert freeze.frozen is True
    assert plain.frozen is None
    assert plain.cpu > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_more_replay_forgets_strictly_less(tmp_path: Path) -> None:
    outcomes = measure(tmp_path, [1, 2, 3], bed.FULL, list(REPLAY))
    for ran in outcomes.values():
        assert least_step([-forgotten(ran, name) for name in REPLAY]) > 0
