"""Softmax quantities of a split vocabulary: plain torch's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel.top_k import spread, top_k
from parallel.vocab_parallel import kl_divergence, log_softmax, log_sum_exp
from tests.ranks import run_ranks

ROWS = (3, 5)
KINDS = ("log_sum_exp", "log_softmax", "forward", "reverse", "tempered", "top 7", "top 7 reverse")


def whole(vocabulary: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of every token, [3, 5, vocabulary], up to 15 apart."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*ROWS, vocabulary, generator=generator) * 2).to(dtype)


def split(logits: torch.Tensor) -> torch.Tensor:
    """This rank's columns, padded as the engine pads."""
    size, rank = dist.get_world_size(), dist.get_rank()
    columns = -(-logits.size(-1) // size)
    padding = columns * size - logits.size(-1)
    return F.pad(logits, (0, padding), value=torch.finfo(logits.dtype).min)[
        ..., rank * columns : (rank + 1) * columns
    ]


def ours(kind: str, logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[3, 5] from this rank's columns of the two models' logits."""
    group: Any = dist.group.WORLD
    match kind:
        case "log_sum_exp":
            return log_sum_exp(logits, group)
        case "log_softmax":
            mine = torch.where(split(weight) > -1e3, split(weight), 0.0)
            terms = torch.where(mine != 0, mine * log_softmax(logits, group), 0.0).sum(-1)
            return Sum.apply(terms)
        case "tempered":
            target = log_softmax(other.float() / 2, group)
            return kl_divergence(logits, target, group, temperature=2.0)
        case "forward" | "reverse":
            target = log_softmax(other, group)
            return kl_divergence(logits, target, group, reverse=kind == "reverse")
        case _:
            target = spread(top_k(other, 7, group), logits.detach(), group)
            return kl_divergence(logits, target, group, reverse=kind.endswith("reverse"))


class Sum(torch.autograd.Function):
    """Sum over the ranks of numbers whose sum every rank goes on with."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def plain(kind: str, logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same from whole vocabularies, by torch alone."""
    temperature = 2.0 if kind == "tempered" else 1.0
    log_q, log_p = (F.log_softmax(one / temperature, -1) for one in (logits, other))
    if kind == "log_sum_exp":
        return logits.logsumexp(-1)
    if kind == "log_softmax":
        return (weight * log_q).sum(-1)
    if kind.startswith("top"):
        chosen = log_p.topk(7).indices
        log_q, log_p = (bins(one, chosen) for one in (log_q, log_p))
    if kind.endswith("reverse"):
        log_q, log_p = log_p, log_q
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def bins(log_p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the chosen tokens and of all others together."""
    rest = log_p.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, chosen), rest], -1)


def with_gradient(
    function: Callable[..., torch.Tensor], kind: str, logits: torch.Tensor, *rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = function(kind, leaf, *rest)
    slopes = torch.linspace(-1, 2, value.numel()).view_as(value).to(value.dtype)
    (value * slopes).sum().backward()
    return value.detach(), leaf.grad


def apart(kind: str, vocabulary: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest difference of value and gradient from fp64, and the largest gradient of padding.

    Relative to what the numbers are differences of: log-probabilities, and slopes.
    """
    logits = whole(vocabulary, 1, dtype)
    other = whole(vocabulary, 2, torch.float32)  # without ties, of which any may be among the likeliest
    weight = whole(vocabulary, 3, torch.float32)
    value, gradient = with_gradient(ours, kind, split(logits), split(other), weight)
    expected, slope = with_gradient(plain, kind, logits.double(), other.double(), weight.double())
    first = dist.get_rank() * gradient.size(-1)
    present = min(gradient.size(-1), max(0, vocabulary - first))
    difference = gradient[..., :present].double() - slope[..., first : first + present]
    largest = torch.maximum(F.log_softmax(logits.double(), -1).abs().amax(), expected.abs().amax())
    scale = largest, slope.abs().amax().clamp(min=1.0)
    return (
        float((value.double() - expected).abs().amax() / scale[0]),
        float(difference.abs().amax() / scale[1]),
        float(gradient[..., present:].abs().sum()),
    )


def all_apart(vocabulary: int, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    return {kind: apart(kind, vocabulary, dtype) for kind in KINDS}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [64, 4099])
def test_values_and_gradients_are_plain_torchs(ranks: int, dtype: torch.dtype, vocabulary: int) -> None:
    for found in run_ranks(all_apart, ranks, vocabulary, dtype):
        # A bf16 gradient is rounded once, at the end: half of its 8 bits' last place, of a slope of up to 2.
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        for kind, (value, gradient, padding) in found.items():
            assert value < 3e-7, kind  # five roundings of fp32
            assert gradient < rounding, kind
            assert padding == 0.0, kind


def whole_top_k(vocabulary: int) -> tuple[float, float]:
    """Distance of the divergence over all tokens listed from the exact one; log-probability of no rest."""
    group: Any = dist.group.WORLD
    logits, other = (split(whole(vocabulary, seed, torch.float32)) for seed in (1, 2))
    target = top_k(other, vocabulary, group)
    binned = kl_divergence(logits, spread(target, logits, group), group)
    exact = kl_divergence(logits, log_softmax(other, group), group)
    return float((binned - exact).abs().max()), float(target.log_rest.max())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_divergence_over_all_tokens_listed_is_the_exact_one(ranks: int) -> None:
    for distance, rest in run_ranks(whole_top_k, ranks, 101):
        assert distance < 2e-6  # fp32, of divergences of about 10
        assert rest == -torch.inf


def bounds(vocabulary: int) -> list[bool]:
    group: Any = dist.group.WORLD
    logits, other = (split(whole(vocabulary, seed, torch.float32)) for seed in (1, 2))
    exact = kl_divergence(logits, log_softmax(other, group), group)
    found = []
    for k in (1, 4, 16, 64):
        binned = kl_divergence(logits, spread(top_k(other, k, group), logits, group), group)
        found.append(bool((binned <= exact + 1e-5).all() and (binned >= -1e-5).all()))
    same = kl_divergence(logits, spread(top_k(logits, 4, group), logits, group), group)
    return [*found, bool(same.abs().max() < 1e-6)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_divergence_over_fewer_tokens_is_never_above_the_exact_one(ranks: int) -> None:
    for found in run_ranks(bounds, ranks, 101):
        assert found == [True] * 5
