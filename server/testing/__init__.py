"""What tests of agents use: Lumos's real server, in memory, on a virtual clock. The server itself never loads it.

Nor does pytest, until a test wants it: names are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answer
    from .assertions import (
        assert_done,
        assert_error,
        assert_events,
        assert_nothing_left,
        assert_stopped,
        assert_text,
        assert_tool_called,
        assert_ttfb,
        assert_ttft,
    )
    from .chat import ChatRun
    from .faults import Faults
    from .lumos import VirtualLumos
    from .model_server import ModelServer
    from .replay import Replay

__all__ = [
    "Answer",
    "ChatRun",
    "Faults",
    "ModelServer",
    "Replay",
    "VirtualLumos",
    "assert_done",
    "assert_error",
    "assert_events",
    "assert_nothing_left",
    "assert_stopped",
    "assert_text",
    "assert_tool_called",
    "assert_ttfb",
    "assert_ttft",
]

_MODULES = {
    "Answer": "answers",
    "ChatRun": "chat",
    "Faults": "faults",
    "ModelServer": "model_server",
    "Replay": "replay",
    "VirtualLumos": "lumos",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'assertions')}", __name__), name)
