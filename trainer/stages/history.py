"""RUN/history.jsonl: every start of a stage, what it started from and what it kept."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from trainer.stages.plan import Takeover
from trainer.stages.stage import Stage


def history_path(stage: Stage) -> Path:
    """A line of JSON for every start of a stage of the run."""
    return stage.run_folder / "history.jsonl"


def write_history(stage: Stage, found: Takeover) -> None:
    """Add a start to the run's history."""
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": stage.name,
        "from": found.origin,
        "first_step": max(stage.first_step, stage.done),
        "last_step": stage.last_step,
        "fields": {row.field: {"verdict": row.verdict, "reason": row.reason} for row in found.rows},
    }
    path = history_path(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
