"""The benchmark's upstream, a process, and its client, in this one, over real sockets of the loopback."""

from __future__ import annotations

import http.client
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from benchmarks.bench.calibration import CHAT_PATH, direct_body
from benchmarks.bench.client import Client
from benchmarks.bench.drive import RunningUpstream, run_client, running_upstream
from benchmarks.bench.job import Job, Outcome, Progress, Read, Stream
from benchmarks.bench.scripts import script_of
from benchmarks.bench.stamps import stamp
from benchmarks.bench.upstream_log import Served, closings, own_time_ns

PATIENCE = 20


@pytest.fixture(scope="module")
def running() -> Iterator[RunningUpstream]:
    with running_upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(running: RunningUpstream) -> RunningUpstream:
    running.reset()
    return running


def job_for(port: int, script: str = "one", starts: int = 1, *reads: Read, spread_s: float = 0) -> Job:
    return Job(
        host="127.0.0.1",
        port=port,
        path=CHAT_PATH,
        headers={"Content-Type": "application/json"},
        body=direct_body(script),
        starts_s=[number * spread_s for number in range(starts)],
        reads=reads or (Read(),),
        patience_s=PATIENCE,
    )


def run(job: Job) -> Outcome:
    return Client(job).run()


def assert_good(stream: Stream, events: int) -> None:
    assert (stream.error, stream.status, stream.events, stream.whole, stream.exact) == ("", 200, events, True, True)
    times = [stream.scheduled_ns, stream.connected_ns, stream.first_byte_ns, stream.first_event_ns]
    times += [stream.last_event_ns, stream.ended_ns]
    assert times == sorted(times)
    assert stream.connected_ns <= stream.first_written_ns <= stream.first_event_ns


@pytest.mark.parametrize(
    "script", ["one", "flood-30", "flood-2000", "paced-1000x20", "gpt4o-16", "mooncake-2000x10", "paced-5000x700"]
)
def test_every_event_comes(upstream: RunningUpstream, script: str) -> None:
    outcome = run(job_for(upstream.port, script, 3))
    counts = [script_of(script, tag).count for tag in range(3)]
    for stream, count in zip(outcome.streams, counts, strict=True):
        assert_good(stream, count)
    assert outcome.events == outcome.events_in_window == outcome.lateness.total == sum(counts)
    assert outcome.start_lateness.total == 3
    log, stats = upstream.log(), upstream.stats()
    assert sorted((served.tag, served.name, served.events, served.ending) for served in log) == [
        (tag, script, count, "whole") for tag, count in enumerate(counts)
    ]
    assert (stats.requests, stats.events, stats.open_answers, stats.refused) == (3, sum(counts), 0, 0)
    assert outcome.progress[-1].ended == 3
    received = {served.tag: served.received_ns for served in log}
    for tag, own_ns in own_time_ns(log).items():
        assert outcome.streams[tag].first_written_ns == received[tag] + own_ns


def test_events_keep_to_their_times(upstream: RunningUpstream) -> None:
    outcome = run(job_for(upstream.port, "paced-100x11"))
    [stream] = outcome.streams
    assert stream.last_event_ns - stream.first_written_ns >= 0.09e9
    shift = script_of("paced-100x11", 0).shift_ns(0)
    [served] = upstream.log()
    assert served.first_write_ns >= served.received_ns + shift
    assert served.ended_ns >= served.received_ns + shift + 100_000_000
    assert upstream.stats().lateness.total == 11


def test_tools_are_called_and_their_results_answered(upstream: RunningUpstream) -> None:
    [asked] = run(job_for(upstream.port, "tools-2-flood-5")).streams
    assert (asked.status, asked.events, asked.whole) == (200, 0, False)
    assert "not whole" in asked.error
    job = job_for(upstream.port, "tools-2-flood-5")
    messages = msgspec.json.decode(job.body)
    messages["messages"] += [{"role": "tool", "tool_call_id": "call_bench_1", "content": "86400"}]
    [answered] = run(msgspec.structs.replace(job, body=msgspec.json.encode(messages).decode())).streams
    assert_good(answered, 5)
    first, second = upstream.log()
    own = (first.ended_ns - first.received_ns) + (second.first_write_ns - second.received_ns)
    assert own_time_ns([first, second]) == {0: own}


def test_the_model_names_the_script_too(upstream: RunningUpstream) -> None:
    job = job_for(upstream.port)
    body = '{"model":"openai/flood-7","messages":[{"role":"user","content":"bench-@TAG@"}],"stream": true}'
    outcome = run(msgspec.structs.replace(job, body=body, first_tag=5))
    assert_good(outcome.streams[0], 7)
    assert outcome.streams[0].tag == 5


def test_the_last_message_says_who_asks(upstream: RunningUpstream) -> None:
    job = job_for(upstream.port)
    messages = [{"role": "user", "content": said} for said in ("bench-000099:flood-2", "bench-@TAG@:flood-3")]
    body = msgspec.json.encode({"messages": messages, "stream": True}).decode()
    assert_good(run(msgspec.structs.replace(job, body=body)).streams[0], 3)


