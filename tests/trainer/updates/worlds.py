"""Steps of the tiny model with `[updates]` and `[slow_weights]`, with what each step's gradient was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.engine import Engine
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from parallel.transforms import Phase
from tests.proof.gather import copy_slices
from tests.proof.worlds import World, build, step
from tools.layouts import random_batch
from trainer.data.batch import MicroBatch
from trainer.model.parameters import logical_parameters
from trainer.updates.config import AnchorConfig, SlowWeightsConfig, UpdatesConfig
from trainer.updates.fisher import Sequences
from trainer.updates.hook import Updates


@dataclass(frozen=True)
class Setup:
    """A world and what acts on its updates; `anchor` and so on as in a run file."""

    world: World = field(default_factory=World)
    freeze: tuple[str, ...] = ()
    anchor: Mapping[str, Any] | None = None
    slow: Mapping[str, Any] = field(default_factory=dict)

    def open(self, engine: Engine) -> Updates:
        """The states are added; `start` fills them."""
        anchor = AnchorConfig(**self.anchor) if self.anchor else None
        return Updates(
            engine,
            UpdatesConfig(freeze=self.freeze, anchor=anchor),
            SlowWeightsConfig(**self.slow),
            names=list(logical_parameters(self.world.architecture)),
        )


def draw(config: AnchorConfig) -> Iterator[Sequences]:
    """Random sequences in place of a corpus."""
    for number in range(config.batches):
        yield [sequence(900 + number, index) for index in range(config.sequences)]


def sequence(number: int, index: int) -> MicroBatch:
    """A random sequence, as the trainer's own micro-batch."""
    batch = random_batch(number, index)
    return MicroBatch(**{one.name: getattr(batch, one.name) for one in dataclasses.fields(MicroBatch)})


def start(updates: Updates, missing: frozenset[tuple[str, str]] | None = None, **given: Any) -> list[str]:
    """Begin a stage from nothing, unless told otherwise."""
    return updates.begin(missing, **{"new_stage": True, "state": None, "draw": draw, **given})


@dataclass
class Recorder:
    """Keeps the gradient of every step by parameter, as Adam sees it. On one rank."""

    engine: Engine
    phase: Phase = Phase.MASK
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def before(self, lr: float) -> None:
        found: dict[str, list[torch.Tensor]] = {}
        for piece in self.engine.pieces:  # the rows of one tensor come in their order
            found.setdefault(piece.name, []).append(piece.gradient)
        self.gradients.append({name: torch.cat(runs) for name, runs in found.items()})

    def after(self, lr: float) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """What one rank saw: its slices before the first step and later, the gradients, losses, notes."""

    slices: list[list[TensorSlice]]
    gradients: list[dict[str, torch.Tensor]]
    losses: list[float]
    notes: list[str]
    state: dict[str, Any]


def run(setup: Setup, lrs: Sequence[float] = (1e-3,) * 3, every: int = 1) -> Run:
    """A stage from nothing with these learning rates; a target for `run_ranks`.

    Args:
        every: slices are copied after so many steps, and before the first.
    """
    engine = build(setup.world)
    updates = setup.open(engine)
    notes = start(updates)
    recorder = Recorder(engine)
    if setup.world.ranks == 1:
        engine.transforms.append(recorder)
    slices, losses = [copy_slices(engine)], []
    for number, lr in enumerate(lrs):
        losses.append(step(engine, number, lr=lr).loss)
        if (number + 1) % every == 0:
            slices.append(copy_slices(engine))
    destroy_mesh()
    return Run(slices, recorder.gradients, losses, notes, updates.state())


def runs(setups: Sequence[Setup]) -> list[Run]:
    """Three steps of each, one after another in one process; a target for `run_ranks`."""
    return [run(setup, every=3) for setup in setups]
