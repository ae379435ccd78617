"""Metrics of runs that never ran, with curves known by heart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.metrics.json_lines import JsonLines
from trainer.metrics.sink import EvaluationRecord, Role, RunInfo

Losses = Mapping[str, Mapping[int, float]]
"""Set -> step -> loss."""


def evaluation(step: int, losses: Mapping[str, float], roles: Mapping[str, Role]) -> EvaluationRecord:
    """Over 100 tokens of two bytes each."""
    return EvaluationRecord(
        step,
        losses,
        dict.fromkeys(losses, 100),
        bits_per_byte={name: loss / 2 for name, loss in losses.items()},
        text_bytes=dict.fromkeys(losses, 200),
        sources={name: name for name in losses},
        roles=dict(roles),
    )


def write_stage(
    folder: Path,
    curves: Losses,
    roles: Mapping[str, Role],
    *,
    first_step: int,
    last_step: int,
    at: float = 0.0,
) -> tuple[str, Path, int, int]:
    """The metrics.jsonl of one stage; what `write_reports` takes."""
    sink = JsonLines(folder / "metrics.jsonl", clock=lambda: at)
    sink.start(RunInfo(folder.name, first_step, last_step, 64))
    for step in sorted({step for curve in curves.values() for step in curve}):
        losses = {name: curve[step] for name, curve in curves.items() if step in curve}
        sink.evaluation(evaluation(step, losses, roles))
    sink.event("done", step=last_step)
    sink.close()
    return (folder.name, folder, first_step, last_step)


def write_run(folder: Path, *, peak: float = 2.41) -> list[tuple[str, Path, int, int]]:
    """Prose from nothing, then code, in which prose rises to `peak` and comes back; then both with maths."""
    prose = write_stage(
        folder / "prose",
        {
            "prose": {0: 5.0, 50: 3.0, 100: 2.0},
            "code": {0: 5.5, 50: 4.5, 100: 4.0},
            "maths": {0: 5.2, 100: 4.2},
        },
        {"prose": "trained", "code": "unseen", "maths": "unseen"},
        first_step=0,
        last_step=100,
        at=1.0,
    )
    code = write_stage(
        folder / "code",
        {
            "prose": {100: 2.0, 101: 2.1, 102: 2.2, 104: peak, 150: 2.1, 180: 1.9, 200: 1.95},
            "code": {100: 4.0, 101: 3.9, 102: 3.7, 104: 3.0, 150: 2.0, 180: 1.6, 200: 1.5},
            "maths": {100: 4.2, 101: 4.2, 102: 4.1, 104: 4.0, 150: 3.5, 180: 3.3, 200: 3.2},
        },
        {"prose": "old", "code": "trained", "maths": "old"},
        first_step=100,
        last_step=200,
        at=2.0,
    )
    maths = write_stage(
        folder / "maths",
        {
            "prose": {200: 1.95, 201: 2.0, 204: 2.15, 300: 2.25},
            "code": {200: 1.5, 201: 1.5, 204: 1.7, 300: 1.4},
            "maths": {200: 3.2, 201: 3.0, 204: 2.5, 300: 1.2},
        },
        {"prose": "old", "code": "trained", "maths": "trained"},
        first_step=200,
        last_step=300,
        at=3.0,
    )
    return [prose, code, maths]