BEFORE_HEADERS = Read(close_after_s=0.01)
AFTER_THREE = Read(close_after_events=3)
NOT_READING = Read(stop_after_events=1, close_after_s=0.01)


@pytest.mark.parametrize(
    ("script", "read", "events", "ending"),
    [
        ("silent", BEFORE_HEADERS, 0, "fin"),
        ("stalled-3", AFTER_THREE, 3, "fin"),
        ("flood-20000", NOT_READING, None, "reset"),
    ],
)
def test_the_upstream_sees_a_close(
    upstream: RunningUpstream, script: str, read: Read, events: int | None, ending: str
) -> None:
    job = msgspec.structs.replace(job_for(upstream.port, script, 2, read), receive_buffer=4096)
    outcome = run(job)
    for stream in outcome.streams:
        assert (stream.closed, stream.error, stream.whole) == (True, "", False)
        assert events is None or stream.events == events
    log = upstream.log()
    assert [served.ending for served in log] == [ending] * 2
    found = closings(outcome.streams, log)
    assert (len(found.delays_ns), found.leaked, found.over_before, found.never_asked) == (2, [], [], [])
    assert min(found.delays_ns) >= 0
    assert upstream.open_now().answers == 0


def test_what_became_of_closed_streams() -> None:
    def closed(tag: int) -> Stream:
        return Stream(tag, 0, ended_ns=100, closed=True)

    streams = [closed(0), closed(1), closed(2), closed(3), Stream(4, 0, ended_ns=100)]
    log = [
        Served(0, "silent", 10, ended_ns=130, ending="fin"),
        Served(1, "silent", 10),
        Served(2, "one", 10, ended_ns=90, ending="whole"),
        Served(4, "silent", 10),
    ]
    found = closings(streams, log)
    assert (found.delays_ns, found.leaked, found.over_before, found.never_asked) == ([30], [1], [2], [3])


def test_a_reader_that_stalls_and_comes_back(upstream: RunningUpstream) -> None:
    stalled = Read(stop_after_events=1, resume_after_s=0.02)
    job = job_for(upstream.port, "flood-20000", 2, stalled, Read())  # more than the sockets hold
    outcome = run(msgspec.structs.replace(job, receive_buffer=32768))
    assert [(stream.events, stream.exact, stream.error) for stream in outcome.streams] == [(20_000, True, "")] * 2


def test_what_never_ends_is_unfinished(upstream: RunningUpstream) -> None:
    outcome = run(msgspec.structs.replace(job_for(upstream.port, "stalled-2", 2), patience_s=0.05))
    assert [(stream.events, stream.whole, stream.error) for stream in outcome.streams] == [(2, False, "unfinished")] * 2


def test_a_refusal_is_kept(upstream: RunningUpstream) -> None:
    [stream] = run(job_for(upstream.port, "nonsense")).streams
    assert (stream.status, stream.whole, stream.exact) == (404, False, False)
    assert "no such answer" in stream.error
    assert upstream.stats().refused == 1


def test_a_refused_connection_is_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run(job_for(port, "one", 2))
    assert [stream.error for stream in outcome.streams] == ["Connection refused"] * 2
    assert all(stream.ended_ns for stream in outcome.streams)


def test_one_after_the_other(upstream: RunningUpstream) -> None:
    job = msgspec.structs.replace(job_for(upstream.port, "one", 5, spread_s=0.001), one_at_a_time=True)
    streams = run(job).streams
    assert len(streams) == 5
    for before, after in itertools.pairwise(streams):
        assert after.scheduled_ns >= before.ended_ns + 1_000_000
        assert_good(after, 1)


@pytest.mark.parametrize(("window_s", "counted"), [((-20, -10), 0), ((-20, 60), 2), ((60, 70), 0)])
def test_a_window_leaves_the_rest_out(upstream: RunningUpstream, window_s: tuple[float, float], counted: int) -> None:
    outcome = run(msgspec.structs.replace(job_for(upstream.port, "one", 2), window_s=window_s))
    assert (outcome.events, outcome.events_in_window, outcome.lateness.total) == (2, counted, counted)
    assert outcome.window_ns == tuple(outcome.start_ns + second * 10**9 for second in window_s)


def test_requests_share_a_connection(upstream: RunningUpstream) -> None:
    body = direct_body("flood-3").replace("@TAG@", "000001").encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection(("127.0.0.1", upstream.port)) as sock, sock.makefile("rb") as answers:
        sock.sendall(request + request[:10])
        sock.sendall(request[10:] + b"GET /v1/models HTTP/1.1\r\n\r\n")
        received = b""
        while b'"list"' not in received:
            received += answers.read1()
    assert received.count(b"[DONE]") == 2
    assert len(upstream.log()) == 2


