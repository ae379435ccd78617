"""What `ratoon check` says is what would happen."""

from dataclasses import replace
from typing import Any

import pytest

from launch.check_command import binary_unit, count_of, layout_table, notes, place_of, stage_table
from launch.environment import Environment
from launch.train_command import choose_world_size
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.ranks import run_ranks
from trainer.config import RunConfig, parse_config
from trainer.model.transformer import Execution
from trainer.run_file import RunFile

HERE = Environment("local", 0, 1, 0, 1, None, None, gpus=0, cores=2)


def config(**sections: dict[str, object]) -> RunConfig:
    values: dict[str, dict[str, object]] = {
        "model": {"preset": "tiny"},
        "data": {"sources": [{"name": "a", "path": "a"}]},
        "train": {"steps": 100, "global_batch": 8},
        "checkpoint": {"every": 50},
    }
    return parse_config(RunFile("run.toml", values | sections))


def real_place(layout: Layout) -> dict[str, int]:
    mesh = build_mesh(layout)
    return {
        "tensor": mesh.tensor_rank,
        "context": mesh.context_rank,
        "data": mesh.data_rank,
        "pipeline": mesh.pipeline_rank,
        "expert": mesh.expert_rank,
    }


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, pipeline=2),
        Layout(context=2, pipeline=2),
        Layout(tensor=2, context=2),
        Layout(expert=2, pipeline=2),
        Layout(tensor=2, expert=4, sequence_parallel=True),
        Layout(context=2, expert=4),
    ],
    ids=lambda layout: layout.describe(8),
)
def test_the_table_shows_where_megatron_core_puts_every_rank(layout: Layout) -> None:
    places = run_ranks(real_place, 8, layout)
    assert [place_of(layout, rank, 8) for rank in range(8)] == places


def test_large_worlds_are_shown_by_their_axes() -> None:
    assert layout_table(Layout(tensor=8), 1024).row_count == 2
    assert layout_table(Layout(tensor=2), 8).row_count == 8


@pytest.mark.parametrize(
    ("layout", "gpus", "ranks", "world_size"),
    [
        (Layout(), 0, None, 1),
        (Layout(), 8, None, 8),
        (Layout(tensor=2, pipeline=2), 0, None, 4),
        (Layout(tensor=2, pipeline=2), 7, None, 4),
        (Layout(tensor=2, pipeline=2), 2, None, 4),
        (Layout(context=2, expert=4), 0, None, 4),
        (Layout(), 8, 3, 3),
    ],
)
def test_how_many_ranks_start(layout: Layout, gpus: int, ranks: int | None, world_size: int) -> None:
    run = config().model_copy(update={"parallel": layout})
    assert choose_world_size(run, replace(HERE, gpus=gpus), ranks) == world_size


def test_a_launcher_decides_how_many_ranks_there_are() -> None:
    assert choose_world_size(config(), replace(HERE, launcher="slurm", world_size=6), None) == 6


def test_nothing_to_note_about_a_plain_run() -> None:
    assert notes(config()) == []


@pytest.mark.parametrize(
    ("section", "values", "part"),
    [
        ("schedule", {"steps": 200}, "will not reach optimizer.min_lr"),
        ("checkpoint", {"every": 1000}, "nothing is saved before the end"),
        ("start", {"policy": "rewarm"}, "no effect without checkpoint.load"),
        (
            "data",
            {"sources": [{"name": "a", "path": "a"}], "validation": [{"name": "v", "path": "v"}]},
            "at the end only",
        ),
    ],
)
def test_what_may_surprise_is_noted(section: str, values: dict[str, object], part: str) -> None:
    (note,) = notes(config(**{section: values}))
    assert part in note


@pytest.mark.parametrize(
    ("sections", "columns"),
    [
        ({}, ["logits", "total"]),
        ({"slow_weights": {"kind": "ema", "decay": 0.9}}, ["logits", "added", "total"]),
        ({"losses": [{"kind": "kl", "weight": 1.0}]}, ["logits", "reference", "total"]),
    ],
)
def test_what_methods_need_has_a_column_where_there_is_any(sections: Any, columns: list[str]) -> None:
    made = config(**sections)
    table = stage_table(made, made.model.resolve(259), Execution(), world_size=1)
    assert [column.header for column in table.columns][6:] == columns


def test_sizes_and_plurals() -> None:
    assert [binary_unit(size)[1] for size in (5, 2**20, 2**31, 2**41)] == ["KiB", "MiB", "GiB", "TiB"]
    assert [count_of(number, "rank") for number in (1, 2, 4096)] == ["1 rank", "2 ranks", "4,096 ranks"]
