"""What transformers computes with a Hugging Face folder, recorded at the same points as our engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from trainer.parity.probe import EMBEDDING, LOGITS, layer_points

_INSTALL = "pip install 'ratoon[hf]'"


def transformers_missing() -> str | None:
    """The reason why there is nothing to compare with, and its remedy; None where transformers is there."""
    if importlib.util.find_spec("transformers") is not None:
        return None
    return f"transformers is not installed, which computes the logits to compare with: {_INSTALL}"


@torch.no_grad()
def run_reference(folder: Path, tokens: torch.Tensor, *, precision: str) -> dict[str, torch.Tensor]:
    """Activations [sequences, s, columns] in float32 at every point of `probe.points`, on the host.

    Args:
        tokens: int64 [sequences, s].
        precision: "fp32" or "bf16", of weights and activations.

    Raises:
        ValueError: transformers is not there, or cannot load the folder.
    """
    if missing := transformers_missing():
        raise ValueError(missing)
    model = _load(folder, torch.float32 if precision == "fp32" else torch.bfloat16)
    found: dict[str, list[torch.Tensor]] = {}
    handles = [module.register_forward_hook(_note(found, point)) for point, module in _modules(model)]
    try:
        for row in tokens:
            found.setdefault(LOGITS, []).append(model(row[None], use_cache=False).logits[0].float())
    finally:
        for handle in handles:
            handle.remove()
    return {point: torch.stack(rows) for point, rows in found.items()}


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a line a second, on the terminal of a run
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot load {folder}: {error}") from None
    return model.eval()


def _modules(model: Any) -> list[tuple[str, Any]]:
    """The modules of a decoder as all families that we read call them."""
    modules = [(EMBEDDING, model.get_input_embeddings())]
    for number, layer in enumerate(model.model.layers):
        attention, mlp, whole = layer_points(number)
        experts = getattr(layer, "block_sparse_moe", None)  # Mixtral before transformers 5
        modules += [(attention, layer.self_attn), (mlp, experts or layer.mlp), (whole, layer)]
    return modules


def _note(found: dict[str, list[torch.Tensor]], point: str) -> Any:
    def note(_module: Any, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        found.setdefault(point, []).append(value.detach().float().reshape(-1, value.shape[-1]))

    return note
