"""Which logical tensor of a checkpoint fills which slice of the model, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from checkpoint.manifest import PARAMETER_STATES, LogicalTensor, Manifest
from parallel.slices import TensorSlice

FRESH_MOMENTS = 'set moments = "reset" under [start] to begin with fresh ones'


@dataclass
class Selection:
    """For each slice, by number, the tensor that fills it.

    Attributes:
        fresh: slices that keep what they hold, because only weights are asked for.
        absent: optional slices that keep what they hold, because the checkpoint lacks them or only weights
            are asked for.
        problems: everything that forbids to load, one line each.
    """

    source: dict[int, LogicalTensor] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def derived(self, slices: Sequence[TensorSlice]) -> dict[str, str]:
        """States that are filled from another state."""
        return {
            slices[number].state: tensor.state
            for number, tensor in self.source.items()
            if tensor.state != slices[number].state
        }


def select(manifest: Manifest, slices: Sequence[TensorSlice], *, weights_only: bool) -> Selection:
    """Choose a source for every slice.

    A master that the checkpoint lacks is its fp32 weight; an fp32 weight is the master, where there is one:
    so runs change between fp32 and low precision without losing a bit.
    """
    tensors = manifest.by_key()
    names = {tensor.name for tensor in manifest.tensors}
    states = {tensor.state for tensor in manifest.tensors}
    selection = Selection()
    problems: dict[str, None] = {}  # an ordered set: slices share their problems
    absent: set[str] = set()
    for number, wanted in enumerate(slices):
        if weights_only and wanted.state not in PARAMETER_STATES:
            (selection.absent if wanted.optional else selection.fresh).append(number)
            continue
        if wanted.name not in names:
            problems[f"{wanted.name}: in the model {list(wanted.shape)}, not in the checkpoint"] = None
            continue
        tensor = _source(tensors, wanted, weights_only)
        if tensor is None and wanted.optional:
            selection.absent.append(number)
        elif tensor is None and wanted.state not in states:
            absent.add(wanted.state)
        elif tensor is None:
            problems[f"{wanted.name}: the checkpoint lacks its {wanted.state}"] = None
        elif tensor.shape != wanted.shape:
            problems[
                f"{wanted.name} ({tensor.state}): {list(tensor.shape)} in the checkpoint, "
                f"{list(wanted.shape)} in the model"
            ] = None
        else:
            selection.source[number] = tensor
    selection.problems = _absent(absent) + list(problems)
    return selection


def _source(
    tensors: dict[tuple[str, str], LogicalTensor], wanted: TensorSlice, weights_only: bool
) -> LogicalTensor | None:
    weight, master = tensors.get((wanted.name, "weight")), tensors.get((wanted.name, "master"))
    if wanted.state == "weight":
        in_fp32 = str(wanted.data.dtype) == "torch.float32"
        return (master or weight) if in_fp32 else (weight or master)
    if wanted.state == "master":
        exact = weight is not None and (weight.dtype == "float32" or weights_only)
        return master or (weight if exact else None)
    return tensors.get((wanted.name, wanted.state))


def _absent(states: set[str]) -> list[str]:
    """One line for what the checkpoint lacks of every parameter."""
    if not states:
        return []
    what = "fp32 masters" if states == {"master"} else "optimizer state"
    return [f"the checkpoint has no {what} ({', '.join(sorted(states))}): {FRESH_MOMENTS}"]
