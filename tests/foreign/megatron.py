"""Genuine Megatron checkpoints of the oracle, made on CPU ranks over gloo by megatron-core's own code.

Megatron-LM is no package; what it adds to megatron-core when it saves and loads (its `checkpointing.py`) is
done here: which ranks write, the names of files, and the dictionary around model and optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import _clean_metadata_for_serialization
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from parallel.engine import Engine
from tests.foreign.megatron_model import (
    SAMPLES,
    Run,
    arguments,
    boxed,
    build,
    padded_vocabulary,
    plant,
    random_states,
    scheduler,
)
from tests.foreign.oracle import LR, STEP, Oracle
from tests.proof.gather import Wholes, copy_slices, whole_tensors
from tests.ranks import run_ranks

__all__ = [
    "ITERATION",
    "SAMPLES",
    "Run",
    "load_and_step",
    "padded_vocabulary",
    "save_torch",
    "save_torch_dist",
]

ITERATION = f"iter_{STEP:07d}"
TRACKER = "latest_checkpointed_iteration.txt"
Sharding = Literal["dp_reshardable", "fully_reshardable"]


@dataclass(frozen=True)
class Dist:
    """How a torch_dist checkpoint is written.

    Attributes:
        sharding: of the distributed optimizer's state.
        homogeneous: layers are stacked in one tensor; otherwise each has a key of its own.
        optimizer: whether its state is saved.
    """

    sharding: Sharding = "dp_reshardable"
    homogeneous: bool = True
    optimizer: bool = True


def save_torch(folder: Path, oracle: Oracle, run: Run) -> Path:
    """Write a checkpoint of the format `torch` (a file a rank) into `folder`, and return `folder`."""
    run_ranks(_save_torch, run.world, str(folder), oracle, run)
    (folder / TRACKER).write_text(str(STEP))
    return folder


def save_torch_dist(folder: Path, oracle: Oracle, run: Run, dist: Dist | None = None) -> Path:
    """Write a checkpoint of the format `torch_dist` into `folder`, and return `folder`."""
    (folder / ITERATION).mkdir(parents=True)
    run_ranks(_save_torch_dist, run.world, str(folder / ITERATION), oracle, run, dist or Dist())
    (folder / TRACKER).write_text(str(STEP))
    return folder


def load_and_step(folder: Path, oracle: Oracle, run: Run, dist: Dist | None = None) -> Wholes:
    """What megatron-core holds after it loaded a torch_dist checkpoint and stepped with planted gradients.

    Args:
        folder: with `metadata.json`.
        dist: what the folder holds: megatron-core asks for just that.

    Returns:
        (logical name, state) -> whole tensor.
    """
    return whole_tensors(run_ranks(_load_and_step, run.world, str(folder), oracle, run, dist or Dist()))


def metadata_of(engine: Engine, dist: Dist) -> dict[str, Any]:
    """What Megatron-LM tells megatron-core of the content that it wants (`sharded_sd_metadata`)."""
    metadata: dict[str, Any] = {}
    if engine.mesh.layout.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = dist.sharding
        if dist.sharding == "fully_reshardable":
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    if not dist.homogeneous:
        metadata["non_homogeneous_layers"] = True
    metadata |= {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata


def sharded_state(
    engine: Engine, oracle: Oracle, run: Run, dist: Dist, *, is_loading: bool = False
) -> dict[str, Any]:
    """The dictionary that Megatron-LM's `generate_state_dict` makes for torch_dist."""
    metadata = metadata_of(engine, dist)
    schedule = scheduler(engine)
    state: dict[str, Any] = {"args": arguments(oracle, run), "checkpoint_version": 3.0, "iteration": STEP}
    state |= _chunks(engine, lambda chunk: chunk.sharded_state_dict(metadata=metadata))
    if dist.optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            state, metadata=metadata, **({"is_loading": True} if is_loading else {})
        )
        state["opt_param_scheduler"] = schedule.state_dict()
    if not is_loading:
        state["rng_state"] = _sharded_random_states(engine)
        state["num_floating_point_operations_so_far"] = 123.0
    return state


