"""megatron-core's router, with an auxiliary loss that weighs the same in every layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """TopKRouter, but for the number of tokens by which its load-balancing loss is multiplied.

    The step divides every loss by the tokens of the global batch, so megatron-core multiplies the balancing
    loss, a mean, by the tokens it was taken over. It counts this rank's only, though each rank of
    `reduce_group` has the part of its own tokens, and for `seq_aux_loss` those of one sequence, though it is
    averaged over the sequences of the micro-batch. So under sequence or context parallelism, or with several
    sequences in a micro-batch, the loss would come out that many times too weak.
    """

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: Any = None,
    ) -> torch.Tensor:
        """Let the backward pass of `activation` [tokens, experts] also differentiate `aux_loss`."""
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            reduce_group_has_dp,
            valid_token_count=activation.shape[0] * reduce_group.size(),
        )

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: Any = None) -> None:
        """Only where there is a bias: megatron-core compiles this, which takes the first step a second."""
        if self.enable_expert_bias:
            super()._apply_expert_bias(routing_map, padding_mask=padding_mask)
