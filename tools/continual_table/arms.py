"""The runs of one seed: what each does otherwise than the plain one, as run files.

Most begin at the checkpoint of `base`, which has learned prose, and go on with code: `plain` with code alone,
a new warm-up and a new decay. Strengths were looked at on seed 0, and are the same for all others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.continual_table.bed import FLOOR, PEAK, Bed, Values, merged

OLD, NEW, THIRD, FOURTH = "prose", "code", "cpp", "questions"
STATIC = {NEW: 1.0, THIRD: 1.0, FOURTH: 1.0}
"""The mixture that controllers start from."""
CONSTANT = PEAK / 2
"""Where the infinite schedule stays."""
REPLAY: Mapping[str, float] = {"plain": 0.0, "replay-5": 0.05, "replay-25": 0.25, "replay-50": 0.5}
"""The ladder: arm and share of prose in every batch."""
TOLERANCE = 0.3
"""Nats that the loss on prose may rise before more of it is replayed."""
TARGETS = "targets.json"
"""Velocitune's, in the seed's folder."""
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


def arms(bed: Bed) -> list[Arm]:
    """All runs of a seed, none before what it needs."""
    return [
        base(bed),
        *replay_arms(bed),
        *schedule_arms(bed),
        *controller_arms(bed),
        *loss_arms(bed),
        *update_arms(bed),
        *slow_arms(bed),
    ]


def base(bed: Bed) -> Arm:
    """Prose, from nothing. The anchor only listens, for the arm `si`: no weight moves otherwise for it."""
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


def replay_arms(bed: Bed) -> list[Arm]:
    """The ladder, replay alone, one rung with other documents in another order, and from other places."""
    dense = {"dense": True}
    plain, *ladder = (onward(bed, name, _shares(share), eval=dense) for name, share in REPLAY.items())
    measured = merged(plain.values, {"losses": [{"kind": "z", "weight": 0.0}]})
    seed, reset = {"seed": bed.seed + 1000}, {"data": "reset"}
    average = {"kind": "ema", "decay": 0.95, "evaluate": True}
    reservoir = {"of": [OLD], "reservoir_tokens": bed.size.reservoir}
    reptile = {"kind": "reptile", "every": 10, "epsilon": 0.3}
    return [
        Arm("plain", measured, plain.needs),
        *ladder,
        onward(bed, "replay-25-again", _shares(0.25), run=seed, start=reset),
        onward(bed, "only-replay", {OLD: 1.0}, eval=dense),
        onward(bed, "replay-ledger", data=_replayed(bed, {"of": [OLD]})),
        onward(bed, "replay-reservoir", data=_replayed(bed, reservoir)),
        onward(bed, "reptile", _shares(0.05), slow_weights=reptile),
        onward(bed, "reptile-reservoir", data=_replayed(bed, reservoir), slow_weights=reptile),
        onward(bed, "plain-average", slow_weights=average),
    ]


def _replayed(bed: Bed, replay: Values) -> Values:
    """Sources of which a quarter is replayed from what the base has read."""
    return {"sources": [{"name": "replay", "share": 0.25, "replay": replay}, bed.source(NEW, 1.0)]}


def _shares(replay: float, new: str = NEW) -> dict[str, float]:
    """Weights by source; one that has no share is left out."""
    return {name: share for name, share in ((OLD, replay), (new, 1.0 - replay)) if share}


def schedule_arms(bed: Bed) -> list[Arm]:
    """Lower peaks, no new warm-up, and three corpora under an infinite schedule and repeated cosines."""
    size = bed.size
    dense = {"dense": True}
    infinite = bed.frame("infinite", {OLD: 1.0}, sets=(OLD, NEW, THIRD))
    infinite["data"]["sources"] += [bed.source(name, 1.0) for name in (NEW, THIRD)]
    del infinite["train"]["steps"]
    law = {
        "kind": "infinite",
        "warmup_steps": size.warmup,
        "cooldown_steps": size.cooldown,
        "constant_lr": CONSTANT,
    }
    infinite["schedule"] = law
    lengths = {OLD: size.pretrain, NEW: size.more, THIRD: size.more}
    infinite["stage"] = [
        {
            "name": name,
            "steps": steps,
            "mixture": {"weights": {one: float(one == name) for one in lengths}},
            "eval": {} if name == OLD else dense,
        }
        | ({} if name == OLD else {"start": {"policy": "continue"}})
        for name, steps in lengths.items()
    ]
    infinite["stage"][-1]["schedule"] = law | {"anneal_steps": size.last_anneal}
    return [
        Arm("infinite", infinite),
        onward(bed, "cosine-third", {THIRD: 1.0}, load="plain", eval=dense),
        onward(bed, "peak-third", optimizer={"lr": 0.3 * PEAK}),
        onward(bed, "no-rewarm", schedule={"kind": "constant", "warmup_steps": 0}, optimizer={"lr": FLOOR}),
    ]


def controller_arms(bed: Bed) -> list[Arm]:
    """Three new sources in equal shares or a controller's, and replay that rises where it has to."""
    call, sets = bed.size.call, tuple(STATIC)
    validation = [{"name": one, "path": bed.corpus(f"{one}-validation")} for one in sets]
    common: Values = {"data": {"validation": validation}, "eval": {"every": call}}
    short: Values = {
        "data": {"validation": validation},
        "train": {"steps": bed.size.pretrain + bed.size.short},
        "eval": {"every": max(1, bed.size.short // 6)},
    }
    velocitune = {"kind": "velocitune", "every": call, "targets": str(bed.folder / TARGETS), "eta": 0.5}
    skillit = {
        "kind": "skillit",
        "every": call,
        "graph": str(bed.folder / "skills" / "graph.json"),
        "eta": 1.0,
    }
    more = {"kind": "raise_replay", "every": call, "watch": [OLD], "replay": [OLD], "tolerance": TOLERANCE}
    return [
        onward(bed, "short", STATIC, **short),
        onward(bed, "static", STATIC, **common),
        _prepared(onward(bed, "velocitune", STATIC, **common, controller=velocitune), fit, "short"),
        _prepared(onward(bed, "skillit", STATIC, **common, controller=skillit), learn_graph),
        onward(bed, "raise-replay", _shares(0.05), eval={"every": call}, controller=more),
    ]


def _prepared(arm: Arm, prepare: Callable[[Bed], None], *needs: str) -> Arm:
    return Arm(arm.name, arm.values, (*arm.needs, *needs), prepare)


def fit(bed: Bed) -> None:
    """Velocitune's targets, from the short run, for as many tokens as the others have."""
    from trainer.controllers.targets import fit_targets

    size = bed.size
    tokens = size.more * size.global_batch * 128
    fit_targets(bed.folder / "short", tokens, bed.folder / TARGETS)


def learn_graph(bed: Bed) -> None:
    """Skill-it's graph, from a run on each source alone."""
    from tools.continual_table.running import configuration
    from trainer.controllers.graph import measure_graph

    (arm,) = (one for one in controller_arms(bed) if one.name == "static")
    folder = bed.folder / "skills"
    folder.mkdir(exist_ok=True)
    schedule = {"kind": "constant", "warmup_steps": 0}
    values = merged(arm.values, {"schedule": schedule, "optimizer": {"lr": PEAK / 2}})
    graph = measure_graph(configuration(folder / "skills.toml", values), folder, steps=bed.size.skill)
    assert json.loads((folder / "graph.json").read_text()) == graph


def loss_arms(bed: Bed) -> list[Arm]:
    """Stay near the start on replayed text, near it on the new text, and log^2 Z."""
    kl = {"kind": "kl", "weight": 1.0}
    return [
        onward(bed, "kl-replay", _shares(0.05), losses=[kl | {"weight": 4.0, "sources": [OLD]}]),
        onward(bed, "kl-new", losses=[kl | {"sources": [NEW]}]),
        onward(bed, "kl-all", _shares(0.05), losses=[kl | {"weight": 1.0}]),
        onward(bed, "z", losses=[{"kind": "z", "weight": 1e-3}]),
    ]


def update_arms(bed: Bed) -> list[Arm]:
    """Frozen layers, and anchors of three kinds at two strengths."""
    fisher = {"sources": [OLD], "batches": bed.size.fisher}
    strengths = {"l2": (0.3, 3.0), "ewc": (0.3, 3.0), "si": (0.3, 3.0)}
    arms = [onward(bed, "freeze", updates={"freeze": FROZEN})]
    for kind, pair in strengths.items():
        for word, strength in zip(("weak", "strong"), pair, strict=True):
            anchor = {"kind": kind, "strength": strength} | (fisher if kind == "ewc" else {})
            arms.append(onward(bed, f"{kind}-{word}", updates={"anchor": anchor}))
    return arms


def slow_arms(bed: Bed) -> list[Arm]:
    """An average at a constant learning rate, and a long one."""
    constant = {"kind": "constant", "warmup_steps": bed.size.warmup}
    ema = {"kind": "ema", "evaluate": True}
    return [
        onward(bed, "constant-average", schedule=constant, slow_weights=ema | {"decay": 0.95}),
        onward(bed, "long-average", slow_weights=ema | {"decay": 0.995}),
    ]


def seed_folder(folder: Path, seed: int) -> Path:
    """Where the runs of a seed lie."""
    return folder / f"seed-{seed}"
