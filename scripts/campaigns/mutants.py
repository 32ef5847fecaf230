"""Small mistakes that a module's source could have, for ``mutation_check.py``.

An operator, a number or a truth value exchanged, a condition turned round, a keyword or a statement left out. Error
messages, annotations, and what says on which device a tensor is made are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Args:
        module: path below the package.
        line: where the change is, from 1.
        mutation: the code before and after it.
        source: the module with it.
    """

    module: str
    line: int
    mutation: str
    source: str


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    encoded = source.encode()
    for place in _places(ast.parse(source)):
        for old, new in _changes(place):
            first = starts[old.lineno - 1] + old.col_offset
            last = starts[old.end_lineno - 1] + old.end_col_offset
            text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
            mutated = (encoded[:first] + text.encode() + encoded[last:]).decode()
            if old.lineno == old.end_lineno:
                before, after = (part.splitlines()[old.lineno - 1] for part in (source, mutated))
            else:
                before, after = ast.unparse(old), ast.unparse(new)
            yield Mutant(module, old.lineno, " -> ".join(" ".join(part.split()) for part in (before, after)), mutated)


def _places(node: ast.AST) -> Iterator[Any]:
    """Nodes that could change: not what a type or an error says."""
    for name, value in ast.iter_fields(node):
        # Patterns take no expression in parentheses.
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.Raise, ast.pattern)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                if isinstance(child, (ast.expr, ast.stmt)):
                    yield child
                yield from _places(child)


def _changes(node: Any) -> Iterator[tuple[Any, ast.AST]]:
    """What a node, or a part of it, could be by mistake."""

    def changed(**fields: Any) -> tuple[Any, ast.AST]:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return node, other

    match node:
        case ast.Compare(ops=operators):
            for place, operator in enumerate(operators):
                yield changed(ops=[*operators[:place], OPERATORS[type(operator)](), *operators[place + 1 :]])
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator):
            yield changed(op=OPERATORS[type(operator)]())
        case ast.AugAssign(op=operator):
            yield changed(op=OPERATORS[type(operator)]())
            yield node, ast.Pass()
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield node, operand
        case ast.IfExp(body=body, orelse=orelse):
            yield changed(body=orelse, orelse=body)
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, (ast.Compare, ast.UnaryOp)):
            yield test, ast.UnaryOp(ast.Not(), test)
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if keyword.arg != "device":
                    yield changed(keywords=[other for other in keywords if other is not keyword])
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield node, ast.Pass()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield changed(value=None)
