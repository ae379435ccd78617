"""One conversion from beginning to end: open, check, plan, write beside the target, rename."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint.convert.execute import WORKERS, Progress, Written, execute, peak_bytes
from checkpoint.convert.files import changed, stamps
from checkpoint.convert.journal import JOURNAL, Journal, plan_key, region_extents
from checkpoint.convert.output import WritePlan
from checkpoint.folder import WRITING, sync_folder, write_durably, writing
from checkpoint.manifest import ITEM_SIZES, LogicalTensor
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.verification.finding import Finding
from checkpoint.verification.report import verify_checkpoint
from checkpoint.verify import damage
from checkpoint.writers.options import WriteOptions

FORMATS = {
    "universal": "Ratoon universal: whole tensors in safetensors shards, optimizer state included",
    "index": "Ratoon index: a manifest that points into the original files",
    "huggingface": "Hugging Face folder for from_pretrained",
    "torch_dist": "Megatron torch_dist, for megatron-core's own loader",
    "deepspeed_universal": "DeepSpeed universal, for load_universal",
    "dcp": "PyTorch DCP, for FSDP2",
    "ranks": "Ratoon's own, a file for each model-parallel rank of a layout",
}
"""Targets: module of `checkpoint.writers` -> what it is."""


@dataclass(frozen=True)
class Conversion:
    """What will be written, before it is.

    Attributes:
        bytes_read: of the source that are needed.
        bytes_written: large files; small ones come on top.
        peak_bytes: of anonymous memory, besides the interpreter's and the list of tensors.
    """

    opened: Opened
    plan: WritePlan
    bytes_read: int
    bytes_written: int
    peak_bytes: int


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        findings: of the verification of the source; empty where it was left out.
        resumed: files that an earlier, interrupted conversion had finished.
    """

    target: Path
    format: str
    num_files: int
    bytes_written: int
    seconds: float
    verify_seconds: float
    resumed: int
    dropped: tuple[str, ...]
    findings: tuple[Finding, ...] = field(default=())


