"""A new schedule from here: weights and moments are kept, the learning rate warms up and decays again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from checkpoint.folder import read_manifest
from parallel.layout import Layout
from tests.proof.gather import different, whole_tensors
from tests.proof.runs import (
    Resumed,
    checkpoint,
    cut_short,
    look_and_run,
    read_checkpoint,
    run,
    run_config,
    write_corpora,
)
from tests.ranks import run_ranks
from trainer.config import RunConfig

PEAK, FLOOR, BEGIN, END = 2e-3, 1e-4, 4, 10
WARM_UP = 2
NEW: dict[str, Any] = {
    "optimizer__lr": PEAK,
    "optimizer__min_lr": FLOOR,
    "start__policy": "rewarm",
    "schedule__kind": "cosine",
    "schedule__warmup_steps": WARM_UP,
    "schedule__steps": None,
    "train__steps": END,
    "checkpoint__every": 2,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps under an old schedule that ends after twelve; checkpoints every two."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    config = run_config(folder, Layout(tensor=2), run__name="first", checkpoint__every=2)
    run_ranks(run, 2, config)
    return config


def second(first: RunConfig, name: str, **changes: Any) -> RunConfig:
    """Another run that starts from the first one's checkpoint of step 4."""
    load = {"checkpoint__load": checkpoint(first, BEGIN)}
    return run_config(first.run.folder.parent, Layout(), run__name=name, **(NEW | load | changes))


def rates(resumed: Resumed) -> dict[int, float]:
    """Learning rate of each update, by steps done before it."""
    return {record.step - 1: record.lr for record in resumed.records.steps}


def expected(begin: float) -> dict[int, float]:
    """Warm-up in a straight line from `begin`, then half a cosine down to the floor at the last step."""
    warm = {BEGIN + i: begin + (PEAK - begin) * i / WARM_UP for i in range(WARM_UP)}
    decay = END - BEGIN - 1 - WARM_UP
    half = {
        BEGIN + WARM_UP + i: FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * i / decay)) / 2
        for i in range(decay + 1)
    }
    return warm | half


def last_rate(first: RunConfig) -> float:
    """Of the first run's update before step 4: warm-up 2, cosine over 12 steps from 1e-3 to 0."""
    return 1e-3 * (1 + math.cos(math.pi * (BEGIN - 1 - 2) / (12 - 1 - 2))) / 2


@pytest.mark.parametrize("origin", ["current", "zero", "min_lr"])
def test_the_rate_warms_up_again_from_where_it_should(first: RunConfig, origin: str) -> None:
    begin = {"current": last_rate(first), "zero": 0.0, "min_lr": FLOOR}[origin]
    resumed = run_ranks(look_and_run, 1, second(first, origin, start__rewarm_from=origin))[0]
    assert resumed.anchor == (BEGIN, pytest.approx(begin))
    assert rates(resumed) == pytest.approx(expected(begin))
    assert "the schedule starts anew" in " ".join(resumed.notes)


def test_weights_moments_and_counts_are_kept(first: RunConfig) -> None:
    resumed = run_ranks(look_and_run, 1, second(first, "kept"))[0]
    assert not different(whole_tensors([resumed.slices]), read_checkpoint(checkpoint(first, BEGIN)))
    assert (resumed.step, resumed.updates) == (BEGIN, BEGIN)


def test_its_own_resume_keeps_the_anchor(first: RunConfig) -> None:
    """Stopped after steps 6 and 8 and resumed, it is the run that was never stopped, bit for bit."""
    whole = second(first, "whole")
    never_stopped = run_ranks(look_and_run, 1, whole)[0]
    for stop in (6, 8):
        again = second(first, f"again-{stop}")
        cut_short(whole, again, stop)
        resumed = run_ranks(look_and_run, 1, again)[0]
        assert resumed.step == stop
        assert resumed.anchor == never_stopped.anchor
        assert resumed.records.losses == {
            step: loss for step, loss in never_stopped.records.losses.items() if step > stop
        }
        assert rates(resumed) == {step: lr for step, lr in rates(never_stopped).items() if step >= stop}
        assert not different(read_checkpoint(checkpoint(again, END)), read_checkpoint(checkpoint(whole, END)))
        assert "the schedule starts anew" not in " ".join(resumed.notes)


def test_without_a_new_anchor_the_old_schedule_goes_on(first: RunConfig) -> None:
    """The same form under the policy "continue": the learning rates of the run that never stopped."""
    uninterrupted = run_config(first.run.folder.parent, Layout(), run__name="uninterrupted")
    goes_on = run_config(
        first.run.folder.parent,
        Layout(),
        run__name="goes-on",
        checkpoint__load=checkpoint(first, BEGIN),
    )
    resumed = run_ranks(look_and_run, 1, goes_on)[0]
    assert resumed.anchor == (0, 0.0)
    records = run_ranks(run, 1, uninterrupted)[0]
    assert rates(resumed) == {r.step - 1: r.lr for r in records.steps if r.step > BEGIN}


def test_a_third_run_can_anchor_again(first: RunConfig) -> None:
    """The harvest after the next: from the second run's end, a new anchor and a longer lineage."""
    whole = second(first, "before-the-third")
    run_ranks(run, 1, whole)
    third = second(first, "third", checkpoint__load=whole.run.folder, train__steps=END + 4)
    resumed = run_ranks(look_and_run, 1, third)[0]
    assert resumed.step == END
    assert resumed.anchor == (END, pytest.approx(FLOOR))
    assert max(rates(resumed).values()) == PEAK
    _, manifest = read_manifest(third.run.folder)
    origins = [(origin["run"], origin["step"]) for origin in manifest.state["lineage"]]
    assert origins == [("first", BEGIN), ("before-the-third", END)]
