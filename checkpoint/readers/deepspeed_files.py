"""The files of a DeepSpeed checkpoint, by their names: whose they are, and which are missing.

mp_rank_{mp}_model_states.pt                      one a model-parallel rank (ZeRO 0, 1, 2)
zero_pp_rank_{dp}_mp_rank_{mp}_model_states.pt    one a rank (ZeRO 3); "pp_rank" is the data rank
[bf16_]zero_pp_rank_{dp}_mp_rank_{mp}_optim_states.pt
layer_{layer}[-model_{tp}]-model_states.pt        weights of a PipelineModule
layer_{layer}_expert_{expert}_mp_rank_{mp}_model_states.pt, expp_rank_{ep}_mp_rank_{mp}_optim_states.pt
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.archive.torch_file import open_torch_file

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARDED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-[a-z_]+_(\d+))?-model_states\.pt")
_EXPERT = re.compile(
    r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_.*_optim_states\.pt"
)


@dataclass
class Files:
    """What lies in a checkpoint's folder, and what was found wrong when opening it.

    Attributes:
        folder: of one tag, such as "global_step100".
        models: mp_rank files by model-parallel rank.
        sharded_models: model states of ZeRO 3 by (model-parallel rank, data rank).
        optimizers: optimizer states of ZeRO by (model-parallel rank, data rank).
        layers: weights of a PipelineModule by (layer, tensor rank).
        experts: names of the files of DeepSpeed's own mixture of experts.
        universal: there is a folder "zero", so that this is a universal checkpoint.
        problems: a line each.
    """

    folder: Path
    models: dict[int, Path] = field(default_factory=dict)
    sharded_models: dict[tuple[int, int], Path] = field(default_factory=dict)
    optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    universal: bool = False
    problems: list[str] = field(default_factory=list)
    _opened: dict[Path, dict[str, Any]] = field(default_factory=dict)

    @property
    def any_model(self) -> bool:
        return bool(self.models or self.sharded_models)

    def open(self, path: Path) -> dict[str, Any]:
        """The dict that a file holds, tensors as `FileTensor`; empty, and a problem, where there is none."""
        if path not in self._opened:
            value = self.load(path)
            if not isinstance(value, dict | None):
                self.problems.append(f"{path}: holds a {type(value).__name__}, not the dict that is expected")
            self._opened[path] = value if isinstance(value, dict) else {}
        return self._opened[path]

    def load(self, path: Path) -> Any:
        """Whatever a file holds, tensors as `FileTensor`; None, and a problem, where it cannot be read."""
        try:
            return open_torch_file(path).value
        except ValueError as error:
            self.problems.append(str(error))
            return None


def list_files(folder: Path) -> Files:
    """Sort the names of a folder's files; nothing is opened."""
    files = Files(folder)
    for path in sorted(folder.iterdir()):
        if match := _MODEL.fullmatch(path.name):
            files.models[int(match[1])] = path
        elif match := _SHARDED_MODEL.fullmatch(path.name):
            files.sharded_models[int(match[2]), int(match[1])] = path
        elif match := _OPTIMIZER.fullmatch(path.name):
            files.optimizers[int(match[2]), int(match[1])] = path
        elif match := _LAYER.fullmatch(path.name):
            files.layers[int(match[1]), int(match[2] or 0)] = path
        elif _EXPERT.fullmatch(path.name):
            files.experts.append(path.name)
        elif path.name == "zero" and path.is_dir():
            files.universal = True
    return files


def tag_folder(path: Path, pointer: str) -> Path | None:
    """The folder of the tag that the file `pointer` ("latest", "latest_universal") names, else `path` itself.

    None where neither is a folder.
    """
    if not path.is_dir():
        return None
    try:
        tag = (path / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path
    return path / tag if tag and (path / tag).is_dir() else path


def missing_files(files: Files, model_ranks: int, data_ranks: dict[int, int]) -> list[str]:
    """Lines for the files that ranks must have written and that are not there.

    Args:
        model_ranks: model-parallel ranks of the run.
        data_ranks: how many data ranks each of them has.
    """
    lines = []
    if files.models:
        lines += [
            f"{files.folder}/mp_rank_{rank:02d}_model_states.pt is missing: the run had {model_ranks} "
            "model-parallel ranks"
            for rank in range(model_ranks)
            if rank not in files.models
        ]
    kinds = {"optim": files.optimizers, "model": files.sharded_models}
    for kind, found in kinds.items():
        lines += [
            f"{files.folder}/zero_pp_rank_{data}_mp_rank_{rank:02d}_{kind}_states.pt is missing: the run had "
            f"{count} data ranks, expected {count} such files"
            for rank, count in sorted(data_ranks.items())
            for data in range(count)
            if found and (rank, data) not in found
        ]
    return lines
