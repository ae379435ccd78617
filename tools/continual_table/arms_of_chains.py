"""The runs on Markov chains, all from nothing: Velocitune's and MeCo's."""

from __future__ import annotations

from typing import Any

from tools.continual_table.arm import CONDITIONED, Arm
from tools.continual_table.bed import Bed, Values, merged
from tools.continual_table.domains import CHAINS, MIXED, TOKENIZER, entropy


def pace_arms(bed: Bed) -> list[Arm]:
    """Three sources of known difficulty in equal shares or Velocitune's, whose target is the lowest loss."""
    seen = {"every": bed.size.call, "at_start": True, "batches": max(1, bed.size.eval_batches // 3)}
    velocitune = {
        "kind": "velocitune",
        "every": bed.size.call,
        "targets": dict.fromkeys(CHAINS, round(entropy(), 4)),
    }
    return [
        _from_nothing(bed, "equal", *CHAINS, eval=seen),
        _from_nothing(bed, "velocitune", *CHAINS, eval=seen, controller=velocitune),
    ]


def metadata_arms(bed: Bed) -> list[Arm]:
    """Domains as they are, with their names before them, and the last fifth without.

    The names are read besides as much text, so those stages are longer by the share of their tokens.
    """
    with_names = round(CONDITIONED * bed.size.pretrain)
    without = bed.size.pretrain - with_names
    longer = round(with_names * (1.0 + bed.metadata_share))
    steps = longer + without
    names = {"transforms": [{"kind": "metadata"}]}
    staged = _from_nothing(bed, "metadata", MIXED, steps=steps)
    staged.values["stage"] = [
        {"name": "names", "steps": longer} | names,
        {"name": "cooldown", "steps": without, "start": {"policy": "continue"}},
    ]
    del staged.values["train"]["steps"]
    branch: Values = {
        "checkpoint": {"load": str(bed.folder / "metadata" / "names")},
        "start": {"policy": "continue"},
    }
    hot = _from_nothing(bed, "metadata-hot", MIXED, steps=steps, data=names, **branch)
    return [_from_nothing(bed, "domains", MIXED), staged, Arm(hot.name, hot.values, ("metadata",))]


def _from_nothing(bed: Bed, name: str, *sources: str, steps: int | None = None, **sections: Any) -> Arm:
    """A run on equal shares of the sources, at one rate until the last fifth of the text, where it decays.

    Args:
        steps: the bed's number, if not given. sections: of the run file, on top.
    """
    size = bed.size
    decay = size.pretrain - round(CONDITIONED * size.pretrain)
    steps = size.pretrain if steps is None else steps
    schedule = {"kind": "wsd", "warmup_steps": size.warmup, "steps": steps, "decay_steps": decay}
    common: Values = {
        "data": {"tokenizer": TOKENIZER},
        "schedule": schedule,
        "train": {"steps": steps},
    }
    frame = bed.frame(name, dict.fromkeys(sources, 1.0), sets=sources)
    return Arm(name, merged(merged(frame, common), sections))
