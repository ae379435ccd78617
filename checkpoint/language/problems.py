"""What is wrong, collected: the same finding about many names is one sentence."""

from __future__ import annotations

from checkpoint.language.matching import SHOWN


class Problems:
    """Findings and the names they are about, in the order they were made."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, finding: str, name: str) -> None:
        """Note a finding about a source name."""
        self._names.setdefault(finding, {})[name] = None

    def sentences(self) -> list[str]:
        """At most 20, each with its first three names and a count of the others."""
        lines = []
        for finding, found in self._names.items():
            names = list(found)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{', '.join(names[:3])}{more}: {finding}")
        if len(lines) > SHOWN:
            return [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
        return lines
