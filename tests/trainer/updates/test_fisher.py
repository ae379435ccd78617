"""The Fisher pass against autograd through transformers' model, by sequences and by draws of several."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.slices import TensorSlice
from tests.data.corpora import ragged, write_tokens
from tests.families.batches import packed_batch, rows_of
from tests.families.cases import saved_model
from tests.families.compare import fill
from tests.families.reference import Tensors, run_transformers, weights
from tests.proof.gather import copy_slices, whole_tensors
from tests.proof.worlds import World, build
from tests.ranks import run_ranks
from tests.trainer.updates.worlds import Setup, run, sequence
from trainer.build import build_engine, execution_here
from trainer.data.batch import MicroBatch
from trainer.data.config import DataConfig, SourceConfig, ValidationConfig
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.updates.config import AnchorConfig
from trainer.updates.fisher import add_fisher, drawing

DRAWN = {"single sequences": 1, "draws of three": 3}
LAYOUTS = {
    "llama tied": {
        "one rank": (1, Layout()),
        "DP2": (2, Layout()),
        "PP2 VPP2": (2, Layout(pipeline=2, virtual_pipeline=2)),
        "TP2 SP": (2, Layout(tensor=2, sequence_parallel=True)),
        "CP2": (2, Layout(context=2)),
    },
    "mixtral": {"one rank": (1, Layout()), "EP2": (2, Layout(expert=2))},
}
CASES = [(family, layout, drawn) for family in LAYOUTS for layout in LAYOUTS[family] for drawn in DRAWN]


@dataclass(frozen=True)
class Job:
    model: Architecture
    weights: Tensors
    draws: list[list[MicroBatch]]
    layout: Layout


def sequences(count: int) -> list[MicroBatch]:
    batch = packed_batch(67)
    return [rows_of(batch, at, at + 1) for at in range(count)]


@functools.cache
def expected(family: str) -> tuple[Architecture, Tensors, dict[str, Tensors]]:
    """Architecture, weights, and by draw the mean of the squared gradients that autograd gives."""
    with tempfile.TemporaryDirectory() as folder:
        model, path = saved_model(family, Path(folder))
        architecture = ModelConfig(hf=str(path)).resolve()
        if architecture.num_experts:
            architecture = architecture.model_copy(update={"router_aux_loss_coefficient": 0.5})
    batch, fishers = packed_batch(67), {}
    for drawn, size in DRAWN.items():
        squares = [
            {
                name: g.square()
                for name, g in run_transformers(model, rows_of(batch, at, at + size)).gradients.items()
            }
            for at in range(0, 3, size)
        ]
        fishers[drawn] = {name: torch.stack([s[name] for s in squares]).mean(0) for name in squares[0]}
    return architecture, weights(model), fishers


def measured(job: Job) -> list[TensorSlice]:
    """The pass on one rank of a layout, from a state that holds 1 already."""
    engine = build_engine(
        build_mesh(job.layout),
        job.model,
        OptimizerConfig(),
        execution_here(precision="fp32"),
        sequence_length=32,
        seed=1,
    )
    fill(engine, job.weights)
    before = copy_slices(engine)
    pieces = engine.add_state("fisher", lambda _: True)
    assert add_fisher(engine, pieces, "fisher", job.draws, document_mask=True) == len(job.draws)
    assert_unchanged(engine, before)
    return [piece for piece in copy_slices(engine) if piece.state == "fisher"]


def assert_unchanged(engine: Engine, before: Sequence[TensorSlice]) -> None:
    after = [piece for piece in engine.slices() if piece.state != "fisher"]
    assert all(torch.equal(a.data, b.data) for a, b in zip(after, before, strict=True))
    assert not any(bool(entry.parameter.main_grad.any()) for entry in engine.named)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "layout", "drawn"), CASES)
def test_it_is_the_mean_of_what_autograd_gives_squared(family: str, layout: str, drawn: str) -> None:
    """Squares double the relative error of gradients, 3e-5 in tests/families. No auxiliary loss is in it."""
    architecture, start, fishers = expected(family)
    ranks, degrees = LAYOUTS[family][layout]
    size = DRAWN[drawn]
    batches = [sequences(3)[at : at + size] for at in range(0, 3, size)]
    found = whole_tensors(run_ranks(measured, ranks, Job(architecture, start, batches, degrees)))
    assert {name for name, _ in found} == fishers[drawn].keys()
    for name, fisher in fishers[drawn].items():
        largest = float(fisher.abs().max())
        error = float((found[name, "fisher"] - fisher).abs().max())
        assert error <= 6e-5 * largest, (name, error / largest)


def test_draws_come_from_training_and_validation_sets_alike(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new")):
        write_tokens(tmp_path / name, [[10 * number + 1] * len(one) for one in ragged(40, seed=1, longest=9)])
    data = DataConfig(
        sequence_length=8,
        sources=(SourceConfig(name="new", path=str(tmp_path / "new"), weight=3.0),),
        validation=(ValidationConfig(name="old", path=str(tmp_path / "old")),),
    )
    anchor = AnchorConfig(kind="ewc", strength=1, sources=("old", "new"), batches=4, sequences=2)
    found = list(drawing(data, 1)(anchor))
    assert [len(one) for one in found] == [2] * 4
    seen = [bool((one.tokens == 11).any()) for two in found for one in two]
    assert sum(seen) == 4


def test_sequences_without_a_label_are_refused() -> None:
    batch = sequence(0, 0)
    empty = MicroBatch(**(vars(batch) | {"loss_weights": torch.zeros_like(batch.loss_weights)}))
    with pytest.raises(Exception, match="their sequences have no token with a label"):
        run_ranks(pass_over, 1, [[empty]])


def pass_over(drawn: list[list[MicroBatch]]) -> None:
    engine = build(World())
    add_fisher(engine, engine.add_state("fisher", lambda _: True), "fisher", drawn, document_mask=True)


def test_training_goes_on_from_the_same_weights() -> None:
    """With strength 0 a run that has measured is a run that has not, bit for bit."""
    setup = Setup(anchor={"kind": "ewc", "strength": 0.0, "sources": ["old"], "batches": 2})
    ((measuring,), (plain,)) = (run_ranks(run, 1, one) for one in (setup, Setup()))
    assert measuring.losses == plain.losses
    assert "measured the Fisher matrix on 2 gradients of old" in measuring.notes
