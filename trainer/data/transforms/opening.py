"""From the run file to the views and transforms of its sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.data.config import DataConfig
from trainer.data.corpus import open_corpus
from trainer.data.indexed import IndexedReader
from trainer.data.metadata import METADATA
from trainer.data.reader import Documents
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.transforms.plugin import Plugin
from trainer.data.transforms.prefixed import PrefixedDocuments
from trainer.data.transforms.protocol import SampleTransform
from trainer.data.transforms.weighting import LossWeight

REMEDY = "make it with: ratoon data prepare --metadata KEY --overwrite"


def open_views(
    config: DataConfig, corpora: Mapping[str, Documents], tokenizer: Tokenizer | None = None
) -> dict[str, PrefixedDocuments]:
    """By name, the sources that are read with their metadata.

    Args:
        corpora: the sources' texts, by name.
        tokenizer: of the run; None where nobody reads a token.

    Raises:
        ValueError: lists the sources whose metadata is missing, broken or another corpus's.
    """
    paths, problems = _with_metadata(config)
    views = {}
    for name, path in paths.items():
        try:
            views[name] = _open_view(corpora[name], path, tokenizer)
        except ValueError as error:
            problems.append(f"data.transforms, source {name!r}: {error}")
    if problems:
        raise ValueError("the data cannot be read:\n" + "\n".join(f"- {problem}" for problem in problems))
    return views


def open_transforms(config: DataConfig, tokenizer: Tokenizer) -> list[list[SampleTransform]]:
    """For each source, in their order, what its samples go through. Raises ValueError as `Plugin` does."""
    found: list[list[SampleTransform]] = [[] for _ in config.sources]
    for one in config.transforms:
        transform: SampleTransform
        if one.kind == "loss_weight":
            assert one.factor is not None, "the run file has been checked"
            transform = LossWeight(one.factor)
        elif one.kind == "plugin":
            assert one.plugin is not None, "the run file has been checked"
            transform = Plugin(one.plugin, one.options, vocab_size=tokenizer.vocab_size)
        else:
            continue
        for source, transforms in zip(config.sources, found, strict=True):
            if one.chooses(source):
                transforms.append(transform)
    return found


def sizes_of(config: DataConfig) -> dict[str, int]:
    """By source, the tokens of an epoch, metadata included; 1 where that is not known before the run.

    Raises:
        ValueError: files are missing or broken.
    """
    corpora = {one.name: IndexedReader(one.path) for one in config.sources if one.path}
    sizes = {name: corpus.num_tokens for name, corpus in corpora.items()}
    sizes |= {name: view.num_tokens for name, view in open_views(config, corpora).items()}
    return {one.name: sizes.get(one.name, 1) for one in config.sources}


def opening_problems(config: DataConfig) -> list[str]:
    """What keeps the transforms of a run from being opened, whose sources can be."""
    if not config.transforms:
        return []
    tokenizer = load_tokenizer(config.tokenizer, config.eod)
    problems = []
    try:
        open_transforms(config, tokenizer)
    except ValueError as error:
        problems.append(str(error))
    texts = {one.name: IndexedReader(one.path) for one in config.sources if one.path}
    try:
        open_views(config, texts, tokenizer)
    except ValueError as error:
        problems += [line.removeprefix("- ") for line in str(error).splitlines()[1:]]
    return problems


def _with_metadata(config: DataConfig) -> tuple[dict[str, str], list[str]]:
    """By source, where its metadata lies; and what is missing."""
    paths: dict[str, str] = {}
    problems: list[str] = []
    for number, one in enumerate(config.transforms):
        if one.kind != "metadata":
            continue
        where = f"data.transforms.{number}: "
        chosen = [source for source in config.sources if one.chooses(source)]
        have = {
            source.name: source.path + METADATA
            for source in chosen
            if source.path is not None and Path(f"{source.path}{METADATA}.idx").is_file()
        }
        paths |= have
        if one.sources is None and not have:
            problems.append(f"{where}no source has metadata, PATH{METADATA}.idx beside PATH.idx; {REMEDY}")
        for source in chosen if one.sources is not None else []:
            if source.path is None:
                problems.append(
                    f"{where}source {source.name!r} replays documents of others, which are replayed without "
                    "metadata; leave it out of sources"
                )
            elif source.name not in have:
                problems.append(
                    f"{where}source {source.name!r} has no metadata: {source.path}{METADATA}.idx does not "
                    f"exist; {REMEDY}, or leave it out of sources"
                )
    return paths, problems


def _open_view(text: Documents, path: str, tokenizer: Tokenizer | None) -> PrefixedDocuments:
    metadata = IndexedReader(path) if tokenizer is None else open_corpus(path, tokenizer)
    if len(metadata) != len(text):
        raise ValueError(
            f"{path} has the metadata of {len(metadata)} documents, {text.prefix} has {len(text)} documents; "
            "they were not prepared together, prepare the data again with --metadata"
        )
    return PrefixedDocuments(text, metadata)
