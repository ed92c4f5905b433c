# mypy: disable-error-code="import-not-found"
"""pydantic-ai behind FastAPI: ``run_stream`` for a chat, ``run_stream_events`` for an agent with tools (W11).

``debounce_by=None``: every delta as it comes, as the other arms. The default gathers them for 0.1 s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic_ai import Agent, AgentRunResultEvent, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from .common import DONE, Chat, add_routes, frame, run
from .openai_client import open_client
from .tools import calculator, current_time

client = open_client()
provider = OpenAIProvider(openai_client=client)
chat_agent = Agent()
tool_agent = Agent(tools=[calculator, current_time])
sessions: dict[str, list[Any]] = {}
"""What was said in each session: the memory, of this process alone."""


@cache
def model_named(name: str) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=provider)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


async def answer(chat: Chat) -> AsyncIterator[bytes]:
    async with chat_agent.run_stream(chat.message, model=model_named(chat.model)) as result:
        async for text in result.stream_text(delta=True, debounce_by=None):
            yield frame(text)  # noqa: ASYNC119 - as FastAPI wants it
    yield DONE


async def run_agent(chat: Chat) -> AsyncIterator[bytes]:
    history = sessions.get(chat.session_id)
    async with tool_agent.run_stream_events(
        chat.message, model=model_named(chat.model), message_history=history
    ) as events:
        async for event in events:
            match event:
                case PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
                    yield frame(text)  # noqa: ASYNC119 - as FastAPI wants it
                case PartStartEvent(part=TextPart(content=text)) if text:
                    yield frame(text)  # noqa: ASYNC119 - as FastAPI wants it
                case AgentRunResultEvent(result=result) if chat.session_id:
                    sessions[chat.session_id] = result.all_messages()
    yield DONE


add_routes(app, answer, run_agent)


if __name__ == "__main__":
    run(app)
