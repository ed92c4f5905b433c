"""What simulated model servers send is what the plan says, and the real providers understand it so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import BasicAgent, Deadlines, Error, Event, GenerationComplete, StreamingAgent, StreamingConfig
from engine.events import TextDelta
from engine.pieces import FinishPiece, Piece, ReasoningPiece, TextPiece, ToolCallPiece, UsagePiece
from engine.provider import Message, ModelRequest, ToolCall, ToolSpec
from providers.anthropic import AnthropicWire
from providers.gemini import GeminiWire
from providers.http import open_client
from providers.openai_chat import ChatWire
from providers.recording import load
from providers.wire import Endpoint, HttpProvider
from providers.wire import Wire as ProviderWire
from server.simulation.observations import UpstreamCall
from server.simulation.plan import AnswerPlan, ReplyPlan, UpstreamFault, VendorPlan, Wire
from server.simulation.replies import read_request, reply_text, reply_usage
from server.simulation.trace import Trace
from server.simulation.vendor_bytes import make_script
from server.simulation.vendors import Vendor, guarded
from server.testing.memory_network import MemoryNetwork

WIRES: tuple[Wire, ...] = ("openai", "anthropic", "gemini")
PROVIDER_WIRES: dict[Wire, ProviderWire] = {"openai": ChatWire(), "anthropic": AnthropicWire(), "gemini": GeminiWire()}
KEY = "sk-simulated-0123456789"
LIMITS = Deadlines(total=500, connect=7, first_token=11, idle=13)
LOOKUP = ToolSpec("lookup", "Looks up.", {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]})
FAR_PAST = 10_000.0


@dataclass
class Scene:
    """A vendor and whoever asks it."""

    vendor: Vendor
    provider: HttpProvider
    network: MemoryNetwork
    calls: list[UpstreamCall]
    trace: Trace
    times: list[float] = field(default_factory=list)

    async def pieces(self, *tools: ToolSpec, after: Sequence[Message] = (), **options: Any) -> list[Piece]:
        """What the provider makes of the next answer."""
        taken: list[Piece] = []

        def take(pieces: Sequence[Piece]) -> None:
            taken.extend(pieces)
            self.times.extend(trio.current_time() for piece in pieces if isinstance(piece, TextPiece))

        request = ModelRequest((Message("user", "hi"), *after), "m", tools=tools, **options)
        await self.provider.stream(request, take)
        return taken

    async def run(self) -> tuple[list[Event], float]:
        """The events of an agent's run, and how long it took."""
        agent = BasicAgent(agent_id="a", provider=self.provider, model="m", deadlines=LIMITS)
        start = trio.current_time()
        async with StreamingAgent(agent, StreamingConfig()).execute_streaming("hi") as events:
            seen = [event async for event in events]
        return seen, trio.current_time() - start


async def ask(wire: Wire, nursery: trio.Nursery, *answers: AnswerPlan) -> Scene:
    network, trace = MemoryNetwork(), Trace()
    calls: list[UpstreamCall] = []
    vendor = Vendor(VendorPlan(wire=wire, answers=answers), 3, calls, trace)
    vendor.start(nursery, network.listen("vendor", 80))
    client = open_client(guarded(network.connect, {"vendor": vendor}))
    provider = HttpProvider(wire, PROVIDER_WIRES[wire], Endpoint("http://vendor/v1", KEY), client)
    return Scene(vendor, provider, network, calls, trace)


def said(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def called(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    names = [piece.name for piece in pieces if isinstance(piece, ToolCallPiece) and piece.name]
    fragments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallPiece):
            fragments[piece.index] = fragments.get(piece.index, "") + piece.arguments_fragment
    return list(zip(names, fragments.values(), strict=True))


@pytest.mark.parametrize("splits", [0, 7])
@pytest.mark.parametrize("alphabet", ["ascii", "cjk", "emoji", "markup", "json"])
@pytest.mark.parametrize("wire", WIRES)
async def test_answers_are_understood_as_planned(
    autojump_clock: MockClock, wire: Wire, alphabet: Any, splits: int
) -> None:
    reply = ReplyPlan(characters=150, pieces=9, alphabet=alphabet, reasoning=True, splits=splits, pieces_per_read=2)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=reply))
        pieces = await scene.pieces(LOOKUP)
        nursery.cancel_scope.cancel()
    assert said(pieces) == reply_text(reply)
    assert len(reply_text(reply)) == 150
    usages = [piece for piece in pieces if isinstance(piece, UsagePiece)]
    assert (usages[-1].input_tokens, usages[-1].output_tokens) == (10, reply_usage(reply).output_tokens)
    assert [piece for piece in pieces if isinstance(piece, FinishPiece)] == [FinishPiece("stop")]


