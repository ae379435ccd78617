"""`ratoon checkpoint parity` on two checkpoints that differ in one thing: the thing is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.opening import open_checkpoint
from checkpoint.writers.options import WriteOptions
from launch.errors import RankError
from parallel.layout import Layout
from tests.checkpoint.models import rewrite
from tests.families.cases import FAMILIES, build_model
from tests.ranks import run_ranks
from trainer.parity.job import ParityJob, architectures, run_parity, with_suspects
from trainer.parity.report import ParityReport

Tensors = dict[str, torch.Tensor]
QKV = tuple(f"model.layers.1.self_attn.{one}_proj.weight" for one in "qkv")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            build_model(FAMILIES[name]).save_pretrained(made[name])
        return made[name]

    return save


def compare(ours: Path, theirs: Path, *, length: int = 32) -> ParityReport:
    """What the command computes on one rank."""
    opened, other = open_checkpoint(ours), open_checkpoint(theirs)
    models = architectures(opened, other)
    job = ParityJob(ours, theirs, models[0], Layout(), length=length)
    return with_suspects(run_ranks(run_parity, 1, job)[0], opened, other, models)


def changed(
    source: Path,
    folder: Path,
    settings: dict[str, Any] | None = None,
    weights: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """A copy of a model with other settings or weights."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (settings or {})))
    if weights is not None:
        tensors = weights(load_file(folder / "model.safetensors"))
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize(
    ("family", "settings", "place", "words"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "layer 0 attention",
            "the RoPE base: model.rope_theta is 500.0 here and 10000.0 there",
        ),
        (
            "llama 3.1 rope",
            {"rope_parameters": LLAMA3 | {"factor": 32.0}},
            "layer 0 attention",
            "the RoPE scaling",
        ),
        ("llama", {"rms_norm_eps": 0.1}, "layer 0 attention", "the norm's epsilon"),
        ("mistral", {"sliding_window": 16}, "layer 0 attention", "the attention window"),
        (
            "qwen3_moe, normed",
            {"norm_topk_prob": False},
            "layer 0 mlp",
            "the normalisation of the router's weights",
        ),
        ("qwen3_moe, normed", {"num_experts_per_tok": 3}, "layer 0 mlp", "the experts a token is sent to"),
    ],
)
def test_a_setting(
    saved: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    place: str,
    words: str,
) -> None:
    report = compare(changed(saved(family), tmp_path / "ours", settings), saved(family))
    assert not report.same
    assert report.first is not None
    assert report.first.point == place
    assert len(report.suspects) == 1, report.suspects
    assert words in report.suspects[0]


def by_group(tensors: Tensors) -> Tensors:
    """q, k and v as if a matrix of groups (q q k v a group) had been cut into q, then k, then v."""
    q, k, v = (tensors[name] for name in QKV)
    groups = torch.cat([one.view(2, -1, 8, one.shape[1]) for one in (q, k, v)], dim=1).flatten(0, 2)
    return tensors | dict(zip(QKV, torch.split(groups, [len(q), len(k), len(v)]), strict=True))


def gate_for_up(tensors: Tensors) -> Tensors:
    gate, up = (f"model.layers.2.mlp.{one}_proj.weight" for one in ("gate", "up"))
    return tensors | {gate: tensors[up], up: tensors[gate]}


def scaled(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: 1.1 * tensors[name]}


@pytest.mark.parametrize(
    ("family", "change", "place", "words"),
    [
        ("llama", by_group, "layer 1 attention", "the qkv order: by group in the file"),
        ("llama", gate_for_up, "layer 2 mlp", "gate and up are swapped"),
        (
            "qwen2",
            scaled("model.layers.0.self_attn.k_proj.bias"),
            "layer 0 attention",
            "the values of model.layers.0.self_attn.k_proj.bias",
        ),
        ("llama", scaled("lm_head.weight"), "logits", "the values of lm_head.weight"),
    ],
)
def test_a_weight(
    saved: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    change: Callable[[Tensors], Tensors],
    place: str,
    words: str,
) -> None:
    report = compare(changed(saved(family), tmp_path / "ours", weights=change), saved(family))
    assert report.first is not None
    assert report.first.point == place
    assert len(report.suspects) == 1, report.suspects
    assert words in report.suspects[0]


