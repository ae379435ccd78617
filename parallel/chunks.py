"""megatron-core's model, cut into the chunks that one rank of a mesh has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.mesh import Mesh
from parallel.naming import NamedParameter, name_parameters
from parallel.specs import Backend, block_spec


def build_chunks(
    mesh: Mesh, config: TransformerConfig, model: Mapping[str, Any], *, backend: Backend, vocab_size: int
) -> tuple[list[GPTModel], list[NamedParameter]]:
    """This rank's chunks, one per virtual stage, and all of their parameters with their logical blocks.

    The weights are whatever memory held.

    Args:
        config: as `with_hooks` returns it.
        model: further arguments of GPTModel (padded vocab_size, max_sequence_length, rotary_base, ...).
        vocab_size: of the tokenizer, without padding.
    """
    stages = range(mesh.layout.chunks)
    chunks = [_chunk(mesh, config, model, backend=backend, stage=stage) for stage in stages]
    for chunk in chunks:
        _mask_padded_logits(chunk, mesh.tensor_rank, vocab_size)
    tied = bool(model.get("share_embeddings_and_output_weights", False))
    return chunks, name_parameters(chunks, mesh, vocab_size=vocab_size, tied=tied)


def _chunk(
    mesh: Mesh, config: TransformerConfig, model: Mapping[str, Any], *, backend: Backend, stage: int
) -> GPTModel:
    layout = mesh.layout
    vp_stage = stage if layout.virtual_pipeline else None
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, backend, vp_stage),
        pre_process=mesh.pipeline_rank == 0 and stage == 0,
        post_process=mesh.is_last_stage and stage == layout.chunks - 1,
        pg_collection=mesh.groups,
        vp_stage=vp_stage,
        **model,
    )
    return chunk.to(mesh.device)


def with_hooks(config: TransformerConfig) -> TransformerConfig:
    """A copy of the configuration with the functions that megatron-core's schedules call.

    megatron-core marks parameters as split over tensor ranks only while initialising them, so it must be let
    to; its initial values are left out, since ours do not depend on the layout.
    """

    def leave(weight: torch.Tensor) -> torch.Tensor:
        return weight

    def finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)  # the loss is already divided by the step's token count

    config = dataclasses.replace(config)
    config.perform_initialization = True
    config.use_cpu_initialization = False  # it would build every whole matrix only to slice it
    # gloo still reads a sent tensor when megatron-core gives its memory back; NCCL's streams keep it alive.
    config.deallocate_pipeline_outputs = torch.cuda.is_available()
    config.init_method = config.output_layer_init_method = leave
    config.embedding_init_method = leave
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize
    return config


def _mask_padded_logits(chunk: GPTModel, tensor_rank: int, vocab_size: int) -> None:
    """Give logits of padded vocabulary rows no probability: how much is padded depends on the layout."""
    if not chunk.post_process:
        return
    rows = chunk.output_layer.output_size_per_partition
    present = vocab_size - tensor_rank * rows
    if present >= rows:
        return

    # Not recorded: the probability is exactly zero, and so is the gradient that would be cut off.
    @torch.no_grad()
    def mask(_module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        logits[..., max(0, present) :] = torch.finfo(logits.dtype).min
        return logits, bias

    chunk.output_layer.register_forward_hook(mask)
