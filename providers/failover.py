"""Retry, failover and hedging over a chain of providers, all before the first content piece.

An attempt's pieces are held back until its first content; that commits the answer to it, and every other attempt is
cancelled. After that a failure is the answer's failure: nothing is ever spliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import inf
from random import Random

import msgspec
import trio

from engine.deadlines import Deadlines, Phases, Progress
from engine.errors import ProviderError
from engine.pieces import (
    AnsweredByPiece,
    AttemptsPiece,
    Emit,
    Piece,
    ReasoningPiece,
    RequestSentPiece,
    TextPiece,
    ToolCallPiece,
)
from engine.provider import ModelRequest, Provider

from .breaker import BreakerLimits, CircuitBreaker, Permit

RETRIED_CODES = frozenset(
    {"upstream.connection", "upstream.overloaded", "upstream.protocol", "upstream.rate_limit", "upstream.server"}
    | {"upstream.truncated"}
)
"""What may pass when the same provider is asked again. A missed deadline is not among them: it has cost its time."""

FINAL_CODES = frozenset({"upstream.content_policy"})
"""What no other provider is asked after: it is the request that was refused."""

BLAMELESS_CODES = frozenset({"upstream.context_length", "upstream.content_policy", "upstream.invalid_request"})
"""What says nothing of the provider's health, so that no circuit breaker counts it."""


_ENTERED = nullcontext()
"""In place of the scope of an attempt that the run has entered already."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One provider of a chain.

    Attributes:
        connect, first_token: this link's deadlines in seconds; None takes the run's, which rule where shorter.
        retries: how often it is asked again after a failure that may pass.
    """

    provider: Provider
    model: str
    connect: float | None = None
    first_token: float | None = None
    retries: int = 2


class FailoverPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a chain is gone through; times in seconds.

    Attributes:
        first_backoff: wait before the first retry, doubled for each further one, jittered by half either way.
        longest_backoff: bound of that wait.
        longest_retry_after: a vendor that asks for a longer wait is not waited for.
        hedge_after: without content for so long, the next link is asked too; None never hedges.
    """

    first_backoff: float = 0.5
    longest_backoff: float = 8.0
    longest_retry_after: float = 10.0
    hedge_after: float | None = None
    breaker: BreakerLimits = BreakerLimits()


class FailoverProvider:
    """A chain of providers that answers as one. Closing it closes them all."""

    def __init__(
        self, links: Sequence[Link], policy: FailoverPolicy | None = None, random: Random | None = None
    ) -> None:
        if not links:
            raise ValueError("a chain has at least one link")
        self.name = "+".join(dict.fromkeys(link.provider.name for link in links))
        self._policy = policy or FailoverPolicy()
        self._random = random or Random()
        self._links = [(link, CircuitBreaker(self._policy.breaker)) for link in links]
        # Then the first attempt is under the run's own deadlines: a miss ends the answer by either.
        self._is_plain = len(links) == 1 and links[0].connect is links[0].first_token is None

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        """Answer from the first link that can; see ``engine.provider.Provider``.

        Raises:
            ProviderError: the committed attempt's, or else the last attempt's; ``upstream.overloaded`` with
                ``retry_after`` if every circuit is open.
        """
        if not self._is_plain or request.progress is None:
            emit((AttemptsPiece(),))
        if self._policy.hedge_after is not None and len(self._links) > 1:
            answer = await self._race(request, emit, self._policy.hedge_after)
        else:
            answer = _Answer(emit)
            for step in self._steps(request, answer):
                if isinstance(step, _Attempt):
                    await step.run()
                else:
                    await trio.sleep(step)
        if answer.failure is not None:
            raise answer.failure

    async def aclose(self) -> None:
        """Close every provider of the chain."""
        for link, _ in self._links:
            await link.provider.aclose()

    async def _race(self, request: ModelRequest, emit: Emit, hedge_after: float) -> _Answer:
        """Attempts side by side, where one is slow and there is another link to be asked."""
        race = _Race(emit)
        last = self._links[-1][0]
        async with trio.open_nursery() as nursery:
            for step in self._steps(request, race):
                if isinstance(step, _Attempt):
                    nursery.start_soon(step.run)
                    await race.wait(step, inf if step.link is last else hedge_after)
                else:
                    await race.sleep(step)
        return race

    def _steps(self, request: ModelRequest, answer: _Answer) -> Iterator[_Attempt | float]:
        """What is to be done, one after the other, until the answer is decided: an attempt, or to wait some seconds."""
        for link, breaker in self._links:
            for tries in range(link.retries + 1):
                if answer.winner is not None:
                    return
                permit = breaker.admit()
                if permit is None:
                    answer.failure = answer.failure or self._open_circuits()
                    break
                progress = request.progress if self._is_plain and tries == 0 else None
                attempt = _Attempt(link, breaker, permit, answer, request, progress)
                yield attempt
                error = attempt.error
                if error is not None and error.code in FINAL_CODES:
                    return
                pause = self._pause_before_retry(error, tries) if error is not None else None  # slow: hedge
                if pause is None or tries == link.retries:
                    break
                if progress is not None:
                    answer.emit((AttemptsPiece(),))
                yield pause

    def _pause_before_retry(self, error: ProviderError, tries: int) -> float | None:
        """Seconds to wait before the same provider is asked again; None if it should not be."""
        if error.code not in RETRIED_CODES:
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self._policy.longest_retry_after else None
        backoff: float = min(self._policy.first_backoff * 2.0**tries, self._policy.longest_backoff)
        return backoff * self._random.uniform(0.5, 1.5)

    def _open_circuits(self) -> ProviderError:
        soonest = min(breaker.seconds_to_probe for _, breaker in self._links)
        return ProviderError(
            "upstream.overloaded", "the model's provider has failed too often and is left alone", retry_after=soonest
        )


class _Answer:
    """The attempts at one answer: at most one is committed to, and only that one is heard by ``emit``."""

    __slots__ = ("emit", "failure", "winner")

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.winner: _Attempt | None = None
        self.failure: ProviderError | None = None

    def commit(self, attempt: _Attempt, held: Sequence[Piece]) -> None:
        """This attempt, with what it held back, is the answer."""
        self.winner = attempt
        self.failure = None
        self.emit((AnsweredByPiece(attempt.link.provider.name, attempt.link.model), *held))

    def fail(self, attempt: _Attempt, error: ProviderError) -> None:
        """An attempt failed; if it was the one committed to, or the last, that is the answer's failure."""
        if self.winner is None or self.winner is attempt:
            self.failure = error


