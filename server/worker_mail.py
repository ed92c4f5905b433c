"""What workers ask of each other, by the streams that are their inboxes."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Stop your run of that id."""

    run_id: str
    reason: str


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Drop your run of that id: its events are dropped everywhere."""

    run_id: str


class Reading(msgspec.Struct, frozen=True, tag="reading"):
    """The worker has readers of these runs of yours. Said again every third of a lease, or it counts no longer."""

    worker: str
    run_ids: list[str]


class Left(msgspec.Struct, frozen=True, tag="left"):
    """The worker has no reader of these runs any more."""

    worker: str
    run_ids: list[str]


Mail: TypeAlias = Stop | Forget | Reading | Left

encode_mail = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Mail).decode


def parse_mail(text: bytes) -> Mail | None:
    """What an entry says; None of one that only wakes, or is of a version that knows more than this."""
    try:
        return _decode(text) if text else None
    except msgspec.MsgspecError:
        return None
