"""A second layout of the same ranks, beside the one that trains.

megatron-core keeps its process groups in globals of `megatron.core.parallel_state`, and its layers and
schedules ask there. A second mesh has a set of these globals of its own, which stands there only while that
mesh is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state as ps

from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, forget_mesh
from parallel.random_state import get_random_state, set_random_state


class SecondMesh:
    """Another layout of the same ranks.

    Attributes:
        mesh: its groups and this rank's place. To compute on it, be inside `active()`.
    """

    def __init__(self, layout: Layout) -> None:
        """Make its process groups; the random streams stay as they are. A collective of all ranks."""
        first, random = _globals(), get_random_state()
        forget_mesh()  # its groups live on in `first`
        try:
            self.mesh: Mesh = build_mesh(layout)
            self._globals = _globals()
        finally:
            vars(ps).update(first)
            set_random_state(random)

    @contextmanager
    def active(self) -> Iterator[Mesh]:
        """megatron-core works on this mesh inside, and on the other one again after it."""
        first = _globals()
        vars(ps).update(self._globals)
        try:
            yield self.mesh
        finally:
            vars(ps).update(first)


def _globals() -> dict[str, Any]:
    """megatron-core's groups, ranks and sizes: the upper-case globals of its module."""
    return {name: value for name, value in vars(ps).items() if name.startswith("_") and name.isupper()}
