"""`ratoon train` with real ranks on a tiny model: the run folder, resuming, failing, Ctrl-C, launchers."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from typer.testing import CliRunner

import trainer.loop  # noqa: F401  # so that what is forked from here is warm
from launch import cli
from launch.train_command import train, write_run_folder
from tests.data.corpora import write_tokens
from tests.launch.test_ranks import assert_gone
from trainer.config import load_config, resolve
from trainer.data.prepare import PrepareOptions, prepare

RUN = """\
[run]
name = "small"

[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4

[data]
sequence_length = 32

[[data.sources]]
name = "prose"
path = "prose"

[[data.validation]]
name = "held-out"
path = "held-out"

[train]
steps = 3
global_batch = 4
precision = "fp32"

[checkpoint]
every = 2

[eval]
batches = 1
"""
FOLDER = Path("runs/small")
PATIENCE = 120.0  # seconds on a busy machine; it takes five on a quiet one


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, part in (("prose", slice(8)), ("held-out", slice(8, 12))):
        (tmp_path / f"{name}.txt").write_text("\n".join(topics[topic] for topic in list(topics)[part]))
        prepare(PrepareOptions(inputs=(f"{name}.txt",), output=name))
    path = Path("run.toml")
    path.write_text(RUN)
    return path


def records(kind: str) -> list[dict[str, object]]:
    lines = (FOLDER / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_leaves_a_whole_folder_and_goes_on_from_it(
    run_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(run_file, ["parallel.tensor=2"])
    shown = capfd.readouterr().out
    assert "step 3/3  loss" in shown
    assert "saved step-00000003" in shown
    assert "held-out" in shown
    assert sorted(path.name for path in FOLDER.iterdir()) == [
        "checkpoints",
        "config.toml",
        "history.jsonl",
        "logs",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert sorted(path.name for path in (FOLDER / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert load_config(FOLDER / "config.toml") == resolve(load_config(run_file, ["parallel.tensor=2"]))

    train(run_file, ["train.steps=5"], ranks=1)  # the same run, longer, and in another layout
    assert "step 4/5" in capfd.readouterr().out
    assert [record["step"] for record in records("step")] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records("evaluation")] == [3, 5]
    assert (FOLDER / "config.1.toml").exists()


def test_the_folder_keeps_every_configuration_it_ran_with(run_file: Path) -> None:
    for steps in (3, 3, 4, 5):
        write_run_folder(resolve(load_config(run_file, [f"train.steps={steps}"])))
    kept = {path.name: load_config(path).train.steps for path in FOLDER.iterdir()}
    assert kept == {"config.1.toml": 3, "config.2.toml": 4, "config.toml": 5}


def test_what_a_user_can_mend_is_one_panel(run_file: Path) -> None:
    for suffix in (".json", ".idx", ".bin"):
        Path(f"prose{suffix}").unlink()
    write_tokens(Path("prose"), [[1, 2, 300, 4] * 40])  # only reading them tells
    result = CliRunner().invoke(cli.app, ["train", "run.toml"])
    assert result.exit_code == 1
    assert "Rank 0 stopped the run" in result.output
    assert "holds token id 300" in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert "Traceback" in (FOLDER / "logs/rank-0.log").read_text()  # for whoever wants to know more


def test_what_is_our_fault_is_one_traceback(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("trainer.loop.train_step", fail)
    result = CliRunner().invoke(cli.app, ["train", "run.toml", "--ranks", "2"])
    assert result.exit_code == 1
    assert result.output.count("Traceback") == 1
    assert "KeyError: 'a bug'" in result.output
    assert "rank-" in result.output.splitlines()[-1]


@contextmanager
def in_a_terminal_of_its_own(
    program: Callable[..., None], output: Path, *arguments: object
) -> Iterator[BaseProcess]:
    """Fork a process that is the leader of a new session, as a shell's foreground job is of its group."""

    def start() -> None:
        os.setsid()
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        program(*arguments)

    output.touch()
    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    try:
        yield process
    finally:
        process.kill()  # and with it, the kernel sees to that, its ranks
        process.join()


def ratoon(*arguments: str) -> None:
    sys.argv = ["ratoon", *arguments]
    cli.main()


def wait_for_step(output: Path, process: BaseProcess) -> None:
    ends = time.monotonic() + PATIENCE
    while b"step 2/" not in output.read_bytes():
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < ends, output.read_text()
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [
        more for child in children for more in descendants(int(child))
    ]


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        (signal.SIGINT, 130, "Interrupted; every process has ended."),
        (signal.SIGTERM, 128 + signal.SIGTERM, ""),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_however_it_is_ended_no_rank_is_left(
    run_file: Path, tmp_path: Path, end: signal.Signals, code: int, last: str
) -> None:
    output = tmp_path / "output"
    arguments = ("train", "run.toml", "--ranks", "2", "--set", "train.steps=100000")
    with in_a_terminal_of_its_own(ratoon, output, *arguments) as process:
        wait_for_step(output, process)
        assert process.pid is not None
        ranks = descendants(process.pid)
        assert len(ranks) == 2
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # the terminal sends Ctrl-C to the whole group
        else:
            os.kill(process.pid, end)
        process.join(PATIENCE)
        assert process.exitcode == code
        assert_gone(ranks)
    text = output.read_text()
    assert "Traceback" not in text
    assert text.rstrip().endswith(last)


def join_as(launcher: str, rank: int, port: int) -> None:
    """What torchrun or srun does for one of two ranks."""
    if launcher == "torchrun":
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    else:
        os.environ.update(SLURM_JOB_ID="1", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2")
        os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
        os.environ.update(SLURM_STEP_NODELIST="localhost", MASTER_PORT=str(port))
    ratoon("train", "run.toml")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_of_a_launcher_join(run_file: Path, tmp_path: Path, launcher: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [tmp_path / f"output-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(in_a_terminal_of_its_own(join_as, output, launcher, rank, port))
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0, 0], [path.read_text() for path in outputs]
    assert "DP2" in outputs[0].read_text()
    assert "step 3/3" in outputs[0].read_text()
    assert outputs[1].read_text() == ""
    assert [record["step"] for record in records("step")] == [1, 2, 3]
