"""How many ranks saved a DeepSpeed checkpoint, along which axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint.readers.deepspeed_files import Files


@dataclass(frozen=True)
class Layout:
    """Degrees of the run that saved. The model-parallel rank is `pipeline * tensor_ranks + tensor`.

    Attributes:
        data: data ranks of each model-parallel rank, by its number.
        stage: of ZeRO.
    """

    tensor: int
    pipeline: int
    data: dict[int, int]
    stage: int

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def degrees(self) -> dict[str, int]:
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "data": max(self.data.values(), default=1),
        }

    def at(self, model_rank: int) -> dict[str, int]:
        """Coordinates of a model-parallel rank; an axis of one rank is not among them."""
        found = {}
        if self.tensor > 1:
            found["tensor"] = model_rank % self.tensor
        if self.pipeline > 1:
            found["pipeline"] = model_rank // self.tensor
        return found


def model_states(files: Files, model_rank: int) -> dict[str, Any]:
    """The model states of a model-parallel rank: its own file, or that of its first data rank."""
    path = files.models.get(model_rank)
    if path is None:
        found = sorted(data for rank, data in files.sharded_models if rank == model_rank)
        if not found:
            return {}
        path = files.sharded_models[model_rank, found[0]]
    return files.open(path)


def find_layout(files: Files) -> Layout:
    """From what the files say, and where they do not, from how many there are."""
    ranks = {
        *files.models,
        *(rank for rank, _ in files.sharded_models),
        *(rank for rank, _ in files.optimizers),
    }
    count = max(ranks, default=0) + 1
    first = model_states(files, min(ranks, default=0))
    tensor, pipeline = _model_degrees(first, count)
    if tensor * pipeline < count or (files.layers and not first.get("checkpoint_parallel_dimensions")):
        tensor = max((rank for _, rank in files.layers), default=tensor - 1) + 1
        pipeline = -(-count // tensor)
    return Layout(tensor, pipeline, _data_ranks(files, first, range(tensor * pipeline)), _zero_stage(files))


def _model_degrees(model: Mapping[str, Any], count: int) -> tuple[int, int]:
    dimensions = model.get("checkpoint_parallel_dimensions")
    if isinstance(dimensions, Mapping):
        return int(dimensions["tp_degree"]), int(dimensions["pp_degree"])
    tensor = int(model.get("mp_world_size") or 1)
    return tensor, max(1, count // tensor)


def _data_ranks(files: Files, model: Mapping[str, Any], ranks: Iterable[int]) -> dict[int, int]:
    """The largest number that any file speaks of, since a missing file is to be noticed."""
    if not files.optimizers and not files.sharded_models:
        return {}
    said = model.get("dp_world_size")
    counts = {}
    for rank in ranks:
        parts = [
            _partition_count(files.open(path))
            for (owner, _), path in sorted(files.optimizers.items())
            if owner == rank
        ]
        if len(set(parts)) > 1:
            files.problems.append(
                f"{files.folder}: the optimizer files of model-parallel rank {rank} were saved by different "
                f"numbers of data ranks, {sorted(set(parts))}: they are not of one checkpoint"
            )
        known = max(parts, default=0) or int(said or 0)
        counts[rank] = known or len(parts)
    return counts


def _partition_count(content: Mapping[str, Any]) -> int:
    count = content.get("optimizer_state_dict", {}).get("partition_count", 0)
    return max(count, default=0) if isinstance(count, list) else int(count)


def _zero_stage(files: Files) -> int:
    for path in files.optimizers.values():
        state = files.open(path).get("optimizer_state_dict", {})
        if "fp32_flat_groups" in state:
            return 3
        if state:
            stage = state.get("zero_stage", 1)  # BF16_Optimizer shards like ZeRO 1 and does not say so
            return int(stage.args[0] if hasattr(stage, "args") else stage)
    return 3 if files.sharded_models else 0
