"""What transformers computes, one document at a time, by our logical names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from trainer.data.batch import MicroBatch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a model computes from a batch.

    Attributes:
        logits: [sequences, s, vocab], float32 or bfloat16.
        loss: mean over the tokens that have a label.
        gradients: of that mean, by logical name.
    """

    logits: torch.Tensor
    loss: float
    gradients: Tensors


def logical_tensors(model: PreTrainedModel, of: Callable[[torch.nn.Parameter], torch.Tensor]) -> Tensors:
    """`of` every parameter by logical name: transformers keeps the experts of a layer in one tensor."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        value = of(parameter).detach()
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif kind == "down_proj":
            tensors |= {f"{stem}.{expert}.down_proj.weight": down for expert, down in enumerate(value)}
        else:
            tensors[name] = value
    return tensors


def weights(model: PreTrainedModel) -> Tensors:
    """The weights by logical name."""
    return logical_tensors(model, lambda parameter: parameter.data)


def run_transformers(model: PreTrainedModel, batch: MicroBatch) -> Outcome:
    """Logits, mean loss and gradients of `model`, which sees each document by itself."""
    model.zero_grad()
    logits, loss = run_documents(lambda tokens: model(tokens).logits, batch)
    loss.backward()
    gradients = logical_tensors(model, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
    return Outcome(logits.detach(), float(loss.detach()), gradients)


def run_documents(
    forward: Callable[[torch.Tensor], torch.Tensor], batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [sequences, s, vocab] and mean loss of `forward`, which takes one document [1, length]."""
    rows = []
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        lengths = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
        rows.append(torch.cat([forward(part[None])[0] for part in tokens.split(lengths)]))
    logits = torch.stack(rows)
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none")
    weight = batch.loss_weights.flatten()
    return logits, (losses * weight).sum() / weight.sum()
