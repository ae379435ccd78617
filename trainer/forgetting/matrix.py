"""The matrix R[t, i]: the held-out loss on set i after stage t.

Stages count from 1. Row 0 is what the first stage starts from, b_i: the untrained model, or a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.forgetting.curves import StageRecords, sets_of
from trainer.metrics.sink import EvaluationRecord

Unit = Literal["nats_per_token", "bits_per_byte"]


@dataclass(frozen=True)
class Matrix:
    """Losses, lower is better.

    Attributes:
        sets: names of the validation sets, i.
        stages: names of the stages, t = 1, ..., T.
        rows: [T + 1][sets]; row 0 is the start, row t is after stage t. None where nothing was evaluated.
        learned: of each set the first stage whose sources it belongs to; 0 where no stage trains on it and
            the run began from a checkpoint that may know it; None where nothing has taught it.
    """

    sets: tuple[str, ...]
    stages: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    learned: tuple[int | None, ...]

    @property
    def last(self) -> int:
        """T, the number of stages."""
        return len(self.stages)

    def loss(self, stage: int, set_index: int) -> float | None:
        """R[stage, set_index]."""
        return self.rows[stage][set_index]


def build_matrix(stages: Sequence[StageRecords], unit: Unit = "nats_per_token") -> Matrix:
    """The matrix of the last whole evaluation of every stage.

    A stage that has not been evaluated, since it has only begun, has a row of None.
    """
    sets = sets_of(stages)
    rows = [_row(_start(stages[0]), sets, unit)] if stages else []
    rows += [_row(_end(stage), sets, unit) for stage in stages]
    return Matrix(
        tuple(sets),
        tuple(stage.stage.name for stage in stages),
        tuple(rows),
        tuple(_learned(stages, name) for name in sets),
    )


def end_step(stage: StageRecords) -> int | None:
    """The step of the evaluation that stands for the end of a stage; None where there is none yet."""
    record = _end(stage)
    return None if record is None else record.step


def _start(stage: StageRecords) -> EvaluationRecord | None:
    return stage.by_step.get(stage.stage.first_step)


def _end(stage: StageRecords) -> EvaluationRecord | None:
    whole = [one for one in stage.records if not one.dense and one.step > stage.stage.first_step]
    return whole[-1] if whole else None


def _row(record: EvaluationRecord | None, sets: Sequence[str], unit: Unit) -> tuple[float | None, ...]:
    if record is None:
        return (None,) * len(sets)
    values = record.losses if unit == "nats_per_token" else record.bits_per_byte
    return tuple(values.get(name) for name in sets)


def _learned(stages: Sequence[StageRecords], name: str) -> int | None:
    roles = [stage.role(name) for stage in stages]
    if "trained" in roles:
        return roles.index("trained") + 1
    return 0 if "old" in roles[:1] else None


def is_known(value: float | None) -> bool:
    """Whether there is a number; not so of a set that is empty or was not evaluated."""
    return value is not None and not math.isnan(value)
