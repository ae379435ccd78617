"""From a run file with `[[stage]]` tables to a run file for each stage.

What stands outside the stages holds for all of them. A stage's own keys come on top: most tables are merged
key by key; those that describe one thing as a whole are replaced.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from trainer.config import RunConfig
from trainer.config_problems import report
from trainer.run_file import Key, RunFile

OWN = ("name", "tokens", "steps", "until")
"""Keys that only a stage has."""
SHORT: Mapping[str, tuple[str, ...]] = {
    "layout": ("parallel",),
    "mixture": ("data", "mixture"),
    "sequence_length": ("data", "sequence_length"),
    "rope": ("model",),
    "transforms": ("data", "transforms"),
    "freeze": ("updates", "freeze"),
}
"""A stage's short names -> where they stand in a run file. `rope.theta` is `model.rope_theta`."""
WHOLE = frozenset({"schedule", "start", "losses", "controller", "slow_weights"})
"""Tables that a stage replaces rather than adds to."""


def stage_files(run_file: RunFile) -> list[tuple[dict[str, Any], RunFile]]:
    """Of every `[[stage]]` its own keys (`OWN`), and the run file that the stage alone would have.

    Raises:
        ValueError: listing every unknown key, missing or repeated name.
    """
    stages = run_file.values["stage"]
    if problems := _problems(run_file, stages):
        raise ValueError(report(run_file.name, problems))
    base = {key: value for key, value in run_file.values.items() if key != "stage"}
    return [(_own(stage), _file(run_file, base, number, stage)) for number, stage in enumerate(stages)]


def _problems(run_file: RunFile, stages: Any) -> list[str]:
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return ["stage is a list of tables: begin each with [[stage]]"]
    known = {*OWN, *SHORT, *RunConfig.model_fields} - {"run"}
    problems, names = [], [stage.get("name") for stage in stages]
    for number, stage in enumerate(stages):
        where = f"line {run_file.line(('stage', number)) or 0}: "
        for key in sorted(stage.keys() - known):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{where}{key} is not a key of a stage{hint}")
        name = names[number]
        if not isinstance(name, str) or not name or "/" in name or "@" in name or name.startswith("."):
            problems.append(f"{where}a stage needs a name, which its folder has: no / or @, no dot in front")
        elif names.index(name) != number:
            problems.append(f"{where}two stages are called {name!r}; give each its own name")
        if sum(key in stage for key in ("tokens", "steps", "until")) != 1:
            problems.append(f"{where}stage {name!r} needs exactly one of tokens, steps, until")
    return problems


def _own(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: stage[key] for key in OWN if key in stage}


def _file(run_file: RunFile, base: Mapping[str, Any], number: int, stage: Mapping[str, Any]) -> RunFile:
    values = copy.deepcopy(dict(base))
    lines = {key: line for key, line in run_file.lines.items() if key[:1] != ("stage",)}
    for key, value in stage.items():
        if key in OWN:
            continue
        target = SHORT.get(key, (key,))
        if key == "rope" and isinstance(value, Mapping):
            value = {f"rope_{word}": setting for word, setting in value.items()}
        _put(values, target, copy.deepcopy(value))
        for line_key, line in run_file.lines.items():
            if line_key[:3] == ("stage", number, key):
                lines[_moved(target, line_key[3:], rope=key == "rope")] = line
    return RunFile(f"{run_file.name}, stage {stage['name']}", values, lines)


def _moved(target: tuple[str, ...], rest: Key, *, rope: bool) -> Key:
    return (*target, f"rope_{rest[0]}", *rest[1:]) if rope and rest else (*target, *rest)


def _put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    *path, last = key
    for part in path:
        values = values.setdefault(part, {})
    held = values.get(last)
    if isinstance(held, dict) and isinstance(value, dict) and last not in WHOLE:
        values[last] = _merged(held, value)
    else:
        values[last] = value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        held = result.get(key)
        both = isinstance(held, dict) and isinstance(value, dict)
        result[key] = _merged(held, value) if both else value  # type: ignore[arg-type]
    return result
