"""Which rule speaks of which source name, and what is wrong where none or several do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from checkpoint.language.rules import Rule
from checkpoint.language.sizes import Facts
from checkpoint.language.spec import Spec
from checkpoint.language.template import Template, Value

SHOWN = 20
"""How many names or rules a list in an error shows before it only counts."""


@dataclass(frozen=True)
class Match:
    """A rule (by its number) and what it captured from a name."""

    rule: int
    values: dict[str, Value]


class Matcher:
    """The rules of a spec whose condition holds, ready for many names.

    Raises:
        ValueError: a condition needs a fact that is not known.
    """

    def __init__(self, spec: Spec, facts: Facts) -> None:
        self.rules = spec.rules
        self._active = [rule.when is None or bool(facts.size(rule.when)) for rule in spec.rules]
        self._listed: dict[str, list[int]] = {}
        self._patterns: list[tuple[int, str, str, re.Pattern[str]]] = []
        for number, rule in enumerate(spec.rules):
            if not self._active[number]:
                continue
            for name in rule.names:
                self._listed.setdefault(name, []).append(number)
            if not rule.names:
                template = Template.parse(rule.match) if rule.match is not None else Template("", ())
                self._patterns.append((number, template.prefix, template.suffix, rule.pattern))
        self._shifts = [_shifts(rule) for rule in spec.rules]
        strip = "|".join(re.escape(each) for each in spec.strip)
        self._renames = [(re.compile(rf"(?:(?<=\.)|^)(?:{strip})(?:\.|$)"), "")] if strip else []
        self._renames += [(re.compile(each.regex), each.by) for each in spec.rename]
        self.used: set[int] = set()

    def matches(self, name: str) -> list[Match]:
        """All rules that match, which should be one."""
        for pattern, by in self._renames:
            name = pattern.sub(by, name)
        found = [Match(number, {"name": name}) for number in self._listed.get(name, ())]
        for number, prefix, suffix, pattern in self._patterns:
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            hit = pattern.fullmatch(name)
            if hit is not None:
                found.append(Match(number, self._values(number, hit)))
        self.used.update(match.rule for match in found)
        return found

    def _values(self, number: int, hit: re.Match[str]) -> dict[str, Value]:
        tables, shifts = self.rules[number].values, self._shifts[number]
        values: dict[str, Value] = {}
        for field, text in hit.groupdict(default="").items():
            if field in tables:
                values[field] = tables[field].get(text, text)
            elif field in shifts and text.isdecimal():
                values[field] = int(text) - shifts[field]
            else:
                values[field] = text
        return values

    def nearest(self, name: str) -> str:
        """The rule that looks most like a name; one whose condition alone is in the way goes first."""
        for number, rule in enumerate(self.rules):
            if not self._active[number] and not rule.names and rule.pattern.fullmatch(name):
                return f"the rule {rule} would match, but its condition {rule.when!r} does not hold"
        plain = re.sub(r"\d+", "0", name)
        likeness = {
            str(rule): SequenceMatcher(None, plain, _plain(rule), autojunk=False).ratio()
            for rule in self.rules
            if not rule.names
        }
        return f"nearest rule: {max(likeness, key=lambda rule: likeness[rule], default='none')}"

    def unused(self) -> Iterator[str]:
        """Every rule, and every group of alternatives, that should have matched something and did not."""
        groups: dict[str, bool] = {}
        for number, rule in enumerate(self.rules):
            if not self._active[number] or rule.ignore or rule.optional:
                continue
            if rule.any_of is not None:
                groups[rule.any_of] = groups.get(rule.any_of, False) or number in self.used
            elif number not in self.used:
                yield f"the rule {rule} matches nothing: mark it optional = true if it may, or remove it"
        for group, used in groups.items():
            if not used:
                members = [str(rule) for rule in self.rules if rule.any_of == group]
                yield f"none of the rules for {group!r} matches anything: {', '.join(members)}"


def _plain(rule: Rule) -> str:
    """What a name of the rule could look like: numbers are 0, of alternatives the first."""
    if rule.match is None:
        return str(rule)
    parts = Template.parse(rule.match).parts
    return "".join(
        p if isinstance(p, str) else "0" if p.regex is None else p.regex.split("|")[0] for p in parts
    )


def _shifts(rule: Rule) -> dict[str, int]:
    """The captured fields that are whole numbers, and what names show more than they are."""
    if rule.names:
        return {}
    fields = Template.parse(rule.match).fields if rule.match is not None else {}
    numbers = [field for field in rule.pattern.groupindex if rule.is_number(field)]
    return {field: fields[field].shift if field in fields else 0 for field in numbers}


def match_names(matcher: Matcher, names: Iterable[str]) -> tuple[dict[str, Match], list[str], int]:
    """Every name's rule; what is wrong, a sentence each; and how many names no rule matches."""
    found: dict[str, Match] = {}
    unmatched: list[str] = []
    doubled: list[str] = []
    for name in names:
        matches = matcher.matches(name)
        if not matches:
            unmatched.append(name)
        elif len(matches) > 1:
            doubled.append(f"{name} matches " + " and ".join(str(matcher.rules[m.rule]) for m in matches))
        else:
            found[name] = matches[0]
    problems = []
    if unmatched:
        lines = [f"{name} ({matcher.nearest(name)})" for name in unmatched[:SHOWN]]
        problems.append(cut(f"names without a rule ({len(unmatched)}):", lines, len(unmatched)))
    if doubled:
        headline = f"names with more than one rule ({len(doubled)}):"
        problems.append(cut(headline, doubled[:SHOWN], len(doubled)))
    unused = list(matcher.unused())
    problems += unused[:SHOWN]
    if len(unused) > SHOWN:
        problems.append(f"and {len(unused) - SHOWN} more unused rules")
    return found, problems, len(unmatched)


def cut(headline: str, lines: list[str], total: int) -> str:
    """The headline and a line each; the rest is only counted."""
    more = [f"and {total - len(lines)} more"] if total > len(lines) else []
    return headline + "".join(f"\n    {line}" for line in lines + more)
