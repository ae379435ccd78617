"""Opening a checkpoint of any trainer: recognise the format, read its headers, map its names.

Nothing is guessed in silence: `Opened.notes` says what was recognised, which spec reads its names, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from checkpoint.convert.files import FOREIGN_FILES, changed
from checkpoint.folder import is_ratoon, read_manifest, read_marker, reading, resolve
from checkpoint.manifest import Manifest
from checkpoint.readers import recognise
from checkpoint.source import Source

if TYPE_CHECKING:
    from checkpoint.language.spec import Spec

RATOON = "Ratoon"
WEIGHTS_REMEDY = (
    'The weights are whole: policy = "weights" under [start] starts from them alone, and '
    "`ratoon checkpoint convert --states weight` writes them"
)


class UnreadableError(ValueError):
    """A checkpoint whose format was recognised cannot be read: it is damaged, or of a model nobody described.

    Attributes:
        folder: that was recognised.
        format: its name.
        reasons: a line each.
    """

    def __init__(self, folder: Path, form: str, reasons: list[str]) -> None:
        self.folder, self.format, self.reasons = folder, form, reasons
        super().__init__("\n  ".join(reasons))


@dataclass(frozen=True)
class Opened:
    """A checkpoint without its payload, of any format.

    Attributes:
        folder: that was read; files of the manifest that are not absolute lie in it.
        format: in words, for people.
        manifest: every logical tensor, and where its bytes lie.
        run_id: of the Ratoon run that saved it; None for any other.
        source: what the reader found; None for Ratoon's own.
        notes: what was recognised and chosen, a line each.
        left_out: what the files hold that the manifest does not carry, a line each.
        problems: damage that the headers give away, a line each; nothing may be loaded when there is any.
        optimizer_problems: those of `problems` that concern masters and optimizer states alone, see
            `weights_alone`.
    """

    folder: Path
    format: str
    manifest: Manifest
    run_id: str | None = None
    source: Source | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    optimizer_problems: tuple[str, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether it has Ratoon's own manifest, whatever files that points into."""
        return self.source is None

    @cached_property
    def digest(self) -> str:
        """Equal for all who have read the same headers, wherever they mount the folder."""
        marker = read_marker(self.folder) if self.is_native else None
        if marker is not None:
            return marker.manifest_hash
        return xxhash.xxh3_64_hexdigest(self.manifest.to_json().replace(str(self.folder).encode(), b""))

    @property
    def remedy(self) -> str:
        """What still can be had of a checkpoint with problems, for people; "" where nothing can."""
        return WEIGHTS_REMEDY if self.problems and not self.weights_alone().problems else ""

    def weights_alone(self) -> Opened:
        """The same for who wants weights alone: damage of masters and optimizer states does not count.

        Where there is such damage, the manifest has no other state than weights; else it stays as it is.
        """
        if not self.optimizer_problems:
            return self
        left_out = f"masters and optimizer states: damaged ({len(self.optimizer_problems)} problems)"
        weights = tuple(tensor for tensor in self.manifest.tensors if tensor.state == "weight")
        return replace(
            self,
            manifest=replace(self.manifest, tensors=weights),
            left_out=(*self.left_out, left_out),
            problems=tuple(line for line in self.problems if line not in self.optimizer_problems),
            optimizer_problems=(),
        )

    @contextmanager
    def reading(self) -> Iterator[list[str]]:
        """Keep retention from removing it meanwhile; yields what is wrong, as `checkpoint.folder.reading`."""
        if not self.is_native:
            yield []  # other trainers know no such lock
            return
        with reading(self.folder) as gone:
            yield gone


def open_checkpoint(
    path: Path | str, *, spec: Path | str | None = None, facts: Mapping[str, int] | None = None
) -> Opened:
    """Read the headers of a checkpoint of any format that is known.

    Args:
        path: Ratoon's: a step folder, a folder of checkpoints (its newest complete one), a run's folder, or a
            converted one. Of another trainer: the folder or file that its own loader would be given.
        spec: what the names mean: a shipped spec's name or a file; chosen by the names where not given.
        facts: whole numbers about the model (num_layers, ...), which count more than the checkpoint's own.

    Raises:
        UnreadableError: the format was recognised, but the headers are damaged or the names have no meaning.
        ValueError: nothing is there, or nothing that is known; what was looked for is named.
    """
    path = Path(path)
    if is_ratoon(path):
        return _open_own(path)
    if not path.exists():
        resolve(path)  # its error names the nearest checkpoint
    reader = recognise(path)
    try:
        source = reader.read(path)
        source.facts |= facts or {}
    except (ValueError, OSError) as error:
        raise UnreadableError(path, reader.name, [str(error)]) from error
    try:
        chosen, why = _spec(source, spec)
        return _assembled(source, chosen, why, facts)
    except ValueError as error:
        raise UnreadableError(path, source.format, [*source.problems, str(error)]) from error


def _open_own(path: Path) -> Opened:
    try:
        folder, manifest = read_manifest(path)
    except ValueError as error:
        raise UnreadableError(path, RATOON, [str(error)]) from error
    marker = read_marker(folder)
    origin = manifest.state.get("format")
    form = f"{RATOON}, {manifest.world_size} ranks" if origin is None else f"{RATOON}, made of {origin}"
    return Opened(
        folder=folder,
        format=form,
        manifest=manifest,
        run_id=marker.run or None if marker else None,
        notes=(f"recognised {form}: {folder}",),
        left_out=tuple(manifest.state.get("left_out", ())),
        problems=tuple(changed(folder, manifest.state.get(FOREIGN_FILES, {}))),
    )


def _spec(source: Source, wanted: Path | str | None) -> tuple[Spec, str]:
    """The spec and the reason for it."""
    from checkpoint.language.choose import choose_spec, fit_spec
    from checkpoint.language.spec import load_spec

    if wanted is not None:
        return fit_spec(load_spec(wanted), source), "as asked for"
    names = len({tensor.name for tensor in source.tensors})
    return choose_spec(source), f"which maps all {names} names"


def _assembled(source: Source, spec: Spec, why: str, facts: Mapping[str, int] | None) -> Opened:
    from checkpoint.assembly.assemble import assemble

    manifest = assemble(source, spec)
    placed = ", and tensors lie on ranks as the checkpoint's own metadata says" if spec.placement else ""
    given = ", ".join(f"{name} = {value}" for name, value in (facts or {}).items())
    return Opened(
        folder=source.folder,
        format=source.format,
        manifest=manifest,
        source=source,
        notes=(
            f"recognised {source.format}: {source.folder}",
            f"names read by the spec {spec.name!r}, {why}{placed}",
            *([f"facts as given: {given}"] if given else []),
            *source.notes,
        ),
        left_out=tuple(manifest.state["left_out"]),
        problems=tuple(source.problems),
        optimizer_problems=tuple(source.optimizer_problems),
    )
