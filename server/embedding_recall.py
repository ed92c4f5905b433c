"""Recall by meaning: vectors of memories, made after their run, and the memories that are nearest to a question.

An aid beside the full-text search, never instead of it: whatever fails or is slow here, words alone find.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import msgspec
import structlog
import trio
from sqlalchemy import Connection

from engine import ProviderError
from providers.breaker import BreakerLimits, CircuitBreaker
from providers.registry import ProviderConfigError

from .store import memories, rows
from .store.database import Database
from .store.vectors import find_memories, read_vectors

EMBED_SECONDS = 20.0
"""How long one user's vectors may be made at a time; what is left over is made after the next run."""

MAX_VECTORS = 2000
"""The newest memories that are compared; 12 MB of OpenAI's small model."""

RRF_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack and others, SIGIR 2009): how little the first ranks outweigh the next."""

BREAKER_LIMITS = BreakerLimits(failures=3, open_seconds=30.0)
"""After three failures in a row no run waits for vectors for half a minute."""

_REFUSALS = frozenset({"upstream.content_policy", "upstream.context_length"})
_DOUBTFUL = _REFUSALS | {"upstream.invalid_request"}

_logger = structlog.get_logger("lumos")


class Embedder(Protocol):
    """What makes vectors of texts; ``providers.embeddings.EmbeddingClient`` does."""

    model: str
    batch: int

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """The vectors, as 32-bit floats, little-endian. Raises ``ProviderError``."""
        ...


def load_numpy() -> Any:
    """The library, which is an extra.

    Raises:
        ProviderConfigError: it is not installed.
    """
    try:
        return import_module("numpy")
    except ImportError as error:
        raise ProviderConfigError("recall by meaning needs numpy: pip install 'lumos-stream[embeddings]'") from error


class EmbeddingRecall:
    """The memories of one agent's users by meaning. Shared by their runs; holds nothing that must be closed."""

    def __init__(self, database: Database, embedder: Embedder) -> None:
        """Load what is needed, so that no run has to.

        Raises:
            ProviderConfigError: numpy is not installed.
        """
        self._numpy = load_numpy()
        self._database = database
        self._embedder = embedder
        self._breaker = CircuitBreaker(BREAKER_LIMITS)

    async def nearest(self, scope: rows.Scope, query: str, limit: int, seconds: float) -> list[rows.StoredMemory]:
        """The memories nearest to the query, the nearest first; none if that fails or takes longer than ``seconds``."""
        if not query.strip() or seconds <= 0:
            return []
        permit = self._breaker.admit()
        if permit is None:
            return []
        reason = f"took longer than {seconds:g} s"
        try:
            with trio.move_on_after(seconds):
                (vector,) = await self._embedder.embed([query])
                self._breaker.succeeded(permit)
                return await self._database.read(self._nearest, scope, vector, limit)
        except ProviderError as error:
            reason = str(error)
        finally:
            self._breaker.released(permit)
        self._breaker.failed(permit)
        _logger.warning("memory.recall_by_words_alone", model=self._embedder.model, reason=reason)
        return []

    async def embed_new(self, scope: rows.Scope, seconds: float = EMBED_SECONDS) -> None:
        """Make the vectors that are missing, newest memories first, for so long; fails in nothing but the store."""
        permit = self._breaker.admit()
        if permit is None:
            return
        reason = f"took longer than {seconds:g} s"
        try:
            with trio.move_on_after(seconds):
                while await self._embed_batch(scope):
                    pass
                self._breaker.succeeded(permit)
                return
        except ProviderError as error:
            reason = str(error)
        finally:
            self._breaker.released(permit)
        self._breaker.failed(permit)
        _logger.warning("memory.not_embedded", model=self._embedder.model, reason=reason)

    async def _embed_batch(self, scope: rows.Scope) -> bool:
        """Embed some; whether there may be more."""
        model, batch = self._embedder.model, self._embedder.batch
        found = await self._database.read(memories.memories_to_embed, scope, model, batch)
        vectors = await self._vectors([memory.text for memory in found])
        made = [(memory, vector) for memory, vector in zip(found, vectors, strict=True) if vector is not None]
        await self._database.write(_keep_vectors, scope, model, made)
        return len(made) == batch

    async def _vectors(self, texts: Sequence[str]) -> list[bytes | None]:
        """A vector for each text: empty for one that never gets any, None for one that may get one later."""
        asked = [text for text in texts if text.strip()]
        try:
            made: list[bytes | None] = [*await self._embedder.embed(asked)] if asked else []
        except ProviderError as error:
            if error.code not in _DOUBTFUL or (len(asked) == 1 and error.code not in _REFUSALS):
                raise
            made = await self._vectors_one_by_one(asked)
        left = iter(made)
        return [next(left) if text.strip() else b"" for text in texts]

    async def _vectors_one_by_one(self, texts: Sequence[str]) -> list[bytes | None]:
        """One text that the vendor refuses must not keep the others from their vectors, now and after every run."""
        vectors: list[bytes | None] = []
        codes: list[str] = []
        for text in texts:
            try:
                vectors += await self._embedder.embed([text])
            except ProviderError as error:
                if error.code not in _DOUBTFUL:
                    raise
                codes.append(error.code)
                vectors.append(b"" if error.code in _REFUSALS else None)
        if any(vectors):  # the vendor takes this model and others of these texts, so it is the text that it refuses
            return [b"" if vector is None else vector for vector in vectors]
        if "upstream.invalid_request" in codes:
            raise ProviderError("upstream.invalid_request", "the model's server takes none of these texts")
        return vectors

    def _nearest(self, connection: Connection, scope: rows.Scope, query: bytes, limit: int) -> list[rows.StoredMemory]:
        """In a worker thread: cosine of the query and each memory's vector."""
        found = read_vectors(connection, scope, self._embedder.model, len(query), MAX_VECTORS)
        if not found:
            return []
        np = self._numpy
        matrix = np.frombuffer(b"".join(vector for _, vector in found), dtype="<f4").reshape(len(found), -1)
        wanted = np.frombuffer(query, dtype="<f4")
        with np.errstate(all="ignore"):  # a vector of zeros has no direction
            lengths = np.linalg.norm(matrix, axis=1) * np.linalg.norm(wanted)
            scores = np.nan_to_num((matrix @ wanted) / lengths, nan=-1.0)
        best = {found[n][0]: float(scores[n]) for n in np.argsort(-scores, kind="stable")[:limit]}
        nearest = find_memories(connection, scope, list(best))
        return [msgspec.structs.replace(memory, score=best[memory.id]) for memory in nearest]


def _keep_vectors(
    connection: Connection, scope: rows.Scope, model: str, made: Sequence[tuple[rows.StoredMemory, bytes]]
) -> None:
    """But for a memory whose text was changed in the meantime: it gets its vector the next time."""
    for memory, vector in made:
        kept = memories.find_memory(connection, scope, memory.id)
        if kept is not None and kept.text == memory.text:
            memories.set_embedding(connection, scope, memory.id, vector, model)


def fused(*rankings: Sequence[rows.StoredMemory]) -> list[rows.StoredMemory]:
    """The rankings as one, by reciprocal rank fusion; at the same score, in the order of the rankings."""
    scores: defaultdict[str, float] = defaultdict(float)
    found: dict[str, rows.StoredMemory] = {}
    for ranking in rankings:
        for rank, memory in enumerate(ranking, start=1):
            scores[memory.id] += 1 / (RRF_CONSTANT + rank)
            found.setdefault(memory.id, memory)
    return sorted(found.values(), key=lambda memory: -scores[memory.id])
