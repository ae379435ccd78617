"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import platform

import pynvml
import torch

from parallel.specs import choose_backend
from tools.gpu.report import Table

LIBRARIES = ("ratoon", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton", "numpy")


def describe_machine() -> Table:
    """Hardware, driver and versions; runs where the GPU may be touched."""
    table = Table("Machine", ("what", "value"))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        table.rows += [
            ("GPU", f"{properties.name}, {memory}, {capability}, {torch.cuda.device_count()} visible"),
            ("driver", _driver()),
            ("CUDA of torch", str(torch.version.cuda)),
            ("cuDNN, NCCL", f"{torch.backends.cudnn.version()}, {_nccl()}"),  # type: ignore[no-untyped-call]
        ]
    table.rows += [
        ("CPU", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("system", f"{platform.platform()}, Python {platform.python_version()}"),
        *((library, _version(library)) for library in LIBRARIES),
    ]
    backend = choose_backend()
    table.rows.append(("modules in bf16", f"{backend.kind}: {backend.reason}"))
    return table


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        return f"NVML does not say: {error}"


def _nccl() -> str:
    return ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