def test_a_whole_answer_for_who_asks_for_one(upstream: RunningUpstream) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", upstream.port)
    connection.request("POST", CHAT_PATH, b'{"model":"one","messages":[]}')
    answer = msgspec.json.decode(connection.getresponse().read())
    connection.close()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ok"}


def test_a_client_process(upstream: RunningUpstream) -> None:
    told: list[Progress] = []
    outcome = run_client(job_for(upstream.port, "one", 2, spread_s=0.6), on_progress=told.append)
    assert [stream.exact for stream in outcome.streams] == [True, True]
    assert [progress.events for progress in told] == [1]


def test_a_client_process_that_fails(upstream: RunningUpstream) -> None:
    with pytest.raises(RuntimeError, match="starts_s"):
        run_client(msgspec.structs.replace(job_for(upstream.port), starts_s=["never"]))


@contextmanager
def answering(answer: Callable[[list[socket.socket]], None], connections: int) -> Iterator[int]:
    """The port of a server that answers all connections by ``answer`` once so many are there and have asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted = [listener.accept()[0] for _ in range(connections)]
            for sock in accepted:
                sock.recv(65536)
            answer(accepted)
            for sock in accepted:
                sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def saying(*stamps: str) -> Callable[[list[socket.socket]], None]:
    def answer(accepted: list[socket.socket]) -> None:
        for sock in accepted:
            sock.sendall(HEAD + "".join(f"data: {text}\n\n" for text in stamps).encode())

    return answer


def test_latency_counts_from_the_schedule() -> None:
    """A server that answers nobody until the last has come: a closed loop would wait for it for ever."""
    with answering(saying(stamp(0, 0, 1, last=True)), 10) as port:
        outcome = run(job_for(port, "one", 10, spread_s=0.005))
    last = outcome.streams[-1]
    for number, stream in enumerate(outcome.streams):
        assert stream.scheduled_ns == outcome.start_ns + number * 5_000_000
        assert stream.first_byte_ns - stream.scheduled_ns >= last.scheduled_ns - stream.scheduled_ns
        assert stream.connected_ns < last.first_byte_ns


@pytest.mark.parametrize(
    "stamps",
    [
        [stamp(0, 0, 1), stamp(2, 0, 1, last=True)],
        [stamp(0, 0, 1), stamp(0, 0, 1), stamp(1, 0, 1, last=True)],
        [stamp(1, 0, 1), stamp(0, 0, 1), stamp(2, 0, 1, last=True)],
        [stamp(0, 0, 1), stamp(1, 9, 1), stamp(2, 0, 1, last=True)],
    ],
    ids=["missing", "doubled", "swapped", "of another stream"],
)
def test_what_is_not_exact(stamps: list[str]) -> None:
    with answering(saying(*stamps), 1) as port:
        [stream] = run(job_for(port)).streams
    assert (stream.whole, stream.exact, stream.events) == (True, False, len(stamps))
    assert stream.error == "events are missing, doubled, or another's"


def test_an_arm_may_repeat_the_whole_text_at_the_end() -> None:
    texts = [stamp(0, 0, 1), stamp(1, 0, 1, last=True)]
    with answering(saying(*texts, "".join(texts)), 1) as port:
        [stream] = run(job_for(port)).streams
    assert (stream.events, stream.whole, stream.exact, stream.error) == (2, True, True, "")


def test_an_end_before_the_last_event() -> None:
    with answering(saying(stamp(0, 0, 1)), 1) as port:
        [stream] = run(job_for(port)).streams
    assert (stream.events, stream.whole, stream.exact) == (1, False, False)
    assert stream.error.startswith("status 200, not whole")


def test_offsets_of_a_recording() -> None:
    """All came at once, though they should have been 1 s and 3 s after the first."""
    second = 1_000_000_000
    texts = [stamp(0, 0, second), stamp(1, 0, 2 * second), stamp(2, 0, 4 * second, last=True)]
    with answering(saying(*texts), 2) as port:
        outcome = run(msgspec.structs.replace(job_for(port, "one", 2), stamps="offset"))
    for stream in outcome.streams:
        assert stream.exact
        assert stream.last_error_ns == stream.last_event_ns - stream.first_event_ns - 3 * second
    assert outcome.lateness.total == 6


def test_the_upstreams_own_time() -> None:
    log = [
        Served(0, "tools-2", 100, ended_ns=110, ending="whole"),
        Served(1, "one", 100, first_write_ns=103, ended_ns=104, ending="whole"),
        Served(0, "tools-2", 200, first_write_ns=205, ended_ns=290, ending="whole"),
        Served(0, "tools-2", 300, first_write_ns=301, ended_ns=302, ending="whole"),
        Served(2, "silent", 100),
        Served(3, "silent", 100, ended_ns=200, ending="fin"),
    ]
    assert own_time_ns(log) == {0: 10 + 5, 1: 3}
