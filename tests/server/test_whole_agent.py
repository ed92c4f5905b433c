"""A whole agent through HTTP: turns with tools, memory and working memory, and what each model request contained."""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from trio.testing import MockClock

from engine import GenerationComplete, MemoryUpdate, StepComplete, ToolCallComplete
from engine.pieces import Emit, ToolCallPiece
from engine.prompt import MEMORIES_HEADING, WORKING_MEMORY_HEADING
from engine.provider import Message, ModelRequest
from providers.registry import ModelConfig
from providers.replay import ReplayProvider
from server.app import API
from server.records import AgentRecord, WorkingMemorySettings
from tests.harness.recordings import step_recording
from tests.harness.world import Answer, World, open_keeping_world

AGENT = f"http://lumos{API}/agents/guide"
INSTRUCTIONS = "You are a guide."
GUIDE = AgentRecord(
    id="guide",
    system=INSTRUCTIONS,
    tools=("calculator", "remember"),
    working_memory=WorkingMemorySettings(template={"name": ""}),
    llm_config=ModelConfig(provider="openai_compatible", model="m", base_url="http://vendor/v1", retries=0),
)


def call_piece(index: int, name: str, **arguments: Any) -> ToolCallPiece:
    return ToolCallPiece(index, f"call_{name}", name, msgspec.json.encode(arguments).decode())


CALLS = (
    call_piece(0, "calculator", expression="6 * 7"),
    call_piece(1, "update_working_memory", patch={"name": "Ada"}),
    call_piece(2, "remember", text="Ada collects maps of 東京."),
)
STEPS = [
    step_recording(*CALLS, text="One moment."),
    step_recording(text="It is 42, Ada."),
    step_recording(text="Your name is Ada."),
    step_recording(text="Maps of 東京."),
]


async def chat(world: World, message: str, **body: Any) -> Answer:
    """One whole streamed answer of the guide."""
    body = {"message": message, "stream": {"emit_memory_updates": True}} | body
    async with world.client.stream("POST", f"{AGENT}/chat/lumosai/stream", json=body) as response:
        assert response.status_code == 200
        answer = Answer(response)
        async for _ in answer:
            pass
        return answer


async def get(world: World, path: str) -> Any:
    """The ``data`` of what a GET answers."""
    answer = await world.client.get(f"{AGENT}{path}")
    assert answer.status_code == 200
    return answer.json()["data"]


def done(answer: Answer) -> GenerationComplete:
    """The answer's last event, which must be a good one."""
    (*_, last) = answer.events
    assert isinstance(last, GenerationComplete)
    return last


def system(document: dict[str, str], *memories: str) -> str:
    """The system prompt with this working memory and these remembered things."""
    sections = [INSTRUCTIONS, f"{WORKING_MEMORY_HEADING}\n{msgspec.json.encode(document).decode()}"]
    if memories:
        sections.append("\n".join([MEMORIES_HEADING, *memories]))
    return "\n\n".join(sections)


