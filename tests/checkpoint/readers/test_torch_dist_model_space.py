"""A genuine checkpoint of megatron-core 0.13, fully_sharded_model_space, TP2 x DP3, is read bit for bit."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from checkpoint.boxes import Box
from checkpoint.opening import open_checkpoint
from checkpoint.readers.torch_dist import read
from checkpoint.readers.torch_dist_shards import Whole
from checkpoint.streaming.bits import rounded
from checkpoint.streaming.panels import Files
from tests.foreign import model_space
from tests.foreign.model_space.values import PADDED_VOCAB, SHAPES, STEP, value

STATES = ("weight", "master", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model_space")
    with tarfile.open(Path(model_space.__file__).parent / "checkpoint.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path


def test_every_state_is_read_bit_for_bit(folder: Path) -> None:
    source = read(folder)
    assert not source.problems
    assert {(tensor.name, tensor.state) for tensor in source.tensors} == {
        (name, state) for name in SHAPES for state in STATES
    }
    with Files(folder) as files:
        for tensor in source.tensors:
            dtype = "bfloat16" if tensor.state == "weight" else "float32"
            whole = Whole(tensor.name, dtype, tensor.shape, tensor.pieces)
            held = whole.read(files, Box((0,) * len(tensor.shape), tensor.shape))
            planted = value(tensor.name, "master" if tensor.state == "weight" else tensor.state).view(
                np.uint32
            )
            expected = rounded(planted, "float32", dtype)
            assert expected is not None
            assert np.array_equal(held, expected), (tensor.name, tensor.state)


def test_the_manifest_covers_every_logical_tensor(folder: Path) -> None:
    opened = open_checkpoint(folder, facts={"vocab_size": PADDED_VOCAB})
    assert opened.format == "Megatron torch_dist, TP2 PP1, fully_sharded_model_space, bf16"
    assert opened.manifest.state["scalars"]["updates"] == STEP
    assert len(opened.manifest.by_key()) == len(STATES) * (3 + 2 * 9)
