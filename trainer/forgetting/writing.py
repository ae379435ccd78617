"""The files of a report, beside the stages of its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from checkpoint.folder import write_durably
from trainer.forgetting.board import write_scalars
from trainer.forgetting.curves import Stage, read_stages
from trainer.forgetting.matrix import end_step
from trainer.forgetting.picture import write_picture
from trainer.forgetting.report import Report, build_report

JSON, PNG, BOARD = "forgetting.json", "forgetting.png", "tensorboard-forgetting"


def write_reports(
    run_folder: Path, stages: Sequence[tuple[str, Path, int, int]], *, tensorboard: bool = True
) -> Report | None:
    """Write RUN/forgetting.json, RUN/forgetting.png and RUN/tensorboard-forgetting/.

    For one process to call, after every stage. What to show then is `Report.lines()`.

    Args:
        stages: (name, folder, first step, last step) of those done so far, in their order.

    Returns:
        The report; None of a run that is not evaluated.

    Raises:
        ValueError: the metrics of a stage cannot be read, or a file cannot be written.
    """
    named = [Stage(*stage) for stage in stages]
    if all(end_step(stage) is None for stage in read_stages(named)):
        return None
    report = build_report(run_folder.resolve().name, named)
    try:
        write_durably(run_folder / JSON, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(f"cannot write {run_folder / JSON}: {error.strerror or error}") from None
    write_picture(report, run_folder / PNG)
    if tensorboard:
        write_scalars(report, run_folder / BOARD)
    return report
