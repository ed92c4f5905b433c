"""The recorder: exact offsets, nothing silently complete, the inner provider undisturbed."""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine.errors import OutputLimitError, ProviderError
from engine.pieces import Emit, FinishPiece, Piece, RequestSentPiece, TextPiece, UsagePiece
from engine.provider import Message, ModelRequest, Provider
from providers.http import open_client
from providers.openai_chat import OpenAIChatProvider
from providers.recorder import Recorder
from providers.recording import RecordedFailure, RecordedRead, Recording, RecordingError, dumps, load, loads, names
from providers.replay import ReplayProvider
from server.testing.memory_network import MemoryNetwork
from tests.harness.vendor import PLAIN_STREAM_HEAD, Act, play_script, text_event

PACKAGED = {name: load(name) for name in names()}
REPLAY = ReplayProvider()
REQUEST = ModelRequest((Message("system", "Be kind."), Message("user", "Hello?"), Message("assistant", "Hi")), "small")


class Scripted:
    """A provider that runs a function as its answer."""

    name = "scripted"

    def __init__(self, answer: Callable[[Emit], Awaitable[None]]) -> None:
        self._answer = answer
        self.closed = False

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        await self._answer(emit)

    async def aclose(self) -> None:
        self.closed = True


def ignore(pieces: Sequence[Piece]) -> None:
    """An ``emit`` that drops everything."""


def recording_from(recorder: Recorder, *, note: str = "", answer: int = -1) -> Recording:
    """The recorder's answer under some header."""
    return recorder.recording(
        name="taken",
        title="Taken in a test",
        recorded=datetime.date(2026, 11, 22),
        source="a test",
        licence="MIT",
        note=note,
        answer=answer,
    )


@pytest.mark.parametrize("start", [0.0, 1 / 3, 777.777])
@pytest.mark.parametrize("name", PACKAGED)
async def test_recorded_replay_is_the_recording(autojump_clock: MockClock, name: str, start: float) -> None:
    await trio.sleep_until(start)
    recorder = Recorder(REPLAY)
    await recorder.stream(ModelRequest((), name), ignore)
    recording = recording_from(recorder)
    assert recording.reads == PACKAGED[name].reads
    assert recording.header.failure is None
    assert loads(dumps(recording)) == recording


async def test_pieces_pass_unchanged_and_at_once(autojump_clock: MockClock) -> None:
    arrivals: dict[str, list[tuple[float, list[Piece]]]] = {"direct": [], "recorded": []}

    async def note(key: str, provider: Provider) -> None:
        def emit(pieces: Sequence[Piece]) -> None:
            arrivals[key].append((trio.current_time(), list(pieces)))

        await provider.stream(ModelRequest((), "gpt4o-short"), emit)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(note, "direct", REPLAY)
        nursery.start_soon(note, "recorded", Recorder(REPLAY))
    assert arrivals["recorded"] == arrivals["direct"]


