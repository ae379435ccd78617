"""Auxiliary losses of a run, with the frozen models that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.load import load
from checkpoint.opening import open_checkpoint
from parallel.engine import Engine
from parallel.frozen import FrozenModel
from parallel.initialise import normal_draw
from parallel.mesh import Mesh
from parallel.second_mesh import SecondMesh
from trainer.data.choice import Described
from trainer.losses.auxiliary import AuxLosses, Term, TokenLoss
from trainer.losses.cache import CachedTargets, CacheHeader, header_problems
from trainer.losses.config import START, AuxLossConfig
from trainer.losses.elsewhere import OtherLayout
from trainer.losses.kinds import KLLoss, Targets, ZLoss
from trainer.losses.targets import Reading, SameLayout
from trainer.model.architecture import Architecture
from trainer.model.of_checkpoint import stated_fields
from trainer.model.transformer import Execution, gpt_arguments, transformer_config


@dataclass(frozen=True)
class Origin:
    """What the stage started from.

    Attributes:
        path: of the checkpoint; None where the weights were drawn.
        seed: they were drawn from.
        spec, facts: as `checkpoint.spec` and `checkpoint.facts`.
    """

    path: Path | None
    seed: int
    spec: str | None = None
    facts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a run is, as far as its losses need to know."""

    engine: Engine
    model: Architecture
    execution: Execution
    sequence_length: int
    global_batch: int
    sources: Sequence[Described]
    origin: Origin
    document_mask: bool = True


def open_losses(
    configs: Sequence[AuxLossConfig], setting: Setting, state: Mapping[str, Any] | None = None
) -> AuxLosses:
    """Build the losses and load their references. A collective.

    Args:
        state: of the run's own checkpoint that it goes on from: it says which reference `start` was.

    Raises:
        ValueError: on every rank: a reference is not there, does not fit, or is another one than it was.
    """
    terms = []
    for config in configs:
        saved = (state or {}).get(config.label)
        loss = _open(config, setting, saved)
        terms.append(Term(config, loss, config.chosen(setting.sources)))
    return AuxLosses(terms)


def _open(config: AuxLossConfig, setting: Setting, saved: Mapping[str, Any] | None) -> TokenLoss:
    group = setting.engine.mesh.groups.tp
    if config.kind == "z":
        return ZLoss(group)
    targets = _targets(config, setting, saved)
    return KLLoss(targets, group, temperature=config.temperature, reverse=config.direction == "reverse")


def _targets(config: AuxLossConfig, setting: Setting, saved: Mapping[str, Any] | None) -> Targets:
    reading = Reading(config.chosen(setting.sources), config.temperature, config.top_k, setting.document_mask)
    mesh = setting.engine.mesh
    if config.cache is not None:
        return CachedTargets(config.cache, mesh, reading, _cached(config, config.cache, setting))
    if config.layout is None or config.layout == mesh.layout:
        model, identity = open_reference(config, setting, mesh, saved)
        return SameLayout(model, reading, identity)
    second = SecondMesh(config.layout)
    with second.active():
        model, identity = open_reference(config, setting, second.mesh, saved)
    return OtherLayout(mesh, second, model, reading, identity)


def _cached(config: AuxLossConfig, folder: Path, setting: Setting) -> CacheHeader:
    header = CacheHeader.load(folder)
    expected = {
        "temperature": config.temperature,
        "vocab_size": setting.model.vocab_size,
        "sequence_length": setting.sequence_length,
        "global_batch": setting.global_batch,
        "document_mask": setting.document_mask,
    }
    if problems := header_problems(header, expected):
        raise ValueError(f"losses {config.label!r}: {folder}: {'; '.join(problems)}; make the targets anew")
    return header


def open_reference(
    config: AuxLossConfig, setting: Setting, mesh: Mesh, saved: Mapping[str, Any] | None
) -> tuple[FrozenModel, dict[str, Any]]:
    """The frozen model on `mesh`, and what identifies it in a checkpoint.

    It computes in the run's precision, without FP8, whose scaling would need a history of its own.
    """
    origin, name = setting.origin, f"losses {config.label!r}"
    is_start = config.reference == START
    path = origin.path if is_start else Path(config.reference)
    if is_start and saved is not None:
        path = Path(saved["path"]) if saved["path"] is not None else None
    if path is None:
        model = _build(setting, setting.model, mesh)
        seed = origin.seed if saved is None else int(saved["seed"])
        model.initialise(seed, normal_draw(setting.model.init_std, setting.model.num_layers))
        return model, {"path": None, "seed": seed}
    try:
        opened = (
            open_checkpoint(path, spec=origin.spec, facts=origin.facts)
            if is_start
            else open_checkpoint(path, spec=config.spec)
        )
    except ValueError as error:
        raise ValueError(f"{name}: the reference cannot be opened: {error}") from error
    opened = opened.weights_alone()
    identity = {"path": str(opened.folder), "digest": opened.digest}
    if saved is not None and saved.get("digest") != opened.digest:
        raise ValueError(
            f"{name}: {opened.folder} is not the reference that this run began with ({saved['path']}): the "
            "loss would pull elsewhere. Give that one, or give the loss another name"
        )
    architecture = setting.model.model_copy(update=stated_fields(opened))
    if architecture.vocab_size != setting.model.vocab_size:
        raise ValueError(
            f"{name}: {path} has a vocabulary of {architecture.vocab_size} tokens, the model of "
            f"{setting.model.vocab_size}: only distributions over the same tokens can be compared"
        )
    model = _build(setting, architecture, mesh)
    load(opened, model.slices(), rank=mesh.rank, weights_only=True)
    return model, identity


def _build(setting: Setting, model: Architecture, mesh: Mesh) -> FrozenModel:
    execution = dataclasses.replace(setting.execution, fp8="off", recompute="none")
    arguments = gpt_arguments(model, mesh.layout, execution, sequence_length=setting.sequence_length)
    return FrozenModel(
        mesh,
        transformer_config(model, mesh.layout, execution),
        dataclasses.asdict(arguments),
        vocab_size=model.vocab_size,
        portable=not execution.transformer_engine,
    )
