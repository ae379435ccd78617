"""What must not be loaded is refused in words, with everything that is wrong, before the model is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import checkpoint.opening
from checkpoint.folder import COMPLETE, MANIFEST, resolve
from checkpoint.load import load
from checkpoint.manifest import LogicalTensor, Manifest
from checkpoint.save import Saver
from parallel.slices import TensorSlice
from tests.checkpoint.models import (
    Grid,
    empty_slices,
    make_tensors,
    rewrite,
    save_all_ranks,
    slices_of,
)
from tests.ranks import run_ranks

NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Manifest]:
    return save_all_ranks(tmp_path, make_tensors(0), Grid(2, 1, 2))


def refused(path: Path, slices: list[TensorSlice], *, touched: bool = False, **options: object) -> str:
    """The error; unless `touched`, the model must be as it was."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers look at the message)
        load(path, slices, **options)  # type: ignore[arg-type]
    untouched = all(bool((piece.data == 7).all()) for piece in slices)
    assert untouched or touched
    assert ("The model has not been touched" in str(caught.value)) == (not touched)
    return str(caught.value)


def model() -> list[TensorSlice]:
    return empty_slices(make_tensors(0), Grid(), 0)


def change(
    saved: tuple[Path, Manifest], key: tuple[str, str], edit: Callable[[LogicalTensor], LogicalTensor]
) -> Path:
    """The checkpoint with one tensor of its manifest edited."""
    path, manifest = saved
    tensors = tuple(edit(t) if (t.name, t.state) == key else t for t in manifest.tensors)
    rewrite(path, replace(manifest, tensors=tensors))
    return path


def test_a_missing_piece(saved: tuple[Path, Manifest]) -> None:
    path = change(saved, (EMBED, "exp_avg"), lambda t: replace(t, pieces=t.pieces[1:]))
    assert f"{EMBED} (exp_avg): gap: no piece holds element [0, 0]" in refused(path, model())


def test_an_overlapping_piece(saved: tuple[Path, Manifest]) -> None:
    path = change(saved, (EMBED, "exp_avg"), lambda t: replace(t, pieces=(*t.pieces, t.pieces[0])))
    message = refused(path, model())
    assert f"{EMBED} (exp_avg): overlap: 2 pieces hold element [0, 0] rank-00000.safetensors" in message


def test_another_shape_names_both(saved: tuple[Path, Manifest]) -> None:
    other = make_tensors(
        0, shapes={**{n: tuple(t.shape) for (n, _), t in make_tensors(0).items()}, NORM: (32,)}
    )
    message = refused(saved[0], empty_slices(other, Grid(), 0))
    assert f"{NORM} (weight): [24] in the checkpoint, [32] in the model" in message
    assert "(4 problems)" in message, "each of its states, and nothing else"


def test_missing_and_unexpected_tensors_are_one_error(saved: tuple[Path, Manifest]) -> None:
    slices = [s if s.name != NORM else replace(s, name="model.final_norm.weight") for s in model()]
    message = refused(saved[0], slices)
    assert "model.final_norm.weight: in the model [24], not in the checkpoint" in message
    assert f"{NORM}: in the checkpoint [24], not in the model" in message
    assert "(2 problems)" in message


def test_of_many_problems_twenty_are_listed(saved: tuple[Path, Manifest]) -> None:
    shapes = {f"model.layers.{n}.x": (2,) for n in range(100)}
    message = refused(saved[0], empty_slices(make_tensors(0, shapes=shapes), Grid(), 0))
    assert "(109 problems)" in message
    assert message.count("\n") == 22
    assert "... and 89 more" in message


def test_a_checkpoint_without_optimizer_state(tmp_path: Path) -> None:
    weights = {key: whole for key, whole in make_tensors(0).items() if key[1] in ("weight", "master")}
    path, _ = save_all_ranks(tmp_path, weights, Grid(2))
    message = refused(path, model())
    assert 'the checkpoint has no optimizer state (exp_avg, exp_avg_sq): set moments = "reset"' in message
    assert "(1 problem)" in message
    load(path, model(), weights_only=True)


def test_low_precision_weights_are_no_masters(tmp_path: Path) -> None:
    weights = {key: whole for key, whole in make_tensors(0).items() if key[1] == "weight"}
    path, _ = save_all_ranks(tmp_path, weights, Grid(2))
    slices = [piece for piece in model() if piece.state in ("weight", "master")]
    assert "the checkpoint has no fp32 masters (master)" in refused(path, slices)
    assert load(path, slices, weights_only=True).derived == {"master": "weight"}


