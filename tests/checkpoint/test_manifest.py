"""The manifest on disk."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from checkpoint.boxes import Box
from checkpoint.manifest import LogicalTensor, Manifest, Piece, RankBlob
from checkpoint.merge import merge


def manifest(num_ranks: int = 4, num_tensors: int = 3) -> Manifest:
    def piece(rank: int, number: int) -> Piece:
        return Piece(
            f"rank-{rank:05d}.safetensors",
            4096 * number,
            "float32",
            Box((8 * rank, 0), (8, 16)),
            f"{rank * 77 + number:016x}",
        )

    tensors = tuple(
        LogicalTensor(
            f"model.layers.{number}.mlp.up_proj.weight",
            "exp_avg",
            (8 * num_ranks, 16),
            "float32",
            tuple(piece(rank, number) for rank in range(num_ranks)),
        )
        for number in range(num_tensors)
    )
    state = {"schedule": {"kind": "wsd"}, "data": {"position": 12}}
    return Manifest(7, num_ranks, tensors, state, (RankBlob(1, "rng", "rank-00001.safetensors", 5, 6, "ab"),))


def test_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json(), "x") == manifest()


def test_strides_and_another_dtype_survive() -> None:
    odd = Piece("/elsewhere/model.bin", 3, "bfloat16", Box((0, 0), (4, 2)), None, (1, 4))
    whole = Manifest(1, 1, (LogicalTensor("a", "weight", (4, 2), "float32", (odd,)),))
    assert Manifest.from_json(whole.to_json(), "x") == whole
    assert odd.num_bytes == 16


def tensor_with_replicas(*, average: bool) -> LogicalTensor:
    def copy(file: str) -> tuple[Piece, ...]:
        return (
            Piece(file, 0, "float32", Box((0,), (3,))),
            Piece(file, 64, "bfloat16", Box((3,), (1,)), "ab" * 8, (2,)),
        )

    return LogicalTensor("a", "weight", (4,), "float32", copy("x"), (copy("y"), copy("z")), average)


@pytest.mark.parametrize("average", [False, True])
def test_replicas_survive(average: bool) -> None:
    whole = Manifest(1, 1, (tensor_with_replicas(average=average),))
    assert Manifest.from_json(whole.to_json(), "x") == whole


def test_only_what_an_older_reader_would_misread_has_the_newer_version() -> None:
    assert b'"version":1,' in manifest().to_json()
    replicas = Manifest(1, 1, (tensor_with_replicas(average=False),)).to_json()
    assert b'"version":1,' in replicas, "without the replicas the tensor is whole"
    average = Manifest(1, 1, (tensor_with_replicas(average=False), tensor_with_replicas(average=True)))
    assert b'"version":2,' in average.to_json()


def test_a_newer_format_is_refused_with_both_versions() -> None:
    text = manifest().to_json().replace(b'"version":1', b'"version":3')
    with pytest.raises(ValueError, match=r"there.json has format version 3, this Ratoon reads versions 1, 2"):
        Manifest.from_json(text, "there.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"format":', "not JSON"),
        (b"[]", "not a Ratoon manifest"),
        (manifest().to_json().replace(b'"float32"', b'"float31"'), "damaged: ValueError unknown dtype"),
        (manifest().to_json().replace(b'"shape"', b'"shame"'), "damaged: KeyError 'shape'"),
    ],
)
def test_what_is_no_manifest_is_named(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Manifest.from_json(text, "there.json")


def test_size_of_a_large_one() -> None:
    """70 billion parameters on 512 ranks have some 100 000 pieces: so many bytes a piece, at the most."""
    large = manifest(num_ranks=64, num_tensors=100)
    assert len(large.to_json()) / 6400 < 64
    assert Manifest.from_json(large.to_json(), "x") == large


def test_ranks_that_disagree_about_a_shape_are_refused() -> None:
    one = Manifest(1, 2, (LogicalTensor("a", "weight", (4,), "float32", ()),))
    other = Manifest(1, 2, (LogicalTensor("a", "weight", (5,), "float32", ()),))
    with pytest.raises(
        ValueError, match=r"a \(weight\): \[4\] float32 on one rank, \[5\] float32 on another"
    ):
        merge([one.to_json(), other.to_json()])


def test_merging_many_pieces_gives_the_collector_nothing_to_visit() -> None:
    """In the saving thread a full collection, which many lasting objects start, would stop training."""
    whole = manifest(num_ranks=8, num_tensors=500)
    indices = [
        replace(
            whole, tensors=tuple(replace(t, pieces=t.pieces[rank : rank + 1]) for t in whole.tensors)
        ).to_json()
        for rank in range(8)
    ]
    assert tuple(merge(indices)[0]) == tuple(sorted(whole.tensors, key=lambda t: t.name))
    gc.collect()
    before = len(gc.get_objects())
    kept = merge(indices)
    gc.collect()
    assert len(gc.get_objects()) - before < 3 * 500, "a few for each tensor, none for the 4000 pieces"
    del kept
