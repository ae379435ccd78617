"""The `[schedule]` section: the learning rate as a pure function of the step and of an anchor.

Steps count from 0, and the update of step s uses the learning rate of s. A schedule runs from its anchor: the
first step it governs, and the learning rate its warm-up starts from. A new run is anchored at step 0. A run
that goes on from a checkpoint keeps the anchor it finds there, or drops a new one and so warms up and decays
again with weights and moments kept (Ibrahim et al. 2024, arXiv 2403.08763, section 3.1). The anchor is the
only state, and lies in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from parallel.settings import Settings

Kind = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
DecayStyle = Literal["linear", "cosine", "exponential", "1-sqrt"]


class ScheduleConfig(Settings):
    """`[schedule]`: the shape of the learning rate between `optimizer.lr` and `optimizer.min_lr`.

    Attributes:
        warmup_steps: steps after the anchor until lr is reached.
        warmup_init_lr: where the warm-up of a new run starts.
        steps: length, counted from the anchor; by default to the end of the run. min_lr is reached at the
            last of them and kept.
        decay_steps: of "wsd" only: length of the final decay; a tenth of the schedule by default.
        decay_style: of "wsd" only: form of the final decay.
        anchor: what a run does that starts from another run's checkpoint. "start" keeps its anchor, "resume"
            anchors this schedule at the first new step.
        rewarm_from: of anchor "resume" only: where the new warm-up starts: at the checkpoint's learning rate,
            at 0, or at min_lr.
    """

    kind: Kind = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_init_lr: NonNegativeFloat = 0.0
    steps: PositiveInt | None = None
    decay_steps: PositiveInt | None = None
    decay_style: DecayStyle = "1-sqrt"
    anchor: Literal["start", "resume"] = "start"
    rewarm_from: Literal["current", "zero", "min_lr"] = "current"


@dataclass(frozen=True)
class Anchor:
    """Where a schedule begins: its first step, and the learning rate its warm-up starts from."""

    step: int = 0
    lr: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Anchor:
        """Read back what `to_json` wrote."""
        return cls(step=int(value["step"]), lr=float(value["lr"]))


def decay_linear(progress: float) -> float:
    """1 - p."""
    return 1 - progress


def decay_cosine(progress: float) -> float:
    """(1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def decay_one_minus_sqrt(progress: float) -> float:
    """1 - sqrt(p) (Hägele et al. 2024, arXiv 2405.18392, section 3.2)."""
    return 1 - math.sqrt(progress)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": decay_linear,
    "cosine": decay_cosine,
    "1-sqrt": decay_one_minus_sqrt,
}


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
        elapsed = step - anchor.step
        warmup = self.config.warmup_steps
        if elapsed < warmup:
            return anchor.lr + (self.peak - anchor.lr) * elapsed / warmup
        return CURVES[self.config.kind](self, elapsed, self.length(anchor))

    def length(self, anchor: Anchor) -> int:
        """Steps of the schedule, from its anchor."""
        return self.config.steps or max(1, self.train_steps - anchor.step)

    def decay_length(self, length: int) -> int:
        """Steps of a WSD schedule's final decay, out of `length`."""
        return self.config.decay_steps or max(1, length // 10)

    def begin(self) -> Anchor:
        """The anchor of a new run."""
        return Anchor(0, self.config.warmup_init_lr)

    def resume(self, saved: Anchor, *, step: int, lr: float, same_run: bool) -> Anchor:
        """The anchor of a run that goes on from a checkpoint.

        Args:
            saved: the checkpoint's anchor.
            step: the next step.
            lr: learning rate of the checkpoint's last update.
            same_run: the checkpoint is this run's own, so whatever it decided stays.
        """
        if same_run or self.config.anchor == "start":
            return saved
        start = {"current": lr, "zero": 0.0, "min_lr": self.floor}[self.config.rewarm_from]
        return Anchor(step, start)

    def problems(self, anchor: Anchor | None = None) -> list[str]:
        """Every contradiction under `anchor`, one sentence each with the remedy."""
        config, anchor = self.config, anchor or Anchor()
        length, found = self.length(anchor), []
        if config.warmup_steps >= length:
            found.append(
                f"schedule.warmup_steps is {config.warmup_steps} and the schedule has {length} steps from "
                f"step {anchor.step}: shorten the warm-up, or raise train.steps or schedule.steps"
            )
        if config.kind == "wsd":
            room = length - 1 - config.warmup_steps
            if self.decay_length(length) > max(room, 0) and not found:
                found.append(
                    f"schedule.decay_steps is {self.decay_length(length)} and only {room} steps follow the "
                    "warm-up: shorten the decay or the warm-up"
                )
            if config.decay_style == "exponential" and not self.floor:
                found.append(
                    "schedule.decay_style is 'exponential' and optimizer.min_lr is 0, which an exponential "
                    "never reaches: set optimizer.min_lr above 0"
                )
        elif config.decay_steps is not None:
            found.append(
                f"schedule.decay_steps is {config.decay_steps} and schedule.kind is {config.kind!r}: only "
                "'wsd' has a separate decay; remove it, or set schedule.steps for the whole length"
            )
        return found


def _between(schedule: Schedule, factor: float) -> float:
    return schedule.floor + (schedule.peak - schedule.floor) * factor


def _progress(elapsed: int, first: int, last: int) -> float:
    """0 at `first`, 1 at `last` and after it."""
    return min(1.0, (elapsed - first) / (last - first)) if last > first else 0.0


def constant(schedule: Schedule, elapsed: int, length: int) -> float:
    """The peak, for ever."""
    return schedule.peak


def linear(schedule: Schedule, elapsed: int, length: int) -> float:
    """From the peak at the end of the warm-up straight to the floor at the last step."""
    return _between(schedule, decay_linear(_progress(elapsed, schedule.config.warmup_steps, length - 1)))


def cosine(schedule: Schedule, elapsed: int, length: int) -> float:
    """From the peak at the end of the warm-up along half a cosine to the floor at the last step."""
    return _between(schedule, decay_cosine(_progress(elapsed, schedule.config.warmup_steps, length - 1)))


def inverse_sqrt(schedule: Schedule, elapsed: int, length: int) -> float:
    """peak x sqrt(warmup / t), never below the floor (Vaswani et al. 2017, arXiv 1706.03762, section 5.3).

    It knows no last step. Without a warm-up, 1 stands for its length.
    """
    warmup = max(1, schedule.config.warmup_steps)
    return max(schedule.floor, schedule.peak * math.sqrt(warmup / max(elapsed, warmup)))


def wsd(schedule: Schedule, elapsed: int, length: int) -> float:
    """Stable at the peak, decay over the last decay_steps (Hu et al. 2024, arXiv 2404.06395, section 4).

    The exponential decay is peak x (floor / peak)^p, so that it ends at the floor exactly.
    """
    config = schedule.config
    progress = _progress(elapsed, length - 1 - schedule.decay_length(length), length - 1)
    if progress <= 0:
        return schedule.peak
    if config.decay_style == "exponential":
        return schedule.peak * (schedule.floor / schedule.peak) ** progress
    return _between(schedule, DECAYS[config.decay_style](progress))


# Each takes (schedule, steps since the anchor, length) after the warm-up. A new kind is one more entry.
CURVES: dict[str, Callable[[Schedule, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}
