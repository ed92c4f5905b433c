"""The buffered emitter in front of the log: gathers text, and seals it into one delta at the moment a reader takes it.

One upstream read becomes one event and one write; a reader that was busy finds one larger delta instead of many small
ones, so the size of the pieces follows the network by itself. A reader's own wait carries the flush limit: there is no
timer task.
"""

from __future__ import annotations

from math import inf
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from .errors import OutputLimitError
from .events import TERMINAL_EVENT_TYPES, Event, ReasoningDelta, StepComplete, TextDelta
from .log import RunLog

UNREAD_SEAL_BYTES = 4096
"""With no reader attached, text is sealed in deltas of about this size (bytes in the frame)."""

BUSY_SEAL_BYTES = 65_536
"""While all readers are busy, text is sealed in deltas of about this size."""

MAX_SHORT_CHARS = 1000

MAX_DEPTH = 100
"""Of a value in a frame. Deeper JSON goes as its text."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

STEP_GAP = "\n\n"
"""What keeps the texts of two steps apart in the answer; the model is not sent it."""

CLOSING_BYTES = 32_768
"""What may come on top of a run's limit: the last delta's envelope, and all of the closing but the answer."""


class StreamingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run's events are cut and which are sent.

    Attributes:
        text_buffer_size: characters (code points) that wake a waiting reader; the first delta never waits for them.
        flush_after: seconds after which fewer characters wake it too.
        emit_metadata: whether ``metadata`` events (run id, streaming mode) are sent.
        emit_memory_updates: whether ``memory_update`` events are sent.
        text_delta_delay_ms: the least time between two deltas, in milliseconds: an aid for demonstrations.
    """

    text_buffer_size: Annotated[int, Meta(ge=1, le=65536)] = 1
    flush_after: Annotated[float, Meta(ge=0, le=10)] = 0.05
    emit_metadata: bool = False
    emit_memory_updates: bool = False
    text_delta_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None

    def __post_init__(self) -> None:
        if not self.text_buffer_size >= 1:
            raise ValueError("text_buffer_size is at least 1")
        if not self.flush_after >= 0:
            raise ValueError("flush_after is a number of seconds, at least 0")
        if self.text_delta_delay_ms is not None and not self.text_delta_delay_ms >= 0:
            raise ValueError("text_delta_delay_ms is a number of milliseconds, at least 0")


