"""`ratoon plot schedule`: the learning rate and the mixture of a run, before it runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.plot_curves import StageCurve, stage_curve
from launch.plot_picture import write_picture
from launch.plot_terminal import print_curves
from trainer.config import (
    RunConfig,
    load_config,
    open_start,
    resumes_itself,
    schedule,
    start_decisions,
    starting_checkpoint,
)
from trainer.config_problems import report
from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedReader
from trainer.data.weights import resolve_weights
from trainer.schedule import Anchor
from trainer.stages.anchoring import anchor_of


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
    """The curves of all stages."""
    config = load_config(run_file, overrides)
    first_step, anchor = _beginning(config)
    return [_curve(str(run_file), config, anchor, first_step)]


def _curve(name: str, config: RunConfig, anchor: Anchor, first_step: int) -> StageCurve:
    plan = schedule(config)
    if problems := plan.problems(anchor):
        raise ValueError(report(name, problems))
    if first_step >= config.train.steps:
        raise ValueError(
            f"{name}: the run starts at step {first_step} and train.steps is {config.train.steps}: raise "
            "train.steps to have something to draw"
        )
    steps = range(first_step, config.train.steps)
    return stage_curve(config.run.name, plan, anchor, steps=steps, weights=asked_shares(config.data))


def asked_shares(data: DataConfig) -> dict[str, float]:
    """Share of each source when the run begins; a corpus is opened only where its size decides.

    Raises:
        ValueError: the mixture contradicts itself, or such a corpus cannot be read.
    """
    mixture = data.mixture
    by_size = mixture.temperature or any(group.temperature for group in mixture.groups.values())
    sizes = {source.name: IndexedReader(source.path).num_tokens if by_size else 1 for source in data.sources}
    return resolve_weights(mixture, data.sources, sizes)


def _beginning(config: RunConfig) -> tuple[int, Anchor]:
    """The run's first step, and the anchor of its schedule, from the checkpoint that it starts from."""
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
