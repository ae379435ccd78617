"""Portable attention against a dense oracle: kinds of context parallelism, masks, groupings of heads."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from parallel.layout import ContextKind, context_kind_problem
from tests.parallel.attention_cases import MASKS, Case, build, errors, inputs, oracle
from tests.ranks import run_ranks

# Relative to the largest value of a tensor. float64 rounds at 1e-16 and sums a hundred terms.
TIGHT = 1e-14
# float32 rounds at 6e-8, the sums over keys and then over queries hold a hundred terms each.
SINGLE = 3e-6
# bfloat16 rounds at 2^-8: inputs are exact, weights, output and its gradients are each rounded.
HALF = 2e-2

CONTEXT_KINDS = get_args(ContextKind)
HEADS = [(8, 8), (8, 2), (4, 1)]


def _all_groupings(case: Case, kind: str, dtype: torch.dtype) -> dict[str, float]:
    return {
        f"{name}, {heads} heads over {kv_heads}": error
        for heads, kv_heads in HEADS
        for name, error in errors(replace(case, heads=heads, kv_heads=kv_heads), kind, dtype).items()
    }


def _too_large(results: list[dict[str, float]], limit: float) -> dict[str, float]:
    assert len(results[0]) == 4 * len(HEADS)
    return {name: error for result in results for name, error in result.items() if not error <= limit}


@pytest.mark.parametrize("mask", MASKS)
def test_alone_equals_the_oracle(mask: str) -> None:
    assert not _too_large(run_ranks(_all_groupings, 1, MASKS[mask], "p2p", torch.float64), TIGHT)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", CONTEXT_KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_equals_the_oracle(ranks: int, kind: str, mask: str) -> None:
    assert not _too_large(run_ranks(_all_groupings, ranks, MASKS[mask], kind, torch.float64), TIGHT)


@pytest.mark.parametrize("kind", CONTEXT_KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
def test_lower_precision_is_as_near_as_it_rounds(kind: str, dtype: torch.dtype, limit: float) -> None:
    case = MASKS["documents and window"]
    assert not _too_large(run_ranks(_all_groupings, 2, case, kind, dtype), limit)


def _reused_documents() -> list[float]:
    """One tensor of documents rewritten in place between two calls."""
    (query, key, value), _, documents = inputs(MASKS["documents"])
    assert documents is not None
    attention = build(MASKS["documents"])
    gaps = []
    for _ in range(2):
        output = attention(query, key, value, documents)
        gaps.append(float((output - oracle(query, key, value, documents, None)).abs().max()))
        documents.copy_(documents.roll(1, 0))
    return gaps


def test_documents_rewritten_in_place_are_seen() -> None:
    assert max(run_ranks(_reused_documents, 1)[0]) < TIGHT * 10  # absolute, of values up to 4


def _layer_windows() -> list[int | None]:
    case = Case(window=10)
    return [build(case, layer=layer, window_attn_skip_freq=2).window for layer in (1, 2, 3, 4)]


def test_some_layers_see_everything() -> None:
    assert run_ranks(_layer_windows, 1)[0] == [10, None, 10, None]


def _dropped() -> tuple[float, float]:
    # sequence parallelism: the stream is the caller's, not megatron-core's tensor-parallel one
    (query, key, value), _, _ = inputs(Case())
    attention = build(Case(), attention_dropout=0.3)
    attention.config.sequence_parallel = True
    exact = oracle(query, key, value, None, None)
    torch.manual_seed(3)
    draws = torch.stack([attention(query, key, value, None) for _ in range(100)])
    attention.eval()
    kept = attention(query, key, value, None)
    return float((draws.mean(0) - exact).abs().mean() / draws.std(0).mean()), float(
        (kept - exact).abs().max()
    )


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    drift, evaluation = run_ranks(_dropped, 1)[0]
    assert drift < 0.12  # the mean of 100 draws strays by std / sqrt(100), on average 0.08 std
    assert evaluation < TIGHT * 10


def _refusal(kind: str, heads: int, dropout: float) -> str:
    try:
        build(Case(heads=heads, kv_heads=1), kind, attention_dropout=dropout)
    except ValueError as error:
        return str(error)
    return ""


def test_all_problems_are_told_at_once() -> None:
    message = run_ranks(_refusal, 2, "a2a", 3, 0.1)[0]
    assert "3 heads" in message
    assert "attention_dropout is 0.1" in message


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    message = run_ranks(_refusal, 2, "a2a+p2p", 4, 0.0)[0]
    assert "a2a+p2p" in message
    assert all(kind in message for kind in CONTEXT_KINDS)


def _wrong_documents() -> str:
    (query, key, value), _, documents = inputs(MASKS["documents"])
    assert documents is not None
    try:
        build(Case())(query, key, value, documents[:, :-1])
    except ValueError as error:
        return str(error)
    return ""


def test_documents_of_another_length_are_refused_with_both_shapes() -> None:
    message = run_ranks(_wrong_documents, 1)[0]
    assert "(3, 95)" in message
    assert "(3, 96)" in message


@pytest.mark.parametrize(
    ("heads", "ranks", "fits"), [(8, 4, True), (6, 4, False), (4, 4, True), (2, 4, False)]
)
def test_ulysses_needs_query_heads_divisible_by_ranks(heads: int, ranks: int, fits: bool) -> None:
    assert (context_kind_problem("a2a", heads, ranks) is None) == fits


@pytest.mark.parametrize("kind", CONTEXT_KINDS)
def test_bands_of_queries_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.attention.tiles._BAND", 7)
    monkeypatch.setattr("parallel.attention.ring._SCORES", 5 * 8 * 24 * 8 * 3)  # 5 rows of 8 heads, 24 keys
    for mask in ("causal", "documents", "window"):
        assert not _too_large(run_ranks(_all_groupings, 2, MASKS[mask], kind, torch.float64), TIGHT)
