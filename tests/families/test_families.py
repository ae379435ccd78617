"""Every family computes what transformers computes, on one rank and in every kind of layout."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.families.batches import packed_batch
from tests.families.cases import FAMILIES, build_model, layouts, saved_model
from tests.families.compare import difference, relative, run_engine
from tests.families.reference import Outcome, Tensors, run_transformers, weights
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig

# float32 sums in another order through four layers: measured 1.4e-6. The way back is as long again, and a
# gradient sums over all tokens: measured 6.2e-6, for an expert that few tokens reach.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5

CASES = [(family, layout) for family in FAMILIES for layout in layouts(FAMILIES[family])]
LONG_CASES = [(family, layout) for family in FAMILIES for layout in layouts(FAMILIES[family], long=True)]


@dataclass(frozen=True)
class Expected:
    """A family's architecture as we read it, its weights, and what transformers computes with them."""

    architecture: Architecture
    weights: Tensors
    outcome: Outcome


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    found = {}
    for name in FAMILIES:
        model, folder = saved_model(name, tmp_path_factory.mktemp("family"))
        outcome = run_transformers(model, packed_batch(model.config.vocab_size))
        found[name] = Expected(ModelConfig(hf=str(folder)).resolve(), weights(model), outcome)
    return found


def check(family: str, layout: str, expected: Expected, *, long: bool = False) -> None:
    ranks, degrees = layouts(FAMILIES[family], long=long)[layout]
    batch = packed_batch(expected.architecture.vocab_size)
    ours = run_engine(expected.architecture, degrees, ranks, expected.weights, batch)
    found = difference(ours, expected.outcome)
    assert found.logits <= TOLERANCE, found
    assert found.loss <= TOLERANCE, found
    assert found.gradient <= GRADIENT_TOLERANCE, found


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_family_computes_what_transformers_computes(family, layout, expected):
    check(family, layout, expected[family])


@pytest.mark.long
@pytest.mark.parametrize(("family", "layout"), LONG_CASES)
def test_family_in_further_layouts(family, layout, expected):
    check(family, layout, expected[family], long=True)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.without])
def test_what_a_case_is_there_for_shows_in_the_logits(family, expected):
    """Otherwise the comparison above would pass without it."""
    batch = packed_batch(67)
    without = run_transformers(build_model(FAMILIES[family], without=True), batch)
    assert relative(without.logits, expected[family].outcome.logits) > 100 * TOLERANCE
