"""A second model that is only run forward: no gradients, no gradient buffers, no optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.chunks import build_chunks, with_hooks
from parallel.initialise import Draw, blank, initialise
from parallel.mesh import Mesh
from parallel.optimizer_state import state_slices
from parallel.slices import TensorSlice
from parallel.specs import choose_backend


@dataclasses.dataclass
class _NoOptimizer:
    """What `state_slices` asks of an optimizer, where there is none."""

    chained_optimizers: tuple[Any, ...] = ()


class FrozenModel:
    """A GPTModel split over the ranks of a mesh, without anything that changes it.

    Attributes:
        mesh, config, chunks, wrapped, named: as in `Engine`; `wrapped` computes in bf16 where config says so.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: TransformerConfig,
        model: Mapping[str, Any],
        *,
        vocab_size: int,
        portable: bool = False,
    ) -> None:
        """Build the chunks; `initialise`, or a checkpoint through `slices`, must fill the weights.

        Args:
            model: further arguments of GPTModel (padded vocab_size, max_sequence_length, rotary_base, ...).
            vocab_size: of the tokenizer, without padding.
            portable: use the portable modules even where Transformer Engine is present.
        """
        self.mesh = mesh
        self.config = with_hooks(config)
        self.vocab_size = vocab_size
        backend = choose_backend(portable=portable, fp32=not config.bf16)
        self.chunks, self.named = build_chunks(
            mesh, self.config, model, backend=backend, vocab_size=vocab_size
        )
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        self.wrapped = [Float16Module(self.config, one) if config.bf16 else one for one in self.chunks]
        blank(self.named)

    def initialise(self, seed: int, draw: Draw) -> None:
        """Draw the weights that an `Engine` begins with, rounded where they are bf16."""
        initialise(self.named, seed, draw)

    def slices(self) -> list[TensorSlice]:
        """Every box of every weight that this rank holds."""
        return list(state_slices(self.named, _NoOptimizer(), self.mesh))
