"""Marks of parameters."""

from collections.abc import Collection
from typing import Any

import pytest


def but_long(names: Collection[str], long: Collection[str]) -> list[Any]:
    """A parameter for each name; those in `long` wait for `-m long`."""
    assert set(long) <= set(names)
    return [pytest.param(name, marks=pytest.mark.long if name in long else ()) for name in names]
