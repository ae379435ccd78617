"""Checkpoints of the oracle by Ratoon's own saver, from any layout."""

from __future__ import annotations

from pathlib import Path

from checkpoint.save import Saver
from tests.foreign.megatron_model import Run, build, plant
from tests.foreign.oracle import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Oracle
from tests.ranks import run_ranks
from trainer.optimizer import OptimizerConfig, settings_by_group


def save(folder: Path, oracle: Oracle, run: Run) -> Path:
    """Write a checkpoint of the oracle into `folder`/step-..., and return `folder`."""
    run_ranks(_save, run.world, str(folder), oracle, run)
    return folder


def _save(folder: str, oracle: Oracle, run: Run) -> None:
    engine = build(oracle, run)
    plant(engine, oracle)
    saver = Saver(folder, rank=engine.mesh.rank, world_size=run.world, background=False)
    optimizer = OptimizerConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    state = {
        "scalars": {"updates": STEP, "lr": LR},
        "groups": settings_by_group(optimizer, oracle.shapes(), LR),
        "model": oracle.architecture().model_dump(mode="json"),
    }
    saver.save(STEP, engine.slices(), state)
    saver.close()
