"""A real megatron-core layer on the portable modules: gradients of every parameter in every split of it."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from parallel import host
from parallel.context import context_slice
from parallel.specs import block_spec, choose_backend
from tests.parallel.attention_cases import BATCH, HEAD_DIM, LENGTH, ragged_documents
from tests.ranks import run_ranks

HEADS, KV_HEADS = 4, 2
HIDDEN = HEADS * HEAD_DIM


def _config(tensor: int, context: int, **changes: object) -> TransformerConfig:
    fields = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "window_size": (30, 0),
    }
    return TransformerConfig(**{**fields, **changes})


def _drawn(name: str, parameter: Tensor, tensor: int) -> Tensor:
    """This rank's part of a weight drawn by its name over its whole shape."""
    axis = getattr(parameter, "partition_dim", -1) if tensor > 1 else -1
    shape = [size * tensor if dim == axis else size for dim, size in enumerate(parameter.shape)]
    seed = sum(name.encode())
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    whole = whole + 1.0 if parameter.dim() == 1 else whole
    return whole.chunk(tensor, axis)[parallel_state.get_tensor_model_parallel_rank()] if axis >= 0 else whole


def _layer_gradients(tensor: int, context: int, changes: dict[str, object]) -> dict[str, Tensor]:
    """Gradients of the parameters of a layer, put together over the tensor-parallel ranks."""
    host.activate()
    parallel_state.initialize_model_parallel(tensor, context_parallel_size=context)
    model_parallel_cuda_manual_seed(1)
    config = _config(tensor, context, **changes)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = block_spec(config, choose_backend(portable=True), None).layer_specs[0]
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(_drawn(name, parameter, tensor))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), layer)

    generator = torch.Generator().manual_seed(5)
    hidden, grad = (torch.randn(LENGTH, BATCH, HIDDEN, generator=generator) for _ in range(2))
    rotary = RotaryEmbedding(HEAD_DIM, 1.0, use_cpu_initialization=True)(LENGTH)
    hidden, grad = (_local(whole, config) for whole in (hidden, grad))
    output, _ = model(hidden.requires_grad_(), attention_mask=ragged_documents(), rotary_pos_emb=rotary)
    output.backward(grad)
    finalize_model_grads([model])
    return {name: _whole(parameter, tensor) for name, parameter in layer.named_parameters()}


def _local(whole: Tensor, config: TransformerConfig) -> Tensor:
    context = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    part = context_slice(whole, 0, *context)
    if config.sequence_parallel:
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        part = part.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()]
    return part.clone()


def _whole(parameter: Tensor, tensor: int) -> Tensor:
    part = parameter.main_grad.clone()
    axis = getattr(parameter, "partition_dim", -1) if tensor > 1 else -1
    if axis < 0:
        return part
    parts = [torch.empty_like(part) for _ in range(tensor)]
    torch.distributed.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, axis)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The gradients of one rank."""
    return run_ranks(_layer_gradients, 1, 1, 1, {})[0]


SPLITS = {
    "tensor": (2, 1, {}),
    "tensor and sequence": (2, 1, {"sequence_parallel": True}),
    "sequence and context, gathered": (2, 2, {"sequence_parallel": True, "cp_comm_type": "all_gather"}),
    "sequence and context, ring": (2, 2, {"sequence_parallel": True, "cp_comm_type": "p2p"}),
    "sequence and context, heads": (2, 2, {"sequence_parallel": True, "cp_comm_type": "a2a"}),
    "recomputed attention": (
        1,
        2,
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ),
}


@pytest.mark.parametrize("split", SPLITS)
def test_every_gradient_equals_one_rank(alone: dict[str, Tensor], split: str) -> None:
    tensor, context, changes = SPLITS[split]
    assert {name.split(".")[-2] for name in alone} >= {"q_layernorm", "k_layernorm", "input_layernorm"}
    for gradients in run_ranks(_layer_gradients, tensor * context, tensor, context, changes):
        far = {
            name: error
            for name, whole in alone.items()
            # float32 rounds at 6e-8; a gradient sums some 300 tokens, in another order in each split.
            if not (error := float((gradients[name] - whole).abs().max() / whole.abs().max())) < 3e-6
        }
        assert not far
