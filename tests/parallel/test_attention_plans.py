"""What attention leaves out: tiles of documents and windows, blocks of the ring."""

import random

import pytest
import torch

from parallel.attention.blocks import plan_blocks
from parallel.attention.mask import PlanCache, document_runs, visible
from parallel.attention.tiles import Plan, Spans, plan_tiles
from parallel.context import context_spans

CPU = torch.device("cpu")


def _area(plan: Plan) -> int:
    return sum((tile.end - tile.start) * (tile.end - tile.key_start) for tiles in plan for tile in tiles)


def _documents(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


def test_runs_are_told_by_change_alone() -> None:
    documents = torch.tensor([[4, 4, 0, 0, 0, 4], [1, 1, 1, 1, 1, 1]])
    assert document_runs(documents) == [[(0, 2), (2, 5), (5, 6)], [(0, 6)]]


def test_a_causal_batch_needs_no_mask() -> None:
    assert plan_tiles(None, ((0, 64),), None, CPU)[0][0].mask is None


def test_rows_that_are_alike_share_their_tiles() -> None:
    assert len(plan_tiles(torch.zeros(4, 64, dtype=torch.int32), ((0, 64),), None, CPU)) == 1


def test_work_is_the_sum_of_squared_lengths() -> None:
    lengths = [100, 300, 200, 424]
    plan = plan_tiles(_documents(lengths), ((0, 1024),), None, CPU)
    assert _area(plan) == sum(length**2 for length in lengths)


def test_many_tiny_documents_share_calls() -> None:
    plan = plan_tiles(_documents([4] * 64), ((0, 256),), None, CPU)
    assert len(plan[0]) == 4


def test_work_under_a_window_grows_with_the_window() -> None:
    plan = plan_tiles(None, ((0, 2048),), 63, CPU)
    assert _area(plan) <= 2048 * 2 * 64


def test_tiles_of_context_ranks_cover_each_query_once() -> None:
    documents = _documents([1, 40, 7, 2, 46])
    covered = [
        position
        for rank in range(4)
        for tile in plan_tiles(documents, context_spans(96, rank, 4), 10, CPU)[0]
        for position in range(tile.start, tile.end)
    ]
    assert sorted(covered) == list(range(96))


def _seen(plan: Plan, row: int, spans: Spans, length: int) -> torch.Tensor:
    """What the tiles of a row let the queries of the spans see of all keys; the tiles must follow them."""
    wanted = [position for span in spans for position in range(*span)]
    seen = torch.zeros(len(wanted), length, dtype=torch.bool)
    done = 0
    for tile in plan[row if len(plan) > 1 else 0]:
        queries, keys = tile.end - tile.start, tile.end - tile.key_start
        assert wanted[done : done + queries] == list(range(tile.start, tile.end))
        mask = torch.ones(queries, queries, dtype=torch.bool).tril() if tile.mask is None else tile.mask
        assert mask.shape == (queries, keys)
        seen[done : done + queries, tile.key_start : tile.end] = mask
        done += queries
    assert done == len(wanted)
    return seen


def _check_all_ranks(documents: torch.Tensor, ranks: int, window: int | None) -> None:
    length = documents.size(1)
    positions = torch.arange(length)
    for rank in range(ranks):
        spans = context_spans(length, rank, ranks)
        plan = plan_tiles(documents, spans, window, CPU)
        own = torch.cat([positions[slice(*span)] for span in spans])
        for row, numbers in enumerate(documents):
            exact = visible(own, positions, window, query_documents=numbers[own], key_documents=numbers)
            assert torch.equal(_seen(plan, row, spans, length), exact)


def test_a_document_begun_before_the_late_span_is_not_grouped_with_the_early_one() -> None:
    _check_all_ranks(_documents([19, 29, 33, 47]), 4, None)


@pytest.mark.parametrize("seed", range(8))
def test_tiles_hold_each_query_once_with_its_keys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    for _ in range(25):
        monkeypatch.setattr("parallel.attention.tiles._BAND", draw.choice([7, 1024]))
        ranks = draw.choice([1, 2, 3, 4, 8])
        length = 2 * ranks * draw.choice([1, 3, 8, 16, 24])
        window = draw.choice([None, 0, 5, 40, length])
        rows = []
        for _ in range(draw.choice([1, 2])):
            borders = sorted(draw.sample(range(1, length), draw.randint(0, min(12, length - 1))))
            rows.append(torch.bucketize(torch.arange(length), torch.tensor(borders), right=True))
        _check_all_ranks(torch.stack(rows).int(), ranks, window)


@pytest.mark.parametrize("window", [None, 5000])
def test_masks_of_a_long_sequence_take_one_band(window: int | None) -> None:
    length = 16384
    masks = {
        mask.untyped_storage().data_ptr(): mask.untyped_storage().nbytes()
        for documents in (_documents([length]), _documents([3, 9000, 7381]))
        for tile in plan_tiles(documents, context_spans(length, 6, 8), window, CPU)[0]
        if (mask := tile.mask) is not None
    }
    assert 0 < sum(masks.values()) <= 1024 * length


def test_ring_ranks_have_the_same_work() -> None:
    blocks = [sum(map(len, plan_blocks(64, rank, 4, None, CPU, None))) for rank in range(4)]
    assert blocks == [9, 9, 9, 9]  # 36 of the 64 blocks of an 8 x 8 triangle, in four equal parts


def test_ring_skips_blocks_outside_window_and_document() -> None:
    halves = _documents([32, 32])
    for rank in range(4):
        steps = plan_blocks(64, rank, 4, 7, CPU, halves)
        assert sum(map(len, steps)) <= 4  # each of two halves sees itself and at most the chunk before it


@pytest.mark.parametrize("seed", range(4))
def test_ring_blocks_hold_what_each_query_sees(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(25):
        ranks = draw.choice([2, 3, 4])
        length = 2 * ranks * draw.choice([1, 2, 8])
        borders = sorted(draw.sample(range(1, length), draw.randint(0, 3)))
        row = torch.bucketize(torch.arange(length), torch.tensor(borders), right=True)
        window = draw.choice([None, 0, 3, length // 2, length])
        documents = draw.choice([None, torch.stack([row, row.flip(0)]).int()])
        _check_ring(documents, length, ranks, window)


def _check_ring(documents: torch.Tensor | None, length: int, ranks: int, window: int | None) -> None:
    chunk = length // (2 * ranks)
    found = torch.zeros(2, length, length, dtype=torch.bool)
    for rank in range(ranks):
        for step, blocks in enumerate(plan_blocks(length, rank, ranks, window, CPU, documents)):
            own, passing = (context_spans(length, r % ranks, ranks) for r in (rank, rank - step))
            for block in blocks:
                queries, keys = slice(*own[block.query]), slice(*passing[block.key])
                mask = block.mask((..., slice(0, chunk), slice(None)))
                seen = torch.ones(1, dtype=torch.bool) if mask is None else mask
                assert seen.any()
                assert mask is None or not seen.all()
                found[:, queries, keys] = seen.view(-1, chunk, chunk) if seen.dim() > 2 else seen
    positions = torch.arange(length)
    numbers = torch.zeros(2, length, dtype=torch.int32) if documents is None else documents
    exact = visible(positions, positions, window, query_documents=numbers, key_documents=numbers)
    assert torch.equal(found, exact)


def test_every_pair_is_seen_when_nothing_hides_it() -> None:
    positions = torch.arange(5)
    assert torch.equal(visible(positions, positions, None), torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_plan_is_built_once_for_the_same_memory() -> None:
    cache: PlanCache[object] = PlanCache()
    documents = torch.zeros(2, 8, dtype=torch.int32)
    assert cache.get(documents, 1, object) is cache.get(documents.detach(), 1, object)


def test_a_plan_is_built_again_after_a_rewrite() -> None:
    cache: PlanCache[object] = PlanCache()
    documents = torch.zeros(2, 8, dtype=torch.int32)
    before = cache.get(documents, 1, object)
    assert cache.get(documents.fill_(1), 1, object) is not before


def test_the_cache_forgets_the_oldest() -> None:
    cache: PlanCache[object] = PlanCache(capacity=2)
    batches = [torch.full((1, 8), value) for value in range(3)]
    plans = [cache.get(documents, 1, object) for documents in batches]
    assert cache.get(batches[2], 1, object) is plans[2]
    assert cache.get(batches[0], 1, object) is not plans[0]
