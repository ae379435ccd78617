"""What the machine and the launcher say: ranks, rendezvous, GPUs, cores. Read here and nowhere else."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["local", "torchrun", "slurm"]


@dataclass(frozen=True)
class Environment:
    """Where this process stands.

    Attributes:
        launcher: "torchrun" or "slurm" when one of them started this process as one rank among others,
            "local" when a person did.
        rank: of this process in the world; 0 when local.
        world_size: ranks in the world; 1 when local.
        local_rank: of this process on its machine.
        local_world_size: ranks on this machine.
        master_address, master_port: where ranks meet; None when local.
        gpus: CUDA devices that this process may use, counted without touching CUDA.
        cores: CPU cores that this process may use.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str | None
    master_port: int | None
    gpus: int
    cores: int

    @property
    def device(self) -> int | None:
        """The CUDA device of this rank; None where there is not one for each rank of this machine.

        srun may bind GPUs to tasks: then fewer than the tasks are all that a task sees, and they are its own.
        """
        if self.gpus >= self.local_world_size:
            return self.local_rank
        return self.local_rank % self.gpus if self.launcher == "slurm" and self.gpus else None


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Read the environment variables of torchrun or srun, and count devices.

    A job step of several tasks counts as srun; a shell inside an allocation (one task, or an interactive
    `salloc`) is local, as is everything that sets only part of torchrun's variables.

    Raises:
        ValueError: naming every variable of the launcher that is missing or no number.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _read_torchrun(environ)
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _read_slurm(environ)
    return _environment("local", environ, rank=0, world_size=1, local_rank=0, local_world_size=1)


def _read_torchrun(environ: Mapping[str, str]) -> Environment:
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    numbers = _numbers("torchrun", environ, keys)
    address = environ.get("MASTER_ADDR")
    if not address:
        raise ValueError(
            "torchrun's variable MASTER_ADDR is missing: start with `torchrun -m launch.cli train`"
        )
    local_world_size = environ.get("LOCAL_WORLD_SIZE", "")
    return _environment(
        "torchrun",
        environ,
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=int(local_world_size) if local_world_size.isdigit() else numbers["WORLD_SIZE"],
        master=(address, numbers["MASTER_PORT"]),
    )


def _read_slurm(environ: Mapping[str, str]) -> Environment:
    keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    numbers = _numbers("srun", environ, keys)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    address = environ.get("MASTER_ADDR") or next(iter(parse_node_list(nodes)), None)
    if address is None:
        raise ValueError("srun's variable SLURM_STEP_NODELIST is missing: set MASTER_ADDR to the first node")
    port = environ.get("MASTER_PORT", "")
    return _environment(
        "slurm",
        environ,
        rank=numbers["SLURM_PROCID"],
        world_size=numbers["SLURM_STEP_NUM_TASKS"],
        local_rank=numbers["SLURM_LOCALID"],
        local_world_size=_tasks_on_node(environ, numbers["SLURM_STEP_NUM_TASKS"]),
        master=(address, int(port) if port.isdigit() else _port_of_job(numbers["SLURM_JOB_ID"])),
    )


def _environment(
    launcher: Launcher,
    environ: Mapping[str, str],
    *,
    master: tuple[str, int] | None = None,
    **ranks: int,
) -> Environment:
    return Environment(
        launcher,
        **ranks,
        master_address=master[0] if master else None,
        master_port=master[1] if master else None,
        gpus=count_gpus(environ),
        cores=count_cores(),
    )


def _numbers(launcher: str, environ: Mapping[str, str], keys: tuple[str, ...]) -> dict[str, int]:
    wrong = [key for key in keys if not environ.get(key, "").isdigit()]
    if wrong:
        found = ", ".join(f"{key} = {environ.get(key)!r}" for key in wrong)
        raise ValueError(
            f"{launcher}'s variables must be numbers, found {found}: start with {launcher} itself"
        )
    return {key: int(environ[key]) for key in keys}


def _port_of_job(job_id: int) -> int:
    """A port that every task of a job can compute, above the registered services and below the ephemeral."""
    return 15000 + job_id % 15000


def _tasks_on_node(environ: Mapping[str, str], default: int) -> int:
    """This node's share of SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3"."""
    counts: list[int] = []
    for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else default


def parse_node_list(text: str) -> list[str]:
    """The host names of a Slurm node list: "node[01-03,07],login" is node01, node02, node03, node07, login.

    Raises:
        ValueError: when brackets do not match.
    """
    names: list[str] = []
    for item in _split_outside_brackets(text):
        names += _expand(item)
    return names


def _split_outside_brackets(text: str) -> list[str]:
    items, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            break
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth != 0:
        raise ValueError(f"brackets do not match in the node list {text!r}")
    return [item.strip() for item in items if item.strip()]


def _expand(item: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", item)
    if match is None:
        return [item]
    names: list[str] = []
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        width = len(first)
        for number in range(int(first), int(last or first) + 1):
            names += _expand(f"{item[: match.start()]}{number:0{width}d}{item[match.end() :]}")
    return names


def count_cores() -> int:
    """Cores that this process may run on, which a container or srun may have narrowed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(environ: Mapping[str, str] | None = None) -> int:
    """CUDA devices that CUDA_VISIBLE_DEVICES leaves of those the driver has.

    Asks NVML, not CUDA: a parent that has started CUDA cannot fork ranks that use it.
    """
    environ = os.environ if environ is None else environ
    import pynvml

    try:
        pynvml.nvmlInit()
        present = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else _count_visible(visible, present)


def _count_visible(visible: str, present: int) -> int:
    """CUDA takes entries up to the first that names no device."""
    count = 0
    for entry in visible.split(","):
        named = entry.strip()
        if not (named.startswith(("GPU-", "MIG-")) or (named.isdigit() and int(named) < present)):
            break
        count += 1
    return count


def threads_per_rank(ranks: int, environ: Mapping[str, str] | None = None) -> int:
    """Compute threads for each of `ranks` ranks on this machine; OMP_NUM_THREADS decides where it is set."""
    environ = os.environ if environ is None else environ
    wanted = environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else max(1, count_cores() // ranks)


def announce_rank(
    rank: int, world_size: int, *, local_rank: int, master: tuple[str, int] | None = None
) -> None:
    """Tell torch and the libraries in this process which rank they are, in torchrun's variables.

    `master` is the address and port where the ranks meet.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if master is not None:
        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))


def prepare_gpus(*, tensor: int, deterministic: bool) -> None:
    """Set what CUDA's libraries read as they start, in this process and its children; what is set stays.

    One queue to the GPU keeps the order in which tensor-parallel ranks start products and communication, on
    which their overlap relies (Megatron-LM). cuBLAS, Transformer Engine and NCCL each have their own word
    for giving the same bits twice.
    """
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if tensor > 1 else {}
    if deterministic:
        wanted |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
            "NCCL_ALGO": "Ring",
        }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def hide_gpus() -> None:
    """Make CUDA see no device in this process and its children; to be called before CUDA starts."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def hidden_gpus() -> Iterator[None]:
    """`hide_gpus` for the processes that are started inside the block."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    hide_gpus()
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
