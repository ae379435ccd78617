"""`ratoon data demo`: the corpora that the recipes in `trainer/recipes` run on, and one tokenizer for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from launch.demo import texts
from launch.demo.corpus import HELD_OUT_SHARE, Corpus
from launch.demo.plan import VOCABULARY
from trainer.data.metadata import MetadataOptions
from trainer.data.prepare import PrepareOptions, prepare

CORPORA: Mapping[str, tuple[Callable[[], Iterable[texts.Record]], str]] = {
    "prose": (texts.prose, "Python's language reference"),
    "code": (texts.code, "the standard library"),
    "cpp": (texts.cpp, "headers of torch's core"),
    "code-best": (texts.best_code, "a tenth of code, most docstrings"),
    "task": (texts.task, "a part of asyncio, not in code"),
    "questions": (texts.questions, "on packages, with answers"),
    "web": (texts.web, "short pages of the first three"),
}
"""By name, what makes the documents, and what they are."""
TOKENIZER = "tokenizer.json"
TOKENIZER_TEXTS = ("prose", "code", "cpp")
ALL_TRAINED = frozenset({"code-best"})
"""Corpora without held-out documents of their own: what they are part of has them."""


def demo_corpora(
    folder: Path, names: Sequence[str] | None = None, *, overwrite: bool = False
) -> dict[str, Corpus]:
    """Write FOLDER/NAME{,-validation}{,.meta}.{bin,idx,json}, FOLDER/tokenizer.json, FOLDER/text/NAME.jsonl.

    The tokenizer is the same whichever corpora are asked for. A tenth of the documents is held out, chosen by
    a hash of the text; none of `code-best`, which has nothing that `code` holds out. The metadata of a
    document is where it is from, as MeCo has it (arXiv 2501.01956). Takes some seconds.

    Args:
        names: of CORPORA; all of them when not given.

    Raises:
        ValueError: a name is not known, or the folder has demo corpora already and `overwrite` is not set.
    """
    from trainer.data.train_tokenizer import train_bpe

    names = list(CORPORA) if names is None else names
    if unknown := [name for name in names if name not in CORPORA]:
        raise ValueError(f"no demo corpus is called {', '.join(unknown)}; there are {', '.join(CORPORA)}")
    tokenizer = folder / TOKENIZER
    if tokenizer.exists() and not overwrite:
        raise ValueError(f"{folder} has demo corpora already; choose another folder or pass --overwrite")
    written = {name: folder / "text" / f"{name}.jsonl" for name in dict.fromkeys((*TOKENIZER_TEXTS, *names))}
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for name, path in written.items():
        texts.write_records(path, CORPORA[name][0]())
    train_bpe([str(written[name]) for name in TOKENIZER_TEXTS], str(tokenizer), vocab_size=VOCABULARY)
    return {name: _prepared(name, written[name], folder, overwrite=overwrite) for name in names}


def _prepared(name: str, text: Path, folder: Path, *, overwrite: bool) -> Corpus:
    options = PrepareOptions(
        inputs=(str(text),),
        output=str(folder / name),
        tokenizer=str(folder / TOKENIZER),
        validation_share=0.0 if name in ALL_TRAINED else HELD_OUT_SHARE,
        overwrite=overwrite,
        metadata=MetadataOptions("url", "URL: {}\\n\\n"),
    )
    return Corpus(name, folder / name, prepare(options))


def show_demo_corpora(folder: Path, *, overwrite: bool = False) -> None:
    """Write all of them and print what they are. Raises ValueError as `demo_corpora` does."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from launch.terminal import count

    table = Table(box=SIMPLE_HEAD)
    table.add_column("corpus", no_wrap=True)
    for heading in ("documents", "tokens", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it is")
    for name, corpus in demo_corpora(folder, overwrite=overwrite).items():
        report = corpus.report
        tokens, held_out = count(report.tokens), count(report.validation_tokens)
        table.add_row(name, f"{report.documents:,}", tokens, held_out, CORPORA[name][1])
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"All in {folder}, with one tokenizer of {VOCABULARY:,} tokens: {TOKENIZER}", soft_wrap=True
    )
