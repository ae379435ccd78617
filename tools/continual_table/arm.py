"""The runs of one seed: what each does otherwise than the plain one, as run files.

Most begin at the checkpoint of `base`, which has learned prose, and go on with code: `plain` with code alone,
a new warm-up and a new decay. Strengths were looked at on seed 0, and are the same for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.continual_table.bed import CORPORA, PEAK, Bed, Values, merged

OLD, NEW, THIRD, FOURTH = CORPORA
STATIC = {NEW: 1.0, THIRD: 1.0, FOURTH: 1.0}
"""The mixture that controllers start from."""
CONSTANT = PEAK / 2
"""Where the infinite schedule stays."""
REPLAY: Mapping[str, float] = {"plain": 0.0, "replay-5": 0.05, "replay-25": 0.25, "replay-50": 0.5}
"""The ladder: arm and share of prose in every batch."""
TOLERANCE = 0.3
"""Nats that the loss on prose may rise before more of it is replayed."""
CONDITIONED = 0.8
"""Share of the text that is read with the names of its domains, before the cooldown."""
STRENGTHS: Mapping[str, float] = {"weak": 0.3, "strong": 3.0, "strongest": 30.0}
"""Of anchors."""
FROZEN = [r"model\.embed_tokens\.weight", r"model\.layers\.0\..*"]


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        needs: arms that have to be done before.
        prepare: called in the seed's folder before the run, for files that the run file names.
    """

    name: str
    values: Values
    needs: tuple[str, ...] = ()
    prepare: Callable[[Bed], None] | None = field(default=None, compare=False)


def base(bed: Bed) -> Arm:
    """Prose, from nothing. The anchor only listens, for SI later on: no weight moves otherwise for it."""
    values = bed.frame("base", {OLD: 1.0}, sets=(OLD, NEW, THIRD, FOURTH))
    listening = {"updates": {"anchor": {"kind": "si", "strength": 1.0}}}
    return Arm("base", merged(values, {"train": {"steps": bed.size.pretrain}} | listening))


def onward(
    bed: Bed, name: str, sources: Mapping[str, float] | None = None, *, load: str = "base", **sections: Any
) -> Arm:
    """A run that goes on from another arm's checkpoint with a new warm-up; on code if not told otherwise.

    Args:
        sections: of the run file, on top.
    """
    stages_before = {"base": 0, "plain": 1}[load]
    steps = bed.size.pretrain + bed.size.more * (stages_before + 1)
    values = bed.frame(name, sources or {NEW: 1.0}, sets=(OLD, NEW, THIRD))
    going_on = {
        "train": {"steps": steps},
        "checkpoint": {"load": str(bed.folder / load)},
        "start": {"policy": "rewarm"},
    }
    return Arm(name, merged(merged(values, going_on), sections), needs=(load,))


def shares(replay: float, new: str = NEW) -> dict[str, float]:
    """Weights by source; one that has no share is left out."""
    return {name: share for name, share in ((OLD, replay), (new, 1.0 - replay)) if share}


def seed_folder(folder: Path, seed: int) -> Path:
    """Where the runs of a seed lie."""
    return folder / f"seed-{seed}"
