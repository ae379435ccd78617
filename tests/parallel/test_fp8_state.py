"""The state of delayed scaling, to bytes and back, through modules that keep it as Transformer Engine's do.

Transformer Engine itself needs CUDA: `python -m tools.gpu_check` resumes an FP8 run with it.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.fp8_state import get_fp8_state, set_fp8_state

HISTORY = 4
TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


class Remembering(torch.nn.Module):
    """Keeps what it is given as Transformer Engine's base module does: pickled, in a tensor of bytes."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.products = products
        self.packed = torch.empty(0, dtype=torch.uint8)

    def train_a_little(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        shapes = [(3,), (HISTORY, 3), (2,), (HISTORY, 2)]
        self.keep(
            {
                name: torch.rand(*shape[:-1], self.products * shape[-1], generator=random)
                for name, shape in zip(TENSORS, shapes, strict=True)
            }
            | {"recipe": "of the run that saved"}
        )

    def keep(self, state: dict[str, Any]) -> None:
        self.packed = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def state(self) -> dict[str, Any]:
        return pickle.loads(self.packed.numpy().tobytes())

    def get_extra_state(self) -> torch.Tensor:
        return self.packed

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.packed = state


def config(recipe: str = "delayed") -> TransformerConfig:
    made = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    made.fp8, made.fp8_recipe, made.fp8_amax_history_len = "hybrid", recipe, HISTORY
    return made


def chunks() -> list[torch.nn.Module]:
    """A pipeline rank's two chunks; one module makes products with four experts' weights."""
    return [torch.nn.Sequential(Remembering(1), torch.nn.ReLU()), torch.nn.Sequential(Remembering(4))]


def test_scales_and_maxima_come_back_in_their_shapes() -> None:
    saved, fresh = chunks(), chunks()
    for seed, chunk in enumerate(saved):
        chunk[0].train_a_little(seed)
    set_fp8_state(fresh, config(), get_fp8_state(saved, config()))
    for old, new in zip(saved, fresh, strict=True):
        for name in TENSORS:
            assert torch.equal(new[0].state()[name], old[0].state()[name])
        assert new[0].state()["extra_fp8_variables"] == {"num_gemms": old[0].products}


def test_a_module_without_products_yet_keeps_nothing() -> None:
    assert get_fp8_state(chunks(), config()) == {}
    fresh = chunks()
    set_fp8_state(fresh, config(), {"torch": b"random"})
    assert all(chunk[0].packed.numel() == 0 for chunk in fresh)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_other_recipes_remember_nothing(recipe: str) -> None:
    saved = chunks()
    saved[0][0].train_a_little(0)
    assert get_fp8_state(saved, config(recipe)) == {}


def test_the_checkpoint_holds_numbers_only() -> None:
    """Bytes of a pickle would run whatever the checkpoint's author put into them."""
    saved = chunks()
    saved[0][0].train_a_little(0)
    for name, data in get_fp8_state(saved, config()).items():
        assert name.startswith("fp8:0.0.")
        assert data == saved[0][0].state()[name.rpartition(".")[2]].numpy().tobytes()
