"""Genuine DeepSpeed checkpoints of pipeline stages and tensor-parallel ranks are read bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.opening import open_checkpoint
from tests.checkpoint.readers.test_deepspeed import ALL, FP32_SUMS, SHARDED, assert_equal
from tests.foreign.deepspeed import Run
from tests.foreign.deepspeed_pipeline import SPEC, save_pipeline
from tests.foreign.deepspeed_tensor import save_auto_tensor_parallel, save_tensor_parallel
from tests.foreign.oracle import Oracle


def test_a_pipeline_with_a_tied_embedding(tmp_path: Path) -> None:
    oracle = Oracle(tied=True)
    (tmp_path / "spec.toml").write_text(SPEC)
    folder = save_pipeline(tmp_path / "saved", oracle, Run(1, world=4))
    opened = open_checkpoint(folder, spec=tmp_path / "spec.toml")
    assert_equal(opened, oracle, ALL)
    embedding = opened.manifest.by_key()["model.embed_tokens.weight", "exp_avg"]
    assert len(embedding.replicas) == 1, "the last stage's copy is a replica"


@pytest.mark.long
def test_a_pipeline_in_bf16(tmp_path: Path) -> None:
    oracle = Oracle(precision="bf16")
    (tmp_path / "spec.toml").write_text(SPEC)
    folder = save_pipeline(tmp_path / "saved", oracle, Run(1, world=2, config=FP32_SUMS))
    assert_equal(open_checkpoint(folder, spec=tmp_path / "spec.toml"), oracle, ALL)


@pytest.mark.parametrize(
    ("stage", "world", "precision"), [(1, 2, "bf16"), pytest.param(2, 4, "fp32", marks=pytest.mark.long)]
)
def test_tensor_parallel_ranks_with_a_padded_vocabulary(
    stage: int, world: int, precision: str, tmp_path: Path
) -> None:
    oracle = Oracle(precision=precision)
    opened = open_checkpoint(save_tensor_parallel(tmp_path, oracle, Run(stage, world=world)))
    assert_equal(opened, oracle, ALL)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 4), (3, 4)])
def test_auto_tensor_parallelism(stage: int, world: int, tmp_path: Path) -> None:
    oracle = Oracle()
    opened = open_checkpoint(save_auto_tensor_parallel(tmp_path, oracle, Run(stage, world=world)))
    assert_equal(opened, oracle, SHARDED if stage == 3 else ALL)