def prepare(
    source: Path | str | Opened,
    to: str,
    options: WriteOptions,
    *,
    spec: Path | str | None = None,
    facts: Mapping[str, int] | None = None,
    workers: int = WORKERS,
) -> Conversion:
    """Open the source and plan the target; reads headers only.

    Args:
        source: as `open_checkpoint` takes it.
        to: one of FORMATS.
        spec, facts: of the source's names.

    Raises:
        ValueError: the source cannot be opened or is damaged, or the target cannot hold its model.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: no such format; there are {', '.join(FORMATS)}")
    opened = source if isinstance(source, Opened) else open_checkpoint(source, spec=spec, facts=facts)
    opened = _with_states(opened, options.states)
    if opened.problems:
        listed = "\n  ".join(opened.problems[:20])
        remedy = f"\n{opened.remedy}" if opened.remedy else ""
        raise ValueError(f"{opened.folder} is damaged, hence not converted:\n  {listed}{remedy}")
    plan: WritePlan = importlib.import_module(f"checkpoint.writers.{to}").plan(opened, options)
    return Conversion(opened, plan, _needed(opened, plan), plan.num_bytes, peak_bytes(workers))


def convert(
    conversion: Conversion,
    target: Path | str,
    *,
    drop: bool = False,
    verify: bool = True,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Converted:
    """Write what was prepared into the folder `target`, which appears when it is whole.

    Killed in the middle, the same call goes on where it was: finished files stay in
    `target`.partial-convert.

    Args:
        drop: go on although the target cannot hold everything, see `WritePlan.lost`.
        verify: read the source once more before and refuse damage, and read back what was written.

    Raises:
        ValueError: something would be lost, the source is damaged, or the target is there already.
        OSError: the disk is full or fails.
    """
    begin = time.monotonic()
    opened, plan, target = conversion.opened, conversion.plan, Path(target)
    _refuse_loss(plan, drop=drop)
    _refuse_target(target, opened)
    findings: list[Finding] = []
    with opened.reading() as gone:
        before, problems = stamps(opened.folder, opened.manifest)
        _refuse_source(opened, [*gone, *problems])
        if verify:
            findings = _verified(opened, workers)
        verified = time.monotonic()
        with _unfinished(target, plan_key(before, opened.digest, plan)) as (partial, journal):
            _refuse_full_disk(partial, plan)
            written = execute(
                plan,
                opened.folder,
                opened.manifest.by_key(),
                partial,
                journal=journal,
                workers=workers,
                progress=progress,
            )
            _refuse_source(opened, changed(opened.folder, before))
            if verify:
                _check(partial, plan, written)
            _write_small(partial, plan, written)
            _reveal(partial, target)
    return Converted(
        target=target,
        format=plan.format,
        num_files=len(plan.files) + len(plan.small) + len(plan.carried),
        bytes_written=written.bytes_written,
        seconds=time.monotonic() - begin,
        verify_seconds=verified - begin,
        resumed=written.kept,
        dropped=tuple(plan.lost),
        findings=tuple(findings),
    )


@contextmanager
def _unfinished(target: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """The folder beside the target that it grows in. Nobody else writes into it, nor tidies it up."""
    partial = target.with_name(target.name + ".partial-convert")
    journal = Journal(partial, key)
    try:
        with writing(partial):
            yield partial, journal
    finally:
        journal.close()


def _write_small(partial: Path, plan: WritePlan, written: Written) -> None:
    last = plan.last(written.hashes) if plan.last is not None else {}
    carried = {name: path.read_bytes() for name, path in plan.carried.items()}
    for name, content in {**carried, **plan.small, **last}.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(partial / name, content)


def _reveal(partial: Path, target: Path) -> None:
    """What is whole gets its name, and only then forgets how it came to be."""
    if target.exists():
        target.rmdir()  # empty, see _refuse_target
    os.rename(partial, target)
    for name in (JOURNAL, WRITING):
        (target / name).unlink()
    sync_folder(target)
    sync_folder(target.parent)


def _check(partial: Path, plan: WritePlan, written: Written) -> None:
    """Read back what was written; what an earlier attempt wrote has been read back already."""
    damaged = damage(partial, region_extents(plan.files, written.hashes))
    if damaged:
        listed = "\n  ".join(damaged[:20])
        raise ValueError(
            f"{partial}: {len(damaged)} regions do not read as they were written:\n  {listed}\n"
            "The disk or the memory fails; the same command writes these files once more"
        )


def _verified(opened: Opened, workers: int) -> list[Finding]:
    report = verify_checkpoint(opened, workers=workers)
    if report.errors:
        listed = "\n  ".join(str(error) for error in report.errors[:20])
        raise ValueError(
            f"{opened.folder} is damaged ({len(report.errors)} findings), hence not converted:\n  {listed}\n"
            "`ratoon checkpoint verify` lists all; --no-verify converts what is there"
        )
    return report.findings


def _refuse_source(opened: Opened, problems: Sequence[str]) -> None:
    if problems:
        listed = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{opened.folder} cannot be converted:\n  {listed}{more}")


def _refuse_full_disk(partial: Path, plan: WritePlan) -> None:
    held = sum(entry.stat().st_blocks * 512 for entry in partial.rglob("*"))
    needed, free = plan.num_bytes - held, shutil.disk_usage(partial).free
    if needed > free:
        raise ValueError(f"{partial.parent}: {needed} more bytes are to be written, {free} are free")


def _refuse_loss(plan: WritePlan, *, drop: bool) -> None:
    if plan.lost and not drop:
        listed = "\n  ".join(plan.lost)
        raise ValueError(f"{plan.format} cannot hold all of it:\n  {listed}\nTo leave this out: --drop")


def _refuse_target(target: Path, opened: Opened) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: give a new folder, or remove it")
    inside = [target.resolve(), *target.resolve().parents]
    if opened.folder.resolve() in inside:
        raise ValueError(f"{target} lies in the source {opened.folder}, which stays as it is: choose another")
    target.parent.mkdir(parents=True, exist_ok=True)


def _with_states(opened: Opened, states: tuple[str, ...] | None) -> Opened:
    if states is None:
        return opened
    manifest = opened.manifest
    known = {tensor.state for tensor in manifest.tensors}
    if unknown := sorted(set(states) - known):
        raise ValueError(
            f"--states {', '.join(unknown)}: the source has {', '.join(sorted(known))}, and no such state"
        )
    opened = opened.weights_alone() if set(states) == {"weight"} else opened
    kept = tuple(tensor for tensor in manifest.tensors if tensor.state in states)
    return replace(opened, manifest=replace(manifest, tensors=kept))


def _needed(opened: Opened, plan: WritePlan) -> int:
    tensors: dict[tuple[str, str], LogicalTensor] = opened.manifest.by_key()
    return sum(
        part.box.numel * ITEM_SIZES[tensors[part.name, region.state].dtype]
        for file in plan.files
        for region in file.regions
        for part in region.parts
    )
