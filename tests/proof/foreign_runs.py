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

from parallel.layout import Layout
from tests.foreign.oracle import BETAS, EPS, WEIGHT_DECAY, Oracle
from tests.proof.runs import GLOBAL_BATCH, run_config
from trainer.config import RunConfig
from trainer.data.batch import MicroBatch
from trainer.data.stream import TokenStream

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: it would be compiled first

MODEL = Oracle(hidden=64, vocab=263)
LR = 2e-3
BEFORE, AFTER = 4, 4
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
            "clip": 1.0,
        },
        schedule={"kind": "constant", "warmup_steps": 0},
        train={"steps": BEFORE + AFTER, "global_batch": GLOBAL_BATCH, "precision": "fp32"},
        data__document_mask=False,
        checkpoint__load=str(checkpoint),
        **changes,
    )


def batches(config: RunConfig, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
    """This data rank's sequences of every step. After the checkpoint the data begin anew, as in Ratoon,
    which knows nothing of another trainer's position."""
    for first, steps in ((0, BEFORE), (BEFORE, AFTER)):
        stream = TokenStream(config.data, seed=config.run.seed, global_batch=GLOBAL_BATCH, first_step=first)
        for step in range(first, first + steps):
            yield stream.micro_batches(
                step, data_rank=rank, data_size=world_size, micro_batch=GLOBAL_BATCH // world_size
            )


def run_deepspeed(config: RunConfig, checkpoint: Path, stage: int) -> list[float]:
    """DeepSpeed trains, saves after BEFORE steps, and goes on; returns the mean loss of every step."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = _start(stage)
    losses = []
    for number, (batch,) in enumerate(batches(config, rank, world_size)):
        if number == BEFORE:
            engine.save_checkpoint(str(checkpoint))
        total = batch.loss_weights.sum()
        torch.distributed.all_reduce(total)
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
        "gradient_clipping": 1.0,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
