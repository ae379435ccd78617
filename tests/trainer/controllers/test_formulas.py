"""The rules of the controllers, by numbers computed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from trainer.controllers.protocol import Evaluation, History, KeepWeightsError
from trainer.controllers.raise_replay import RaiseReplay
from trainer.controllers.shares import checked, exponentiated, smoothed, with_frozen
from trainer.controllers.skillit import SkillIt
from trainer.controllers.velocitune import Velocitune

EVEN = {"prose": 0.5, "code": 0.5}
SETS = {"prose": "prose", "code": "code-held-out"}


def history(
    weights: Mapping[str, float] = EVEN,
    *,
    held_out: Mapping[str, float] | None = None,
    training: Mapping[str, float] | None = None,
) -> History:
    evaluations = () if held_out is None else (Evaluation(0, held_out),)
    return History(0, 0, 100, weights, losses=training or {}, evaluations=evaluations)


def velocitune(loss: str = "validation", state: Mapping[str, object] | None = None) -> Velocitune:
    targets = {"prose": 1.0, "code": 2.0}
    return Velocitune(targets, SETS, eta=0.5, loss=loss, state=state)  # type: ignore[arg-type]


def test_velocitune_moves_weight_to_what_has_the_longer_way_to_go() -> None:
    one = velocitune()
    assert one.weights(history(held_out={"prose": 3.0, "code-held-out": 6.0})) == EVEN, "V is 1 for both"
    found = one.weights(history(held_out={"prose": 2.5, "code-held-out": 3.0}))
    assert one.velocities() == {"prose": 0.75, "code": 0.25}
    ratio = math.exp(0.5 * (0.75 - 0.25))
    assert found == pytest.approx({"prose": ratio / (ratio + 1), "code": 1 / (ratio + 1)})


def test_velocitune_goes_on_from_its_state() -> None:
    one = velocitune()
    one.weights(history(held_out={"prose": 3.0, "code-held-out": 6.0}))
    again, seen = velocitune(state=one.state()), history(held_out={"prose": 2.5, "code-held-out": 3.0})
    assert again.weights(seen) == one.weights(seen)


def test_velocitune_by_training_losses_remembers_a_source_without_tokens() -> None:
    one = velocitune("training")
    with pytest.raises(KeepWeightsError, match="no source has a loss yet"):
        one.weights(history())
    one.weights(history(training={"prose": 3.0, "code": 6.0}))
    one.weights(history(training={"prose": 2.0}))
    assert one.velocities() == {"prose": 0.5, "code": 1.0}


def test_a_source_that_begins_at_its_target_has_no_velocity() -> None:
    one = velocitune()
    one.weights(history(held_out={"prose": 1.0, "code-held-out": 6.0}))
    assert one.velocities() == {"prose": 0.0, "code": 1.0}


GRAPH = {"prose": {"prose": 0.3, "code": 0.1}, "code": {"code": 0.2}}


def skillit(**changes: float) -> SkillIt:
    settings = {"eta": 2.0, "eta_decay": 0.5, "window": 2, **changes}
    return SkillIt(GRAPH, SETS, **settings)  # type: ignore[arg-type]


def test_skill_it_sums_edge_times_loss_over_the_window() -> None:
    one = skillit()
    first = one.weights(history(held_out={"prose": 3.0, "code-held-out": 4.0}))
    ratio = math.exp(2.0 * ((0.3 * 3.0 + 0.1 * 4.0) - 0.2 * 4.0))
    assert first == pytest.approx({"prose": ratio / (1 + ratio), "code": 1 / (1 + ratio)})
    second = one.weights(history(held_out={"prose": 1.0, "code-held-out": 4.0}))
    ratio = math.exp(1.0 * (0.3 * (3.0 + 1.0) + 0.1 * 8.0 - 0.2 * 8.0))
    assert second == pytest.approx({"prose": ratio / (1 + ratio), "code": 1 / (1 + ratio)})


def test_skill_it_forgets_what_is_out_of_the_window() -> None:
    short, seen = skillit(window=1, eta_decay=1.0), history(held_out={"prose": 1.0, "code-held-out": 2.0})
    short.weights(history(held_out={"prose": 9.0, "code-held-out": 9.0}))
    assert short.weights(seen) == skillit(eta_decay=1.0).weights(seen)


def test_skill_it_with_huge_exponents_still_sums_to_one() -> None:
    found = skillit(eta=1e6).weights(history(held_out={"prose": 9.0, "code-held-out": 1.0}))
    assert found == {"prose": 1.0, "code": 0.0}


def test_replay_rises_with_the_general_loss_and_is_relaxed_again() -> None:
    one = RaiseReplay(["general"], ["replay"], tolerance=0.1, factor=2.0, limit=0.3)
    weights: dict[str, float] = {"replay": 0.1, "new": 0.6, "more": 0.3}
    shares = []
    for loss in (2.0, 2.1, 2.2, 2.2, 2.2, 2.05, 2.0, 2.0):
        weights = one.weights(history(weights, held_out={"general": loss}))
        assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert weights["new"] == pytest.approx(2 * weights["more"])
        shares.append(weights["replay"])
    assert shares == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.3, 0.15, 0.1, 0.1])


def test_replay_above_the_limit_is_left_there() -> None:
    one = RaiseReplay(["general"], ["replay"], tolerance=0.1, factor=2.0, limit=0.3)
    weights = {"replay": 0.6, "new": 0.4}
    one.weights(history(weights, held_out={"general": 2.0}))
    assert one.weights(history(weights, held_out={"general": 3.0})) == weights


def test_replay_takes_nothing_from_sources_that_are_left_alone() -> None:
    one = RaiseReplay(["general"], ["replay"], tolerance=0.1, factor=2.0, limit=0.3, alone=["fixed"])
    weights = {"replay": 0.08, "new": 0.72, "fixed": 0.2}
    one.weights(history(weights, held_out={"general": 2.0}))
    found = one.weights(history(weights, held_out={"general": 3.0}))
    assert found == pytest.approx({"replay": 0.16, "new": 0.64, "fixed": 0.2}), "a fifth of the rest"


def test_replay_waits_for_every_watched_set() -> None:
    one = RaiseReplay(["general", "other"], ["replay"], tolerance=0.1, factor=2.0, limit=0.3)
    with pytest.raises(KeepWeightsError, match="general, other"):
        one.weights(history({"replay": 0.1, "new": 0.9}, held_out={"general": 2.0}))


def test_frozen_sources_keep_their_weight_and_the_others_share_the_rest() -> None:
    held = {"a": 0.5, "b": 0.3, "c": 0.2}
    found = with_frozen({"a": 0.2, "b": 0.2, "c": 0.6}, held, ["a"])
    assert found == pytest.approx({"a": 0.5, "b": 0.125, "c": 0.375})
    assert with_frozen({"a": 1.0, "b": 0.0, "c": 0.0}, held, ["a"]) == held


def test_smoothing_keeps_a_source_from_vanishing() -> None:
    assert smoothed({"a": 0.5, "b": 0.5, "c": 0.0}, 0.1, ["b", "c"]) == pytest.approx(
        {"a": 0.5, "b": 0.475, "c": 0.025}
    )


def test_what_has_no_exponent_moves_with_the_others() -> None:
    found = exponentiated({"a": 0.5, "b": 0.5}, {"a": 3.0})
    assert found == pytest.approx({"a": 0.5, "b": 0.5})


def test_weights_come_out_in_order_and_sum_to_one() -> None:
    assert list(checked({"code": 3, "prose": 1}, ["prose", "code"]).items()) == [
        ("prose", 0.25),
        ("code", 0.75),
    ]
    assert checked({"a": 1e308, "b": 1e308}, ["a", "b"]) == {"a": 0.5, "b": 0.5}


def test_weights_that_sum_to_one_keep_every_bit() -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.7000000000000001}
    assert checked(weights, ["a", "b", "c"]) == weights


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (None, "expected a weight for each source, found None"),
        ({"prose": 1.0}, "the weight of 'code' is nothing"),
        ({"prose": 1.0, "code": -1.0}, "the weight of 'code' is -1.0"),
        ({"prose": 1.0, "code": math.nan}, "the weight of 'code' is nan"),
        ({"prose": 1.0, "code": math.inf}, "the weight of 'code' is inf"),
        ({"prose": 1.0, "code": True}, "the weight of 'code' is True"),
        ({"prose": 1.0, "code": "much"}, "the weight of 'code' is 'much'"),
        ({"prose": 1.0, "code": 1.0, "web": 1.0}, "no source is called 'web'"),
        ({"prose": 0.0, "code": 0.0}, "all weights are 0"),
    ],
)
def test_nonsense_is_refused(weights: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked(weights, ["prose", "code"])
