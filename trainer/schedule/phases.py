"""Which part of its schedule a step is in: whether other data can go on from its checkpoint.

From a "stable" checkpoint the next stage goes on without warming up again. An "annealed" one is finished: its
moments and weights have settled at a small learning rate, and further data go on better from the stable
checkpoint before it (Ibrahim et al. 2024, arXiv 2403.08763; Hu et al. 2024, arXiv 2404.06395).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from trainer.schedule.curves import Terms

Phase = Literal["warmup", "cooldown", "stable", "decay", "annealed"]


def stable(terms: Terms, elapsed: int) -> Phase:
    """A constant learning rate, for ever."""
    return "stable"


def decay(terms: Terms, elapsed: int) -> Phase:
    """A learning rate that never rests."""
    return "decay"


def annealed(terms: Terms, elapsed: int) -> Phase:
    """An anneal from beginning to end."""
    return "annealed"


def stable_then_annealed(terms: Terms, elapsed: int) -> Phase:
    """A plateau until the last decay begins."""
    return "annealed" if terms.final_progress(elapsed) > 0 else "stable"


def infinite(terms: Terms, elapsed: int) -> Phase:
    """Cooldown, plateau, anneal."""
    cooling = elapsed < terms.warmup + terms.config.cooldown_steps
    return "cooldown" if cooling else stable_then_annealed(terms, elapsed)


# Each takes (terms, steps since the anchor) after the warm-up.
PHASES: dict[str, Callable[[Terms, int], Phase]] = {
    "constant": stable,
    "linear": decay,
    "cosine": decay,
    "inverse_sqrt": decay,
    "wsd": stable_then_annealed,
    "infinite": infinite,
    "anneal": annealed,
    "cyclic": decay,
}
