"""Recordings of models' answers: what each upstream read brought, at its nanosecond offset from the request.

The format ``lumos-recording/1`` is JSON Lines in UTF-8. The first line is a `RecordingHeader`; every further line is
a `RecordedRead`, ``{"at_ns": 447740000, "pieces": [{"type": "text", "text": "Hello"}]}``, with the pieces of
``engine.pieces``. Offsets never go back. An answer that came to its end has exactly one ``finish`` piece and nothing
but ``usage`` after it; one that did not says so in the header (``failure``).
"""

from __future__ import annotations

import datetime
import functools
import importlib.resources
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import msgspec

from engine.errors import ProviderErrorCode
from engine.pieces import FinishPiece, Piece, RequestSentPiece, TextPiece, UsagePiece

FORMAT: Literal["lumos-recording/1"] = "lumos-recording/1"

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SUFFIX = ".jsonl"
_PACKAGED = importlib.resources.files("providers") / "recordings"

T = TypeVar("T")


class RecordingError(ValueError):
    """A recording is not valid, or there is none of that name; whoever wrote the file or the name is at fault.

    ``reason`` says what is wrong, ``line`` where (from 1; None if it is no single line), ``origin`` in which file.
    """

    def __init__(self, reason: str, *, line: int | None = None, origin: str | None = None) -> None:
        where = [origin] if origin else []
        if line is not None:
            where.append(f"line {line}")
        super().__init__(": ".join([", ".join(where), reason] if where else [reason]))
        self.reason = reason
        self.line = line
        self.origin = origin


class RecordedFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an answer ended that did not come to its end.

    ``at_ns`` is nanoseconds from the request, not before the last read; ``code`` and ``message`` are those of the
    ``ProviderError``, ``upstream.truncated`` where the recording itself was cut.
    """

    at_ns: int
    code: ProviderErrorCode
    message: str


class RecordingHeader(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """The first line: what was recorded, where it comes from and under which terms.

    ``name`` is lower-case words joined by hyphens and, for a packaged recording, the file's stem. ``title`` is for
    people. ``provider`` and ``model`` are who answered; raw bytes are in that provider's wire format. ``request`` is
    the body that was sent, if it was recorded. ``recorded`` is the day of the recording. ``source`` and
    ``licence`` travel with the data. ``prompt`` is what the model was asked. ``note`` tells what was changed or is
    missing. ``failure`` is None for a complete answer.
    """

    format: Literal["lumos-recording/1"]
    name: str
    title: str
    provider: str
    model: str
    recorded: datetime.date
    source: str
    licence: str
    prompt: str
    note: str = ""
    request: Any = None
    failure: RecordedFailure | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecordingError(f"the name {self.name!r} is not lower-case words joined by hyphens", line=1)


class RecordedRead(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one upstream read brought, ``at_ns`` nanoseconds after the request.

    ``pieces`` is what the bytes meant, ``raw`` (base64 in the file) the bytes themselves, where they were recorded. A
    read without raw bytes has at least one piece; one with them may have none (keep-alives, half an event).
    """

    at_ns: int
    pieces: tuple[Piece, ...] = ()
    raw: bytes | None = None


