"""The files of a Megatron checkpoint of the format `torch_dist`.

latest_checkpointed_iteration.txt        "1000" or "release"
iter_0001000/.metadata, *.distcp         tensors and objects of ranks, as torch.distributed.checkpoint writes
            /common.pt                   what all ranks have in common; since 0.19 an object in *.distcp
            /metadata.json               names the format; written last
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.archive.torch_file import open_torch_file
from checkpoint.readers.dcp_metadata import METADATA, SUFFIX
from checkpoint.readers.megatron_files import TRACKER

FORMAT = "metadata.json"
COMMON = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
_ITERATION = re.compile(r"iter_(\d+)")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder's files are those of torch_dist, maybe of a save that was not finished."""
    if not folder.is_dir() or not ((folder / FORMAT).is_file() or (folder / COMMON).is_file()):
        return False
    return (folder / METADATA).is_file() or any(folder.glob(f"*{SUFFIX}"))


def find(path: Path) -> Path | None:
    """The folder of an iteration: `path` itself, or the one in it that Megatron-LM would load.

    Where no tracker names one that is there, it is the last iteration.
    """
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        return None
    named = _tracked(path)
    if named is not None and (path / named).is_dir():
        return path / named if is_checkpoint(path / named) else None
    found = [
        (int(match[1]), entry)
        for entry in path.iterdir()
        if (match := _ITERATION.fullmatch(entry.name)) and is_checkpoint(entry)
    ]
    return max(found)[1] if found else None


def _tracked(path: Path) -> str | None:
    try:
        text = (path / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None


def check_format(folder: Path, problems: list[str]) -> None:
    """Take a line for a save that was not finished, or a kind that is not read.

    Raises:
        ValueError: another backend (zarr) wrote it.
    """
    path = folder / FORMAT
    try:
        content = json.loads(path.read_bytes())
        backend = content["sharded_backend"]
    except FileNotFoundError:
        problems.append(
            f"{path} is missing: it is written last, so the save was not finished; take an older one"
        )
        return
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path}: does not name the format ({type(error).__name__}: {error})")
        return
    if backend != "torch_dist":
        raise ValueError(
            f"{path}: the backend is {backend!r}, expected 'torch_dist': load and save it again with that"
        )


def read_common(folder: Path, objects: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What all ranks have in common; empty where it is nowhere.

    Args:
        objects: of the index, by stored name: megatron-core 0.19 and later keep it there.
    """
    path, value = folder / COMMON, objects.get(COMMON_OBJECT)
    if path.is_file():
        try:
            value = open_torch_file(path).value
        except ValueError as error:
            problems.append(str(error))
            return {}
    elif isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        problems.append(
            f"{path} is missing, and {COMMON_OBJECT} is not in the index either: arguments, iteration and "
            "groups of the optimizer are gone; likely cause: not all files were copied"
        )
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{path}: holds a {type(value).__name__}, expected a dictionary")
        return {}
    return dict(value)


def named_step(folder: Path) -> int:
    """The iteration in a folder's name; 0 where it has none."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else 0
