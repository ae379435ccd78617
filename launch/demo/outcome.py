"""What the two ways have come to, read from the metrics they left, and whether that is as it should be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.demo.plan import INFINITE, REWARM, STAGES, VOCABULARY, WAYS, Plan, Way
from trainer.forgetting.curves import METRICS, StageRecords, find_stages
from trainer.forgetting.report import Report, build_report
from trainer.metrics.json_lines import read_lines

OLD, NEW = STAGES
WELL_BELOW = 0.8
"""Of the unigram loss: what the prose loss must fall below to say that more than frequencies was learned."""

SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-3}
"""Largest relative difference of a mean loss between layouts. They add in another order: that moves the last
bits of fp32, and of every activation in bf16, whose rounding is 2^-9."""


@dataclass(frozen=True)
class Check:
    """Something the demo promises, and whether it came true."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Course:
    """How the loss on one held-out set went, in nats a token, all over the same tokens.

    Attributes:
        before: at the end of the first stage.
        curve: (steps since the second stage began, loss); first of all step 0, on the other layout.
        bits: bits per byte that one nat a token is on this set.
    """

    before: float
    curve: Sequence[tuple[int, float]]
    bits: float

    @property
    def start(self) -> float:
        """Where the second stage began."""
        return self.curve[0][1]

    @property
    def end(self) -> float:
        """Where it ended."""
        return self.curve[-1][1]

    @property
    def peak(self) -> tuple[int, float]:
        """Step and loss where it was worst; a loss that is not finite is the worst."""
        return max(self.curve, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)

    @property
    def rise(self) -> float:
        """From the start to the end: what was forgotten, where positive."""
        return self.end - self.start

    @property
    def layout_difference(self) -> float:
        """Between the same weights under both layouts, relative; NaN where a loss is."""
        return abs(self.start / self.before - 1)


Courses = Mapping[Way, Mapping[str, Course]]
"""By way, then by held-out set."""


@dataclass(frozen=True)
class Outcome:
    """Everything that is told.

    Attributes:
        unigram: loss of knowing how frequent each token is and nothing else, by held-out set.
        rates: learning rates of the recorded steps, of each way and stage.
    """

    unigram: Mapping[str, float]
    courses: Courses
    rates: Mapping[Way, Sequence[Sequence[float]]]

    @property
    def largest_difference(self) -> float:
        """Between the losses on the two layouts, of both ways and sets; NaN where there is one."""
        found = [course.layout_difference for one in self.courses.values() for course in one.values()]
        return math.nan if any(map(math.isnan, found)) else max(found)


def read_reports(plan: Plan) -> dict[Way, Report]:
    """What the runs say on forgetting."""
    return {way: build_report(way.label, find_stages(plan.run_folder(way))) for way in WAYS}


def read_outcome(reports: Mapping[Way, Report], unigram: Mapping[str, float]) -> Outcome:
    """Collect the evaluations and learning rates of both runs."""
    return Outcome(
        unigram,
        {way: {name: _course(report.stages, name) for name in STAGES} for way, report in reports.items()},
        {
            way: [learning_rates(stage.stage.folder) for stage in report.stages]
            for way, report in reports.items()
        },
    )


def second_stages(reports: Mapping[Way, Report]) -> dict[str, Report]:
    """The reports without the first stage, whose fall from nothing would press what follows flat."""
    found = {}
    for way, report in reports.items():
        second = report.stages[1]
        named = replace(second, stage=second.stage._replace(name=f"in stage {second.stage.name}"))
        found[way.label] = replace(report, stages=(named,))
    return found


def _course(stages: Sequence[StageRecords], name: str) -> Course:
    first, second = stages
    begins, curve = second.stage.first_step, second.curve(name)
    record = second.by_step[begins]
    return Course(
        before=first.by_step[begins].losses[name],
        curve=[(step - begins, loss) for step, loss in curve],
        bits=record.bits_per_byte[name] / record.losses[name],
    )


def learning_rates(folder: Path) -> list[float]:
    """Of every recorded step of a stage."""
    return [float(line["lr"]) for line in read_lines(folder / METRICS) if line["kind"] == "step"]


def checks(plan: Plan, outcome: Outcome, *, full: bool) -> list[Check]:
    """What must be true at the end.

    Args:
        full: the runs were long enough to fall well below the unigram loss, and to compare what they forget.
    """
    learned = max((one[OLD].before for one in outcome.courses.values()), key=_nan_last)
    bar = WELL_BELOW * outcome.unigram[OLD] if full else math.log(VOCABULARY)
    meaning = f"{WELL_BELOW:.0%} of what frequencies alone give" if full else "what guessing gives"
    found = [
        _same_curve(plan, outcome),
        Check(
            learned < bar,
            f"stage 1 learned {OLD} in both: {learned:.3f} at most, to be below {bar:.3f}, {meaning}",
        ),
        _learned_new(outcome),
    ]
    return [*found, *_forgotten_less(outcome)] if full else found


def _nan_last(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _same_curve(plan: Plan, outcome: Outcome) -> Check:
    found, allowed = outcome.largest_difference, SAME_LOSS[plan.precision]
    return Check(
        found <= allowed,
        f"the curves go on where they stopped: losses under {plan.layout_name(0)} and, loaded, under "
        f"{plan.layout_name(1)} differ by {found:.1e} relative, allowed is {allowed:g}",
    )


def _learned_new(outcome: Outcome) -> Check:
    courses = [one[NEW] for one in outcome.courses.values()]
    fell = " and ".join(f"{course.start:.3f} -> {course.end:.3f}" for course in courses)
    return Check(all(course.rise < 0 for course in courses), f"stage 2 learned {NEW} in both: {fell}")


def _forgotten_less(outcome: Outcome) -> list[Check]:
    """At the end and at the worst, both against the own start and in loss: the starts are not the same."""
    rewarm, infinite = outcome.courses[REWARM][OLD], outcome.courses[INFINITE][OLD]
    rises = [course.peak[1] - course.start for course in (infinite, rewarm)]
    return [
        Check(
            infinite.rise < rewarm.rise and infinite.end < rewarm.end,
            f"{OLD} was forgotten less with {INFINITE.label}: {infinite.rise:+.3f} against "
            f"{rewarm.rise:+.3f} nats, and ended lower, at {infinite.end:.3f} against {rewarm.end:.3f}",
        ),
        Check(
            rises[0] < rises[1] and infinite.peak[1] < rewarm.peak[1],
            f"its worst moment was milder: {rises[0]:+.3f} against {rises[1]:+.3f} nats, a loss of "
            f"{infinite.peak[1]:.3f} against {rewarm.peak[1]:.3f}",
        ),
    ]
