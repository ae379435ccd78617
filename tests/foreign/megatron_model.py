"""The oracle as megatron-core's ranks hold it: a planted engine, and what Megatron-LM saves beside it."""

from __future__ import annotations

import dataclasses
import functools
import queue
import random
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend

import parallel.engine
from parallel import host
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.foreign.oracle import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Oracle
from trainer.build import execution_here
from trainer.model.transformer import gpt_arguments, transformer_config
from trainer.optimizer import OptimizerConfig, megatron_optimizer_config, weight_decay

SAMPLES = 56
"""Sequences seen, by the learning rate's scheduler and the data."""
PADDING = 0.25
"""In rows of the padded vocabulary, of every state, so that nobody can take them for zeros."""
_DIVISIBLE = 128  # Megatron-LM's make-vocab-size-divisible-by


@dataclass(frozen=True)
class Run:
    """How megatron-core trains the oracle.

    Attributes:
        layout: degrees; data parallelism is what remains of `world`.
        world: ranks.
        bucket: elements after which the first pipeline stage closes a bucket; None: one bucket a buffer.
        config: fields of TransformerConfig that differ (num_layers_in_first_pipeline_stage, ...).
        says_vocabulary: whether the saved arguments tell the vocabulary without its padding.
    """

    layout: Layout = field(default_factory=Layout)
    world: int = 1
    bucket: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    says_vocabulary: bool = True


def padded_vocabulary(oracle: Oracle, run: Run) -> int:
    """Rows of the embedding of all tensor ranks, as Megatron-LM pads them."""
    multiple = _DIVISIBLE * run.layout.tensor
    return -(-oracle.vocab // multiple) * multiple


def build(oracle: Oracle, run: Run) -> Engine:
    """This rank's part of the model, with weights of zero. Forked ranks only: modules are changed."""
    mesh = build_mesh(run.layout)
    if host.needed():
        for module in (state_dict_saver, filesystem_async):
            module.torch = host._HOST_TORCH  # type: ignore[attr-defined]
    # Its own is in a process that imports torch anew, for saves in the background; here nothing else asks.
    filesystem_async._results_queue = queue.Queue()
    if run.bucket is not None:
        buckets = functools.partial(DistributedDataParallelConfig, bucket_size=run.bucket)
        parallel.engine.DistributedDataParallelConfig = buckets  # type: ignore[attr-defined]
    model, execution = oracle.architecture(), execution_here(precision=oracle.precision, portable=True)
    optimizer = OptimizerConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, clip=None)
    arguments = dataclasses.asdict(gpt_arguments(model, run.layout, execution))
    engine = Engine(
        mesh,
        dataclasses.replace(transformer_config(model, run.layout, execution), **run.config),
        arguments | {"vocab_size": padded_vocabulary(oracle, run)},
        vocab_size=model.vocab_size,
        optimizer=megatron_optimizer_config(optimizer, execution, run.layout),
        decays=lambda name: weight_decay(optimizer, name) > 0,
        portable=True,
        overlap=run.bucket is not None,
    )
    for part in engine.optimizer.chained_optimizers:  # gloo already
        part.data_parallel_group_gloo = getattr(part, "data_parallel_group", None)
    return engine


def plant(engine: Engine, oracle: Oracle) -> None:
    """Make the engine hold the oracle's numbers."""
    for entry in engine.named:
        entry.parameter.data.fill_(PADDING)
    engine.weights_changed()
    for part in engine.optimizer.chained_optimizers:
        for states in part.optimizer.state.values():
            for state, value in states.items():
                value.fill_(STEP if state == "step" else PADDING)
    for piece in engine.slices():
        piece.data.copy_(boxed(oracle.value(piece.name, piece.state), piece.offset, piece.size).reshape(-1))


def boxed(whole: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]


def scheduler(engine: Engine) -> OptimizerParamScheduler:
    """Megatron-LM's scheduler of learning rate and weight decay, constant, which also sets the groups."""
    made = OptimizerParamScheduler(
        engine.optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=8,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=WEIGHT_DECAY,
        end_wd=WEIGHT_DECAY,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )
    made.step(SAMPLES)
    return made


def random_states() -> list[dict[str, Any]]:
    """The generators' states as Megatron-LM collects them."""
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": get_cuda_rng_tracker().get_states(),
        }
    ]


def arguments(oracle: Oracle, run: Run) -> Namespace:
    """Megatron-LM's arguments as far as they tell a model, a layout and an optimizer."""
    model, layout = oracle.architecture(), run.layout
    return Namespace(
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
        params_dtype=torch.bfloat16 if oracle.precision == "bf16" else torch.float32,
        bf16=oracle.precision == "bf16",
        fp16=False,
        world_size=run.world,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        data_parallel_size=layout.data(run.world),
        sequence_parallel=layout.sequence_parallel,
        use_distributed_optimizer=layout.distributed_optimizer,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        swiglu=True,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        rotary_percent=1.0,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=model.max_position_embeddings,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        vocab_size=model.vocab_size if run.says_vocabulary else None,
        padded_vocab_size=padded_vocabulary(oracle, run),
        make_vocab_size_divisible_by=_DIVISIBLE,
        num_experts=model.num_experts or None,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or None,
        moe_router_topk=model.experts_per_token or 2,
        moe_grouped_gemm=False,
        optimizer="adam",
        lr=LR,
        min_lr=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        weight_decay=WEIGHT_DECAY,
        decoupled_lr=None,
        iteration=STEP,
        consumed_train_samples=SAMPLES,
        seed=1234,
        **_pipeline(run.config),
    )


def _pipeline(config: Mapping[str, Any]) -> dict[str, Any]:
    """How layers are spread over the stages, by Megatron-LM's names."""
    return {
        "decoder_first_pipeline_num_layers": config.get("num_layers_in_first_pipeline_stage"),
        "decoder_last_pipeline_num_layers": config.get("num_layers_in_last_pipeline_stage"),
        "account_for_embedding_in_pipeline_split": config.get(
            "account_for_embedding_in_pipeline_split", False
        ),
        "account_for_loss_in_pipeline_split": config.get("account_for_loss_in_pipeline_split", False),
        "pipeline_model_parallel_layout": config.get("pipeline_model_parallel_layout"),
    }
