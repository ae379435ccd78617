"""Writing in a spec's names, and that reading it back gives the same tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from checkpoint.language.arrange import Arranged, arrange
from checkpoint.language.place import place
from checkpoint.language.spec import SpecError, load_spec, parse_spec
from tests.checkpoint.language.megatron_ranks import Layout, fused_qkv, logical
from tests.checkpoint.language.rebuild import Array, Stored, rebuild, region, same, store
from tests.checkpoint.language.test_megatron import layouts


def write(targets: list[Arranged], values: dict[str, Array]) -> Stored:
    """Fill the targets; what no part covers stays zero."""
    stored = []
    for target in targets:
        array = np.zeros(target.shape)
        for part in target.parts:
            box = tuple(slice(o, o + s) for o, s in zip(part.box.offset, part.box.size, strict=True))
            region(part, array)[...] = values[part.name][box]
        stored.append(store(target.name, array))
    return stored


def shapes(values: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in values.items()}


@pytest.mark.parametrize(
    "name", ["megatron-core-gpt", "megatron-core-gpt-dist", "qwen3-moe", "mixtral", "logical"]
)
@given(layout=layouts())
@settings(max_examples=25, deadline=None)
def test_what_is_written_reads_back(name: str, layout: Layout) -> None:
    if name in ("qwen3-moe", "mixtral"):  # families that always have experts with gates
        layout = replace(layout, experts=layout.experts or layout.expert_ranks, bias=False, gated=True)
    values = logical(layout)
    spec = load_spec(name)
    facts = layout.facts() | {"padded_vocab_size": layout.padded_vocab}
    stored = write(arrange(spec, shapes(values), facts=facts), values)
    placed = place(spec, [tensor for tensor, _ in stored], facts=facts)
    same(rebuild(placed, stored), values)


def test_torch_dist_stacks_layers_and_experts() -> None:
    layout = Layout(stages=((0, 0, 3),), experts=4, qk_norm=True)
    values = logical(layout)
    facts = layout.facts() | {"padded_vocab_size": 16}
    stored = write(arrange(load_spec("megatron-core-gpt-dist"), shapes(values), facts=facts), values)
    arrays = {tensor.name: array for tensor, array in stored}
    qkv = np.stack([fused_qkv(layout, values, f"model.layers.{i}.self_attn", "weight") for i in range(3)])
    np.testing.assert_array_equal(arrays["decoder.layers.self_attention.linear_qkv.weight"], qkv)
    ups = [
        [
            np.concatenate(
                [values[f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")]
            )
            for e in range(4)
        ]
        for i in range(3)
    ]
    np.testing.assert_array_equal(
        arrays["decoder.layers.mlp.experts.experts.linear_fc1.weight"], np.array(ups)
    )
    table = arrays["embedding.word_embeddings.weight"]
    assert table.shape == (16, layout.hidden)
    assert not table[11:].any()
    assert "output_layer.weight" in arrays


def test_a_key_for_every_layer_on_request() -> None:
    layout = Layout(stages=((0, 0, 2),), experts=2)
    facts = layout.facts() | {"homogeneous_layers": 0}
    names = {
        each.name
        for each in arrange(load_spec("megatron-core-gpt-dist"), shapes(logical(layout)), facts=facts)
    }
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in names
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in names
    assert not [name for name in names if name.startswith("decoder.layers.self")]


def test_a_tied_head_is_not_written() -> None:
    layout = Layout(tied=True)
    targets = arrange(load_spec("megatron-core-gpt"), shapes(logical(layout)), facts=layout.facts())
    assert "output_layer.weight" not in {each.name for each in targets}


def test_all_that_cannot_be_written_is_listed() -> None:
    values = logical(Layout())
    values["model.layers.0.mlp.third_proj.weight"] = np.zeros((2, 2))
    del values["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(SpecError) as raised:
        arrange(load_spec("megatron-core-gpt"), shapes(values), facts=Layout().facts())
    message = str(raised.value)
    assert "model.layers.0.mlp.third_proj.weight (nearest rule writes model.layers.{layer}.mlp." in message
    assert (
        "model.layers.0.self_attn.q_proj.weight (decoder.layers.{layer}.self_attention.linear_qkv." in message
    )
    assert "needs part 'k' as well" in message


def test_facts_that_contradict_the_shapes_are_refused() -> None:
    facts = Layout().facts() | {"head_dim": 3}
    with pytest.raises(SpecError, match=r"part 'q' has 8 rows, but `fused` says 2 x 6 .*head_dim = 3"):
        arrange(load_spec("megatron-core-gpt"), shapes(logical(Layout())), facts=facts)


def test_parts_that_share_evenly_must_be_equal() -> None:
    spec = parse_spec(
        'name = "x"\n[[rule]]\nmatch = "w"\nto = "{part}"\nfused = { parts = ["a", "b"] }', "x.toml"
    )
    with pytest.raises(SpecError, match=r"should be equally long, but are \{'a': 2, 'b': 3\}"):
        arrange(spec, {"a": (2,), "b": (3,)})


def test_writing_adds_the_offset_that_reading_takes() -> None:
    spec = parse_spec('name = "x"\n[[rule]]\nmatch = "{layer}.w"\nto = "layers.{layer-1}.w"', "x.toml")
    assert [each.name for each in arrange(spec, {"layers.0.w": (2,), "layers.4.w": (2,)})] == ["1.w", "5.w"]
