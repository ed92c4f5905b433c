"""Redis's streams, in memory: entries in the order of their ids, and how commands name ids, ends and lengths."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

EntryId: TypeAlias = tuple[int, int]
Entry: TypeAlias = list[bytes | list[bytes]]
"""The id as text, then fields and values in turn."""

LARGEST = 2**64 - 1
EVERYTHING = 2**63


class ReplyError(Exception):
    """What Redis refuses to do, in its words."""


class Stream(Struct):
    """Entries in order, their ids, and the newest id that ever was."""

    ids: list[EntryId] = []
    fields: list[list[bytes]] = []
    last: EntryId = (0, 0)

    def add(self, name: bytes, fields: list[bytes], now: int) -> bytes:
        """Add an entry of that id, ``*`` for one of the time; what Redis answers.

        Raises:
            ReplyError: there is that id, or a later one.
        """
        entry_id = _next_id(self.last, now) if name == b"*" else new_id(name)
        if entry_id <= self.last:
            raise ReplyError("The ID specified in XADD is equal or smaller than the target stream top item")
        self.ids.append(entry_id)
        self.fields.append(fields)
        self.last = entry_id
        return _text_of(entry_id)

    def trim(self, length: int) -> int:
        """Drop the oldest beyond that many; how many they were."""
        over = max(0, len(self.ids) - length)
        del self.ids[:over], self.fields[:over]
        return over

    def between(self, start: bytes, end: bytes) -> list[Entry]:
        """As XRANGE gives them: ``-``, ``+``, an id, or ``(`` and the id that is not to be among them."""
        first = (
            bisect_right(self.ids, _bound(start, 0)) if start[:1] == b"(" else bisect_left(self.ids, _bound(start, 0))
        )
        last = (
            bisect_left(self.ids, _bound(end, LARGEST))
            if end[:1] == b"("
            else bisect_right(self.ids, _bound(end, LARGEST))
        )
        return self._slice(first, last)

    def after(self, entry_id: EntryId, most: int) -> list[Entry]:
        """The oldest of those that are newer, so many at most."""
        if self.last <= entry_id:
            return []
        first = bisect_right(self.ids, entry_id)
        return self._slice(first, first + most)

    def _slice(self, first: int, last: int) -> list[Entry]:
        both = zip(self.ids[first:last], self.fields[first:last], strict=True)
        return [[_text_of(entry_id), list(fields)] for entry_id, fields in both]

    def copy(self) -> Stream:
        """The same entries; what is added to one is not in the other."""
        return Stream(list(self.ids), list(self.fields), self.last)


class Reading(Struct, frozen=True):
    """What an XREAD asks for.

    Attributes:
        block: for how many milliseconds it waits for an entry, 0 for ever; None: not at all.
    """

    keys: Sequence[bytes]
    after: list[EntryId]
    count: int = EVERYTHING
    block: int | None = None


def parse_xread(words: Sequence[bytes]) -> Reading:
    """What stands behind XREAD. Raises ReplyError."""
    count, block = EVERYTHING, None
    position = 0
    while position + 1 < len(words):
        option = words[position].upper()
        if option == b"STREAMS":
            rest = words[position + 1 :]
            half, odd = divmod(len(rest), 2)
            if odd:
                raise ReplyError(
                    "Unbalanced 'xread' list of streams: for each stream key an ID or '$' must be specified."
                )
            return Reading(rest[:half], [_id_of(text, 0) for text in rest[half:]], count, block)
        if option == b"COUNT":
            count = integer(words[position + 1])
        elif option == b"BLOCK":
            block = integer(words[position + 1])
        else:
            break
        position += 2
    raise ReplyError("syntax error")


def take_length(words: list[bytes]) -> int | None:
    """Take ``MAXLEN [=|~] n`` off the front. ``~`` is exact here: Redis may keep up to a hundred more."""
    if not words or words[0].upper() != b"MAXLEN":
        return None
    sign = len(words) > 1 and words[1] in {b"=", b"~"}
    if len(words) < 2 + sign:
        raise ReplyError("syntax error")
    length = integer(words[1 + sign])
    if length < 0:
        raise ReplyError("The MAXLEN argument must be >= 0.")
    del words[: 2 + sign]
    return length


def parse_count(words: Sequence[bytes]) -> int:
    """What follows the ends of an XRANGE: nothing, or ``COUNT n``."""
    if not words:
        return EVERYTHING
    if len(words) != 2 or words[0].upper() != b"COUNT":
        raise ReplyError("syntax error")
    return max(0, integer(words[1]))


def integer(text: bytes, otherwise: str = "value is not an integer or out of range") -> int:
    """The number that the text is. Raises ReplyError."""
    digits = text[1:] if text[:1] == b"-" else text
    if not digits.isdigit() or not -(2**63) <= int(text) < 2**63 or b"%d" % int(text) != text:
        raise ReplyError(otherwise)
    return int(text)


def _next_id(last: EntryId, now: int) -> EntryId:
    return (now, 0) if now > last[0] else (last[0], last[1] + 1)


def _text_of(entry_id: EntryId) -> bytes:
    return b"%d-%d" % entry_id


def _id_of(text: bytes, missing: int) -> EntryId:
    milliseconds, dash, sequence = text.partition(b"-")
    if not milliseconds.isdigit() or not (sequence.isdigit() if dash else True):
        raise ReplyError("Invalid stream ID specified as stream command argument")
    return int(milliseconds), int(sequence) if dash else missing


def new_id(name: bytes) -> EntryId:
    """The id of an entry that is to be added; no stream has 0-0."""
    entry_id = _id_of(name, 0)
    if entry_id == (0, 0):
        raise ReplyError("The ID specified in XADD must be greater than 0-0")
    return entry_id


def check_interval(start: bytes, end: bytes) -> None:
    """Refuse bounds that leave out what nothing is beyond, whether there is a stream or not."""
    if start[:1] == b"(" and _bound(start, 0) == (LARGEST, LARGEST):
        raise ReplyError("invalid start ID for the interval")
    if end[:1] == b"(" and _bound(end, LARGEST) == (0, 0):
        raise ReplyError("invalid end ID for the interval")


def _bound(text: bytes, missing: int) -> EntryId:
    if text == b"-":
        return 0, 0
    if text == b"+":
        return LARGEST, LARGEST
    return _id_of(text.removeprefix(b"("), missing)