def _sharded_random_states(engine: Engine) -> ShardedObject:
    mesh = engine.mesh
    grid = (mesh.layout.pipeline, mesh.layout.tensor)
    here = (mesh.pipeline_rank, mesh.tensor_rank)
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", random_states(), grid, here, replica_id=replica)


def _chunks(engine: Engine, state_of: Any) -> dict[str, Any]:
    single = len(engine.chunks) == 1
    return {"model" if single else f"model{i}": state_of(chunk) for i, chunk in enumerate(engine.chunks)}


def _save_torch_dist(folder: str, oracle: Oracle, run: Run, dist: Dist) -> None:
    engine = build(oracle, run)
    plant(engine, oracle)
    state = sharded_state(engine, oracle, run, dist)
    content = _clean_metadata_for_serialization(metadata_of(engine, dist))
    dist_checkpointing.save(state, folder, content_metadata=content)


def _save_torch(folder: str, oracle: Oracle, run: Run) -> None:
    engine = build(oracle, run)
    plant(engine, oracle)
    rank_folder = Path(folder) / ITERATION / _rank_name(engine)
    rank_folder.mkdir(parents=True, exist_ok=True)
    schedule = scheduler(engine)
    if run.layout.distributed_optimizer:
        engine.optimizer.save_parameter_state(str(rank_folder / "distrib_optim.pt"))
    if parallel_state.get_data_parallel_rank() and parallel_state.get_expert_data_parallel_rank():
        return
    state: dict[str, Any] = {"args": arguments(oracle, run), "checkpoint_version": 3.0, "iteration": STEP}
    state |= _chunks(engine, lambda chunk: chunk.state_dict_for_save_checkpoint())
    state["optimizer"] = engine.optimizer.state_dict()
    state["opt_param_scheduler"] = schedule.state_dict()
    state["rng_state"] = random_states()
    state["num_floating_point_operations_so_far"] = 123.0
    torch.save(state, rank_folder / "model_optim_rng.pt")


def _rank_name(engine: Engine) -> str:
    """Megatron-LM's `get_checkpoint_name`: ranks of axes that are not split are left out."""
    mesh = engine.mesh
    name = f"mp_rank_{mesh.tensor_rank:02d}"
    name += f"_{mesh.pipeline_rank:03d}" if mesh.layout.pipeline > 1 else ""
    return name + (f"_{mesh.expert_rank:03d}" if mesh.layout.expert > 1 else "")


def _load_and_step(folder: str, oracle: Oracle, run: Run, dist: Dist) -> list[Any]:
    engine = build(oracle, run)
    _keep_steps()
    wanted = sharded_state(engine, oracle, run, dist, is_loading=True)
    loaded = dist_checkpointing.load(wanted, folder)
    for index, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded["model" if len(engine.chunks) == 1 else f"model{index}"], strict=False)
    with torch.no_grad():  # with fp32 weights, megatron-core writes into views of parameters
        engine.optimizer.load_state_dict(loaded["optimizer"])
    assert engine.updates == STEP, engine.updates
    _part_steps(engine)
    engine.zero_grad()
    for entry in engine.named:
        for block in entry.blocks:
            grad = boxed(oracle.value(block.name, "grad"), block.offset, block.size)
            block.view(entry.parameter.main_grad).copy_(grad)  # type: ignore[attr-defined]
    engine.update(LR, engine.gradient_norm())
    return copy_slices(engine)


def _keep_steps() -> None:
    """megatron-core 0.16.1 looks for torch's AdamW's count of steps where `fully_reshardable` has none."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original(self, parameter, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


def _part_steps(engine: Engine) -> None:
    """Give every parameter a count of steps of its own, the one that was loaded.

    Under torch's AdamW megatron-core 0.16.1 loads the count into the groups, and leaves the parameters one
    and the same tensor with the count from before.
    """
    for part in engine.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()
    engine.updates = engine.updates
