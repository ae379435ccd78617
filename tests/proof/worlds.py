"""One tiny model on any layout: engines, steps, and what the ranks hold afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices
from tools.layouts import SEQUENCE, VOCABULARY, Case, RandomBatch, random_batch
from trainer.build import build_engine, execution_here
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.step import StepReport, train_step

SOURCES = ("even", "odd")
GLOBAL_BATCH = 6  # divides over 1, 2 and 3 data ranks


@dataclass(frozen=True)
class World:
    """A layout on so many ranks, and the model that they share."""

    ranks: int = 1
    layout: Layout = field(default_factory=Layout)
    preset: str = "tiny"
    model: Mapping[str, Any] = field(default_factory=dict)  # fields that differ from the preset
    precision: str = "fp32"
    recompute: str = "none"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))

    @staticmethod
    def of(case: Case) -> World:
        preset = "tiny-moe" if case.moe else "tiny"
        return World(case.ranks, case.layout, preset, recompute=case.recompute)

    @property
    def architecture(self) -> Architecture:
        return ModelConfig(preset=self.preset, **self.model).resolve(VOCABULARY)


@dataclass(frozen=True)
class Trained:
    """What one rank knows after some steps."""

    reports: list[StepReport]
    slices: list[TensorSlice]


def build(world: World, *, seed: int = 1) -> Engine:
    """This rank's engine with its initial weights."""
    execution = execution_here(precision=world.precision, recompute=world.recompute)
    mesh = build_mesh(world.layout)
    return build_engine(
        mesh, world.architecture, world.optimizer, execution, sequence_length=SEQUENCE, seed=seed
    )


def batches(engine: Engine, number: int) -> list[RandomBatch]:
    """This data rank's sequences of a step, one a micro-batch."""
    mine = range(engine.mesh.data_rank, GLOBAL_BATCH, engine.mesh.data)
    return [random_batch(number, index) for index in mine]


def step(engine: Engine, number: int, *, lr: float = 1e-3) -> StepReport:
    """One training step on the batches of that number."""
    return train_step(engine, batches(engine, number), lr=lr, source_names=SOURCES)


def train(world: World, steps: int) -> Trained:
    """Build and train; a target for `run_ranks`."""
    engine = build(world)
    reports = [step(engine, number) for number in range(steps)]
    return Trained(reports, copy_slices(engine))
