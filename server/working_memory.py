"""Working memory: one JSON object per user and agent, changed by merge patches, with a template and a capacity.

All of it is arithmetic on JSON but for ``patch_document`` and ``replace_document``, which run in a write transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import Connection

from engine.memory import MemoryRefusedError, WorkingMemoryChange

from .records import WorkingMemorySettings
from .store import rows, working_memories

MAX_DEPTH = 32
"""Of objects and arrays in each other. A patch within a model's bounds could otherwise be too deep to be merged."""


def merge_patch(target: Any, patch: Any) -> Any:
    """The target as the patch would have it (RFC 7396, section 2). Neither is changed; they may share parts."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def read_document(connection: Connection, scope: rows.Scope, settings: WorkingMemorySettings) -> dict[str, Any]:
    """The user's document; the template of a user who has none yet."""
    document = working_memories.read_document(connection, scope)
    return settings.template if document is None else document


def patch_document(
    connection: Connection, scope: rows.Scope, settings: WorkingMemorySettings, patch: Any, now: str
) -> WorkingMemoryChange:
    """Merge the patch into the user's document and keep it.

    Raises:
        MemoryRefusedError: the patch is no object or too deep, or the document would be over its capacity.
    """
    if not isinstance(patch, dict):
        raise MemoryRefusedError("a patch of the working memory is a JSON object")
    _check_depth(patch)
    working_memories.lock_document(connection, scope)
    before = read_document(connection, scope, settings)
    return _keep(connection, scope, settings, before, merge_patch(before, patch), now)


def replace_document(
    connection: Connection, scope: rows.Scope, settings: WorkingMemorySettings, document: Any, now: str
) -> WorkingMemoryChange:
    """Put the document in the place of the user's.

    Raises:
        MemoryRefusedError: it is no object, too deep or over the capacity.
    """
    if not isinstance(document, dict):
        raise MemoryRefusedError("a working memory is a JSON object")
    _check_depth(document)
    working_memories.lock_document(connection, scope)
    return _keep(connection, scope, settings, read_document(connection, scope, settings), document, now)


def _keep(
    connection: Connection,
    scope: rows.Scope,
    settings: WorkingMemorySettings,
    before: dict[str, Any],
    after: dict[str, Any],
    now: str,
) -> WorkingMemoryChange:
    size = len(_encoded(after))
    if size > settings.max_bytes:
        raise MemoryRefusedError(
            f"the working memory would be {size} bytes of JSON, and may be {settings.max_bytes}: delete or shorten keys"
        )
    working_memories.write_document(connection, scope, after, now)
    return WorkingMemoryChange(
        document=after,
        set_keys=tuple(key for key in after if key not in before or _encoded(before[key]) != _encoded(after[key])),
        deleted_keys=tuple(key for key in before if key not in after),
    )


def _encoded(value: Any) -> bytes:
    """The JSON: equal for values that are equal as JSON, which 1 and True are not."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryRefusedError(f"the working memory would hold what JSON cannot say: {error}") from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list)]
        if not level:
            return
    raise MemoryRefusedError(f"a working memory is at most {MAX_DEPTH} objects and arrays deep")


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
