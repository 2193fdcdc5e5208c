"""Conditions on a state in a small language of their own: parsed here, never evaluated by Python.

    expression = comparisons joined by `and`, `or`, `not`; `<`, `<=`, `>`, `>=`, `==`, `!=`; `+ - * /`; parentheses
    operand    = number | name | field | field.x (.y, .z) | operand[entity] | function(operand, ...)

A field stands for its rows, `positions.x` for a component of them and `positions.x[3]` for that of entity 3; `speed`
for the lengths of velocities, `step` for the number of the frame. Names stand for entities, as `names` says. Functions
are those of `FUNCTIONS`; `distance(a, b)` and `gap(a, b)` are between the centres and the surfaces of two entities.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from simworld.space import shortest
from simworld.state import State

LONGEST, DEEPEST = 1000, 40  # characters, and parentheses within each other
TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(<=|>=|==|!=|[-+*/<>()\[\],.]))"
)
COMPONENTS = ("x", "y", "z")
Names = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class _Scope:
    """What an expression is about: a state, the number of its frame, and names of entities."""

    state: State
    step: int
    names: Names


_Node = Callable[[_Scope], Tensor]


def _pair(scope: _Scope, a: Tensor, b: Tensor) -> tuple[int, int]:
    found = []
    for one in (a, b):
        if not _is_number(one):
            raise ValueError("distance() and gap() take two entities, by number or name of one")
        found.append(_entity(scope, int(one)))
    return found[0], found[1]


def _is_number(value: Tensor) -> bool:
    """Return whether a value is one whole number."""
    return value.numel() == 1 and value.dtype != torch.bool and float(value).is_integer()


def _entity(scope: _Scope, number: int) -> int:
    if not 0 <= number < scope.state.num_entities:
        raise ValueError(f"there are entities 0 to {scope.state.num_entities - 1}; got {number}")
    return number


def _distance(scope: _Scope, a: Tensor, b: Tensor) -> Tensor:
    first, second = _pair(scope, a, b)
    places = _rows(scope, "positions")
    way = shortest(scope.state, (places[first] - places[second])[None], torch.tensor([first], device=places.device))
    apart: Tensor = way[0].norm()
    return apart


def _gap(scope: _Scope, a: Tensor, b: Tensor) -> Tensor:
    first, second = _pair(scope, a, b)
    radii = _rows(scope, "radii")
    return _distance(scope, a, b) - radii[first] - radii[second]


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda scope, value: function(value)


FUNCTIONS: Mapping[str, tuple[int, Callable[..., Tensor]]] = {
    "any": (1, lambda scope, value: _condition(value, "any").any()),
    "all": (1, lambda scope, value: _condition(value, "all").all()),
    "count": (1, _plain(lambda v: v.sum())),
    "sum": (1, _plain(lambda v: v.sum())),
    "mean": (1, _plain(lambda v: v.double().mean())),
    "min": (1, _plain(torch.amin)),
    "max": (1, _plain(torch.amax)),
    "abs": (1, _plain(torch.abs)),
    "norm": (1, _plain(lambda v: v.norm(dim=-1))),
    "distance": (2, _distance),
    "gap": (2, _gap),
}
"""How many operands a function takes, and what it makes of them."""

COMPARISONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "==": torch.eq,
    "!=": torch.ne,
}
ARITHMETIC: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
}


def _rows(scope: _Scope, name: str) -> Tensor:
    state = scope.state
    if name == "active":
        return state.active
    if name == "speed":
        speeds: Tensor = _rows(scope, "velocities").norm(dim=-1)
        return speeds
    if name not in state:
        raise ValueError(
            f"the state has no '{name}'; it has {', '.join(state)}, active and speed"
            + (f", and the names {', '.join(scope.names)}" if scope.names else "")
        )
    return state[name]


@dataclass(frozen=True)
class Expression:
    """A condition or a quantity; `text` is all there is to it.

    Raises:
        ValueError: the text is not in the grammar; it says where and what was expected.
    """

    text: str
    names: Names = field(default_factory=dict)
    _root: _Node = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", _Parser(self.text).whole())

    def value(self, state: State, step: int = 0) -> Tensor:
        """Return what the expression comes to in a state: a number, rows, or a condition on either.

        Raises:
            ValueError: the state has no such field, entity or component, or shapes do not fit.
        """
        try:
            return self._root(_Scope(state, step, self.names))
        except ValueError as error:
            raise ValueError(f"'{self.text}' cannot be told: {' '.join(str(error).split())}.") from error
        except (RuntimeError, IndexError) as error:  # torch's own words are of no use here
            raise ValueError(
                f"'{self.text}' cannot be told: shapes do not fit each other, or a function of numbers is asked of "
                "conditions or of whole numbers; use any, all or count of conditions."
            ) from error

    def number(self, state: State, step: int = 0) -> float:
        """Return the single number that the expression comes to."""
        found = self.value(state, step)
        if found.numel() != 1:
            raise ValueError(
                f"'{self.text}' must be one number; it comes to {list(found.shape)}. Name an entity, as in speed[3], "
                "or take max(...) or mean(...)."
            )
        return float(found)

    def holds(self, state: State, step: int = 0) -> bool:
        """Return whether the expression, a single condition, holds in a state."""
        found = self.value(state, step)
        if found.dtype != torch.bool or found.numel() != 1:
            raise ValueError(
                f"'{self.text}' must be one condition, as in speed[3] > 1; it comes to {list(found.shape)} of "
                f"{found.dtype}. Take any(...) or all(...) of many."
            )
        return bool(found)

    def entities(self, state: State, step: int = 0) -> Tensor:
        """Return the numbers [k] of the entities for which the expression holds, or that it names."""
        found = self.value(state, step)
        if found.dtype == torch.bool and found.shape == (state.num_entities,):
            return found.nonzero()[:, 0]
        if found.dtype == torch.int64 and found.ndim <= 1 and self.text.strip() in self.names:
            return found.reshape(-1)
        raise ValueError(
            f"'{self.text}' must say for each entity whether it is meant, as in object_types == 1, or be a name of "
            f"some; it comes to {list(found.shape)} of {found.dtype}."
        )


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
            raise ValueError(f"An expression is a text of 1 to {LONGEST} characters; got {str(text)[:60]!r}.")
        self.text, self.place, self.depth = text, 0, 0
        self.tokens: list[tuple[str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = TOKEN.match(text, at)
            if found is None:
                raise self._wrong(at, f"'{text[at:].lstrip()[:1]}' has no meaning here")
            self.tokens.append((found.group().strip(), found.end()))
            at = found.end()

    def whole(self) -> _Node:
        node = self.alternatives()
        if self.peek():
            raise self._wrong(self._at(), f"'{self.peek()}' is left over")
        return node

    def peek(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        if not self.peek() or (wanted and self.peek() not in wanted):
            said = f"'{self.peek()}' came" if self.peek() else "it ends"
            raise self._wrong(self._at(), f"{said} where {' or '.join(map(repr, wanted)) or 'an operand'} belongs")
        self.place += 1
        return self.tokens[self.place - 1][0]

    def _at(self) -> int:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else len(self.text)

    def _wrong(self, at: int, why: str) -> ValueError:
        return ValueError(
            f"'{self.text}' is no expression: {why} (character {at}). Write conditions on fields, as in "
            "object_types == 1 and positions.x > 0.5, or gap(3, 5) <= 0."
        )

    def alternatives(self) -> _Node:
        return self._joined("or", torch.logical_or, lambda: self._joined("and", torch.logical_and, self.negation))

    def _joined(self, word: str, function: Callable[[Tensor, Tensor], Tensor], inner: Callable[[], _Node]) -> _Node:
        parts = [inner()]
        while self.peek() == word:
            self.take(word)
            parts.append(inner())
        if len(parts) == 1:
            return parts[0]
        return lambda scope: reduce(function, [_condition(part(scope), word) for part in parts])

    def negation(self) -> _Node:
        if self.peek() != "not":
            return self.comparison()
        self.take("not")
        inner = self._deeper(self.negation)
        return lambda scope: _condition(inner(scope), "not").logical_not()

    def comparison(self) -> _Node:
        left = self.total()
        if self.peek() not in COMPARISONS:
            return left
        function, right = COMPARISONS[self.take()], self.total()
        return lambda scope: function(left(scope), right(scope))

    def total(self) -> _Node:
        return self._chain("+-", lambda: self._chain("*/", self.signed))

    def _chain(self, signs: str, inner: Callable[[], _Node]) -> _Node:
        node = inner()
        while self.peek() and self.peek() in signs:
            function, left, right = ARITHMETIC[self.take()], node, inner()
            node = self._both(function, left, right)
        return node

    @staticmethod
    def _both(function: Callable[[Tensor, Tensor], Tensor], left: _Node, right: _Node) -> _Node:
        return lambda scope: function(left(scope), right(scope))

    def signed(self) -> _Node:
        if self.peek() != "-":
            return self.picked()
        self.take("-")
        inner = self._deeper(self.signed)
        return lambda scope: -inner(scope)

    def picked(self) -> _Node:
        """Parse an operand with what picks from it: `.x` a component, `[3]` an entity."""
        node = self.operand()
        while self.peek() in (".", "["):
            if self.take() == ".":
                node = self._component(node, COMPONENTS.index(self.take(*COMPONENTS)))
            else:
                index = self._deeper(self.total)
                self.take("]")
                node = self._one(node, index)
        return node

    @staticmethod
    def _component(node: _Node, axis: int) -> _Node:
        def pick(scope: _Scope) -> Tensor:
            rows = node(scope)
            if not rows.ndim or rows.shape[-1] <= axis:
                raise ValueError(f"there is no component .{COMPONENTS[axis]} of {list(rows.shape)}")
            return rows[..., axis]

        return pick

    @staticmethod
    def _one(node: _Node, index: _Node) -> _Node:
        def pick(scope: _Scope) -> Tensor:
            rows, number = node(scope), index(scope)
            if not rows.ndim or not _is_number(number) or not 0 <= int(number) < len(rows):
                raise ValueError(f"[{number.tolist()}] picks none of {list(rows.shape)}")
            return rows[int(number)]

        return pick

    def operand(self) -> _Node:
        token = self.peek()
        if token == "(":
            self.take("(")
            node = self._deeper(self.alternatives)
            self.take(")")
            return node
        self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            whole = token.isdecimal() and int(token) <= torch.iinfo(torch.int64).max
            return lambda scope: torch.tensor(int(token) if whole else float(token), device=scope.state.device)
        if not (token[0].isalpha() or token[0] == "_") or token in ("and", "or", "not"):
            self.place -= 1
            raise self._wrong(self._at(), f"'{token}' came where an operand belongs")
        return self._call(token) if self.peek() == "(" else self._named(token)

    def _call(self, name: str) -> _Node:
        if name not in FUNCTIONS:
            raise self._wrong(self._at(), f"there is no function {name}(); there are {', '.join(FUNCTIONS)}")
        count, function = FUNCTIONS[name]
        self.take("(")
        operands = [self._deeper(self.alternatives)]
        while self.peek() == ",":
            self.take(",")
            operands.append(self._deeper(self.alternatives))
        self.take(")")
        if len(operands) != count:
            raise self._wrong(self._at(), f"{name}() takes {count}, got {len(operands)}")
        return lambda scope: function(scope, *[operand(scope) for operand in operands])

    @staticmethod
    def _named(name: str) -> _Node:
        if name in ("true", "false"):
            return lambda scope: torch.tensor(name == "true", device=scope.state.device)

        def look(scope: _Scope) -> Tensor:
            if name == "step":
                return torch.tensor(scope.step, device=scope.state.device)
            if name in scope.names:
                rows = torch.tensor([_entity(scope, operator.index(row)) for row in scope.names[name]])
                return (rows[0] if len(rows) == 1 else rows).to(scope.state.device)
            return _rows(scope, name)

        return look

    def _deeper(self, inner: Callable[[], _Node]) -> _Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._wrong(self._at(), f"it is nested more than {DEEPEST} deep")
        node = inner()
        self.depth -= 1
        return node


def _condition(value: Tensor, word: str) -> Tensor:
    if value.dtype != torch.bool:
        raise ValueError(f"'{word}' is of conditions, not of numbers")
    return value
