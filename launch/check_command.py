"""`ratoon check`: what a run file means, on how many ranks, and what it will need. Starts nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.environment import read_environment
from launch.terminal import count
from launch.train_command import choose_world_size
from parallel.layout import Layout
from trainer.config import (
    RunConfig,
    architecture,
    config_toml,
    open_start,
    resolve,
    resumes_itself,
    start_decisions,
    starting_checkpoint,
)
from trainer.flops import training_flops
from trainer.memory import Batch, estimate_memory
from trainer.method_memory import Methods
from trainer.model.architecture import Architecture
from trainer.model.parameters import count_parameters, parameters_per_rank
from trainer.model.transformer import Execution
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages
from trainer.stages.stage import Stage

_LISTED_RANKS = 32
"""Worlds up to this size are shown rank by rank."""


def check(run_file: Path, overrides: list[str], *, ranks: int | None = None) -> None:
    """Print the resolved run, its layout, memory and compute, for `ranks` ranks.

    Raises:
        ValueError: with everything that is wrong with the run file.
    """
    environment = read_environment()
    stages = load_stages(run_file, overrides)
    worlds = [choose_world_size(stage.config, environment, ranks) for stage in stages]
    check_stages(stages, worlds, name=str(run_file))
    console = Console(highlight=False)
    for stage, world_size in zip(stages, worlds, strict=True):
        if len(stages) > 1:
            console.rule(Text(f"{stage.name}: steps {stage.first_step:,} to {stage.last_step:,}", "bold"))
        gpu = environment.gpus >= world_size or environment.cores < world_size  # meant for a larger machine
        _show(console, stage, world_size, gpu=gpu)
    device = "with a GPU each" if gpu else "on the CPU"
    console.print(Text(f"{run_file} can run on {count_of(max(worlds), 'rank')} {device}", "green"))


def _show(console: Console, stage: Stage, world_size: int, *, gpu: bool) -> None:
    config = resolve(stage.config)
    model, execution = architecture(config), planned_execution(config, gpu=gpu)
    console.print(Text(config_toml(config).strip()), soft_wrap=True)
    console.print()
    console.print(Text(f"layout: {config.parallel.describe(world_size)}", "bold"))
    console.print(layout_table(config.parallel, world_size))
    console.print(stage_table(config, model, execution, world_size=world_size))
    origin = (
        f"{config.checkpoint.load}, which is still to be made" if stage.waits else origin_in_words(config)
    )
    console.print(totals_table(config, model, world_size, origin))
    for line in notes(config):
        console.print(Text("note: ", style="yellow") + Text(line, style="default"))


def planned_execution(config: RunConfig, *, gpu: bool) -> Execution:
    """How the arithmetic would be carried out here, without importing what would do it."""
    return Execution(
        precision=config.train.precision,
        fp8=config.precision.fp8,
        recompute=config.train.recompute,
        cuda=gpu,
        transformer_engine=gpu and importlib.util.find_spec("transformer_engine") is not None,
        deterministic=config.run.deterministic,
    )


def layout_table(layout: Layout, world_size: int) -> Table:
    """Every rank's place in a small world; of a large one the degrees and strides."""
    table = _table("")
    axes = _axes(layout, world_size)
    shown = [axis for axis, degree in axes.items() if degree > 1] or ["data"]
    if world_size > _LISTED_RANKS:
        for heading in ("axis", "ranks", "from one rank to the next"):
            table.add_column(heading)
        for axis in shown:
            table.add_row(axis, str(axes[axis]), f"+{_stride(layout, axis, world_size)}")
        return table
    for heading in ("rank", *shown):
        table.add_column(heading, justify="right")
    for rank in range(world_size):
        place = place_of(layout, rank, world_size)
        table.add_row(str(rank), *(str(place[axis]) for axis in shown))
    return table


