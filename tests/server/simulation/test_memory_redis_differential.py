"""The Redis in memory answers what a real one answers, to any commands and scripts of the shared log."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing
from coredis.exceptions import RedisError
from coredis.parser import NotEnoughData, Parser
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.redis_link import Command, Link, RedisAwayError
from server.shared_scripts import (
    APPEND,
    BEAT,
    BURY,
    CLAIM,
    END_LOST,
    FORGET,
    LEAVE,
    OPEN,
    SCRIPTS,
    WORKERS,
    events_key,
    grave_key,
    inbox_key,
    run_key,
    runs_key,
)
from server.simulation.memory_link import MemoryLink
from server.simulation.memory_redis import MemoryRedis
from tests.harness.redis import RedisServer

LIVE = 10_000_000
"""Milliseconds: nothing expires in a test on the wall clock."""


class RealRedis:
    """A real server, asked over a bare socket and understood as coredis does, all at once: it is quick."""

    def __init__(self, server: RedisServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._parser = Parser()
        self.ask([["HELLO", 3]])

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        for command in commands:
            words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
            bulks = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
            self._socket.sendall(b"*%d\r\n%s" % (len(words), bulks))
        return [self._answer() for _ in commands]

    def _answer(self) -> Any:
        while isinstance(answer := self._parser.parse(), NotEnoughData):
            self._parser.feed(self._socket.recv(65_536))
        said = answer[1]
        return _problem(str(said)) if isinstance(said, RedisError) else said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    real = RealRedis(server)
    yield real
    real.close()
    server.kill()


async def _ask_each(link: Link, commands: Sequence[Command]) -> list[Any]:
    answers: list[Any] = []

    async def session() -> None:
        for command in commands:
            try:
                answers.append(await link.ask(*command))
            except RedisAwayError as error:
                answers.append(_problem(str(error)))
        scope.cancel()

    with trio.CancelScope() as scope:
        await link.run(session)
    return answers


def _problem(text: str) -> str:
    """Redis's words, without the place in the script; Lua's own words are not compared."""
    words = text.partition(" script: ")[0]
    if words.lower().startswith("unknown redis command") or words.startswith("unknown command"):
        return "error: unknown command"
    of_lua = words.startswith("Error compiling") or "user_script" in words or "<python>" in words
    return "error: " + ("in Lua" if of_lua else words)


def _compare(real: RealRedis, commands: Sequence[Command]) -> list[Any]:
    async def ask_memory() -> list[Any]:
        return await _ask_each(MemoryLink(MemoryRedis(), "memory"), commands)

    _, *expected = real.ask([["FLUSHALL"], *commands])
    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(1e6)  # so that an id made of the time is seen to be one
    answers: list[Any] = trio.run(ask_memory, clock=clock)
    for command, expected_answer, answer in zip(commands, expected, answers, strict=True):
        assert _comparable(command, answer) == _comparable(command, expected_answer), command
    return answers


def _comparable(command: Command, answer: Any) -> Any:
    """Ids made of the time are not compared, nor is the order of all keys, nor what is left of a time."""
    match command[0], answer:
        case "XADD", bytes() if "*" in command:
            return "an id"
        case "KEYS", list():
            return sorted(answer)
        case "PTTL", int() if answer > 0:
            return "lives"
        case "XREAD", dict():
            return {key: _without_times(entries) for key, entries in answer.items()}
        case "XRANGE" | "XREVRANGE", list():
            return _without_times(answer)
    return type(answer), answer


def _without_times(entries: list[Any]) -> list[Any]:
    return [[entry_id if len(entry_id) < 8 else "an id", fields] for entry_id, fields in entries]


words = st.sampled_from(["a", "b", "c"])
texts = st.sampled_from(["", "1", "-7", "x", "ü", "07", "1.5", "a\r\n\0b"])
hashes, sets, streams, inboxes = (st.sampled_from([f"{kind}1", f"{kind}2"]) for kind in ("hash", "set", "ev", "in"))
keys = hashes | sets | streams | inboxes | st.sampled_from(["string1", "string2"])
ids = st.builds("{}-{}".format, st.integers(0, 6), st.sampled_from([0, 0, 0, 1]))
starts = st.one_of(ids, st.just("-"), ids.map("({}".format), st.integers(0, 4).map(str))
ends = st.one_of(ids, st.just("+"), ids.map("({}".format), st.integers(0, 4).map(str))
counts: st.SearchStrategy[list[Any]] = st.one_of(st.just([]), st.integers(1, 3).map(lambda count: ["COUNT", count]))
lengths: st.SearchStrategy[list[Any]] = st.one_of(
    st.just([]),
    st.integers(0, 3).map(lambda length: ["MAXLEN", length]),
    st.just(["MAXLEN", "=", 2]),
    st.just(["MAXLEN", "~", 10_000]),
)


def _command(name: str, *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    def flat(drawn: tuple[Any, ...]) -> list[Any]:
        return [name, *(word for part in drawn for word in (part if isinstance(part, list) else [part]))]

    return st.tuples(*parts).map(flat)


def _some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(strategy, min_size=1, max_size=3)


pairs = _some(st.tuples(words, texts)).map(lambda several: [word for pair in several for word in pair])
lives = st.sampled_from([LIVE, LIVE, LIVE, 0, -5, "x"])
commands = st.one_of(
    _command("DEL", _some(keys)),
    _command("EXISTS", _some(keys)),
    _command("PEXPIRE", keys, lives),
    _command("PTTL", keys),
    _command("KEYS", st.just("*")),
    _command("SET", keys, texts, st.one_of(st.just([]), lives.map(lambda live: ["PX", live]))),
    _command("GET", keys),
    _command("HEXISTS", keys, words),
    _command("HGET", keys, words),
    _command("HMGET", hashes, _some(words)),
    _command("HGETALL", keys),
    _command("HSET", keys, pairs),
    _command("HSET", hashes, st.sampled_from([["a"], ["a", "b", "c"]])),
    _command("HINCRBY", hashes, words, st.integers(-3, 3)),
    _command("HDEL", keys, _some(words)),
    _command("SADD", keys, _some(words)),
    _command("SREM", keys, _some(words)),
    _command("SCARD", keys),
    _command("SMEMBERS", keys),
    _command("XADD", streams, st.sampled_from([[], ["NOMKSTREAM"]]), lengths, ids, pairs),
    _command("XADD", inboxes | hashes, st.sampled_from([[], ["NOMKSTREAM"]]), lengths, st.just("*"), pairs),
    _command("XTRIM", streams, lengths.filter(bool)),
    _command("XRANGE", keys, starts, ends, counts),
    _command("XREVRANGE", keys, ends, starts, counts),
    _command("XREAD", counts, st.just("STREAMS"), streams, ids),
    _command(
        "XREAD",
        st.just(["BLOCK", 1, "COUNT", 2, "STREAMS", "ev1", "ev2", "in1"]),
        st.tuples(ids, ids, ids).map(list),
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(commands=st.lists(commands, min_size=5, max_size=40))
def test_commands_are_answered_as_by_a_real_redis(real: RealRedis, commands: list[Command]) -> None:
    _compare(real, [*commands, *_everything(["ev1", "ev2", "in1", "in2"], ["hash1", "hash2"], ["set1", "set2"])])


def _everything(streams: list[str], hashes: list[str], sets: list[str]) -> list[Command]:
    """What asks for all that is there."""
    return [
        ["KEYS", "*"],
        *(["XRANGE", key, "-", "+"] for key in streams),
        *(["HGETALL", key] for key in hashes),
        *(["SMEMBERS", key] for key in sets),
        *(["PTTL", key] for key in [*streams, *hashes, *sets]),
    ]


workers = st.sampled_from(["one", "two"])
runs = st.sampled_from(["r1", "r2"])
ENDED = '["status","done","elapsed_ms","1.500","ttfb_ms","\\u00fc"]'


def _append(worker: str, run: str, first: int, many: int, end: bool, live: int) -> list[Any]:
    events = [word for seq in range(first, first + many) for word in (seq, f'{{"n":{seq}}}')]
    terminal = first + many - 1 if end and many else 0
    called = [events_key(run), run_key(run), runs_key(worker)]
    return APPEND.call(called, worker, run, LIVE, terminal, live, ENDED, *events)


scripts = st.one_of(
    st.builds(lambda w, r: OPEN.call([run_key(r), runs_key(w)], w, r, LIVE, "agent_id", "ä", "x", ""), workers, runs),
    st.builds(_append, workers, runs, st.integers(1, 5), st.integers(0, 4), st.booleans(), st.sampled_from([LIVE, 0])),
    st.builds(lambda w: BEAT.call([WORKERS, grave_key(w), inbox_key(w)], w, LIVE), workers),
    st.builds(lambda w, b: BURY.call([WORKERS, grave_key(w)], w, str(b), LIVE), workers, st.integers(1, 3)),
    st.builds(lambda d, h, r: CLAIM.call([run_key(r), runs_key(d), runs_key(h)], d, h, r), workers, workers, runs),
    st.builds(
        lambda w, r: END_LOST.call([events_key(r), run_key(r), runs_key(w)], w, r, LIVE, ENDED, 98, "{}", 99, "{}"),
        workers,
        runs,
    ),
    st.builds(lambda w: LEAVE.call([WORKERS, runs_key(w), inbox_key(w)], w), workers),
    st.builds(
        lambda r, ending: FORGET.call([events_key(r), run_key(r)], LIVE, LIVE, ending),
        runs,
        st.sampled_from(["[]", ENDED]),
    ),
    _command("DEL", st.one_of(workers.map(runs_key), runs.map(events_key), runs.map(run_key))),
    _command("SADD", runs.map(events_key), st.just("of the wrong kind")),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(called=st.lists(scripts, min_size=5, max_size=40))
def test_scripts_do_what_they_do_in_a_real_redis(real: RealRedis, called: list[Command]) -> None:
    loads: list[Command] = [["SCRIPT", "LOAD", script.text] for script in SCRIPTS]
    names, ids = ["one", "two"], ["r1", "r2"]
    streams = [*map(inbox_key, names), *map(events_key, ids)]
    found = _everything(streams, [WORKERS, *map(run_key, ids)], [*map(runs_key, names)])
    _compare(real, [*loads, *called, *found, ["GET", grave_key("one")]])


CONVERSIONS = """
return 3.7 | return -3.7 | return 'text' | return true | return false | return nil | return {} | return {a=1}
return {1, nil, 3} | return {false, true, 1.5, {'a'}} | return {ok='fine'} | return {err='ERR bad'} | return
return redis.call('HGETALL', 'h') | return redis.call('SMEMBERS', 's') | return redis.call('GET', 'no')
return type(redis.call('GET', 'no')) | return type(redis.call('SET', 'k', '1')) | return redis.call('SET', 'k', 1e15)
redis.call('SET', 'k', 1/3) return redis.call('GET', 'k') | return redis.call('hget', 'h', 'a')
redis.call('SADD', 'n', 10, 2.5) local n = redis.call('SMEMBERS', 'n') table.sort(n) return n
return redis.call('XREVRANGE', 'x', '+', '-')
return redis.call('NOPE') | return redis.call('HGET', 's', 'a') | return redis.call('SET', 'k', {})
return redis.call()
return cjson.decode('["x", 2.5, {"a": 1}, true]') | return cjson.decode('{"a": "b"}').a | error('boom')
unknown = 1 | return unknown | return unpack({1, 2}) | return {KEYS[1], ARGV[1], #KEYS, #ARGV}
redis.call('SET', 'kept', '1') redis.call('NOPE') | return string.match('12-0', '^%d+') | return tonumber('12') + 1
"""


def test_values_are_converted_as_a_real_redis_converts_them(real: RealRedis) -> None:
    texts = [text.strip() for line in CONVERSIONS.strip().splitlines() for text in line.split("|")]
    filled: list[Command] = [["HSET", "h", "a", "1"], ["SADD", "s", "m"], ["XADD", "x", "1-0", "e", "v"]]
    loads: list[Command] = [["SCRIPT", "LOAD", text] for text in texts]
    loaded = _compare(real, [*filled, *loads])[len(filled) :]
    calls: list[Command] = [["EVALSHA", digest, 1, "key", "argument", 2] for digest in loaded]
    answers = _compare(real, [*filled, *loads, *calls, ["GET", "kept"], ["EVALSHA", "0" * 40, 0]])
    assert answers[-2] == b"1"
    _compare(
        real,
        [
            ["SCRIPT", "LOAD", "x("],
            ["NOPE"],
            ["HGET", "one"],
            ["XREAD", "STREAMS", "a"],
            ["XADD", "a", "1-x", "b", "c"],
        ],
    )


def test_what_is_set_anew_lives_for_ever(real: RealRedis) -> None:
    answers = _compare(real, [["SET", "key", "1", "PX", LIVE], ["SET", "key", "2"], ["PTTL", "key"]])
    assert answers[-1] == -1
