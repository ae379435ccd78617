"""Written DCP folders: torch's own loader fills FSDP2 from them, and its next update is the oracle's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.boxes import Box
from checkpoint.convert.run import Conversion, convert, prepare
from checkpoint.opening import open_checkpoint
from checkpoint.readers.dcp import read
from checkpoint.source import Part
from checkpoint.whole import read_whole
from checkpoint.writers.dcp_folder import narrowed
from checkpoint.writers.options import WriteOptions
from tests.foreign.dcp import TENSOR, Run, load_and_step, save
from tests.foreign.oracle import BETAS, LR, STEP, Oracle

ORACLE = Oracle(layers=1)
FACTS = {"hidden_size": ORACLE.hidden, "num_attention_heads": 8}
TITAN = WriteOptions(spec="torchtitan-llama", facts=FACTS)
RESUMING = {
    "two ranks": (Run(), WriteOptions()),
    "three ranks": (Run(mesh=(3,)), WriteOptions()),
    "two by two, small files": (Run(mesh=(2, 2), axes=TENSOR), WriteOptions(shard_bytes=1 << 19)),
    "torchtitan": (Run(mesh=(3,), layout="titan", titan_names=True), TITAN),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine checkpoint of FSDP1 on two ranks: other files and keys than what is written."""
    return save(tmp_path_factory.mktemp("source") / "fsdp1", ORACLE, Run(wrapper="fsdp1", layout="nested"))


def written(source: Path, target: Path, options: WriteOptions | None = None, **how: Any) -> Conversion:
    conversion = prepare(source, "dcp", options or WriteOptions())
    convert(conversion, target, **how)
    return conversion


def differing(folder: Path, oracle: Oracle, run: Run) -> list[tuple[str, str]]:
    """What FSDP2 has after it loaded the folder and made an update, where it is not what the oracle says."""
    resumed = load_and_step(folder, oracle, run)
    assert set(resumed.steps.values()) == {STEP}
    for name in oracle.shapes():
        settings = resumed.settings[name]
        assert (settings["lr"], settings["weight_decay"]) == (LR, oracle.weight_decay(name))
        assert settings["betas"] == BETAS
    return [
        (name, state)
        for name in oracle.shapes()
        for state, value in oracle.stepped(name).items()
        if not torch.equal(value, resumed.states[name, state])
    ]


@pytest.mark.parametrize("case", RESUMING)
def test_fsdp2_loads_it_and_steps_as_the_oracle(source: Path, tmp_path: Path, case: str) -> None:
    run, options = RESUMING[case]
    written(source, tmp_path / "out", options)
    assert differing(tmp_path / "out", ORACLE, run) == []


def test_a_tied_model_finds_both_names(tmp_path: Path) -> None:
    tied = Oracle(layers=1, tied=True)
    written(save(tmp_path / "source", tied, Run(layout="app")), tmp_path / "out")
    assert differing(tmp_path / "out", tied, Run()) == []


def test_read_back_it_is_the_same(source: Path, tmp_path: Path) -> None:
    written(source, tmp_path / "out", WriteOptions(shard_bytes=1 << 20))
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    tensors, again = before.manifest.by_key(), after.manifest.by_key()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(read_whole(source, tensors[k]), read_whole(source, again[k])) for k in tensors)
    state, same = before.manifest.state, after.manifest.state
    assert state["scalars"] == same["scalars"]
    assert _settings(state["groups"]) == _settings(same["groups"])
    assert after.manifest.step == STEP


