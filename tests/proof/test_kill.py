"""kill -9 in the middle of a save of `ratoon train`; started again, it ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from checkpoint.folder import find_latest, list_unfinished
from tests.proof.gather import Wholes, different
from tests.proof.runs import checkpoint, read_checkpoint, run, run_config, write_corpora
from tests.ranks import run_ranks
from trainer.config import RunConfig, config_toml

ROOT = Path(__file__).parents[2]
RANKS, STEPS, EVERY = 2, 6, 2
PATIENCE = 120.0  # seconds on a busy machine; it takes ten on a quiet one

# `ratoon train` on a disk that takes its time over step 4, so that there is a middle of a save to kill in.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    if "step-00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(5)
    fsync(descriptor)
os.fsync = slow
from launch.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpora(folder)
    return folder


def configuration(folder: Path, name: str) -> RunConfig:
    return run_config(folder, run__name=name, checkpoint__every=EVERY, train__steps=STEPS)


@dataclass(frozen=True)
class Whole:
    """The run that was never stopped."""

    losses: dict[int, float]
    end: Wholes


@pytest.fixture(scope="module")
def never_stopped(folder: Path) -> Whole:
    config = configuration(folder, "never-stopped")
    records = run_ranks(run, RANKS, config)[0]
    return Whole(records.losses, read_checkpoint(checkpoint(config, STEPS)))


def start(config: RunConfig, program: list[str]) -> subprocess.Popen[str]:
    path = config.run.folder.with_suffix(".toml")
    path.write_text(config_toml(config))
    command = [sys.executable, *program, "train", str(path), "--ranks", str(RANKS)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def interrupted(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[RunConfig, str]]:
    """A run whose victim was killed while the save of step 4 was under way, and what it printed."""
    config = configuration(folder, request.param.__name__)
    process = start(config, ["-c", SLOW_DISK])
    try:
        partial = wait_for(lambda: middle_of_a_save(config), process)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == RANKS
        os.kill(request.param(process.pid, [rank.pid for rank in ranks]), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
        assert not alive, "no rank outlives the run"
        assert partial.exists()
        yield config, output
    finally:
        process.kill()
        process.wait()


def middle_of_a_save(config: RunConfig) -> Path | None:
    """The folder of step 4 that is being written, once some rank's file is in it."""
    found = [path for path in list_unfinished(config.run.checkpoints) if "step-00000004.partial" in path.name]
    return found[0] if found and list(found[0].glob("*.safetensors")) else None


def wait_for(found: Callable[[], Path | None], process: subprocess.Popen[str]) -> Path:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        if path := found():
            return path
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError("no save in time")


def first_rank(parent: int, ranks: list[int]) -> int:
    return min(ranks)


def last_rank(parent: int, ranks: list[int]) -> int:
    return max(ranks)


def whole_run(parent: int, ranks: list[int]) -> int:
    return parent


def losses(config: RunConfig) -> dict[int, float]:
    """By step, the last ones written."""
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return {record["step"]: record["loss"] for record in records}


VICTIMS = [*(pytest.param(one, marks=pytest.mark.long) for one in (first_rank, last_rank)), whole_run]


@pytest.mark.parametrize("interrupted", VICTIMS, indirect=True)
def test_a_run_killed_in_a_save_goes_on_from_the_checkpoint_before(
    interrupted: tuple[RunConfig, str], never_stopped: Whole
) -> None:
    config, output = interrupted
    assert find_latest(config.run.checkpoints) == checkpoint(config, EVERY), output
    process = start(config, ["-m", "launch.cli"])
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert f"loaded {checkpoint(config, EVERY)}" in " ".join(output.split()), output
    assert losses(config) == never_stopped.losses
    assert list_unfinished(config.run.checkpoints) == []
    assert not different(read_checkpoint(checkpoint(config, STEPS)), never_stopped.end)
