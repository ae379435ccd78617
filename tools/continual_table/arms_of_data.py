"""The runs about replay, schedules and controllers."""

from __future__ import annotations

from dataclasses import replace

from tools.continual_table.arm import (
    CONSTANT,
    NEW,
    OLD,
    REPLAY,
    STATIC,
    THIRD,
    TOLERANCE,
    Arm,
    onward,
    shares,
)
from tools.continual_table.bed import FLOOR, PEAK, Bed, Values, merged
from tools.continual_table.running import configuration


def replay_arms(bed: Bed) -> list[Arm]:
    """The ladder, replay alone, one rung with other documents in another order, and from other places."""
    dense = {"dense": True}
    plain, *ladder = (onward(bed, name, shares(share), eval=dense) for name, share in REPLAY.items())
    measured = merged(plain.values, {"losses": [{"kind": "z", "weight": 0.0}]})
    seed, reset = {"seed": bed.seed + 1000}, {"data": "reset"}
    average = {"kind": "ema", "decay": 0.95, "evaluate": True}
    reservoir = {"of": [OLD], "reservoir_tokens": bed.size.reservoir}
    reptile = {"kind": "reptile", "every": 10, "epsilon": 0.3}
    return [
        Arm("plain", measured, plain.needs),
        *ladder,
        onward(bed, "replay-25-again", shares(0.25), run=seed, start=reset),
        onward(bed, "only-replay", {OLD: 1.0}, eval=dense),
        onward(bed, "replay-ledger", data=_replayed(bed, {"of": [OLD]})),
        onward(bed, "replay-reservoir", data=_replayed(bed, reservoir)),
        onward(bed, "reptile", shares(0.05), slow_weights=reptile),
        onward(bed, "reptile-reservoir", data=_replayed(bed, reservoir), slow_weights=reptile),
        onward(bed, "plain-average", slow_weights=average),
    ]


def _replayed(bed: Bed, replay: Values) -> Values:
    """Sources of which a quarter is replayed from what the base has read."""
    return {"sources": [{"name": "replay", "share": 0.25, "replay": replay}, bed.source(NEW, 1.0)]}


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
    common: Values = {"data": {"validation": validation}}
    asked = {"every": call, "at_start": True}
    skillit = {
        "kind": "skillit",
        "every": call,
        "graph": str(bed.folder / "skills" / "graph.json"),
        "eta": 1.0,
    }
    more = {"kind": "raise_replay", "every": call, "watch": [OLD], "replay": [OLD], "tolerance": TOLERANCE}
    return [
        onward(bed, "static", STATIC, **common),
        replace(
            onward(bed, "skillit", STATIC, **common, eval=asked, controller=skillit), prepare=learn_graph
        ),
        onward(bed, "raise-replay", shares(0.05), eval=asked, controller=more),
    ]


def learn_graph(bed: Bed) -> None:
    """Skill-it's graph, from a run on each source alone."""
    from trainer.controllers.graph import measure_graph

    (arm,) = (one for one in controller_arms(bed) if one.name == "static")
    folder = bed.folder / "skills"
    folder.mkdir(exist_ok=True)
    schedule = {"kind": "constant", "warmup_steps": 0}
    values = merged(arm.values, {"schedule": schedule, "optimizer": {"lr": PEAK / 2}})
    measure_graph(configuration(folder / "skills.toml", values), folder, steps=bed.size.skill)
