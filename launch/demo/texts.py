"""Documents that every Python and torch bring along, as records with "url" and "text".

Nothing is downloaded and nothing is drawn by chance: the same versions give the same documents.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from launch.demo.corpus import CODE_BYTES, LARGEST_MODULE, choose_code, held_out, prose_documents

Record = dict[str, str]

BEST_SHARE = 0.1
PAGE_CHARACTERS = 400
SITE_CHARACTERS = 400_000
TASK = "asyncio"
TASK_LARGEST_MODULE = 10_000
TASK_CHARACTERS = 1000
NO_QUESTIONS = frozenset({"test", "tests", "lib2to3", "idlelib", "site-packages", TASK})
"""Packages of the standard library that no questions are asked about: tests, bulk, and the task itself."""
LANGUAGE, PYTHON, TORCH = "docs.python.org", "github.com/python/cpython", "github.com/pytorch/pytorch"
LIBRARY = f"{PYTHON}/Lib"
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
"""What can have a docstring."""


def prose() -> Iterator[Record]:
    """The language reference behind `help("...")`, in pieces of some paragraphs."""
    from pydoc_data.topics import topics

    for document in prose_documents(topics):
        yield {"url": f"{LANGUAGE}/{document['topic']}", "text": document["text"]}


def code() -> Iterator[Record]:
    """The standard library's modules that are single files."""
    for path in map(Path, choose_code()):
        yield {"url": f"{LIBRARY}/{path.name}", "text": _read(path)}


def cpp(include: Path | None = None) -> Iterator[Record]:
    """The headers of torch's core library, c10, in the order of their paths, up to CODE_BYTES.

    Raises:
        ValueError: this torch has come without them.
    """
    include = include or torch_include()
    total = 0
    for path in sorted((include / "c10").rglob("*.h")):
        size = path.stat().st_size
        if 0 < size <= LARGEST_MODULE and total + size <= CODE_BYTES:
            total += size
            yield {"url": f"{TORCH}/{path.relative_to(include)}", "text": _read(path)}
    if not total:
        raise ValueError(
            f"no C++ header in {include / 'c10'}: the demo corpora take theirs from torch's wheel, and this "
            "torch came without; use one from pypi.org or download.pytorch.org"
        )


def torch_include() -> Path:
    """The folder of the headers that torch brings along; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is a dependency"
    return Path(spec.origin or "").parent / "include"


def best_code() -> list[Record]:
    """The part of `code` that explains itself most: by share of docstrings, up to a tenth of the characters.

    This stands for a filter by quality, such as a classifier's score. It has nothing that `code` holds out.
    """
    records = list(code())
    most = BEST_SHARE * sum(len(record["text"]) for record in records)
    trained = [record for record in records if not held_out(record["text"])]
    trained.sort(key=lambda record: docstring_share(record["text"]), reverse=True)
    sizes = accumulate(len(record["text"]) for record in trained)
    chosen = {record["url"] for record, size in zip(trained, sizes, strict=True) if size <= most}
    return [record for record in records if record["url"] in chosen]


def docstring_share(text: str) -> float:
    """Characters of docstrings by characters in all."""
    described = (node for node in ast.walk(ast.parse(text)) if isinstance(node, DESCRIBED))
    return sum(len(ast.get_docstring(node) or "") for node in described) / max(len(text), 1)


def task() -> Iterator[Record]:
    """A small task in the domain of `code`, and not in it: asyncio's shorter modules, in pieces."""
    for path in sorted((Path(sysconfig.get_path("stdlib")) / TASK).glob("*.py")):
        if path.stat().st_size <= TASK_LARGEST_MODULE:
            for piece in pieces(_read(path), TASK_CHARACTERS):
                yield {"url": f"{LIBRARY}/{TASK}/{path.name}", "text": piece}


def questions() -> Iterator[Record]:
    """Questions about the functions and classes of the standard library's packages, answered by docstrings.

    `code` has none of these packages. They stand for questions and answers that a model has written.
    """
    library = Path(sysconfig.get_path("stdlib"))
    packages = sorted(path.parent for path in library.glob("*/__init__.py"))
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            inside = path.relative_to(library)
            if NO_QUESTIONS.isdisjoint(inside.parts):
                module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
                for text in _asked(_read(path), module):
                    yield {"url": f"{LIBRARY}/{inside}", "text": text}


def _asked(source: str, module: str) -> Iterator[str]:
    """A question and its answer for everything with a docstring that has a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DESCRIBED[1:]) and (answer := ast.get_docstring(node)):
            if isinstance(node, ast.ClassDef):
                asked = f"What is the class `{node.name}` of `{module}`?"
            else:
                asked = f"What does `{node.name}({ast.unparse(node.args)})` of `{module}` do?"
            yield f"Question: {asked}\n\nAnswer: {answer}\n"


def web() -> Iterator[Record]:
    """Short pages of three sites in one corpus, as many characters of each; "url" is the site.

    A page is about as long as a sequence of the recipes, so that most sequences say what they are from.
    """
    for site, records in ((LANGUAGE, prose()), (PYTHON, code()), (TORCH, cpp())):
        total = 0
        for record in records:
            for piece in pieces(record["text"], PAGE_CHARACTERS):
                total += len(piece)
                if total <= SITE_CHARACTERS:
                    yield {"url": site, "text": piece}


def pieces(text: str, characters: int) -> Iterator[str]:
    """The text, cut at the first line break after every so many characters."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= characters:
            yield "".join(piece)
            piece, size = [], 0
    if "".join(piece).strip():
        yield "".join(piece)


def write_records(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Write JSON lines."""
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> str:
    """A module in the encoding that it declares; any other file in UTF-8."""
    if path.suffix == ".py":
        with tokenize.open(path) as module:
            return module.read()
    return path.read_text(encoding="utf-8-sig")
