"""What bf16 training keeps as masters is what FSDP2 has as parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.convert.run import convert, prepare
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.writers.test_dcp import differing
from tests.foreign import deepspeed
from tests.foreign.dcp import Run
from tests.foreign.oracle import Oracle


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_masters_of_bf16_training_are_fsdps_parameters(tmp_path: Path, stage: int) -> None:
    oracle = Oracle(layers=1, precision="bf16")
    deepspeed.save(tmp_path / "source", oracle, deepspeed.Run(stage, world=3))
    convert(prepare(tmp_path / "source", "dcp", WriteOptions()), tmp_path / "out")
    assert differing(tmp_path / "out", oracle, Run(mesh=(3,))) == []
