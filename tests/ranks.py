"""`run_ranks` with the deadline that every ranked test has."""

from collections.abc import Callable
from typing import Any

from launch import ranks


def run_ranks(target: Callable[..., Any], world_size: int, *args: Any, deadline: float = 120.0) -> list[Any]:
    return ranks.run_ranks(target, world_size, *args, deadline=deadline)