async def test_a_conversation_with_tools_and_memory(autojump_clock: MockClock) -> None:
    first = "I am Ada, and I collect maps. What is 6 * 7?"
    async with open_keeping_world(GUIDE) as world:
        vendor = await world.add_vendor(STEPS[0])
        vendor.further = STEPS[1:]

        answer = await chat(world, first)
        assert done(answer).response == "One moment.\n\nIt is 42, Ada."
        assert (done(answer).total_steps, done(answer).ttfb_ms, done(answer).elapsed_ms) == (2, 1000.0, 4000.0)
        usage = done(answer).usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (20, 10)
        results = [event for event in answer.events if isinstance(event, ToolCallComplete)]
        memory_id = next(result.result["memory_id"] for result in results if result.call_id == "call_remember")
        updates = [event for event in answer.events if isinstance(event, MemoryUpdate)]
        assert {(update.key, update.operation) for update in updates} == {
            ("name", "Set"),
            (f"memories.{memory_id}", "Set"),
        }
        assert [event.step_type for event in answer.events if isinstance(event, StepComplete)] == ["Initial", "Final"]

        one, two = (call.body for call in vendor.calls)
        assert [tool["function"]["name"] for tool in one["tools"]] == [
            "calculator",
            "remember",
            "update_working_memory",
        ]
        asked = [{"role": "system", "content": system({"name": ""})}, {"role": "user", "content": first}]
        assert one["messages"] == asked
        called = {
            "role": "assistant",
            "content": "One moment.",
            "tool_calls": [
                {"id": piece.call_id, "type": "function", "function": {"name": piece.name, "arguments": arguments}}
                for piece in CALLS
                for arguments in [piece.arguments_fragment]
            ],
        }
        said = {"memory_id": memory_id, "text": "Ada collects maps of 東京."}
        answers = [
            {"role": "tool", "tool_call_id": "call_calculator", "content": "42"},
            {"role": "tool", "tool_call_id": "call_update_working_memory", "content": '{"name":"Ada"}'},
            {"role": "tool", "tool_call_id": "call_remember", "content": msgspec.json.encode(said).decode()},
        ]
        assert two["messages"] == [*asked, called, *answers]

        # A second turn of the same session: its history, whole; what that holds is not recalled besides.
        await chat(world, "What is my name?")
        assert vendor.calls[2].body["messages"] == [
            {"role": "system", "content": system({"name": "Ada"})},
            asked[1],
            called,
            *answers,
            {"role": "assistant", "content": "It is 42, Ada."},
            {"role": "user", "content": "What is my name?"},
        ]

        # A new session: no history, but what was said and put down before.
        await chat(world, "Which maps of 東京 do I collect?", session_id="another")
        request = vendor.calls[3].body["messages"]
        lines = request[0]["content"].splitlines()
        today = f"({(await get(world, '/memories'))['items'][0]['created_at'][:10]})"
        assert request[0]["content"] == system({"name": "Ada"}, *lines[-2:])
        assert set(lines[-2:]) == {f"- {today} Ada collects maps of 東京.", f"- {today} {first}"}
        assert lines[-2].endswith("東京.")  # the best first
        assert request[1:] == [{"role": "user", "content": "Which maps of 東京 do I collect?"}]

        await check_what_is_kept(world, memory_id)
        assert world.upstream_open() <= 1
        assert world.journal.bugs == []


async def check_what_is_kept(world: World, memory_id: str) -> None:
    """History, memories and working memory after the conversation, through HTTP."""
    history = await get(world, "/chat/history?session_id=default")
    assert [(item["role"], item["content"]) for item in history["items"]] == [
        ("user", "I am Ada, and I collect maps. What is 6 * 7?"),
        ("assistant", "One moment."),
        ("assistant", "It is 42, Ada."),
        ("user", "What is my name?"),
        ("assistant", "Your name is Ada."),
    ]
    assert {item["session_id"] for item in (await get(world, "/sessions"))["items"]} == {"default", "another"}
    facts = [item for item in (await get(world, "/memories"))["items"] if item["kind"] == "fact"]
    assert [(fact["id"], fact["text"]) for fact in facts] == [(memory_id, "Ada collects maps of 東京.")]
    assert (await get(world, "/working-memory"))["document"] == {"name": "Ada"}


class Listened:
    """A provider between the run and another one; keeps the requests."""

    name = "replay"

    def __init__(self, inner: ReplayProvider) -> None:
        self.inner = inner
        self.requests: list[ModelRequest] = []

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        self.requests.append(request)
        await self.inner.stream(request, emit)

    async def aclose(self) -> None:
        """Nothing is open."""


async def test_the_same_on_the_replay_provider(autojump_clock: MockClock) -> None:
    async with open_keeping_world(GUIDE) as world:
        provider = Listened(ReplayProvider(STEPS[0], STEPS[1]))
        services = world.services([GUIDE], {})
        assert services.factory is not None
        agent = services.factory.create_chat_agent(GUIDE, "local")
        world.agents["guide"] = msgspec.structs.replace(agent, provider=provider)
        start = trio.current_time()
        answer = await chat(world, "I am Ada.")
        assert trio.current_time() - start == 4.0
        assert done(answer).response == "One moment.\n\nIt is 42, Ada."
        await chat(world, "And now?")
    first, second, third, fourth = (request.messages for request in provider.requests)
    assert first == (Message("system", system({"name": ""})), Message("user", "I am Ada."))
    assert second[:2] == first
    assert [(message.role, message.content) for message in second[2:4]] == [
        ("assistant", "One moment."),
        ("tool", "42"),
    ]
    assert third[0] == Message("system", system({"name": "Ada"}))
    assert third[1:6] == second[1:]
    assert [message.content for message in third[6:]] == ["It is 42, Ada.", "And now?"]
    assert fourth[: len(third)] == third