def test_a_bias_that_is_not_there(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """qwen2 is llama with a bias of q, k and v: taken for llama, without them, it differs by that alone."""

    def unbiased(tensors: Tensors) -> Tensors:
        return {name: one for name, one in tensors.items() if not name.endswith(".bias")}

    config = json.loads((saved("llama") / "config.json").read_text())
    ours = changed(saved("qwen2"), tmp_path / "ours", weights=unbiased)
    (ours / "config.json").write_text(json.dumps(config))
    report = compare(ours, saved("qwen2"))
    assert "the bias of q, k and v: model.qkv_bias is False here and True there" in report.suspects
    name = "model.layers.0.self_attn.q_proj.bias"
    assert f"a bias that only one side has: {name}, there" in report.suspects


def test_tied_embeddings(saved: Callable[[str], Path], tmp_path: Path) -> None:
    theirs = saved("llama")

    def tied(tensors: Tensors) -> Tensors:
        return {name: one for name, one in tensors.items() if name != "lm_head.weight"}

    report = compare(changed(theirs, tmp_path / "ours", {"tie_word_embeddings": True}, tied), theirs)
    assert report.first is not None
    assert report.first.point == "logits"
    assert "tied embeddings: model.tie_word_embeddings is True here and False there" in report.suspects


@pytest.mark.parametrize("rows", [64, 72])
def test_another_vocabulary(saved: Callable[[str], Path], tmp_path: Path, rows: int) -> None:
    """Padding taken for tokens, or tokens cut off: ids that both sides know are compared."""

    def padded(tensors: Tensors) -> Tensors:
        more = {}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            whole = torch.zeros(72, tensors[name].shape[1])
            whole[: len(tensors[name])] = tensors[name]
            more[name] = whole[:rows]
        return tensors | more

    ours = changed(saved("llama"), tmp_path / "ours", {"vocab_size": rows}, padded)
    report = compare(ours, saved("llama"))
    assert report.first is not None
    assert report.first.point == "logits"
    assert f"the vocabulary, or its padding: model.vocab_size is {rows} here and 67 there" in report.suspects
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["differences"][-1]["relative"] is None


def test_what_was_converted_keeps_its_settings(saved: Callable[[str], Path], tmp_path: Path) -> None:
    other = changed(saved("llama"), tmp_path / "other", {"rms_norm_eps": 0.1})
    convert(prepare(other, "universal", WriteOptions()), tmp_path / "universal")
    report = compare(tmp_path / "universal", saved("llama"))
    assert [one.split(":")[0] for one in report.suspects] == ["the norm's epsilon"]


def test_arguments_of_megatron_count(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """They say the RoPE base, which no shape gives away."""
    convert(prepare(saved("llama"), "universal", WriteOptions()), tmp_path / "universal")
    folder, manifest = read_manifest(tmp_path / "universal")
    state = {key: value for key, value in manifest.state.items() if key != "model_config"}
    state["source"] = {"args": {"rotary_base": 500, "norm_epsilon": 1e-6, "moe_router_topk": 2}}
    rewrite(folder, replace(manifest, state=state))
    report = compare(folder, saved("llama"))
    assert report.suspects == ("the RoPE base: model.rope_theta is 500 here and 10000.0 there",)


def test_masters_stand_for_weights_that_are_not_there(saved: Callable[[str], Path], tmp_path: Path) -> None:
    theirs = saved("llama")
    other = changed(theirs, tmp_path / "other", weights=scaled(QKV[0]))
    convert(prepare(other, "universal", WriteOptions()), tmp_path / "universal")
    folder, manifest = read_manifest(tmp_path / "universal")
    tensors = tuple(replace(tensor, state="master") for tensor in manifest.tensors)
    rewrite(folder, replace(manifest, tensors=tensors))
    assert compare(folder, theirs).suspects == (f"the values of {QKV[0]}",)


def test_a_folder_that_transformers_cannot_compute_is_said_on_every_rank(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    theirs = changed(saved("llama"), tmp_path / "theirs")
    (theirs / "model.safetensors").write_bytes(b"no")
    ours = saved("llama")
    model, _ = architectures(open_checkpoint(ours), open_checkpoint(ours))
    job = ParityJob(ours, theirs, model, Layout(tensor=2), length=32)
    with pytest.raises(RankError) as error:
        run_ranks(run_parity, 2, job)
    assert error.value.message is not None
    assert f"transformers cannot compute {theirs}" in error.value.message
