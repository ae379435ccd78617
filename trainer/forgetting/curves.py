"""The held-out losses of a run's stages, as they stand in the stages' folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from trainer.metrics.json_lines import read_evaluations, read_steps
from trainer.metrics.sink import EvaluationRecord

METRICS = "metrics.jsonl"


class Stage(NamedTuple):
    """A stage of a run.

    Attributes:
        folder: where its metrics.jsonl lies.
        first_step: optimizer steps that were done before it.
        last_step: those that are done after it.
    """

    name: str
    folder: Path
    first_step: int
    last_step: int


Curve = list[tuple[int, float]]
"""(step, loss in nats per token), in order, all over the same tokens."""


@dataclass(frozen=True)
class StageRecords:
    """A stage and its evaluations, by step."""

    stage: Stage
    by_step: dict[int, EvaluationRecord]

    @property
    def records(self) -> list[EvaluationRecord]:
        """In the order of the steps."""
        return [self.by_step[step] for step in sorted(self.by_step)]

    @property
    def sets(self) -> list[str]:
        """The validation sets that there are: those of the weights, not those of their average."""
        named = dict.fromkeys(
            name for record in self.records for name in (*record.losses, *record.dense_losses)
        )
        roles = {name for record in self.records for name in record.roles}
        return [name for name in named if not roles or name in roles]

    def role(self, name: str) -> str | None:
        """Of a validation set in this stage; None where its records do not say."""
        return next((record.roles[name] for record in self.records if name in record.roles), None)

    def curve(self, name: str) -> Curve:
        """The loss of one set. Evaluations read all of it or a sample: the extent that most have, and
        the first has."""
        means = {record.step: dict(_means(record, name)) for record in self.records}
        means = {step: found for step, found in means.items() if found}
        if not means:
            return []
        counts = Counter(tokens for found in means.values() for tokens in found)
        most = max(means[min(means)], key=lambda tokens: (counts[tokens], tokens))
        return [(step, found[most]) for step, found in means.items() if most in found]


def _means(record: EvaluationRecord, name: str) -> Iterator[tuple[int, float]]:
    """(tokens, mean loss over them) of one set."""
    if name in record.losses:
        yield record.tokens.get(name, 0), record.losses[name]
    if name in record.dense_losses:
        yield record.dense_tokens.get(name, 0), record.dense_losses[name]


def read_stages(stages: Sequence[Stage]) -> list[StageRecords]:
    """The evaluations of stages from their metrics.jsonl; of a stage that is still running, those so far.

    A stage that was not evaluated before its first step begins with the last evaluation of the stage that it
    goes on from.

    Raises:
        ValueError: there is no such file, or it holds what we have not written.
    """
    found: list[StageRecords] = []
    for stage in stages:
        steps = range(stage.first_step, stage.last_step + 1)
        records = read_evaluations(stage.folder / METRICS)
        by_step = {record.step: record for record in records if record.step in steps}
        goes_on = bool(found) and found[-1].stage.last_step == stage.first_step
        before = found[-1].by_step.get(stage.first_step) if goes_on else None
        if stage.first_step not in by_step and before is not None:
            by_step[stage.first_step] = replace(before, roles={})
        found.append(StageRecords(stage, by_step))
    return found


def find_stages(run_folder: Path) -> list[Stage]:
    """The stages in the folder of a run, in the order in which they ran.

    Either the folder has a metrics.jsonl itself and is the only stage, or its folders have.

    Raises:
        ValueError: neither is so.
    """
    folders = [run_folder, *sorted(path for path in run_folder.glob("*") if path.is_dir())]
    found = [folder for folder in folders if (folder / METRICS).is_file()]
    if not found:
        raise ValueError(
            f"{run_folder}: neither it nor a folder in it has a {METRICS}; expected the folder of a run, "
            "such as runs/NAME"
        )
    if found[0] == run_folder:
        found = found[:1]
    begun = [(folder, *read_steps(folder / METRICS)) for folder in found]
    begun.sort(key=lambda one: one[1:3])
    return [Stage(folder.name, folder, first, last) for folder, first, _, last in begun]


def sets_of(stages: Sequence[StageRecords]) -> list[str]:
    """The validation sets of all stages."""
    return list(dict.fromkeys(name for stage in stages for name in stage.sets))
