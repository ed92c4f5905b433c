"""Retry, failover, breaker and hedging on the virtual clock; the sixteen scenarios of Failover Bench among them.

The scenarios S01-S16 are those of the public benchmark (failoverbench, September 2026), as the facts page tells them,
ported to scripted providers: times are equalities, not tolerances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypedDict, Unpack

import pytest
import trio
from trio.testing import MockClock

from engine import BasicAgent, Deadlines, Error, Event, GenerationComplete, StreamingAgent, StreamingConfig, TextDelta
from engine.deadlines import SLACK_SECONDS
from engine.errors import ProviderError, ProviderErrorCode
from engine.pieces import Emit, FinishPiece, Piece, RequestSentPiece, TextPiece, UsagePiece
from engine.provider import ModelRequest
from providers.breaker import BreakerLimits
from providers.failover import FailoverPolicy, FailoverProvider, Link

END = (FinishPiece("stop"), UsagePiece(5, 60))
STEADY = FailoverPolicy(first_backoff=1.0)


class NoJitter(Random):
    """A random source whose jitter is nothing: the backoffs are then exact."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


Act = float | Sequence[Piece] | ProviderError


def fails(code: ProviderErrorCode, retry_after: float | None = None) -> list[Act]:
    """A call that is refused at once."""
    return [ProviderError(code, "no", retry_after=retry_after)]


def answers(words: int = 60, first: float = 0.5) -> list[Act]:
    """A call that is answered in full, a word every tenth of a second."""
    acts: list[Act] = [first]
    for number in range(words):
        acts += [(TextPiece(f"w{number} "),), 0.1]
    return [*acts, END]


@dataclass
class Vendor:
    """A provider that plays one script for each call, the last one for all that follow; ``calls`` are their times."""

    name: str
    scripts: list[list[Act]]
    calls: list[float] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append(trio.current_time())
        try:
            emit([RequestSentPiece()])
            for act in script:
                match act:
                    case float():
                        await trio.sleep(act)
                    case ProviderError():
                        raise act
                    case pieces:
                        emit(pieces)
        except trio.Cancelled:
            self.cancelled.append(trio.current_time())
            raise

    async def aclose(self) -> None:
        """Nothing is open."""


@dataclass
class Outcome:
    """What a reader of the run got, and when each event came, in seconds from the start."""

    events: list[Event]
    times: list[float]

    @property
    def text(self) -> str:
        return "".join(event.content for event in self.events if isinstance(event, TextDelta))

    @property
    def end(self) -> Event:
        return self.events[-1]

    @property
    def code(self) -> str:
        assert isinstance(self.end, Error), self.end
        return self.end.code

    @property
    def first_token_at(self) -> float:
        return next(at for event, at in zip(self.events, self.times, strict=True) if isinstance(event, TextDelta))


FULL_TEXT = "".join(f"w{number} " for number in range(60))


async def ask(provider: FailoverProvider, deadlines: Deadlines | None = None) -> Outcome:
    agent = BasicAgent(agent_id="a", provider=provider, model="ignored", deadlines=deadlines or Deadlines())
    started = trio.current_time()
    outcome = Outcome([], [])
    async with StreamingAgent.with_config(agent, StreamingConfig()).execute_streaming("hi") as events:
        async for event in events:
            outcome.events.append(event)
            outcome.times.append(trio.current_time() - started)
    return outcome


class LinkOptions(TypedDict, total=False):
    """What the tests set of a link."""

    first_token: float
    retries: int


def chain(*vendors: Vendor, policy: FailoverPolicy = STEADY, **link: Unpack[LinkOptions]) -> FailoverProvider:
    links = [Link(provider=vendor, model=f"{vendor.name}-model", **link) for vendor in vendors]
    return FailoverProvider(links, policy, NoJitter())


def usage_owner(outcome: Outcome) -> tuple[str | None, str | None]:
    assert isinstance(outcome.end, GenerationComplete)
    assert outcome.end.usage is not None
    return outcome.end.usage.provider, outcome.end.usage.model


# The sixteen scenarios.


async def test_s01_rate_limit_with_retry_after_is_waited_for(autojump_clock: MockClock) -> None:
    primary = Vendor("p", [fails("upstream.rate_limit", retry_after=3.0), answers()])
    outcome = await ask(chain(primary))
    assert outcome.text == FULL_TEXT
    assert primary.calls == [0.0, 3.0]


