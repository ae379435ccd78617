"""Whole runs of a tiny model: run files, records, and the checkpoints they leave."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoint.folder import read_manifest, step_name
from checkpoint.load import load
from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from tests.data.corpora import ragged, write_tokens
from tests.proof.gather import Wholes, copy_slices
from trainer.config import RunConfig, check_config
from trainer.loop import train
from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord
from trainer.peak import measured_peak
from trainer.session import open_session

GLOBAL_BATCH = 6  # divides over 1, 2 and 3 data ranks
SEQUENCE = 32

for arithmetic in ("fp32", "bf16"):
    for threads in (1, 2):  # of a forked rank; a third of a second that no run has to spend again
        measured_peak("cpu", arithmetic, threads)


@dataclass
class Records:
    """A sink that keeps everything."""

    info: RunInfo | None = None
    steps: list[StepRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    def start(self, info: RunInfo) -> None:
        self.info = info

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def event(self, text: str, *, step: int) -> None:
        self.events.append(text)

    def evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def close(self) -> None:
        pass

    @property
    def losses(self) -> dict[int, float]:
        """By step, counted from 1."""
        return {record.step: record.loss for record in self.steps}


@dataclass(frozen=True)
class Resumed:
    """What one rank found when it went on from a checkpoint, and what it did then."""

    slices: list[TensorSlice]
    step: int
    updates: int
    anchor: tuple[int, float]
    notes: list[str]
    records: Records


def write_corpora(folder: Path) -> None:
    """Two sources and a held-out set whose tokens rise by one, so that there is something to learn."""
    for number, name in enumerate(("prose", "code", "held-out")):
        documents = [[token % 250 for token in one] for one in ragged(60, seed=number, longest=50)]
        write_tokens(folder / name, documents)


def run_config(folder: Path, layout: Layout | None = None, **changes: Any) -> RunConfig:
    """A run file of 6 steps in `folder`/`run__name`, where `write_corpora` has been.

    Args:
        changes: keys of the run file with `__` for the dot, such as train__steps, or whole sections.
    """
    name = changes.pop("run__name", "run")
    values: dict[str, Any] = {
        "run": {"name": name, "dir": folder / name, "seed": 7},
        "model": {"preset": "tiny"},
        "parallel": dataclasses.asdict(layout or Layout()),
        "data": {
            "sequence_length": SEQUENCE,
            "sources": [
                {"name": "prose", "path": str(folder / "prose"), "weight": 2.0},
                {"name": "code", "path": str(folder / "code")},
            ],
        },
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2, "steps": 12},
        "train": {"steps": 6, "global_batch": GLOBAL_BATCH, "precision": "fp32"},
        "checkpoint": {"every": 3, "keep": 9},
        "metrics": {"tensorboard": False},
    }
    for key, value in changes.items():
        section, _, entry = key.partition("__")
        if entry:
            values.setdefault(section, {})[entry] = value
        else:
            values[section] = value
    return RunConfig.model_validate(values)


def run(config: RunConfig) -> Records:
    """Train; a target for `run_ranks`. Every rank keeps the records."""
    check_config(config, torch.distributed.get_world_size(), name="the test's run file")
    records = Records()
    train(config, sink=records)
    return records


def look_and_run(config: RunConfig) -> Resumed:
    """Open the session only to see what it holds, then train as `run` does."""
    session, notes = open_session(config)
    found = Resumed(
        copy_slices(session.engine),
        session.step,
        session.engine.updates,
        (session.anchor.step, session.anchor.lr),
        notes,
        Records(),
    )
    session.saver.close()
    destroy_mesh()
    return dataclasses.replace(found, records=run(config))


def checkpoint(config: RunConfig, step: int) -> Path:
    """The folder of a checkpoint of a run."""
    return config.run.checkpoints / step_name(step)


def cut_short(config: RunConfig, other: RunConfig, step: int) -> None:
    """Give another run the checkpoint of `step`, as if it had been stopped after it."""
    shutil.copytree(checkpoint(config, step), checkpoint(other, step))


def read_checkpoint(path: Path) -> Wholes:
    """Every tensor of a checkpoint, whole, with every hash checked."""
    _, manifest = read_manifest(path)
    pieces = []
    for tensor in manifest.tensors:
        data = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)).view(-1)
        origin = tuple(0 for _ in tensor.shape)
        pieces.append(TensorSlice(tensor.name, tensor.state, tensor.shape, origin, tensor.shape, data, (0,)))
    load(path, pieces, verify="full")
    return {(piece.name, piece.state): piece.data.view(piece.shape) for piece in pieces}
