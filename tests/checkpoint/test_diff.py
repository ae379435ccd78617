"""Two checkpoints compared tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.manifest import Manifest, Piece
from checkpoint.opening import Opened
from checkpoint.verification.diff import TensorDifference, diff_checkpoints
from tests.checkpoint.models import Grid, Key, make_tensors, rewrite, save_all_ranks

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def diff(
    folder: Path,
    one: dict[Key, torch.Tensor],
    other: dict[Key, torch.Tensor],
    grids: tuple[Grid, Grid] = (Grid(2, 1, 2), Grid(1, 2, 3)),
) -> dict[Key, TensorDifference]:
    a, _ = save_all_ranks(folder / "a", one, grids[0])
    b, _ = save_all_ranks(folder / "b", other, grids[1])
    found = diff_checkpoints(a, b)
    assert found == sorted(found, key=lambda each: (each.name, each.state))
    return {(each.name, each.state): each for each in found}


def test_the_same_numbers_on_two_layouts_are_equal(tmp_path: Path) -> None:
    found = diff(tmp_path, make_tensors(0), make_tensors(0))
    assert len(found) == 36
    assert {each.verdict for each in found.values()} == {"equal"}
    assert {(each.count, each.max_abs, each.cosine) for each in found.values()} == {(0, 0.0, 1.0)}


def test_what_differs_is_measured(tmp_path: Path) -> None:
    one, other = make_tensors(0), make_tensors(0)
    changed = other[EMBED, "exp_avg"]
    changed[49, 20:23] += 0.5
    found = diff(tmp_path, one, other)
    assert {key for key, each in found.items() if not each.is_equal} == {(EMBED, "exp_avg")}
    each = found[EMBED, "exp_avg"]
    was = one[EMBED, "exp_avg"].double()
    now = changed.double()
    assert (each.verdict, each.count, each.numel) == ("different", 3, 1200)
    assert each.max_abs == (now - was).abs().max().item()
    assert each.max_rel == ((now - was).abs() / torch.maximum(now.abs(), was.abs())).max().item()
    expected = torch.nn.functional.cosine_similarity(was.flatten(), now.flatten(), dim=0).item()
    assert each.cosine == pytest.approx(expected, rel=1e-12)


def test_one_bit_is_a_difference_and_the_sign_of_zero_too(tmp_path: Path) -> None:
    one, other = make_tensors(0), make_tensors(0)
    one[NORM, "exp_avg"][3], other[NORM, "exp_avg"][3] = 0.0, -0.0
    each = diff(tmp_path, one, other)[NORM, "exp_avg"]
    assert (each.verdict, each.count, each.max_abs) == ("different", 1, 0.0)


def test_fp32_and_bf16_are_equal_after_rounding(tmp_path: Path) -> None:
    """A run in fp32 has no masters: its weights are compared with those of the run in bf16."""
    low = make_tensors(0)
    exact = {key: whole for key, whole in low.items() if key[1].startswith("exp")}
    exact |= {(name, "weight"): whole for (name, state), whole in low.items() if state == "master"}
    found = diff(tmp_path, low, exact, (Grid(), Grid(1, 1, 2, dtype=torch.float32)))
    weight, master = found[EMBED, "weight"], found[EMBED, "master"]
    assert (weight.verdict, weight.dtypes, weight.count) == (
        "equal after rounding",
        ("bfloat16", "float32"),
        0,
    )
    assert weight.max_abs is not None
    assert 0 < weight.max_abs < 0.01
    assert (master.verdict, master.note) == ("equal", "B keeps it as its weight")
    assert all(each.is_equal for each in found.values())


def test_one_number_that_rounds_otherwise(tmp_path: Path) -> None:
    low = make_tensors(0)
    exact = {(name, "weight"): whole for (name, state), whole in low.items() if state == "master"}
    exact[NORM, "weight"] = exact[NORM, "weight"] + torch.eye(24)[7] * 0.1
    each = diff(tmp_path, low, exact, (Grid(), Grid(dtype=torch.float32)))[NORM, "weight"]
    assert each.verdict == "different"


def test_what_only_one_has_and_other_shapes(tmp_path: Path) -> None:
    one, other = make_tensors(0), make_tensors(0)
    for state in ("weight", "master", "exp_avg", "exp_avg_sq"):
        one.pop((NORM, state))
        other[EMBED, state] = other[EMBED, state][:-1]
    other.pop((EMBED, "exp_avg"))
    found = diff(tmp_path, one, other)
    assert found[NORM, "master"].verdict == "only in B"
    assert found[NORM, "master"].shapes == (None, (24,))
    assert found[EMBED, "exp_avg"].verdict == "only in A"
    assert (found[EMBED, "weight"].verdict, found[EMBED, "weight"].shapes) == ("shape", ((50, 24), (49, 24)))


def test_numbers_that_are_none_are_equal_to_each_other_only(tmp_path: Path) -> None:
    one, other = make_tensors(0), make_tensors(0)
    for whole in (one, other):
        whole[NORM, "exp_avg"][1] = torch.nan
    one[EMBED, "exp_avg"][1, 1] = torch.nan
    found = diff(tmp_path, one, other)
    assert found[NORM, "exp_avg"].verdict == "equal"
    assert (found[EMBED, "exp_avg"].verdict, found[EMBED, "exp_avg"].max_abs) == ("different", math.inf)


def test_the_mean_of_copies_is_compared(tmp_path: Path) -> None:
    one, _ = make_tensors(0), make_tensors(0)
    low, high = {**one}, {**one}
    low[NORM, "exp_avg"], high[NORM, "exp_avg"] = one[NORM, "exp_avg"] - 0.5, one[NORM, "exp_avg"] + 0.5
    path, manifest = save_all_ranks(tmp_path / "a", low, Grid())
    there, copies = save_all_ranks(tmp_path / "b", high, Grid())

    def elsewhere(piece: Piece) -> Piece:
        return replace(piece, file=str(there / piece.file))

    copy = tuple(elsewhere(piece) for piece in copies.by_key()[NORM, "exp_avg"].pieces)
    tensors = tuple(
        replace(t, replicas=(copy,), average=True) if (t.name, t.state) == (NORM, "exp_avg") else t
        for t in manifest.tensors
    )
    rewrite(path, replace(manifest, tensors=tensors))
    mean = {**one}
    mean[NORM, "exp_avg"] = (low[NORM, "exp_avg"] + high[NORM, "exp_avg"]) / 2
    other, _ = save_all_ranks(tmp_path / "c", mean, Grid())
    assert {each.verdict for each in diff_checkpoints(path, other)} == {"equal"}


def test_a_damaged_file_and_a_gap_are_named(tmp_path: Path) -> None:
    path, manifest = save_all_ranks(tmp_path, make_tensors(0), Grid(1, 1, 2))
    first, *rest = manifest.tensors
    cut = Manifest(1, 1, (replace(first, pieces=first.pieces[1:]), *rest))
    (path / "rank-00001.safetensors").unlink()
    found = {(each.name, each.state): each for each in diff_checkpoints(Opened(path, "x", cut), path)}
    assert "gap: no piece holds element" in found[first.name, first.state].note
    damaged = [each for each in found.values() if each.verdict == "damaged"]
    assert len(damaged) > 1
    assert all("rank-00001" in each.note for each in damaged[1:])


def test_what_a_reader_called_damaged_is_not_compared(tmp_path: Path) -> None:
    path, manifest = save_all_ranks(tmp_path, make_tensors(0), Grid())
    with pytest.raises(ValueError, match="shard 3 is gone"):
        diff_checkpoints(Opened(path, "x", manifest, problems=("shard 3 is gone",)), path)
