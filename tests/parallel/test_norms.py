"""Norms: transformers' numbers, exact gradients, and the marks that tensor parallelism needs."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from parallel.norms import LayerNorm, RMSNorm

HIDDEN, EPS = 96, 1e-5


def _config(dtype: torch.dtype = torch.float32, **changes: object) -> TransformerConfig:
    fields = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4, "params_dtype": dtype}
    return TransformerConfig(**{**fields, **changes})


def _results(norm: nn.Module, dtype: torch.dtype, values: torch.dtype) -> list[Tensor]:
    """Output and gradients of input and weight, computed in `dtype` from numbers that `values` can hold."""
    generator = torch.Generator().manual_seed(2)
    weight, x, grad = (
        torch.randn(shape, generator=generator).to(values).to(dtype)
        for shape in ((HIDDEN,), (32, 2, HIDDEN), (32, 2, HIDDEN))
    )
    norm.weight.data = weight
    output = norm(x.requires_grad_())
    assert output.dtype == dtype
    output.backward(grad)
    return [output.detach().double(), x.grad.double(), norm.weight.grad.double()]


def test_float32_equals_llama() -> None:
    ours = _results(RMSNorm(_config(), HIDDEN, EPS), torch.float32, torch.float32)
    theirs = _results(LlamaRMSNorm(HIDDEN, EPS), torch.float32, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        # Both round at 6e-8 and sum up to a hundred terms.
        assert float((a - b).abs().max() / b.abs().max()) < 1e-6


def test_bfloat16_is_as_exact_as_llama() -> None:
    half, exact = torch.bfloat16, torch.float64
    ours = _results(RMSNorm(_config(half), HIDDEN, EPS), half, half)
    theirs = _results(LlamaRMSNorm(HIDDEN, EPS), half, half)
    wanted = _results(RMSNorm(_config(exact), HIDDEN, EPS), exact, half)
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert (a - c).norm() <= (b - c).norm()
        assert float((a - c).abs().max() / c.abs().max()) <= 2**-8  # one rounding


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_bfloat16_gradients_of_the_weight_are_summed_in_float32(norm: type[nn.Module]) -> None:
    """Over 4096 tokens, where a sum in bfloat16 is off by some percent."""
    module, exact = (norm(_config(dtype), HIDDEN, EPS) for dtype in (torch.bfloat16, torch.float64))
    x, grad = torch.randn(2, 4096, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    module(x).backward(grad)
    exact(x.double()).backward(grad.double())
    for ours, wanted in zip(module.parameters(), exact.parameters(), strict=True):
        assert float((ours.grad - wanted.grad).norm() / wanted.grad.norm()) < 2**-8  # one rounding


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_gradients_are_exact(norm: type[nn.Module]) -> None:
    module = norm(_config(torch.float64), HIDDEN, EPS)
    x = torch.randn(3, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    parameters = {
        name: torch.randn_like(parameter).requires_grad_() for name, parameter in module.named_parameters()
    }

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_layer_norm_is_torch_s() -> None:
    module = LayerNorm(_config(), HIDDEN, EPS)
    x = torch.randn(4, 2, HIDDEN)
    assert torch.equal(module(x), F.layer_norm(x, (HIDDEN,), torch.ones(HIDDEN), torch.zeros(HIDDEN), EPS))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_for_sequence_parallelism(
    norm: type[nn.Module], sequence_parallel: bool
) -> None:
    config = _config(sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    marks = [parameter.sequence_parallel for parameter in norm(config, HIDDEN).parameters()]
    assert marks == [sequence_parallel] * len(marks)


def test_a_gamma_around_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma"):
        RMSNorm(_config(layernorm_zero_centered_gamma=True), HIDDEN)
