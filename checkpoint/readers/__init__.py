"""Readers of other trainers' checkpoints: which of them knows a folder by its file names.

Each module `checkpoint.readers.X` has `recognise(path) -> bool`, which looks at names of files only, and
`read(path) -> Source`. They are imported one by one, only as far as needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from checkpoint.source import Source

FORMATS = {
    "deepspeed_universal": "DeepSpeed universal: zero/PARAMETER/fp32.pt, or latest_universal that names it",
    "deepspeed": "DeepSpeed: *_model_states.pt and *_optim_states.pt, or latest that names their folder",
    "torch_dist": "Megatron torch_dist: metadata.json, .metadata and *.distcp, or an iter_* folder of those",
    "megatron_torch": "Megatron torch: mp_rank_*/model_optim_rng.pt, or an iter_* folder of those",
    "dcp": "PyTorch DCP: .metadata and *.distcp",
    "huggingface": "Hugging Face: *.safetensors or pytorch_model*.bin, with an index where there are several",
}
"""Modules in the order they are asked (a format that looks like another one comes first); what each needs."""
OWN = "Ratoon: manifest.json, or step-* folders of those"
SHOWN = 12  # names of a folder in an error


class Reader(NamedTuple):
    """A reader that knows a checkpoint's format.

    Attributes:
        name: of its module.
        read: reads the headers of the checkpoint in a folder.
    """

    name: str
    read: Callable[[Path], Source]


def recognise(path: Path) -> Reader:
    """The reader of the checkpoint at `path`, a folder or a file.

    Raises:
        ValueError: nothing is there, or nothing that is known; says what was looked for and what is there.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is nothing; give the folder (or file) of a checkpoint")
    found = _first(path)
    if found is None:
        raise ValueError(_unknown(path))
    return found


def _first(path: Path) -> Reader | None:
    for name in FORMATS:
        module = importlib.import_module(f"{__name__}.{name}")
        if module.recognise(path):
            return Reader(name, module.read)
    return None


def _unknown(path: Path) -> str:
    """What an error says of a folder that no reader knows."""
    looked_for = [f"  {line}" for line in (OWN, *FORMATS.values())]
    if not path.is_dir():
        remedy = "Give the folder that it lies in, if it is one file of several"
        return "\n".join(
            [f"{path}: this file is no checkpoint that is known. Looked for:", *looked_for, remedy]
        )
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    holds = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    inside = [entry for entry in sorted(path.iterdir())[:100] if entry.is_dir() and _first(entry)]
    remedy = "Give the folder that holds such files, or the one above it that its trainer was given"
    if inside:
        remedy = "One level deeper there is a checkpoint: give " + " or ".join(map(str, inside[:3]))
    headline = f"{path}: no checkpoint is recognised. It holds {holds or 'nothing'}. Looked for:"
    return "\n".join([headline, *looked_for, remedy])