def _settings(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By parameter."""
    return {name: {**group, "names": None} for group in groups for name in group["names"]}


def test_torchs_own_converter_reads_it(source: Path, tmp_path: Path) -> None:
    written(source, tmp_path / "out")
    dcp_to_torch_save(tmp_path / "out", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole["model"]["lm_head.weight"], ORACLE.value("lm_head.weight", "weight"))
    assert whole["step"] == STEP


def test_large_tensors_are_chunks_of_whole_rows(source: Path, tmp_path: Path) -> None:
    written(source, tmp_path / "out", WriteOptions(shard_bytes=1 << 19))
    metadata = FileSystemReader(tmp_path / "out").read_metadata()
    entry = metadata.state_dict_metadata["model.lm_head.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    chunks = entry.chunks
    assert len(chunks) == math.ceil(4099 * 192 * 4 / (1 << 19))
    assert all(math.prod(chunk.sizes) * 4 <= 1 << 19 and chunk.sizes[1] == 192 for chunk in chunks)


def test_rounding_the_only_copy_is_a_loss(tmp_path: Path) -> None:
    oracle = Oracle(layers=1)
    folder = save(tmp_path / "source", oracle, Run(layout="weights"))
    opened = open_checkpoint(folder)
    masters = tuple(replace(tensor, state="master") for tensor in opened.manifest.tensors)
    manifest = replace(opened.manifest, tensors=(*opened.manifest.tensors, *masters))
    conversion = prepare(replace(opened, manifest=manifest), "dcp", WriteOptions(dtype="bfloat16"))
    assert conversion.plan.lost == [
        "masters in float32: FSDP keeps one copy of a parameter, which is written in bfloat16"
    ]


def test_settings_that_nobody_said_are_named(source: Path) -> None:
    opened = open_checkpoint(source)
    groups = [{k: v for k, v in g.items() if k != "eps"} for g in opened.manifest.state["groups"]]
    manifest = replace(opened.manifest, state={**opened.manifest.state, "groups": groups})
    notes = prepare(replace(opened, manifest=manifest), "dcp", WriteOptions()).plan.notes
    assert any("torch's defaults: eps = 1e-08" in note for note in notes)


def test_without_groups_no_settings_are_made_up(source: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(source)
    manifest = replace(opened.manifest, state={**opened.manifest.state, "groups": []})
    conversion = prepare(replace(opened, manifest=manifest), "dcp", WriteOptions())
    convert(conversion, tmp_path / "out")
    assert any("no settings of parameter groups" in note for note in conversion.plan.notes)
    assert read(tmp_path / "out").groups == []


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, tuple[int, ...]]:
    """A part of a logical matrix in a stored tensor, plain, transposed, with steps, or in a stack."""
    rows, columns, step = draw(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3)))
    start = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    box = Box((draw(st.integers(0, 4)), draw(st.integers(0, 4))), (rows, columns))
    shape = (box.offset[0] + rows, box.offset[1] + columns)
    stored = (start[0] + rows * step + 2, start[1] + columns + 1)
    kind = draw(st.sampled_from(["plain", "transposed", "stacked"]))
    if kind == "plain":
        return Part("w", shape, box, start, (0, 1), (step, 1)), stored
    if kind == "transposed":
        return Part("w", shape, box, start[::-1], (1, 0), (1, step)), stored[::-1]
    level = draw(st.integers(0, 4))
    return Part("w", shape, box, (level, *start), (1, 2), (1, step, 1)), (5, *stored)


def _filled(part: Part, shape: tuple[int, ...]) -> Any:
    """The stored tensor with the number of the logical element in each place of the part."""
    made = np.full(shape, -1)
    for at in np.ndindex(part.box.size):
        place = list(part.start)
        for axis, stored in enumerate(part.axes):
            place[stored] += at[axis] * part.steps[stored]
        index = [o + a for o, a in zip(part.box.offset, at, strict=True)]
        made[tuple(place)] = index[0] * part.shape[1] + index[1]
    return made


@given(parts(), st.integers(1, 6), st.integers(1, 6))
def test_a_part_cut_into_boxes_is_the_part(
    case: tuple[Part, tuple[int, ...]], height: int, width: int
) -> None:
    part, shape = case
    whole = np.full(shape, -2)
    for low in range(0, shape[0], height):
        for left in range(0, shape[1], width):
            size = (min(height, shape[0] - low), min(width, shape[1] - left), *shape[2:])
            inside = narrowed(part, Box((low, left, *(0,) * (len(shape) - 2)), size))
            filled = np.full(size, -1) if inside is None else _filled(inside, size)
            whole[low : low + size[0], left : left + size[1]] = filled
    assert np.array_equal(whole, _filled(part, shape))
