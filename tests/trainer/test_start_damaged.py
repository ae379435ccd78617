"""A run from a checkpoint whose optimizer state is damaged: refused, unless it wants the weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.opening import WEIGHTS_REMEDY
from parallel.layout import Layout
from tests.foreign.megatron import Dist, Run, save_torch_dist
from tests.foreign.oracle import Oracle
from tests.proof.runs import run_config, write_corpora
from trainer.config import validate


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron-core 0.16 shifts what lies behind padded buckets."""
    oracle = Oracle(hidden=192, vocab=515, layers=2, precision="bf16")
    run = Run(Layout(), 3, bucket=100_000)
    return save_torch_dist(tmp_path_factory.mktemp("damaged"), oracle, run, Dist("fully_reshardable"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_corpora(folder)
    return folder


def test_the_run_is_refused_and_the_remedy_named(damaged: Path, folder: Path) -> None:
    problems = validate(run_config(folder, Layout(), run__name="all", checkpoint__load=damaged), 1)
    assert f"checkpoint.load: {WEIGHTS_REMEDY}" in problems
    assert sum("saved nowhere" in problem for problem in problems) == 4


def test_a_run_from_the_weights_alone_is_not(damaged: Path, folder: Path) -> None:
    config = run_config(
        folder, Layout(), run__name="weights", checkpoint__load=damaged, start__policy="weights"
    )
    assert validate(config, 1) == []