async def test_s02_a_lasting_rate_limit_fails_over(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.rate_limit")]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert outcome.text == FULL_TEXT
    assert primary.calls == [0.0, 1.0, 3.0]
    assert fallback.calls == [3.0]


async def test_s03_a_server_error_once_is_retried(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.server"), answers()]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert (outcome.text, primary.calls, fallback.calls) == (FULL_TEXT, [0.0, 1.0], [])


async def test_s04_lasting_overload_fails_over(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.overloaded")]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert (outcome.text, len(primary.calls), len(fallback.calls)) == (FULL_TEXT, 3, 1)


async def test_s05_a_reset_before_the_head_is_retried(autojump_clock: MockClock) -> None:
    primary = Vendor("p", [fails("upstream.connection"), answers()])
    assert (await ask(chain(primary))).text == FULL_TEXT


async def test_s06_a_silent_upstream_is_left_for_the_fallback(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [[120.0]]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback, first_token=10.0))
    assert (outcome.text, outcome.first_token_at) == (FULL_TEXT, 10.5)
    assert (primary.calls, primary.cancelled, fallback.calls) == ([0.0], [10.0], [10.0])


async def test_s07_a_slow_first_token_is_left_for_the_fallback(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [answers(first=20.0)]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback, first_token=5.0))
    assert (outcome.text, outcome.first_token_at, primary.cancelled) == (FULL_TEXT, 5.5, [5.0])


async def test_s08_a_stream_cut_after_40_of_60_tokens_is_an_error_never_a_splice(autojump_clock: MockClock) -> None:
    cut: list[Act] = [*answers(40)[:-1], ProviderError("upstream.connection", "cut")]
    primary, fallback = Vendor("p", [cut]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert outcome.code == "upstream.connection"
    assert outcome.text == "".join(f"w{number} " for number in range(40))
    assert (len(primary.calls), fallback.calls) == (1, [])


async def test_s09_a_stall_after_20_tokens_ends_at_the_idle_deadline(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [[*answers(20)[:-2], 300.0]]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback), Deadlines(idle=30))
    assert (outcome.code, fallback.calls) == ("timeout.idle", [])
    last_token = [at for event, at in zip(outcome.events, outcome.times, strict=True) if isinstance(event, TextDelta)]
    assert -1e-9 <= outcome.times[-1] - (last_token[-1] + 30) <= SLACK_SECONDS + 1e-9


async def test_s10_a_malformed_event_mid_stream_is_an_error(autojump_clock: MockClock) -> None:
    broken: list[Act] = [*answers(10)[:-1], ProviderError("upstream.protocol", "bad JSON")]
    primary, fallback = Vendor("p", [broken]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert (outcome.code, fallback.calls) == ("upstream.protocol", [])


async def test_s11_an_end_without_the_end_mark_is_no_success(autojump_clock: MockClock) -> None:
    truncated: list[Act] = [*answers(10)[:-1], ProviderError("upstream.truncated", "no end mark")]
    assert (await ask(chain(Vendor("p", [truncated])))).code == "upstream.truncated"


async def test_s12_context_length_is_not_retried_on_the_same_model(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.context_length")]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert (outcome.text, primary.calls, fallback.calls) == (FULL_TEXT, [0.0], [0.0])
    alone = Vendor("p", [fails("upstream.context_length")])
    assert ((await ask(chain(alone))).code, len(alone.calls)) == ("upstream.context_length", 1)


async def test_s13_a_content_policy_refusal_is_not_retried_anywhere(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.content_policy")]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert (outcome.code, len(primary.calls), fallback.calls) == ("upstream.content_policy", 1, [])


async def test_s14_a_fallback_that_rejects_the_request_is_asked_once(autojump_clock: MockClock) -> None:
    primary = Vendor("p", [fails("upstream.overloaded")])
    rejecting, last = Vendor("r", [fails("upstream.invalid_request")]), Vendor("l", [answers()])
    outcome = await ask(chain(primary, rejecting, last, retries=0))
    assert (outcome.text, len(rejecting.calls), len(last.calls)) == (FULL_TEXT, 1, 1)


async def test_s15_a_flapping_primary_opens_the_circuit_is_probed_and_closes(autojump_clock: MockClock) -> None:
    primary = Vendor("p", [fails("upstream.server")] * 4 + [answers(1)])
    fallback = Vendor("f", [answers(1)])
    policy = FailoverPolicy(breaker=BreakerLimits(failures=3, open_seconds=25))
    provider = chain(primary, fallback, policy=policy, retries=0)
    for _ in range(5):  # three failures open it; then only the fallback is asked
        assert (await ask(provider)).text == "w0 "
    assert (len(primary.calls), len(fallback.calls)) == (3, 5)
    await trio.sleep_until(primary.calls[-1] + 25)
    await ask(provider)  # the probe fails: open again
    assert (len(primary.calls), len(fallback.calls)) == (4, 6)
    await trio.sleep_until(primary.calls[-1] + 25)
    for _ in range(2):  # the probe succeeds: closed
        await ask(provider)
    assert (len(primary.calls), len(fallback.calls)) == (6, 6)


async def test_s16_usage_is_accounted_to_who_answered(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [fails("upstream.auth")]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert usage_owner(outcome) == ("f", "f-model")
    assert isinstance(outcome.end, GenerationComplete)
    assert outcome.end.usage is not None
    assert outcome.end.usage.output_tokens == 60


# Beyond the sixteen.


async def test_a_longer_retry_after_than_allowed_is_not_waited_for(autojump_clock: MockClock) -> None:
    primary = Vendor("p", [fails("upstream.rate_limit", retry_after=36_000.0)])
    outcome = await ask(chain(primary))
    assert isinstance(outcome.end, Error)
    assert (outcome.end.code, outcome.end.retry_after, outcome.times[-1]) == ("upstream.rate_limit", 36_000.0, 0.0)


async def test_jitter_stays_within_half_of_the_backoff(autojump_clock: MockClock) -> None:
    pauses = set()
    for seed in range(50):
        vendor = Vendor("p", [fails("upstream.server"), answers(1)])
        await FailoverProvider([Link(provider=vendor, model="m")], STEADY, Random(seed)).stream(
            ModelRequest((), "m"), lambda _: None
        )
        pauses.add(vendor.calls[1] - vendor.calls[0])
    assert len(pauses) == 50
    assert min(pauses) >= 0.5
    assert max(pauses) <= 1.5


async def test_the_runs_shorter_first_token_deadline_rules_each_attempt(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [[100.0]]), Vendor("f", [[100.0]])
    outcome = await ask(chain(primary, fallback), Deadlines(first_token=4))
    assert (outcome.code, outcome.times[-1]) == ("timeout.first_token", 8.0)
    assert (primary.cancelled, fallback.cancelled) == ([4.0], [8.0])


async def test_a_retry_has_its_whole_time_though_the_first_attempt_was_under_the_runs_deadline(
    autojump_clock: MockClock,
) -> None:
    vendor = Vendor("p", [[3.0, *fails("upstream.server")], answers(first=3.5)])
    outcome = await ask(chain(vendor), Deadlines(first_token=4))
    assert (outcome.text, vendor.calls, outcome.first_token_at) == (FULL_TEXT, [0.0, 4.0], 7.5)


async def test_a_retry_misses_a_deadline_of_its_own(autojump_clock: MockClock) -> None:
    vendor = Vendor("p", [[3.0, *fails("upstream.server")], [100.0]])
    outcome = await ask(chain(vendor), Deadlines(first_token=4))
    assert (outcome.code, outcome.times[-1], vendor.cancelled) == ("timeout.first_token", 8.0, [8.0])


@pytest.mark.parametrize(
    ("deadlines", "code", "asked"),
    [
        (Deadlines(first_token=4), "timeout.first_token", 2),
        (Deadlines(total=4), "timeout.total", 3),
    ],
    ids=["first token", "total"],
)
async def test_a_lone_links_missed_deadline_is_its_failure_and_the_runs_end_is_not(
    deadlines: Deadlines, code: str, asked: int, autojump_clock: MockClock
) -> None:
    vendor = Vendor("p", [[100.0]])
    provider = chain(vendor, policy=FailoverPolicy(breaker=BreakerLimits(failures=2)))
    for _ in range(2):
        assert (await ask(provider, deadlines)).code == code
    await ask(provider, deadlines)
    assert len(vendor.calls) == asked


class Scopes:
    """Counts the cancel scopes around a provider, as far as their deadlines can be seen from inside."""

    name = "scopes"

    def __init__(self) -> None:
        self.deadlines: list[float] = []

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        self.deadlines.append(trio.current_effective_deadline())
        emit([RequestSentPiece()])
        self.deadlines.append(trio.current_effective_deadline())
        emit([TextPiece("hi")])
        self.deadlines.append(trio.current_effective_deadline())
        emit(END)

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("links", [1, 2])
async def test_the_deadlines_are_the_same_whoever_keeps_them(links: int, autojump_clock: MockClock) -> None:
    inner = Scopes()
    outcome = await ask(
        FailoverProvider([Link(provider=inner, model="m")] * links), Deadlines(connect=1, first_token=2, idle=3)
    )
    assert (outcome.text, inner.deadlines) == ("hi", [1.0, 2.0, 3.0])


async def test_the_total_deadline_bounds_the_whole_chain(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [[100.0]]), Vendor("f", [[100.0]])
    outcome = await ask(chain(primary, fallback, first_token=10), Deadlines(total=13))
    assert (outcome.code, outcome.times[-1], fallback.cancelled) == ("timeout.total", 13.0, [13.0])


async def test_a_hedge_that_answers_first_wins_and_the_loser_is_cancelled(autojump_clock: MockClock) -> None:
    slow, quick = Vendor("s", [answers(first=20.0)]), Vendor("q", [answers(first=1.0)])
    outcome = await ask(chain(slow, quick, policy=FailoverPolicy(hedge_after=2.0)))
    assert (outcome.text, outcome.first_token_at) == (FULL_TEXT, 3.0)
    assert (slow.cancelled, quick.calls, usage_owner(outcome)) == ([3.0], [2.0], ("q", "q-model"))


async def test_a_hedge_that_loses_is_cancelled_and_never_heard(autojump_clock: MockClock) -> None:
    first, second = Vendor("1", [answers(first=5.0)]), Vendor("2", [answers(first=10.0)])
    outcome = await ask(chain(first, second, policy=FailoverPolicy(hedge_after=2.0)))
    assert (outcome.text, outcome.first_token_at, second.cancelled) == (FULL_TEXT, 5.0, [5.0])


async def test_two_contenders_that_speak_in_one_tick_make_one_answer(autojump_clock: MockClock) -> None:
    first, second = Vendor("1", [answers(first=5.0)]), Vendor("2", [answers(first=3.0)])
    outcome = await ask(chain(first, second, policy=FailoverPolicy(hedge_after=2.0)))
    assert outcome.text == FULL_TEXT
    assert len(first.cancelled) + len(second.cancelled) == 1


async def test_a_first_attempt_that_fails_leaves_the_hedge_running(autojump_clock: MockClock) -> None:
    first = Vendor("1", [[4.0, *fails("upstream.auth")]])
    second = Vendor("2", [answers(first=10.0)])
    outcome = await ask(chain(first, second, policy=FailoverPolicy(hedge_after=2.0)))
    assert (outcome.text, outcome.first_token_at) == (FULL_TEXT, 12.0)


async def test_nothing_before_the_commitment_reaches_the_run(autojump_clock: MockClock) -> None:
    teasing: list[Act] = [(UsagePiece(9, 0), TextPiece("")), 1.0, *fails("upstream.overloaded")]
    primary, fallback = Vendor("p", [teasing]), Vendor("f", [answers(1)])
    seen: list[Piece] = []
    await chain(primary, fallback, retries=0).stream(ModelRequest((), "m"), seen.extend)
    assert UsagePiece(9, 0) not in seen
    assert [piece.text for piece in seen if isinstance(piece, TextPiece)] == ["w0 "]


async def test_when_every_circuit_is_open_the_error_says_when_to_come_back(autojump_clock: MockClock) -> None:
    vendor = Vendor("p", [fails("upstream.server")])
    policy = FailoverPolicy(breaker=BreakerLimits(failures=1, open_seconds=30))
    provider = chain(vendor, policy=policy, retries=0)
    assert (await ask(provider)).code == "upstream.server"
    await trio.sleep(10)
    outcome = await ask(provider)
    assert isinstance(outcome.end, Error)
    assert (outcome.end.code, outcome.end.retry_after, len(vendor.calls)) == ("upstream.overloaded", 20.0, 1)


async def test_a_cancelled_probe_lets_another_one_go(autojump_clock: MockClock) -> None:
    vendor = Vendor("p", [fails("upstream.server"), [100.0], answers(1)])
    policy = FailoverPolicy(breaker=BreakerLimits(failures=1, open_seconds=5))
    provider = chain(vendor, policy=policy, retries=0)
    await ask(provider)
    await trio.sleep(5)
    with trio.move_on_after(1):
        await ask(provider)
    assert (await ask(provider)).text == "w0 "


async def test_a_long_answer_that_ends_while_a_probe_is_out_lets_no_second_one_go(autojump_clock: MockClock) -> None:
    vendor = Vendor("p", [[*answers(1)[:-1], 8.0, END], fails("upstream.server"), [100.0]])
    policy = FailoverPolicy(breaker=BreakerLimits(failures=1, open_seconds=5))
    provider = chain(vendor, policy=policy, retries=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, provider)
        await trio.sleep(1)
        await ask(provider)  # fails: open
        await trio.sleep(5)
        nursery.start_soon(ask, provider)  # the probe
        await trio.sleep(4)  # the long answer has ended
        outcome = await ask(provider)
        assert (outcome.code, vendor.calls) == ("upstream.overloaded", [0.0, 1.0, 6.0])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", ["upstream.auth", "upstream.invalid_request", "upstream.context_length"])
async def test_what_will_not_pass_is_not_retried(code: ProviderErrorCode, autojump_clock: MockClock) -> None:
    vendor = Vendor("p", [fails(code)])
    assert ((await ask(chain(vendor))).code, len(vendor.calls)) == (code, 1)


class Dying:
    """A provider that still says something when its deadline cancels it, and may swallow the cancellation."""

    name = "dying"

    def __init__(self, *, swallows: bool) -> None:
        self.swallows = swallows

    async def stream(self, request: ModelRequest, emit: Emit) -> None:
        emit([RequestSentPiece()])
        try:
            await trio.sleep_forever()
        except trio.Cancelled:  # noqa: ASYNC103 - the fault that is shown
            emit([TextPiece("half an ans")])
            if not self.swallows:
                raise

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("swallows", [False, True])
async def test_what_an_attempt_says_when_its_deadline_has_fired_is_not_heard(
    swallows: bool, autojump_clock: MockClock
) -> None:
    links = [
        Link(provider=Dying(swallows=swallows), model="d", first_token=5),
        Link(provider=Vendor("f", [answers()]), model="f"),
    ]
    outcome = await ask(FailoverProvider(links))
    assert (outcome.text, outcome.first_token_at) == (FULL_TEXT, 5.5)
    alone = await ask(FailoverProvider(links[:1]))
    assert (alone.code, alone.text) == ("timeout.first_token", "")
    assert isinstance(alone.end, Error)
    assert alone.end.usage is not None, "what was sent is reckoned"
    assert (alone.end.usage.output_tokens, alone.end.usage.estimated) == (0, True)


@pytest.mark.parametrize("swallows", [False, True])
async def test_what_a_loser_says_when_it_is_cancelled_is_not_heard(swallows: bool, autojump_clock: MockClock) -> None:
    links = [
        Link(provider=Dying(swallows=swallows), model="d"),
        Link(provider=Vendor("f", [answers()]), model="f"),
    ]
    outcome = await ask(FailoverProvider(links, FailoverPolicy(hedge_after=2.0)))
    assert (outcome.text, outcome.first_token_at) == (FULL_TEXT, 2.5)


async def test_leaving_while_attempts_run_cancels_them_all(autojump_clock: MockClock) -> None:
    first, second = Vendor("1", [[100.0]]), Vendor("2", [[100.0]])
    with trio.move_on_after(7):
        await ask(chain(first, second, policy=FailoverPolicy(hedge_after=2.0)))
    assert (first.cancelled, second.cancelled) == ([7.0], [7.0])


async def test_an_answer_without_content_is_an_answer(autojump_clock: MockClock) -> None:
    primary, fallback = Vendor("p", [[1.0, END]]), Vendor("f", [answers()])
    outcome = await ask(chain(primary, fallback))
    assert isinstance(outcome.end, GenerationComplete)
    assert (outcome.text, fallback.calls, usage_owner(outcome)) == ("", [], ("p", "p-model"))


def test_a_chain_needs_a_link() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FailoverProvider([])


class Tasks(trio.abc.Instrument):
    """Counts the tasks that are begun while it listens."""

    def __init__(self) -> None:
        self.begun = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.begun += 1


@pytest.mark.parametrize(
    ("links", "hedge_after", "tasks"),
    [(1, None, 0), (2, None, 0), (1, 1.0, 0), (2, 1.0, 2)],
    ids=["a lone link", "a chain", "a lone link, hedged", "hedged"],
)
async def test_only_who_hedges_has_tasks_of_its_own(
    autojump_clock: MockClock, links: int, hedge_after: float | None, tasks: int
) -> None:
    scripts = [fails("upstream.server"), answers(words=1)]
    provider = chain(
        *(Vendor(f"v{number}", list(scripts)) for number in range(links)),
        policy=FailoverPolicy(first_backoff=0.25, hedge_after=hedge_after),
    )
    seen: list[Piece] = []
    counted = Tasks()
    trio.lowlevel.add_instrument(counted)
    await provider.stream(ModelRequest((), "m"), seen.extend)
    trio.lowlevel.remove_instrument(counted)
    assert [piece.text for piece in seen if isinstance(piece, TextPiece)] == ["w0 "]
    assert counted.begun == tasks


async def test_a_bug_in_a_lone_attempt_is_the_callers_as_it_is(autojump_clock: MockClock) -> None:
    class Buggy(Vendor):
        async def stream(self, request: ModelRequest, emit: Emit) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await chain(Buggy("b", [])).stream(ModelRequest((), "m"), lambda _: None)
