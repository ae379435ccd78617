"""Parity of two checkpoints: one computed by Ratoon on a layout, the other by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.layout import Layout
from trainer.model.architecture import Architecture
from trainer.model.of_checkpoint import architecture_of, stated_fields
from trainer.parity.report import ParityReport
from trainer.parity.suspects import configuration_suspects, place_suspects, weight_suspects

if TYPE_CHECKING:
    import torch

    from checkpoint.opening import Opened

_EMBEDDING = "model.embed_tokens."
_END = ("model.norm.", "lm_head.", _EMBEDDING)


@dataclass(frozen=True)
class ParityJob:
    """What is compared.

    Attributes:
        ours: the checkpoint that Ratoon computes, in any format.
        theirs: the Hugging Face folder that transformers computes.
        model: the architecture that Ratoon computes `ours` with.
        spec, facts: as under `[checkpoint]`, for `ours`.
        length: tokens of a sequence.
    """

    ours: Path
    theirs: Path
    model: Architecture
    layout: Layout
    precision: str = "fp32"
    spec: str | None = None
    facts: Mapping[str, int] = field(default_factory=dict)
    length: int = 64


def run_parity(job: ParityJob) -> ParityReport:
    """On every rank of the layout together: build the model, load it, compare. The same report everywhere."""
    import torch

    from checkpoint.load import load
    from checkpoint.opening import open_checkpoint
    from parallel.mesh import build_mesh
    from trainer.build import build_engine, execution_here
    from trainer.optimizer import OptimizerConfig
    from trainer.parity.gate import measure

    torch.manual_seed(0)
    execution = execution_here(precision=job.precision)
    mesh = build_mesh(job.layout)
    engine = build_engine(
        mesh, job.model, OptimizerConfig(), execution, sequence_length=job.length, seed=None
    )
    opened = open_checkpoint(job.ours, spec=job.spec, facts=job.facts)
    load(opened, engine.slices(), rank=mesh.rank, weights_only=True)
    return measure(engine, job.theirs, length=job.length)


def architectures(opened: Opened, theirs: Opened) -> tuple[Architecture, Architecture]:
    """What each side says it is; what one leaves open is taken from the other.

    Raises:
        ValueError: the Hugging Face folder has no config.json, or one of a family that is not supported.
    """
    reference = architecture_of(theirs)
    if reference is None:
        raise ValueError(
            f"{theirs.folder} has no config.json, so transformers cannot compute it: give a "
            "Hugging Face folder"
        )
    return reference.model_copy(update=stated_fields(opened)), reference


def with_suspects(
    report: ParityReport, ours: Opened, theirs: Opened, models: tuple[Architecture, Architecture]
) -> ParityReport:
    """The report with likely causes: settings, weights near the first difference, or else the place."""
    if report.same or report.first is None:
        return report
    near = _near(report.first.point)
    mine, other = (_weights(side, near) for side in (ours, theirs))
    found = configuration_suspects(*models) + weight_suspects(mine, other, models[0])
    return replace(report, suspects=tuple(found or place_suspects(report.first.point, models[0])))


def _near(point: str) -> tuple[str, ...]:
    """Prefixes of the logical names that a point's numbers come from."""
    words = point.split()
    if words[0] == "layer":
        return (f"model.layers.{words[1]}.",)
    return (_EMBEDDING,) if point == "embedding" else _END


def _weights(opened: Opened, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Weights, or masters where there are no weights."""
    from checkpoint.whole import read_whole

    chosen = {
        tensor.name: tensor
        for state in ("master", "weight")
        for tensor in opened.manifest.tensors
        if tensor.state == state and tensor.name.startswith(prefixes)
    }
    return {name: read_whole(opened.folder, tensor) for name, tensor in chosen.items()}
