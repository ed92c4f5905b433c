"""One conversation with everything in it, for the tests of what each wire format makes of it."""

from __future__ import annotations

from typing import Any

from engine.provider import Message, ModelRequest, ToolCall, ToolSpec

PICTURE = "https://example.com/sky.PNG?size=2"
INLINE_PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = ToolSpec("weather", "The weather in a city.", SCHEMA)
NOW = ToolSpec("now", "The time.", {"type": "object", "properties": {}})
CALLS = (ToolCall("call_1", "weather", '{"city": "上海", "days": 1.0}'), ToolCall("call_2", "now", ""))


def conversation(continuation: Any = None, continued_by: str | None = None) -> tuple[Message, ...]:
    """Two system turns, images, a turn that says something and calls two tools, a result and a failure, and more."""
    return (
        Message("system", "Be brief."),
        Message("user", "What sky is this?", images=(PICTURE, INLINE_PICTURE)),
        Message("assistant", "I look.", tool_calls=CALLS, continuation=continuation, continued_by=continued_by),
        Message("tool", "18 °C", tool_call_id="call_1"),
        Message("tool", "timed out after 30 s", tool_call_id="call_2", tool_failed=True),
        Message("system", "Answer in German."),
        Message("user", "And?"),
        Message("assistant", "Blau."),
        Message("user", "Danke 👍"),
    )


def request(*messages: Message, **options: Any) -> ModelRequest:
    """A request with these messages, by default a greeting."""
    return ModelRequest(messages or (Message("user", "hi"),), "m", **options)
