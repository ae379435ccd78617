"""DeepSpeed's own patterns, against what DeepSpeed's converter makes of the same slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.checkpoint.affine import (
    block_gather_map,
    contiguous_split_map,
    replicated_map,
    segmented_map,
    sub_param_map,
)
from deepspeed.checkpoint.ds_to_universal import merge_tp_slices

from checkpoint.language.choose import choose_spec, fit_spec
from checkpoint.language.deepspeed_info import universal_placement
from checkpoint.language.place import place
from checkpoint.language.spec import SpecError, load_spec, parse_spec
from checkpoint.source import Source
from tests.checkpoint.language.rebuild import Array, Stored, rebuild, same, store

WIDTHS = [[3, 2], [1, 1], [1, 1]]
INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": 5,
    "vocabulary_parameter_patterns": ["embed"],
    "tp_replicated_parameter_patterns": ["^norm\\.weight$"],
    "parameter_to_average_patterns": [".*bias_sum"],
    "parameter_with_row_parallelism_patterns": ["(down|norm)"],
    "parameter_with_2_sub_params_cat_dim_0": ["gate_up"],
    "parameter_with_sub_params": [{"patterns": ["qkv"], "shape": [(5, 2, 2), -1], "partition_dim": 0}],
    "sub_param_shard_widths": {"qkv": WIDTHS},
    "pipeline_replicated_parameter_patterns": ["embed"],
}
SHAPES = {
    "embed.weight": [(3, 4), (3, 4)],
    "norm.weight": [(4,), (4,)],
    "attention.bias_sum": [(4,), (4,)],
    "down.weight": [(4, 3), (4, 2)],
    "gate_up.weight": [(6, 4), (6, 4)],
    "qkv.weight": [(5, 4), (4, 4)],
    "other.weight": [(2, 4), (3, 4)],
}


def slices(shapes: dict[str, list[tuple[int, ...]]]) -> dict[str, list[Array]]:
    numbers = iter(range(10**6))
    made = {
        name: [np.array([next(numbers) for _ in range(int(np.prod(s)))], float).reshape(s) for s in each]
        for name, each in shapes.items()
    }
    made["norm.weight"] = [made["norm.weight"][0]] * 2
    return made


def stored_as(pieces: dict[str, list[Array]], prefix: str = "") -> Stored:
    return [
        store(prefix + name, array, {"tensor": rank})
        for name, each in pieces.items()
        for rank, array in enumerate(each)
    ]


def merged(info: dict[str, Any], pieces: dict[str, list[Array]], folder: Path) -> dict[str, Array]:
    """What DeepSpeed's converter writes for these slices."""
    found = {}
    for name, each in pieces.items():
        for rank, array in enumerate(each):
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                path = folder / "tmp" / name / str(rank) / f"{state}.00"
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(torch.from_numpy(array).flatten(), path)
        merge_tp_slices(info, str(folder), str(folder / "tmp"), 2, (name, [a.shape for a in each]))
        found[name] = torch.load(folder / name / "exp_avg.pt", weights_only=False)["param"].numpy()
    return found


def test_every_list_means_what_the_converter_makes_of_it(tmp_path: Path) -> None:
    pieces = slices(SHAPES)
    expected = merged(INFO, pieces, tmp_path)
    stored = stored_as(pieces)
    spec = universal_placement(INFO, list(pieces), {"tensor": 2})
    placed = place(spec, [tensor for tensor, _ in stored], degrees={"tensor": 2})
    averaged = [each for each in placed if each.role == "average"]
    assert [each.source.name for each in averaged] == ["attention.bias_sum"] * 2
    mean = np.mean(pieces.pop("attention.bias_sum"), axis=0)
    np.testing.assert_array_equal(mean, expected.pop("attention.bias_sum"))
    rest = [each for each in placed if each.role != "average"]
    same(rebuild(rest, stored), expected)


@pytest.mark.parametrize("shape", [[3, -1], [(2, 2, 2), -1]])
def test_equal_parts_of_old_versions(shape: list[Any], tmp_path: Path) -> None:
    info = {
        "universal_checkpoint_version": 0.2,
        "parameter_with_sub_params": [{"patterns": ["qkv.weight"], "shape": shape, "partition_dim": 0}],
    }
    pieces = {"qkv.weight": slices({"norm.weight": [(1,)] * 2, "qkv.weight": [(3, 4), (3, 4)]})["qkv.weight"]}
    expected = merged(info, pieces, tmp_path)
    stored = stored_as(pieces)
    placed = place(universal_placement(info, list(pieces), {"tensor": 2}), [tensor for tensor, _ in stored])
    same(rebuild(placed, stored), expected)


AFFINE = {
    "split": contiguous_split_map((4, 5), [3, 2], 1),
    "fused": sub_param_map((9, 2), [5, 2, 2], WIDTHS, 0),
    "shared_keys": segmented_map((6, 3), [(4, False), (2, True)], 0, 2, [[2, 2]]),
    "gathered": block_gather_map((8, 2), {0: [0, 2], 1: [1, 3]}, 2, 0),
    "norm": replicated_map((4,), 2),
}


