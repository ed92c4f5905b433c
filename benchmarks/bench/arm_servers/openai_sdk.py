# mypy: disable-error-code="import-not-found"
"""FastAPI and the openai SDK: a stream of chunks turned into events; and an agent's loop written by hand (W11)."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from .common import DONE, Chat, add_routes, completion_request, frame, run
from .openai_client import open_client
from .tools import calculator, current_time

TOOLS: dict[str, Callable[..., Awaitable[str]]] = {"calculator": calculator, "current_time": current_time}
TOOL_PARAMETERS: dict[str, dict[str, Any]] = {
    "calculator": {"properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "current_time": {"properties": {"timezone": {"type": "string"}}},
}
TOOL_SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": (TOOLS[name].__doc__ or "").partition("\n")[0],
            "parameters": {"type": "object", "additionalProperties": False, **parameters},
        },
    }
    for name, parameters in TOOL_PARAMETERS.items()
]

client = open_client(aiohttp=os.environ.get("HTTP_CLIENT") == "aiohttp")
sessions: defaultdict[str, list[Any]] = defaultdict(list)
"""What was said in each session: the memory, of this process alone."""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


async def answer(chat: Chat) -> AsyncIterator[bytes]:
    chunks: Any = await client.chat.completions.create(**completion_request(chat))
    async with chunks:
        async for chunk in chunks:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield frame(text)  # noqa: ASYNC119 - as FastAPI wants it
    yield DONE


async def use_tool(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    result = await TOOLS[function["name"]](**json.loads(function["arguments"] or "{}"))
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


def gather_call(calls: dict[int, dict[str, Any]], piece: Any) -> None:
    """Add a piece of a tool call to what has come of it."""
    call = calls.setdefault(
        piece.index, {"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["function"]["name"] += piece.function.name or ""
    call["function"]["arguments"] += piece.function.arguments or ""


async def run_agent(chat: Chat) -> AsyncIterator[bytes]:
    said = sessions[chat.session_id] if chat.session_id else []
    messages = [*said, {"role": "user", "content": chat.message}]
    while True:
        calls: dict[int, dict[str, Any]] = {}
        texts: list[str] = []
        request = completion_request(chat) | {"messages": messages, "tools": TOOL_SCHEMAS}
        chunks: Any = await client.chat.completions.create(**request)
        async with chunks:
            async for chunk in chunks:
                if not chunk.choices:
                    continue
                delta = chunk.choices[0].delta
                if delta.content:
                    texts.append(delta.content)
                    yield frame(delta.content)  # noqa: ASYNC119 - as FastAPI wants it
                for piece in delta.tool_calls or ():
                    gather_call(calls, piece)
        spoken: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if not calls:
            messages.append(spoken)
            break
        messages.append(spoken | {"tool_calls": list(calls.values())})
        messages += await asyncio.gather(*map(use_tool, calls.values()))
    said[:] = messages
    yield DONE


add_routes(app, answer, run_agent)


if __name__ == "__main__":
    run(app)
