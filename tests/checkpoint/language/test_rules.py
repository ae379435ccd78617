"""Every placement of the language, against arrays that numpy cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.boxes import Box
from checkpoint.language.place import place
from checkpoint.language.spec import Spec, parse_spec
from checkpoint.manifest import Piece
from checkpoint.source import SourceTensor
from tests.checkpoint.language.rebuild import Array, Stored, rebuild, same, store

Whole = dict[str, Array]


def rule(text: str, facts: str = "") -> Spec:
    return parse_spec(f'name = "x"\n{facts}\n[[rule]]\n{text}', "x.toml")


def check(spec: Spec, stored: Stored, values: Whole, **known: object) -> None:
    placed = place(spec, [tensor for tensor, _ in stored], **known)  # type: ignore[arg-type]
    same(rebuild(placed, stored), values)


def matrix(rows: int, columns: int = 3, first: int = 1) -> Array:
    return np.arange(first, first + rows * columns, dtype=float).reshape(rows, columns)


def cut(array: Array, widths: list[int], axis: int = 0) -> list[Array]:
    return np.split(array, np.cumsum(widths)[:-1], axis=axis)


widths = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any)


@given(widths, st.sampled_from([0, 1, -1]))
@settings(deadline=None)
def test_sharded_unevenly(lengths: list[int], dim: int) -> None:
    whole = matrix(sum(lengths), sum(lengths))
    stored = [store("w", piece, {"tensor": i}) for i, piece in enumerate(cut(whole, lengths, dim))]
    check(rule(f'match = "w"\nto = "w"\nsharded = {{ over = "tensor", dim = {dim} }}'), stored, {"w": whole})


@given(st.integers(1, 3), st.integers(2, 3), st.data())
@settings(deadline=None)
def test_sharded_over_nested_axes(outer: int, inner: int, data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 4)) for _ in range(outer * inner)]
    whole = matrix(sum(lengths))
    at = [{"expert": e, "tensor": t} for e in range(outer) for t in range(inner)]
    stored = [store("w", piece, where) for piece, where in zip(cut(whole, lengths), at, strict=True)]
    check(rule('match = "w"\nto = "w"\nsharded = { over = ["expert", "tensor"] }'), stored, {"w": whole})


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=3))
@settings(deadline=None)
def test_every_part_cut_for_itself_with_uneven_widths(per_rank: list[tuple[int, int, int]]) -> None:
    names = ("q", "k", "v")
    lengths = {name: [each[i] for each in per_rank] for i, name in enumerate(names)}
    values = {name: matrix(sum(each), first=100 * i) for i, (name, each) in enumerate(lengths.items())}
    pieces = {name: cut(values[name], lengths[name]) for name in names}
    stored = [
        store("qkv", np.concatenate([pieces[name][rank] for name in names]), {"tensor": rank})
        for rank in range(len(per_rank))
    ]
    sizes = ", ".join(f"{name} = {sum(each)}" for name, each in lengths.items())
    listed = ", ".join(f"{name} = {each}" for name, each in lengths.items())
    spec = rule(
        f'match = "qkv"\nto = "{{part}}"\nfused = {{ parts = {{ {sizes} }} }}\n'
        f'sharded = {{ over = "tensor", split = "each", widths = {{ {listed} }} }}'
    )
    check(spec, stored, {name: array for name, array in values.items() if len(array)})


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(0, 2))
@settings(deadline=None)
def test_interleaved_groups_with_any_contiguous_cut(
    groups: int, queries: int, rows: int, ranks: int, uneven: int
) -> None:
    q, k = matrix(groups * queries * rows), matrix(groups * rows, first=1000)
    fused = np.concatenate(
        [x for g in range(groups) for x in (np.split(q, groups)[g], np.split(k, groups)[g])]
    )
    base = len(fused) // ranks
    lengths = [base] * (ranks - 1)
    lengths = [*(max(0, each - uneven) for each in lengths), 0]
    lengths[-1] = len(fused) - sum(lengths)
    stored = [store("qk", piece, {"tensor": i}) for i, piece in enumerate(cut(fused, lengths))]
    spec = rule(
        'match = "qk"\nto = "{part}"\nsharded = { over = "tensor" }\n'
        'fused = { repeat = "groups", parts = { q = "queries * rows", k = -1 } }'
    )
    check(spec, stored, {"q": q, "k": k}, facts={"groups": groups, "queries": queries, "rows": rows})


def test_without_part_in_the_name_the_parts_stay_one_tensor() -> None:
    gate, up = matrix(4), matrix(4, first=50)
    stored = [
        store("fc", np.concatenate([gate[2 * r : 2 * r + 2], up[2 * r : 2 * r + 2]]), {"tensor": r})
        for r in range(2)
    ]
    spec = rule(
        'match = "fc"\nto = "fc"\nfused = { parts = ["gate", "up"] }\n'
        'sharded = { over = "tensor", split = "each" }'
    )
    check(spec, stored, {"fc": np.concatenate([gate, up])})


def test_stacks_of_layers_and_experts_spread_over_ranks() -> None:
    values = {f"{i}.{e}": matrix(2, first=10 * (3 * i + e)) for i in range(2) for e in range(3)}
    whole = np.stack([np.stack([values[f"{i}.{e}"] for e in range(3)]) for i in range(2)])
    stored = [store("w", whole[:, :1], {"expert": 0}), store("w", whole[:, 1:], {"expert": 1})]
    spec = rule('match = "w"\nto = "{layer}.{e}"\nstacked = ["layer", { index = "e", over = "expert" }]')
    check(spec, stored, values)


def test_a_stack_on_the_last_axis() -> None:
    whole = np.arange(24.0).reshape(2, 3, 4)
    spec = rule('match = "w"\nto = "{e}"\nstacked = [{ index = "e", axis = -1 }]')
    check(spec, [store("w", whole)], {str(e): whole[..., e] for e in range(4)})


def test_transposed_and_fused_along_the_columns_as_stored() -> None:
    q, k = matrix(4, 5), matrix(2, 5, first=50)
    spec = rule(
        'match = "w"\nto = "{part}"\ntransposed = true\nfused = { dim = 1, parts = { q = 4, k = 2 } }'
    )
    check(spec, [store("w", np.concatenate([q, k]).T)], {"q": q, "k": k})


@given(st.integers(1, 3), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_rotary_pairs_however_they_are_cut(heads: int, half: int, data: st.DataObject) -> None:
    logical = matrix(heads * 2 * half)
    pairs = logical.reshape(heads, 2, half, 3).swapaxes(1, 2).reshape(logical.shape)
    at = data.draw(st.integers(0, len(pairs)))
    stored = [store("w", piece, {"tensor": i}) for i, piece in enumerate((pairs[:at], pairs[at:]))]
    spec = rule('match = "w"\nto = "w"\nsharded = { over = "tensor" }\ninterleaved = { block = "d" }')
    check(spec, stored, {"w": logical}, facts={"d": 2 * half})


def test_rotary_pairs_of_some_parts() -> None:
    q, v = matrix(4), matrix(4, first=50)
    stored = [store("qv", np.concatenate([q.reshape(2, 2, 3).swapaxes(0, 1).reshape(4, 3), v]))]
    spec = rule(
        'match = "qv"\nto = "{part}"\nfused = { parts = ["q", "v"] }\n'
        'interleaved = { block = 4, parts = ["q"] }'
    )
    check(spec, stored, {"q": q, "v": v})


def test_a_rank_that_holds_only_padding_is_left_out() -> None:
    whole = matrix(3)
    padded = np.concatenate([whole, np.zeros((5, 3))])
    stored = [store("w", padded[2 * r : 2 * r + 2], {"tensor": r}) for r in range(4)]
    spec = rule('match = "w"\nto = "w"\nsharded = { over = "tensor" }\npadded = { size = "vocab_size" }')
    placed = place(spec, [tensor for tensor, _ in stored], facts={"vocab_size": 3})
    assert [each.source.at["tensor"] for each in placed] == [0, 1]
    same(rebuild(placed, stored), {"w": whole})


def test_flat_storage_is_seen_as_a_matrix_piece_by_piece() -> None:
    pieces = (
        Piece("a", 100, "float32", Box((0,), (5,))),
        Piece("b", 0, "float32", Box((5,), (8,))),
        Piece("b", 400, "float32", Box((13,), (2,))),
    )
    flat = SourceTensor("w", "master", (15,), pieces, {})
    spec = rule('match = "w"\nto = "w"\nview = ["rows", -1]')
    (placed,) = place(spec, [flat], facts={"rows": 5})
    assert placed.source.shape == (5, 3)
    found = [(each.file, each.start, each.box) for each in placed.source.pieces]
    assert found == [
        ("a", 100, Box((0, 0), (1, 3))),
        ("a", 112, Box((1, 0), (1, 2))),
        ("b", 0, Box((1, 2), (1, 1))),
        ("b", 4, Box((2, 0), (2, 3))),
        ("b", 28, Box((4, 0), (1, 1))),
        ("b", 400, Box((4, 1), (1, 2))),
    ]


@given(st.permutations([2, 3, 4]), st.permutations([2, 3, 4]), st.data())
@settings(deadline=None)
def test_a_view_keeps_every_byte(old: list[int], new: list[int], data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in old)
    size = tuple(data.draw(st.integers(1, s - o)) for s, o in zip(old, offset, strict=True))
    whole = np.arange(24).reshape(old)
    held = whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].ravel()
    tensor = SourceTensor("w", "weight", tuple(old), (Piece("f", 0, "uint8", Box(offset, size)),), {})
    (placed,) = place(rule(f'match = "w"\nto = "w"\nview = {new}'), [tensor])
    seen = np.full(new, -1)
    for piece in placed.source.pieces:
        box = tuple(slice(o, o + s) for o, s in zip(piece.box.offset, piece.box.size, strict=True))
        assert (seen[box] == -1).all()
        seen[box] = held[piece.start : piece.start + piece.box.numel].reshape(piece.box.size)
    expected = np.where(np.isin(np.arange(24), held), np.arange(24), -1).reshape(new)
    np.testing.assert_array_equal(seen, expected)


def test_replicas_need_not_begin_at_coordinate_zero() -> None:
    whole = matrix(2)
    stored = [store("w", whole, {"tensor": t, "expert": t}) for t in range(2)]
    spec = rule('match = "w"\nto = "w"\nreplicated = ["tensor", "expert"]')
    placed = place(spec, [tensor for tensor, _ in stored])
    assert [each.role for each in placed] == ["primary", "replica"]


def test_what_is_to_be_averaged_says_so_on_all_ranks() -> None:
    spec = rule('match = "w"\nto = "w"\naverage = "tensor"\nreplicated = "pipeline"')
    at = [{"tensor": t, "pipeline": p} for p in range(2) for t in range(2)]
    placed = place(spec, [store("w", matrix(2), where)[0] for where in at])
    assert [each.role for each in placed] == ["average", "average", "replica", "replica"]
    (alone,) = place(spec, [store("w", matrix(2), {"tensor": 0})[0]])
    assert alone.role == "primary"


def test_data_ranks_hold_parts_of_one_tensor() -> None:
    placed = place(rule('match = "w"\nto = "w"'), [store("w", matrix(2), {"data": d})[0] for d in range(3)])
    assert [each.role for each in placed] == ["primary"] * 3


def test_a_tied_copy_is_a_replica_where_the_original_is_there() -> None:
    spec = parse_spec(
        'name = "x"\n[[rule]]\nmatch = "in"\nto = "table"\noptional = true\n'
        '[[rule]]\nmatch = "out"\nto = "table"\ntied = true',
        "x.toml",
    )
    tensors = [store("out", matrix(2))[0], store("in", matrix(2))[0]]
    assert [each.role for each in place(spec, tensors)] == ["replica", "primary"]
    assert [each.role for each in place(spec, tensors[:1])] == ["primary"]


def test_states_that_are_not_shaped_like_the_parameter_are_left_to_the_caller() -> None:
    at = {"tensor": 0}
    tensors = [
        SourceTensor("w", "step", (), (), at),
        SourceTensor("w", "exp_avg", (4, 3), (), at),
        SourceTensor("w", "absmax", (2,), (), at),
        SourceTensor("w", "weight", (4, 3), (), at),
    ]
    placed = place(rule('match = "w"\nto = "w"\nsharded = { over = "tensor" }'), tensors)
    assert [bool(each.parts) for each in placed] == [False, True, False, True]


def test_wrappers_and_renames_are_taken_out_of_names() -> None:
    spec = parse_spec(
        'name = "x"\nrename = [{ regex = "^net\\\\.", by = "" }]\n'
        '[[rule]]\nmatch = "layers.{i}.w"\nto = "model.layers.{i}.w"',
        "x.toml",
    )
    name = "module._orig_mod.net.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.w"
    (placed,) = place(spec, [store(name, matrix(1))[0]])
    assert placed.parts[0].name == "model.layers.3.w"


@pytest.mark.parametrize(("name", "expected"), [("h_7_w", "layers.7.gate"), ("h_7_v", "layers.7.up")])
def test_a_regex_and_a_table_of_values(name: str, expected: str) -> None:
    spec = rule(
        "regex = 'h_(?P<layer>\\d+)_(?P<half>[wv])'\nto = \"layers.{layer}.{half}\"\n"
        'values = { half = { w = "gate", v = "up" } }'
    )
    (placed,) = place(spec, [store(name, matrix(1))[0]])
    assert placed.parts[0].name == expected
