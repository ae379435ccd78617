"""In bfloat16 our logits are as close to the float32 model as transformers' own bfloat16 logits."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import Layout
from tests.families.batches import packed_batch
from tests.families.cases import plain, saved_model
from tests.families.compare import run_engine
from tests.families.reference import run_transformers, weights
from trainer.model.config import ModelConfig

# Both round every activation to 8 bits (a relative error of 2^-9 each time), but not at the same places:
# neither is the other's truth, float32 is. Over thousands of logits the root mean square of the errors is the
# same to some per cent; a quarter more leaves room for the places that differ, and none for a lossier
# operation in every layer.
FACTOR = 1.25


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("llama", 1, plain()),
        ("qwen3", 2, plain(tensor=2, sequence_parallel=True)),
        ("mistral", 2, plain(context=2)),
        ("qwen2", 2, plain(pipeline=2)),
    ],
)
def test_bfloat16_rounds_no_more_than_transformers(name, ranks, layout: Layout, tmp_path):
    model, folder = saved_model(name, tmp_path)
    batch = packed_batch(model.config.vocab_size)
    rounded = {key: value.bfloat16() for key, value in weights(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the same weights in both precisions
    exact = run_transformers(model, batch)
    theirs = run_transformers(model.bfloat16(), batch)
    ours = run_engine(ModelConfig(hf=str(folder)).resolve(), layout, ranks, rounded, batch, precision="bf16")
    assert ours.logits.dtype == torch.bfloat16
    assert _error(ours.logits, exact.logits) <= FACTOR * _error(theirs.logits, exact.logits)
    assert abs(ours.loss - exact.loss) <= 2e-3 * exact.loss  # tokens' errors average out: measured 3e-4


def test_the_error_of_bfloat16_shows(tmp_path):
    """Otherwise the comparison above would compare float32 with itself."""
    model, _ = saved_model("llama", tmp_path)
    batch = packed_batch(model.config.vocab_size)
    exact = run_transformers(model, batch)
    assert _error(run_transformers(model.bfloat16(), batch).logits, exact.logits) > 1e-3


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
