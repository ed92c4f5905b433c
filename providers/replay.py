"""The mock provider: replays a recording, every read at its recorded nanosecond offset from the request."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count, takewhile

import trio

from engine.errors import ProviderError
from engine.pieces import Emit, RequestSentPiece
from engine.provider import ModelRequest

from .recording import Recording, load, names


class ReplayProvider:
    """Answers from recordings instead of a model; any number of requests at once, nothing to close.

    ``recordings`` are what every request gets; without any, ``request.model`` names one of the packaged recordings,
    which are all loaded here, so that nothing reads files while it replays. An agent that calls tools asks several
    times for one answer: step 2 of a turn gets the second recording, or the packaged one named ``…-step-2``, and so
    on; where there is none for a step, the first. ``speed`` divides the offsets: 2.0 is twice as fast as recorded,
    ``math.inf`` as fast as it goes.

    Raises:
        ValueError: ``speed`` is not above 0.
        RecordingError: a packaged recording is not valid.
    """

    name = "replay"

    def __init__(self, *recordings: Recording, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed}")
        self.recordings = recordings
        self._packaged = {} if recordings else {name: load(name) for name in names()}
        self._ns_per_second = 1e9 * speed

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        """Say at once that the request is sent, then emit each read's pieces in one call when its time has come.

        A read is due at ``start + at_ns / 1e9``, always counted from the start: a late one makes no other late.

        Raises:
            ProviderError: ``upstream.invalid_request`` if there is no such recording; the recorded failure, at its
                time, if the recorded answer failed.
        """
        start = trio.current_time()
        recording = self._find(request)
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

    def _find(self, request: ModelRequest) -> Recording:
        step = steps_taken(request)
        if self.recordings:
            return self.recordings[step if step < len(self.recordings) else 0]
        recording = self._packaged.get(request.model)
        if recording is None:
            there_are = ", ".join(self._packaged)
            message = f"no recording is named {request.model!r}; there are: {there_are}"
            raise ProviderError("upstream.invalid_request", message)
        return self._packaged.get(step_name(request.model, step), recording)


def step_name(name: str, step: int) -> str:
    """What the recording of that step, from 0, is called."""
    return f"{name}-step-{step + 1}" if step else name


def step_names(name: str, known: Container[str]) -> Iterator[str]:
    """The recording's name and those of its further steps, as many as are known."""
    return takewhile(known.__contains__, (step_name(name, step) for step in count()))


def steps_taken(request: ModelRequest) -> int:
    """How many steps of the turn under way the request already holds: assistant messages after the user's last."""
    steps = 0
    for message in reversed(request.messages):
        if message.role == "user":
            break
        steps += message.role == "assistant"
    return steps