class Emitter:
    """The only writer of one run's log. Every method is synchronous and never blocks.

    After the terminal event it drops what still comes: whoever ends the run first wins.

    Who knows the time already, gives it as ``now``.

    The frames of the log are never more than ``2 * max_run_bytes + CLOSING_BYTES``: what the limit lets through, the
    terminal event that repeats the answer, and what else closes the run, which is short (``Run`` sees to it).

    Attributes:
        log: where the events go; who emits several in one stretch holds it.
    """

    def __init__(self, log: RunLog, config: StreamingConfig, max_run_bytes: int) -> None:
        self.log = log
        self._config = config
        self._max_run_bytes = max_run_bytes
        self._said: list[str] = []
        self._kind: type[TextDelta | ReasoningDelta] = TextDelta
        self._step_id = ""
        self._gathered: list[str] = []
        self._gathered_chars = 0
        self._gathered_bytes = 0
        self._begun_at = -inf
        self._not_before = -inf
        self._any_sealed = False
        self.due_at = inf
        log.gathering = self

    @property
    def response(self) -> str:
        """The answer's text so far, gathered text included."""
        return "".join(self._said)

    def gap_before(self, content: str) -> str:
        """What keeps a new step's text apart from the answer so far; empty where space is there already."""
        if not self._said or self._said[-1][-1:].isspace() or content[:1].isspace():
            return ""
        return STEP_GAP

    def text(self, content: str, step_id: str, now: float | None = None) -> None:
        """Gather answer text.

        Raises:
            OutputLimitError: the run's log would outgrow its bound; the text is not taken.
        """
        if content and self.log.terminal is None:
            self._said.append(self._gather(TextDelta, content, step_id, now))

    def reasoning(self, content: str, step_id: str) -> None:
        """Gather reasoning text. Raises as ``text`` does."""
        if content and self.log.terminal is None:
            self._gather(ReasoningDelta, content, step_id)

    def emit(self, event: Event) -> None:
        """Append an event that is no text (the terminal one too), after sealing what has gathered.

        Raises:
            OutputLimitError: the run's log is full; what closes the run is taken even then.
        """
        if self.log.terminal is None:
            if self._gathered:
                self._seal()
            self.log.append(event, inf if closes(event) else self._max_run_bytes)

    def forget(self) -> None:
        """Drop the text kept for ``response``: the terminal event has what is still wanted."""
        self._said.clear()

    def _gather(
        self, kind: type[TextDelta | ReasoningDelta], content: str, step_id: str, now: float | None = None
    ) -> str:
        """The text as it was taken."""
        try:
            size = len(_encode_json(content)) - len('""')
        except UnicodeEncodeError:
            content = encodable(content)
            size = json_bytes(content)
        self.check_room(size)
        if kind is not self._kind or step_id != self._step_id:
            if self._gathered:
                self._seal()
            self._kind, self._step_id = kind, step_id
        if not self._gathered:
            self._begun_at = trio.current_time() if now is None else now
        self._gathered.append(content)
        self._gathered_chars += len(content)
        self._gathered_bytes += size
        if self._gathered_bytes >= (BUSY_SEAL_BYTES if self.log.readers else UNREAD_SEAL_BYTES):
            self._seal()
            return content
        enough = not self._any_sealed or self._gathered_chars >= self._config.text_buffer_size
        due_at = max(self._begun_at if enough else self._begun_at + self._config.flush_after, self._not_before)
        if due_at != self.due_at:
            self.due_at = due_at
            self.log.wake()  # a waiting reader takes the text, or sets itself this limit
        return content

    def check_room(self, more_bytes: int) -> None:
        """Refuse what would not fit.

        Raises:
            OutputLimitError: the run's log has no room for so many bytes.
        """
        if self.log.size_bytes + self._gathered_bytes + more_bytes > self._max_run_bytes:
            raise OutputLimitError(f"the run's output is over {self._max_run_bytes} bytes")

    def seal_if_due(self, now: float | None = None) -> None:
        """Turn the gathered text into one delta, if its time has come. Called by the log for its readers."""
        if self._gathered and self.due_at <= (trio.current_time() if now is None else now):
            self._seal()

    def _seal(self) -> None:
        content = "".join(self._gathered)
        self._gathered.clear()
        self._gathered_chars = self._gathered_bytes = 0
        self.due_at = inf
        self._any_sealed = True
        if self._config.text_delta_delay_ms is not None:
            self._not_before = trio.current_time() + self._config.text_delta_delay_ms / 1000
        self.log.append(self._kind(content, self._step_id))


def short(text: str) -> str:
    """What others put into a terminal event (a vendor's words, names), so that it can be encoded and stays small."""
    return encodable(text[:MAX_SHORT_CHARS])


def closes(event: Event) -> bool:
    """Whether the event closes a run: that always fits into its log, over the limit too. All of these are short."""
    return isinstance(event, TERMINAL_EVENT_TYPES) or (isinstance(event, StepComplete) and not event.tool_calls)


def json_bytes(text: str) -> int:
    """How long the text is inside a frame: a control character takes up to six bytes, a quote two."""
    return len(_encode_json(text)) - len('""')


_encode_json = msgspec.json.Encoder().encode


def nests_too_deep(encoded: bytes) -> bool:
    """Whether JSON nests deeper than a frame may (brackets inside its strings count too).

    msgspec's own limit depends on Python's stack at that moment: what could be decoded may fail inside an event.
    """
    depth = 0
    for bracket in encoded.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def encodable(text: str) -> str:
    """The text with lone surrogates (half an emoji from a careless vendor) replaced: a frame is always valid UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
