"""Whether client and upstream can be trusted with a workload: both at 1.5 times its load, no arm between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.bench.drive import RunningUpstream, run_client
from benchmarks.bench.job import TAG, Job, Outcome, Progress, Read
from benchmarks.bench.result import Calibration, Lateness
from benchmarks.bench.upstream_log import Stats

LOAD = 1.5
CHAT_PATH = "/v1/chat/completions"


class Limits(msgspec.Struct, frozen=True):
    """How late the 99th percentile may be, in milliseconds; None: it says nothing (a flood waits for its reader)."""

    client_ms: float | None = 5
    upstream_ms: float | None = 5
    start_ms: float | None = 20


def scaled(starts_s: Sequence[float], load: float = LOAD) -> list[float]:
    """So many times as many starts over the same time, spread as these are."""
    count = math.ceil(len(starts_s) * load)
    if count < 2 or len(starts_s) < 2:
        return list(starts_s) * count
    places = [number * (len(starts_s) - 1) / (count - 1) for number in range(count)]
    return [_between(starts_s, place) for place in places]


def _between(starts_s: Sequence[float], place: float) -> float:
    below = min(int(place), len(starts_s) - 2)
    return starts_s[below] + (starts_s[below + 1] - starts_s[below]) * (place - below)


def direct_body(script: str) -> str:
    """What an arm asks the upstream for, near enough."""
    return msgspec.json.encode(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": f"bench-{TAG}:{script}"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).decode()


def direct_job(job: Job, script: str, port: int, load: float = LOAD) -> Job:
    """A workload's job, asked of the upstream itself, with more streams, all of them read to the end."""
    return msgspec.structs.replace(
        job,
        host="127.0.0.1",
        port=port,
        path=CHAT_PATH,
        headers={"Content-Type": "application/json", "Authorization": "Bearer sk-bench"},
        body=direct_body(script),
        starts_s=list(job.starts_s) if job.one_at_a_time else scaled(job.starts_s, load),
        reads=(Read(),),
        stamps="clock",
        receive_buffer=None,
    )


def calibrate(
    job: Job,
    script: str,
    upstream: RunningUpstream,
    *,
    workload: str,
    limits: Limits,
    cpu: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Calibration:
    """Run it and judge it. The upstream's counts begin anew; ``script`` has to end by itself."""
    upstream.reset()
    outcome = run_client(direct_job(job, script, upstream.port), cpu=cpu, on_progress=on_progress)
    load = 1 if job.one_at_a_time else LOAD
    return judge(outcome, upstream.stats(), limits, workload=workload, n=len(job.starts_s), load=load)


def judge(outcome: Outcome, stats: Stats, limits: Limits, *, workload: str, n: int, load: float = LOAD) -> Calibration:
    """What was measured, and whether it is good enough."""
    client = Lateness.of(outcome.lateness)
    upstream = Lateness.of(stats.lateness)
    starts = Lateness.of(outcome.start_lateness)
    failed = [stream for stream in outcome.streams if stream.error or not stream.exact]
    reasons = [
        *_late("the client", client, limits.client_ms),
        *_late("the upstream", upstream, limits.upstream_ms),
        *_late("opening connections", starts, limits.start_ms),
    ]
    if failed:
        reasons.append(f"{len(failed)} of {len(outcome.streams)} streams failed: {failed[0].error}")
    if not outcome.events:
        reasons.append("no events came")
    return Calibration(
        workload=workload,
        n=n,
        load=load,
        streams=len(outcome.streams),
        events=outcome.events,
        events_per_s=round(_rate(outcome), 1),
        client_late_ms=client,
        upstream_late_ms=upstream,
        start_late_ms=starts,
        client_cpu_us_per_event=round(outcome.cpu_s * 1e6 / outcome.events, 2) if outcome.events else None,
        failed=len(failed),
        valid=not reasons,
        reason="; ".join(reasons),
    )


def why_invalid(outcome: Outcome, stats: Stats, limits: Limits) -> str:
    """Whether a round with an arm can be trusted: "" if upstream and client kept to their own schedules.

    How late the client *received* is the arm's doing there, and no reason.
    """
    return "; ".join(
        [
            *_late("the upstream", Lateness.of(stats.lateness), limits.upstream_ms),
            *_late("opening connections", Lateness.of(outcome.start_lateness), limits.start_ms),
        ]
    )


def line(calibration: Calibration) -> str:
    """For people."""
    client, upstream = calibration.client_late_ms.p99, calibration.upstream_late_ms.p99
    verdict = "valid" if calibration.valid else f"INVALID: {calibration.reason}"
    return (
        f"calibration {calibration.workload} n={calibration.n} at {calibration.load}x: "
        f"{calibration.events_per_s:.0f} events/s, p99 late: client {_ms(client)}, upstream {_ms(upstream)}; {verdict}"
    )


def _late(who: str, lateness: Lateness, limit_ms: float | None) -> list[str]:
    if limit_ms is None or lateness.p99 is None or lateness.p99 <= limit_ms:
        return []
    return [f"{who} was {lateness.p99:.2f} ms late at p99, more than {limit_ms:g} ms"]


def _rate(outcome: Outcome) -> float:
    """Events a second, from the first to the last."""
    came = [stream for stream in outcome.streams if stream.events]
    if not came:
        return 0
    first = min(stream.first_event_ns for stream in came)
    last = max(stream.last_event_ns for stream in came)
    return outcome.events * 1e9 / max(last - first, 1)


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} ms"
