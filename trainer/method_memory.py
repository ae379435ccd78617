"""Memory of `[updates]`, `[slow_weights]` and `[[losses]]`, beside the model and its optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.losses.config import AuxLossConfig
from trainer.model.architecture import Architecture
from trainer.model.parameters import (
    RankParameters,
    is_expert,
    logical_parameters,
    parameters_per_rank,
    stage_parameters,
)
from trainer.model.transformer import padded_vocab_size
from trainer.updates.config import SlowWeightsConfig, UpdatesConfig
from trainer.updates.selection import anchored_names, frozen_names

if TYPE_CHECKING:
    from parallel.layout import Layout
    from trainer.model.transformer import Execution

_ANCHOR_STATES = {"l2": 1, "ewc": 2, "si": 3}
"""The anchor; its importance; the path integral."""


@dataclass(frozen=True)
class Methods:
    """The sections of a run file that need memory of their own."""

    updates: UpdatesConfig = field(default_factory=UpdatesConfig)
    slow_weights: SlowWeightsConfig = field(default_factory=SlowWeightsConfig)
    losses: tuple[AuxLossConfig, ...] = ()


def added_numbers(
    methods: Methods, model: Architecture, layout: Layout, *, cuda: bool = False
) -> list[RankParameters]:
    """fp32 numbers of a rank of each pipeline stage, before data ranks share them as they do moments.

    They are the states that methods add, and the copies of weights that live during an update. What takes
    the memory of one tensor after the other for a moment is left out. Where only some parameters are chosen,
    a data rank may hold more of them than another: the numbers are those of the mean rank.
    """
    states, copies = _chosen(methods, list(logical_parameters(model)))
    ranks = []
    for number, held in enumerate(stage_parameters(model, layout, cuda=cuda)):
        added = [name for names in states for name in _sharing_memory(names, held)]
        added += [name for names in copies for name in held if name in names]
        expert = sum(held[name] for name in added if is_expert(name))
        dense = sum(held[name] for name in added) - expert
        ranks.append(RankParameters(number, dense, expert // layout.expert))
    return ranks


def _chosen(methods: Methods, names: Sequence[str]) -> tuple[list[set[str]], list[set[str]]]:
    """Parameters that have each state, and those that each copy during an update is of."""
    updates, slow = methods.updates, methods.slow_weights
    frozen, anchored = frozen_names(updates, names), anchored_names(updates, names)
    states, copies = [], [frozen]
    if updates.anchor is not None:
        states += [anchored] * _ANCHOR_STATES[updates.anchor.kind]
        copies += [anchored] if updates.anchor.kind == "si" else []
    if slow.kind is not None:
        states.append(set(names) - frozen if slow.kind == "reptile" else set(names))
    return states, copies


def _sharing_memory(names: Collection[str], held: Mapping[str, int]) -> list[str]:
    """Those of a stage whose memory has the state: q, k and v are one tensor there, and gate and up."""
    tensors = {_tensor(name) for name in names}
    return [name for name in held if _tensor(name) in tensors]


def _tensor(name: str) -> str:
    return re.sub(r"\.([qkv]|gate|up)_proj\.", lambda m: ".mlp_in." if len(m[1]) > 1 else ".qkv.", name)


def reference_bytes(
    methods: Methods, model: Architecture, layout: Layout, execution: Execution, *, tokens: int
) -> list[int]:
    """Bytes of the frozen references on a rank of each pipeline stage, with what they said about a step.

    A reference is taken to be as large as the model. Under a layout of its own the rank with most counts.

    Args:
        tokens: that a rank of the last stage sees in a step, over all of its micro-batches.
    """
    found = [0] * layout.pipeline
    for loss in methods.losses:
        if loss.kind != "kl":
            continue
        if loss.cache is None:
            weights = _weights(model, loss.layout or layout, execution)
            found = [had + max(_beside(weights, s, layout.pipeline)) for s, had in enumerate(found)]
        found[-1] += tokens * _answer_bytes(loss, model, layout, cuda=execution.cuda)
    return found


def _weights(model: Architecture, layout: Layout, execution: Execution) -> list[int]:
    number = 2 if execution.precision == "bf16" else 4
    return [rank.total * number for rank in parameters_per_rank(model, layout, cuda=execution.cuda)]


def _beside(weights: Sequence[int], stage: int, stages: int) -> Sequence[int]:
    """Of the reference's stages those on the ranks of this stage of the training."""
    first, last = stage * len(weights) // stages, -(-(stage + 1) * len(weights) // stages)
    return weights[first:last]


def _answer_bytes(loss: AuxLossConfig, model: Architecture, layout: Layout, *, cuda: bool) -> int:
    """Of one token: fp32 log-probabilities of all tokens, or the likeliest ones and the rest as one."""
    likeliest = loss.top_k
    if loss.cache is not None:
        from trainer.losses.cache import CacheHeader  # brings torch, which no wrong key needs

        likeliest = CacheHeader.load(loss.cache).top_k
    if likeliest is not None:
        return 8 * likeliest + 4
    return 4 * padded_vocab_size(model.vocab_size, layout.tensor, cuda=cuda) // layout.tensor