@pytest.mark.parametrize("wire", WIRES)
async def test_pieces_come_in_the_plans_time_and_are_noted(autojump_clock: MockClock, wire: Wire) -> None:
    reply = ReplyPlan(pieces=5, first_after=1.5, seconds=4.0)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=reply))
        await scene.pieces()
        nursery.cancel_scope.cancel()
    assert scene.times == [1.5, 2.5, 3.5, 4.5, 5.5]
    (call,) = scene.calls
    assert call.content_times == scene.times
    assert (call.vendor, call.number, call.opened_at, call.answered_at) == (3, 0, 0.0, 5.5)
    assert call.closed_at == call.answered_at


@pytest.mark.parametrize("wire", WIRES)
async def test_the_last_byte_of_a_piece_completes_it(autojump_clock: MockClock, wire: Wire) -> None:
    reply = ReplyPlan(pieces=5, first_after=1.5, seconds=4.0)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=reply, close_delimited=True))
        await scene.pieces()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    (call,) = scene.calls
    assert call.content_times == scene.times == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert (call.closed_at, call.answered_at) == (5.5, None)


@pytest.mark.parametrize("wire", WIRES)
async def test_tools_are_called_where_they_are_offered_and_have_no_result_yet(
    autojump_clock: MockClock, wire: Wire
) -> None:
    plan = AnswerPlan(reply=ReplyPlan(tools=("lookup", "unknown"), splits=5))
    results = (
        Message("assistant", "", tool_calls=(ToolCall("c", "lookup", "{}"),)),
        Message("tool", "found", tool_call_id="c"),
    )
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, plan)
        offered = await scene.pieces(LOOKUP)
        assert called(offered) == [("lookup", '{"q":"6*7"}')]
        assert FinishPiece("tool_calls") in offered
        assert called(await scene.pieces()) == []
        assert called(await scene.pieces(LOOKUP, tool_choice="none")) == []
        after = await scene.pieces(LOOKUP, after=results)
        assert called(after) == []
        assert FinishPiece("stop") in after
        assert len(scene.network.connections) == 1, "kept alive"
        nursery.cancel_scope.cancel()
    assert [call.number for call in scene.calls] == [0, 1, 2, 3]
    assert [call.closed_at for call in scene.calls] == [call.answered_at for call in scene.calls]


CODES: dict[UpstreamFault, tuple[str, float | None]] = {
    "refuse": ("upstream.connection", 0.0),
    "black_hole": ("timeout.connect", 7.0),
    "no_headers": ("timeout.first_token", 11.0),
    "close_before_headers": ("upstream.connection", 0.5),
    "close_in_headers": ("upstream.connection", 0.5),
    "cut": ("upstream.connection", None),
    "reset": ("upstream.connection", None),
    "stall_for_ever": ("timeout.idle", None),
    "pings_only": ("timeout.idle", None),
    "drip": ("timeout.idle", None),
    "no_end_mark": ("upstream.truncated", 2.5),
    "error_event": ("upstream.overloaded", None),
    "status_400": ("upstream.invalid_request", 0.5),
    "status_401": ("upstream.auth", 0.5),
    "status_429": ("upstream.rate_limit", 0.5),
    "status_500": ("upstream.server", 0.5),
    "status_503": ("upstream.overloaded", 0.5),
    "status_529": ("upstream.overloaded", 0.5),
    "not_sse": ("upstream.protocol", 0.5),
    "bad_json": ("upstream.protocol", None),
    "bad_utf8": ("upstream.protocol", None),
    "endless_line": ("upstream.protocol", None),
    "compressed": ("upstream.protocol", 0.0),
}