class Recording(msgspec.Struct, frozen=True):
    """One recorded answer, valid by construction.

    Raises:
        RecordingError: on construction, if the reads break a rule of the format; ``line`` is that of the file.
    """

    header: RecordingHeader
    reads: tuple[RecordedRead, ...]

    def __post_init__(self) -> None:
        _check_offsets(self)
        _check_pieces(self)

    @property
    def text(self) -> str:
        """The whole answer text."""
        return "".join(piece.text for _, piece in _pieces(self) if isinstance(piece, TextPiece))

    @property
    def has_raw(self) -> bool:
        """Whether every read has the vendor's own bytes."""
        return bool(self.reads) and all(read.raw is not None for read in self.reads)

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from the request to the last read."""
        return self.reads[-1].at_ns if self.reads else 0


def _pieces(recording: Recording) -> Iterator[tuple[int, Piece]]:
    """All pieces with the number of their line in the file."""
    for line, read in enumerate(recording.reads, 2):
        for piece in read.pieces:
            yield line, piece


def _check_offsets(recording: Recording) -> None:
    before = 0
    for line, read in enumerate(recording.reads, 2):
        if read.at_ns < before:
            raise RecordingError(f"at_ns goes back from {before} to {read.at_ns}", line=line)
        if not read.pieces and not read.raw:
            raise RecordingError("a read without pieces: leave it out", line=line)
        before = read.at_ns
    failure = recording.header.failure
    if failure is not None and failure.at_ns < before:
        raise RecordingError(f"the failure at {failure.at_ns} comes before the last read at {before}", line=1)


def _check_pieces(recording: Recording) -> None:
    finished = False
    for line, piece in _pieces(recording):
        if isinstance(piece, RequestSentPiece):
            raise RecordingError("a request_sent piece: whoever replays says when the request is sent", line=line)
        if finished and not isinstance(piece, UsagePiece):
            raise RecordingError("only a usage piece may follow the finish piece", line=line)
        finished = finished or isinstance(piece, FinishPiece)
    if not finished and recording.header.failure is None:
        raise RecordingError("there is no finish piece, and the header tells of no failure")


_header_decoder = msgspec.json.Decoder(RecordingHeader)
_read_decoder = msgspec.json.Decoder(RecordedRead)
_encoder = msgspec.json.Encoder()


def loads(data: bytes) -> Recording:
    """Decode and check a whole recording.

    Raises:
        RecordingError: with the number of the first line that is wrong.
    """
    first, *rest = data.removesuffix(b"\n").split(b"\n")
    header = _decode(_header_decoder, first, 1)
    return Recording(header, tuple(_decode_read(line, number) for number, line in enumerate(rest, 2)))


def _decode(decoder: msgspec.json.Decoder[T], line: bytes, number: int) -> T:
    if not line.strip():
        raise RecordingError("the line is empty", line=number)
    try:
        return decoder.decode(line)
    # Invalid UTF-8 inside a string is a UnicodeDecodeError of msgspec's, everything else a DecodeError.
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordingError(str(error), line=number) from error


def _decode_read(line: bytes, number: int) -> RecordedRead:
    """Decode one read and refuse fields that its pieces do not have: the engine's types would drop them unseen."""
    read = _decode(_read_decoder, line, number)
    if _encoder.encode(read) != line:
        for piece, raw in zip(read.pieces, msgspec.json.decode(line).get("pieces", []), strict=True):
            unknown = raw.keys() - {"type", *piece.__struct_fields__}
            if unknown:
                raise RecordingError(f"a {raw['type']} piece has no field {min(unknown)!r}", line=number)
    return read


def dumps(recording: Recording) -> bytes:
    """Encode a recording as JSON Lines; ``loads`` of it equals ``recording``."""
    return _encoder.encode_lines([recording.header, *recording.reads])


def dump(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording to ``path``, replacing what is there. Blocks on the file system."""
    pathlib.Path(path).write_bytes(dumps(recording))


def names() -> tuple[str, ...]:
    """The names of the packaged recordings, sorted."""
    files = (entry.name for entry in _PACKAGED.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)))


def load(source: str | os.PathLike[str]) -> Recording:
    """Load a packaged recording by its name, or any other by its path. Blocks on the file system.

    A string of lower-case words joined by hyphens is a name, everything else a path. A packaged recording is read
    once per process.

    Raises:
        RecordingError: the file is not valid, or no packaged recording has that name (the text lists those there are).
        OSError: the file cannot be read.
    """
    if isinstance(source, str) and _NAME.fullmatch(source):
        return _load_packaged(source)
    path = pathlib.Path(source)
    return _loads_from(str(path), path.read_bytes())


@functools.cache
def _load_packaged(name: str) -> Recording:
    if name not in names():
        raise RecordingError(f"no recording is named {name!r}; there are: {', '.join(names())}")
    file = name + _SUFFIX
    recording = _loads_from(file, (_PACKAGED / file).read_bytes())
    if recording.header.name != name:
        raise RecordingError(f"the header's name is {recording.header.name!r}", line=1, origin=file)
    return recording


def _loads_from(origin: str, data: bytes) -> Recording:
    try:
        return loads(data)
    except RecordingError as error:
        raise RecordingError(error.reason, line=error.line, origin=origin) from error
