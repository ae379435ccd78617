"""Everything about forgetting in one run, from the metrics that its stages left.

`forgetting.json`, losses in nats per token unless a key says otherwise, null where there is nothing:

    {"format": 1, "run": NAME,
     "stages":  [{"name", "folder", "first_step", "last_step",
                  "evaluated": step of the evaluation that stands for its end}],
     "sets":    [{"name", "source", "learned": 1, 2, ... (stage), 0 (before the run), null (never)}],
     "matrix":  {"nats_per_token": [[R[0, i], ...], [R[1, i], ...], ...], "bits_per_byte": the same},
     "summary": {"nats_per_token": {"average", "average_learned": [by stage], "backward_transfer",
                 "forward_transfer", "forgetting", "forgetting_from_best"}, "bits_per_byte": the same},
     "forgetting_by_set": {"nats_per_token": [by set], "bits_per_byte": [by set]},
     "gaps":    [{"stage", "set", and the fields of `trainer.forgetting.gap.Gap`}],
     "sentences": [text]}

Row 0 of a matrix is the start, row t is after stage t. Numbers that JSON lacks are "nan", "inf" and "-inf".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from trainer.forgetting.curves import Stage, StageRecords, read_stages
from trainer.forgetting.gap import Gap, measure_gap
from trainer.forgetting.matrix import Matrix, Unit, build_matrix, end_step
from trainer.forgetting.metrics import forgetting_by_set, summarise
from trainer.forgetting.sentences import gap_sentences, summary_lines, table_lines
from trainer.metrics.json_lines import valid_json

FORMAT = 1
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class StageGap:
    """The gap of one set in one stage."""

    stage: str
    set_name: str
    gap: Gap


@dataclass(frozen=True)
class Report:
    """What is written and drawn of a run.

    Attributes:
        stages: all of them, one that is still running too.
        matrices: by unit, of the stages that have been evaluated at their end.
        gaps: of every set that a stage found there: learned in an earlier one, or before the run.
    """

    run: str
    stages: tuple[StageRecords, ...]
    matrices: dict[Unit, Matrix]
    gaps: tuple[StageGap, ...]

    @property
    def matrix(self) -> Matrix:
        """In nats per token."""
        return self.matrices["nats_per_token"]

    @property
    def sentences(self) -> list[str]:
        """What stands out, the worst first."""
        return gap_sentences([(one.stage, one.set_name, one.gap) for one in self.gaps])

    def lines(self) -> list[str]:
        """The report for a terminal of 80 columns."""
        return [
            *table_lines(self.matrix),
            *summary_lines(summarise(self.matrix)),
            *self.sentences,
        ]

    def to_json(self) -> dict[str, Any]:
        """What `forgetting.json` holds."""
        sources = {
            name: source
            for stage in self.stages
            for one in stage.records
            for name, source in one.sources.items()
        }
        matrix = self.matrix
        found: dict[str, Any] = valid_json(
            {
                "format": FORMAT,
                "run": self.run,
                "stages": [_stage_json(stage) for stage in self.stages],
                "sets": [
                    {"name": name, "source": sources.get(name, name), "learned": learned}
                    for name, learned in zip(matrix.sets, matrix.learned, strict=True)
                ],
                "matrix": {unit: self.matrices[unit].rows for unit in UNITS},
                "summary": {unit: asdict(summarise(self.matrices[unit])) for unit in UNITS},
                "forgetting_by_set": {unit: forgetting_by_set(self.matrices[unit]) for unit in UNITS},
                "gaps": [{"stage": one.stage, "set": one.set_name, **asdict(one.gap)} for one in self.gaps],
                "sentences": self.sentences,
            }
        )
        return found


def build_report(run: str, stages: Sequence[Stage]) -> Report:
    """Read the metrics of all stages, in their order.

    Raises:
        ValueError: a stage's metrics cannot be read, or no stage has been evaluated at its end.
    """
    read = read_stages(stages)
    ended = [stage for stage in read if end_step(stage) is not None]
    if not ended:
        folders = ", ".join(str(stage.folder) for stage in stages)
        raise ValueError(
            f"run {run!r}: no evaluation after a first step in {folders}; add a [[data.validation]] to the "
            "run file and let a stage come to its end"
        )
    return Report(run, tuple(read), {unit: build_matrix(ended, unit) for unit in UNITS}, tuple(_gaps(read)))


def _gaps(stages: Sequence[StageRecords]) -> list[StageGap]:
    learned = build_matrix(stages)
    found = []
    for number, stage in enumerate(stages, start=1):
        for name, by in zip(learned.sets, learned.learned, strict=True):
            gap = measure_gap(stage.curve(name)) if by is not None and by < number else None
            if gap is not None:
                found.append(StageGap(stage.stage.name, name, gap))
    return found


def _stage_json(stage: StageRecords) -> dict[str, Any]:
    found = stage.stage._asdict()
    return {**found, "folder": stage.stage.folder.name, "evaluated": end_step(stage)}
