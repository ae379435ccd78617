"""A layout on the command line, as tensor=2,pipeline=2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from parallel.layout import Layout

LayoutOption = Annotated[
    str,
    typer.Option(
        metavar="K=N,...", help=r"Degrees of \[parallel], as tensor=2,pipeline=2.", show_default=False
    ),
]


def parse_layout(text: str) -> Layout:
    """The layout of "tensor=2,pipeline=2".

    Raises:
        ValueError: an unknown degree, or no number, or several problems.
    """
    from dataclasses import fields

    from pydantic import TypeAdapter, ValidationError

    from parallel.layout import Layout

    pairs = [part.partition("=") for part in text.split(",") if part]
    try:
        return TypeAdapter(Layout).validate_python({key.strip(): value.strip() for key, _, value in pairs})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"--layout {text!r}: {found}. Give degrees of [parallel] as tensor=2,pipeline=2; they are "
            f"{', '.join(field.name for field in fields(Layout))}"
        ) from None
