"""How the sources' shares change during a stage, as far as its run file says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from launch.plot_curves import StageCurve
from trainer.config import RunConfig
from trainer.controllers.opening import left_alone, open_controller
from trainer.controllers.protocol import History, KeepWeightsError
from trainer.controllers.shares import checked, with_frozen
from trainer.controllers.timetable import Timetable

MOST_CHANGES = 60
"""Of a stage: more are thinned out evenly."""
NAMED_CHANGES = 6


def with_changes(curve: StageCurve, config: RunConfig) -> StageCurve:
    """The curve with the changes that a timetable makes; of another controller a note that it makes some.

    Raises:
        ValueError: the points or the log of the controller are wrong.
    """
    kind = config.controller.kind
    if kind is None:
        return curve
    steps = range(curve.first_step, curve.first_step + curve.steps)
    controller = None
    if kind in ("schedule", "replay_log"):
        controller = open_controller(
            config.controller, config.data, first_step=steps.start, last_step=steps.stop
        )
    if not isinstance(controller, Timetable):
        note = f"controller {kind} changes the shares as it runs; drawn are those it begins with"
        return replace(curve, note=note)
    changes = list(_changes(controller, config, curve.shares, steps))
    begins = [shares for step, shares in changes if step == steps.start]
    changes = [change for change in changes if change[0] > steps.start]
    return replace(
        curve,
        shares=begins[0] if begins else curve.shares,
        changes=tuple(changes[:: -(-len(changes) // MOST_CHANGES) or 1]),
        note=_note(kind, [step for step, _ in changes]),
    )


def _changes(
    controller: Timetable, config: RunConfig, shares: Mapping[str, float], steps: range
) -> Iterator[tuple[int, Mapping[str, float]]]:
    """(step, shares from it on) wherever they become others, as the run will set them."""
    settings, sources = config.controller, [source.name for source in config.data.sources]
    alone = () if settings.kind == "replay_log" else left_alone(settings, config.data)
    for step in steps:
        regular = settings.every is not None and step % settings.every == 0
        if not (step == steps.start or regular or controller.begins_at(step)):
            continue
        try:
            asked = controller.weights(History(step, steps.start, steps.stop, shares))
        except KeepWeightsError:
            continue
        found = with_frozen(checked(asked, sources), shares, alone)
        if found != shares:
            shares = found
            yield step, shares


def _note(kind: str, steps: list[int]) -> str:
    if not steps:
        return ""
    named = ", ".join(f"{step:,}" for step in steps[:NAMED_CHANGES])
    more = f" and {len(steps) - NAMED_CHANGES:,} more" if len(steps) > NAMED_CHANGES else ""
    return f"controller {kind} changes the shares at {'step' if len(steps) == 1 else 'steps'} {named}{more}"
