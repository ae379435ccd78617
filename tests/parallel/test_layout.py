"""What is wrong with a layout: everything at once, with both numbers and what to do."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError

from parallel.layout import Layout

MODEL = {"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 128}


def problems(layout: Layout, world_size: int | None = None, **changes: int | None) -> list[str]:
    return layout.problems(world_size, **{**MODEL, **changes})


@pytest.mark.parametrize(
    ("layout", "world_size", "changes", "numbers", "remedy"),
    [
        (Layout(tensor=0), None, {}, ["tensor = 0"], "at least 1"),
        (Layout(tensor=2, pipeline=2), 6, {}, ["4", "6 ranks"], "multiple of 4 ranks"),
        (Layout(tensor=2), None, {"num_attention_heads": 7}, ["7", "tensor = 2"], "divisor of 7"),
        (Layout(tensor=8), None, {}, ["num_query_groups = 4", "tensor = 8"], "divisor of 4"),
        (Layout(tensor=2), None, {"ffn_hidden_size": 129}, ["129", "tensor = 2"], "divisor of 129"),
        (Layout(sequence_parallel=True), None, {}, ["true", "tensor = 1"], "sequence_parallel = false"),
        (Layout(pipeline=3), None, {}, ["num_layers = 8", "3 stages"], "multiple of 3 layers"),
        (
            Layout(pipeline=2, virtual_pipeline=3),
            None,
            {},
            ["num_layers = 8", "6 stages", "pipeline 2", "virtual_pipeline 3"],
            "multiple of 6",
        ),
        (Layout(virtual_pipeline=2), None, {}, ["virtual_pipeline = 2", "pipeline = 1"], "raise pipeline"),
        (Layout(pipeline=2, virtual_pipeline=1), None, {}, ["virtual_pipeline = 1"], "leave it out"),
        (Layout(context=3), None, {"sequence_length": 64}, ["64", "multiple of 6"], "use 66"),
        (
            Layout(tensor=2, context=2, sequence_parallel=True),
            None,
            {"sequence_length": 12},
            ["12", "multiple of 8"],
            "use 16",
        ),
        (
            Layout(tensor=4, context=4, context_kind="a2a"),
            None,
            {"sequence_length": 64},
            ["2 heads", "context = 4"],
            "p2p",
        ),
        (Layout(expert=2), None, {}, ["expert = 2", "no experts"], "model.num_experts"),
        (Layout(expert=3), None, {"num_experts": 4}, ["num_experts = 4", "expert = 3"], "divisor of 4"),
        (Layout(expert=4), 6, {"num_experts": 4}, ["expert = 4", "6 data"], "use a divisor"),
        (Layout(tensor=2), None, {"num_experts": 4}, ["tensor = 2"], "sequence_parallel = true"),
    ],
)
def test_a_problem_has_both_numbers_and_the_remedy(
    layout: Layout,
    world_size: int | None,
    changes: dict[str, int],
    numbers: list[str],
    remedy: str,
) -> None:
    found = problems(layout, world_size, **changes)
    fitting = [text for text in found if all(number in text for number in numbers)]
    assert len(fitting) == 1, found
    assert remedy in fitting[0]


def test_all_problems_come_at_once() -> None:
    layout = Layout(tensor=3, pipeline=3, context=2, expert=2, sequence_parallel=True)
    found = "\n".join(problems(layout, 18, sequence_length=50, num_experts=3))
    for key in (
        "num_attention_heads",
        "ffn_hidden_size",
        "num_query_groups",
        "num_layers",
        "sequence_length",
        "num_experts",
    ):
        assert key in found
    assert len(found.splitlines()) == 6


def test_every_degree_below_one_is_named_before_anything_divides_by_it() -> None:
    assert len(problems(Layout(tensor=0, context=-1, virtual_pipeline=0), 8)) == 3


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        (Layout(), 1),
        (Layout(tensor=4, pipeline=2, virtual_pipeline=4, sequence_parallel=True), 8),
        (Layout(tensor=2, context=4, context_kind="a2a"), 16),
        (Layout(context=2, distributed_optimizer=False), 6),
    ],
)
def test_a_layout_that_fits_has_none(layout: Layout, world_size: int) -> None:
    assert problems(layout, world_size, sequence_length=64) == []


def test_experts_that_fit_have_none() -> None:
    layout = Layout(tensor=2, expert=4, sequence_parallel=True)
    assert problems(layout, 8, num_experts=8, sequence_length=64) == []


def test_degrees() -> None:
    layout = Layout(tensor=2, pipeline=3, context=4, virtual_pipeline=2)
    assert (layout.model_parallel, layout.chunks, layout.data(48)) == (24, 2, 2)
    assert Layout().chunks == 1


@pytest.mark.parametrize(
    ("layout", "world_size", "text"),
    [
        (Layout(), 4, "TP1 PP1 DP4 distributed optimizer"),
        (Layout(distributed_optimizer=False), 1, "TP1 PP1 DP1"),
        (
            Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
            8,
            "TP2 PP2 VPP2 DP2 SP distributed optimizer",
        ),
        (
            Layout(context=2, context_kind="a2a", expert=2, distributed_optimizer=False),
            4,
            "TP1 PP1 CP2 (a2a) EP2 DP2",
        ),
    ],
)
def test_it_describes_itself_in_one_line(layout: Layout, world_size: int, text: str) -> None:
    assert layout.describe(world_size) == text


def test_it_is_frozen_and_knows_its_keys() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout().tensor = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Layout(tensors=2)  # type: ignore[call-arg]