async def test_header_tells_of_the_request(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit([RequestSentPiece()])
        await trio.sleep(0.25)
        emit([TextPiece("Hi.")])
        emit([FinishPiece("stop"), UsagePiece(9, 1)])

    recorder = Recorder(Scripted(answer))
    await recorder.stream(REQUEST, ignore)
    recording = recording_from(recorder, note="By hand.")
    header = recording.header
    assert (header.provider, header.model, header.prompt, header.note) == ("scripted", "small", "Hello?", "By hand.")
    assert recording.reads == (
        RecordedRead(250_000_000, (TextPiece("Hi."),)),
        RecordedRead(250_000_000, (FinishPiece("stop"), UsagePiece(9, 1))),
    )


async def test_list_that_the_provider_uses_again_is_copied(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        pieces: list[Piece] = []
        for piece in (TextPiece("a"), TextPiece("b"), FinishPiece("stop")):
            pieces[:] = [piece]
            emit(pieces)
        await trio.lowlevel.checkpoint()

    recorder = Recorder(Scripted(answer))
    await recorder.stream(REQUEST, ignore)
    assert recording_from(recorder).text == "ab"


async def test_failed_answer_is_marked_and_fails_again(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        await trio.sleep(1)
        emit([TextPiece("He")])
        await trio.sleep(0.5)
        raise ProviderError("upstream.server", "on fire")

    recorder = Recorder(Scripted(answer))
    with pytest.raises(ProviderError, match="on fire"):
        await recorder.stream(REQUEST, ignore)
    recording = recording_from(recorder, note="By hand.")
    assert recording.header.failure == RecordedFailure(1_500_000_000, "upstream.server", "on fire")
    assert recording.header.note == "By hand. Incomplete: after 1.500 s, upstream.server: on fire."
    assert recording.text == "He"
    with pytest.raises(ProviderError, match="on fire") as caught:
        await ReplayProvider(recording).stream(REQUEST, ignore)
    assert (caught.value.code, trio.current_time()) == ("upstream.server", 3.0)


async def test_cut_answer_is_marked(autojump_clock: MockClock) -> None:
    recorder = Recorder(REPLAY)
    with trio.move_on_after(1.0) as scope:
        await recorder.stream(ModelRequest((), "ollama-llama3"), ignore)
    assert scope.cancelled_caught
    recording = recording_from(recorder)
    whole = PACKAGED["ollama-llama3"].reads
    assert recording.reads == tuple(read for read in whole if read.at_ns <= 1_000_000_000)
    assert recording.header.failure == RecordedFailure(1_000_000_000, "upstream.truncated", "cut off by Cancelled")
    assert recording.header.note == "Incomplete: after 1.000 s, upstream.truncated: cut off by Cancelled."


async def test_answer_cut_before_its_first_token_is_marked(autojump_clock: MockClock) -> None:
    recorder = Recorder(REPLAY)
    with trio.move_on_after(0.1):
        await recorder.stream(ModelRequest((), "ollama-llama3"), ignore)
    recording = recording_from(recorder)
    assert (recording.reads, recording.duration_ns) == ((), 0)
    assert recording.header.failure == RecordedFailure(100_000_000, "upstream.truncated", "cut off by Cancelled")


async def test_answer_that_outgrew_the_run_is_marked(autojump_clock: MockClock) -> None:
    def refuse(pieces: Sequence[Piece]) -> None:
        if any(isinstance(piece, TextPiece) for piece in pieces):
            raise OutputLimitError

    recorder = Recorder(REPLAY)
    with pytest.raises(OutputLimitError):
        await recorder.stream(ModelRequest((), "ollama-llama3"), refuse)
    failure = recording_from(recorder).header.failure
    assert failure == RecordedFailure(319_355_000, "upstream.truncated", "cut off by OutputLimitError")


async def test_end_without_a_finish_piece_is_marked(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit([TextPiece("He")])
        await trio.sleep(2)

    recorder = Recorder(Scripted(answer))
    await recorder.stream(REQUEST, ignore)
    failure = recording_from(recorder).header.failure
    assert failure == RecordedFailure(2_000_000_000, "upstream.truncated", "the stream ended without a finish piece")


async def test_failure_after_the_finish_piece_is_marked(autojump_clock: MockClock) -> None:
    """A vendor's stream that breaks off before its own end mark is truncated, whatever was said before."""

    async def answer(emit: Emit) -> None:
        emit([TextPiece("Hi."), FinishPiece("stop")])
        await trio.lowlevel.checkpoint()
        raise ProviderError("upstream.truncated", "no end mark")

    recorder = Recorder(Scripted(answer))
    with pytest.raises(ProviderError):
        await recorder.stream(REQUEST, ignore)
    assert recording_from(recorder).header.failure == RecordedFailure(0, "upstream.truncated", "no end mark")


async def test_each_of_several_answers_is_kept(autojump_clock: MockClock) -> None:
    recorder = Recorder(REPLAY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.stream, ModelRequest((), "demo-93s"), ignore)
        await trio.sleep(0.1)
        nursery.start_soon(recorder.stream, ModelRequest((), "gpt4o-short"), ignore)
    assert recording_from(recorder, answer=0).reads == PACKAGED["demo-93s"].reads
    assert recording_from(recorder, answer=1).reads == PACKAGED["gpt4o-short"].reads
    assert recording_from(recorder).header.model == "gpt4o-short"
    with pytest.raises(RecordingError, match="there is no answer 2; 2 were recorded"):
        recording_from(recorder, answer=2)


async def test_unfinished_answer_is_no_recording_yet(autojump_clock: MockClock) -> None:
    recorder = Recorder(REPLAY)
    with pytest.raises(RecordingError, match="there is no answer -1; 0 were recorded"):
        recording_from(recorder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.stream, ModelRequest((), "gpt4o-short"), ignore)
        await trio.sleep(0.5)
        with pytest.raises(RecordingError, match="has not ended yet"):
            recording_from(recorder)


async def test_answer_in_no_valid_order_is_refused(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        emit([FinishPiece("stop")])
        emit([TextPiece("PS")])
        await trio.lowlevel.checkpoint()

    recorder = Recorder(Scripted(answer))
    await recorder.stream(REQUEST, ignore)
    with pytest.raises(RecordingError, match="only a usage piece may follow"):
        recording_from(recorder)


async def test_name_and_aclose_are_the_inner_ones(autojump_clock: MockClock) -> None:
    async def answer(emit: Emit) -> None:
        await trio.lowlevel.checkpoint()

    inner = Scripted(answer)
    recorder = Recorder(inner)
    await recorder.aclose()
    assert (recorder.name, inner.closed) == ("scripted", True)


async def test_a_provider_over_http_is_recorded_with_its_bytes_and_its_request(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    script: list[Act] = [
        PLAIN_STREAM_HEAD,
        1.0,
        b": keep-alive\n\n",
        1.0,
        text_event("one ") + text_event("two")[:9],
        0.5,
        text_event("two")[9:] + b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        0.25,
        b"data: [DONE]\n\n",
        "close",
    ]
    client = open_client(network.connect)
    key = "sk-secret-0123456789"
    provider = OpenAIChatProvider(api_key=key, base_url="http://vendor/v1", client=client)
    recorder = Recorder(provider)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play_script, network.listen("vendor", 80), script)
        await recorder.stream(ModelRequest((Message("user", "count"),), "m"), lambda _: None)
        nursery.cancel_scope.cancel()
    await client.aclose()
    recording = recorder.recording(
        name="raw", title="", recorded=datetime.date(2026, 11, 22), source="a test", licence="MIT"
    )
    assert recording.has_raw
    assert [read.at_ns for read in recording.reads] == [1_000_000_000, 2_000_000_000, 2_500_000_000, 2_750_000_000]
    assert b"".join(read.raw or b"" for read in recording.reads) == b"".join(
        act for act in script[1:] if isinstance(act, bytes)
    )
    assert recording.reads[0].pieces == ()
    assert recording.text == "one two"
    assert recording.header.request["messages"] == [{"role": "user", "content": "count"}]
    stored = dumps(recording)
    assert key.encode() not in stored
    assert loads(stored) == recording


async def recorded_over_http(
    key: str, *events: bytes, extra: dict[str, Any] | None = None, prompt: str = "count"
) -> Recorder:
    """A recorder after one answer of these reads, which may be an error."""
    network = MemoryNetwork()
    client = open_client(network.connect)
    recorder = Recorder(OpenAIChatProvider(api_key=key, base_url="http://vendor/v1", client=client))
    script: list[Act] = [PLAIN_STREAM_HEAD]
    for event in events:
        script += [1.0, event]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play_script, network.listen("vendor", 80), [*script, "close"])
        with suppress(ProviderError):
            await recorder.stream(ModelRequest((Message("user", prompt),), "m", extra=extra or {}), ignore)
        nursery.cancel_scope.cancel()
    await client.aclose()
    return recorder


SHORT_KEY = "my/key-77"
QUOTING = b'data: {"error":{"message":"quota of key my/key-77 is used up","type":"insufficient_quota"}}\n\n'
LEFT_OUT = "Without bytes and request, which quote the API key."
STOPPED = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    "reads",
    [
        [QUOTING],
        [QUOTING[:45], QUOTING[45:]],
        [QUOTING[index : index + 1] for index in range(len(QUOTING))],
        [QUOTING.replace(b"/", b"\\/")],
        [QUOTING.replace(b"my/", b"\\u006Dy\\u002f")],
    ],
    ids=["whole", "split", "byte by byte", "escaped slash", "escaped letters"],
)
async def test_bytes_that_quote_the_key_are_left_out(reads: list[bytes], autojump_clock: MockClock) -> None:
    recorder = await recorded_over_http(SHORT_KEY, text_event("hi"), *reads)
    recording = recording_from(recorder, note="By hand.")
    assert recording.reads == (RecordedRead(1_000_000_000, (TextPiece("hi"),)),)
    assert recording.header.request is None
    assert recording.header.note.startswith(f"By hand. {LEFT_OUT} Incomplete: ")
    assert SHORT_KEY.encode() not in dumps(recording)
    assert recording_from(recorder, note="By hand.") == recording


@pytest.mark.parametrize("asked", [{"extra": {"user": SHORT_KEY}}, {"prompt": f"Is {SHORT_KEY} my key?"}])
async def test_a_request_that_quotes_the_key_is_left_out(asked: dict[str, Any], autojump_clock: MockClock) -> None:
    recorder = await recorded_over_http(SHORT_KEY, text_event("hi"), STOPPED, **asked)
    recording = recording_from(recorder)
    assert (recording.text, recording.has_raw, recording.header.request) == ("hi", False, None)
    assert (recording.header.note, recording.header.failure) == (LEFT_OUT, None)
    assert recording.header.prompt == asked.get("prompt", "count").replace(SHORT_KEY, "[removed]")
    assert SHORT_KEY.encode() not in dumps(recording)


@pytest.mark.parametrize("parts", [[f"It is {SHORT_KEY}."], ["It is my/", "key-77."]])
async def test_of_an_answer_that_quotes_the_key_there_is_no_recording(
    parts: list[str], autojump_clock: MockClock
) -> None:
    recorder = await recorded_over_http(SHORT_KEY, *map(text_event, parts), STOPPED)
    for _ in range(2):
        with pytest.raises(RecordingError, match="quotes the API key"):
            recording_from(recorder)


async def test_of_a_tool_call_that_quotes_the_key_there_is_no_recording(autojump_clock: MockClock) -> None:
    call = (
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"%s"}}]}}]}'
    )
    reads = [call % part + b"\n\n" for part in (b"[my/", b"key-77]")]
    recorder = await recorded_over_http(SHORT_KEY, *reads, STOPPED.replace(b'"stop"', b'"tool_calls"'))
    with pytest.raises(RecordingError, match="quotes the API key"):
        recording_from(recorder)


async def test_an_error_is_not_riddled_where_the_key_is_empty(autojump_clock: MockClock) -> None:
    failure = recording_from(await recorded_over_http("", QUOTING)).header.failure
    assert failure is not None
    assert "[removed]" not in failure.message


async def test_a_word_in_place_of_a_key_is_no_secret(autojump_clock: MockClock) -> None:
    recorder = await recorded_over_http("ollama", text_event("I am ollama."), STOPPED)
    assert recording_from(recorder).has_raw
