"""What transformers computes with a Hugging Face folder, recorded at the same points as our engine."""

from __future__ import annotations

import importlib.util
import json
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


def vocabulary(folder: Path) -> int:
    """Tokens that the model knows. Raises ValueError when its config.json does not say."""
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json does not say vocab_size: {error}") from None


@torch.no_grad()
def run_reference(folder: Path, tokens: torch.Tensor, *, precision: str) -> dict[str, list[torch.Tensor]]:
    """Activations at every point of `probe.points`: of every sequence the logits, else of the first.

    Args:
        tokens: int64 [sequences, s].
        precision: "fp32" or "bf16", of weights and activations.

    Returns:
        point -> float32 [s, columns] of every sequence, on the host.

    Raises:
        ValueError: transformers is not there, or cannot load or compute the folder.
    """
    if missing := transformers_missing():
        raise ValueError(missing)
    try:
        model = _load(folder, torch.float32 if precision == "fp32" else torch.bfloat16)
        found: dict[str, list[torch.Tensor]] = {}
        handles = [module.register_forward_hook(_note(found, point)) for point, module in _modules(model)]
        for row in tokens:
            found.setdefault(LOGITS, []).append(model(row[None], use_cache=False).logits[0].float())
            for handle in handles:
                handle.remove()
    except Exception as error:  # of whatever kind: the other ranks wait to be told
        raise ValueError(f"transformers cannot compute {folder}: {type(error).__name__}: {error}") from error
    return found


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of a line a second, on the terminal of a run
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    finally:
        if bars:
            logging.enable_progress_bar()
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
