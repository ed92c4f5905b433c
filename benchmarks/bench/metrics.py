"""What a trial's raw results come to: plain functions of what was seen, none of which asks a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import TypeAlias

import msgspec

from benchmarks.bench.histogram import Histogram
from benchmarks.bench.job import Outcome, Stream
from benchmarks.bench.statistics import PERCENTS, nearest_rank
from benchmarks.bench.upstream_log import Served, closings, own_time_ns
from benchmarks.bench.yardstick import Pieces

MS = 1e6
KIB = 1024
LATE_MS = 50.0
ADDED_MS = 100.0
LATENESS = "event_lateness_ms"


class Sample(msgspec.Struct, frozen=True):
    """A look at the arm during a trial, twice a second: events so far, streams open, CPU time, memory if wanted."""

    events: int
    open: int
    cpu_s: float
    pss_bytes: int = 0
    at_ns: int = 0


class Seen(msgspec.Struct, kw_only=True):
    """One trial, raw.

    Attributes:
        outcome: of the client.
        log: of the upstream, fetched as much later as a leak may last.
        cpu_s: that the arm took for it, until it was quiet again.
        idle_bytes: the arm's memory, warm and idle, before.
        samples: of the time in between.
        pieces: the yardstick's, of the time that the client was at work; none without one.
        work: the CPU time in pieces: divided by what a piece took meanwhile; 0 without any.
    """

    outcome: Outcome
    log: list[Served]
    cpu_s: float
    idle_bytes: int = 0
    samples: list[Sample] = []
    pieces: Pieces = Pieces()
    work: float = 0.0


Metrics: TypeAlias = dict[str, float]
Measure: TypeAlias = Callable[[Seen], Metrics]


def percentiles(name: str, values: Iterable[float], digits: int = 4) -> Metrics:
    """``name.p50`` and so on; nothing of no values."""
    ordered = sorted(values)
    found = {f"{name}.{key}": nearest_rank(ordered, percent) for key, percent in PERCENTS.items()}
    return {key: round(value, digits) for key, value in found.items() if value is not None}


def answered(seen: Seen) -> list[Stream]:
    """The streams of which at least one event came."""
    return [stream for stream in seen.outcome.streams if stream.first_event_ns]


def failures(seen: Seen) -> Metrics:
    """Streams with an error, also those that did not end in time, and how many there were."""
    streams = seen.outcome.streams
    return {"streams": len(streams), "failed": sum(bool(stream.error) for stream in streams)}


def first_times(seen: Seen) -> Metrics:
    """First byte and first event from the scheduled start on, and what of it is not the upstream's own."""
    return _first_percentiles(seen, ((stream, MS) for stream in answered(seen)), digits=4)


def lateness(seen: Seen) -> Metrics:
    """How long events were on their way from the upstream's write to the client."""
    counts = seen.outcome.lateness
    found = {key: counts.percentile(percent) for key, percent in PERCENTS.items()}
    return {f"{LATENESS}.{key}": round(ns / MS, 4) for key, ns in found.items() if ns is not None}


def cost(seen: Seen) -> Metrics:
    """The arm's CPU time by event and by stream."""
    events, streams = seen.outcome.events, len(seen.outcome.streams)
    if not events or seen.cpu_s <= 0:
        return {}
    return {
        "cpu_us_per_event": round(seen.cpu_s * 1e6 / events, 3),
        "cpu_us_per_stream": round(seen.cpu_s * 1e6 / streams, 1),
        "events": events,
    }


def rate(seen: Seen) -> Metrics:
    """Events a second from the first to the last."""
    streams = answered(seen)
    if not streams:
        return {}
    taken = max(stream.last_event_ns for stream in streams) - min(stream.first_event_ns for stream in streams)
    return {"events_per_s": round(seen.outcome.events * 1e9 / taken)} if taken else {}


def totals(seen: Seen) -> Metrics:
    """Whole answers from the scheduled start on."""
    whole = [stream for stream in seen.outcome.streams if stream.whole]
    return percentiles("total_ms", ((stream.ended_ns - stream.scheduled_ns) / MS for stream in whole))


def all_open(seen: Seen) -> list[Sample]:
    """The samples while every stream was open."""
    return [sample for sample in seen.samples if sample.open == len(seen.outcome.streams)]


def steady_cost(seen: Seen) -> Metrics:
    """CPU time by event while every stream was open: what starting and ending take is not in it."""
    samples = all_open(seen)
    found = _between(samples[:1] + samples[-1:])
    return {} if found is None else {"steady_cpu_us_per_event": round(found, 3)}


def growth(seen: Seen) -> Metrics:
    """What an event cost in the last fifth of the time that all streams were open, to the first fifth.

    Where it is known how fast the core was in either, that is taken out.
    """
    samples = all_open(seen)
    part = len(samples) // 5
    fifths = samples[: part + 1], samples[-part - 1 :]
    first, last = map(_between, fifths)
    if not (part and first and last):
        return {}
    of_first, of_last = (_piece_us(seen, fifth) for fifth in fifths)
    if of_first is None or of_last is None:
        return {"growth": round(last / first, 4)}
    evened = last / of_last / (first / of_first)
    return {"growth": round(evened, 4), "growth_as_measured": round(last / first, 4)}