@pytest.mark.parametrize("splits", [0, 11])
@pytest.mark.parametrize("fault", CODES)
@pytest.mark.parametrize("wire", WIRES)
async def test_a_fault_leads_to_its_code(
    autojump_clock: MockClock, wire: Wire, fault: UpstreamFault, splits: int
) -> None:
    reply = ReplyPlan(splits=splits)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=reply, fault=fault))
        events, seconds = await scene.run()
        await trio.testing.wait_all_tasks_blocked()
        ends = [call.closed_at for call in scene.calls]
        nursery.cancel_scope.cancel()
    error = events[-1]
    assert isinstance(error, Error)
    code, at = CODES[fault]
    assert error.code == code
    assert KEY not in str(events)
    assert at is None or seconds == pytest.approx(at, abs=0.02)
    text = "".join(event.content for event in events if isinstance(event, TextDelta))
    assert reply_text(reply).startswith(text)
    partly = fault in ("cut", "reset", "stall_for_ever", "pings_only", "drip", "error_event", "bad_json", "bad_utf8")
    assert bool(text) == (partly or fault in ("endless_line", "no_end_mark"))
    assert None not in ends, "whoever did not get its answer has closed"
    if code == "timeout.idle":
        assert -1e-9 <= seconds - (scene.calls[0].content_times[-1] + LIMITS.idle) <= LIMITS.idle / 100 + 1e-9
    if fault == "status_429":
        assert error.retry_after == 1.0


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("fault", ["stall", "more_after_end", "drip"])
async def test_what_only_takes_longer_or_says_too_much_is_an_answer(
    autojump_clock: MockClock, wire: Wire, fault: UpstreamFault
) -> None:
    plan = AnswerPlan(fault=fault, seconds=0.01 if fault == "drip" else 5.0)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, plan)
        events, seconds = await scene.run()
        again, _ = await scene.run()
        nursery.cancel_scope.cancel()
    assert isinstance(events[-1], GenerationComplete)
    assert events[-1].response == reply_text(plan.reply)
    assert isinstance(again[-1], GenerationComplete)
    assert seconds == {"stall": 7.5, "more_after_end": 2.5}.get(fault, seconds)
    if fault == "more_after_end":
        assert len(scene.network.connections) == 2, "not asked again on a connection that said too much"


@pytest.mark.parametrize("where", [0.0, 0.01, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("wire", WIRES)
async def test_close_delimited_bodies_are_cut_without_a_trace(
    autojump_clock: MockClock, wire: Wire, where: float
) -> None:
    reply = ReplyPlan(reasoning=True)
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=reply, fault="cut", where=where, close_delimited=True))
        events, _ = await scene.run()
        nursery.cancel_scope.cancel()
    if where == 1.0:
        assert isinstance(events[-1], GenerationComplete)
    else:
        assert isinstance(events[-1], Error)
        assert events[-1].code == "upstream.truncated"


async def test_the_last_answer_is_that_of_all_further_requests(autojump_clock: MockClock) -> None:
    plans = [AnswerPlan(fault=fault) for fault in ("refuse", "black_hole", None, "refuse")]
    async with trio.open_nursery() as nursery:
        scene = await ask("openai", nursery, *plans)
        codes = [getattr((await scene.run())[0][-1], "code", "done") for _ in range(5)]
        nursery.cancel_scope.cancel()
    assert codes == ["upstream.connection", "timeout.connect", "done", "upstream.connection", "upstream.connection"]
    assert len(scene.calls) == 1
    assert scene.calls[0].answered_at is not None


async def test_an_answer_is_over_before_what_nobody_asked_for_comes_behind_it(autojump_clock: MockClock) -> None:
    """Bytes behind a whole answer, in writes of their own, are no part of the call: seed 85500."""
    reply = ReplyPlan(characters=8, first_after=2.0, seconds=5.0, splits=146)
    async with trio.open_nursery() as nursery:
        scene = await ask("gemini", nursery, AnswerPlan(reply=reply, fault="more_after_end"))
        await scene.pieces()
        came_whole_at = trio.current_time()
        await trio.sleep(1.0)
        (call,) = scene.calls
        assert call.answered_at is not None
        assert call.answered_at <= came_whole_at
        assert call.closed_at == call.answered_at
        nursery.cancel_scope.cancel()


