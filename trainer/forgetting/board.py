"""The report as TensorBoard scalars: after every stage what it would have said then."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from trainer.forgetting.matrix import Matrix, end_step
from trainer.forgetting.metrics import summarise
from trainer.forgetting.report import Report


def write_scalars(report: Report, folder: Path) -> None:
    """Write `forgetting/...` into `folder`, which holds nothing else and is written anew.

    At the last step of each stage: the losses by set, the means of `trainer.forgetting.metrics`, and depth
    and width of the gaps.
    """
    from torch.utils.tensorboard import SummaryWriter  # half a second that only runs need

    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))
    for number, (stage, step) in enumerate(_ended(report), start=1):
        for name, value in _scalars(report, number, stage).items():
            if value is not None:
                writer.add_scalar(f"forgetting/{name}", value, step)
    writer.close()


def _ended(report: Report) -> list[tuple[str, int]]:
    """Name and last evaluated step of the stages in the matrix."""
    steps = [(stage.stage.name, end_step(stage)) for stage in report.stages]
    return [(name, step) for name, step in steps if step is not None]


def _scalars(report: Report, number: int, stage: str) -> dict[str, float | None]:
    """Of the first `number` stages, the last of which is called `stage`."""
    matrix = report.matrix
    summary = summarise(_until(matrix, number))
    scalars: dict[str, float | None] = {
        f"loss/{name}": matrix.loss(number, index) for index, name in enumerate(matrix.sets)
    }
    for name in ("average", "backward_transfer", "forward_transfer", "forgetting", "forgetting_from_best"):
        scalars[name] = getattr(summary, name)
    for one in report.gaps:
        if one.stage == stage:
            scalars[f"gap_depth/{one.set_name}"] = one.gap.depth
            scalars[f"gap_width/{one.set_name}"] = one.gap.width
    return scalars


def _until(matrix: Matrix, stages: int) -> Matrix:
    """What was known after so many stages: sets that a later stage teaches were not learned yet."""
    return replace(
        matrix,
        stages=matrix.stages[:stages],
        rows=matrix.rows[: stages + 1],
        learned=tuple(one if one is not None and one <= stages else None for one in matrix.learned),
    )