def place_of(layout: Layout, rank: int, world_size: int) -> dict[str, int]:
    """Index of a rank along every axis."""
    axes = _axes(layout, world_size).items()
    return {axis: rank // _stride(layout, axis, world_size) % degree for axis, degree in axes}


def _axes(layout: Layout, world_size: int) -> dict[str, int]:
    return {
        "tensor": layout.tensor,
        "context": layout.context,
        "data": layout.data(world_size),
        "pipeline": layout.pipeline,
        "expert": layout.expert,
    }


def _stride(layout: Layout, axis: str, world_size: int) -> int:
    """Distance of neighbours along an axis; megatron-core's order of axes is tp-cp-ep-dp-pp.

    Experts are spread over context and data ranks together, next to the tensor ranks.
    """
    strides = {"tensor": 1, "context": layout.tensor, "expert": layout.tensor}
    strides["data"] = layout.tensor * layout.context
    strides["pipeline"] = strides["data"] * layout.data(world_size)
    return strides[axis]


def stage_table(config: RunConfig, model: Architecture, execution: Execution, *, world_size: int) -> Table:
    """Parameters and estimated memory of a rank of every pipeline stage."""
    layout = config.parallel
    batch = Batch(config.data.sequence_length, config.train.micro_batch, config.micro_batches(world_size))
    memory = estimate_memory(
        model,
        layout,
        execution,
        world_size=world_size,
        batch=batch,
        methods=Methods(config.updates, config.slow_weights, config.losses),
    )
    size, unit = binary_unit(max(estimate.total for estimate in memory))
    table = _table(f"a rank of each pipeline stage; memory in {unit}, estimated")
    parts = ["weights", "gradients", "optimizer", "activations", "logits"]
    parts += [part for part in ("added", "reference") if any(getattr(one, part) for one in memory)]
    for heading in ("stage", "parameters", *parts, "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    parameters = parameters_per_rank(model, layout, cuda=execution.cuda)
    for rank, estimate in zip(parameters, memory, strict=True):
        sizes = (f"{getattr(estimate, part) / size:.2f}" for part in (*parts, "total"))
        table.add_row(str(rank.stage), count(rank.total), *sizes)
    return table


def _table(title: str, *, header: bool = True) -> Table:
    """A table that fits many columns into 80 characters."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=header,
    )


def totals_table(config: RunConfig, model: Architecture, world_size: int, origin: str) -> Table:
    """What the whole run comes to; `origin` is what it starts from."""
    table = _table("the run", header=False)
    for row in _totals(config, model, world_size, origin):
        table.add_row(*row)
    return table


def _totals(
    config: RunConfig, model: Architecture, world_size: int, origin: str
) -> Iterator[tuple[str, str]]:
    parameters = count_parameters(model)
    active = f", {count(parameters.active)} active per token" if model.num_experts else ""
    yield (
        "parameters",
        f"{count(parameters.total)} ({count(parameters.non_embedding)} without embeddings{active})",
    )
    batches = count_of(config.micro_batches(world_size), "micro-batch", "micro-batches")
    yield (
        "step",
        (
            f"{count_of(config.train.global_batch, 'sequence')} of {config.data.sequence_length} tokens = "
            f"{count(config.tokens_per_step)} tokens; {batches} of {config.train.micro_batch} a data rank"
        ),
    )
    tokens = config.train.steps * config.tokens_per_step
    yield "run", f"{count_of(config.train.steps, 'step')}, {count(tokens)} tokens"
    flops = training_flops(model, config.data.sequence_length, config.train.global_batch)
    yield "FLOPs a step", f"{flops.causal:.3g} causal, {flops.full:.3g} with full attention"
    yield "FLOPs in all", f"{flops.causal * config.train.steps:.3g} causal"
    yield "starts from", origin
    yield "run folder", str(config.run.folder)


def origin_in_words(config: RunConfig) -> str:
    """The checkpoint, its format, and what is taken from it."""
    path = starting_checkpoint(config)
    if path is None:
        return "new weights"
    opened = open_start(config, path)
    decisions = start_decisions(config, opened, same_run=resumes_itself(config, path))
    kept = [field for field, decision in decisions.items() if decision.verdict == "keep"]
    if not kept:
        return f"{path}: {opened.format}, weights alone; step 0"
    step = opened.manifest.step if "step" in kept else 0
    return f"{path}: {opened.format}, step {step:,}; weights, {', '.join(kept)} kept"


def notes(config: RunConfig) -> list[str]:
    """What is allowed and may still surprise."""
    found = []
    if config.schedule.steps is not None and config.schedule.steps > config.train.steps:
        found.append(
            f"schedule.steps = {config.schedule.steps} goes on after train.steps = {config.train.steps}: the "
            "learning rate will not reach optimizer.min_lr"
        )
    if config.checkpoint.every > config.train.steps:
        found.append(
            f"checkpoint.every = {config.checkpoint.every} is more than train.steps = {config.train.steps}: "
            "nothing is saved before the end"
        )
    if config.start.policy is not None and config.checkpoint.load is None:
        found.append(f"start.policy = {config.start.policy} has no effect without checkpoint.load")
    if config.data.validation and config.eval.every == 0:
        found.append("eval.every = 0: the validation sets are read at the end only")
    return found


def count_of(number: int, one: str, many: str | None = None) -> str:
    """1 rank, 2 ranks."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def binary_unit(size: int) -> tuple[int, str]:
    """The unit, in bytes and by name, in which `size` is a readable number."""
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))
    return next(((limit, name) for limit, name in units if size >= limit), (2**10, "KiB"))
