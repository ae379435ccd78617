"""Zig-zag slices: round trip, megatron-core's order, and lengths that cannot be cut."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from parallel.context import context_join, context_slice
from tests.ranks import run_ranks


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_join_undoes_slices(size: int, dim: int) -> None:
    whole = torch.randn(16, 24, 3)
    slices = [context_slice(whole, dim, rank, size) for rank in range(size)]
    assert torch.equal(context_join(slices, dim), whole)


def _megatron_slice(tokens: torch.Tensor) -> torch.Tensor:
    return get_batch_on_this_cp_rank({"tokens": tokens}, dist.group.WORLD)["tokens"]


def test_slices_are_those_of_megatron_core() -> None:
    tokens = torch.arange(2 * 16).view(2, 16)
    for rank, expected in enumerate(run_ranks(_megatron_slice, 4, tokens)):
        assert torch.equal(context_slice(tokens, 1, rank, 4), expected)


def test_a_length_that_cannot_be_cut_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"length 20 .* multiple of 8"):
        context_slice(torch.zeros(20), 0, 0, 4)
