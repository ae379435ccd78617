"""How far each family is from transformers, in each layout.

    python -m tests.families [--long]

Prints the largest differences of logits, loss and gradients, each relative to the largest value expected.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from tests.families.batches import packed_batch
from tests.families.cases import FAMILIES, layouts, saved_model
from tests.families.compare import difference, run_engine
from tests.families.reference import run_transformers, weights
from trainer.model.config import ModelConfig


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=160, highlight=False)
    console.print(
        f"{'family':<28} {'layout':<20} {'logits':>8} {'loss':>8} {'gradient':>8}  farthest gradient"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, family in FAMILIES.items():
            model, path = saved_model(name, Path(folder))
            architecture = ModelConfig(hf=str(path)).resolve()
            batch = packed_batch(architecture.vocab_size)
            expected = run_transformers(model, batch)
            for layout, (ranks, degrees) in layouts(family, long="--long" in sys.argv).items():
                found = difference(run_engine(architecture, degrees, ranks, weights(model), batch), expected)
                numbers = f"{found.logits:8.1e} {found.loss:8.1e} {found.gradient:8.1e}"
                console.print(f"{name:<28} {layout:<20} {numbers}  {found.parameter}")


if __name__ == "__main__":
    main()
