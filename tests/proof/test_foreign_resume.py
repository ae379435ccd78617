"""A run of another trainer goes on in Ratoon, on another layout, with the losses of its own continuation."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.layout import Layout
from tests.foreign.megatron import Dist
from tests.foreign.megatron_model import Run
from tests.proof.foreign_runs import AFTER, BEFORE, continued, run_deepspeed, run_megatron
from tests.proof.runs import run, write_corpora
from tests.ranks import run_ranks

LAYOUT = Layout(pipeline=2)  # on four ranks TP1 PP2 DP2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_corpora(folder)
    return folder


def test_zero_3_of_three_ranks_goes_on(folder: Path) -> None:
    config = continued(folder, folder / "deepspeed", LAYOUT, run__name="from-deepspeed")
    theirs = run_ranks(run_deepspeed, 3, config, folder / "deepspeed", 3)[0]
    assert len(theirs) == BEFORE + AFTER
    assert theirs[-1] < theirs[0]
    records = run_ranks(run, 4, config)[0]
    assert list(records.losses) == [BEFORE + 1 + n for n in range(AFTER)]
    assert list(records.losses.values()) == pytest.approx(theirs[BEFORE:], rel=1e-5)


def test_dp_reshardable_of_tp2_pp2_goes_on(folder: Path) -> None:
    config = continued(folder, folder / "megatron", LAYOUT, run__name="from-megatron")
    theirs = run_ranks(
        run_megatron, 4, config, folder / "megatron", Run(Layout(tensor=2, pipeline=2), 4), Dist()
    )[0]
    assert len(theirs) == BEFORE + AFTER
    assert theirs[-1] < theirs[0]
    records = run_ranks(run, 4, config)[0]
    assert list(records.losses) == [BEFORE + 1 + n for n in range(AFTER)]
    assert list(records.losses.values()) == pytest.approx(theirs[BEFORE:], rel=1e-5)
