"""`ratoon plot schedule`: the learning rate and the mixture of a run, before it runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.plot_curves import StageCurve, stage_curve
from launch.plot_picture import write_picture
from launch.plot_shares import with_changes
from launch.plot_terminal import print_curves
from trainer.config import (
    RunConfig,
    open_start,
    resumes_itself,
    schedule,
    start_decisions,
    starting_checkpoint,
)
from trainer.config_problems import report
from trainer.data.config import DataConfig
from trainer.data.transforms.opening import sizes_of
from trainer.data.weights import resolve_weights
from trainer.schedule import Anchor
from trainer.stages.anchoring import anchor_of
from trainer.stages.load_stages import load_stages, planned_anchor
from trainer.stages.stage import Stage


def plot_schedule(run_file: Path, overrides: list[str], *, out: Path | None = None) -> None:
    """Draw the run that `run_file` describes to the terminal and to the PNG `out`.

    Args:
        out: by default the run file's name with -schedule.png, beside it.

    Raises:
        ValueError: with everything that is wrong with the schedules.
    """
    curves = run_curves(run_file, overrides)
    path = out or run_file.with_name(f"{run_file.stem}-schedule.png")
    console = Console(highlight=False)
    print_curves(curves, console, f"{run_file}: learning rate and mixture")
    write_picture(curves, path, str(run_file))
    console.print(Text(f"wrote {path}", "green"), soft_wrap=True)


def run_curves(run_file: Path, overrides: list[str]) -> list[StageCurve]:
    """The curves of all stages, in the order they run.

    Raises:
        ValueError: with everything that is wrong with a stage's schedule.
    """
    stages = load_stages(run_file, overrides)
    return [_curve(run_file, stage, stages) for stage in stages]


def _curve(run_file: Path, stage: Stage, stages: list[Stage]) -> StageCurve:
    config, plan = stage.config, schedule(stage.config)
    where = f"{run_file}, stage {stage.name}" if len(stages) > 1 else str(run_file)
    if stage.origin is None:
        first_step, anchor = _from_checkpoint(config)
    else:
        first_step, anchor = stage.first_step, planned_anchor(stage, stages)
    if problems := plan.problems(anchor):
        raise ValueError(report(where, problems))
    steps = range(first_step, config.train.steps)
    if not steps:
        raise ValueError(
            f"{where}: the run starts at step {first_step} and train.steps is {config.train.steps}: raise "
            "train.steps to have something to draw"
        )
    weights = asked_shares(config.data, config.train.global_batch)
    try:
        return with_changes(stage_curve(stage.name, plan, anchor, steps=steps, weights=weights), config)
    except ValueError as error:
        raise ValueError(report(where, [str(error)])) from None


def asked_shares(data: DataConfig, global_batch: int) -> dict[str, float]:
    """Share of each source when the stage begins; a corpus is opened only where its size decides.

    Raises:
        ValueError: the mixture contradicts itself, or such a corpus cannot be read.
    """
    mixture = data.mixture
    by_size = mixture.temperature or any(group.temperature for group in mixture.groups.values())
    sizes = sizes_of(data) if by_size else dict.fromkeys((source.name for source in data.sources), 1)
    return resolve_weights(mixture, data.sources, sizes, global_batch=global_batch)


def _from_checkpoint(config: RunConfig) -> tuple[int, Anchor]:
    """First step and anchor of what starts from another run's checkpoint, from its own, or from nothing."""
    path = starting_checkpoint(config)
    if path is None:
        return 0, schedule(config).begin()
    same_run, opened = resumes_itself(config, path), open_start(config, path)
    decisions = start_decisions(config, opened, same_run=same_run)
    state = opened.manifest.state
    step = opened.manifest.step if decisions["step"].verdict == "keep" else 0
    anchor = anchor_of(config.start, schedule(config), decisions, step=step, state=state)
    if same_run:  # it began where it left the last of the checkpoints that it comes from
        lineage = state.get("lineage") or [{"step": 0}]
        step = int(lineage[-1]["step"])
    return step, anchor
