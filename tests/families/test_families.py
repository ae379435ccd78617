"""Every family computes what transformers computes, on one rank and in every kind of layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.batches import packed_batch
from tests.families.cases import FAMILIES, build_model, layouts, saved_model
from tests.families.compare import difference, relative, run_engine
from tests.families.reference import Outcome, run_transformers, weights
from trainer.model.config import ModelConfig

# float32 sums in another order through four layers: measured 1.4e-6. The way back is as long again, and the sums
# of a gradient run over all tokens: measured 6.2e-6 for an expert that few tokens reach.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5

CASES = [(family, layout) for family in FAMILIES for layout in layouts(FAMILIES[family])]
LONG_CASES = [(family, layout) for family in FAMILIES for layout in layouts(FAMILIES[family], long=True)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """What transformers computes, and the folder with the config.json, of every family."""
    folder = tmp_path_factory.mktemp("families")
    outcomes = {}
    for name in FAMILIES:
        model, path = saved_model(name, folder)
        outcomes[name] = (run_transformers(model, packed_batch(model.config.vocab_size)), path)
    return outcomes


def check(family: str, layout: str, expected: dict[str, tuple[Outcome, Path]], *, long: bool = False) -> None:
    reference, folder = expected[family]
    ranks, degrees = layouts(FAMILIES[family], long=long)[layout]
    architecture = ModelConfig(hf=str(folder)).resolve()
    batch = packed_batch(architecture.vocab_size)
    ours = run_engine(architecture, degrees, ranks, weights(build_model(FAMILIES[family])), batch)
    found = difference(ours, reference)
    assert found.logits <= TOLERANCE, found
    assert found.loss <= TOLERANCE, found
    assert found.gradient <= GRADIENT_TOLERANCE, found


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_family_computes_what_transformers_computes(family, layout, expected):
    check(family, layout, expected)


@pytest.mark.long
@pytest.mark.parametrize(("family", "layout"), LONG_CASES)
def test_family_in_further_layouts(family, layout, expected):
    check(family, layout, expected, long=True)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.without])
def test_what_a_case_is_there_for_shows_in_the_logits(family, expected):
    """Otherwise the comparison above would pass without it."""
    batch = packed_batch(67)
    without = run_transformers(build_model(FAMILIES[family], without=True), batch)
    assert relative(without.logits, expected[family][0].logits) > 100 * TOLERANCE
