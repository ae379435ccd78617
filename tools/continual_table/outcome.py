"""What came of an arm, as plain numbers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.continual_table.arm import FROZEN
from trainer.forgetting.curves import find_stages, read_stages
from trainer.metrics.json_lines import read_evaluations, read_lines

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Outcome:
    """An arm of one seed. Losses in nats per token, on held-out documents.

    Attributes:
        end: loss by set after the last step; "NAME (average)" is of the average of the weights.
        curves: by stage and set, (step, loss) pairs, all over the same tokens.
        auxiliary: mean of each auxiliary loss over the last quarter of the steps.
        auxiliary_sources: the sources that each of them has ever been measured on.
        mean_shares: of the sources, over the calls of a controller.
        training: by stage, the loss of every recorded step.
        frozen: whether the frozen weights are still, bit for bit, those of the base; None where none are.
        wall, cpu: seconds.
    """

    end: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    auxiliary_sources: Mapping[str, list[str]] = field(default_factory=dict)
    mean_shares: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, list[float]] = field(default_factory=dict)
    frozen: bool | None = None
    wall: float = 0.0
    cpu: float = 0.0


Seed = Mapping[str, Outcome]
"""The outcomes of one seed, by arm."""


def read_outcome(folder: Path, name: str, *, wall: float, cpu: float) -> Outcome:
    """The outcome of the arm `name` of a seed's folder."""
    stages = find_stages(folder / name)
    records = [one for stage in stages for one in read_evaluations(stage.folder / "metrics.jsonl")]
    whole = [record for record in records if record.losses and not record.dense]
    auxiliary, auxiliary_sources = _auxiliary(stages[-1].folder / "metrics.jsonl")
    return Outcome(
        end=dict(whole[-1].losses),
        curves={read.stage.name: {one: read.curve(one) for one in read.sets} for read in read_stages(stages)},
        auxiliary=auxiliary,
        auxiliary_sources=auxiliary_sources,
        training={stage.name: _training(stage.folder / "metrics.jsonl") for stage in stages},
        mean_shares=_mean_shares(stages[-1].folder / "controller.jsonl"),
        frozen=_frozen_are_equal(folder / "base", folder / name) if name == "freeze" else None,
        wall=wall,
        cpu=cpu,
    )


def _steps(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of all steps, and of their last quarter."""
    lines = [line for line in read_lines(path) if line["kind"] == "step"]
    return lines, lines[-max(1, len(lines) // 4) :]


def _training(path: Path) -> list[float]:
    return [line["loss"] for line in _steps(path)[0]]


def _auxiliary(path: Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    lines, last = _steps(path)
    labels = dict.fromkeys(label for line in lines for label in line.get("auxiliary", {}))
    means: dict[str, float] = {}
    for label in labels:
        said = [line.get("auxiliary", {}).get(label) for line in last]
        values = [one for one in said if isinstance(one, float)]  # "nan" where a step had none of its tokens
        means[label] = sum(values) / len(values) if values else math.nan
    sources: dict[str, list[str]] = {label: [] for label in labels}
    for line in lines:
        for label, by_source in line.get("auxiliary_by_source", {}).items():
            sources[label] = sorted({*sources[label], *by_source})
    return means, sources


def _mean_shares(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    calls = [json.loads(line)["weights"] for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: statistics.fmean(call[name] for call in calls) for name in calls[0]}


def _frozen_are_equal(base: Path, arm: Path) -> bool:
    """Whether every weight that a pattern of FROZEN matches is the same in both newest checkpoints."""
    import re

    import torch

    from checkpoint.opening import open_checkpoint
    from checkpoint.whole import read_whole

    before, after = open_checkpoint(base), open_checkpoint(arm)
    held = [
        (name, state)
        for name, state in before.manifest.by_key()
        if state == "weight" and any(re.fullmatch(pattern, name) for pattern in FROZEN)
    ]
    assert held, "the patterns are of this model's parameters"
    return all(
        torch.equal(*(read_whole(one.folder, one.manifest.by_key()[key]) for one in (before, after)))
        for key in held
    )
