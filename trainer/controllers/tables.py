"""Numbers of a controller that stand in the run file or in a JSON file of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_targets(given: Mapping[str, float] | Path) -> dict[str, float]:
    """Target losses in nats, by source. Raises ValueError where the file is no such thing."""
    found = _read_json(given, "controller.targets") if isinstance(given, Path) else given
    return _numbers(found, "controller.targets")


def read_graph(given: Mapping[str, Mapping[str, float]] | Path) -> dict[str, dict[str, float]]:
    """The skill graph, by source and column. Raises ValueError where the file is no such thing."""
    found = _read_json(given, "controller.graph") if isinstance(given, Path) else given
    if not isinstance(found, Mapping):
        raise ValueError(f"controller.graph: expected a table for each source, found {type(found).__name__}")
    return {source: _numbers(row, f"controller.graph.{source}") for source, row in found.items()}


def _numbers(found: object, key: str) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{key}: expected a table of numbers, found {type(found).__name__}")
    wrong = [
        name
        for name, one in found.items()
        if isinstance(one, bool) or not isinstance(one, float | int) or not math.isfinite(one)
    ]
    if wrong:
        raise ValueError(f"{key}: expected finite numbers, found others for {', '.join(map(str, wrong))}")
    return {name: float(one) for name, one in found.items()}


def _read_json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{key}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {path} is not JSON: {error}") from None
