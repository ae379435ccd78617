"""Genuine checkpoints of tensor-parallel ranks.

Either by DeepSpeed's own AutoTP, or with a process grid handed to DeepSpeed (`mpu`), as Megatron-DeepSpeed
does, which also leaves word in `universal_checkpoint_info` of how its tensors are cut.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tests.foreign.deepspeed as made  # its import decides where DeepSpeed runs
from tests.foreign.deepspeed_optimizers import build_optimizer
from tests.foreign.oracle import Oracle
from tests.foreign.parameters import Parameters
from tests.ranks import run_ranks

PADDED_VOCAB = 4352  # of 4099, for two ranks with 128 rows each
ROWS = (r".*self_attn\.o_proj\.weight", r".*mlp\.down_proj\.weight")
REPLICATED = (r".*layernorm\.weight", r"model\.norm\.weight")
VOCABULARY = (r"model\.embed_tokens\.weight", r"lm_head\.weight")


def checkpoint_info(oracle: Oracle) -> dict[str, Any]:
    """What a Megatron-DeepSpeed client puts beside its state."""
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": oracle.vocab,
        "padded_vocab_size": PADDED_VOCAB,
        "vocabulary_parameter_patterns": [
            pattern for pattern in VOCABULARY if not oracle.tied or "lm_head" not in pattern
        ],
        "tp_replicated_parameter_patterns": list(REPLICATED),
        "parameter_with_row_parallelism_patterns": list(ROWS),
    }


def save_tensor_parallel(folder: Path, oracle: Oracle, run: made.Run, tensor_ranks: int = 2) -> Path:
    """Write a checkpoint of `tensor_ranks` model-parallel ranks into `folder`, and return `folder`."""
    run_ranks(_save, run.world, str(folder), oracle, run, tensor_ranks)
    return folder


def save_auto_tensor_parallel(folder: Path, oracle: Oracle, run: made.Run) -> Path:
    """Write a checkpoint of two tensor ranks that DeepSpeed itself made of transformers' model."""
    run_ranks(_save_auto, run.world, str(folder), oracle, run)
    return folder


class Grid:
    """Megatron's order of ranks: tensor innermost. The methods are those that DeepSpeed asks an `mpu` for."""

    def __init__(self, tensor: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.tensor, self.data = tensor, world // tensor
        self.tensor_rank, self.data_rank = rank % tensor, rank // tensor
        for index in range(self.data):
            ranks = list(range(index * tensor, (index + 1) * tensor))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.tensor_group = group
        for index in range(tensor):
            ranks = list(range(index, world, tensor))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.data_group = group

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data

    def get_data_parallel_group(self) -> Any:
        return self.data_group


class Shard:
    """The oracle as one tensor-parallel rank holds it."""

    def __init__(self, oracle: Oracle, rank: int, ranks: int) -> None:
        self.oracle, self.rank, self.ranks = oracle, rank, ranks

    def value(self, name: str, state: str) -> torch.Tensor:
        whole = self.oracle.value(name, state)
        if any(re.match(pattern, name) for pattern in REPLICATED):
            return whole
        if any(re.match(pattern, name) for pattern in VOCABULARY):
            whole = nn.functional.pad(whole, (0, 0, 0, PADDED_VOCAB - len(whole)), value=0.25)
        dim = int(any(re.match(pattern, name) for pattern in ROWS))
        return whole.chunk(self.ranks, dim)[self.rank].contiguous()


class AutoShard:
    """The oracle as a rank of AutoTP holds it: along the dimension in which its parameter is smaller."""

    def __init__(self, oracle: Oracle, shapes: dict[str, tuple[int, ...]], rank: int) -> None:
        self.oracle, self.shapes, self.rank = oracle, shapes, rank

    def value(self, name: str, state: str) -> torch.Tensor:
        whole = self.oracle.value(name, state)
        for dim, (have, local) in enumerate(zip(whole.shape, self.shapes[name], strict=True)):
            if have != local:
                return whole.chunk(2, dim)[self.rank].contiguous()
        return whole


def _save(folder: str, oracle: Oracle, run: made.Run, tensor_ranks: int) -> None:
    made.deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    grid = Grid(tensor_ranks)
    shard = Shard(oracle, grid.tensor_rank, tensor_ranks)
    model = Parameters({name: shard.value(name, "master") for name in oracle.shapes()})
    engine = made.deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(run.optimizer, model),
        config=made.engine_config(oracle, run),
        mpu=grid,
        dist_init_required=False,
    )[0]
    engine.backward(engine().loss)
    engine.step()
    made.plant(engine, shard, run.optimizer)
    made.count_steps(engine)
    info = {"universal_checkpoint_info": checkpoint_info(oracle)}
    engine.save_checkpoint(folder, tag=made.TAG, client_state=info)


def _save_auto(folder: str, oracle: Oracle, run: made.Run) -> None:
    engine = made.start_engine(oracle, run, tensor_parallel={"autotp_size": 2})
    made.backward(engine, oracle)
    engine.step()
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }
    shard = AutoShard(oracle, shapes, made.deepspeed.utils.groups.get_tensor_model_parallel_rank())
    assert any(shape != oracle.shapes()[name] for name, shape in shapes.items()), "nothing was cut"
    made.plant(engine, shard, run.optimizer)
    made.count_steps(engine)
    engine.save_checkpoint(folder, tag=made.TAG)
