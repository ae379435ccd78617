"""The files of a Megatron checkpoint of the format `torch`, and the rank that wrote each.

latest_checkpointed_iteration.txt                   "1000" or "release"
iter_0001000/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt
                                   /distrib_optim.pt, by the distributed optimizer

The pipeline rank is in a folder's name only if there are several, and so is the expert rank: what
`mp_rank_00_001` means is known from the arguments inside (Megatron-LM, `get_checkpoint_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.archive.torch_file import open_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
MODEL = "model_optim_rng.pt"
OPTIMIZER = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_ITERATION = re.compile(r"iter_(\d+)")


class Degrees(NamedTuple):
    """How a run was split.

    Attributes:
        expert_tensor: tensor ranks that share an expert.
    """

    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int

    @property
    def has_expert_axes(self) -> bool:
        """Whether experts are spread otherwise than the rest of a layer."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    @staticmethod
    def of(args: Mapping[str, Any]) -> Degrees:
        """As Megatron-LM's arguments say; `model_parallel_size` is what the tensor degree was called."""
        tensor = int(args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1)
        return Degrees(
            tensor=tensor,
            pipeline=int(args.get("pipeline_model_parallel_size") or 1),
            virtual=int(args.get("virtual_pipeline_model_parallel_size") or 1),
            context=int(args.get("context_parallel_size") or 1),
            expert=int(args.get("expert_model_parallel_size") or 1),
            expert_tensor=int(args.get("expert_tensor_parallel_size") or tensor),
        )

    @staticmethod
    def named(ranks: list[str], content: Mapping[str, Any]) -> Degrees:
        """As folders' names and a rank's file say, of a run without arguments: old, so without experts."""
        numbers = [[int(part) for part in rank.split("_")[2:]] for rank in ranks]
        tensor = 1 + max(each[0] for each in numbers)
        pipeline = 1 + max(each[1] if len(each) > 1 else 0 for each in numbers)
        virtual = sum(bool(re.fullmatch(r"model\d+", key)) for key in content) or 1
        return Degrees(tensor, pipeline, virtual, context=1, expert=1, expert_tensor=tensor)

    def folder(self, tensor: int, pipeline: int, expert: int) -> str:
        """Where the rank with these numbers writes."""
        name = f"mp_rank_{tensor:02d}"
        name += f"_{pipeline:03d}" if self.pipeline > 1 else ""
        return name + (f"_{expert:03d}" if self.expert > 1 else "")

    def writers(self) -> dict[str, dict[str, int]]:
        """Folder -> coordinates, of every rank that has to write.

        Ranks count tensor first, then context, then data, in dense layers, and expert-tensor first, then
        expert, in expert layers; the first of all data ranks of either kind write.
        """
        found = {}
        for pipeline in range(self.pipeline):
            for rank in range(max(self.tensor * self.context, self.expert_tensor * self.expert)):
                tensor, expert = rank % self.tensor, rank // self.expert_tensor % self.expert
                at = {"tensor": tensor, "pipeline": pipeline}
                if self.has_expert_axes:
                    at |= {"expert": expert, "expert_tensor": rank % self.expert_tensor}
                found[self.folder(tensor, pipeline, expert)] = at
        return found


@dataclass
class Files:
    """A checkpoint's folder, and what was found wrong when opening its files.

    Attributes:
        folder: of one iteration.
        ranks: names of its ranks' folders.
        problems: a line each.
    """

    folder: Path
    ranks: list[str]
    problems: list[str] = field(default_factory=list)

    def open(self, rank: str, name: str) -> Any:
        """What a rank's file holds, tensors as `FileTensor`; None, and a problem, where it cannot be read."""
        path = self.folder / rank / name
        if not path.is_file():
            self.problems.append(f"{path} is missing")
            return None
        try:
            return open_torch_file(path).value
        except ValueError as error:
            self.problems.append(str(error))
            return None


def rank_folders(folder: Path) -> list[str]:
    """Names of the folders of ranks in the folder of an iteration."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if _RANK.fullmatch(entry.name) and entry.is_dir())


def iteration_folder(path: Path) -> Path | None:
    """The folder with ranks' folders: `path` itself, or the one in it that Megatron-LM would load.

    Where the tracker names none that is there, it is the last iteration. None where no folder has ranks.
    """
    if rank_folders(path):
        return path
    if not path.is_dir():
        return None
    named = _tracked(path)
    if named is not None and (path / named).is_dir():
        return path / named if rank_folders(path / named) else None
    iterations = [
        (int(match[1]), entry)
        for entry in path.iterdir()
        if (match := _ITERATION.fullmatch(entry.name)) and rank_folders(entry)
    ]
    if iterations:
        return max(iterations)[1]
    return path / "release" if rank_folders(path / "release") else None


def _tracked(path: Path) -> str | None:
    """The folder that the tracker names."""
    try:
        text = (path / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == "release":
        return text
    return f"iter_{int(text):07d}" if text.isdigit() else None


def words(degrees: Degrees) -> str:
    """In a few letters, such as "TP2 PP2"."""
    parts = [f"TP{degrees.tensor}", f"PP{degrees.pipeline}"]
    parts += [f"VPP{degrees.virtual}"] if degrees.virtual > 1 else []
    parts += [f"EP{degrees.expert}"] if degrees.expert > 1 else []
    return " ".join(parts)
