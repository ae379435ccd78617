"""How many ranks saved a checkpoint of another trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.opening import open_checkpoint
from checkpoint.source import Source
from parallel.layout import Layout
from tests.foreign import deepspeed
from tests.foreign.megatron import Dist, Run, save_torch, save_torch_dist
from tests.foreign.oracle import Oracle

DENSE, MOE = Oracle(precision="bf16"), Oracle(precision="bf16", experts=4)


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({}, 1),
        ({"tensor": 2, "pipeline": 2, "data": 3}, 12),
        ({"pipeline": 2, "virtual": 4}, 2),
        ({"tensor": 2, "expert": 2}, 4),
        ({"tensor": 4, "expert": 2, "expert_tensor": 2}, 4),
        ({"tensor": 2, "data": 2, "expert": 4, "expert_tensor": 1}, 4),
    ],
)
def test_degrees_tell_where_the_files_do_not(degrees: dict[str, int], ranks: int) -> None:
    assert Source("x", Path(), degrees=degrees).num_ranks == ranks


def test_what_the_files_say_counts(tmp_path: Path) -> None:
    assert Source("x", tmp_path, degrees={"tensor": 2}, world_size=6).num_ranks == 6


MEGATRON = {
    "VPP2": (DENSE, Run(Layout(pipeline=2, virtual_pipeline=2), 2)),
    "EP2 DP2": (MOE, Run(Layout(expert=2), 4)),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_megatrons_arguments_say_it(case: str, tmp_path: Path) -> None:
    oracle, run = MEGATRON[case]
    found = open_checkpoint(save_torch(tmp_path / "torch", oracle, run))
    assert found.manifest.world_size == run.world
    found = open_checkpoint(save_torch_dist(tmp_path / "dist", oracle, run, Dist("dp_reshardable")))
    assert found.manifest.world_size == run.world


def test_deepspeeds_degrees_say_it(tmp_path: Path) -> None:
    found = open_checkpoint(deepspeed.save(tmp_path, DENSE, deepspeed.Run(stage=2, world=3)))
    assert found.manifest.world_size == 3
