"""How much memory each rank needs, before anything starts.

Weights, gradients and optimizer follow from the number of parameters (Rajbhandari et al. 2020, arXiv
1910.02054, section 3.1). Activations are what the backward pass keeps of each layer, counted as
Korthikanti et al. 2022 do (arXiv 2205.05198, section 4), here for our block: norms, grouped-query attention
that keeps no scores, and a gated MLP; times the micro-batches that a pipeline stage has in flight (section
4.3). Fragmentation, workspaces of the kernels and communication buffers come on top: plan for a tenth more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.method_memory import Methods, added_numbers, reference_bytes
from trainer.model.architecture import Architecture
from trainer.model.parameters import RankParameters, parameters_per_rank
from trainer.model.transformer import padded_vocab_size

if TYPE_CHECKING:
    from parallel.layout import Layout
    from trainer.model.transformer import Execution


@dataclass(frozen=True)
class Batch:
    """Sizes of a step: tokens a sequence, sequences a micro-batch, micro-batches a step and rank."""

    sequence_length: int
    micro_batch: int
    micro_batches: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage.

    Attributes:
        optimizer: moments, and in bf16 the fp32 master weights.
        logits: of the last stage, with their fp32 softmax.
        added: further states of `[updates]` and `[slow_weights]`, and their copies during an update.
        reference: frozen references of `[[losses]]`, and what they said about a step.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    added: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        model = self.weights + self.gradients + self.optimizer
        return model + self.activations + self.logits + self.added + self.reference


def estimate_memory(
    model: Architecture,
    layout: Layout,
    execution: Execution,
    *,
    world_size: int,
    batch: Batch,
    methods: Methods | None = None,
) -> list[RankMemory]:
    """Memory of a rank of every pipeline stage, first to last."""
    methods = methods or Methods()
    number = 2 if execution.precision == "bf16" else 4
    tokens = batch.micro_batch * batch.sequence_length // layout.context
    layer = layer_activations(model, layout, execution) * tokens
    kept = _boundary(model, layout) * number * tokens if execution.recompute == "full" else layer
    states = 8 + (4 if execution.precision == "bf16" else 0)
    shares = _optimizer_shares(layout, world_size)
    added = added_numbers(methods, model, layout, cuda=execution.cuda)
    references = reference_bytes(methods, model, layout, execution, tokens=tokens * batch.micro_batches)
    ranks = []
    for rank in parameters_per_rank(model, layout, cuda=execution.cuda):
        in_flight = _layers_in_flight(model, layout, rank.stage, batch.micro_batches)
        activations = in_flight * kept + (layer if execution.recompute == "full" else 0)
        last = rank.stage == layout.pipeline - 1
        ranks.append(
            RankMemory(
                stage=rank.stage,
                weights=rank.total * number,
                gradients=rank.total * 4,
                optimizer=_shared(rank, states, shares),
                activations=activations,
                logits=_logits(model, layout, execution) * tokens if last else 0,
                added=_shared(added[rank.stage], 4, shares),
                reference=references[rank.stage],
            )
        )
    return ranks


def layer_activations(model: Architecture, layout: Layout, execution: Execution) -> int:
    """Bytes that one layer keeps for its backward pass, per token of the rank's share of the sequence.

    In numbers, before the split over tensor ranks: the inputs of two norms and of two linear layers, 4
    hidden; q, k, v as projected, q and k once more after RoPE, and the attention's output, 3 query + 3
    key/value (key/value stands for one of the two); the MLP's fc1 output, what the activation keeps, and
    fc2's input. The tensor ranks split the inner widths, and with sequence parallelism the hidden width as
    well. RoPE's tables and the norms' statistics are left out: about one percent.
    """
    number = 2 if execution.precision == "bf16" else 4
    inner = 3 * model.query_size + 3 * model.key_value_size
    inner += model.query_size if model.qk_norm else 0
    mlp = _mlp_widths(model, execution) * model.mlp_size // layout.tensor
    hidden = 4 * _boundary(model, layout)
    softmax = 0 if execution.recompute == "selective" else 4 * model.num_attention_heads // layout.tensor
    if not model.num_experts:
        return number * (hidden + inner // layout.tensor + mlp) + softmax
    # Each tensor rank copies every token to every expert that it goes to, whatever sequence parallelism does.
    routed = model.experts_per_token * (model.hidden_size + mlp)
    router = 20 * model.experts_per_token + 5 * model.num_experts  # indices in 8 bytes, weights, one mask
    return number * (hidden + inner // layout.tensor + routed) + softmax + router


def _mlp_widths(model: Architecture, execution: Execution) -> int:
    """Times the inner width that an MLP keeps: fc1's output, intermediate results, fc2's input."""
    if not model.gated:
        return 2
    # Fused, the activation is computed again; unfused, the activated gate and a copy of up are kept.
    widths = 3 if execution.cuda else 5
    return widths + 1 if model.num_experts and not execution.cuda else widths


def _boundary(model: Architecture, layout: Layout) -> int:
    """Numbers per token between layers: sequence parallelism splits them over the tensor ranks."""
    return model.hidden_size // (layout.tensor if layout.sequence_parallel else 1)


def _layers_in_flight(model: Architecture, layout: Layout, stage: int, micro_batches: int) -> int:
    """Layers times micro-batches whose activations a stage keeps at its fullest (1F1B and interleaved)."""
    chunks, stages = layout.chunks, layout.pipeline
    per_chunk = model.num_layers // (stages * chunks)
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    return per_chunk * min(ahead + 1, micro_batches * chunks)


def _logits(model: Architecture, layout: Layout, execution: Execution) -> int:
    """Bytes per token: the logits, and the fp32 softmax that the loss keeps."""
    rows = padded_vocab_size(model.vocab_size, layout.tensor, cuda=execution.cuda) // layout.tensor
    return rows * ((2 if execution.precision == "bf16" else 4) + 4)


def _shared(rank: RankParameters, number: int, shares: tuple[int, int]) -> int:
    """Bytes of states with `number` of them a parameter, shared by so many ranks: dense ones, experts."""
    return number * rank.dense // shares[0] + number * rank.expert // shares[1]


def _optimizer_shares(layout: Layout, world_size: int) -> tuple[int, int]:
    """Ranks that share one copy of the states of dense parameters, and of expert ones."""
    if not layout.distributed_optimizer:
        return 1, 1
    spread = world_size // (layout.tensor * layout.pipeline)
    return spread, max(1, spread // layout.expert)
