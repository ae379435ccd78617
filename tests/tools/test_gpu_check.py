"""The GPU check, rehearsed on the CPU, and that it can fail."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu.report import Table
from tools.gpu.resume import _compare as compare_runs
from tools.gpu.training import BF16, FP32, Curve, compare_curves
from tools.gpu_check import Check

ROOT = Path(__file__).parents[2]
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tools.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=NO_GPU, capture_output=True, text=True, timeout=240)


def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    done = gpu_check()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("there is no GPU to check: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_rehearsal_runs_every_part_that_the_cpu_can() -> None:
    done = gpu_check("--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for first in (
        "torch ",  # the machine
        "RMSNorm ",
        "LayerNorm ",
        "attention, causal ",
        "attention, documents ",
        "attention, window ",
        "attention, documents and window ",
        "fp32 ",
        "bf16, portable ",
        "bf16 ",  # resume
        "portable ",  # speed
    ):
        assert any(row.startswith(f"| {first}") for row in rows), first
    assert "0 failures" in done.stdout


@pytest.mark.parametrize("found", [0.2, math.inf, math.nan])
def test_a_number_too_far_is_a_failure(found: float) -> None:
    table = Table("Norms", ("norm", "found", "allowed", "verdict"))
    table.compare("RMSNorm", 0.1, 0.1)
    assert not table.failures
    table.compare("LayerNorm", found, 0.1)
    assert len(table.failures) == 1
    assert "TOO FAR" in str(table)


def test_a_curve_that_is_missing_or_does_not_fall_is_a_failure() -> None:
    good, flat, broken = Curve([5.0, 4.0]), Curve([5.0, 5.0]), Curve(error="out of memory")
    assert not compare_curves({FP32.name: good, BF16.name: good}, {FP32.name: good}).failures
    assert len(compare_curves({FP32.name: flat, BF16.name: flat}, {FP32.name: flat}).failures) == 2
    missing = compare_curves({FP32.name: good, BF16.name: broken}, {}).failures
    assert [text.partition(":")[0] for text in missing] == [FP32.name, BF16.name]
    assert "out of memory" in missing[1]


def crash() -> None:
    raise ZeroDivisionError("a part that fails")


def one() -> int:
    return 1


def test_a_part_that_crashes_leaves_the_others_alone(tmp_path: Path) -> None:
    check = Check(rehearse=True)
    assert check.run(crash) is None
    assert check.run(one) == 1
    assert len(check.failures) == 1
    assert "a part that fails" in check.failures[0]


def test_runs_without_checkpoints_are_not_equal(tmp_path: Path) -> None:
    table = Table("Resume", ("precision", "tensors", "losses"))
    with pytest.raises(ValueError, match="checkpoint"):
        compare_runs(table, "bf16", tmp_path / "whole", tmp_path / "resumed")
