"""A mock of the vendors' APIs: answers their clients with recordings, in the vendors' bytes and the recordings' timing.

No engine and no model: a request picks a recording, and its reads are sent when they are due, counted from the
request's arrival, so that a late one makes no other late. What the vendors' formats are is ``providers.encoders``'.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any

import msgspec
import trio
from quart import Request, Response, request
from quart.wrappers.response import ResponseBody
from quart_trio import QuartTrio

from engine.errors import ProviderErrorCode
from providers.encoders import (
    MOCKED_VENDORS,
    AnswerFacts,
    KeyPlace,
    MockedVendor,
    answer_facts,
    encoded_reads,
    raw_reads,
    speaks,
    whole_answer,
)
from providers.recording import Recording, load, names

from .errors import install_error_handlers, json_response
from .requests import BODY_SECONDS, MAX_BODY_BYTES

STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class RefusedError(Exception):
    """A request that the vendor would refuse, whoever asked is at fault; answered in the vendor's own shape."""

    def __init__(self, code: ProviderErrorCode, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class Library:
    """The recordings to answer with: packaged ones by name, and the one for every other model, if there is one."""

    def __init__(self, default: Recording | None = None) -> None:
        self._default = default
        self._by_name = {name: load(name) for name in names()}
        if default is not None:
            self._by_name[default.header.name] = default

    @property
    def models(self) -> tuple[str, ...]:
        """The names that pick a recording."""
        return tuple(self._by_name)

    def find(self, model: str) -> Recording:
        """The recording for this model.

        Raises:
            RefusedError: there is none of that name, and none for all others.
        """
        recording = self._by_name.get(model, self._default)
        if recording is None:
            there_are = ", ".join(self._by_name)
            raise RefusedError("upstream.invalid_request", f"there is no model {model[:100]!r}, only {there_are}", 404)
        return recording


class TimedBody(ResponseBody):
    """Parts of a body, each sent when it is due; a client that leaves ends its own alone.

    Args:
        parts: when each part is due, in nanoseconds from ``started_at``, and its bytes; empty ones are waited for.
        started_at: the request's arrival on trio's clock.
    """

    def __init__(self, parts: Iterator[tuple[int, bytes]], started_at: float) -> None:
        self._parts = parts
        self._started_at = started_at

    async def __aenter__(self) -> TimedBody:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for at_ns, part in self._parts:
            await trio.sleep_until(self._started_at + at_ns / 1e9)
            if part:
                return part
        raise StopAsyncIteration


def create_vendor_app(
    recording: Recording | None = None, providers: Collection[str] = tuple(MOCKED_VENDORS)
) -> QuartTrio:
    """The app that mocks these providers' APIs, each on its vendor's own paths.

    ``recording`` answers every model that is not the name of a packaged recording. Where vendors share a path, the
    first of the table that is served here has it, and keys of all of them are taken.

    Raises:
        KeyError: a provider that has no API to mock.
        RecordingError: a packaged recording is not valid.
    """
    library = Library(recording)
    app = QuartTrio("vendors", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 16 * MAX_BODY_BYTES
    app.config["BODY_TIMEOUT"] = BODY_SECONDS
    install_error_handlers(app)
    served = {name: MOCKED_VENDORS[name] for name in providers}
    ordered = [vendor for name, vendor in MOCKED_VENDORS.items() if name in served]
    places: dict[str, set[KeyPlace]] = {}
    for vendor in ordered:
        for path in vendor.paths:
            places.setdefault(path, set()).update(vendor.key_places)
    answer_ids = (f"lumos{number:08}" for number in itertools.count(1))
    for path, keys in places.items():
        vendor = next(vendor for vendor in ordered if path in vendor.paths)
        _add_path(app, path, _Mock(vendor, keys if vendor.key_places else set(), library, answer_ids))
    if "openai" in served:
        _add_model_list(app, library)
    return app


def _add_path(app: QuartTrio, path: str, mock: _Mock) -> None:
    async def answer(model: str = "", **_: str) -> Response:
        return await mock.answer(request, model)

    app.add_url_rule(path, endpoint=path, view_func=answer, methods=["POST"])


def _add_model_list(app: QuartTrio, library: Library) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        if not _has_key(request, {"bearer token"}):
            return _refusal(MOCKED_VENDORS["openai"], RefusedError("upstream.auth", "send a key as a bearer token"))
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "lumos"} for name in library.models]
        return json_response({"object": "list", "data": data})


