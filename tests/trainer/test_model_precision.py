"""FP8: refused with the reason and the remedy where it cannot run, and with nothing where it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.precision import Accelerator, PrecisionConfig, accelerator_here, fp8_problems, fp8_refusal

H100 = Accelerator((9, 0), (2, 6))


def test_off_is_never_refused() -> None:
    assert fp8_refusal(PrecisionConfig().fp8, "fp32", Accelerator(None, None)) is None


@pytest.mark.parametrize(
    ("fp8", "accelerator"),
    [("delayed", H100), ("current", H100), ("blockwise", H100), ("mxfp8", Accelerator((10, 0), (2, 6)))],
)
def test_what_can_run_is_not_refused(fp8: Any, accelerator: Accelerator) -> None:
    assert fp8_refusal(fp8, "bf16", accelerator) is None


@pytest.mark.parametrize(
    ("fp8", "accelerator", "reason"),
    [
        ("delayed", Accelerator(None, (2, 6)), "no CUDA device"),
        ("delayed", Accelerator((8, 0), (2, 6)), "capability is 8.0, needed is 8.9"),
        ("mxfp8", H100, "capability is 9.0, needed is 10.0"),
        ("delayed", Accelerator((9, 0), None), "Transformer Engine is not installed"),
        ("blockwise", Accelerator((9, 0), (2, 1)), "Transformer Engine is 2.1, needed is 2.3"),
    ],
)
def test_the_reason_is_one_sentence_with_the_remedy(fp8: Any, accelerator: Accelerator, reason: str) -> None:
    refusal = fp8_refusal(fp8, "bf16", accelerator)
    assert refusal is not None
    assert reason in refusal
    assert refusal.startswith(f"precision.fp8 = '{fp8}' cannot run here")
    assert refusal.endswith("set precision.fp8 = 'off'")


def test_a_precision_that_fp8_does_not_fit_is_refused_in_the_words_of_the_check_before_a_run() -> None:
    (sentence,) = fp8_problems("delayed", "fp32")
    assert "needs bf16 around it, found train.precision = 'fp32'" in sentence
    assert fp8_refusal("delayed", "fp32", H100) == sentence


def test_this_machine_is_asked() -> None:
    assert (accelerator_here().capability is None) is not torch.cuda.is_available()
