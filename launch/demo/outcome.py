"""What the demo's runs have come to, read from the metrics they left, and whether that is as it should be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.demo.plan import Plan

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
class Outcome:
    """Losses in nats a token on the held-out documents, by name, at every turn.

    Attributes:
        unigram: of knowing how frequent each token is, and nothing else.
        untrained, learned: before and after the first stage.
        resumed, finished: before and after the second stage; `resumed` is of the same weights as `learned`,
            on another layout.
    """

    unigram: Mapping[str, float]
    untrained: Mapping[str, float]
    learned: Mapping[str, float]
    resumed: Mapping[str, float]
    finished: Mapping[str, float]

    @property
    def largest_difference(self) -> float:
        """Between `learned` and `resumed`, relative; NaN where one of them is."""
        differences = [abs(self.resumed[name] / loss - 1) for name, loss in self.learned.items()]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def read_outcome(plan: Plan, unigram: Mapping[str, float]) -> Outcome:
    """Collect the evaluations of both runs."""
    first, second = (evaluations(folder) for folder in plan.run_folders)
    middle, end = plan.last_steps
    return Outcome(unigram, first[0], first[middle], second[middle], second[end])


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """Held-out losses by step, of the run in `folder`, wherever whole sets were read."""
    return {
        line["step"]: {name: float(loss) for name, loss in line["losses"].items()}
        for line in _lines(folder, "evaluation")
        if not line.get("dense")
    }


def curve(folder: Path) -> list[tuple[float, float]]:
    """Learning rate and training loss on prose of every recorded step."""
    return [(line["lr"], float(line["source_losses"]["prose"])) for line in _lines(folder, "step")]


def _lines(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == kind:
            yield record


def checks(plan: Plan, outcome: Outcome, *, full: bool) -> list[Check]:
    """What must be true at the end.

    Args:
        full: the runs were long enough to fall well below the unigram loss, not only to learn something.
    """
    prose, code = outcome.learned["prose"], outcome.finished["code"]
    bar = WELL_BELOW * outcome.unigram["prose"] if full else outcome.untrained["prose"]
    meaning = f"{WELL_BELOW:.0%} of what frequencies alone give" if full else "what the untrained model has"
    return [
        _same_curve(plan, outcome),
        Check(prose < bar, f"stage 1 learned prose: {prose:.3f}, to be below {bar:.3f}, {meaning}"),
        Check(
            code < outcome.resumed["code"],
            f"stage 2 learned code: {outcome.resumed['code']:.3f} -> {code:.3f}",
        ),
    ]


def _same_curve(plan: Plan, outcome: Outcome) -> Check:
    found, allowed = outcome.largest_difference, SAME_LOSS[plan.precision]
    return Check(
        found <= allowed,
        f"the curve goes on where it stopped: losses under {plan.layout_name(0)} and, loaded, under "
        f"{plan.layout_name(1)} differ by {found:.1e} relative, allowed is {allowed:g}",
    )
