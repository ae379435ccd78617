"""Checkpoints cut by a layout: nothing is lost, and each rank's file is all that this rank needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.verification.report import verify_checkpoint
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from tests.foreign.huggingface import save
from tests.foreign.oracle import Oracle

DENSE, EXPERTS = Oracle(hidden=64, vocab=263), Oracle(hidden=64, vocab=263, experts=4)


@pytest.mark.parametrize(
    ("oracle", "layout", "files"),
    [
        (DENSE, {"tensor": 2, "pipeline": 2}, 4),
        (DENSE, {"tensor": 3}, 3),
        (EXPERTS, {"expert": 2, "pipeline": 4}, 8),
    ],
)
def test_every_tensor_is_there(oracle: Oracle, layout: dict[str, int], files: int, tmp_path: Path) -> None:
    save(tmp_path / "source", oracle)
    convert(prepare(tmp_path / "source", "ranks", WriteOptions(layout=layout)), tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("rank-*.safetensors"))) == files
    assert verify_checkpoint(tmp_path / "cut").is_sound
    folder, manifest = read_manifest(tmp_path / "cut")
    assert {tensor.name for tensor in manifest.tensors} == set(oracle.shapes())
    for tensor in manifest.tensors:
        assert torch.equal(read_whole(folder, tensor), oracle.value(tensor.name, "weight"))


def test_a_rank_of_the_layout_finds_what_it_needs_in_one_file(tmp_path: Path) -> None:
    save(tmp_path / "source", DENSE)
    convert(
        prepare(tmp_path / "source", "ranks", WriteOptions(layout={"tensor": 2, "pipeline": 2})),
        tmp_path / "cut",
    )
    _, manifest = read_manifest(tmp_path / "cut")
    pieces = {(tensor.name, piece.file): piece.box for tensor in manifest.tensors for piece in tensor.pieces}
    second_rank_of_last_stage = "rank-00003.safetensors"
    head = DENSE.architecture().head_dim
    box = pieces["model.layers.3.self_attn.q_proj.weight", second_rank_of_last_stage]
    assert (box.offset, box.size) == ((4 * head, 0), (4 * head, 64))
    box = pieces["model.layers.3.mlp.down_proj.weight", second_rank_of_last_stage]
    assert (box.offset, box.size) == ((0, 164), (64, 164))
    assert ("lm_head.weight", second_rank_of_last_stage) in pieces
    assert ("model.embed_tokens.weight", second_rank_of_last_stage) not in pieces


def test_a_layout_that_does_not_divide_the_layers_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "source", DENSE)
    with pytest.raises(ValueError, match="4 layers do not divide over pipeline = 3"):
        prepare(tmp_path / "source", "ranks", WriteOptions(layout={"pipeline": 3}))


def test_weights_are_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "source", DENSE)
    conversion = prepare(tmp_path / "source", "ranks", WriteOptions(layout={"tensor": 2}, dtype="bfloat16"))
    assert any("rounded to bfloat16" in line for line in conversion.plan.lost)
    convert(conversion, tmp_path / "cut", drop=True)
    folder, manifest = read_manifest(tmp_path / "cut")
    for tensor in manifest.tensors:
        assert torch.equal(read_whole(folder, tensor), DENSE.value(tensor.name, "weight").bfloat16())
