"""The calculator against Python's own arithmetic, and against whatever text there is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine.arithmetic import MAX_BITS
from engine.calculator import MAX_CHARS, CalculatorError, calculate
from engine.tools import ToolError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("0.1 + 0.2", 0.3),
        ("1/3*3", 1),
        ("6 / 3", 2),
        ("1 / 8", 0.125),
        ("2**100", 2**100),
        ("2^10", 1024),
        ("2**3**2", 512),
        ("-2**2", -4),
        ("2**-1", 0.5),
        ("2**-2**2", 0.0625),
        ("- - + 3", 3),
        ("2 - -3", 5),
        ("10 - 4 - 3", 3),
        ("100 / 10 / 5", 2),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("-7 % 3", 2),
        ("7.5 % 2", 1.5),
        (".5 + 5. + 1e3 + 2.5E-1", 1005.75),
        ("4 ** 0.5", 2),
        ("sqrt(2) ** 2", 2),
        ("sqrt(9/4)", 1.5),
        ("sqrt(10**40)", 10**20),
        ("floor(sqrt(3) ** 2)", 3),
        ("ceil(sqrt(7) ** 2)", 7),
        ("sqrt(3) ** 2 // 1", 3),
        ("factorial(sqrt(3) ** 2)", 6),
        ("floor(-2.5) + ceil(-2.5)", -5),
        ("round(2.5)", 3),
        ("round(-2.5)", -3),
        ("round(2.675, 2)", 2.68),
        ("round(sqrt(2), 3)", 1.414),
        ("round(1234, -2)", 1200),
        ("abs(-3.5)", 3.5),
        ("min(3, 1.5, 2) + max(3, pi)", 1.5 + math.pi),
        ("factorial(20)", math.factorial(20)),
        ("log(8, 2)", 3),
        ("log(1000, 10)", 3),
        ("log(0.125, 2)", -3),
        ("log(2, 4)", 0.5),
        ("log10(10**400)", 400),
        ("log(e) + ln(e)", 2),
        ("log(10**3000, 1.0000000001)", 69077552793275.2),
        ("exp(0)", 1),
        ("sin(pi)", 0),
        ("cos(pi/2) + cos(0)", 1),
        ("sin(pi/6)", 0.5),
        ("tan(pi/4)", 1),
        ("sin(1e-10)", 1e-10),
        ("1.0001**100000", 22015.456048528),
        ("0**0", 1),
        ("1" + "+1" * 400, 401),
        ("1**" + "9" * 500, 1),
        ("(-1)**" + "9" * 500, -1),
        ("3 × 4 − 6 ÷ 2", 9),  # noqa: RUF001 - these signs are what is tested
        ("1e-4000", 0),
        ("1e22 * pi", 3.14159265358979e22),
    ],
)
def test_values(expression: str, value: float) -> None:
    result = calculate(expression)
    assert result == (value if isinstance(value, int) else pytest.approx(value, rel=1e-14))
    assert isinstance(result, int) == isinstance(value, int) or result == 0


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "character 1: a number, a name or a parenthesis expected, not its end"),
        ("1 +", "character 4: a number, .* not its end"),
        ("(1", r"character 3: '\)' expected, not its end"),
        ("1)", r"character 2: an operator or the end expected, not '\)'"),
        ("2 2", "character 3: an operator"),
        ("2pi", "not 'pi'"),
        ("1,000", "not ','"),
        ("1_000", "not '_000'"),
        ("2 $ 3", r"there is '\$' at character 3"),
        ("7!", "'!' at character 2"),
        ("１+1", "at character 1"),  # noqa: RUF001 - a digit, but not one of ours
        ("\ud800", r"'\\ud800' at character 1"),
        ("x + 1", "there is no 'x'; there are pi, e, sqrt, "),
        ("__import__('os')", "there is no '__import__'|there is \"'\""),
        ("sqrt 4", r"'\(' expected"),
        ("sqrt()", "a number, a name"),
        ("sqrt(1, 2)", "sqrt takes one argument, not 2"),
        ("round(1, 2, 3)", "round takes 1 to 2 arguments, not 3"),
        ("round(1, 0.5)", "whole number of decimals"),
        ("round(1, 10**9)", "whole number of decimals"),
        ("1 / 0", "division by zero"),
        ("1 // 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("1.5 % (sqrt(2) - sqrt(2))", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(sqrt(2) - sqrt(2)) ** -1", "division by zero"),
        ("sqrt(-1)", "no real square root"),
        ("(-8) ** (1/3)", "no real power"),
        ("log(0)", "only positive"),
        ("log(2, -2)", "only positive"),
        ("log(2, 1)", "base 1"),
        ("tan(pi / 2)", "not defined"),
        ("factorial(-1)", "not negative"),
        ("factorial(2.5)", "whole number"),
        ("factorial(10**9)", "too large"),
        ("factorial(2000)", "too large"),
        ("factorial(10**400)", "too large"),
        ("9**9**9", "too large"),
        ("9**9**9**9", "too large"),
        ("10**4000", "too large"),
        ("10**3900 * 10**3900", "too large"),
        ("10**3000 / 7", "too large"),
        ("exp(1000)", "too large"),
        ("1.5**1000000", "too large"),
        ("sqrt(2)**1000000", "too large"),
        ("sin(10**400)", "too large"),
        ("1e999999999999", "exponent 999999999999 is too large"),
        ("1e99999", "exponent 99999 is too large"),
        ("(" * 100 + "1" + ")" * 100, "nested more than 50 deep"),
        ("-" * 100 + "1", "nested more than 50 deep"),
        ("2**" * 60 + "1", "nested more than 50 deep"),
        ("1+" * MAX_CHARS + "1", "longer than 1000 characters"),
    ],
)
def test_errors(expression: str, why: str) -> None:
    with pytest.raises(CalculatorError, match=why) as failure:
        calculate(expression)
    assert isinstance(failure.value, ToolError)
    assert len(str(failure.value).encode()) < 300


@st.composite
def expressions(draw: st.DrawFn, atoms: st.SearchStrategy[str], operators: str) -> str:
    inner = st.recursive(
        atoms,
        lambda part: st.one_of(
            st.tuples(part, st.sampled_from(operators.split()), part).map(" ".join),
            part.map(lambda text: f"({text})"),
            part.map(lambda text: f"-{text}"),
        ),
        max_leaves=12,
    )
    return draw(inner)


def by_python(expression: str) -> Any:
    try:
        return eval(expression, {"F": Fraction})
    except ZeroDivisionError:
        return None


def by_us(expression: str) -> Any:
    try:
        return calculate(expression)
    except CalculatorError as failure:
        return None if str(failure) == "division by zero" else failure


@given(expressions(st.integers(0, 10**6).map(str), "+ - * // %"))
def test_whole_numbers_are_pythons_exactly(expression: str) -> None:
    result = by_us(expression)
    assert result == by_python(expression)
    assert result is None or type(result) is int


@given(expressions(st.integers(0, 4).map(str), "+ - * **"))
def test_powers_of_small_numbers_bind_as_in_python(expression: str) -> None:
    result = by_us(expression)
    assume(not isinstance(result, Exception))  # towers of powers, which Python would compute for hours
    if isinstance(result, int):
        assert result == by_python(expression)


@given(expressions(st.decimals(0, 1000, places=3).map(str), "+ - * / // %"))
def test_decimals_are_exact_where_python_needs_fractions(expression: str) -> None:
    exact = by_python(_as_fractions(expression))
    result = by_us(expression)
    if exact is None or isinstance(result, Exception):
        assert result is None
    elif exact.denominator == 1:
        assert (result, type(result)) == (exact, int)
    else:
        assert result == float(exact)


def _as_fractions(expression: str) -> str:
    return " ".join(
        f"F('{word.strip('(-)')}')".join(_around(word))
        if word.strip("(-)") and word.strip("(-)")[0].isdigit()
        else word
        for word in expression.split(" ")
    )


def _around(word: str) -> tuple[str, str]:
    number = word.strip("(-)")
    before, _, after = word.partition(number)
    return before, after


# Of numbers as small as 5e-324 Python knows fewer digits than are written; the calculator takes what is written.
@given(
    st.floats(-50, 50, allow_subnormal=False),
    st.sampled_from(["sin", "cos", "exp", "sqrt", "ln", "log10", "abs", "floor", "ceil"]),
)
def test_functions_are_pythons(value: float, name: str) -> None:
    python: Callable[[float], float] = getattr(math, {"ln": "log", "abs": "fabs"}.get(name, name))
    expected: float | None = None
    result: float | None = None
    with contextlib.suppress(ValueError):
        expected = python(value)
    with contextlib.suppress(CalculatorError):
        result = calculate(f"{name}({value!r})")
    if expected is None:
        assert result is None
    else:
        assert result == pytest.approx(expected, rel=1e-13, abs=1e-14)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_as_written(value: float) -> None:
    assert float(calculate(repr(value))) == value


WORDS = ["sqrt", "log", "factorial", "round", "min", "exp", "**", "^", "//", "%", "(", ")", ",", "-", "9", "99", "1e99"]


@settings(max_examples=500)
@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*WORDS, ".1", "pi", "+", "/", "*", " "]), max_size=40).map("".join)
)
@example("factorial(1400)/factorial(1399)+" * 31 + "1")
@example("+".join(["log(factorial(1400),3)"] * 40))
@example("*".join(["(1/3+1/7)"] * 99))
@example("max(" + ",".join(["9**4000"] * 120) + ")")
@example("(" * 1000)
@example("9**" * 49 + "9")
def test_any_text_ends_in_a_number_or_an_error_soon(text: str) -> None:
    """Soon: the suite's own time limit is what a hang would meet; the size of the result shows that bounds hold."""
    try:
        result = calculate(text)
    except CalculatorError as failure:
        str(failure).encode()
    else:
        assert isinstance(result, int | float)
        assert math.isfinite(result) if isinstance(result, float) else result.bit_length() <= MAX_BITS
