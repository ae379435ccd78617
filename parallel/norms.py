"""RMSNorm and LayerNorm as megatron-core's layer specs build them, on CPU and CUDA, under any layout.

Gradients under tensor parallelism need no code here, only marks that megatron-core's
`finalize_model_grads` reads: with sequence parallelism each tensor-parallel rank sees part of the sequence,
so it sums the gradients of parameters marked `sequence_parallel`; the norms of queries and keys see this
rank's heads only, and it sums theirs by their names (`q_layernorm`, `k_layernorm`), once, marked or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, section 4).

    The arithmetic is float32 whatever the dtype of the input; the result has the dtype of the input.

    Raises:
        ValueError: when the configuration asks for a gamma centred on zero.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden_size]."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _CPURMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba, Kiros and Hinton 2016).

    Raises:
        ValueError: when the configuration asks for a gamma centred on zero.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden_size]."""
        if x.is_cuda or x.dtype != torch.bfloat16:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        # On the CPU torch would sum the gradients of weight and bias over all tokens in bfloat16.
        normed = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


def _parameter(config: TransformerConfig, hidden_size: int, value: float) -> nn.Parameter:
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "layernorm_zero_centered_gamma is true, and the portable norms have a gamma centred on one: "
            "set it to false, or use Transformer Engine's norms"
        )
    on_gpu = torch.cuda.is_available() and not config.use_cpu_initialization
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    parameter = nn.Parameter(torch.full((hidden_size,), value, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class _CPURMSNorm(torch.autograd.Function):
    """torch has no fused RMSNorm on CPU; autograd through its composite makes far more passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inner = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=inner)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * scale and g = dy * weight: dx = scale * (g - n * mean(g * n)), dweight = sum(dy * n).
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        normed = x * scale
        product = (grad * normed).flatten(0, -2)
        mean = torch.mv(product, weight.to(product.dtype)).view(scale.shape).div_(x.shape[-1])
        dx = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return dx.to(x.dtype), product.sum(0).to(weight.dtype), None
