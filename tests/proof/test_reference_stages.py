"""Three stages of Ratoon on three layouts have the losses of a program that knows nothing of Ratoon.

Stage by stage: prose alone, on two data ranks; re-warmed on code with replayed prose, on two tensor ranks;
the same schedule going on with other shares and a third source, on two pipeline stages.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.mesh import destroy_mesh
from tests.data.corpora import ragged, write_tokens
from tests.proof import reference_stages
from tests.proof.reference_stages import Llama, Recipe, Stage, draw_weights, read_documents, run_stages
from tests.proof.runs import Records
from tests.ranks import run_ranks
from trainer.config import resolve
from trainer.loop import train
from trainer.stages.load_stages import load_stages

MODEL = Llama(layers=2, hidden=32, inner=64, heads=4, groups=2, vocabulary=257)
RECIPE = Recipe(seed=11, sequence=32, batch=6, peak=2e-3, floor=1e-4, decay=0.1, clip=1.0)
STEPS = 17
STAGES = (
    Stage(STEPS, {"prose": 1.0}, warmup=3, length=STEPS),
    Stage(STEPS, {"prose": 0.3, "code": 0.7}, warmup=4, length=40),
    Stage(STEPS, {"prose": 0.2, "code": 0.45, "sums": 0.35}, warmup=4, length=40, begins_schedule=False),
)
STRIDES = {"prose": 1, "code": 3, "sums": 7}
"""By how much each token of a source is above the one before: a new source has something to be learnt."""
RUN = """\
[run]
name = "three"
dir = "{folder}/three"
seed = 11

[model]
hf = "{folder}/llama"

[data]
sequence_length = 32

[optimizer]
lr = 2e-3
min_lr = 1e-4
weight_decay = 0.1
decay_embeddings = false
clip = 1.0

[train]
global_batch = 6
precision = "fp32"

[checkpoint]
parity = "never"

[metrics]
tensorboard = false

[[stage]]
name = "first"
steps = 17
start = {{ from = "{folder}/llama", policy = "weights" }}
layout = {{ tensor = 1 }}
schedule = {{ kind = "cosine", warmup_steps = 3 }}
data = {{ sources = [
    {{ name = "prose", path = "{folder}/prose" }},
] }}

[[stage]]
name = "second"
steps = 17
start = {{ policy = "rewarm" }}
layout = {{ tensor = 2 }}
schedule = {{ kind = "cosine", warmup_steps = 4, steps = 40 }}
mixture = {{ weights = {{ prose = 0.3, code = 0.7 }} }}
data = {{ sources = [
    {{ name = "prose", path = "{folder}/prose" }},
    {{ name = "code", path = "{folder}/code" }},
] }}

[[stage]]
name = "third"
steps = 17
start = {{ policy = "continue" }}
layout = {{ pipeline = 2 }}
schedule = {{ kind = "cosine", warmup_steps = 4, steps = 40 }}
mixture = {{ weights = {{ prose = 0.2, code = 0.45, sums = 0.35 }} }}
data = {{ sources = [
    {{ name = "prose", path = "{folder}/prose" }},
    {{ name = "code", path = "{folder}/code" }},
    {{ name = "sums", path = "{folder}/sums" }},
] }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpora and the initial weights, which the reference draws, in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("reference")
    for seed, (name, stride) in enumerate(STRIDES.items()):
        documents = [[token * stride % 250 for token in one] for one in ragged(60, seed=seed, longest=50)]
        write_tokens(folder / name, documents)
    write_weights(folder / "llama")
    return folder


def write_weights(folder: Path) -> None:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": MODEL.layers,
        "hidden_size": MODEL.hidden,
        "intermediate_size": MODEL.inner,
        "num_attention_heads": MODEL.heads,
        "num_key_value_heads": MODEL.groups,
        "vocab_size": MODEL.vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": MODEL.epsilon,
        "rope_theta": MODEL.theta,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(draw_weights(MODEL, seed=3), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def losses(folder: Path) -> list[float]:
    """Ratoon's, of all stages."""
    path = folder / "run.toml"
    path.write_text(RUN.format(folder=folder))
    return run_ranks(train_stages, 2, path)[0]  # type: ignore[no-any-return]


def train_stages(path: Path) -> list[float]:
    torch.set_num_threads(1)
    found: dict[int, float] = {}
    for stage in load_stages(path):
        records = Records()
        train(resolve(stage.config), sink=records)
        destroy_mesh()
        found |= records.losses
    assert list(found) == list(range(1, len(STAGES) * STEPS + 1))
    return list(found.values())


def reference(folder: Path, *stages: Stage) -> list[float]:
    corpora = {name: read_documents(folder / name) for name in STRIDES}
    return run_stages(RECIPE, MODEL, draw_weights(MODEL, seed=3), stages, corpora)


def farthest(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def test_fifty_losses_of_three_stages_are_those_of_the_reference(folder: Path, losses: list[float]) -> None:
    assert farthest(losses[:50], reference(folder, *STAGES)[:50]) < 1e-5


def test_the_reference_imports_nothing_of_ratoon() -> None:
    nodes = list(ast.walk(ast.parse(Path(reference_stages.__file__).read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imported}
    assert roots <= {"torch", "numpy", *sys.stdlib_module_names}


def test_the_sources_are_read_beyond_an_epoch(folder: Path) -> None:
    """So that the losses speak of the order of more than one epoch."""
    sizes = {name: sum(map(len, read_documents(folder / name))) for name in STRIDES}
    read = dict.fromkeys(STRIDES, 0.0)
    for stage in STAGES:
        for name, share in stage.shares.items():
            read[name] += share * stage.steps * RECIPE.batch * RECIPE.sequence
    assert read["prose"] > 2 * sizes["prose"]
    assert read["code"] > 2 * sizes["code"]


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (1, {"shares": {"prose": 0.25, "code": 0.75}}),
        (1, {"begins_schedule": False, "length": STEPS, "warmup": 3}),
        (2, {"begins_schedule": True}),
        (2, {"shares": {"prose": 0.2, "code": 0.4, "sums": 0.4}}),
    ],
    ids=["replay", "no re-warming", "re-warming", "mixture"],
)
def test_a_reference_that_does_something_else_is_told_apart(
    folder: Path, losses: list[float], stage: int, change: dict[str, object]
) -> None:
    changed = dataclasses.replace(STAGES[stage], **change)  # type: ignore[arg-type]
    other = reference(folder, *STAGES[:stage], changed)[stage * STEPS :]
    assert farthest(losses[stage * STEPS :][:STEPS], other) > 1e-3
