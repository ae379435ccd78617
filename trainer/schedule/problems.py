"""What contradicts itself in a `[schedule]`, found before a run."""

from __future__ import annotations

from collections.abc import Callable

from trainer.schedule.config import ScheduleConfig
from trainer.schedule.curves import Terms

KINDS: dict[str, tuple[str, ...]] = {
    "decay_steps": ("wsd",),
    "decay_style": ("wsd", "anneal"),
    "cooldown_steps": ("infinite",),
    "cooldown_style": ("infinite",),
    "cooldown_steepness": ("infinite",),
    "constant_lr": ("infinite",),
    "anneal_steps": ("infinite",),
    "period": ("cyclic",),
    "period_growth": ("cyclic",),
    "peak_decay": ("cyclic",),
}
"""Key -> the kinds of schedule that take it; every kind takes the others."""


def curve_problems(terms: Terms, first_step: int) -> list[str]:
    """Every contradiction of a schedule anchored at `first_step`, one sentence each with the remedy."""
    config, found = terms.config, _foreign_keys(terms.config)
    if config.kind != "anneal" and terms.floor > terms.peak:
        found.append(
            f"optimizer.min_lr is {terms.floor:g} and schedule.envelope leaves this stage a peak of "
            f"{terms.peak:g}: lower optimizer.min_lr, or let the envelope fall less"
        )
    if config.warmup_steps >= terms.length:
        return [
            *found,
            f"schedule.warmup_steps is {config.warmup_steps} and the schedule has {terms.length} steps from "
            f"step {first_step}: shorten the warm-up, or raise train.steps or schedule.steps",
        ]
    special = _BY_KIND.get(config.kind)
    return found + (special(terms) if special else [])


def _foreign_keys(config: ScheduleConfig) -> list[str]:
    """Keys that say something which this kind of schedule does not have."""
    found = []
    for key, kinds in KINDS.items():
        value = getattr(config, key)
        if config.kind not in kinds and value != ScheduleConfig.model_fields[key].default:
            takers = " and ".join(repr(kind) for kind in kinds)
            found.append(
                f"schedule.{key} is {value} and schedule.kind is {config.kind!r}: only {takers} "
                f"{'take' if len(kinds) > 1 else 'takes'} it; remove it, or change the kind"
            )
    return found


def _wsd(terms: Terms) -> list[str]:
    found = []
    room = terms.length - 1 - terms.warmup
    if terms.decay_steps > room:
        found.append(
            f"schedule.decay_steps is {terms.decay_steps} and only {room} steps follow the "
            "warm-up: shorten the decay or the warm-up"
        )
    return found + _endless_exponential(terms)


def _infinite(terms: Terms) -> list[str]:
    config, found = terms.config, []
    if config.cooldown_steps and config.constant_lr is None:
        found.append(
            f"schedule.cooldown_steps is {config.cooldown_steps} and schedule.constant_lr is missing: say "
            "which learning rate the cooldown ends at, or remove the cooldown"
        )
    if terms.constant > terms.peak:
        found.append(
            f"schedule.constant_lr is {terms.constant:g} and the peak is {terms.peak:g}: lower it, or raise "
            "optimizer.lr"
        )
    if terms.constant < terms.peak and not config.cooldown_steps:
        found.append(
            f"schedule.constant_lr is {terms.constant:g}, the peak is {terms.peak:g} and nothing lies "
            "between them: set schedule.cooldown_steps, or lower optimizer.lr"
        )
    if config.anneal_steps is None:
        return found
    if terms.floor > terms.constant:
        found.append(
            f"optimizer.min_lr is {terms.floor:g} and schedule.constant_lr is {terms.constant:g}, so the "
            "anneal would rise: lower optimizer.min_lr"
        )
    room = terms.length - 1 - terms.warmup - config.cooldown_steps
    if config.anneal_steps > room:
        found.append(
            f"schedule.anneal_steps is {config.anneal_steps} and only {max(0, room)} steps follow warm-up "
            "and cooldown: shorten one of them, or raise train.steps"
        )
    if not terms.floor:
        found.append(
            "schedule.anneal_steps asks for an exponential anneal and optimizer.min_lr is 0, which an "
            "exponential never reaches: set optimizer.min_lr above 0"
        )
    return found


def _anneal(terms: Terms) -> list[str]:
    found = []
    if terms.warmup:
        found.append(
            f"schedule.warmup_steps is {terms.warmup} and schedule.kind is 'anneal', which begins at the "
            "checkpoint's learning rate: remove the warm-up"
        )
    if terms.start <= 0:
        found.append(
            "schedule.kind is 'anneal' and there is no learning rate to begin at: start from a checkpoint "
            "that has one, or set schedule.warmup_init_lr"
        )
    elif terms.start <= terms.floor:
        found.append(
            f"schedule.kind is 'anneal' and begins at {terms.start:g}, where optimizer.min_lr is "
            f"{terms.floor:g} already: start from a checkpoint of a stable phase, or lower optimizer.min_lr"
        )
    return found + _endless_exponential(terms)


def _cyclic(terms: Terms) -> list[str]:
    if terms.config.period is not None:
        return []
    return [
        "schedule.kind is 'cyclic' and schedule.period is missing: say how many steps the first cycle has"
    ]


def _endless_exponential(terms: Terms) -> list[str]:
    if terms.config.decay_style != "exponential" or terms.floor:
        return []
    return [
        "schedule.decay_style is 'exponential' and optimizer.min_lr is 0, which an exponential never "
        "reaches: set optimizer.min_lr above 0"
    ]


_BY_KIND: dict[str, Callable[[Terms], list[str]]] = {
    "wsd": _wsd,
    "infinite": _infinite,
    "anneal": _anneal,
    "cyclic": _cyclic,
}
