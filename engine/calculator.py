"""A calculator for models: reads an expression and computes it, within bounds, without ``eval``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from .arithmetic import (
    SIGNIFICANT_DIGITS,
    CalculatorError,
    Number,
    add,
    approximate,
    ceiling,
    cosine,
    divide,
    exponential,
    factorial,
    floor,
    floor_divide,
    logarithm,
    modulo,
    multiply,
    natural_logarithm,
    parse_number,
    power,
    rounded,
    settled,
    sine,
    square_root,
    subtract,
    tangent,
)

__all__ = ["CalculatorError", "calculate"]

MAX_CHARS = 1000
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<digits>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE](?P<exponent>[+-]?[0-9]+))?"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>\*\*|//|[-+*/%^(),]))"
)
_TYPOGRAPHY = str.maketrans("\u00d7\u00b7\u00f7\u2212", "**/-")  # the signs that typeset text has for these
_CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}


class _Operator(NamedTuple):
    binds: int
    operands_of_right: int
    apply: Callable[[Number, Number], Number]


_UNARY_BINDS = 30
_OPERATORS = {
    "+": _Operator(10, 11, add),
    "-": _Operator(10, 11, subtract),
    "*": _Operator(20, 21, multiply),
    "/": _Operator(20, 21, divide),
    "//": _Operator(20, 21, floor_divide),
    "%": _Operator(20, 21, modulo),
    "**": _Operator(40, 40, power),  # 2**3**2 is 2**(3**2), and -2**2 is -(2**2)
    "^": _Operator(40, 40, power),
}


class _Function(NamedTuple):
    least: int
    most: int
    apply: Callable[..., Number]


_FUNCTIONS = {
    "sqrt": _Function(1, 1, square_root),
    "abs": _Function(1, 1, abs),
    "round": _Function(1, 2, rounded),
    "floor": _Function(1, 1, floor),
    "ceil": _Function(1, 1, ceiling),
    "min": _Function(1, MAX_CHARS, lambda *values: min(values)),
    "max": _Function(1, MAX_CHARS, lambda *values: max(values)),
    "log": _Function(1, 2, logarithm),
    "log10": _Function(1, 1, lambda value: logarithm(value, 10)),
    "ln": _Function(1, 1, natural_logarithm),
    "exp": _Function(1, 1, exponential),
    "sin": _Function(1, 1, sine),
    "cos": _Function(1, 1, cosine),
    "tan": _Function(1, 1, tangent),
    "factorial": _Function(1, 1, factorial),
}


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression; an ``int`` where it is whole.

    ``+ - * / // % **`` (also ``^``) and parentheses as in Python; ``pi`` and ``e``; sqrt, abs, round(x, decimals),
    floor, ceil, min, max, log(x) natural, log(x, base), log10, ln, exp, sin, cos and tan in radians, factorial.

    Whole numbers and decimals are computed exactly, as fractions: ``0.1 + 0.2`` is 0.3, ``1/3*3`` is 1, and ``2**100``
    has all its digits. What cannot be exact (roots, logarithms, ``pi``) is computed with floats and given to 15
    significant digits, so that ``sqrt(2)**2`` is 2: the 16th and 17th digit of a float are noise to people, and a whole
    result of at most 15 digits is an ``int`` then too. ``round`` rounds halves away from zero.

    It takes a few milliseconds at most: the length of the expression, its nesting and the size of every number in it
    are bounded.

    Raises:
        CalculatorError: the expression is wrong, has no value (division by zero, ``sqrt(-1)``) or a too large one.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"the expression is longer than {MAX_CHARS} characters")
    value = _Parser(_tokens(expression.translate(_TYPOGRAPHY))).result()
    if isinstance(value, int):
        return value
    result = float(settled(value)) if isinstance(value, float) else approximate(value)
    if isinstance(value, Fraction):
        return result
    return int(result) if result.is_integer() and abs(result) < 10**SIGNIFICANT_DIGITS else result


class _Token(NamedTuple):
    kind: str
    text: str
    place: int
    value: Number = 0


_END = "end"


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            place = len(text) - len(text[place:].lstrip())
            raise CalculatorError(
                f"there is {text[place]!r} at character {place + 1}, which is nothing to calculate with"
            )
        kind = "digits" if match["digits"] else match.lastgroup or ""
        value = parse_number(match["digits"], match["exponent"] or "") if match["digits"] else 0
        start = match.start(kind)
        tokens.append(_Token(kind, text[start : match.end()], start + 1, value))
        place = match.end()
    return [*tokens, _Token(_END, "", place + 1)]


class _Parser:
    """Operator precedence by binding power (Pratt), computing as it reads."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    def result(self) -> Number:
        value = self._expression(0)
        if self._token.kind != _END:
            raise self._unexpected("an operator or the end")
        return value

    @property
    def _token(self) -> _Token:
        return self._tokens[self._position]

    def _expression(self, least_binding: int) -> Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise CalculatorError(f"the expression is nested more than {MAX_DEPTH} deep")
        value = self._operand()
        while (operator := _OPERATORS.get(self._token.text)) and operator.binds >= least_binding:
            self._position += 1
            value = operator.apply(value, self._expression(operator.operands_of_right))
        self._depth -= 1
        return value

    def _operand(self) -> Number:
        token = self._token
        self._position += 1
        match token.kind, token.text:
            case "digits", _:
                return token.value
            case "name", name if name in _CONSTANTS:
                return _CONSTANTS[name]
            case "name", name:
                return self._call(name)
            case "sign", "-":
                return -self._expression(_UNARY_BINDS)
            case "sign", "+":
                return self._expression(_UNARY_BINDS)
            case "sign", "(":
                value = self._expression(0)
                self._expect(")")
                return value
        self._position -= 1
        raise self._unexpected("a number, a name or a parenthesis")

    def _call(self, name: str) -> Number:
        function = _FUNCTIONS.get(name)
        if function is None:
            known = ", ".join([*_CONSTANTS, *_FUNCTIONS])
            raise CalculatorError(f"there is no {name[:50]!r}; there are {known}")
        self._expect("(")
        arguments = [self._expression(0)]
        while self._token.text == ",":
            self._position += 1
            arguments.append(self._expression(0))
        self._expect(")")
        if not function.least <= len(arguments) <= function.most:
            raise CalculatorError(f"{name} takes {_count(function)}, not {len(arguments)}")
        return function.apply(*arguments)

    def _expect(self, text: str) -> None:
        if self._token.text != text:
            raise self._unexpected(repr(text))
        self._position += 1

    def _unexpected(self, wanted: str) -> CalculatorError:
        found = repr(self._token.text[:50]) if self._token.text else "its end"
        return CalculatorError(
            f"the expression is wrong at character {self._token.place}: {wanted} expected, not {found}"
        )


def _count(function: Any) -> str:
    if function.least == function.most:
        return "one argument" if function.least == 1 else f"{function.least} arguments"
    return f"{function.least} to {function.most} arguments"
