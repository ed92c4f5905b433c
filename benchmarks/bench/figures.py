"""Which figures are shown, in the report's plots and in the README's table, and what they are called."""

from __future__ import annotations

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One plot, and one column of the table.

    Attributes:
        workload, metric, n: which; ``n`` None is the largest step.
        title, note: for people.
        unit: of the metric.
        column: in the README's table; "" leaves it out.
    """

    workload: str
    metric: str
    title: str
    note: str
    unit: str
    column: str = ""
    n: int | None = None


FIGURES = (
    Figure(
        workload="w2",
        metric="cpu_us_per_event",
        n=200,
        title="CPU for each event, 200 streams of 20 a second",
        note="The server's user and system time by events that reached the client; less is better.",
        unit="µs",
        column="paced, CPU µs/event",
    ),
    Figure(
        workload="w3",
        metric="cpu_us_per_event",
        n=20,
        title="CPU for each event, recorded GPT-4o",
        note="20 streams at once with the gaps of real answers.",
        unit="µs",
        column="GPT-4o, CPU µs/event",
    ),
    Figure(
        workload="w5",
        metric="cpu_us_per_event",
        title="CPU for each event, flood",
        note="50 streams of 200 events as fast as they go: it measures how well a server takes many at once.",
        unit="µs",
        column="flood, CPU µs/event",
    ),
    Figure(
        workload="w1",
        metric="ttfe_added_ms.p50",
        title="Added time to the first event, one at a time",
        note="From the scheduled start to the first text at the client, less the upstream's part; a connection each.",
        unit="ms, p50",
        column="first event +ms",
    ),
    Figure(
        workload="w2",
        metric="event_lateness_ms.p99",
        n=200,
        title="Lateness of events, 200 streams of 20 a second",
        note="Client's receive behind the upstream's write of the same event.",
        unit="ms, p99",
        column="paced, late p99 ms",
    ),
    Figure(
        workload="w3",
        metric="streams_per_core",
        n=0,
        title="Streams per core, recorded GPT-4o",
        note="The most at once, all smaller steps held: late p99 < 50 ms, first event p99 < 100 ms, no errors.",
        unit="streams",
        column="streams/core",
    ),
    Figure(
        workload="w10",
        metric="mem_kib_per_stream",
        title="Memory for each open stream",
        note="PSS with the streams open and quiet, less that of the warm server.",
        unit="KiB",
        column="KiB/stream",
    ),
    Figure(
        workload="w6-stream",
        metric="cancel_ms.p99",
        title="From the client's leaving to the upstream's being closed",
        note="The client closes after three events.",
        unit="ms, p99",
        column="leave p99 ms",
    ),
    Figure(
        workload="w11",
        metric="cpu_us_per_stream",
        title="CPU for each agent run with two tools",
        note="Two tool calls at once, their results, an answer of 40 events, all kept in a session.",
        unit="µs",
        column="agent run, CPU µs",
    ),
    Figure(
        workload="w8",
        metric="start_ms",
        title="Start to the first 200",
        note="From exec on.",
        unit="ms",
        column="start ms",
    ),
)

TAILS = (("w2", 200, "200 streams of 20 events a second"), ("w3", 20, "20 recorded GPT-4o streams at once"))
"""The distributions of lateness that are drawn."""
