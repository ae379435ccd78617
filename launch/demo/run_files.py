"""The demo's two run files, written for people to read and to start again by hand."""

from __future__ import annotations

import json
from pathlib import Path

from launch.demo.plan import INFINITE, NUM_LAYERS, REWARM, STAGES, Plan, Way

GLOBAL_BATCH = 8
LR, MIN_LR, CONSTANT_LR = "3e-3", "3e-4", "1.5e-3"
PER_DECADE = 4
"""Held-out losses between step 1 and 10 of the second stage, 10 and 100."""


def write_run_files(plan: Plan) -> None:
    """Write both run files. They need nothing of the demo but the data beside them."""
    for way, text in ((REWARM, rewarm_run_file(plan)), (INFINITE, infinite_run_file(plan))):
        plan.run_file(way).write_text(text, encoding="utf-8")


def rewarm_run_file(plan: Plan) -> str:
    """A cosine for prose, and another one for code."""
    schedule = f'schedule = {{ kind = "cosine", warmup_steps = {plan.size.warmup_steps} }}'
    start = '{ policy = "rewarm" }  # weights and Adam\'s moments stay, the schedule begins anew'
    return _joined(
        _heading(plan, REWARM, "Prose, then code: the learning rate falls, is warmed up again, and falls."),
        *_shared(plan, REWARM),
        _stage(plan, 0, schedule, replay=0.0),
        _stage(plan, 1, f"start = {start}\n{schedule}", replay=REWARM.replay),
    )


def infinite_run_file(plan: Plan) -> str:
    """One infinite schedule for both, annealed at the end; a tenth of the second stage is prose."""
    size = plan.size
    constant = (
        f'kind = "infinite", warmup_steps = {size.warmup_steps}, cooldown_steps = {size.cooldown_steps}, '
        f"constant_lr = {CONSTANT_LR}"
    )
    start = '{ policy = "continue" }  # the schedule too goes on, at its constant learning rate'
    anneal = f"anneal_steps = {size.anneal_steps}"
    return _joined(
        _heading(plan, INFINITE, "Prose, then code: the learning rate stays until the last steps anneal it."),
        *_shared(plan, INFINITE),
        _stage(plan, 0, f"schedule = {{ {constant} }}", replay=0.0),
        _stage(plan, 1, f"start = {start}\nschedule = {{ {constant}, {anneal} }}", replay=INFINITE.replay),
    )


def _joined(*blocks: str) -> str:
    return "\n\n".join(blocks) + "\n"


def _toml(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _heading(plan: Plan, way: Way, text: str) -> str:
    return f"# {text}\n# In this folder: ratoon train {plan.run_file(way).name} --ranks {plan.ranks}"


def _shared(plan: Plan, way: Way) -> tuple[str, ...]:
    """What holds for both stages."""
    return (
        f'[run]\nname = "{way.name}"\ndir = {_toml(plan.run_folder(way))}\nseed = {plan.seed}',
        _model(),
        _data(plan),
        f"[optimizer]\nlr = {LR}\nmin_lr = {MIN_LR}",
        _train(plan),
        _reporting(plan),
    )


def _model() -> str:
    return f"""\
[model]  # a Llama: RMSNorm, SwiGLU, rotary positions, grouped-query attention
num_layers = {NUM_LAYERS}
hidden_size = 128
ffn_hidden_size = 384
num_attention_heads = 4
num_query_groups = 2
tie_word_embeddings = true
init_std = 0.05"""


def _data(plan: Plan) -> str:
    tables = [
        f'[[data.{table}]]\nname = "{name}"\npath = {_toml(plan.data / (name + suffix))}'
        for table, suffix in (("sources", ""), ("validation", "-validation"))
        for name in STAGES
    ]
    head = f"[data]\ntokenizer = {_toml(plan.tokenizer)}\nsequence_length = 128"
    return "\n\n".join((head, *tables))


def _train(plan: Plan) -> str:
    most = GLOBAL_BATCH // max(layout.data(plan.ranks) for layout in plan.layouts)
    return f"""\
[train]
global_batch = {GLOBAL_BATCH}
micro_batch = {min(4, most)}
precision = "{plan.precision}\""""


def _reporting(plan: Plan) -> str:
    return f"""\
[eval]  # of both held-out sets, often where a stage begins
batches = {plan.size.eval_batches}
dense_batches = {plan.size.eval_batches}
dense_per_decade = {PER_DECADE}

[metrics]
every = {plan.record_every}"""


def _stage(plan: Plan, stage: int, keys: str, *, replay: float) -> str:
    """A stage; of the first all sequences are prose, of the second the share `replay`."""
    layout, steps = plan.layouts[stage], (plan.size.first_steps, plan.size.second_steps)[stage]
    prose = 1.0 if stage == 0 else replay
    return f"""\
[[stage]]
name = "{STAGES[stage]}"
steps = {steps}
layout = {{ tensor = {layout.tensor}, pipeline = {layout.pipeline} }}
mixture = {{ weights = {{ prose = {prose:g}, code = {1 - prose:g} }} }}
{keys}"""
