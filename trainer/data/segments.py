"""Segments: stretches of a run over which the sources' shares are counted together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.weights import WHOLE


@dataclass(frozen=True)
class Segment:
    """Steps that were dealt from the same sources, on the same terms.

    Attributes:
        step: the first one.
        steps: how many.
        stage: of which stage of the run.
        length: tokens in a sequence.
        asked: by source, the sum of its weights over all sequences, in units of 2^-32 sequences. Changes of
            the weights inside a segment are in the sum.
        dealt: by source, sequences.
    """

    step: int
    steps: int
    stage: str
    length: int
    asked: dict[str, int]
    dealt: dict[str, int]

    @property
    def sequences(self) -> int:
        """Of all sources."""
        return sum(self.dealt.values())

    def shares(self) -> dict[str, tuple[float, float]]:
        """By source, the share asked and the share realised."""
        total = self.sequences
        return {
            name: (asked / (WHOLE * total), self.dealt[name] / total) if total else (0.0, 0.0)
            for name, asked in self.asked.items()
        }

    def to_json(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """Compact: sources by their number, and only those that were asked for."""
        names = [name for name, asked in self.asked.items() if asked or self.dealt[name]]
        return {
            "step": self.step,
            "steps": self.steps,
            "stage": self.stage,
            "sequence_length": self.length,
            "sources": [numbers[name] for name in names],
            "asked": [self.asked[name] for name in names],
            "dealt": [self.dealt[name] for name in names],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], names: Sequence[str]) -> Segment:
        """What `to_json` wrote; `names` by number."""
        chosen = [names[number] for number in entry["sources"]]
        return cls(
            step=entry["step"],
            steps=entry["steps"],
            stage=entry["stage"],
            length=entry["sequence_length"],
            asked=dict(zip(chosen, entry["asked"], strict=True)),
            dealt=dict(zip(chosen, entry["dealt"], strict=True)),
        )
