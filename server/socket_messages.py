"""What is said on a WebSocket, both ways: one JSON object a message, its ``type`` says which."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engine.log import LogEntry

from .errors import ApiError
from .json_depth import nesting_fault
from .requests import ChatRequest
from .store.rows import RunStatus

RequestId: TypeAlias = Annotated[str, Meta(min_length=1, max_length=100)]
RunId: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Common of what clients say.

    Attributes:
        request_id: the client's own name for this, which the answer repeats.
    """

    request_id: RequestId | None = None


class Start(ChatRequest, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="start"):
    """Start a run and subscribe to it from its first event, or join the one that the key stands for.

    Attributes:
        request_id: the client's own name for this, which the answer repeats.
        idempotency_key: as the header of that name; not of its pattern, which is refused with a code of its own.
        after: the number of the last event that the client has of the run that it joins.
    """

    request_id: RequestId
    agent_id: str
    idempotency_key: str | None = None
    after: Annotated[int, Meta(ge=0)] = 0

    @property
    def chat(self) -> ChatRequest:
        """The same as the body of a POST."""
        return ChatRequest(**{name: getattr(self, name) for name in ChatRequest.__struct_fields__})


class Subscribe(_Said, frozen=True, kw_only=True, tag="subscribe"):
    """Send the run's events after number ``after``, then live."""

    run_id: RunId
    after: Annotated[int, Meta(ge=0)] = 0


class Unsubscribe(_Said, frozen=True, kw_only=True, tag="unsubscribe"):
    """Send no more of the run's events; as a reader that leaves."""

    run_id: RunId


class Stop(_Said, frozen=True, kw_only=True, tag="stop"):
    """Stop the run, keeping what it has said."""

    run_id: RunId


class Ping(_Said, frozen=True, kw_only=True, tag="ping"):
    """Answer with the same data."""

    data: Annotated[str, Meta(max_length=1000)] | None = None


ClientMessage: TypeAlias = Start | Subscribe | Unsubscribe | Stop | Ping


class _Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Common of what the server says.

    Attributes:
        request_id: that of the message that this answers, if it had one.
    """

    request_id: str | None = None


class Started(_Answer, frozen=True, kw_only=True, tag="started"):
    """The run has begun, or was joined; its events after that number follow."""

    run_id: str
    session_id: str
    after: int = 0


class Subscribed(_Answer, frozen=True, kw_only=True, tag="subscribed"):
    """The run's events after that number follow."""

    run_id: str
    after: int


class Unsubscribed(_Answer, frozen=True, kw_only=True, tag="unsubscribed"):
    """No event of the run follows."""

    run_id: str


class Stopped(_Answer, frozen=True, kw_only=True, tag="stopped"):
    """The run has ended: by this, or before."""

    run_id: str
    status: RunStatus


class Pong(_Answer, frozen=True, kw_only=True, tag="pong"):
    """The answer to a ping."""

    data: str | None = None


class Refused(_Answer, frozen=True, kw_only=True, tag="error"):
    """What was asked for was not done; the socket stays. ``code`` and ``details`` are those of HTTP.

    Attributes:
        retry_after: seconds after which to try again.
    """

    code: str
    message: str
    details: Any = None
    run_id: str | None = None
    retry_after: int | None = None


class End(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="end"):
    """The run's terminal event was sent, and all before it; it is no longer subscribed."""

    run_id: str


ServerMessage: TypeAlias = Started | Subscribed | Unsubscribed | Stopped | Pong | Refused | End


class _Named(msgspec.Struct, frozen=True):
    """What of a message that makes no sense may still tell which it was."""

    request_id: RequestId | None = None
    run_id: RunId | None = None


_decode = msgspec.json.Decoder(ClientMessage).decode
_decode_named = msgspec.json.Decoder(_Named).decode
_encode = msgspec.json.Encoder().encode


def parse(message: object) -> ClientMessage:
    """What the client said.

    Raises:
        ApiError: 400 or 422, it makes no sense.
    """
    if not isinstance(message, str):
        raise ApiError(400, "INVALID_JSON", "send text messages with JSON, not binary ones")
    body = message.encode()
    if fault := nesting_fault(body):
        raise ApiError(400, "INVALID_JSON", f"the message {fault}")
    try:
        parsed: ClientMessage = _decode(body)
    except msgspec.ValidationError as error:
        raise ApiError(422, "VALIDATION_ERROR", str(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, "INVALID_JSON", f"the message is not valid JSON: {error}") from error
    return parsed


def refused(error: ApiError, message: object) -> Refused:
    """The error as an answer to a message that makes no sense, naming what it was about if that can be told."""
    try:
        named = _decode_named(message) if isinstance(message, str) else _Named()
    except (msgspec.DecodeError, RecursionError):
        named = _Named()
    return _refusal(error, named.request_id, named.run_id)


def refused_start(error: ApiError, said: Start) -> Refused:
    """The error as the answer to a start."""
    return _refusal(error, said.request_id)


def refused_run(error: ApiError, said: Subscribe | Unsubscribe | Stop | Ping) -> Refused:
    """The error as the answer to what was said of a run."""
    return _refusal(error, said.request_id, getattr(said, "run_id", None))


def broken_off(error: ApiError, run_id: str) -> Refused:
    """The error for which the run's events are not read on."""
    return _refusal(error, None, run_id)


def _refusal(error: ApiError, request_id: str | None, run_id: str | None = None) -> Refused:
    seconds = error.headers.get("Retry-After")
    return Refused(
        code=error.code,
        message=error.message,
        details=error.details,
        request_id=request_id,
        run_id=run_id,
        retry_after=None if seconds is None else int(seconds),
    )


def encode(message: ServerMessage) -> str:
    """The message as it is sent."""
    return _encode(message).decode()


def encode_event(run_id: str, entry: LogEntry) -> str:
    """The event as a message, around the JSON that its frame has: it is encoded once for all readers."""
    event = entry.frame.partition(b"data: ")[2].removesuffix(b"\n\n").decode()
    return f'{{"type":"event","run_id":"{run_id}","seq":{entry.seq},"event":{event}}}'
