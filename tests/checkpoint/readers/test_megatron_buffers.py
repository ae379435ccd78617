"""Parameters are found in flat buffers of any data ranks, bucket sizes and sizes, by order and values."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from checkpoint.readers.megatron_buffers import locate


@dataclass
class Memory:
    """Elements in memory."""

    values: torch.Tensor

    @property
    def numel(self) -> int:
        return self.values.numel()

    @property
    def dtype(self) -> str:
        return str(self.values.dtype).removeprefix("torch.")

    def read(self, start: int, count: int) -> np.ndarray:
        part = self.values[start : start + count]
        kind = torch.int16 if self.values.element_size() == 2 else torch.int32
        return part.view(kind).numpy().view(f"u{self.values.element_size()}")


@dataclass
class Buffer:
    """A buffer laid out as megatron-core's documentation of its padding says, counted in padded elements."""

    masters: torch.Tensor
    starts: dict[int, int]
    bucket_starts: list[int]


def lay_out(parameters: Sequence[torch.Tensor], bucket: int | None, ranks: int, shared: set[int]) -> Buffer:
    """The file's tensor: buckets behind each other, without the padding at their ends."""
    flat: list[torch.Tensor] = []
    starts, bucket_starts = {}, []
    current: list[torch.Tensor] = []
    padded = begin = 0  # in the buffer itself, where ends of buckets are padded

    def close() -> None:
        nonlocal padded, begin, current
        flat.append(torch.cat(current))
        divisor = math.lcm(ranks, 128)
        padded = begin = begin + -(-flat[-1].numel() // divisor) * divisor
        current = []

    for number in reversed(range(len(parameters))):
        values = parameters[number]
        gap = -padded % 64
        if gap:
            current.append(torch.full((gap,), 7.0))
            padded += gap
        if number in shared and current:
            close()
        if not current:
            bucket_starts.append(sum(map(len, flat)))
        starts[number] = sum(map(len, flat)) + sum(map(len, current))
        current.append(values)
        padded += len(values)
        if number in shared or (bucket is not None and padded - begin >= bucket):
            close()
    if current:
        close()
    return Buffer(torch.cat(flat), starts, bucket_starts)


def random_case(seed: int) -> tuple[list[torch.Tensor], Buffer]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sizes = [draw(1, 400) * draw(1, 9) for _ in range(draw(1, 40))]
    masters = [
        torch.ones(size) if draw(0, 3) == 0 else torch.randn(size, generator=generator) for size in sizes
    ]
    bucket = None if draw(0, 3) == 0 else draw(1, 8000)
    shared = {draw(0, len(sizes))} if draw(0, 2) else set()
    return masters, lay_out(masters, bucket, draw(1, 9), shared)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("known", [False, True])
def test_every_parameter_is_found(dtype: torch.dtype, known: bool) -> None:
    for seed in range(60):
        masters, buffer = random_case(seed)
        weights = [Memory(values.to(dtype)) for values in masters]
        found = locate(weights, Memory(buffer.masters), buffer.bucket_starts if known else None)
        assert (found.starts, found.doubts) == (buffer.starts, ()), seed


def test_parameters_that_are_not_in_the_buffer_are_skipped() -> None:
    masters, buffer = random_case(3)
    frozen = [torch.randn(300), *masters, torch.randn(64), torch.randn(1)]
    weights = [Memory(values.bfloat16()) for values in frozen]
    expected = {number + 1: start for number, start in buffer.starts.items()}
    assert locate(weights, Memory(buffer.masters)).starts == expected


def test_a_weight_that_differs_in_places_is_found_and_doubted() -> None:
    masters = [torch.randn(300), torch.randn(1000), torch.randn(50)]
    buffer = lay_out(masters, None, 2, set())
    weights = [Memory(values.bfloat16()) for values in masters]
    weights[1].values[17] += 1
    found = locate(weights, Memory(buffer.masters))
    assert found.starts == buffer.starts
    assert found.doubts == ((1, buffer.starts[1], 1, 1000),)


def test_values_of_another_step_are_doubted_where_they_begin() -> None:
    masters = [torch.randn(300), torch.randn(1000), torch.randn(50)]
    buffer = lay_out(masters, None, 2, set())
    weights = [Memory(values.bfloat16()) for values in masters]
    weights[1] = Memory(torch.randn(1000).bfloat16())
    found = locate(weights, Memory(buffer.masters))
    assert found.starts == {}
    assert [(doubt.parameter, doubt.start) for doubt in found.doubts] == [(1, buffer.starts[1])]


@pytest.mark.parametrize("extra", [[torch.ones(640)], [torch.ones(64)]])
def test_a_buffer_that_holds_more_than_the_parameters_fits_nothing(extra: list[torch.Tensor]) -> None:
    masters = [torch.randn(300), torch.randn(1000)]
    buffer = lay_out([*extra, *masters], None, 1, set())
    found = locate([Memory(values.bfloat16()) for values in masters], Memory(buffer.masters))
    assert (found.starts, found.doubts) == ({}, ())
    assert found.reached == 1024 + 300  # the last registered is first, and 1000 is aligned


def test_a_buffer_that_holds_less_than_a_parameter_fits_nothing() -> None:
    found = locate([Memory(torch.ones(300)), Memory(torch.ones(1000))], Memory(torch.zeros(500)))
    assert (found.starts, found.reached) == ({}, 0)


def test_the_search_gives_up_in_time() -> None:
    """One parameter of many has other values: not every combination of skipped ones is tried."""
    masters = [torch.randn(64) for _ in range(3000)]
    buffer = lay_out(masters, 1000, 2, set())
    weights = [Memory(values.bfloat16()) for values in masters]
    weights[1500] = Memory(torch.randn(64).bfloat16())
    began = time.process_time()
    found = locate(weights, Memory(buffer.masters))
    assert [doubt.parameter for doubt in found.doubts] == [1500]
    assert time.process_time() - began < 20  # all combinations would take minutes
