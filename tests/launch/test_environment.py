"""What torchrun and srun say in their variables, and what the machine has."""

import os
from dataclasses import replace

import pytest

from launch.environment import (
    _count_visible,
    count_cores,
    count_gpus,
    hidden_gpus,
    parse_node_list,
    prepare_gpus,
    read_environment,
    threads_per_rank,
)

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node01",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[09-10]",
}


def test_a_person_at_a_shell() -> None:
    environment = read_environment({})
    assert (environment.launcher, environment.rank, environment.world_size) == ("local", 0, 1)
    assert environment.cores == count_cores() >= 1


def test_torchrun() -> None:
    environment = read_environment(TORCHRUN)
    assert environment.launcher == "torchrun"
    assert (environment.rank, environment.world_size) == (9, 16)
    assert (environment.local_rank, environment.local_world_size) == (1, 8)
    assert (environment.master_address, environment.master_port) == ("node01", 29500)


def test_srun() -> None:
    environment = read_environment(SRUN)
    assert environment.launcher == "slurm"
    assert (environment.rank, environment.world_size) == (5, 6)
    assert (environment.local_rank, environment.local_world_size) == (1, 2)
    assert environment.master_address == "gpu09"


@pytest.mark.parametrize(
    ("environ", "gpus", "device"),
    [
        (TORCHRUN, 8, 1),
        (TORCHRUN, 7, None),
        (SRUN, 2, 1),
        (SRUN, 1, 0),  # bound to the task
        (SRUN, 0, None),
    ],
)
def test_the_device_of_a_rank(environ: dict[str, str], gpus: int, device: int | None) -> None:
    environment = replace(read_environment(environ), gpus=gpus)
    assert environment.device == device


def test_what_cuda_reads_is_set_unless_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "CUBLAS_WORKSPACE_CONFIG",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    ):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    prepare_gpus(tensor=1, deterministic=False)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    prepare_gpus(tensor=2, deterministic=True)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_every_task_of_a_job_computes_the_same_port() -> None:
    ports = {read_environment(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(6)}
    assert len(ports) == 1
    assert 1024 < ports.pop() < 32768  # unprivileged, and below Linux's ephemeral ports


def test_a_given_rendezvous_wins_over_the_node_list() -> None:
    environment = read_environment(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (environment.master_address, environment.master_port) == ("head", 1234)


@pytest.mark.parametrize("tasks", ["1", ""])
def test_a_batch_script_or_shell_in_an_allocation_starts_its_own_ranks(tasks: str) -> None:
    environ = SRUN | {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_NTASKS": "6"}
    assert read_environment(environ).launcher == "local"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (TORCHRUN | {"WORLD_SIZE": "many", "LOCAL_RANK": ""}, ["WORLD_SIZE", "LOCAL_RANK"]),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, ["MASTER_ADDR"]),
        (SRUN | {"SLURM_LOCALID": ""}, ["SLURM_LOCALID"]),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST"]),
    ],
)
def test_wrong_variables_are_all_named(environ: dict[str, str], named: list[str]) -> None:
    with pytest.raises(ValueError, match="variable") as caught:
        read_environment(environ)
    assert [name for name in named if name in str(caught.value)] == named


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[01-04,07]", ["node01", "node02", "node03", "node04", "node07"]),
        ("a,b[8-10],c", ["a", "b8", "b9", "b10", "c"]),
        ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
        ("gpu-[099-100]-ib.cluster", ["gpu-099-ib.cluster", "gpu-100-ib.cluster"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert parse_node_list(text) == names


@pytest.mark.parametrize("text", ["node[01-04", "node]", "a[[1]]"])
def test_node_lists_with_loose_brackets(text: str) -> None:
    with pytest.raises(ValueError, match="brackets do not match"):
        parse_node_list(text)


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("0", 1), ("0,3", 2), ("3,0,-1,1", 2), ("7", 0), ("GPU-aa,MIG-bb", 2), ("NoDevFiles", 0)],
)
def test_visible_devices_are_counted_as_cuda_counts_them(visible: str, count: int) -> None:
    assert _count_visible(visible, present=4) == count


def test_hidden_gpus_do_not_count() -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


@pytest.mark.parametrize("before", [None, "2,3"])
def test_gpus_are_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with hidden_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_threads_share_the_cores_unless_told_otherwise() -> None:
    assert threads_per_rank(1, {}) == count_cores()
    assert threads_per_rank(10**6, {}) == 1
    assert threads_per_rank(1, {"OMP_NUM_THREADS": "3"}) == 3