def test_moments_missing_for_one_tensor(saved: tuple[Path, Manifest]) -> None:
    path, manifest = saved
    rewrite(path, replace(manifest, tensors=manifest.tensors[1:]))
    lost = manifest.tensors[0]
    assert f"{lost.name}: the checkpoint lacks its {lost.state}" in refused(path, model())


def flip(path: Path, manifest: Manifest, key: tuple[str, str]) -> str:
    """Flip a bit in the middle of the tensor's first piece; returns the name of its file."""
    piece = manifest.by_key()[key].pieces[0]
    with open(path / piece.file, "r+b") as file:
        file.seek(piece.start + piece.num_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return piece.file


def test_a_flipped_bit_is_found_in_pieces_read_whole(saved: tuple[Path, Manifest]) -> None:
    file = flip(*saved, (EMBED, "exp_avg"))
    message = refused(saved[0], model(), touched=True)
    assert f"{file}: bytes" in message
    assert "the file is damaged" in message
    assert "do not train or save it" in message


def test_full_verification_finds_it_before_the_model_is_touched(saved: tuple[Path, Manifest]) -> None:
    file = flip(*saved, (EMBED, "exp_avg"))
    assert f"{file}: bytes" in refused(saved[0], model(), verify="full")


def test_full_verification_looks_at_what_this_rank_does_not_need(saved: tuple[Path, Manifest]) -> None:
    file = flip(*saved, (EMBED, "exp_avg"))
    slices = [piece for piece in model() if piece.state == "weight"]
    assert f"{file}: bytes" in refused(saved[0], slices, verify="full")


def test_damaged_bytes_of_a_rank(saved: tuple[Path, Manifest]) -> None:
    path, manifest = saved
    blob = manifest.rank_blobs[0]
    with open(path / blob.file, "r+b") as file:
        file.seek(blob.start)
        file.write(b"\xff")
    slices = empty_slices(make_tensors(0), Grid(), 0)
    rewrite(path, replace(manifest, world_size=1))
    message = refused(path, slices, layout=Grid(2, 1, 2).as_json())
    assert "the rng of rank 0 does not have the recorded hash" in message


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_short_file(missing: bool, saved: tuple[Path, Manifest]) -> None:
    path = saved[0]
    file = path / "rank-00001.safetensors"
    if missing:
        file.unlink()
    else:
        with open(file, "r+b") as opened:
            opened.truncate(9000)
    expected = "No such file" if missing else "has 9000 bytes, the manifest expects at least"
    message = refused(path, model())
    assert "rank-00001.safetensors" in message
    assert expected in message


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 1, 3), Grid(1, 1, 4)], ids=str)
def test_a_weight_that_is_not_the_rounded_master(grid: Grid, tmp_path: Path) -> None:
    """Wherever the three wrong masters lie, the rank that holds them says so."""
    whole = make_tensors(0)
    whole[EMBED, "master"][17, 5:8] += 1
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 2))
    holders = [
        rank
        for rank in range(grid.world_size)
        if any(
            p.name == EMBED and p.state == "master" and _holds(p, (17, 5))
            for p in slices_of(whole, grid, rank)
        )
    ]
    assert holders
    for rank in holders:
        message = refused(path, empty_slices(whole, grid, rank), touched=True)
        assert "is not the rounded master in 3 of" in message
        assert "first at [17, 5]: weight" in message


def _holds(piece: TensorSlice, point: tuple[int, ...]) -> bool:
    return all(o <= p < o + s for o, p, s in zip(piece.offset, point, piece.size, strict=True))


def test_nan_weights_equal_nan_masters(tmp_path: Path) -> None:
    whole = make_tensors(0)
    whole[NORM, "master"][3] = torch.nan
    whole[NORM, "weight"][3] = torch.nan
    path, _ = save_all_ranks(tmp_path, whole, Grid())
    load(path, model())


def test_without_the_marker_it_is_incomplete_and_the_nearest_is_named(tmp_path: Path) -> None:
    for step in (100, 200, 500):
        save_all_ranks(tmp_path, make_tensors(0), Grid(), step)
    (tmp_path / "step-00000200" / COMPLETE).unlink()
    message = refused(tmp_path / "step-00000200", model())
    assert "is incomplete: it has no COMPLETE marker" in message
    assert message.count("step-00000100") == 1


def test_a_partial_folder_is_incomplete(saved: tuple[Path, Manifest]) -> None:
    partial = saved[0].with_name("step-00000150.partial-x-1")
    partial.mkdir()
    assert "is incomplete" in refused(partial, model())