class _Mock:
    """One vendor on one of its paths."""

    def __init__(
        self, vendor: MockedVendor, key_places: Collection[KeyPlace], library: Library, answer_ids: Iterator[str]
    ) -> None:
        self._vendor = vendor
        self._key_places = key_places
        self._library = library
        self._answer_ids = answer_ids

    async def answer(self, asked: Request, model_in_path: str) -> Response:
        """Answer a request, which arrives now."""
        started_at = trio.current_time()
        try:
            if self._key_places and not _has_key(asked, self._key_places):
                raise RefusedError("upstream.auth", f"no key: send one as {' or '.join(sorted(self._key_places))}")
            body = _decode_body(await asked.get_data(cache=False))
            model = _model(body, model_in_path)
            recording = self._library.find(model)
            facts = self._facts(recording, body, model)
            if not self._vendor.format.streams(body):
                return await self._answer_whole(recording, facts, started_at)
            return await self._answer_stream(recording, facts, started_at)
        except RefusedError as refusal:
            return _refusal(self._vendor, refusal)

    def _facts(self, recording: Recording, body: Mapping[str, Any], model: str) -> AnswerFacts:
        """The day of the recording stands for the clock: the same request gets the same answer."""
        pieces = [piece for read in recording.reads for piece in read.pieces]
        day = datetime.datetime.combine(recording.header.recorded, datetime.time(), datetime.UTC)
        told = {"answer_id": next(self._answer_ids), "model": model, "created": int(day.timestamp())}
        return answer_facts(pieces, **told, **self._vendor.format.facts(body))

    async def _answer_stream(self, recording: Recording, facts: AnswerFacts, started_at: float) -> Response:
        await _wait_failure_without_answer(recording, started_at)
        encoder = self._vendor.format.encoder(facts)
        if recording.has_raw and speaks(recording.header.provider, self._vendor.format):
            parts = raw_reads(recording)
        else:
            parts = encoded_reads(encoder, recording)
        response = Response(TimedBody(parts, started_at), content_type=encoder.content_type, headers=STREAM_HEADERS)
        response.timeout = None
        return response

    async def _answer_whole(self, recording: Recording, facts: AnswerFacts, started_at: float) -> Response:
        """The answer as one body once its last read is due.

        Raises:
            RefusedError: the recorded failure, or streams are all that is served in this format.
        """
        make_body = self._vendor.format.whole
        if make_body is None:
            raise RefusedError("upstream.invalid_request", "this mock serves streams alone: ask for one")
        failure = recording.header.failure
        if failure is not None:
            await trio.sleep_until(started_at + failure.at_ns / 1e9)
            raise RefusedError(failure.code, failure.message)
        await trio.sleep_until(started_at + recording.duration_ns / 1e9)
        return json_response(make_body(whole_answer(recording), facts))


async def _wait_failure_without_answer(recording: Recording, started_at: float) -> None:
    """Raise RefusedError, at its time, if the recorded answer failed before it said anything."""
    failure = recording.header.failure
    if failure is not None and not recording.reads:
        await trio.sleep_until(started_at + failure.at_ns / 1e9)
        raise RefusedError(failure.code, failure.message)


def _refusal(vendor: MockedVendor, refusal: RefusedError) -> Response:
    body = vendor.format.error_body(refusal.code, str(refusal))
    return json_response(body, refusal.status or vendor.format.status(refusal.code))


def _decode_body(data: bytes | str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("upstream.invalid_request", f"the body is no JSON object: {error}") from error


def _model(body: Mapping[str, Any], model_in_path: str) -> str:
    model = model_in_path.removeprefix("models/") or body.get("model")
    if not isinstance(model, str) or not model:
        raise RefusedError("upstream.invalid_request", "the request names no model")
    return model


def _has_key(asked: Request, places: Collection[KeyPlace]) -> bool:
    return any(_key_at(asked, place) for place in places)


def _key_at(asked: Request, place: KeyPlace) -> str:
    match place:
        case "bearer token":
            scheme, _, key = asked.headers.get("Authorization", "").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else ""
        case "?key" | "?access_token":
            return asked.args.get(place.removeprefix("?"), "")
    return asked.headers.get(place, "")
