"""What each kind of schedule does after the warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.schedule.config import ScheduleConfig
from trainer.schedule.decays import decay_cosine, decay_inverse_sqrt, decay_linear, interpolate


@dataclass(frozen=True)
class Terms:
    """All that a curve depends on, besides the steps since its anchor.

    Attributes:
        peak: highest learning rate of the stage.
        floor: optimizer.min_lr.
        start: learning rate of the anchor.
        length: steps of the schedule, from its anchor.
    """

    config: ScheduleConfig
    peak: float
    floor: float
    start: float
    length: int

    @property
    def warmup(self) -> int:
        """Steps until the peak."""
        return self.config.warmup_steps

    @property
    def constant(self) -> float:
        """The learning rate that an infinite schedule keeps."""
        return self.peak if self.config.constant_lr is None else self.config.constant_lr

    @property
    def decay_steps(self) -> int:
        """Steps of the decay that a schedule ends in, where it has one of its own; 0 where it has none."""
        if self.config.kind == "wsd":
            return self.config.decay_steps or max(1, self.length // 10)
        return (self.config.anneal_steps or 0) if self.config.kind == "infinite" else 0

    def final_progress(self, elapsed: int) -> float:
        """0 until that last decay begins, 1 at the schedule's last step and after it."""
        if not self.decay_steps:
            return 0.0
        return max(0.0, progress(elapsed, self.length - 1 - self.decay_steps, self.length - 1))


def progress(elapsed: int, first: int, last: int) -> float:
    """0 at `first`, 1 at `last` and after it."""
    return min(1.0, (elapsed - first) / (last - first)) if last > first else 0.0


def constant(terms: Terms, elapsed: int) -> float:
    """The peak, for ever."""
    return terms.peak


def linear(terms: Terms, elapsed: int) -> float:
    """From the peak at the end of the warm-up straight to the floor at the last step."""
    left = decay_linear(progress(elapsed, terms.warmup, terms.length - 1))
    return terms.floor + (terms.peak - terms.floor) * left


def cosine(terms: Terms, elapsed: int) -> float:
    """From the peak at the end of the warm-up along half a cosine to the floor at the last step."""
    left = decay_cosine(progress(elapsed, terms.warmup, terms.length - 1))
    return terms.floor + (terms.peak - terms.floor) * left


def inverse_sqrt(terms: Terms, elapsed: int) -> float:
    """peak x sqrt(warmup / t), never below the floor (Vaswani et al. 2017, arXiv 1706.03762, section 5.3).

    It knows no last step. Without a warm-up, 1 stands for its length.
    """
    warmup = max(1, terms.warmup)
    return max(terms.floor, terms.peak * math.sqrt(warmup / max(elapsed, warmup)))


def wsd(terms: Terms, elapsed: int) -> float:
    """Stable at the peak, decay over the last decay_steps (Hu et al. 2024, arXiv 2404.06395, section 4)."""
    done = terms.final_progress(elapsed)
    if done <= 0:
        return terms.peak
    return interpolate(terms.peak, terms.floor, style=terms.config.decay_style, progress=done)


def infinite(terms: Terms, elapsed: int) -> float:
    """Cooldown to constant_lr, constant, and where asked for an exponential anneal over the last steps.

    Ibrahim et al. 2024, arXiv 2403.08763; Singh et al. 2025, arXiv 2503.02844. Without an anneal it does not
    depend on the schedule's length.
    """
    config, done = terms.config, terms.final_progress(elapsed)
    if done > 0:
        return interpolate(terms.constant, terms.floor, style="exponential", progress=done)
    cooled = terms.warmup + config.cooldown_steps
    if elapsed >= cooled:
        return terms.constant
    part = progress(elapsed, terms.warmup, cooled)
    cosine_cooldown = config.cooldown_style == "cosine"
    left = decay_cosine(part) if cosine_cooldown else decay_inverse_sqrt(part, config.cooldown_steepness)
    return terms.constant + (terms.peak - terms.constant) * left


def anneal(terms: Terms, elapsed: int) -> float:
    """From the anchor's learning rate at the first step to the floor at the last."""
    done = progress(elapsed, 0, terms.length - 1)
    return interpolate(terms.start, terms.floor, style=terms.config.decay_style, progress=done)


def cyclic(terms: Terms, elapsed: int) -> float:
    """Half a cosine from peak to floor, again and again (Loshchilov and Hutter 2017, arXiv 1608.03983).

    A cycle begins at its peak and has the floor at its last step; the next one is period_growth times as long
    and peak_decay times as high.
    """
    cycle, position, period = cycle_at(terms.config, elapsed - terms.warmup)
    height = (terms.peak - terms.floor) * terms.config.peak_decay**cycle
    return terms.floor + height * decay_cosine(progress(position, 0, period - 1))


def cycle_at(config: ScheduleConfig, elapsed: int) -> tuple[int, int, int]:
    """(number of the cycle, step inside it, its length), `elapsed` steps after the first cycle began."""
    assert config.period is not None, "problems() refuses a cyclic schedule without a period"
    if config.period_growth == 1:
        return elapsed // config.period, elapsed % config.period, config.period
    cycle, length = 0, config.period
    while elapsed >= length:
        elapsed -= length
        cycle += 1
        length = round(config.period * config.period_growth**cycle)
    return cycle, elapsed, length


# Each takes (terms, steps since the anchor) after the warm-up. A new kind is an entry here and one in PHASES.
CURVES: dict[str, Callable[[Terms, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
    "infinite": infinite,
    "anneal": anneal,
    "cyclic": cyclic,
}
