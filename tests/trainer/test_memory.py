"""The memory estimate against tensors that real layers keep, and against hand-made sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from tests.ranks import run_ranks
from trainer.build import build_engine
from trainer.memory import Batch, RankMemory, estimate_memory, layer_activations
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.parameters import parameters_per_rank
from trainer.model.transformer import Execution
from trainer.optimizer import OptimizerConfig

TINY = dict(hidden_size=64, ffn_hidden_size=192, num_attention_heads=8, num_query_groups=4, vocab_size=64)
MOE = dict(TINY, num_experts=4, moe_ffn_hidden_size=64)
TP2_SP = Layout(tensor=2, sequence_parallel=True)
SEQUENCE, MICRO_BATCH = 128, 2


def architecture(num_layers: int = 4, **fields: Any) -> Architecture:
    return ModelConfig(**(TINY | fields), num_layers=num_layers).resolve()


def kept_bytes(layout: Layout, model: Architecture, execution: Execution) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for the backward, without parameters."""
    mesh = build_mesh(layout)
    engine = build_engine(mesh, model, OptimizerConfig(), execution, sequence_length=SEQUENCE, seed=1)
    parameters = {p.untyped_storage().data_ptr() for p in engine.chunks[0].parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.arange(MICRO_BATCH * SEQUENCE).view(MICRO_BATCH, SEQUENCE) % 64
    documents = torch.zeros_like(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.chunks[0](input_ids=tokens, position_ids=tokens, attention_mask=documents, labels=tokens).sum()
    destroy_mesh()
    return sum(storage.nbytes() for storage in kept.values())


def kept_by_two_layers(layout: Layout, fields: dict[str, Any], execution: Execution) -> int:
    few, many = (kept_bytes(layout, architecture(layers, **fields), execution) for layers in (2, 4))
    return many - few


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        (Layout(), TINY),
        (Layout(), TINY | {"qk_norm": True}),
        (Layout(), TINY | {"activation": "gelu"}),
        (Layout(tensor=2), TINY),
        (TP2_SP, TINY),
        (Layout(), MOE),
        (TP2_SP, MOE),
    ],
    ids=["dense", "qk_norm", "gelu", "tp2", "tp2_sp", "moe", "moe_tp2_sp"],
)
def test_a_layer_keeps_what_the_formula_says(layout: Layout, fields: dict[str, Any]) -> None:
    measured = run_ranks(kept_by_two_layers, layout.tensor, layout, fields, Execution())[0]
    formula = 2 * layer_activations(architecture(**fields), layout, Execution()) * MICRO_BATCH * SEQUENCE
    # The formula leaves out RoPE's tables and the norms' statistics: a few numbers per token, which weigh
    # most at these tiny widths.
    assert formula <= measured <= 1.04 * formula


def test_full_recompute_keeps_the_inputs_of_layers_alone() -> None:
    measured = run_ranks(kept_by_two_layers, 1, Layout(), TINY, Execution(recompute="full"))[0]
    assert measured == 2 * 4 * 64 * MICRO_BATCH * SEQUENCE


def memory(
    layout: Layout, execution: Execution, *, world_size: int, micro_batches: int = 8
) -> list[RankMemory]:
    return estimate_memory(
        architecture(),
        layout,
        execution,
        world_size=world_size,
        batch=Batch(sequence_length=SEQUENCE, micro_batch=MICRO_BATCH, micro_batches=micro_batches),
    )


@pytest.mark.parametrize(
    ("precision", "bytes_per_parameter"),
    [("fp32", 4 + 4 + 8), ("bf16", 2 + 4 + 12)],  # weight + gradient + moments, and masters in bf16
)
def test_bytes_per_parameter(precision: Any, bytes_per_parameter: int) -> None:
    rank = memory(Layout(), Execution(precision), world_size=1)[0]
    parameters = parameters_per_rank(architecture(), Layout())[0].total
    assert rank.weights + rank.gradients + rank.optimizer == bytes_per_parameter * parameters


def test_distributed_optimizer_shares_states_over_data_and_context() -> None:
    execution = Execution("bf16")
    whole = memory(Layout(context=2, distributed_optimizer=False), execution, world_size=8)[0]
    shared = memory(Layout(context=2), execution, world_size=8)[0]
    assert shared.optimizer == whole.optimizer // 8
    assert shared.weights == whole.weights


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    stages = memory(Layout(pipeline=4), Execution(), world_size=4)
    assert [s.activations // stages[-1].activations for s in stages] == [4, 3, 2, 1]


def test_no_more_in_flight_than_micro_batches() -> None:
    stages = memory(Layout(pipeline=4), Execution(), world_size=4, micro_batches=2)
    assert [s.activations // stages[-1].activations for s in stages] == [2, 2, 2, 1]


def test_interleaving_costs_the_first_stage_what_the_paper_says() -> None:
    """A factor 1 + (p - 1) / (p m) over 1F1B on the first stage, arXiv 2205.05198, section 4.3."""
    plain = memory(Layout(pipeline=2), Execution(), world_size=2)[0]
    interleaved = memory(Layout(pipeline=2, virtual_pipeline=2), Execution(), world_size=2)[0]
    assert interleaved.activations == plain.activations * (1 + 1 / 4)


def test_context_ranks_share_the_sequence() -> None:
    one, two = (memory(Layout(context=c), Execution(), world_size=2)[0] for c in (1, 2))
    assert two.activations == one.activations // 2
    assert two.logits == one.logits // 2


def test_only_the_last_stage_has_logits() -> None:
    first, last = memory(Layout(pipeline=2), Execution(), world_size=2)
    assert first.logits == 0
    assert last.logits == MICRO_BATCH * SEQUENCE * 64 * (4 + 4)
