"""Universal folders: everything the source holds, for Ratoon and for whoever opens safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from checkpoint.boxes import Box
from checkpoint.convert.run import convert, prepare
from checkpoint.folder import find_latest, read_manifest
from checkpoint.load import load
from checkpoint.manifest import LogicalTensor, Manifest, Piece
from checkpoint.opening import open_checkpoint
from checkpoint.verification.report import verify_checkpoint
from checkpoint.whole import read_whole
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import (
    Grid,
    assert_equal,
    empty_slices,
    make_tensors,
    rewrite,
    save_all_ranks,
    slices_of,
)
from tests.foreign import huggingface
from tests.foreign.deepspeed import Run
from tests.foreign.deepspeed import save as save_deepspeed
from tests.foreign.oracle import STATES, Oracle

SMALL = Oracle(hidden=64, vocab=263)


def to_universal(source: Path, target: Path, *, shard_bytes: int = 1 << 30) -> Path:
    convert(prepare(source, "universal", WriteOptions(shard_bytes=shard_bytes)), target)
    return target


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return save_all_ranks(tmp_path / "run", make_tensors(0), Grid(2, 1, 2))[0]


@pytest.mark.parametrize("grid", [Grid(1, 1, 3), Grid(3, 1, 1), Grid(1, 1, 2, False)], ids=str)
def test_it_loads_on_any_layout(native: Path, tmp_path: Path, grid: Grid) -> None:
    target = to_universal(native, tmp_path / "out", shard_bytes=4096)
    for rank in range(grid.world_size):
        slices = empty_slices(make_tensors(0), grid, rank)
        loaded = load(target, slices, rank=rank, verify="full")
        assert loaded.step == 100
        assert loaded.is_native
        assert_equal(slices, slices_of(make_tensors(0), grid, rank))


def test_it_never_counts_as_a_run_s_newest_checkpoint_nor_as_its_own(native: Path) -> None:
    target = to_universal(native, native.parent / "step-00000100.whole")
    assert find_latest(native.parent) == native
    assert open_checkpoint(target).run_id is None


def test_transformers_opens_the_weights(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "source", SMALL)
    target = to_universal(tmp_path / "source", tmp_path / "out", shard_bytes=100_000)
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert huggingface.differences(target, SMALL) == []


def test_a_checkpoint_of_our_own_gets_a_config_that_transformers_knows(native: Path, tmp_path: Path) -> None:
    folder, manifest = read_manifest(native)
    model = SMALL.architecture().model_dump(mode="json")
    rewrite(folder, replace(manifest, state={**manifest.state, "model": model}))
    convert(prepare(native, "universal", WriteOptions()), tmp_path / "out", verify=False)  # of another model
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.vocab_size, config.dtype) == ("llama", 263, torch.bfloat16)


def test_deepspeed_s_state_arrives_bit_for_bit(tmp_path: Path) -> None:
    oracle = replace(SMALL, precision="bf16")
    save_deepspeed(tmp_path / "source", oracle, Run(stage=2))
    target = to_universal(tmp_path / "source", tmp_path / "out", shard_bytes=300_000)
    assert verify_checkpoint(target).is_sound
    folder, manifest = read_manifest(target)
    assert {(t.name, t.state) for t in manifest.tensors} == {(n, s) for n in oracle.shapes() for s in STATES}
    for tensor in manifest.tensors:
        assert torch.equal(read_whole(folder, tensor), oracle.value(tensor.name, tensor.state))
    assert manifest.state["scalars"] == open_checkpoint(tmp_path / "source").manifest.state["scalars"]
    assert manifest.state["groups"] == open_checkpoint(tmp_path / "source").manifest.state["groups"]


def test_optimizer_state_is_safetensors_under_its_own_names(native: Path, tmp_path: Path) -> None:
    target = to_universal(native, tmp_path / "out")
    tensors = make_tensors(0)
    with safe_open(target / "optimizer-exp_avg.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{name}@exp_avg" for name, state in tensors if state == "exp_avg"}
        for name, state in tensors:
            if state == "exp_avg":
                assert torch.equal(file.get_tensor(f"{name}@exp_avg"), tensors[name, state])


@pytest.mark.parametrize(("state", "dtype"), [("momentum/8 bit", "uint8"), ("step", "int64")])
def test_any_state_of_any_dtype_is_carried(tmp_path: Path, state: str, dtype: str) -> None:
    values = torch.arange(15, dtype=getattr(torch, dtype)).reshape(3, 5)
    source = tmp_path / "step-00000001"
    source.mkdir()
    (source / "data.bin").write_bytes(values.numpy().tobytes())
    piece = Piece("data.bin", 0, dtype, Box((0, 0), (3, 5)))
    rewrite(source, Manifest(1, 1, (LogicalTensor("w", state, (3, 5), dtype, (piece,)),)))
    folder, manifest = read_manifest(to_universal(source, tmp_path / "out"))
    assert [tensor.state for tensor in manifest.tensors] == [state]
    assert torch.equal(read_whole(folder, manifest.tensors[0]), values)


def test_precision_that_nothing_else_keeps_is_not_lost_unasked(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "source", SMALL)
    conversion = prepare(tmp_path / "source", "universal", WriteOptions(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"precision of 39 weights that have no fp32 master.*\n.*--drop"):
        convert(conversion, tmp_path / "out")
    convert(conversion, tmp_path / "out", drop=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    folder, manifest = read_manifest(tmp_path / "out")
    for tensor in manifest.tensors:
        assert torch.equal(read_whole(folder, tensor), SMALL.value(tensor.name, "weight").bfloat16())


def test_an_unknown_dtype_is_refused(native: Path) -> None:
    with pytest.raises(ValueError, match="int8: weights are written as float32, bfloat16 or float16"):
        prepare(native, "universal", WriteOptions(dtype="int8"))
