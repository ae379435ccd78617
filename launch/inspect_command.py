"""`ratoon checkpoint inspect`: what a checkpoint of any trainer holds, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.errors import FAILED, show_error
from launch.sizes import counted, readable_size
from launch.source_options import FactsOption, JSONOption, PathArgument, SpecOption, parse_facts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from checkpoint.manifest import Manifest
    from checkpoint.opening import Opened

_SECTIONS = ("schedule", "data", "scalars", "parameter_groups", "lineage", "versions")


def inspect(
    path: PathArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every logical tensor.")] = False,
    spec: SpecOption = None,
    fact: FactsOption = None,
    as_json: JSONOption = False,
) -> None:
    """Show what a checkpoint holds: format, step, layout, sizes, groups, and what else it says."""
    from rich.console import Console

    from checkpoint.opening import UnreadableError, open_checkpoint

    try:
        opened = open_checkpoint(path, spec=spec, facts=parse_facts(fact))
    except UnreadableError as error:
        show_error("No checkpoint", str(error))
        raise typer.Exit(FAILED) from None
    summary = summarise(opened)
    if tensors:
        summary["tensors"] = _tensors(opened.manifest)
    console = Console()
    if as_json:
        console.print(json.dumps(summary, indent=2), highlight=False, soft_wrap=True, markup=False)
    else:
        _show(console, summary)


def summarise(opened: Opened) -> dict[str, Any]:
    """What `inspect` shows, as JSON-able values; bytes and elements are those of the logical tensors."""
    from checkpoint.manifest import ITEM_SIZES

    folder, manifest = opened.folder, opened.manifest
    states: dict[str, dict[str, Any]] = {}
    for tensor in manifest.tensors:
        entry = states.setdefault(
            tensor.state, {"dtypes": [], "tensors": 0, "pieces": 0, "elements": 0, "bytes": 0}
        )
        entry["dtypes"] = sorted({*entry["dtypes"], tensor.dtype})
        entry["tensors"] += 1
        entry["pieces"] += len(tensor.pieces)
        entry["elements"] += tensor.numel
        entry["bytes"] += tensor.numel * ITEM_SIZES[tensor.dtype]
    parameters = {tensor.name: tensor.numel for tensor in manifest.tensors}
    files = {piece.file for tensor in manifest.tensors for piece in tensor.pieces}
    missing = sorted(name for name in files if not (folder / name).is_file())
    return {
        "path": str(folder),
        "format": opened.format,
        "complete": not missing,
        "missing_files": missing,
        "step": manifest.step,
        "ranks": manifest.world_size,
        "layout": manifest.state.get("layout"),
        "files": len(files),
        "parameters": sum(parameters.values()),
        "states": states,
        "rank_state": sorted({blob.name for blob in manifest.rank_blobs}),
        **{name: manifest.state[name] for name in _SECTIONS if name in manifest.state},
        "groups": [_group(group) for group in manifest.state.get("groups", ())],
        "notes": list(opened.notes),
        "left_out": list(opened.left_out),
        "problems": list(opened.problems),
        **(_beside(folder) if opened.is_native else {"siblings": [], "unfinished": []}),
    }


def _beside(folder: Path) -> dict[str, list[str]]:
    """Other checkpoints of the same folder."""
    from checkpoint.folder import list_complete, list_unfinished

    return {
        "siblings": [entry.path.name for entry in list_complete(folder.parent) if entry.path != folder],
        "unfinished": [entry.name for entry in list_unfinished(folder.parent)],
    }


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, and how many parameters it has."""
    return {"parameters": len(group["names"])} | {k: v for k, v in group.items() if k != "names"}


def _tensors(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "state": tensor.state,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "pieces": len(tensor.pieces),
        }
        for tensor in manifest.tensors
    ]


def _show(console: Console, summary: dict[str, Any]) -> None:
    from rich.markup import escape

    missing = summary["missing_files"]
    verdict = f"[bold red]{counted(len(missing), 'file')} missing[/]" if missing else "[green]complete[/]"
    if summary["problems"]:
        verdict = "[bold red]damaged[/]"
    console.print(f"[bold]{escape(summary['path'])}[/]  {verdict}", soft_wrap=True, highlight=False)
    facts = {
        "step": summary["step"],
        "parameters": f"{summary['parameters']:,}",
        "format": summary["format"],
        "saved by": f"{counted(summary['ranks'], 'rank')}, {_layout(summary['layout'])}",
        "files": summary["files"],
        "per rank": ", ".join(summary["rank_state"]) or "nothing",
        **{name.replace("_", " "): _one_line(summary[name]) for name in _SECTIONS if name in summary},
    }
    for number, group in enumerate(summary["groups"]):
        facts[f"group {number}"] = _one_line(group)
    if missing:
        facts["missing"] = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
    if summary["siblings"]:
        facts["also there"] = ", ".join(summary["siblings"])
    if summary["unfinished"]:
        facts["unfinished"] = ", ".join(summary["unfinished"])
    table = _table()
    for name, value in facts.items():
        table.add_row(f"[cyan]{name}[/]", escape(str(value)))
    console.print(table, highlight=False)
    console.print()
    console.print(_states_table(summary["states"]), highlight=False)
    if "tensors" in summary:
        console.print()
        console.print(_tensors_table(summary["tensors"]), highlight=False)
    for line in summary["left_out"]:
        console.print(f"[dim]not taken over: {escape(line)}[/]", soft_wrap=True, highlight=False)
    for line in summary["problems"]:
        console.print(f"[bold red]damaged[/] {escape(line)}", soft_wrap=True, highlight=False)


def _table(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, show_header=bool(columns), header_style="bold", padding=(0, 2, 0, 0))


def _states_table(states: dict[str, dict[str, Any]]) -> Table:
    table = _table("state", "dtype", "tensors", "pieces", "size")
    for name, entry in states.items():
        counts = (f"{entry['tensors']:,}", f"{entry['pieces']:,}", readable_size(entry["bytes"]))
        table.add_row(name, ", ".join(entry["dtypes"]), *counts)
    table.add_row("all", "", "", "", readable_size(sum(entry["bytes"] for entry in states.values())))
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _tensors_table(tensors: list[dict[str, Any]]) -> Table:
    """One row a parameter; the states only where they are not the same for all."""
    states: dict[str, dict[str, list[str]]] = {}
    shapes = {}
    for tensor in tensors:
        shapes[tensor["name"]] = " x ".join(map(str, tensor["shape"])) or "scalar"
        states.setdefault(tensor["name"], {}).setdefault(tensor["dtype"], []).append(tensor["state"])
    kept = {
        name: "; ".join(f"{', '.join(held)} ({dtype})" for dtype, held in by_dtype.items())
        for name, by_dtype in states.items()
    }
    alike = len(set(kept.values())) == 1
    table = _table("tensor", "shape", *([] if alike else ["states"]))
    for column in table.columns:
        column.overflow = "fold"
    for name, shape in shapes.items():
        table.add_row(name, shape, *([] if alike else [kept[name]]))
    if alike:
        table.caption = f"each with {next(iter(kept.values()))}"
        table.caption_justify = "left"
    return table


def _layout(layout: dict[str, Any] | None) -> str:
    """Degrees that were given; the number of ranks stands before it."""
    if not layout:
        return "layout not recorded"
    return _one_line({k: v for k, v in layout.items() if v is not None and k != "world_size"})


def _one_line(value: Any) -> str:
    """A mapping as `key value, key value`; what is nested deeper as compact JSON."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value)
    return ", ".join(f"{key} {v if isinstance(v, str) else json.dumps(v)}" for key, v in value.items())
