"""The learning rate as a pure function of the step and of an anchor.

Steps count from 0, and the update of step s uses the learning rate of s. A schedule runs from its anchor: the
first step it governs, and the learning rate it starts from. A new run is anchored at step 0. A run that goes
on from a checkpoint keeps the anchor it finds there, or drops a new one and so warms up and decays again, as
`[start]` says.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from trainer.schedule.anchor import Anchor
from trainer.schedule.config import ScheduleConfig
from trainer.schedule.curves import CURVES, Terms
from trainer.schedule.envelope import envelope, envelope_problems
from trainer.schedule.phases import PHASES, Phase
from trainer.schedule.problems import curve_problems


@dataclass(frozen=True)
class Schedule:
    """A `[schedule]` with the numbers of the other sections that it needs; all methods are pure.

    Attributes:
        peak: optimizer.lr.
        floor: optimizer.min_lr.
        train_steps: train.steps, counted from the beginning of the run's first stage.
    """

    config: ScheduleConfig
    peak: float
    floor: float
    train_steps: int

    def lr(self, step: int, anchor: Anchor) -> float:
        """Learning rate of the update of `step`."""
        terms, elapsed = self.terms(anchor), step - anchor.step
        if elapsed < terms.warmup:
            return anchor.lr + (terms.peak - anchor.lr) * elapsed / terms.warmup
        return CURVES[self.config.kind](terms, elapsed)

    def phase(self, step: int, anchor: Anchor) -> Phase:
        """Part of the schedule that the update of `step` is in."""
        terms, elapsed = self.terms(anchor), step - anchor.step
        return "warmup" if elapsed < terms.warmup else PHASES[self.config.kind](terms, elapsed)

    def first_step_below(self, lr: float, anchor: Anchor) -> int | None:
        """The first step, from the peak on, whose learning rate is at or below `lr`; None if there is none.

        It may lie after train.steps where the schedule goes on for longer.
        """
        first = anchor.step + self.config.warmup_steps
        last = max(first, anchor.step + self._lowest(lr, anchor))
        if self.lr(last, anchor) > lr:
            return None
        # No curve rises between its peak and there, which makes the answer a bisection.
        return first + bisect_left(range(first, last), True, key=lambda step: self.lr(step, anchor) <= lr)

    def _lowest(self, lr: float, anchor: Anchor) -> int:
        """Steps after the anchor until the curve stops falling for the first time, or has passed `lr`."""
        config, length = self.config, self.length(anchor)
        if config.kind == "cyclic":
            return config.warmup_steps + (config.period or 1) - 1
        if config.kind == "infinite" and not config.anneal_steps:
            return config.warmup_steps + config.cooldown_steps
        if config.kind == "inverse_sqrt" and max(lr, self.floor) > 0:
            highest = self.terms(anchor).peak
            return math.ceil(max(1, config.warmup_steps) * (highest / max(lr, self.floor)) ** 2) + 1
        return length - 1

    def terms(self, anchor: Anchor) -> Terms:
        """What the curve depends on under `anchor`."""
        peak = self.peak * envelope(self.config.envelope)
        return Terms(self.config, peak, self.floor, anchor.lr, self.length(anchor))

    def length(self, anchor: Anchor) -> int:
        """Steps of the schedule, from its anchor."""
        return self.config.steps or max(1, self.train_steps - anchor.step)

    def begin(self, step: int = 0) -> Anchor:
        """The anchor of a run that begins at `step`, whatever was before it."""
        return Anchor(step, self.config.warmup_init_lr)

    def problems(self, anchor: Anchor | None = None) -> list[str]:
        """Every contradiction under `anchor`, one sentence each with the remedy."""
        anchor = anchor or self.begin()
        found = envelope_problems(self.config.envelope)
        return found or curve_problems(self.terms(anchor), anchor.step)
