"""The run files of the demo's two stages, written for people to read and to start again by hand."""

from __future__ import annotations

import json
from pathlib import Path

from launch.demo.plan import NUM_LAYERS, Plan

GLOBAL_BATCH = 8


def write_run_files(plan: Plan) -> None:
    """Write both run files. They need nothing of the demo but the data beside them."""
    for path, text in zip(plan.run_files, (first_run_file(plan), second_run_file(plan)), strict=True):
        path.write_text(text, encoding="utf-8")


def first_run_file(plan: Plan) -> str:
    """The stage that starts from nothing."""
    return _joined(
        _heading(plan, 0, "A small Llama learns prose."),
        f'[run]\nname = "prose"\ndir = {_toml(plan.run_folders[0])}',
        _model(),
        _parallel(plan, 0),
        _data(plan),
        _source(plan, "prose", weight=1.0),
        _optimizer(lr=1e-2),
        f'[schedule]\nkind = "cosine"\nwarmup_steps = {plan.size.warmup_steps}',
        _train(plan, 0),
        f"[checkpoint]\nevery = {plan.size.first_steps}",
        _reporting(plan),
    )


def second_run_file(plan: Plan) -> str:
    """The stage that goes on from the first one's checkpoint: other data, other layout, new schedule."""
    return _joined(
        _heading(plan, 1, "The same Llama learns code, and goes on reading prose lest it forget."),
        f'[run]\nname = "code"\ndir = {_toml(plan.run_folders[1])}',
        f"""\
[checkpoint]
load = {_toml(plan.run_folders[0])}  # the newest one in there
every = {plan.size.second_steps}

[start]
policy = "rewarm"  # a new schedule from here on; weights and moments stay""",
        _model(),
        _parallel(plan, 1),
        _data(plan),
        _source(plan, "prose", weight=0.3),
        _source(plan, "code", weight=0.7),
        _optimizer(lr=5e-3),
        f"""\
[schedule]
kind = "cosine"
warmup_steps = {plan.size.warmup_steps}""",
        _train(plan, 1),
        _reporting(plan),
    )


def _joined(*blocks: str) -> str:
    return "\n\n".join(blocks) + "\n"


def _toml(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _heading(plan: Plan, stage: int, text: str) -> str:
    return f"# {text}\n# In this folder: ratoon train {plan.run_files[stage].name} --ranks {plan.ranks}"


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


def _parallel(plan: Plan, stage: int) -> str:
    layout = plan.layouts[stage]
    return f"""\
[parallel]  # of {plan.ranks} ranks; data parallelism takes what these two leave over
tensor = {layout.tensor}
pipeline = {layout.pipeline}"""


def _data(plan: Plan) -> str:
    return f"""\
[data]
tokenizer = {_toml(plan.tokenizer)}
sequence_length = 128

[[data.validation]]
name = "prose"
path = {_toml(plan.data / "prose-validation")}

[[data.validation]]
name = "code"
path = {_toml(plan.data / "code-validation")}"""


def _source(plan: Plan, name: str, *, weight: float) -> str:
    return f'[[data.sources]]\nname = "{name}"\npath = {_toml(plan.data / name)}\nweight = {weight}'


def _optimizer(*, lr: float) -> str:
    return f"[optimizer]\nlr = {lr}\nmin_lr = {lr / 10}"


def _train(plan: Plan, stage: int) -> str:
    note = "  # those of the first stage included" if stage else ""
    return f"""\
[train]
steps = {plan.last_steps[stage]}{note}
global_batch = {GLOBAL_BATCH}
micro_batch = {min(4, GLOBAL_BATCH // plan.layouts[stage].data(plan.ranks))}
precision = "{plan.precision}\""""


def _reporting(plan: Plan) -> str:
    return f"""\
[eval]
at_start = true
batches = {plan.size.eval_batches}

[metrics]
every = {plan.record_every}"""
