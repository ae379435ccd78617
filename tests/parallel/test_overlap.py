"""Overlapped communication, as GPUs use it, changes no bit. Over gloo it is asynchronous as well."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

import parallel.engine
from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices, different, whole_tensors
from tests.proof.worlds import SOURCES, World
from tests.ranks import run_ranks
from tools.layouts import SEQUENCE, random_batch
from trainer.build import build_engine, execution_here
from trainer.optimizer import OptimizerConfig
from trainer.step import evaluate, train_step

SEQUENCES = 8  # of a step: at least two micro-batches on every data rank
SMALL_BUCKET = 20_000  # elements: megatron-core's 40 million would hold these models in one bucket

WORLDS = {
    "one rank": World(),
    "DP2": World(2),
    "DP2, plain": World(2, Layout(distributed_optimizer=False)),
    "PP2 DP2, tied": World(4, Layout(pipeline=2), precision="bf16"),
    "PP2 VPP2 DP2": World(4, Layout(pipeline=2, virtual_pipeline=2)),
    "TP2 SP DP2, whole layers computed again": World(
        4, Layout(tensor=2, sequence_parallel=True), precision="bf16", recompute="full"
    ),
    "EP2 PP2 DP2": World(4, Layout(pipeline=2, expert=2), "tiny-moe"),
}


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a run, overlapped or not."""

    losses: list[float]
    norms: list[float]
    slices: list[list[TensorSlice]]
    buckets: int


def trained(world: World, overlap: bool) -> Seen:
    """Steps with evaluations in between, and the state after each."""
    small = functools.partial(DistributedDataParallelConfig, bucket_size=SMALL_BUCKET)
    parallel.engine.DistributedDataParallelConfig = small  # type: ignore[misc,assignment]
    engine = build_engine(
        build_mesh(world.layout),
        world.architecture,
        OptimizerConfig(lr=1e-3, clip=None),  # clipping would bring the norm's rounding into the weights
        execution_here(precision=world.precision, recompute=world.recompute),
        sequence_length=SEQUENCE,
        seed=1,
        overlap=overlap,
    )
    mine = range(engine.mesh.data_rank, SEQUENCES, engine.mesh.data)
    losses, norms, slices = [], [], [copy_slices(engine)]
    for number in range(4):
        batches = [random_batch(number, index) for index in mine]
        if number == 2:  # with fewer micro-batches than before
            batches = batches[: len(batches) // 2]
        losses.append(evaluate(engine, batches, num_sources=len(SOURCES)).loss if number % 2 else 0.0)
        report = train_step(engine, batches, lr=1e-3, source_names=SOURCES)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        # After one step nothing asks for the weights before the next one does.
        slices.append(copy_slices(engine) if number != 1 else [])
    return Seen(losses, norms, slices, _buckets(engine))


def _buckets(engine: Engine) -> int:
    return sum(len(chunk.bucket_groups) for chunk in engine.wrapped)


def both(world: World) -> tuple[Seen, Seen]:
    plain = trained(world, False)
    destroy_mesh()
    return plain, trained(world, True)


@pytest.mark.parametrize("name", WORLDS)
def test_overlapped_communication_changes_no_bit(name: str) -> None:
    world = WORLDS[name]
    ranks = run_ranks(both, world.ranks, world)
    for plain, overlapped in ranks:
        assert overlapped.losses == plain.losses
        # the fp32 sum of squares is over other shards, one of each bucket
        assert overlapped.norms == pytest.approx(plain.norms, rel=1e-6)
    assert ranks[0][1].buckets > ranks[0][0].buckets, "several buckets are reduced one after the other"
    for after in (0, 1, 3, 4):
        plain, overlapped = (whole_tensors([rank[i].slices[after] for rank in ranks]) for i in (0, 1))
        assert not different(plain, overlapped)