async def test_a_caller_that_leaves_is_noticed_at_once(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        scene = await ask("openai", nursery, AnswerPlan(reply=ReplyPlan(first_after=60.0)))
        with trio.move_on_after(2.25):
            await scene.pieces()
        await trio.testing.wait_all_tasks_blocked()
        (call,) = scene.calls
        assert (call.closed_at, call.answered_at) == (2.25, None)
        assert not scene.network.open_connections()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("wire", WIRES)
async def test_recordings_are_played_in_their_own_time(autojump_clock: MockClock, wire: Wire) -> None:
    recording = load("gpt4o-short")
    async with trio.open_nursery() as nursery:
        scene = await ask(wire, nursery, AnswerPlan(reply=ReplyPlan(recording="gpt4o-short")))
        assert said(await scene.pieces()) == recording.text
        nursery.cancel_scope.cancel()
    said_at = [read.at_ns / 1e9 for read in recording.reads for p in read.pieces if isinstance(p, TextPiece) and p.text]
    assert scene.times == said_at


async def test_a_recording_with_tools_calls_them_only_where_they_are_offered(autojump_clock: MockClock) -> None:
    calculator = ToolSpec("calculator", "", {"type": "object"})
    clock = ToolSpec("current_time", "", {"type": "object"})
    results = (
        Message("assistant", "", tool_calls=(ToolCall("c", "calculator", "{}"),)),
        Message("tool", "929", tool_call_id="c"),
    )
    async with trio.open_nursery() as nursery:
        scene = await ask("openai", nursery, AnswerPlan(reply=ReplyPlan(recording="demo-tools")))
        assert [name for name, _ in called(await scene.pieces(calculator, clock))] == ["calculator", "current_time"]
        without = await scene.pieces()
        assert called(without) == []
        assert FinishPiece("tool_calls") not in without
        step_2 = await scene.pieces(calculator, clock, after=results)
        assert said(step_2) == load("demo-tools-step-2").text
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("wire", WIRES)
def test_the_same_seed_cuts_alike_and_another_one_does_not(wire: Wire) -> None:
    def sends(splits: int) -> list[tuple[float, bytes]]:
        body = PROVIDER_WIRES[wire].request(ModelRequest((Message("user", "hi"),), "m"), Endpoint("http://v")).content
        plan = AnswerPlan(reply=ReplyPlan(splits=splits))
        return list(make_script(wire, plan, read_request(wire, body), "x", "").sends)

    assert sends(1) == sends(1) != sends(2)
    whole = b"".join(data for _, data in sends(0))
    assert b"".join(data for _, data in sends(1)) == whole
    assert len(sends(0)) < len(sends(1))


@pytest.mark.parametrize("wire", WIRES)
def test_content_is_noted_at_the_very_byte_that_completes_it(wire: Wire) -> None:
    request = ModelRequest((Message("user", "hi"),), "m", tools=(LOOKUP,))
    asked = read_request(wire, PROVIDER_WIRES[wire].request(request, Endpoint("http://v")).content)
    reply = ReplyPlan(pieces=4, reasoning=True, tools=("lookup",), pieces_per_read=3)
    script = make_script(wire, AnswerPlan(reply=reply, close_delimited=True), asked, "x", "")
    sent = b"".join(data for _, data in script.sends)
    start = sent.index(b"\r\n\r\n") + 4
    decoder, whole_at = PROVIDER_WIRES[wire].decoder(), []
    for end in range(start + 1, len(sent) + 1):
        pieces: list[Piece] = []
        decoder.feed(sent[end - 1 : end], pieces)
        if any(isinstance(piece, TextPiece | ReasoningPiece | ToolCallPiece) for piece in pieces):
            whole_at.append(end)
    assert list(script.content_ends) == whole_at
    chunked = make_script(wire, AnswerPlan(reply=reply), asked, "x", "")
    sent = b"".join(data for _, data in chunked.sends)
    assert len(chunked.content_ends) == len(whole_at)
    assert {sent[end - 3 : end] for end in chunked.content_ends} == {b"}\n\n"}


def test_example_arguments_fit_every_kind_of_schema() -> None:
    properties = {
        "a": {"type": "integer", "minimum": 3},
        "b": {"type": "boolean"},
        "c": {"type": "array"},
        "d": {"type": "object", "properties": {"e": {"type": "number"}}, "required": ["e"]},
        "f": {"enum": ["x", "y"]},
        "g": {"type": "string"},
    }
    tool = ToolSpec("t", "", {"type": "object", "properties": properties, "required": ["a", "b", "c", "d", "f"]})
    request = ModelRequest((Message("user", "hi"),), "m", tools=(tool,))
    asked = read_request("openai", ChatWire().request(request, Endpoint("http://v")).content)
    script = make_script("openai", AnswerPlan(reply=ReplyPlan(tools=("t",), pieces=1)), asked, "x", "")
    pieces: list[Piece] = []
    ChatWire().decoder().feed(b"".join(_unchunked(data) for _, data in script.sends), pieces)
    ((_, arguments),) = called(pieces)
    assert msgspec.json.decode(arguments) == {"a": 3, "b": True, "c": [], "d": {"e": 1}, "f": "x"}


def _unchunked(data: bytes) -> bytes:
    """The events in what was sent, whatever the framing around them."""
    return b"".join(line + b"\n\n" for line in data.split(b"\n") if line.startswith(b"data: "))
