"""What a reader finds in a checkpoint of any trainer, before the language says what it means.

A reader knows a format's files; it knows no model. It gives every stored tensor the source's own name and
shape, and says of which file which bytes are which box of it. The language (`checkpoint.language`) then maps
source tensors to logical ones, and `checkpoint.assembly.assemble` makes a `Manifest` of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from checkpoint.boxes import Box
from checkpoint.manifest import Piece

Axis = Literal["tensor", "pipeline", "virtual", "expert", "expert_tensor", "data"]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as one rank of the source saw it, or a whole one where the format stores whole tensors.

    Attributes:
        name: the source's name of the parameter, e.g. "decoder.layers.0.mlp.linear_fc2.weight".
        state: "weight", "master", "exp_avg", "exp_avg_sq", or the optimizer's own word for anything else.
        shape: of what this rank held. Boxes of `pieces` count in it.
        pieces: which bytes are which box; they need not cover the shape (another data rank has the rest),
            and files are absolute paths.
        at: coordinates of the rank; an axis that is absent means that the tensor is the same on all of it.
            Tensors alike but for "data" are parts or replicas of one.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    at: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """Settings that an optimizer applies to some parameters (source names): lr, weight_decay, betas..."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass
class Source:
    """Everything that a reader says of a checkpoint. JSON-able values only, except for paths and tensors.

    Attributes:
        format: what was recognised, in words: "DeepSpeed ZeRO-2, 3 data ranks, bf16".
        folder: that was read.
        step: optimizer steps (iterations) that the trainer had done; 0 where the format does not say.
        degrees: of the axes of `SourceTensor.at`.
        facts: whole numbers about the model under the names of `Architecture` (num_layers, hidden_size,
            num_attention_heads, num_query_groups, head_dim, vocab_size, num_experts, ...), as far as known.
        layers: (pipeline rank, virtual stage) -> global numbers of its layers, where names count locally.
        scalars: per-parameter numbers: state -> source name -> value, such as {"step": {...}}.
        groups: the optimizer's parameter groups.
        state: what else is carried, under the source's own words (scheduler, samples seen, arguments).
        model_config: a Hugging Face config.json that lies beside.
        specs: shipped specs to try, the likeliest first; empty means all.
        universal_info: DeepSpeed's own `universal_checkpoint_info`, where the checkpoint has one.
        left_out: what the files hold that is not carried, a line each.
        notes: what a reader of the report should know, a line each.
        problems: damage found while reading the headers, a line each; nothing is loaded when there is any.
        optimizer_problems: those of `problems` that concern masters and optimizer states alone, not weights.
        world_size: how many ranks saved it; None where the files do not say.
    """

    format: str
    folder: Path
    step: int = 0
    tensors: list[SourceTensor] = field(default_factory=list)
    degrees: dict[str, int] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)
    layers: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    scalars: dict[str, dict[str, float | int]] = field(default_factory=dict)
    groups: list[ParameterGroup] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] | None = None
    specs: tuple[str, ...] = ()
    universal_info: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    optimizer_problems: list[str] = field(default_factory=list)
    world_size: int | None = None

    @property
    def num_ranks(self) -> int:
        """How many ranks saved it; where the files do not say, as few as the degrees need.

        Virtual stages are on the same ranks, and experts on those that hold the rest of a stage.
        """
        if self.world_size:
            return self.world_size
        degree = {axis: self.degrees.get(axis, 1) for axis in ("tensor", "pipeline", "data", "expert")}
        expert_tensor = self.degrees.get("expert_tensor", degree["tensor"])
        of_stage = math.lcm(degree["tensor"] * degree["data"], degree["expert"] * expert_tensor)
        return degree["pipeline"] * of_stage


class Part(NamedTuple):
    """A region of a stored (source or target) tensor that is a box of a logical tensor.

    Element k (counted along the logical axes) of the logical box lies in the stored tensor at
    `start[a] + k[i] * steps[a]` for the stored axis a = axes[i], and at `start[a]` on axes that no logical
    axis has. A plain shard has steps of 1 and axes (0, 1, ...); a transposed matrix has axes (1, 0); a stack
    of layers has a stored axis more; rotary halves stored interleaved have a step of 2.

    Attributes:
        name: logical name.
        shape: of the whole logical tensor.
        box: which elements of the logical tensor.
        start: of the region in the stored tensor, one number a stored axis.
        axes: for every logical axis, the stored axis it lies along.
        steps: one number a stored axis.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    start: tuple[int, ...]
    axes: tuple[int, ...]
    steps: tuple[int, ...]


def plain_part(name: str, shape: tuple[int, ...]) -> Part:
    """The stored tensor is the logical one."""
    zeros = (0,) * len(shape)
    return Part(name, shape, Box(zeros, shape), zeros, tuple(range(len(shape))), (1,) * len(shape))
