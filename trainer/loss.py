"""The language-model loss: a sum over valid tokens, and its share of every source."""

from __future__ import annotations

import torch

from parallel.forward import Loss


def token_loss(num_sources: int) -> Loss:
    """Cross-entropy summed with its weights, and a report by source.

    The sum is not divided here: the step divides by the token count of the whole global batch, which no
    micro-batch knows.

    Returns:
        A function (losses, loss_weights, sources), each [b, s], to (sum, report); the report is
        float64 [num_sources, 2]: weighted loss and weight of every source.
    """

    def loss(
        losses: torch.Tensor, loss_weights: torch.Tensor, sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = losses.float() * loss_weights
        report = torch.zeros(num_sources, 2, dtype=torch.float64, device=losses.device)
        index = sources.reshape(-1).long()
        report[:, 0].index_add_(0, index, weighted.detach().reshape(-1).double())
        report[:, 1].index_add_(0, index, loss_weights.reshape(-1).double())
        return weighted.sum(), report

    return loss
