# mypy: disable-error-code="import-not-found"
"""The OpenAI Agents SDK behind FastAPI: ``Runner.run_streamed``, without its tracing, which uploads to OpenAI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from fastapi import FastAPI
from openai.types.responses import ResponseTextDeltaEvent

from .common import DONE, Chat, add_routes, frame, run
from .openai_client import open_client
from .tools import calculator, current_time

set_tracing_disabled(True)
client = open_client()
tools = [function_tool(calculator), function_tool(current_time)]
sessions: dict[str, SQLiteSession] = {}
"""The SDK's own memory in its default form, a database in memory for each session; of this process alone."""


@cache
def agent_for(model: str, with_tools: bool) -> Agent:
    return Agent(
        name="Assistant",
        model=OpenAIChatCompletionsModel(model=model, openai_client=client),
        model_settings=ModelSettings(include_usage=True),
        tools=tools if with_tools else [],
    )


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


def session_named(name: str) -> SQLiteSession | None:
    if not name:
        return None
    if name not in sessions:
        sessions[name] = SQLiteSession(name)
    return sessions[name]


async def answer(chat: Chat, *, with_tools: bool) -> AsyncIterator[bytes]:
    agent = agent_for(chat.model, with_tools)
    result = Runner.run_streamed(agent, chat.message, session=session_named(chat.session_id))
    try:
        async for event in result.stream_events():
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                yield frame(event.data.delta)
        yield DONE
    finally:
        if not result.is_complete:
            result.cancel()  # the run is a task of its own, which a client that leaves does not end


add_routes(app, partial(answer, with_tools=False), partial(answer, with_tools=True))


if __name__ == "__main__":
    run(app)
