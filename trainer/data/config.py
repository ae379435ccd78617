"""`[data]`: which files a run reads, with which tokenizer, in what proportion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from parallel.settings import Settings
from trainer.data.mixture_config import MixtureConfig, mixture_problems


def without_extension(path: str) -> str:
    """`corpus`, `corpus.bin` and `corpus.idx` all name the same pair of files."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


Name = Annotated[str, Field(min_length=1)]
Prefix = Annotated[str, Field(min_length=1), AfterValidator(without_extension)]


class SourceConfig(Settings):
    """`[[data.sources]]`: one prepared corpus and its share of the training sequences."""

    name: Name
    """How losses, reports and checkpoints call it; also part of the seed of its order."""
    path: Prefix
    """Path of the Megatron pair PATH.bin and PATH.idx, with or without the extension."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the sequences, relative to the other sources' weights (of its group, where there are groups).
    `[data.mixture]` may override it."""
    group: Name | None = None
    """Which of `[data.mixture.groups]` it belongs to."""
    max_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most passes over its documents, those of earlier stages included; it leaves the mixture at the step
    border before it would read more. None knows no end."""
    tags: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """What the source is, for whoever chooses or reports by it: domain, language, date, ..."""


class ValidationConfig(Settings):
    """`[[data.validation]]`: one held-out corpus, read in file order and never trained on."""

    name: Name
    path: Prefix
    source: Name | None = None
    """The source that it is held out of; by default the one of its own name."""


class DataConfig(Settings):
    """`[data]`: the tokenizer, the sequences, and the corpora they are cut from."""

    tokenizer: Name = "bytes"
    """`bytes`, a tokenizer.json or a folder that has one, or a SentencePiece .model."""
    eod: str | None = None
    """Token that ends a document; None takes the one that the tokenizer declares."""
    sequence_length: int = Field(default=1024, gt=0)
    """Tokens in a sequence."""
    sources: tuple[SourceConfig, ...] = ()
    mixture: MixtureConfig = MixtureConfig()
    validation: tuple[ValidationConfig, ...] = ()
    document_mask: bool = True
    """Attention stops at the borders of documents and positions restart there. Off: one sequence is one
    context, whatever it holds. The loss skips the first token of a document either way."""

    @model_validator(mode="after")
    def _distinct_names(self) -> DataConfig:
        problems: list[str] = []
        for section, entries in (("sources", self.sources), ("validation", self.validation)):
            names = [entry.name for entry in entries]
            problems += [
                f"data.{section}: {names.count(name)} entries are named {name!r}; give each its own name"
                for name in dict.fromkeys(names)
                if names.count(name) > 1
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def problems(self) -> list[str]:
        """What keeps these files from being read, without opening them; empty when nothing does."""
        found: list[str] = []
        if not self.sources:
            found.append(
                "data.sources: no source to train on; add a [[data.sources]] with name, path and weight"
            )
        found += mixture_problems(self.mixture, self.sources)
        for section, entries in (("sources", self.sources), ("validation", self.validation)):
            for entry in entries:
                found += [f"data.{section} {entry.name!r}: {text}" for text in _pair_problems(entry.path)]
        sources = {os.path.realpath(entry.path): entry.name for entry in self.sources}
        for held_out in self.validation:
            if trained := sources.get(os.path.realpath(held_out.path)):
                found.append(
                    f"data.validation {held_out.name!r}: {held_out.path} is also what source {trained!r} "
                    "trains on; hold documents out with: ratoon data prepare --validation-share"
                )
        if self.tokenizer != "bytes" and not Path(self.tokenizer).exists():
            found.append(
                f"data.tokenizer: {self.tokenizer} does not exist; expected 'bytes', a tokenizer.json, a "
                "folder that has one, or a SentencePiece .model"
            )
        return found


def _pair_problems(prefix: str) -> list[str]:
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if not missing:
        return []
    if len(missing) == 1:
        return [f"{missing[0]} is missing; its partner is there, so copy it again or prepare the data again"]
    if Path(prefix).exists():
        return [
            f"{prefix} is not prepared yet; run: ratoon data prepare {prefix} --output PREFIX --tokenizer T"
        ]
    return [f"{missing[0]} and {missing[1]} do not exist; make them with: ratoon data prepare"]
