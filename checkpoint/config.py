"""The `[checkpoint]` section of the run file."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from parallel.settings import Settings


class CheckpointConfig(Settings):
    """When checkpoints are saved, which ones stay, and what a run starts from."""

    every: int = Field(default=1000, ge=1, description="Steps between two checkpoints.")
    keep: int = Field(default=2, ge=1, description="So many checkpoints stay: the last saved.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Checkpoints of steps divisible by this stay for ever."
    )
    at: tuple[int, ...] = Field(
        default=(), description="Steps at which a checkpoint is saved that stays for ever."
    )
    background: bool = Field(default=True, description="Write in a thread while training goes on.")
    load: Path | None = Field(
        default=None,
        description="Start from this checkpoint: a folder of Ratoon's, a run's folder, or what Megatron, "
        "DeepSpeed, PyTorch DCP (FSDP) or Hugging Face saved.",
    )
    spec: str | None = Field(
        default=None,
        description="Names of `load` in the universal checkpoint language: a shipped spec or a TOML file. By "
        "default the shipped one that fits.",
    )
    facts: dict[str, int] = Field(
        default={}, description="Whole numbers that the spec needs and `load` does not say, as vocab_size."
    )
    resume: bool = Field(
        default=True,
        description="Go on from this run's own newest checkpoint when there is one, rather than `load`.",
    )
    parity: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Compare the logits with transformers' before the first step of a run that starts from a "
        "Hugging Face model. auto: where transformers is installed and the model fits into memory twice.",
    )
