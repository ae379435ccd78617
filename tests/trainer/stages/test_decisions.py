"""What a start keeps: policies, exceptions from them, and what cannot be kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.schedule import Anchor, Schedule, ScheduleConfig
from trainer.stages.anchoring import anchor_of
from trainer.stages.decisions import Held, decide, keep_all
from trainer.stages.start_config import FIELDS, StartConfig

OURS = Held("Ratoon", moments=True, schedule=True, data=True, weights_format=False)
WEIGHTS = Held("Hugging Face safetensors", moments=False, schedule=False, data=False, weights_format=True)
FOREIGN = replace(OURS, format="Megatron torch", schedule=False, data=False)
STATE = {"schedule": {"anchor": {"step": 3, "lr": 1e-5}}, "scalars": {"lr": 2e-4}}


def verdicts(held: Held = OURS, **said: Any) -> dict[str, str]:
    return {field: one.verdict for field, one in decide(StartConfig(**said), held).items()}


def test_everything_goes_on_by_default() -> None:
    assert verdicts() == dict.fromkeys(FIELDS, "keep")


def test_rewarm_begins_the_schedule_anew_and_nothing_else() -> None:
    assert verdicts(policy="rewarm") == dict.fromkeys(FIELDS, "keep") | {"schedule": "anchor"}


def test_weights_keeps_nothing_else() -> None:
    assert verdicts(policy="weights") == dict.fromkeys(FIELDS, "reset")


def test_a_format_of_weights_needs_no_policy() -> None:
    assert verdicts(WEIGHTS) == dict.fromkeys(FIELDS, "reset")


def test_a_field_wins_over_the_policy_and_says_so() -> None:
    decisions = decide(StartConfig(policy="rewarm", moments="reset"), OURS)
    assert decisions["moments"].verdict == "reset"
    assert decisions["moments"].reason == "start.moments = reset"
    assert decisions["schedule"].reason == "policy rewarm"


def test_moments_are_never_lost_in_silence() -> None:
    bare = replace(OURS, moments=False)
    with pytest.raises(ValueError, match=r"no\s+moments: set start.moments = .reset."):
        decide(StartConfig(policy="rewarm"), bare)
    assert verdicts(bare, policy="rewarm", moments="reset")["moments"] == "reset"


def test_all_contradictions_are_named() -> None:
    with pytest.raises(ValueError, match=r"(?s)start\.schedule is keep.*start\.data is keep"):
        decide(StartConfig(step="reset"), OURS)


def test_another_trainers_data_position_begins_anew() -> None:
    decisions = decide(StartConfig(), FOREIGN)
    assert decisions["data"].verdict == decisions["random"].verdict == "reset"
    assert "has none of ours" in decisions["data"].reason
    assert decisions["schedule"].verdict == "keep"
    assert "counts from step 0" in decisions["schedule"].reason


def plan(**fields: Any) -> Schedule:
    return Schedule(ScheduleConfig(kind="constant", warmup_steps=10, **fields), 1e-3, 1e-5, 100)


def anchor(state: dict[str, Any] | None = None, **said: Any) -> Anchor:
    start, found = StartConfig(**said), STATE if state is None else state
    return anchor_of(start, plan(warmup_init_lr=1e-7), decide(start, OURS), step=50, state=found)


def test_a_kept_schedule_keeps_the_checkpoints_anchor() -> None:
    assert anchor() == Anchor(3, 1e-5)
    assert anchor({}) == Anchor(0, 1e-7)


@pytest.mark.parametrize(("origin", "lr"), [("current", 2e-4), ("zero", 0.0), ("min_lr", 1e-5)])
def test_where_the_new_warmup_starts(origin: Any, lr: float) -> None:
    found = anchor(policy="rewarm", rewarm_from=origin)
    assert found == Anchor(50, lr)
    assert plan().lr(50, found) == lr


def test_a_reset_schedule_begins_like_a_new_runs() -> None:
    assert anchor(schedule="reset") == Anchor(50, 1e-7)


def test_a_run_that_goes_on_from_itself_keeps_all() -> None:
    assert {one.verdict for one in keep_all("itself").values()} == {"keep"}


def test_an_anneal_goes_down_from_the_checkpoints_rate() -> None:
    start = StartConfig(policy="rewarm", rewarm_from="zero")
    anneal = Schedule(ScheduleConfig(kind="anneal"), 1e-3, 1e-5, 100)
    assert anchor_of(start, anneal, decide(start, OURS), step=50, state=STATE) == Anchor(50, 2e-4)
