"""What methods need, as it is predicted, against the tensors that are alive when they run."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from tests.proof.worlds import GLOBAL_BATCH, World, batches, build
from tests.ranks import run_ranks
from tests.trainer.losses.worlds import Case, opened
from tests.trainer.test_memory import MICRO_BATCH, SEQUENCE, architecture
from tests.trainer.updates.worlds import Setup
from tools.layouts import SEQUENCE as TOKENS
from trainer.losses.cache import CacheHeader
from trainer.losses.config import AuxLossConfig
from trainer.memory import Batch, RankMemory, estimate_memory
from trainer.method_memory import Methods, added_numbers, reference_bytes
from trainer.model.transformer import Execution
from trainer.updates.config import AnchorConfig, SlowWeightsConfig, UpdatesConfig

EWC = {"kind": "ewc", "strength": 1.0, "sources": ["old"]}
EMA = {"kind": "ema", "decay": 0.9}
REPTILE = {"kind": "reptile", "every": 2, "epsilon": 0.5}
SETUPS = {
    "l2": Setup(anchor={"kind": "l2", "strength": 1.0}),
    "l2 on q alone": Setup(anchor={"kind": "l2", "strength": 1.0, "only": [r".*\.q_proj\.weight"]}),
    "ewc, frozen layer, ema": Setup(freeze=(r"model\.layers\.1\..*",), anchor=EWC, slow=EMA),
    "si": Setup(anchor={"kind": "si", "strength": 1.0, "only": [r".*_proj\.weight"]}),
    "frozen layer, reptile": Setup(freeze=(r"model\.layers\.0\..*",), slow=REPTILE),
}
WORLDS = {
    "one rank, bf16": World(precision="bf16"),
    "TP2": World(2, Layout(tensor=2)),
    "PP2 VPP2": World(2, Layout(pipeline=2, virtual_pipeline=2)),
    "DP2": World(2),
    "CP2, plain": World(2, Layout(context=2, distributed_optimizer=False)),
    "EP2": World(2, Layout(expert=2), "tiny-moe"),
}


CASES = [
    ("one rank, bf16", "l2"),
    ("TP2", "l2 on q alone"),
    ("DP2", "ewc, frozen layer, ema"),
    ("DP2", "l2 on q alone"),
    ("PP2 VPP2", "ewc, frozen layer, ema"),
    ("CP2, plain", "si"),
    ("EP2", "si"),
    ("EP2", "frozen layer, reptile"),
]


def alive() -> int:
    """Bytes of the memory under all tensors of this process."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def measured(setup: Setup) -> tuple[int, int]:
    """(pipeline stage, bytes that the methods add) with the copies of an update; a target for `run_ranks`."""
    engine = build(setup.world)
    before = alive()
    setup.open(engine)
    for transform in engine.transforms:
        transform.before(1e-3)
    return engine.mesh.pipeline_rank, alive() - before


def methods_of(setup: Setup) -> Methods:
    anchor = AnchorConfig(**setup.anchor) if setup.anchor else None
    return Methods(UpdatesConfig(freeze=setup.freeze, anchor=anchor), SlowWeightsConfig(**setup.slow))


@pytest.mark.parametrize(("world", "method"), CASES)
def test_added_states_and_copies_are_what_is_alive(world: str, method: str) -> None:
    """On all ranks of a stage together: a flat range of the chosen parameters differs from rank to rank."""
    setup = replace(SETUPS[method], world=WORLDS[world])
    layout, ranks = setup.world.layout, setup.world.ranks
    found = [0] * layout.pipeline
    for stage, held in run_ranks(measured, ranks, setup):
        found[stage] += held
    predicted = [one.added for one in estimate(methods_of(setup), setup.world.architecture, layout, ranks)]
    # A copy of the vocabulary's rows has no padding.
    assert found == pytest.approx([ranks // layout.pipeline * one for one in predicted], rel=1e-3)


def estimate(methods: Methods, model: Any, layout: Layout, ranks: int, **batch: int) -> list[RankMemory]:
    sizes = Batch(**{"sequence_length": SEQUENCE, "micro_batch": MICRO_BATCH, "micro_batches": 1, **batch})
    return estimate_memory(model, layout, Execution("fp32"), world_size=ranks, batch=sizes, methods=methods)


KL = {"kind": "kl", "weight": 1.0}
REFERENCES = {
    "one rank": Case.of(1, losses=[KL]),
    "TP2, bf16": Case.of(2, Layout(tensor=2), losses=[KL], precision="bf16"),
    "PP2, likeliest": Case.of(2, Layout(pipeline=2), losses=[{**KL, "top_k": 16}]),
    "PP2 on TP2": Case.of(2, Layout(pipeline=2), losses=[{**KL, "top_k": 16, "layout": {"tensor": 2}}]),
}


def reference_of(case: Case) -> int:
    """Bytes of a reference with its answers to a step; a target for `run_ranks`."""
    engine = build(case.world)
    before = alive()
    losses = opened(case, engine).at(0)
    assert losses is not None
    weights = alive() - before
    losses.prepare(batches(engine, 0))
    answered = alive()
    losses.prepare([])
    return weights + answered - alive()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_and_its_answers_are_what_is_alive(name: str) -> None:
    case = REFERENCES[name]
    world, layout = case.world, case.world.layout
    found = run_ranks(reference_of, world.ranks, case)
    methods = Methods(losses=tuple(AuxLossConfig(**one) for one in case.losses))
    execution = Execution(world.precision)
    tokens = GLOBAL_BATCH // layout.data(world.ranks) * TOKENS
    predicted = reference_bytes(methods, world.architecture, layout, execution, tokens=tokens)
    expected = [predicted[rank * layout.pipeline // world.ranks] for rank in range(world.ranks)]
    # Alive are a random stream's state and RoPE's frequencies too: 5 kB of hundreds.
    assert found == pytest.approx(expected, abs=5_100)


def test_cached_answers_count_and_no_reference(tmp_path: Path) -> None:
    CacheHeader(0, 1, 1, SEQUENCE, 8, 1.0, 64, True, {}).save(tmp_path)
    methods = Methods(losses=(AuxLossConfig(kind="kl", weight=1.0, cache=tmp_path),))
    found = reference_bytes(methods, architecture(), Layout(pipeline=2), Execution(), tokens=100)
    assert found == [0, 100 * (8 * 8 + 4)]


def test_without_methods_nothing_is_added() -> None:
    (rank,) = estimate(Methods(), architecture(), Layout(), 1)
    assert (rank.added, rank.reference) == (0, 0)
    assert [one.total for one in added_numbers(Methods(), architecture(), Layout(pipeline=2))] == [0, 0]


def test_data_ranks_share_added_states() -> None:
    methods = Methods(slow_weights=SlowWeightsConfig(**EMA))
    (one,), (two,) = (estimate(methods, architecture(), Layout(), ranks) for ranks in (1, 2))
    assert two.added == one.added // 2
    assert one.added == one.weights


def test_the_total_has_all_of_it() -> None:
    methods = Methods(slow_weights=SlowWeightsConfig(**EMA), losses=(AuxLossConfig(kind="kl", weight=1.0),))
    bare, full = (estimate(one, architecture(), Layout(), 1)[0] for one in (Methods(), methods))
    assert full.total - bare.total == full.added + full.reference
    assert min(full.added, full.reference) > 0
