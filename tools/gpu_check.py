"""Everything that needs a GPU, checked and measured on one, in a few minutes.

    python -m tools.gpu_check [--rehearse]

Prints tables for docs/gpu.md: the machine; portable modules against Transformer Engine's; loss curves of the
demo's model in bf16, FP8 and fp32, on the GPU and on the CPU; resume, bit for bit; speed, MFU and memory of
Llama-3-8B's layers. Each part runs in a process of its own, so that one that fails leaves the others alone.

Exit code: 0 all is well, 1 something failed, 2 there is no GPU. --rehearse runs every part that can run
without one on the CPU, at sizes that only show that the program works.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.environment import count_gpus, hidden_gpus
from launch.errors import RankError
from launch.ranks import run_ranks
from tools.gpu import speed
from tools.gpu.machine import describe_machine
from tools.gpu.modules import compare_modules
from tools.gpu.report import Table
from tools.gpu.resume import resume_exactly
from tools.gpu.training import FP32, Curve, compare_curves, train_curves
from trainer.data.config import DataConfig
from trainer.data.prepare import PrepareOptions, prepare
from trainer.precision import FP8

NO_GPU = 2
DEADLINE = 240.0  # seconds for one part


class Check:
    """Runs parts in processes of their own, prints what they found, remembers what failed."""

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.failures: list[str] = []

    def run(self, part: Callable[..., Any], *arguments: Any, gpu: bool = True) -> Any:
        """The part's result, or None and a failure. Processes with a GPU start afresh, the others warm."""
        on_gpu = gpu and not self.rehearse
        try:
            if on_gpu:
                return run_ranks(part, 1, *arguments, deadline=DEADLINE, start_method="spawn")[0]
            with hidden_gpus():
                return run_ranks(part, 1, *arguments, deadline=DEADLINE)[0]
        except RankError as error:
            self.failures.append(f"{part.__module__}.{part.__name__}: {error}")
            return None

    def show(self, table: Table | None, text: str = "") -> None:
        """Print a part's table and take over its failures."""
        if table is None:
            return
        print(f"\n{table}\n" + (f"\n{text}.\n" if text else ""), flush=True)
        self.failures += [f"{table.title}: {failure}" for failure in table.failures]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    rehearse = parser.parse_args().rehearse
    if not rehearse and (reason := why_no_gpu()):
        print(f"{reason}; --rehearse runs on the CPU what can run there", file=sys.stderr)
        return NO_GPU
    began = time.monotonic()
    check = Check(rehearse=rehearse)
    check.show(check.run(describe_machine))
    check.show(check.run(compare_modules, rehearse))
    with tempfile.TemporaryDirectory(prefix="ratoon-gpu-check-") as folder:
        check_training(check, Path(folder))
    check_speed(check)
    print(f"\n{time.monotonic() - began:.0f} s; {len(check.failures)} failures")
    for failure in check.failures:
        print(f"\nFAILED {failure}")
    return 1 if check.failures else 0


def why_no_gpu() -> str:
    """Why torch cannot use a GPU here, or nothing. Asks without touching CUDA."""
    if torch.version.cuda is None:
        return f"there is no GPU to check: torch {torch.__version__} is built without CUDA"
    if count_gpus() == 0:
        return "there is no GPU to check: the NVIDIA driver shows none to this process"
    return ""


def check_training(check: Check, folder: Path) -> None:
    """Loss curves and resume, on the source code of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = str(folder / "code")
    inputs = tuple(str(library / name) for name in ("json", "email", "asyncio"))
    prepare(PrepareOptions(inputs=inputs, output=prefix, suffixes=(".py",)))
    sequence, steps = (64, 4) if check.rehearse else (512, 30)
    data = DataConfig.model_validate(
        {"sequence_length": sequence, "sources": [{"name": "code", "path": prefix, "weight": 1.0}]}
    )
    here: dict[str, Curve] = check.run(train_curves, data, steps) or {}
    on_cpu: dict[str, Curve] = check.run(train_curves, data, steps, [FP32], gpu=False) or {}
    check.show(compare_curves(here, on_cpu))
    recipes: tuple[FP8, ...] = ("off", "delayed") if "fp8 delayed" in here else ("off",)
    if check.rehearse:
        with hidden_gpus():
            check.show(resume_exactly(folder / "resume", prefix, sequence=sequence, recipes=recipes))
    else:
        check.show(resume_exactly(folder / "resume", prefix, sequence=sequence, recipes=recipes))


def check_speed(check: Check) -> None:
    """All cases that this machine can run, in one table."""
    stack = speed.SMALL if check.rehearse else speed.FULL
    table = Table(speed.TITLE, speed.COLUMNS)
    for cases in (speed.ENGINE, speed.ENGINE_FP8, speed.PORTABLE):
        found: Table | None = check.run(speed.measure, stack, cases)
        if found is not None:
            table.rows += found.rows
            table.failures += found.failures
    check.show(table, speed.describe(stack))


if __name__ == "__main__":
    sys.exit(main())
