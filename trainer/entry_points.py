"""Finding code that somebody else wrote: by the name of an entry point, or by "module:attribute"."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any


def find_entry_point(name: str, *, group: str, key: str) -> Any:
    """What the entry point `name` of a group stands for, or "module:attribute".

    Args:
        key: of the run file, for messages.

    Raises:
        ValueError: there is none, or its module cannot be imported.
    """
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
            return found
        entry = next(iter(entry_points(group=group, name=name)), None)
        if entry is None:
            known = sorted(one.name for one in entry_points(group=group))
            raise ValueError(
                f"{key}: no entry point of the group {group!r} is called {name!r}; there are "
                f"{', '.join(known) or 'none'}. Install the plug-in, or write module:attribute"
            )
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {name} cannot be loaded: {error}") from error
