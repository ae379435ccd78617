"""Options of every command that opens a checkpoint of a foreign trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PathArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint of any format: Ratoon's, Megatron's, DeepSpeed's, PyTorch DCP's, Hugging Face's.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads; by default up to 4.", show_default=False)
]
SpecOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Names in the universal checkpoint language: a shipped spec or a TOML file. By default the "
        "shipped one that fits.",
        show_default=False,
    ),
]
FactsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N",
        help="A number that the spec needs and the files do not say, as vocab_size=32000. May be given many "
        "times.",
        show_default=False,
    ),
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def parse_facts(given: list[str] | None) -> dict[str, int]:
    """The numbers of --fact.

    Raises:
        typer.BadParameter: not NAME=N.
    """
    facts: dict[str, int] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        try:
            facts[name.strip()] = int(value)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not NAME=N", param_hint="--fact") from None
    return facts
