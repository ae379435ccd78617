"""A spec: the rules that say how a source's tensors map to logical ones. TOML, checked by pydantic."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from checkpoint.language.rules import Axes, Rule
from checkpoint.language.sizes import Size
from parallel.settings import Settings

SHIPPED = Path(__file__).parent / "specs"
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name components that DistributedDataParallel, torch.compile, FSDP1 and checkpoint_wrapper put in."""


class SpecError(ValueError):
    """A spec that is wrong in itself or does not fit a checkpoint.

    Attributes:
        problems: one sentence each, all of them.
        unmatched: how many source names no rule matches.
    """

    def __init__(self, headline: str, problems: list[str], unmatched: int = 0) -> None:
        self.problems = tuple(problems)
        self.unmatched = unmatched
        super().__init__(headline + "".join(f"\n- {problem}" for problem in problems))


class Rename(Settings):
    """A regex that is replaced wherever it occurs in a source name, before any rule sees it."""

    regex: str
    by: str


class Spec(Settings):
    """All rules for a kind of checkpoint.

    Attributes:
        about: one line for lists of specs.
        automatic: whether `choose_spec` may take it without being told to.
        include: shipped specs whose rules, renames, facts and replicated axes follow this one's.
        facts: defaults: numbers, or expressions over other facts.
        strip: components of names that wrappers put in; removed wherever they stand between dots.
        rename: further changes to source names, in order.
        replicated: axes over which every rule's tensors may be repeated.
        placement_from: "checkpoint": how tensors lie on ranks is the checkpoint's own word (DeepSpeed's
            universal_checkpoint_info) where it has one; the rules then see whole tensors.
        placement: the spec made of that word; never in a file.
    """

    name: str
    format: Literal[1] = 1
    about: str = ""
    automatic: bool = True
    include: tuple[str, ...] = ()
    facts: Mapping[str, Size] = Field(default_factory=dict)
    strip: tuple[str, ...] = WRAPPERS
    rename: tuple[Rename, ...] = ()
    replicated: Axes = ()
    placement_from: Literal["rules", "checkpoint"] = "rules"
    placement: Spec | None = None
    rules: tuple[Rule, ...] = Field(alias="rule", default=())


def shipped_specs() -> list[str]:
    """Names of the specs that come with Ratoon."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_spec(name_or_path: str | Path) -> Spec:
    """A shipped spec by its name, or any by its path.

    Raises:
        SpecError: there is no such spec, or everything that is wrong in it.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and str(name_or_path) in shipped_specs():
        path = SHIPPED / f"{name_or_path}.toml"
    if not path.is_file():
        raise SpecError(
            f"there is no spec {str(name_or_path)!r}: give the path of a TOML file, or one of "
            + ", ".join(shipped_specs()),
            [],
        )
    return parse_spec(path.read_text(encoding="utf-8"), str(path))


def parse_spec(text: str, where: str) -> Spec:
    """A spec from TOML; rules of included specs follow its own.

    Raises:
        SpecError: everything that is wrong, with the rule it is in; `where` is named.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where} is not TOML: {error}", []) from None
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        raise SpecError(
            f"{where} is not a spec:", [_sentence(each, tree) for each in error.errors()]
        ) from None
    for name in spec.include:
        other = load_spec(name)
        spec = spec.model_copy(
            update={
                "rules": spec.rules + other.rules,
                "facts": {**other.facts, **spec.facts},
                "rename": spec.rename + other.rename,
                "replicated": spec.replicated + other.replicated,
            }
        )
    return spec


def _sentence(error: Any, tree: dict[str, Any]) -> str:
    """One of pydantic's findings, with the rule by its name instead of its number."""
    place = list(error["loc"])
    rule = ""
    if place[:1] == ["rule"] and len(place) > 1 and isinstance(place[1], int):
        table = tree["rule"][place[1]]
        known = isinstance(table, dict) and (table.get("match") or table.get("regex"))
        rule = f"rule {place[1] + 1}{f' ({known})' if known else ''}: "
        place = place[2:]
    key = ".".join(str(each) for each in place)
    return f"{rule}{key + ': ' if key else ''}{error['msg'].removeprefix('Value error, ')}"