@pytest.mark.parametrize("name", sorted(AFFINE))
def test_affine_maps(name: str) -> None:
    affine = AFFINE[name]
    info = {
        "universal_checkpoint_version": 0.4,
        "affine_map": {"version": 1, "params": {name: affine.to_dict()}},
    }
    whole = torch.arange(float(np.prod(affine.logical_shape))).view(affine.logical_shape)
    stored = stored_as({name: [affine.extract(whole, rank).numpy() for rank in range(2)]})
    spec = universal_placement(info, [name], {"tensor": 2})
    placed = place(spec, [tensor for tensor, _ in stored], degrees={"tensor": 2})
    same(rebuild(placed, stored), {name: whole.numpy()})


def test_names_are_mapped_after_the_ranks_are_joined() -> None:
    values = {"q": np.arange(8.0).reshape(4, 2), "k": np.arange(8.0, 16).reshape(4, 2)}
    stored = [
        store("qk", np.concatenate([values[part][rows] for part in "qk"]), {"tensor": rank})
        for rank, rows in enumerate((slice(0, 3), slice(3, 4)))
    ]
    info = {
        "universal_checkpoint_version": 0.4,
        "parameter_with_sub_params": [{"patterns": ["qk"], "shape": [(4, 4), 2], "partition_dim": 0}],
        "sub_param_shard_widths": {"qk": [[3, 1], [3, 1]]},
    }
    spec = parse_spec(
        'name = "x"\nplacement_from = "checkpoint"\n[[rule]]\nmatch = "qk"\nto = "{part}"\n'
        "transposed = true\ninterleaved = { block = 4 }\nfused = { repeat = 1, parts = { q = 4, k = 4 } }",
        "x.toml",
    )
    source = Source(
        "DeepSpeed", Path("."), tensors=[t for t, _ in stored], universal_info=info, degrees={"tensor": 2}
    )
    placed = place(fit_spec(spec, source), source.tensors, degrees=source.degrees)
    halves = {part: array.reshape(2, 2, 2).swapaxes(0, 1).reshape(4, 2).T for part, array in values.items()}
    same(rebuild(placed, stored), halves)


def test_a_shipped_spec_takes_the_checkpoints_word(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": [(3, 4)] * 2,
        "model.norm.weight": [(4,)] * 2,
        "model.layers.0.input_layernorm.weight": [(4,)] * 2,
        **{f"model.layers.0.self_attn.{p}_proj.weight": [(2, 4)] * 2 for p in "qkvo"},
        **{f"model.layers.0.mlp.{p}_proj.weight": [(4, 2)] * 2 for p in ("gate", "up", "down")},
    }
    info = {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": [".*norm"],
        "parameter_with_row_parallelism_patterns": [".*down_proj"],
    }
    tensors = [
        store(name, np.zeros(shape), {"tensor": rank})[0]
        for name, each in shapes.items()
        for rank, shape in enumerate(each)
    ]
    source = Source("DeepSpeed", Path("."), tensors=tensors, universal_info=info, degrees={"tensor": 2})
    placed = place(choose_spec(source), tensors, degrees=source.degrees)
    found = {part.name: part.shape for each in placed for part in each.parts}
    assert found["model.layers.0.mlp.down_proj.weight"] == (4, 4)
    assert found["model.layers.0.mlp.up_proj.weight"] == (8, 2)
    assert found["model.norm.weight"] == (4,)
    assert load_spec("llama").placement is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"universal_checkpoint_version": 0.5}, "version 0.5"),
        (
            {"parameter_with_row_parallelism_patterns": ["dwon"]},
            "dwon in parameter_with_row_parallelism_patterns",
        ),
        (
            {"autotp_unsupported_parameter_patterns": {"qkv": "no heads"}},
            "qkv.weight: DeepSpeed says .* no heads",
        ),
        ({"affine_map": {"version": 2, "params": {}}}, "affine_map has version 2"),
        (
            {"affine_map": {"params": {"norm": replicated_map((4,), 2, scale=0.5).to_dict()}}},
            "norm.weight: a piece is scaled",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        universal_placement(INFO | change, list(SHAPES), {"tensor": 2})


def test_empty_lists_say_nothing_about_several_tensor_ranks() -> None:
    info = {"universal_checkpoint_version": 0.4}
    with pytest.raises(SpecError, match="lists of patterns are empty"):
        universal_placement(info, ["w"], {"tensor": 2})
    assert universal_placement(info, ["w"], {"tensor": 1}).rules[0].names == ("w",)


def test_copies_on_two_stages_are_replicas() -> None:
    tensors = [store("embed.weight", np.zeros((5, 4)), {"tensor": 0, "pipeline": p})[0] for p in (0, 3)]
    placed = place(universal_placement(INFO, ["embed.weight"], {}), tensors)
    assert [each.role for each in placed] == ["primary", "replica"]
