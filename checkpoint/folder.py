"""The folder of a run's checkpoints: which ones are complete, which is newest, what may be removed.

    checkpoints/
        step-00000100/              manifest.json, rank-00000.safetensors ..., COMPLETE
        step-00000200.partial-X/    a save under way, or one that was killed; WRITING is locked by its rank 0
        step-00000100.replaced-X/   counts until the same run's new save of that step does
        step-00000100.kept-X/       complete; another run had saved that step into this folder before

A checkpoint counts when it has COMPLETE, which is written last, after everything else is on the disk.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash

from checkpoint.manifest import FORMAT, MANIFEST, Manifest

COMPLETE = "COMPLETE"
WRITING = "WRITING"
_NAME = re.compile(r"step-(\d+)(\.\S+)?")
_QUIET_SECONDS = 1800.0  # after so long without a change, another machine's save is taken for dead
_START_SECONDS = 10.0  # the same for a folder that nobody has locked yet

_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Complete:
    """A complete checkpoint. The order is that of saving, whatever the steps or the clocks say."""

    sequence: int
    step: int
    path: Path
    save: str  # names the save that wrote it
    manifest_hash: str
    run: str = ""  # names the run that saved it, which alone may remove it


def step_name(step: int) -> str:
    """Name of the folder of a step, in the order of steps."""
    return f"step-{step:08d}"


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that after a crash it is there whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the folder's entries (new names, renames) survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_complete(path: Path, step: int, save: str, *, run: str) -> None:
    """Write the marker that makes the folder count, as the newest of its siblings."""
    sequence = 1 + max((other.sequence for other in list_complete(path.parent)), default=0)
    digest = xxhash.xxh3_64_hexdigest((path / MANIFEST).read_bytes())
    marker = {"step": step, "sequence": sequence, "save": save, "manifest": digest, "run": run}
    write_durably(path / COMPLETE, json.dumps(marker).encode())


def read_marker(path: Path) -> Complete | None:
    """What COMPLETE says; None when there is no whole one."""
    try:
        marker = json.loads((path / COMPLETE).read_bytes())
        facts = (marker["sequence"], marker["step"], path, marker["save"], marker["manifest"])
        return Complete(*facts, marker.get("run", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_complete(folder: Path) -> list[Complete]:
    """The complete checkpoints in a folder, the last one saved at the end."""
    markers = (read_marker(path) for path in _steps(folder))
    return sorted(marker for marker in markers if marker is not None)


def list_unfinished(folder: Path) -> list[Path]:
    """Saves under way, and what killed ones have left."""
    return sorted(path for path in _steps(folder) if read_marker(path) is None)


def find_latest(folder: Path | str) -> Path | None:
    """The newest complete checkpoint of a run: the one saved last. None when there is none."""
    complete = list_complete(Path(folder))
    return complete[-1].path if complete else None


def is_ratoon(path: Path | str) -> bool:
    """Whether a checkpoint of Ratoon's lies here, complete or not, or a folder of some, or a run's."""
    path = Path(path)
    if path.name in (MANIFEST, COMPLETE) and path.is_file():
        path = path.parent
    with suppress(OSError), open(path / MANIFEST, "rb") as file:
        if FORMAT.encode() in file.read(64):
            return True
    folders = [path, *_steps(path), *_steps(path / "checkpoints")]
    return any(_is_own(folder) for folder in folders)


def _is_own(path: Path) -> bool:
    """Other trainers call their folders step-N too."""
    if not _NAME.fullmatch(path.name):
        return False
    return ".partial-" in path.name or any((path / name).exists() for name in (COMPLETE, WRITING, MANIFEST))


def resolve(path: Path | str) -> Path:
    """The step folder meant by a step folder, a folder of checkpoints (its newest) or a run's folder.

    Raises:
        ValueError: nothing complete is there; the reason and the nearest complete checkpoint are named.
    """
    path = Path(path)
    if path.name in (MANIFEST, COMPLETE) and path.is_file():
        path = path.parent
    if read_marker(path) is not None:
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder{_nearest(path)}")
    for folder in (path, path / "checkpoints"):
        if latest := find_latest(folder):
            return latest
    if _NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is incomplete: it has no {COMPLETE} marker, so its save was killed or is still under way"
            + _nearest(path)
        )
    unfinished = [entry.name for entry in list_unfinished(path)]
    found = f"only unfinished saves ({', '.join(unfinished[:3])})" if unfinished else "none"
    raise ValueError(f"{path} holds no complete checkpoint: {found} found there")


def read_manifest(path: Path | str) -> tuple[Path, Manifest]:
    """Resolve `path` (see `resolve`) and read its manifest; returns the step folder too.

    Raises:
        ValueError: no complete checkpoint there, or its manifest is damaged or of a newer format.
    """
    folder = resolve(path)
    marker = read_marker(folder)
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from None
    manifest = Manifest.from_json(text, str(folder / MANIFEST))
    if marker is not None and marker.manifest_hash != xxhash.xxh3_64_hexdigest(text):
        raise ValueError(f"{folder / MANIFEST} is damaged: its hash is not the one that {COMPLETE} records")
    return folder, manifest


@contextmanager
def reading(path: Path) -> Iterator[list[str]]:
    """Keep retention, in this process or another, from removing the checkpoint meanwhile.

    Yields:
        What is wrong, one line: it was too late. Not raised, since other ranks may have come in time.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            marker = stack.enter_context(open(path / COMPLETE, "rb"))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(marker, fcntl.LOCK_SH)
        gone = f"{path} has just been removed by the retention of its run: load a newer one"
        yield [] if (path / COMPLETE).exists() else [gone]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Mark the folder as being written by this process, for as long as it lives."""
    with open(path / WRITING, "w", encoding="utf-8") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(platform.node())
        file.flush()
        yield


def retire(
    folder: Path, run: str, *, keep_last: int, keep_every: int | None, keep_steps: Collection[int] = ()
) -> None:
    """Remove a run's complete checkpoints, save its last `keep_last`, those of every `keep_every`-th step and
    those of `keep_steps`.

    Those of other runs stay, and so do those that somebody has given a name of his own.
    """
    own = [old for old in list_complete(folder) if old.run == run and _is_named_by_us(old)]
    for old in own[:-keep_last]:
        stays = old.step in keep_steps or (keep_every is not None and old.step % keep_every == 0)
        if stays and old.path.name == step_name(old.step):
            continue
        remove(old.path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and killed removals have left, but nothing that a live save is writing."""
    complete = list_complete(folder)
    saved = {(entry.step, entry.run) for entry in complete if entry.path.name == step_name(entry.step)}
    for path in _steps(folder):
        marker = read_marker(path)
        if marker is not None:
            if ".replaced-" not in path.name or (marker.step, marker.run) not in saved:
                continue
        elif _is_being_written(path):
            continue
        _log.info("removing %s, left over by a save that did not end", path)
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, its marker first: a kill in the middle leaves nothing that looks complete.

    It stays, and the log says so, when somebody is reading it or the marker may not be removed.
    """
    try:
        with open(path / COMPLETE, "rb+") as marker:
            if not _lock_alone(marker):
                _log.info("keeping %s: somebody is reading it", path)
                return
            (path / COMPLETE).unlink()
            sync_folder(path)
    except FileNotFoundError:
        pass  # incomplete anyway
    except OSError as error:
        _log.warning("could not remove %s: %s", path, error)
        return
    shutil.rmtree(path, ignore_errors=True)


def _is_named_by_us(found: Complete) -> bool:
    return found.path.name == step_name(found.step) or ".replaced-" in found.path.name


def _steps(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if _NAME.fullmatch(entry.name)]
    except OSError:
        return []


def _lock_alone(file: IO[bytes]) -> bool:
    """Lock a file that is open for writing (NFS asks for that); False when another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb+") as file:
            return not _lock_alone(file)
    except OSError:
        return False


def _is_being_written(path: Path) -> bool:
    """A lock tells on this machine; for another machine's save, only that nothing has changed for long."""
    try:
        host = (path / WRITING).read_text(encoding="utf-8")
    except OSError:
        host = ""
    if _is_locked(path / WRITING):
        return True
    if host == platform.node():
        return False
    if not host and ".partial-" not in path.name:
        return False  # half removed
    changed = [path.stat().st_mtime] + [entry.stat().st_mtime for entry in os.scandir(path)]
    return time.time() - max(changed) < (_QUIET_SECONDS if host else _START_SECONDS)


def _nearest(path: Path) -> str:
    """A hint that names the complete checkpoint whose step is nearest."""
    found = _NAME.match(path.name)
    complete = list_complete(path.parent)
    if not found or not complete:
        return ""
    step = int(found.group(1))
    return f"; the nearest complete one is {min(complete, key=lambda other: abs(other.step - step)).path}"
