"""The small sections of the run file that have no other home: [run], [train], [eval], [metrics]."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from parallel.settings import Settings


class RunSettings(Settings):
    """`[run]`: the name and folder of the run, and what its random numbers start from."""

    name: str = Field(default="run", min_length=1, pattern=r"^[^/\s.][^/\s]*$")
    dir: Path | None = None
    """Run folder; `runs/NAME` under the current folder when not given."""
    stage: str = ""
    """Name of the stage; a run file of several stages fills it in itself."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    deterministic: bool = False
    """Only kernels that give the same bits twice, at some cost in speed. The CPU path always is."""

    @property
    def folder(self) -> Path:
        """Where config, metrics, logs and checkpoints of the run lie."""
        return self.dir if self.dir is not None else Path("runs") / self.name

    @property
    def checkpoints(self) -> Path:
        """Where the run's own checkpoints lie."""
        return self.folder / "checkpoints"


class TrainConfig(Settings):
    """`[train]`: how long, how many sequences at once, and in which numbers."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run, those before a resume included."""
    global_batch: int = Field(gt=0)
    """Sequences in one step, over all ranks and micro-batches."""
    micro_batch: int = Field(default=1, gt=0)
    """Sequences that one data-parallel rank runs through the model at a time."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 computes in bfloat16 and keeps fp32 master weights."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, the core attention's, whole layers'."""


class EvalConfig(Settings):
    """`[eval]`: the loss on the held-out documents of `[[data.validation]]`."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates only at the end. Without validation sets nothing runs."""
    at_start: bool | None = None
    """Also before the first step of a run: what it starts from, new weights or a checkpoint's. By default
    where `dense` is on, since forgetting is measured from there, and in the first of several stages."""
    batches: int | None = Field(default=None, gt=0)
    """Global batches of each validation set; all of it when not given."""
    dense: bool | None = None
    """Also after 1, 2, 4, 8, ... steps of a stage: what forgetting looks like when it begins. By default on
    in a stage that starts from a checkpoint."""
    dense_per_decade: int | None = Field(default=None, gt=0, le=100)
    """So many steps, evenly spaced in their logarithm, between 1 and 10, 10 and 100, ... instead."""
    dense_batches: int = Field(default=4, gt=0)
    """Global batches of each validation set that such an evaluation reads, spread evenly over it."""


class MetricsConfig(Settings):
    """`[metrics]`: how often numbers leave the training step, and where they go."""

    every: int = Field(default=1, gt=0)
    """Steps between two records on the terminal, in metrics.jsonl and in TensorBoard."""
    tensorboard: bool = True
