"""The spec of megatron-core's GPTModel, against ranks that numpy cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.language.place import place
from checkpoint.language.spec import load_spec
from tests.checkpoint.language.megatron_ranks import Layout, logical, ranks
from tests.checkpoint.language.rebuild import rebuild, same


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Uneven stages, TP up to twice the query groups, padded vocabularies, experts over ranks."""
    tensor, pipeline, virtual = (
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )
    stages = tuple((p, v, draw(st.integers(1, 3))) for v in range(virtual) for p in range(pipeline))
    groups = draw(st.sampled_from([1, 2, 4]))
    vocab = draw(st.integers(5, 16))
    expert_ranks = draw(st.sampled_from([1, 2]))
    return Layout(
        tensor=tensor,
        stages=stages,
        groups=groups,
        heads=groups * draw(st.sampled_from([1, 2, 3])),
        head_dim=draw(st.sampled_from([4, 8])),
        ffn=4 * draw(st.integers(1, 3)),
        vocab=vocab,
        padded_vocab=tensor * -(-vocab // tensor) + tensor * draw(st.integers(0, 3)),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        gated=draw(st.booleans()),
        norms=draw(st.sampled_from(["apart", "fused"])),
        experts=expert_ranks * draw(st.integers(0, 3)),
        expert_ranks=expert_ranks,
        grouped=draw(st.booleans()),
    )


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_any_layout_is_put_together_exactly(layout: Layout) -> None:
    values = logical(layout)
    stored = ranks(layout, values)
    placed = place(
        load_spec("megatron-core-gpt"),
        [tensor for tensor, _ in stored],
        facts=layout.facts(),
        degrees=layout.degrees(),
        layers=layout.layers(),
    )
    same(rebuild(placed, stored), values)
