"""`ratoon recipe`: run files that follow published recipes, listed and copied."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

SUFFIX = ".toml"
ARXIV = re.compile(r"arXiv\s+(?:#\s*)?(\d{4}\.\d{5})")


def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write it there instead.", show_default=False),
    ] = None,
) -> None:
    """List ready run files that follow published recipes; print or write one.

    Each says what to watch and what to change for real data, and runs as it stands where demo-data is:
    [bold cyan]ratoon data demo demo-data[/] makes it.
    """
    if name is None:
        if out is not None:
            raise ValueError(f"--out {out} without a recipe: name one of {', '.join(recipe_names())}")
        _list_recipes()
    elif out is None:
        typer.echo(recipe_text(name), nl=False)
    else:
        write_recipe(name, out)
        typer.echo(f"wrote {out}; next: ratoon data demo demo-data && ratoon train {out}")


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    found = files("trainer.recipes").iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in found if file.name.endswith(SUFFIX))


def recipe_text(name: str) -> str:
    """A recipe as it lies in the package.

    Raises:
        ValueError: there is none of that name.
    """
    name = name.removesuffix(SUFFIX)
    if name not in recipe_names():
        raise ValueError(f"no recipe is called {name}; there are {', '.join(recipe_names())}")
    return (files("trainer.recipes") / (name + SUFFIX)).read_text(encoding="utf-8")


def write_recipe(name: str, path: Path) -> None:
    """Copy a recipe to `path`.

    Raises:
        ValueError: there is none of that name, or something lies at `path` already.
    """
    text = recipe_text(name)
    if path.exists():
        raise ValueError(f"{path} exists already; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def summary(text: str) -> str:
    """What a recipe says of itself in its first line."""
    return text.partition("\n")[0].removeprefix("# ")


def papers(text: str) -> list[str]:
    """The arXiv numbers of the papers that a recipe names, in order."""
    return list(dict.fromkeys(ARXIV.findall(text)))


def _list_recipes() -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for heading in ("recipe", "arXiv"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it does")
    for name in recipe_names():
        text = recipe_text(name)
        table.add_row(name, papers(text)[0], summary(text))
    console = Console(highlight=False)
    console.print(table)
    for command in ("data demo demo-data", "recipe NAME --out NAME.toml", "train NAME.toml"):
        console.print(f"  ratoon {command}", style="bold")
