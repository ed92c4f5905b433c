"""The mock provider: replays a recording, every read at its recorded nanosecond offset from the request."""

from __future__ import annotations

import trio

from engine.errors import ProviderError
from engine.pieces import Emit, RequestSentPiece
from engine.provider import ModelRequest

from .recording import Recording, load, names


class ReplayProvider:
    """Answers from recordings instead of a model; any number of requests at once, nothing to close.

    ``recording`` is what every request gets; without one, ``request.model`` names one of the packaged recordings,
    which are all loaded here, so that nothing reads files while it replays. ``speed`` divides the offsets: 2.0 is
    twice as fast as recorded, ``math.inf`` as fast as it goes.

    Raises:
        ValueError: ``speed`` is not above 0.
        RecordingError: a packaged recording is not valid.
    """

    name = "replay"

    def __init__(self, recording: Recording | None = None, *, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed}")
        self._fixed = recording
        self._packaged = {} if recording is not None else {name: load(name) for name in names()}
        self._ns_per_second = 1e9 * speed

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        """Say at once that the request is sent, then emit each read's pieces in one call when its time has come.

        A read is due at ``start + at_ns / 1e9``, always counted from the start: a late one makes no other late.

        Raises:
            ProviderError: ``upstream.invalid_request`` if there is no such recording; the recorded failure, at its
                time, if the recorded answer failed.
        """
        start = trio.current_time()
        recording = self._find(request.model)
        emit((RequestSentPiece(),))
        for read in recording.reads:
            await trio.sleep_until(start + read.at_ns / self._ns_per_second)
            if read.pieces:
                emit(read.pieces)
        failure = recording.header.failure
        if failure is not None:
            await trio.sleep_until(start + failure.at_ns / self._ns_per_second)
            raise ProviderError(failure.code, failure.message)

    async def aclose(self) -> None:
        """Nothing is kept open between requests."""

    def _find(self, model: str) -> Recording:
        if self._fixed is not None:
            return self._fixed
        try:
            return self._packaged[model]
        except KeyError:
            there_are = ", ".join(self._packaged)
            message = f"no recording is named {model!r}; there are: {there_are}"
            raise ProviderError("upstream.invalid_request", message) from None