def test_a_manifest_changed_after_the_save(saved: tuple[Path, Manifest]) -> None:
    manifest = saved[0] / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"step":100', b'"step":101'))
    assert "its hash is not the one that COMPLETE records" in refused(saved[0], model())


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere", model())
    assert "no checkpoint is recognised. It holds nothing" in refused(tmp_path, model())


def test_every_way_to_name_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step, _ = save_all_ranks(run / "checkpoints", make_tensors(0), Grid())
    for path in (run, run / "checkpoints", step, step / MANIFEST, str(run)):
        assert resolve(path) == step


def refused_together(folder: str) -> str:
    """Only the second stage's model differs; every rank must hear of it."""
    slices = empty_slices(make_tensors(0), Grid(1, 2, 1), dist.get_rank())
    slices = [s if s.name != NORM else replace(s, name="model.final_norm.weight") for s in slices]
    return refused(Path(folder), slices)


def test_what_one_rank_finds_is_raised_on_all(saved: tuple[Path, Manifest]) -> None:
    first, second = run_ranks(refused_together, 2, str(saved[0]))
    assert first == second
    assert "model.final_norm.weight: in the model [24], not in the checkpoint" in first
    assert f"{NORM}: in the checkpoint [24], not in the model" in first


def refused_with_many_problems(folder: str) -> str:
    shapes = {f"model.layers.{n}.x": (2,) for n in range(30 + dist.get_rank())}
    grid = Grid(1, 1, 2, zero=False)
    return refused(Path(folder), empty_slices(make_tensors(0, shapes=shapes), grid, dist.get_rank()))


def test_of_many_problems_ranks_exchange_the_first_and_their_number(saved: tuple[Path, Manifest]) -> None:
    """30 and 31 tensors of the model, and 9 of the checkpoint that neither has."""
    first, second = run_ranks(refused_with_many_problems, 2, str(saved[0]))
    assert first == second
    assert "(at least 40 problems)" in first
    assert "... and 20 more" in first


def load_what_retention_takes_from_one_rank(folder: str) -> str:
    """Rank 0 locks the checkpoint in time, rank 1 comes when the marker is gone."""
    slices = empty_slices(make_tensors(0), Grid(1, 1, 2), dist.get_rank())
    reading = checkpoint.opening.reading

    @contextmanager
    def late(path: Path) -> Iterator[list[str]]:
        if dist.get_rank() == 1:
            dist.barrier()
            (path / COMPLETE).unlink()
        with reading(path) as gone:
            if dist.get_rank() == 0:
                dist.barrier()
            yield gone

    checkpoint.opening.reading = late
    return refused(Path(folder), slices)


def test_a_checkpoint_removed_under_one_rank_is_refused_by_all(saved: tuple[Path, Manifest]) -> None:
    first, second = run_ranks(load_what_retention_takes_from_one_rank, 2, str(saved[0]))
    assert first == second
    assert "has just been removed by the retention of its run" in first


def test_a_failed_load_leaves_the_saver_usable(saved: tuple[Path, Manifest]) -> None:
    folder = saved[0].parent
    refused(saved[0], [piece for piece in model() if piece.name == NORM])
    Saver(folder, background=False).save(200, slices_of(make_tensors(0), Grid(), 0), {})
    load(folder, model())


def load_by_different_paths(folder: str) -> str:
    path = Path(folder) / ("step-00000100" if dist.get_rank() == 0 else "step-00000200")
    return refused(path, empty_slices(make_tensors(0), Grid(1, 1, 2), dist.get_rank()))


def test_ranks_must_mean_the_same_checkpoint(tmp_path: Path) -> None:
    for step in (100, 200):
        save_all_ranks(tmp_path, make_tensors(0), Grid(), step)
    first, second = run_ranks(load_by_different_paths, 2, str(tmp_path))
    assert first == second
    assert "different checkpoints" in first


def load_weights_where_one_rank_holds_no_moments(folder: str) -> tuple[str, ...]:
    slices = empty_slices(make_tensors(0), Grid(1, 1, 2, zero=False), dist.get_rank())
    if dist.get_rank() == 1:
        slices = [piece for piece in slices if piece.state in ("weight", "master")]
    return load(folder, slices, weights_only=True).fresh


def test_all_ranks_agree_on_what_is_fresh(saved: tuple[Path, Manifest]) -> None:
    fresh = run_ranks(load_weights_where_one_rank_holds_no_moments, 2, str(saved[0]))
    assert fresh == [("exp_avg", "exp_avg_sq")] * 2
