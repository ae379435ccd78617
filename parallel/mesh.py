"""The process groups of a layout, and where a rank stands in them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel import host
from parallel.layout import Layout
from parallel.timeout import TIMEOUT_MINUTES

_STREAMS = 10_000  # megatron-core spreads the streams of tensor and expert ranks over a few thousand seeds
_built: list[dist.ProcessGroup] = []
"""Of this process, since the last `destroy_mesh`."""


@dataclass(frozen=True)
class Mesh:
    """megatron-core's process groups for one layout, and this rank's place.

    Ranks are laid out tensor first, then context, data, pipeline (megatron-core's order tp-cp-ep-dp-pp), so
    that the chattiest neighbours are closest.
    """

    layout: Layout
    world_size: int
    rank: int
    groups: ProcessGroupCollection

    @property
    def data(self) -> int:
        """Data-parallel degree."""
        return self.layout.data(self.world_size)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else host.HOST

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def context_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def expert_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.layout.pipeline - 1

    def holders(
        self, kind: str, *, on_first_and_last_stage: bool = False, sharded: bool = False
    ) -> tuple[int, ...]:
        """Global ranks that hold the same part of a parameter, or of its optimizer state, as this rank.

        Args:
            kind: "tensor" (split over the tensor ranks), "replicated" (whole on every tensor rank) or
                "expert" (held by the ranks of this expert and tensor rank).
            on_first_and_last_stage: a tied embedding, of which the last pipeline stage keeps a copy.
            sharded: what the distributed optimizer keeps, each data and context rank another range.
        """
        groups: dict[str, Any] = {
            "tensor": None if sharded else self.groups.dp_cp,
            "replicated": self.groups.tp if sharded else self.groups.tp_dp_cp,
            "expert": None if sharded else self.groups.expt_dp,
        }
        group = groups[kind]
        ranks = {self.rank} if group is None else set(dist.get_process_group_ranks(group))
        if on_first_and_last_stage and self.layout.pipeline > 1:
            stage = self.world_size // self.layout.pipeline
            here = self.pipeline_rank * stage
            last = (self.layout.pipeline - 1) * stage
            ranks = {r - here for r in ranks} | {r - here + last for r in ranks}
        return tuple(sorted(ranks))


def build_mesh(layout: Layout, *, seed: int = 0, timeout_minutes: int = TIMEOUT_MINUTES) -> Mesh:
    """Make megatron-core's process groups for `layout`. torch.distributed must be initialised.

    Args:
        seed: of megatron-core's random streams (dropout); weights do not depend on it. Ranks with other
            layers or other tokens get other streams, tensor ranks the same one for what they all hold.
    """
    host.activate()
    before = _groups_of_torch()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # the default group's backends take tensors on the host as well
    )
    _built.extend(group for group in _groups_of_torch() if group not in before)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + _STREAMS * (dist.get_rank() // layout.tensor))
    return Mesh(
        layout, dist.get_world_size(), dist.get_rank(), ProcessGroupCollection.use_mpu_process_groups()
    )


def forget_mesh() -> None:
    """Let megatron-core forget its process groups, which live on; another layout can be built beside them."""
    ps.destroy_model_parallel()


def destroy_mesh() -> None:
    """End all process groups that `build_mesh` has made in this process; another layout can be built then.

    Every rank calls it, when nothing on these groups is under way. Their connections and threads end when
    nobody holds the groups any more: drop engines and sessions first.
    """
    forget_mesh()
    while _built:
        dist.destroy_process_group(_built.pop())
    gc.collect()  # models and optimizers hold groups in cycles


def _groups_of_torch() -> list[dist.ProcessGroup]:
    """All that this rank is in; megatron-core does not keep all that it makes."""
    return list(dist.distributed_c10d._world.pg_map)
