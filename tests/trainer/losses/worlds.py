"""Steps of the tiny model with auxiliary losses, and the same by torch's own functions on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from parallel.engine import Engine
from parallel.frozen import FrozenModel
from parallel.layout import Layout
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices
from tests.proof.worlds import GLOBAL_BATCH, SOURCES, World, batches, build
from tools.layouts import SEQUENCE, RandomBatch
from trainer.build import execution_here
from trainer.data.config import SourceConfig
from trainer.losses.auxiliary import AuxLosses
from trainer.losses.config import AuxLossConfig
from trainer.losses.opening import Origin, Setting, open_losses, open_reference
from trainer.optimizer import OptimizerConfig
from trainer.step import StepReport, train_step

NAMED = [SourceConfig(name=name, path=name) for name in SOURCES]
REFERENCE = 2  # seed of the reference, where it is not what the model starts from
LOSSES: tuple[dict[str, Any], ...] = (
    {"kind": "kl", "weight": 0.5, "sources": ["odd"]},
    {"kind": "kl", "name": "reverse", "weight": 0.3, "direction": "reverse", "temperature": 2.0},
    {"kind": "kl", "name": "likeliest", "weight": 0.2, "top_k": 16},
    {"kind": "z", "weight": 1e-3, "sources": ["e*"]},
)


@dataclass(frozen=True)
class Case:
    """A world with losses."""

    world: World = field(default_factory=World)
    losses: Sequence[dict[str, Any]] = LOSSES
    seed: int = REFERENCE
    steps: int = 1

    @staticmethod
    def of(ranks: int, layout: Layout | None = None, **more: Any) -> Case:
        optimizer = OptimizerConfig(lr=1e-3, clip=None)
        preset = more.pop("preset", "tiny")
        precision, model = more.pop("precision", "fp32"), more.pop("model", {})
        world = World(ranks, layout or Layout(), preset, model, precision, optimizer=optimizer)
        return Case(world, **more)


@dataclass(frozen=True)
class Found:
    """What one rank knows after the steps."""

    reports: list[StepReport]
    slices: list[TensorSlice]


def setting(case: Case, engine: Engine) -> Setting:
    return Setting(
        engine=engine,
        model=case.world.architecture,
        execution=execution_here(precision=case.world.precision),
        sequence_length=SEQUENCE,
        global_batch=GLOBAL_BATCH,
        sources=NAMED,
        origin=Origin(None, case.seed),
    )


def opened(case: Case, engine: Engine) -> AuxLosses:
    return open_losses([AuxLossConfig(**one) for one in case.losses], setting(case, engine))


def stepped(case: Case) -> Found:
    """Train; a target for `run_ranks`."""
    engine = build(case.world)
    losses = opened(case, engine)
    reports = [
        train_step(engine, batches(engine, number), lr=1e-3, source_names=SOURCES, losses=losses.at(number))
        for number in range(case.steps)
    ]
    return Found(reports, copy_slices(engine))


@dataclass
class Plain:
    """The same step without any of our losses: torch's functions on whole logits, and autograd."""

    case: Case
    means: dict[str, float] = field(default_factory=dict)

    def run(self) -> tuple[dict[str, float], list[TensorSlice]]:
        """The mean of every loss over its tokens, and the state after one update."""
        engine = build(self.case.world)
        frozen, _ = open_reference(
            AuxLossConfig(kind="kl", weight=1.0), setting(self.case, engine), engine.mesh, None
        )
        parts = batches(engine, 0)
        tokens = sum(float(part.loss_weights.sum()) for part in parts)
        engine.zero_grad()
        engine.wrapped[0].train()
        sums: dict[str, list[float]] = {}
        for part in parts:
            objective = self._objective(part, _logits(engine, part), _reference(frozen, part), sums)
            (objective / tokens).backward()
        engine.update(1e-3, engine.gradient_norm())
        self.means = {name: total / count for name, (total, count) in sums.items()}
        return self.means, copy_slices(engine)

    def _objective(
        self, part: RandomBatch, logits: torch.Tensor, other: torch.Tensor, sums: dict[str, list[float]]
    ) -> torch.Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="none")
        objective = (losses * part.loss_weights.flatten()).sum()
        for one in self.case.losses:
            config = AuxLossConfig(**one)
            chosen = torch.tensor(config.chosen(NAMED))[part.sources.long()]
            weights = part.loss_weights * chosen
            total = (_token_loss(config, logits, other) * weights).sum()
            count = sums.setdefault(config.label, [0.0, 0.0])
            count[0] += float(total)
            count[1] += float(weights.sum())
            objective = objective + config.weight * total
        return objective


def plain(case: Case) -> tuple[dict[str, float], list[TensorSlice]]:
    return Plain(case).run()


def _logits(engine: Engine | FrozenModel, part: RandomBatch) -> torch.Tensor:
    return engine.wrapped[0](part.tokens, part.positions, part.documents)


def _reference(frozen: FrozenModel, part: RandomBatch) -> torch.Tensor:
    with torch.no_grad():
        return _logits(frozen, part)


def _token_loss(config: AuxLossConfig, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if config.kind == "z":
        return logits.logsumexp(-1) ** 2
    log_q, log_p = (F.log_softmax(one / config.temperature, -1) for one in (logits, other))
    if config.top_k:
        chosen = log_p.topk(config.top_k).indices
        log_q, log_p = (_bins(one, chosen) for one in (log_q, log_p))
    if config.direction == "reverse":
        log_q, log_p = log_p, log_q
    return (log_p.exp() * (log_p - log_q)).sum(-1) * config.temperature**2


def _bins(log_p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    rest = log_p.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, chosen), rest], -1)
