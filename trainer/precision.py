"""The `[precision]` section: FP8 recipes of Transformer Engine, and why they cannot run here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from parallel.settings import Settings

FP8 = Literal["off", "delayed", "current", "blockwise", "mxfp8"]

MEGATRON_FP8_RECIPE: dict[str, str] = {
    "delayed": "delayed",
    "current": "tensorwise",
    "blockwise": "blockwise",
    "mxfp8": "mxfp8",
}
# The oldest compute capability and Transformer Engine release that megatron-core accepts for each recipe.
_NEEDS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "delayed": ((8, 9), (1, 7)),
    "current": ((8, 9), (2, 2)),
    "blockwise": ((9, 0), (2, 3)),
    "mxfp8": ((10, 0), (2, 1)),
}


class PrecisionConfig(Settings):
    """`[precision]`: what is narrower than `train.precision`.

    Attributes:
        fp8: scaling of the FP8 matrix products (arXiv 2209.05433; E4M3 forward, E5M2 gradients): "delayed"
            scales each tensor by its past maxima, "current" by its present one, "blockwise" by blocks of
            128, "mxfp8" by blocks of 32 in hardware (Blackwell).
    """

    fp8: FP8 = "off"


@dataclass(frozen=True)
class Accelerator:
    """What FP8 depends on.

    Attributes:
        capability: CUDA compute capability, or None without a GPU.
        transformer_engine: (major, minor) of the installed release, or None.
    """

    capability: tuple[int, int] | None
    transformer_engine: tuple[int, int] | None


def fp8_problems(fp8: FP8, precision: str) -> list[str]:
    """What is wrong with this FP8 recipe in a run of this precision on any machine; empty: nothing."""
    if fp8 == "off" or precision == "bf16":
        return []
    return [
        f"precision.fp8 = {fp8!r} needs bf16 around it, found train.precision = {precision!r}: set "
        "train.precision = 'bf16' or precision.fp8 = 'off'"
    ]


def fp8_refusal(fp8: FP8, precision: str, accelerator: Accelerator) -> str | None:
    """Why this FP8 recipe cannot run, in one sentence with the remedy; None where it can."""
    if problems := fp8_problems(fp8, precision):
        return problems[0]
    if fp8 == "off":
        return None
    capability, engine = _NEEDS[fp8]
    found = ""
    if accelerator.capability is None:
        found = "torch sees no CUDA device"
    elif accelerator.capability < capability:
        found = f"compute capability is {_dotted(accelerator.capability)}, needed is {_dotted(capability)}"
    elif accelerator.transformer_engine is None:
        found = "Transformer Engine is not installed (pip install 'ratoon[gpu]')"
    elif accelerator.transformer_engine < engine:
        found = (
            f"Transformer Engine is {_dotted(accelerator.transformer_engine)}, needed is {_dotted(engine)}"
        )
    return f"precision.fp8 = {fp8!r} cannot run here: {found}; set precision.fp8 = 'off'" if found else None


def accelerator_here() -> Accelerator:
    """Ask torch and Transformer Engine what this process has."""
    import importlib.metadata

    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return Accelerator(capability, None)
    release = re.match(r"(\d+)\.(\d+)", version)
    assert release is not None, f"Transformer Engine calls itself {version}"
    return Accelerator(capability, (int(release[1]), int(release[2])))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
