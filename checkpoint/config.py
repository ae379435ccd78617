"""The `[checkpoint]` section of the run file."""

from pathlib import Path

from pydantic import Field

from parallel.settings import Settings


class CheckpointConfig(Settings):
    """When checkpoints are saved, which ones stay, and what a run starts from."""

    every: int = Field(default=1000, ge=1, description="Steps between two checkpoints.")
    keep: int = Field(default=2, ge=1, description="So many checkpoints stay: the last saved.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Checkpoints of steps divisible by this stay for ever."
    )
    background: bool = Field(default=True, description="Write in a thread while training goes on.")
    load: Path | None = Field(
        default=None,
        description="Start from this checkpoint: its folder, a folder of checkpoints, or a run's folder.",
    )
    resume: bool = Field(
        default=True,
        description="Go on from this run's own newest checkpoint when there is one, rather than `load`.",
    )
    weights_only: bool = Field(
        default=False, description="Take only weights and masters from `load`: fresh moments, step 0."
    )
