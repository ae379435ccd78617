"""The folders' rules: imports go one way, only launch reads the environment, code stays short."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("parallel", "checkpoint", "trainer", "launch")  # each may import itself and what stands before it
FIRST_PARTY = (*PACKAGES, "tools", "tests")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
FILES = sorted(path for folder in (*PACKAGES, "tools") for path in (ROOT / folder).rglob("*.py"))


def allowed_imports(folder: str) -> set[str]:
    """First-party folders that a file of `folder` may import."""
    if folder == "tools":
        return {*PACKAGES, "tools"}
    return set(PACKAGES[: PACKAGES.index(folder) + 1])


def imported_folders(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, first-party folder) of every import, also of those inside functions and type checks."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            folder = name.partition(".")[0]
            if folder in FIRST_PARTY:
                yield node.lineno, folder


def wrong_imports(folder: str, source: str) -> list[str]:
    allowed = allowed_imports(folder)
    return [
        f"line {line}: {folder} imports {other}"
        for line, other in imported_folders(ast.parse(source))
        if other not in allowed
    ]


def environment_reads(source: str) -> list[int]:
    """Lines that touch os.environ or its kin."""
    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
            lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in ("environ", "getenv", "putenv")]
    return lines


def long_functions(source: str, longest: int = LONGEST_FUNCTION) -> list[str]:
    """Functions with more lines than that, docstring included, decorators not."""
    return [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > longest
    ]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def found(problems: dict[Path, list[str]]) -> str:
    return "\n".join(f"{name(path)}: {problem}" for path, many in problems.items() for problem in many)


def test_there_is_something_to_look_at() -> None:
    assert {folder_of(path) for path in FILES} == {*PACKAGES, "tools"}
    assert len(FILES) > 20


def test_imports_go_one_way() -> None:
    wrong = {path: wrong_imports(folder_of(path), path.read_text()) for path in FILES}
    assert not found(wrong), found(wrong)


def test_only_launch_reads_the_environment() -> None:
    wrong = {
        path: [f"line {line} reads the environment" for line in environment_reads(path.read_text())]
        for path in FILES
        if folder_of(path) != "launch"
    }
    assert not found(wrong), found(wrong)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    wrong = {path: [f"{length} lines"] for path, length in lengths.items() if length > LONGEST_FILE}
    assert not found(wrong), found(wrong)


def test_functions_are_short() -> None:
    wrong = {path: long_functions(path.read_text()) for path in FILES}
    assert not found(wrong), found(wrong)


def test_no_file_is_named_like_a_standard_module() -> None:
    wrong = [name(path) for path in FILES if path.stem in sys.stdlib_module_names]
    assert not wrong, wrong  # `python trainer/io.py` would put it before the real one


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("parallel", "import trainer.loop"),
        ("parallel", "def f():\n    from checkpoint.save import Saver"),
        ("checkpoint", "if TYPE_CHECKING:\n    from trainer.config import RunConfig"),
        ("trainer", "import os, launch.ranks as ranks"),
        ("launch", "from tests.ranks import run_ranks"),
        ("trainer", "from tools import layouts"),
        ("tools", "import tests"),
    ],
)
def test_a_planted_import_is_caught(folder: str, source: str) -> None:
    assert len(wrong_imports(folder, source)) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("launch", "import parallel.layout, trainer.config"),
        ("trainer", "from checkpoint.save import Saver\nimport trainers"),
        ("checkpoint", "from . import boxes\nimport torch"),
        ("tools", "from launch.ranks import run_ranks"),
    ],
)
def test_an_allowed_import_is_not(folder: str, source: str) -> None:
    assert wrong_imports(folder, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']",
        "import os\nos.getenv('A')",
        "from os import environ",
        "import os as o\no.environ",
    ],
)
def test_a_planted_environment_read_is_caught(source: str) -> None:
    assert environment_reads(source)


def test_a_planted_long_function_is_caught() -> None:
    body = "\n".join(["    pass"] * LONGEST_FUNCTION)
    assert long_functions(f"def f():\n{body}") == [f"f has {LONGEST_FUNCTION + 1} lines"]
    assert long_functions(f"class C:\n def f():\n{body}"[: -len("    pass\n")]) == []
