"""Whether weights fit, by what is in checkpoints of other trainers too."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.opening import open_checkpoint
from parallel.layout import Layout
from tests.foreign.huggingface import save
from tests.foreign.megatron import Run, save_torch_dist
from tests.foreign.oracle import Oracle
from trainer.model.parameters import logical_parameters
from trainer.stages.fitting import held_fields, held_shapes, shape_problems

ORACLES = {
    "llama": Oracle(hidden=64, vocab=263, layers=2),
    "tied": Oracle(hidden=64, vocab=263, layers=2, tied=True),
    "experts": Oracle(hidden=64, vocab=263, layers=2, experts=4),
    "megatron": Oracle(hidden=64, vocab=263, layers=2),
}


@pytest.fixture(scope="module", params=ORACLES)
def name_and_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name, folder = request.param, tmp_path_factory.mktemp("checkpoint")
    oracle = ORACLES[name]
    if name == "megatron":
        return name, save_torch_dist(folder, oracle, Run(Layout(tensor=2), 2))
    return name, save(folder, oracle)


def problems(folder: Path, oracle: Oracle) -> list[str]:
    opened = open_checkpoint(folder)
    return shape_problems(oracle.architecture(), held_shapes(opened), held_fields(opened))


def test_the_same_model_fits(name_and_folder: tuple[str, Path]) -> None:
    name, folder = name_and_folder
    assert problems(folder, ORACLES[name]) == []


@pytest.mark.parametrize(
    "other", [{"layers": 1}, {"layers": 3}, {"vocab": 264}, {"hidden": 128}], ids=lambda one: next(iter(one))
)
def test_another_does_not(name_and_folder: tuple[str, Path], other: dict[str, int]) -> None:
    """Whether the checkpoint states its sizes or only has them."""
    name, folder = name_and_folder
    oracle = ORACLES[name]
    wanted = Oracle(**{**vars(oracle), **other})
    (found,) = problems(folder, wanted)
    assert "the checkpoint is of another shape" in found
    key = {"layers": "layers", "vocab": "263", "hidden": "64"}[next(iter(other))]
    assert key in found


def test_what_the_checkpoint_has_more_is_not_dropped() -> None:
    """Loading refuses it too, but only when the run has begun."""
    plain = ORACLES["llama"].architecture()
    for more in ({"qkv_bias": True}, {"qk_norm": True}, {"normalization": "LayerNorm"}):
        other = plain.model_copy(update=more)
        (found,) = shape_problems(plain, logical_parameters(other), other.model_dump())
        assert all(f"model.{key} is {value} there" in found for key, value in more.items())
    tied = plain.model_copy(update={"tie_word_embeddings": True})
    (found,) = shape_problems(tied, logical_parameters(plain), {})
    assert "lm_head.weight is [263, 64] there and missing here" in found
