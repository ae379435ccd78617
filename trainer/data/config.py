"""`[data]`: which files a run reads, with which tokenizer, in what proportion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from parallel.settings import Settings
from trainer.data.mixture_config import MixtureConfig, by_weight, mixture_problems, takes_part
from trainer.data.replay.config import ReplayConfig
from trainer.data.transforms.config import TransformConfig, transform_problems


def without_extension(path: str) -> str:
    """`corpus`, `corpus.bin` and `corpus.idx` all name the same pair of files."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


Name = Annotated[str, Field(min_length=1)]
Prefix = Annotated[str, Field(min_length=1), AfterValidator(without_extension)]


class SourceConfig(Settings):
    """`[[data.sources]]`: a prepared corpus, or documents to replay, and its share of the sequences."""

    name: Name
    """How losses, reports and checkpoints call it; also part of the seed of its order."""
    path: Prefix | None = None
    """Path of the Megatron pair PATH.bin and PATH.idx, with or without the extension."""
    replay: ReplayConfig | None = None
    """Instead of a path: documents that the run has read before."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the sequences, relative to the other sources' weights (of its group, where there are groups).
    `[data.mixture]` may override it."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Instead of a weight: its share of all sequences. Sources with a weight divide what is left."""
    per_batch: int | None = Field(default=None, gt=0)
    """Instead of a weight: exactly so many sequences of every global batch."""
    group: Name | None = None
    """Which of `[data.mixture.groups]` it belongs to."""
    max_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most passes over its documents, those of earlier stages included; it leaves the mixture at the step
    border before it would read more. None knows no end."""
    tags: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """What the source is, for whoever chooses or reports by it: domain, language, date, ..."""

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        problems: list[str] = []
        if (self.path is None) == (self.replay is None):
            problems.append(f"{self.name!r} needs a path or replay = {{ of = [...] }}, one of the two")
        if self.share is not None and self.per_batch is not None:
            problems.append(f"{self.name!r} has both share and per_batch; keep one of them")
        own = "share" if self.share is not None else "per_batch" if self.per_batch is not None else ""
        for key, said in (("weight", self.weight != 1.0), ("group", self.group is not None)):
            if own and said:
                problems.append(f"{self.name!r} has {own}, so its {key} means nothing; leave it out")
        if self.replay is not None and self.name in self.replay.of:
            problems.append(f"{self.name!r} replays itself; name the sources that were read from files")
        if self.replay is not None and self.max_epochs is not None:
            problems.append(
                f"{self.name!r}: max_epochs is for sources with a path; share, per_batch or "
                "weight says how much is replayed"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
    transforms: tuple[TransformConfig, ...] = ()
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

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups that sources are in, in the order of the sources."""
        return tuple(dict.fromkeys(source.group for source in self.sources if source.group is not None))

    def problems(self) -> list[str]:
        """What keeps these files from being read, without opening them; empty when nothing does."""
        found: list[str] = []
        if not self.sources:
            found.append(
                "data.sources: no source to train on; add a [[data.sources]] with name, path and weight"
            )
        found += mixture_problems(self.mixture, self.sources) + self._replay_problems()
        found += transform_problems(self.transforms, self.sources)
        for section, entries in (("sources", self.sources), ("validation", self.validation)):
            for entry in entries:
                problems = _pair_problems(entry.path) if entry.path is not None else []
                found += [f"data.{section} {entry.name!r}: {text}" for text in problems]
        sources = {
            os.path.realpath(entry.path): entry.name for entry in self.sources if entry.path is not None
        }
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

    def _replay_problems(self) -> list[str]:
        replays = [source.name for source in self.sources if source.replay is not None]
        found = [
            f"data.sources {source.name!r}: replays {name!r}, which replays others; name those"
            for source in self.sources
            if source.replay is not None
            for name in source.replay.of
            if name in replays
        ]
        mixture = self.mixture
        heated = mixture.temperature or any(group.temperature for group in mixture.groups.values())
        return found + [
            f"data.sources {name!r}: a temperature goes by the sizes of the sources, and how much there is "
            "to replay is not known beforehand; give it share or per_batch instead of a weight"
            for name, source in zip(replays, (one for one in self.sources if one.replay), strict=True)
            if heated and by_weight(mixture, source) and takes_part(mixture, source)
        ]


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
