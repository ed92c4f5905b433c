"""Tries arms: each streams one answer of a small upstream, and runs one agent with two tools where it can."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from .arms import Arm, Request, RunningArm, started
from .environments import EnvironmentFailedError
from .process import ServerFailedError

TEXTS = ("one ", "two ", "th\u00adree \u4e09 ", 'fo"ur\n', "five")
ANSWER_SECONDS = 30.0
TOOLS_MODEL = "tools-2"
MODEL = "five-words"
_CALLS = (("calculator", '{"expression": "24 * 60"}'), ("current_time", "{}"))
_FAILURES = (ServerFailedError, EnvironmentFailedError, OSError, http.client.HTTPException, AssertionError)


class SmallUpstream(ThreadingHTTPServer):
    """Says ``TEXTS`` to everybody; of ``TOOLS_MODEL`` first calls two tools. ``asked`` holds the requests' bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, object]] = []

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallUpstream

    def do_POST(self) -> None:
        request = msgspec.json.decode(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        calls = request["model"] == TOOLS_MODEL and request["messages"][-1]["role"] != "tool"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for delta in _tool_deltas(len(self.server.asked)) if calls else _text_deltas():
            self._send(_chunk([{"index": 0, "delta": delta, "finish_reason": None}]))
        reason = "tool_calls" if calls else "stop"
        self._send(_chunk([{"index": 0, "delta": {}, "finish_reason": reason}]))
        self._send(_chunk([]))
        self._send(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, event: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _text_deltas() -> Iterator[dict[str, object]]:
    yield {"role": "assistant", "content": ""}
    for text in TEXTS:
        yield {"content": text}


def _tool_deltas(number: int) -> Iterator[dict[str, object]]:
    """Ids are never repeated: the OpenAI Agents SDK takes calls of one id for one, across a session."""
    yield {"role": "assistant", "content": None}
    for index, (name, arguments) in enumerate(_CALLS):
        call_id = f"call_{number}_{index}"
        function = {"name": name, "arguments": arguments}
        yield {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}


def _chunk(choices: Sequence[object]) -> bytes:
    usage = None if choices else {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    chunk = {"id": "c-1", "object": "chat.completion.chunk", "created": 1_760_000_000, "model": MODEL}
    return b"data: " + msgspec.json.encode({**chunk, "choices": choices, "usage": usage}) + b"\n\n"


@contextmanager
def small_upstream() -> Iterator[SmallUpstream]:
    """It serves until the end of the block."""
    with SmallUpstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, request: Request, end_marker: bytes) -> bytes:
    """The body of a whole answer.

    Raises:
        AssertionError: it is no stream of events, or it does not end as it should.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    assert response.status == http.HTTPStatus.OK, f"HTTP {response.status}: {body[:500]!r}"
    assert response.headers.get_content_type() == "text/event-stream", response.headers.get_content_type()
    assert end_marker in body, f"no end: {body[-500:]!r}"
    return body


def hear(running: RunningArm, model: str, *, session: str = "", agent: bool = False) -> str:
    """The text of an arm's whole answer.

    Raises:
        AssertionError: as ``ask``.
    """
    arm = running.arm
    request = arm.request(model, "hi", headers=running.headers, session=session, agent=agent)
    return text_of(arm, ask(running.process.port, request, arm.end_marker))


def text_of(arm: Arm, stream: bytes) -> str:
    """The text in an arm's events."""
    pieces = stream.split(arm.text_marker)[1:]
    return "".join(msgspec.json.decode(b'"' + _until_quote(piece)) for piece in pieces)


def _until_quote(piece: bytes) -> bytes:
    """Up to the quote that ends the string, and with it."""
    end = piece.index(b'"')
    while (end - len(piece[:end].rstrip(b"\\"))) % 2:
        end = piece.index(b'"', end + 1)
    return piece[: end + 1]


def try_out(running: RunningArm, upstream: SmallUpstream) -> str:
    """Have a running arm chat, and where it can run an agent twice in one session; what it did, in words.

    Raises:
        AssertionError: it did not say what the upstream said, or the agent did not use its tools or its memory.
    """
    said = hear(running, MODEL)
    assert said == "".join(TEXTS), f"it said {said!r}"
    if not running.arm.agent_path:
        return "chat"
    for _ in range(2):
        said = hear(running, TOOLS_MODEL, session="s-1", agent=True)
        assert said == "".join(TEXTS), f"the agent said {said!r}"
    messages = upstream.asked[-1]["messages"]
    assert isinstance(messages, list)
    roles = [message["role"] for message in messages if message["role"] != "system"]
    once = ["user", "assistant", "tool", "tool"]
    assert roles == [*once, "assistant", *once], f"the upstream was shown {roles}"
    return "chat, tools, memory"


def smoke(arm: Arm) -> str:
    """Start the arm, try it out and stop it; what it did and cost, in words.

    Raises:
        AssertionError: as ``try_out``; or it did not end by itself.
    """
    with small_upstream() as upstream, started(arm, upstream.url, (MODEL, TOOLS_MODEL)) as running:
        done = try_out(running, upstream)
        cost = running.process.cost()
        ended = running.process.stop()
        assert not ended.killed, f"{ended.killed} processes had to be killed"
    megabytes, start = cost.pss_bytes / 2**20, running.process.start_seconds
    return f"{done}; start {start:.2f} s, {megabytes:.0f} MiB, {cost.processes} process"


def smoke_table(arms: Sequence[Arm]) -> bool:
    """Print a line for each arm as it is tried; whether all did well."""
    well = True
    print("| arm | versions | ok |\n|---|---|---|")
    for arm in arms:
        try:
            told = "yes: " + smoke(arm)
        except _FAILURES as failure:
            well, told = False, f"NO: {type(failure).__name__}: {failure}"
        versions = ", ".join(f"{name} {number}" for name, number in arm.versions().items())
        print(f"| {arm.name} | {versions} | {told} |", flush=True)
    return well
