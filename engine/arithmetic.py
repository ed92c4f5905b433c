"""Exact arithmetic within bounds: the operators and functions of the calculator.

A value is an ``int`` or a ``Fraction`` as long as it can be known exactly, and a ``float`` after that. No operation
makes a number of more than ``MAX_BITS`` bits, and none is begun that would: ``9**9**9`` costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

from .tools import ToolError

Number: TypeAlias = int | Fraction | float

MAX_BITS = 13_000
"""Of a whole number: some 3,900 digits, which Python still turns into text at once."""

MAX_FRACTION_BITS = 2_000
"""Of the parts of a number that is not whole; beyond, it goes on as a float."""

MAX_EXPONENT = 4_000
SIGNIFICANT_DIGITS = 15
MAX_ROUNDED_DIGITS = 300


class CalculatorError(ToolError):
    """The expression has no value that can be given: it is wrong, undefined or too large. The text says which."""


def parse_number(digits: str, exponent: str) -> Number:
    """The exact value of a number as it is written."""
    if len(exponent) > 6 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise CalculatorError(f"the exponent {exponent[:20]} is too large")
    whole, _, fraction = digits.partition(".")
    return bounded(Fraction(int(whole + fraction)) * Fraction(10) ** (int(exponent or 0) - len(fraction)))


def bounded(value: Number) -> Number:
    """The value in its simplest form; raises CalculatorError for what is too large or no number."""
    if isinstance(value, Fraction):
        if value.denominator == 1:
            value = value.numerator
        elif max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_FRACTION_BITS:
            value = approximate(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise too_large()
    if isinstance(value, float) and not math.isfinite(value):
        raise too_large()
    return value


def approximate(value: Number) -> float:
    """The value as a float."""
    try:
        return float(value)
    except OverflowError:
        raise too_large() from None


def settled(value: Number) -> int | Fraction:
    """The value as people read it: a float by its first 15 digits, without the noise after them."""
    return Fraction(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def too_large() -> CalculatorError:
    """What to raise for a result beyond the bounds."""
    return CalculatorError("the result is too large")


def add(left: Number, right: Number) -> Number:
    """``left + right``."""
    return _checked(lambda: left + right)


def subtract(left: Number, right: Number) -> Number:
    """``left - right``."""
    return _checked(lambda: left - right)


def multiply(left: Number, right: Number) -> Number:
    """``left * right``."""
    return _checked(lambda: left * right)


def divide(left: Number, right: Number) -> Number:
    """``left / right``, exactly if both are exact."""
    return _checked(lambda: _exactly(left) / right)


def floor_divide(left: Number, right: Number) -> Number:
    """``left // right``, rounded down as in Python."""
    return _checked(lambda: settled(left) // settled(right))


def modulo(left: Number, right: Number) -> Number:
    """``left % right``, with the sign of the right side as in Python."""
    return _checked(lambda: settled(left) % settled(right))


def power(base: Number, exponent: Number) -> Number:
    """``base ** exponent``, exactly if that is possible and not too large."""
    if isinstance(base, int | Fraction) and isinstance(exponent, int):
        exact = _exactly(base)
        size = max(abs(exact.numerator).bit_length(), exact.denominator.bit_length()) - 1
        if size * abs(exponent) <= (MAX_BITS if exact.denominator == 1 else MAX_FRACTION_BITS):
            return _checked(lambda: exact**exponent)
        if exact.denominator == 1 and exponent > 0:
            raise too_large()
    left, right = approximate(base), approximate(exponent)
    if left < 0 and not right.is_integer():
        raise CalculatorError("a negative number has no real power that is not whole")
    return _checked(lambda: math.pow(left, right) if left else left**right)


def square_root(value: Number) -> Number:
    """The square root, exact for squares of exact numbers."""
    if value < 0:
        raise CalculatorError("a negative number has no real square root")
    if isinstance(value, int | Fraction):
        exact = _exactly(value)
        root = Fraction(math.isqrt(exact.numerator), math.isqrt(exact.denominator))
        if root * root == exact:
            return bounded(root)
    return _checked(lambda: math.sqrt(approximate(value)))


def rounded(value: Number, digits: Number = 0) -> Number:
    """The value to so many decimals, halves away from zero, as people round."""
    if not isinstance(digits, int) or abs(digits) > MAX_ROUNDED_DIGITS:
        raise CalculatorError(f"round takes a whole number of decimals, at most {MAX_ROUNDED_DIGITS}")
    exact = _exactly(settled(value))
    scale = Fraction(10) ** digits
    size = Fraction(math.floor(abs(exact) * scale + Fraction(1, 2))) / scale
    return bounded(size if exact >= 0 else -size)


def floor(value: Number) -> Number:
    """The next whole number below."""
    return math.floor(settled(value))


def ceiling(value: Number) -> Number:
    """The next whole number above."""
    return math.ceil(settled(value))


def natural_logarithm(value: Number) -> Number:
    """The logarithm to base e."""
    _positive(value)
    if isinstance(value, Fraction):
        if abs(value - 1) < 0.5:  # the difference of two logarithms would lose digits here
            return math.log1p(value - 1)
        return math.log(value.numerator) - math.log(value.denominator)
    return math.log(value)


def logarithm(value: Number, base: Number | None = None) -> Number:
    """The logarithm to a base, whole where it is; to base e without one."""
    if base is None:
        return natural_logarithm(value)
    _positive(value)
    _positive(base)
    if base == 1:
        raise CalculatorError("there is no logarithm to base 1")
    result = approximate(natural_logarithm(value)) / approximate(natural_logarithm(base))
    whole = round(result)
    if abs(result - whole) < 1e-9 and abs(whole) <= MAX_EXPONENT and power(base, whole) == value:
        return whole
    return _checked(lambda: result)


def factorial(value: Number) -> Number:
    """``1 * 2 * … * value``."""
    value = settled(value)
    if value.denominator != 1 or value < 0:
        raise CalculatorError("factorial takes a whole number that is not negative")
    if value > MAX_BITS or math.lgamma(value + 1) > MAX_BITS * math.log(2):
        raise too_large()
    return math.factorial(value.numerator)


def sine(value: Number) -> Number:
    """The sine of an angle in radians."""
    return _without_noise(math.sin(approximate(value)), approximate(value))


def cosine(value: Number) -> Number:
    """The cosine of an angle in radians."""
    return _without_noise(math.cos(approximate(value)), approximate(value))


def tangent(value: Number) -> Number:
    """The tangent of an angle in radians."""
    if not cosine(value):
        raise CalculatorError("the tangent is not defined there")
    return _without_noise(math.tan(approximate(value)), approximate(value))


def exponential(value: Number) -> Number:
    """``e`` to that power."""
    return _checked(lambda: math.exp(approximate(value)))


def _without_noise(result: float, angle: float) -> float:
    """Zero where the result is below what the angle is known to: ``sin(pi)`` is 0, though ``pi`` is not quite pi."""
    return 0.0 if abs(result) <= abs(angle) * 2**-52 and abs(angle) > 1 else result


def _positive(value: Number) -> None:
    if value <= 0:
        raise CalculatorError("only positive numbers have a logarithm")


def _exactly(value: Number) -> Fraction:
    """An exact value as a fraction; floats, which are inexact already, as what they hold."""
    return value if isinstance(value, Fraction) else Fraction(value)


def _checked(operation: Callable[[], Number]) -> Number:
    try:
        return bounded(operation())
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except OverflowError:
        raise too_large() from None
