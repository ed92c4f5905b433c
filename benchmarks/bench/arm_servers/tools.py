"""The two trivial tools of W11, by the names and parameters of Lumos's own ``calculator`` and ``current_time``."""

from __future__ import annotations

import ast
import operator
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left, operation, right):
            return float(_OPERATORS[type(operation)](_value(left), _value(right)))
    raise ValueError("only numbers and + - * /")


async def calculator(expression: str) -> str:
    """Computes an arithmetic expression exactly. Use it for every calculation instead of computing yourself.

    Args:
        expression: such as (1299 * 12 + 80) / 3.
    """
    return str(_value(ast.parse(expression, mode="eval").body))


async def current_time(timezone: str = "UTC") -> str:
    """The date and time now.

    Args:
        timezone: IANA name of the time zone, such as Europe/Zurich or Asia/Tokyo.
    """
    return datetime.now(ZoneInfo(timezone)).isoformat(timespec="seconds")
