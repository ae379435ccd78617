"""Runs of other trainers on the batches that Ratoon would deal: what their own continuation computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for while deepspeed is imported

import deepspeed
import torch
import torch.nn.functional as F
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization

from parallel.initialise import normal_draw
from parallel.layout import Layout
from tests.foreign.megatron import ITERATION, Dist, metadata_of, sharded_state
from tests.foreign.megatron_model import Run, build
from tests.foreign.oracle import BETAS, EPS, LR, STEP, WEIGHT_DECAY, Oracle
from tests.proof.runs import GLOBAL_BATCH, run_config
from trainer.config import RunConfig
from trainer.data.batch import MicroBatch
from trainer.data.stream import TokenStream
from trainer.step import train_step

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: it would be compiled first

MODEL = Oracle(hidden=64, vocab=263)
BEFORE, AFTER = STEP, 4
"""Steps before the checkpoint and after it."""


def continued(folder: Path, checkpoint: Path, layout: Layout, **changes: Any) -> RunConfig:
    """Ratoon's run that goes on from the other trainer's checkpoint, with its settings."""
    model = MODEL.architecture().model_dump(mode="json")
    return run_config(
        folder,
        layout,
        model=model,
        optimizer={
            "lr": LR,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "clip": 0.0,
        },
        schedule={"kind": "constant", "warmup_steps": 0},
        train={"steps": BEFORE + AFTER, "global_batch": GLOBAL_BATCH, "precision": "fp32"},
        data__document_mask=False,
        checkpoint__load=str(checkpoint),
        **changes,
    )


def batches(
    config: RunConfig, rank: int, world_size: int, *, micro_batch: int
) -> Iterator[tuple[list[MicroBatch], int]]:
    """This data rank's sequences of every step, and the tokens of all ranks'.

    After the checkpoint the data begin anew, as in Ratoon, which knows nothing of another trainer's position.
    """
    for first, steps in ((0, BEFORE), (BEFORE, AFTER)):
        stream = TokenStream(config.data, seed=config.run.seed, global_batch=GLOBAL_BATCH, first_step=first)
        for step in range(first, first + steps):
            mine = stream.micro_batches(step, data_rank=rank, data_size=world_size, micro_batch=micro_batch)
            yield mine, stream.valid_tokens(step)


def run_deepspeed(config: RunConfig, checkpoint: Path, stage: int) -> list[float]:
    """DeepSpeed trains, saves after BEFORE steps, and goes on; returns the mean loss of every step."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = _start(stage)
    losses = []
    share = GLOBAL_BATCH // world_size
    for number, ((batch,), total) in enumerate(batches(config, rank, world_size, micro_batch=share)):
        if number == BEFORE:
            engine.save_checkpoint(str(checkpoint))
        logits = engine(input_ids=batch.tokens).logits.float()
        each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        mean = (each * batch.loss_weights.flatten()).sum() / total
        engine.backward(mean * world_size)  # DeepSpeed averages over the ranks
        engine.step()
        mean = mean.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    return losses


def _start(stage: int) -> Any:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**MODEL.huggingface_config(), attn_implementation="eager")
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def run_megatron(config: RunConfig, checkpoint: Path, run: Run, dist: Dist) -> list[float]:
    """megatron-core trains, saves after BEFORE steps, and goes on; returns the mean loss of every step."""
    torch.set_num_threads(1)
    engine = build(MODEL, run)
    engine.initialise(3, normal_draw(0.02, MODEL.layers))
    mesh, losses = engine.mesh, []
    for number, (mine, tokens) in enumerate(batches(config, mesh.data_rank, mesh.data, micro_batch=1)):
        if number == BEFORE:
            (checkpoint / ITERATION).mkdir(parents=True, exist_ok=True)
            state = sharded_state(engine, MODEL, run, dist)
            content = metadata_of(engine, dist)
            dist_checkpointing.save(
                state,
                str(checkpoint / ITERATION),
                content_metadata=_clean_metadata_for_serialization(content),
            )
        report = train_step(
            engine, mine, lr=LR, source_names=("prose", "code"), tokens=tokens, document_mask=False
        )
        losses.append(report.loss)
    return losses
