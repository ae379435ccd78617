"""A run that stops and goes on must be the run that did not stop, bit for bit, through `ratoon train`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from checkpoint.folder import read_manifest, step_name
from tools.gpu.report import Table
from trainer.precision import FP8

SAVED, STEPS = 3, 6
ROOT = Path(__file__).parents[2]

_RUN = """\
[run]
name = "whole"
deterministic = true

[model]
preset = "demo"
attention_dropout = 0.1  # the random streams must come back as well
hidden_dropout = 0.1

[data]
sequence_length = {sequence}

[[data.sources]]
name = "code"
path = "{path}"
weight = 1.0

[train]
steps = {steps}
global_batch = 4
micro_batch = 2

[checkpoint]
every = {saved}
keep = 9

[metrics]
tensorboard = false
"""


def resume_exactly(folder: Path, data: str, *, sequence: int, recipes: tuple[FP8, ...]) -> Table:
    """Train to the end; then again from the checkpoint half-way, with every recipe."""
    table = Table(
        f"Resume: {STEPS} steps at once, and {SAVED} with the rest in another process (with dropout)",
        ("precision", "tensors that differ", "losses that differ"),
    )
    folder.mkdir()
    run_file = folder / "run.toml"
    run_file.write_text(_RUN.format(sequence=sequence, path=data, steps=STEPS, saved=SAVED))
    for recipe in recipes:
        name = "bf16" if recipe == "off" else f"fp8 {recipe}"
        try:
            whole, resumed = folder / f"whole-{recipe}", folder / f"resumed-{recipe}"
            _train(run_file, whole, recipe)
            shutil.copytree(_checkpoint(whole, SAVED), _checkpoint(resumed, SAVED))
            _train(run_file, resumed, recipe)
            _compare(table, name, whole, resumed)
        except (RuntimeError, OSError, ValueError) as error:
            table.fail(name, str(error))
    return table


def _train(run_file: Path, run: Path, recipe: FP8) -> None:
    settings = [f"run.dir={run}", f"precision.fp8={recipe}"]
    command = [sys.executable, "-m", "launch.cli", "train", str(run_file), "--ranks", "1"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed: {(done.stderr or done.stdout)[-3000:]}")


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def _compare(table: Table, name: str, whole: Path, resumed: Path) -> None:
    hashes = [_hashes(_checkpoint(run, STEPS)) for run in (whole, resumed)]
    tensors = {key for found in hashes for key in found}
    wrong = sorted(key for key in tensors if hashes[0].get(key) != hashes[1].get(key))
    losses = [_losses(run) for run in (whole, resumed)]
    steps = range(SAVED + 1, STEPS + 1)
    apart = [step for step in steps if losses[0].get(step) != losses[1].get(step)]
    table.rows.append((name, f"{len(wrong)} of {len(tensors)}", f"{len(apart)} of {len(steps)}"))
    if wrong or apart or not tensors:
        table.failures.append(f"{name}: steps {apart}, tensors {', '.join(wrong[:4]) or 'none'} differ")


def _hashes(checkpoint: Path) -> dict[str, list[str | None]]:
    """Of the pieces of every weight, master and moment."""
    _, manifest = read_manifest(checkpoint)
    return {f"{t.name}:{t.state}": [piece.hash for piece in t.pieces] for t in manifest.tensors}


def _losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}
