"""Where ranks stand in the mesh, and who holds the same part of a parameter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, destroy_mesh
from tests.ranks import run_ranks

LAYOUTS = {
    "TP2 CP2 DP2": Layout(tensor=2, context=2),
    "TP2 PP2 DP2": Layout(tensor=2, pipeline=2),
    "PP4 DP2": Layout(pipeline=4),
    "EP2 CP2 PP2 DP2": Layout(expert=2, context=2, pipeline=2),
}
RANKS = 8


def place(mesh: Mesh) -> dict[str, Any]:
    return {
        "tensor": mesh.tensor_rank,
        "context": mesh.context_rank,
        "data": mesh.data_rank,
        "pipeline": mesh.pipeline_rank,
        "expert": mesh.expert_rank,
        "last": mesh.is_last_stage,
        "degree": mesh.data,
        "device": str(mesh.device),
        "holders": {
            (kind, sharded): mesh.holders(kind, sharded=sharded)
            for kind in ("tensor", "replicated", "expert")
            for sharded in (False, True)
        },
        "tied": mesh.holders("tensor", on_first_and_last_stage=True),
        "streams": {name: hash(bytes(s.tolist())) for name, s in get_cuda_rng_tracker().get_states().items()},
        "default stream": hash(bytes(torch.get_rng_state().tolist())),
    }


def places() -> dict[str, dict[str, Any]]:
    """This rank's place under one layout after another, in one process."""
    found = {}
    for name, layout in LAYOUTS.items():
        mesh = build_mesh(layout, seed=3)
        assert (mesh.rank, mesh.world_size) == (dist.get_rank(), RANKS)
        found[name] = place(mesh)
        destroy_mesh()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(places, RANKS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensor_ranks_are_neighbours_then_context_data_pipeline(
    ranks: list[dict[str, dict[str, Any]]], name: str
) -> None:
    layout = LAYOUTS[name]
    data = layout.data(RANKS)
    for rank, here in enumerate(found[name] for found in ranks):
        rest, tensor = divmod(rank, layout.tensor)
        rest, context = divmod(rest, layout.context)
        pipeline, data_rank = divmod(rest, data)
        assert (here["tensor"], here["context"], here["data"], here["pipeline"]) == (
            tensor,
            context,
            data_rank,
            pipeline,
        )
        assert here["degree"] == data
        assert here["last"] == (pipeline == layout.pipeline - 1)
        assert here["device"] == "cpu"


@pytest.mark.parametrize("name", LAYOUTS)
def test_holders_are_the_ranks_that_differ_only_where_they_may(
    ranks: list[dict[str, dict[str, Any]]], name: str
) -> None:
    all_places = [found[name] for found in ranks]

    def alike(here: dict[str, Any], *keys: str) -> tuple[int, ...]:
        return tuple(
            rank for rank, other in enumerate(all_places) if all(other[key] == here[key] for key in keys)
        )

    for rank, here in enumerate(all_places):
        assert here["holders"] == {
            ("tensor", False): alike(here, "tensor", "pipeline"),
            ("tensor", True): (rank,),
            ("replicated", False): alike(here, "pipeline"),
            ("replicated", True): alike(here, "pipeline", "data", "context"),
            ("expert", False): alike(here, "tensor", "pipeline", "expert"),
            ("expert", True): (rank,),
        }


@pytest.mark.parametrize("name", ["TP2 PP2 DP2", "PP4 DP2"])
def test_a_tied_embedding_is_held_by_the_first_and_the_last_stage(
    ranks: list[dict[str, dict[str, Any]]], name: str
) -> None:
    all_places = [found[name] for found in ranks]
    for here in all_places:
        if here["pipeline"] not in (0, LAYOUTS[name].pipeline - 1):
            continue
        assert here["tied"] == tuple(
            rank
            for rank, other in enumerate(all_places)
            if other["tensor"] == here["tensor"] and other["pipeline"] in (0, LAYOUTS[name].pipeline - 1)
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_dropout_differs_except_for_what_tensor_ranks_all_hold(
    ranks: list[dict[str, dict[str, Any]]], name: str
) -> None:
    tensor = LAYOUTS[name].tensor
    defaults = [found[name]["default stream"] for found in ranks]
    assert len(set(defaults)) == RANKS // tensor
    assert all(defaults[rank] == defaults[rank // tensor * tensor] for rank in range(RANKS))
    own = [found[name]["streams"]["model-parallel-rng"] for found in ranks]
    assert len(set(own)) == RANKS


def threads_of_meshes() -> list[int]:
    """This process's threads after each of some meshes that have been built, used and destroyed."""
    found: list[int] = []
    for _ in range(4):
        mesh = build_mesh(Layout(tensor=2))
        dist.all_reduce(torch.ones(1), group=mesh.groups.tp)
        assert len(os.listdir("/proc/self/task")) > min(found, default=0)
        del mesh
        destroy_mesh()
        found.append(len(os.listdir("/proc/self/task")))
    return found


def test_a_destroyed_mesh_leaves_no_threads() -> None:
    for threads in run_ranks(threads_of_meshes, 2):
        assert len(set(threads)) == 1, threads
