"""Facts (whole numbers about a model) and the arithmetic that a spec may do with them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Size = int | str
"""A number, or an expression such as "queries_per_group * head_dim"."""

_OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class UnknownFactError(ValueError):
    """An expression needs a fact that nobody gave."""


def parse_size(expression: Size) -> ast.expr:
    """The expression as a tree.

    Raises:
        ValueError: for anything but whole numbers, names, + - * // %, comparisons, and, or, not, brackets.
    """
    try:
        tree = ast.parse(str(expression).strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{expression!r} is not arithmetic over facts") from None
    for node in ast.walk(tree):
        if not _allowed(node):
            raise ValueError(
                f"{expression!r} is not arithmetic over facts: only whole numbers, names, + - * // %, "
                "comparisons, and, or, not and brackets can be used"
            )
    return tree


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1
    plain = (ast.Name, ast.Load, ast.BinOp, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.USub, ast.Not)
    return isinstance(node, plain) or type(node) in _OPERATORS


class Facts:
    """Facts by name: given ones, and defaults of which some are derived from other facts.

    Args:
        defaults: a spec's `[facts]`: numbers or expressions.
        given: what the reader found and the user said; they go before the defaults.
    """

    def __init__(self, defaults: Mapping[str, Size], given: Mapping[str, int]) -> None:
        self._expressions: dict[str, Size] = {**defaults, **given}
        self._given = given
        self._known: dict[str, int] = {}
        self._trees: dict[Size, ast.expr] = {}

    def size(self, expression: Size) -> int:
        """The value of an expression.

        Raises:
            UnknownFactError: naming the fact that is missing, and how to give it.
            ValueError: facts that are defined by each other, or a division by zero.
        """
        if isinstance(expression, int):
            return int(expression)
        tree = self._trees.get(expression)
        if tree is None:
            tree = self._trees[expression] = parse_size(expression)
        try:
            return int(self._value(tree, ()))
        except ZeroDivisionError:
            raise ValueError(f"{expression!r} divides by zero: {self.explain(expression)}") from None

    def explain(self, *expressions: Size) -> str:
        """The facts behind the expressions with their values: "head_dim = 24, num_query_groups = 4"."""
        names = sorted({name for each in expressions for name in self._names(each, ())})
        return ", ".join(f"{name} = {self._fact(name, ())}" for name in names)

    def _names(self, expression: Size, seen: tuple[str, ...]) -> Iterator[str]:
        for node in ast.walk(parse_size(expression)):
            if isinstance(node, ast.Name) and node.id not in seen:
                yield node.id
                yield from self._names(self._expressions.get(node.id, 0), (*seen, node.id))

    def _fact(self, name: str, above: tuple[str, ...]) -> int:
        if name in self._known:
            return self._known[name]
        if name not in self._expressions:
            wanted = f" (needed for {above[0]})" if above else ""
            raise UnknownFactError(
                f"the fact {name!r} is not known{wanted}: give it with --fact {name}=NUMBER, or under "
                "[facts] in the spec"
            )
        if name in above:
            raise ValueError(f"the facts {', '.join(above)} are defined by each other: give one as a number")
        value = self._expressions[name]
        known = int(self._value(parse_size(value), (*above, name))) if isinstance(value, str) else int(value)
        self._known[name] = known
        return known

    def _value(self, node: ast.expr, above: tuple[str, ...]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._fact(node.id, above)
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](self._value(node.left, above), self._value(node.right, above))
        if isinstance(node, ast.Compare):
            right = self._value(node.comparators[0], above)
            return _OPERATORS[type(node.ops[0])](self._value(node.left, above), right)
        if isinstance(node, ast.BoolOp):
            values = (bool(self._value(each, above)) for each in node.values)
            return all(values) if isinstance(node.op, ast.And) else any(values)
        assert isinstance(node, ast.UnaryOp), ast.dump(node)
        value = self._value(node.operand, above)
        return not value if isinstance(node.op, ast.Not) else -value