def _between(samples: list[Sample]) -> float | None:
    """Microseconds an event, from the first to the last of them."""
    if len(samples) < 2 or samples[-1].events == samples[0].events:
        return None
    return (samples[-1].cpu_s - samples[0].cpu_s) * 1e6 / (samples[-1].events - samples[0].events)


def _piece_us(seen: Seen, samples: list[Sample]) -> float | None:
    """What the yardstick's piece took between the first and the last of them."""
    return seen.pieces.between(samples[0].at_ns, samples[-1].at_ns).mean_us() if samples else None


def in_pieces(seen: Seen, measured: Metrics) -> Metrics:
    """Of what was measured that which goes with the core's speed, by the microseconds of a piece at the time.

    That is CPU time, and the times of requests that come one at a time (``first_times_in_pieces``). With many at once a
    request waits for others, which came when the core had another speed.
    """
    if not seen.work:
        return {}
    whole_us = seen.cpu_s * 1e6 / seen.work
    steady_us = _piece_us(seen, all_open(seen)) or whole_us
    by = {"cpu_us_per_event": whole_us, "cpu_us_per_stream": whole_us, "steady_cpu_us_per_event": steady_us}
    return {name: round(measured[name] / piece_us, 9) for name, piece_us in by.items() if name in measured}


def first_times_in_pieces(seen: Seen) -> Metrics:
    """As ``first_times``, each request's by the microseconds of a piece about when it was under way."""
    units: list[tuple[Stream, float]] = []
    for stream in answered(seen):
        piece_us = seen.pieces.near_us((stream.scheduled_ns + stream.first_event_ns) // 2)
        if piece_us is None:
            return {}
        units.append((stream, MS * piece_us))
    return _first_percentiles(seen, units, digits=9)


def _first_percentiles(seen: Seen, units: Iterable[tuple[Stream, float]], digits: int) -> Metrics:
    """Of the streams' first times, each in a unit of its own: so many nanoseconds."""
    own = own_time_ns(seen.log)
    found: dict[str, list[float]] = {"ttfb_ms": [], "ttfe_ms": [], "ttfe_added_ms": []}
    for stream, unit_ns in units:
        taken = stream.first_event_ns - stream.scheduled_ns
        found["ttfb_ms"].append((stream.first_byte_ns - stream.scheduled_ns) / unit_ns)
        found["ttfe_ms"].append(taken / unit_ns)
        if stream.tag in own:
            found["ttfe_added_ms"].append((taken - own[stream.tag]) / unit_ns)
    return {key: value for name, values in found.items() for key, value in percentiles(name, values, digits).items()}


def memory(seen: Seen) -> Metrics:
    """What one open stream holds of the arm's memory; nothing if there were some that it had not come to."""
    samples = [sample.pss_bytes for sample in all_open(seen) if sample.pss_bytes]
    if not samples or len(answered(seen)) < len(seen.outcome.streams):
        return {}
    held = (samples[-1] - seen.idle_bytes) / KIB / len(seen.outcome.streams)
    return {"mem_kib_per_stream": round(held, 2), "idle_mib": round(seen.idle_bytes / KIB / KIB, 1)}


def cancels(seen: Seen) -> Metrics:
    """From the client's close to the upstream's seeing it; who stayed open, and who was not there to be closed."""
    found = closings(seen.outcome.streams, seen.log)
    return {
        **percentiles("cancel_ms", (ns / MS for ns in found.delays_ns)),
        "leaked_upstreams": len(found.leaked),
        "closed": len(found.delays_ns),
        "over_before": len(found.over_before),
        "never_asked": len(found.never_asked),
    }


def replay_errors(seen: Seen) -> Metrics:
    """How far events are from their place in the recording, and by how much more the last are late than the first.

    Of one stream that is chance, as a timer is a millisecond: the drift is the median over streams, without its sign.
    """
    counts = seen.outcome.lateness
    found = {key: counts.percentile(percent) for key, percent in PERCENTS.items()}
    errors = {f"replay_error_us.{key}": round(ns / 1e3, 1) for key, ns in found.items() if ns is not None}
    drifts = [stream.last_error_ns / 1e3 for stream in answered(seen)]
    return errors | ({"replay_drift_us": round(abs(median(drifts)), 1)} if drifts else {})


def passes(metrics: Metrics) -> bool:
    """Whether a step of "streams per core" is held: in time, without errors, bytes exact."""
    late, added = metrics.get(f"{LATENESS}.p99"), metrics.get("ttfe_added_ms.p99")
    return late is not None and added is not None and late < LATE_MS and added < ADDED_MS and not metrics["failed"]


def histograms(seen: Seen) -> dict[str, Histogram]:
    """The distributions that are kept."""
    return {LATENESS: seen.outcome.lateness} if seen.outcome.lateness.total else {}
