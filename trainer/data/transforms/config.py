"""`[[data.transforms]]`: what becomes of the samples of which sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from parallel.settings import Settings
from trainer.data.choice import Described, choice_problems, is_chosen

Kind = Literal["metadata", "loss_weight", "plugin"]


class TransformConfig(Settings):
    """`[[data.transforms]]`: one transform.

    Attributes:
        kind: "metadata" puts its metadata before every document, which is read and not learnt (MeCo, Gao et
            al. 2025, arXiv 2501.01956); "loss_weight" multiplies loss weights; "plugin" asks somebody else's
            code.
        sources: names of `[[data.sources]]`, patterns such as "web-*", groups and tags, as in "group:web" and
            "tag:language=de". Left out, all of them; with "metadata", all that have metadata.
        factor: of "loss_weight".
        plugin: of "plugin": an entry point of the group "ratoon.transforms", or "module:attribute".
        options: of "plugin": handed to it as they are.
    """

    kind: Kind
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    factor: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    plugin: str | None = Field(default=None, min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> TransformConfig:
        problems = [
            f"{key} is a key of kind {kind}, this one is {self.kind}; leave it out"
            for key, kind in OWN.items()
            if kind != self.kind
            and getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)
        ]
        problems += [
            f"kind {kind} needs {key}"
            for key, kind in NEEDED.items()
            if kind == self.kind and getattr(self, key) is None
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def chooses(self, source: Described) -> bool:
        """Whether it is for this source."""
        return self.sources is None or is_chosen(source, self.sources)


OWN: Mapping[str, Kind] = {"factor": "loss_weight", "plugin": "plugin", "options": "plugin"}
"""Keys that one kind has."""
NEEDED: Mapping[str, Kind] = {"factor": "loss_weight", "plugin": "plugin"}


def transform_problems(transforms: Sequence[TransformConfig], sources: Sequence[Described]) -> list[str]:
    """What is wrong with transforms of these sources, before any file is looked at; empty when nothing is."""
    found = [
        f"data.transforms.{number}: sources has {text}"
        for number, one in enumerate(transforms)
        for text in choice_problems(one.sources or (), sources)
    ]
    for source in sources:
        chosen = [one for one in transforms if one.kind == "metadata" and one.chooses(source)]
        if len(chosen) > 1:
            found.append(f"data.transforms: source {source.name!r} has two of kind metadata; keep one")
    return found