class _Race(_Answer):
    """An answer that several attempts are made at side by side."""

    __slots__ = ("_attempts", "_news")

    def __init__(self, emit: Emit) -> None:
        super().__init__(emit)
        self._attempts: list[_Attempt] = []
        self._news = trio.Event()

    def commit(self, attempt: _Attempt, held: Sequence[Piece]) -> None:
        """The others are cancelled, their connections closed."""
        for other in self._attempts:
            if other is not attempt and other.scope is not None:
                other.scope.cancel(reason="another provider answered first")
        self._news.set()
        super().commit(attempt, held)

    def fail(self, attempt: _Attempt, error: ProviderError) -> None:
        """Whoever waits for this attempt waits no longer."""
        super().fail(attempt, error)
        self._news.set()

    async def wait(self, attempt: _Attempt, seconds: float) -> None:
        """Until one is committed to, this attempt, which has begun, has failed, or so many seconds have passed."""
        self._attempts.append(attempt)
        with trio.move_on_after(seconds):
            await self._wait_until(lambda: self.winner is not None or attempt.error is not None)

    async def sleep(self, seconds: float) -> None:
        """A pause that ends early when a hedged attempt is committed to."""
        with trio.move_on_after(seconds):
            await self._wait_until(lambda: self.winner is not None)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news = trio.Event()
            await self._news.wait()


class _Attempt:
    """One request to one provider, under connect and first-token deadlines of its own, or under the run's.

    ``error`` is what it failed with, unless an attempt was committed to before.
    """

    __slots__ = ("_answer", "_breaker", "_held", "_permit", "_request", "error", "link", "progress", "scope")

    progress: Phases
    scope: trio.CancelScope | None

    def __init__(
        self,
        link: Link,
        breaker: CircuitBreaker,
        permit: Permit,
        answer: _Answer,
        request: ModelRequest,
        progress: Phases | None,
    ) -> None:
        self.link = link
        if progress is None:
            own = Progress(self._deadlines(request.deadlines))
            self.progress, self.scope = own, own.scope
        else:
            self.progress, self.scope = progress, None
        self.error: ProviderError | None = None
        self._breaker = breaker
        self._permit = permit
        self._answer = answer
        self._request = request if request.model == link.model else msgspec.structs.replace(request, model=link.model)
        self._held: list[Piece] = []

    async def run(self) -> None:
        """Ask the provider; every outcome is told to the answer and the breaker."""
        try:
            with self.scope or _ENTERED:
                await self.link.provider.stream(self._request, self._take)
                if self._answer.winner is None:
                    await trio.lowlevel.checkpoint_if_cancelled()  # who swallows a cancellation has not answered
                    self._commit()  # an answer without content is one too
        except ProviderError as error:
            if not self.progress.missed:
                self._fail(error)
        finally:
            if self._answer.winner is None and self.progress.missed:
                code = self.progress.error_code
                self._fail(ProviderError(code, f"no sign of the model in time ({self.progress.limit:g} s)"))
            self._breaker.released(self._permit)

    def _deadlines(self, of_run: Deadlines) -> Deadlines:
        if self.link.connect is None and self.link.first_token is None:
            return of_run
        return msgspec.structs.replace(
            of_run,
            connect=min(of_run.connect, self.link.connect or inf),
            first_token=min(of_run.first_token, self.link.first_token or inf),
        )

    def _take(self, pieces: Sequence[Piece]) -> None:
        if self._answer.winner is self:
            self._answer.emit(pieces)
            return
        if self._answer.winner is not None:
            return  # cancelled, and has not met it yet
        any_content = False
        for piece in pieces:
            if isinstance(piece, RequestSentPiece):
                if self.scope is not None:
                    self.progress.enter("first_token")
                self._answer.emit((piece,))
            else:
                self._held.append(piece)
                any_content = any_content or _is_content(piece)
        if any_content and not self.progress.missed:
            self._commit()

    def _commit(self) -> None:
        if self.scope is not None:
            self.progress.enter("attempts")  # the run's own deadline rules from here
        self._breaker.succeeded(self._permit)
        held, self._held = self._held, []
        self._answer.commit(self, held)

    def _fail(self, error: ProviderError) -> None:
        if self._answer.winner is None:
            self.error = error
        if error.code not in BLAMELESS_CODES:
            self._breaker.failed(self._permit)
        self._answer.fail(self, error)


def _is_content(piece: Piece) -> bool:
    match piece:
        case TextPiece(text) | ReasoningPiece(text):
            return bool(text)
        case ToolCallPiece():
            return True
    return False
