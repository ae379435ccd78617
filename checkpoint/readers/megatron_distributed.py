"""`distrib_optim.pt`: masters and moments of the distributed optimizer, flat and without names.

A dictionary of buffers, {number: {(dtype of weights, dtype of gradients): {"param": masters, ...}}}, one for
every chunk of the model and dtype; a list of such dictionaries where experts, or the first chunk, have an
optimizer of their own. Only the first data rank of each optimizer writes, others have None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.megatron_buffers import Located, locate
from checkpoint.readers.megatron_model import Parameter
from checkpoint.streaming.panels import Files

_MASTER = "param"
_SIZE = "numel_unpadded"
_CAUSE = (
    "files of different saves mixed, a file that was changed, or parameters registered in another order than "
    "the model's state lists them"
)


class Found(NamedTuple):
    """A state of a parameter: "master", "exp_avg", ..., in the parameter's shape."""

    parameter: Parameter
    state: str
    tensor: FileTensor


@dataclass(frozen=True)
class FileRun:
    """The elements of a contiguous tensor in a file."""

    files: Files
    piece: Piece

    @staticmethod
    def of(files: Files, tensor: FileTensor) -> FileRun:
        return FileRun(files, tensor.reshape((tensor.numel,)).piece())

    @property
    def numel(self) -> int:
        return self.piece.box.numel

    @property
    def dtype(self) -> str:
        return self.piece.dtype

    def read(self, start: int, count: int) -> Any:
        return self.files.read(self.piece, Box((start,), (count,)))


def share_out(
    parameters: Sequence[Parameter], optimizers: int, *, experts_apart: bool
) -> list[list[Parameter]]:
    """The parameters of each of a rank's optimizers.

    The last one has the experts where these are split over ranks of their own. Two dense ones have the first
    chunk and the others (`overlap_param_gather_with_optimizer_step`).

    Raises:
        ValueError: there are more optimizers than that.
    """
    if optimizers == 1:
        return [list(parameters)]
    dense = [p for p in parameters if not (experts_apart and p.of_expert)]
    parts = [dense]
    if optimizers - experts_apart == 2:
        parts = [[p for p in dense if p.virtual == 0], [p for p in dense if p.virtual != 0]]
    if experts_apart:
        parts.append([p for p in parameters if p.of_expert])
    if len(parts) != optimizers:
        raise ValueError(f"holds {optimizers} optimizers, expected {len(parts)}")
    return parts


def read_buffers(
    value: Any, parts: Sequence[Sequence[Parameter]], path: Path, problems: list[str]
) -> list[Found]:
    """The states of all parameters in a rank's `distrib_optim.pt`.

    Args:
        value: what the file holds.
        parts: the parameters of each optimizer, in registration order.
    """
    optimizers = value if isinstance(value, list) else [value]
    if len(optimizers) != len(parts):
        problems.append(f"{path}: holds {len(optimizers)} optimizers, {len(parts)} are expected")
        return []
    found: list[Found] = []
    with Files(path.parent) as files:
        for number, (optimizer, parameters) in enumerate(zip(optimizers, parts, strict=True)):
            if optimizer is None:
                continue
            where = f"{path}: " + (f"optimizer {number}, " if len(parts) > 1 else "")
            try:
                found += _read_optimizer(optimizer, parameters, where=where, files=files, problems=problems)
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {error}")
    return found


def _read_optimizer(
    optimizer: Any, parameters: Sequence[Parameter], *, where: str, files: Files, problems: list[str]
) -> Iterator[Found]:
    if not isinstance(optimizer, Mapping) or not optimizer.get("buckets_coalesced"):
        raise ValueError(
            "is of the form that was written before February 2024, a tensor a bucket, which is not read; let "
            "Megatron-LM load it with --ckpt-convert-update-legacy-dist-opt-format and save again"
        )
    candidates: dict[tuple[int, str], list[Parameter]] = {}
    for parameter in parameters:
        candidates.setdefault((parameter.virtual, parameter.tensor.dtype), []).append(parameter)
    for number in sorted(key for key in optimizer if isinstance(key, int)):
        for dtypes, states in optimizer[number].items():
            dtype = dtypes[0] if isinstance(dtypes, tuple) else dtypes
            called = f"{where}buffer {number} ({dtype})"
            masters = states.get(_MASTER)
            if not isinstance(masters, FileTensor):
                problems.append(f"{called}: has no tensor {_MASTER!r}")
                continue
            chosen = _choose(masters, candidates, dtype, files)
            if chosen is None:
                problems.append(f"{called}: the model's state has no parameters of this dtype left for it")
                continue
            key, located = chosen
            members = candidates[key]
            for earlier in list(candidates)[: list(candidates).index(key) + 1]:
                del candidates[earlier]  # chunks follow each other, what was passed over has no buffer
            problems += _doubts(called, members, located, masters.numel)
            yield from _states(states, members, located)


def _choose(
    masters: FileTensor, candidates: Mapping[tuple[int, str], list[Parameter]], dtype: str, files: Files
) -> tuple[tuple[int, str], Located] | None:
    """Which chunk's parameters a buffer holds, and where; the first of its dtype where none fits."""
    first = None
    run = FileRun.of(files, masters)
    for key, members in candidates.items():
        if key[1] != dtype:
            continue
        located = locate([FileRun.of(files, member.tensor) for member in members], run)
        if located.starts:
            return key, located
        first = first or (key, located)
    return first


def _states(states: Mapping[str, Any], members: Sequence[Parameter], located: Located) -> Iterator[Found]:
    numel = states[_MASTER].numel
    for state, flat in states.items():
        if not isinstance(flat, FileTensor) or flat.numel != numel:
            continue
        for number, start in sorted(located.starts.items()):
            parameter = members[number]
            tensor = flat.narrow((start,), (parameter.tensor.numel,)).reshape(parameter.tensor.shape)
            yield Found(parameter, "master" if state == _MASTER else state, tensor)


def _doubts(called: str, members: Sequence[Parameter], located: Located, numel: int) -> Iterator[str]:
    for number, start, differing, compared in located.doubts:
        parameter = members[number]
        yield (
            f"{called}: elements {start} to {start + parameter.tensor.numel} should be the master of "
            f"{parameter.name}, but {differing} of {compared} compared ones are not its weight when rounded "
            f"to {parameter.tensor.dtype}; likely cause: {_CAUSE}"
        )
    if not located.starts and not located.doubts:
        yield (
            f"{called}: the model's {len(members)} parameters in their order fit the first {located.reached} "
            f"of its {numel} elements only; likely cause: {_CAUSE}"
        )
