"""What a start keeps and what it begins anew, field by field, and why: the policy with its exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trainer.stages.start_config import FIELDS, StartConfig

POLICIES: Final[Mapping[str, Mapping[str, str]]] = {
    "continue": dict.fromkeys(FIELDS, "keep"),
    "rewarm": dict.fromkeys(FIELDS, "keep") | {"schedule": "anchor"},
    "weights": dict.fromkeys(FIELDS, "reset"),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Decision:
    """One field.

    Attributes:
        verdict: "keep", "reset" or "anchor".
        reason: in words: the policy, the run file, or what the checkpoint lacks.
    """

    verdict: str
    reason: str


@dataclass(frozen=True)
class Held:
    """What there is to keep in a checkpoint.

    Attributes:
        format: as `checkpoint.opening.Opened` names it.
        moments: whether it has Adam's.
        schedule, data: whether its state has those of ours.
        weights_format: whether it is of a format that never holds more than weights.
    """

    format: str
    moments: bool
    schedule: bool
    data: bool
    weights_format: bool

    @classmethod
    def of(
        cls, format: str, states: frozenset[str], state: Mapping[str, Any], *, weights_format: bool
    ) -> Held:
        """From an opened checkpoint's format, the states of its tensors, and its manifest's state."""
        has_moments = states.issuperset(MOMENTS)
        return cls(format, has_moments, "schedule" in state, bool(state.get("data")), weights_format)


def decide(start: StartConfig, held: Held) -> dict[str, Decision]:
    """A decision for each of FIELDS.

    Raises:
        ValueError: a field that is to be kept is not there, or one is kept without what it belongs to; all
            of them at once.
    """
    policy = start.policy or ("weights" if held.weights_format else "continue")
    origin = f"policy {policy}" if start.policy else f"policy {policy}, the default for {held.format}"
    decisions = {field: Decision(verdict, origin) for field, verdict in POLICIES[policy].items()}
    for field in FIELDS:
        if (said := getattr(start, field)) is not None:
            decisions[field] = Decision(said, f"start.{field} = {said}")
    problems = _problems(decisions, held)
    if problems:
        raise ValueError("\n".join(problems))
    return _without_foreign(decisions, held)


def _problems(decisions: Mapping[str, Decision], held: Held) -> list[str]:
    problems = []
    if decisions["moments"].verdict == "keep" and not held.moments:
        problems.append(
            f"start.moments is keep ({decisions['moments'].reason}), and the checkpoint ({held.format}) has "
            'no moments: set start.moments = "reset" to keep the weights and begin Adam anew, or '
            'start.policy = "weights"'
        )
    if decisions["schedule"].verdict == "keep" and decisions["step"].verdict == "reset":
        problems.append(
            "start.schedule is keep and start.step is reset: a schedule is a function of the step; keep "
            'both, or set start.schedule = "anchor" or "reset"'
        )
    if decisions["data"].verdict == "keep" and decisions["step"].verdict == "reset":
        problems.append(
            "start.data is keep and start.step is reset: the position of the data counts steps; keep both, "
            'or set start.data = "reset"'
        )
    return problems


def _without_foreign(decisions: dict[str, Decision], held: Held) -> dict[str, Decision]:
    """Another trainer's checkpoint has no schedule, no data position and no random streams of ours."""
    if decisions["schedule"].verdict == "keep" and not held.schedule:
        reason = f"the checkpoint ({held.format}) has none of ours: it counts from step 0"
        decisions["schedule"] = Decision("keep", reason)
    for field in ("data", "random"):
        if decisions[field].verdict == "keep" and not held.data:
            decisions[field] = Decision("reset", f"the checkpoint ({held.format}) has none of ours")
    return decisions


def keep_all(reason: str) -> dict[str, Decision]:
    """A run that goes on from itself."""
    return dict.fromkeys(FIELDS, Decision("keep", reason))
