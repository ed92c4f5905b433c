"""What clients send: the bodies as types, read strictly and within bounds before anything is started."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from engine import BasicAgent, DeadlineTooLongError, DeadlineWish, RunOptions, RunSpec, StreamingConfig
from engine.agent import DEFAULT_SESSION

from .asked import Asked
from .errors import ApiError
from .json_depth import nesting_fault
from .principal import NAME

JSON_MEDIA_TYPE = "application/json"
MAX_BODY_BYTES = 2**20
MAX_MESSAGE_CHARS = 200_000
BODY_SECONDS = 20
SESSION_ID = r"[A-Za-z0-9._:-]{1,100}"

_SESSION_ID = re.compile(SESSION_ID)
_PLACE = re.compile(r" - at `\$\.([^`]+)`$")

UserId: TypeAlias = Annotated[str, Meta(pattern=f"^{NAME}$")]
OnDisconnect: TypeAlias = Literal["cancel", "grace", "continue"]

Body = TypeVar("Body")


class StreamWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request wants its events cut; None leaves the agent's setting (``engine.StreamingConfig``)."""

    text_buffer_size: Annotated[int, Meta(ge=1, le=65536)] | None = None
    emit_metadata: bool | None = None
    emit_memory_updates: bool | None = None
    text_delta_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None

    def applied_to(self, config: StreamingConfig) -> StreamingConfig:
        """The agent's configuration with what the request sets."""
        if self == _NO_WISH:
            return config
        wished = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(config, **wished)


_NO_WISH = StreamWish()


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message to an agent.

    Attributes:
        message: the user's text, not blank.
        user_id: whom the message is from: yourself, or as an admin any user of the tenant.
        session_id: messages of one session are one conversation.
        metadata: the caller's own; taken, and not kept.
        on_disconnect: what becomes of the run when its last reader leaves: ended at once, after the server's grace
            (the default), or not at all.
        deadlines: seconds; may be shorter than the agent's, never longer.
    """

    message: str
    user_id: UserId | None = None
    session_id: Annotated[str, Meta(pattern=f"^{SESSION_ID}$")] | None = None
    metadata: dict[str, Any] | None = None
    on_disconnect: OnDisconnect = "grace"
    deadlines: DeadlineWish | None = None
    stream: StreamWish = _NO_WISH

    @property
    def session(self) -> str:
        """The session that the message belongs to."""
        return self.session_id or DEFAULT_SESSION

    def check(self) -> None:
        """Refuse what no agent could be asked.

        Raises:
            ApiError: 413 or 422, naming the field.
        """
        if not self.message.strip():
            raise ApiError(422, "VALIDATION_ERROR", "message is blank", {"field": "message"})
        if self.session_id and not _SESSION_ID.fullmatch(self.session_id):  # the pattern lets a last newline through
            raise ApiError(422, "VALIDATION_ERROR", "session_id ends with a newline", {"field": "session_id"})
        if len(self.message) > MAX_MESSAGE_CHARS:
            raise ApiError(413, "PAYLOAD_TOO_LARGE", f"message is over {MAX_MESSAGE_CHARS} characters")

    def run_spec(self, agent: BasicAgent, resume_grace: float) -> RunSpec:
        """The run that this request asks for.

        Raises:
            ApiError: as ``check``; 422 for a deadline longer than the agent's.
        """
        self.check()
        graces: dict[OnDisconnect, float] = {"cancel": 0.0, "grace": resume_grace, "continue": inf}
        options = RunOptions(
            deadlines=self.deadlines,
            streaming=self.stream.applied_to(agent.streaming),
            resume_grace=graces[self.on_disconnect],
            session_id=self.session,
        )
        try:
            return agent.run_spec(self.message, options)
        except DeadlineTooLongError as error:
            details = {"field": f"deadlines.{error.name}", "allowed": error.allowed}
            raise ApiError(422, "VALIDATION_ERROR", str(error), details) from error


async def read_json(request: Asked, kind: type[Body], media_types: Sequence[str] = (JSON_MEDIA_TYPE,)) -> Body:
    """The request's body, of one of these content types, as that type. Quart bounds its size and time (413, 408).

    Of a field that is there twice the last one counts; nothing before or behind us reads the same bytes otherwise.

    Raises:
        ApiError: 415 for another content type, 400 for what is no JSON or nests too deep, 422 for JSON of another
                shape.
    """
    if request.mimetype not in media_types:
        raise ApiError(415, "UNSUPPORTED_MEDIA_TYPE", f"send the body as Content-Type: {media_types[0]}")
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes), "no text was asked for"
    if fault := nesting_fault(body):
        raise ApiError(400, "INVALID_JSON", f"the body {fault}")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(422, "VALIDATION_ERROR", str(error), _place(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "INVALID_JSON", f"the body is not valid JSON: {error}") from error


def _place(fault: str) -> dict[str, str] | None:
    """The field that msgspec's text ends with, as details; None for the whole body."""
    match = _PLACE.search(fault)
    return None if match is None else {"field": match[1]}
