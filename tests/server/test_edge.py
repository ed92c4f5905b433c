"""Ranges of ended runs: complete or refused, the same bytes for ever, kept apart by caller; and share links."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec
import pytest
import trio
from sqlalchemy import Connection, update
from trio.testing import MockClock

from engine import RetentionLimits
from engine.events import Event
from engine.pieces import UsagePiece
from providers.sse import SSEParser
from server.share_links import BadSecretError, ShareLinks
from server.store.database import Database
from server.store.errors import StoreUnavailableError
from server.store.run_events import RESERVED_SEQ, page_of_events, terminal_seq_of
from server.store.schema import runs
from tests.engine.scripted import FOREVER, SENT, ScriptedProvider, text
from tests.harness.world import World, open_keeping_world
from tests.server.api_scene import HELPER, Caller

IMMUTABLE = "max-age=31536000, immutable"
JSON = {"Accept": "application/json"}
WORDS = ("one ", "two ", "three ", "four")

decode_event = msgspec.json.Decoder(Event).decode


class Scene:
    """Ada's ended run, and callers."""

    def __init__(self, world: World, ada: Caller, bob: Caller, anyone: Caller, run_id: str) -> None:
        self.world = world
        self.ada = ada
        self.bob = bob
        self.anyone = anyone
        self.run_id = run_id
        self.path = f"/runs/{run_id}/events"

    async def frames(self) -> list[tuple[str, bytes]]:
        """Ids and data of the whole run, as it is replayed."""
        response = await self.ada.ask("GET", self.path)
        return [(frame.id, frame.data) for frame in SSEParser().feed(response.content)]

    async def share(self, **body: Any) -> str:
        """A link, below /api/v1."""
        data = await self.ada.data("POST", f"/runs/{self.run_id}/share", json=body)
        url: str = data["url"]
        return url.removeprefix("/api/v1")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with open_keeping_world() as world:
        lines = [(1 + number, text(word)) for number, word in enumerate(WORDS)]
        world.add_agent("slow", ScriptedProvider((0, (SENT,)), *lines, (0, (UsagePiece(3, 4),))))
        world.add_agent("endless", ScriptedProvider((0, (SENT,)), (1, text("hello")), (FOREVER, ())))
        ada, bob = [Caller(world, await world.add_key("acme", name)) for name in ("ada", "bob")]
        async with ada.open("POST", "/agents/slow/chat/lumosai/stream", json={"message": "hi"}) as response:
            run_id = response.headers["X-Run-Id"]
            await response.aread()
        await trio.sleep(0.3)  # the journal has it
        yield Scene(world, ada, bob, Caller(world), run_id)


def frames_of(response: httpx.Response) -> list[tuple[str, bytes]]:
    return [(frame.id, frame.data) for frame in SSEParser().feed(response.content)]


# Ranges


async def test_a_range_of_an_ended_run_is_those_events_byte_for_byte(autojump_clock: MockClock) -> None:
    async with scene() as its:
        frames = await its.frames()
        response = await its.ada.ask("GET", f"{its.path}?after=1&until=4")
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == f"private, {IMMUTABLE}"
        assert response.headers["Vary"] == "Accept, Authorization, X-API-Key"
        assert int(response.headers["Content-Length"]) == len(response.content)
        assert frames_of(response) == frames[1:4]
        again = await its.ada.ask("GET", f"{its.path}?after=1&until=4")
        assert (again.content, again.headers["ETag"]) == (response.content, response.headers["ETag"])


async def test_ranges_side_by_side_are_the_whole_run(autojump_clock: MockClock) -> None:
    async with scene() as its:
        frames = await its.frames()
        parts = []
        for after in range(0, len(frames), 2):
            until = min(after + 2, len(frames))
            parts += frames_of(await its.ada.ask("GET", f"{its.path}?after={after}&until={until}"))
        assert parts == frames


async def test_as_json_it_holds_the_same_events_with_their_numbers(autojump_clock: MockClock) -> None:
    async with scene() as its:
        frames = await its.frames()
        response = await its.ada.ask("GET", f"{its.path}?after=1&until=4", headers=JSON)
        assert response.headers["Content-Type"] == "application/json"
        payload = response.json()
        assert (payload["after"], payload["until"], payload["last_seq"]) == (1, 4, len(frames))
        assert [entry["seq"] for entry in payload["events"]] == [2, 3, 4]
        assert [entry["event"] for entry in payload["events"]] == [msgspec.json.decode(data) for _, data in frames[1:4]]
        empty = await its.ada.ask("GET", f"{its.path}?after=2&until=2", headers=JSON)
        assert empty.json() == {"events": [], "after": 2, "until": 2, "last_seq": len(frames)}


async def test_a_client_that_has_the_range_gets_304_without_a_body(autojump_clock: MockClock) -> None:
    async with scene() as its:
        url = f"{its.path}?after=0&until=3"
        first = await its.ada.ask("GET", url)
        etag = first.headers["ETag"]
        assert etag.startswith('"'), "a strong one"
        for known in (etag, f'"other", {etag}', "*", f"W/{etag}"):
            response = await its.ada.ask("GET", url, headers={"If-None-Match": known})
            assert (response.status_code, response.content) == (304, b"")
            for name in ("ETag", "Cache-Control", "Vary"):
                assert response.headers[name] == first.headers[name]
        assert (await its.ada.ask("GET", url, headers={"If-None-Match": '"other"'})).status_code == 200


async def test_each_range_and_each_representation_has_an_etag_of_its_own(autojump_clock: MockClock) -> None:
    async with scene() as its:
        shared = await its.share()
        answers = [
            await its.ada.ask("GET", f"{its.path}?after=0&until=3"),
            await its.ada.ask("GET", f"{its.path}?after=0&until=4"),
            await its.ada.ask("GET", f"{its.path}?after=1&until=4"),
            await its.ada.ask("GET", f"{its.path}?after=0&until=3", headers=JSON),
            await its.anyone.ask("GET", f"{shared}?after=0&until=3"),
            await its.anyone.ask("GET", f"{shared}?after=0&until=3", headers=JSON),
        ]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len({answer.headers["ETag"] for answer in answers}) == 6


@pytest.mark.parametrize("headers", [{}, JSON], ids=["SSE", "JSON"])
async def test_head_tells_what_get_would(headers: dict[str, str], autojump_clock: MockClock) -> None:
    async with scene() as its:
        url = f"{its.path}?after=0&until=3"
        got, told = [await its.ada.ask(method, url, headers=headers) for method in ("GET", "HEAD")]
        assert (told.status_code, told.content) == (200, b"")
        for name in ("ETag", "Cache-Control", "Vary", "Content-Length", "Content-Type"):
            assert told.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "text/event-stream; charset=utf-8"),
        ("text/event-stream", "text/event-stream; charset=utf-8"),
        ("application/json, text/event-stream;q=0.5", "application/json"),
        ("application/json;q=0.1, text/event-stream;q=0.5", "text/event-stream; charset=utf-8"),
        ("application/*", "application/json"),
    ],
)
async def test_the_client_chooses_the_representation(accept: str, kind: str, autojump_clock: MockClock) -> None:
    async with scene() as its:
        response = await its.ada.ask("GET", f"{its.path}?until=3", headers={"Accept": accept})
        assert response.headers["Content-Type"] == kind


async def test_another_representation_is_refused(autojump_clock: MockClock) -> None:
    async with scene() as its:
        refusal = await its.ada.refused(406, "GET", f"{its.path}?until=3", headers={"Accept": "image/png"})
        assert refusal["code"] == "NOT_ACCEPTABLE"


@pytest.mark.parametrize(
    "query",
    [
        "until=x",
        "until=",
        "until=-1",
        "until=1&until=2",
        "until=999999999999",
        "until=9999999999999",
        "after=3&until=2",
        "after=x&until=3",
        "after=100&until=200",
        "until=3&after=1&after=2",
    ],
)
async def test_what_is_no_range_of_the_run_is_refused_and_not_cached(query: str, autojump_clock: MockClock) -> None:
    async with scene() as its:
        response = await its.ada.ask("GET", f"{its.path}?{query}", headers={"If-None-Match": "*"})
        assert (response.status_code, response.json()["code"]) == (400, "INVALID_CURSOR")
        assert response.headers["Cache-Control"] == "no-store"
        assert "ETag" not in response.headers


async def test_a_run_that_goes_on_has_no_ranges_yet(autojump_clock: MockClock) -> None:
    async with scene() as its:
        body = {"message": "hi", "on_disconnect": "cancel"}
        async with its.ada.open("POST", "/agents/endless/chat/lumosai/stream", json=body) as live:
            path = f"/runs/{live.headers['X-Run-Id']}/events?until=1"
            for headers in ({}, JSON, {"If-None-Match": "*"}):
                response = await its.ada.ask("GET", path, headers=headers)
                assert (response.status_code, response.json()["code"]) == (409, "RUN_NOT_ENDED")
                assert response.headers["Cache-Control"] == "no-store"
                assert response.headers["Retry-After"] == "5"
        await trio.sleep(1)
        assert (await its.ada.ask("GET", path)).status_code == 200


async def test_an_event_source_that_has_the_range_is_told_to_stop(autojump_clock: MockClock) -> None:
    async with scene() as its:
        url = f"{its.path}?until=3"
        response = await its.ada.ask("GET", url, headers={"Last-Event-ID": f"{its.run_id}.3"})
        assert (response.status_code, response.headers["Cache-Control"]) == (204, "no-store")
        response = await its.ada.ask("GET", url, headers={"Last-Event-ID": f"{its.run_id}.2"})
        assert len(frames_of(response)) == 1


async def test_nobody_elses_ranges_are_told_apart_from_none(autojump_clock: MockClock) -> None:
    async with scene() as its:
        etag = (await its.ada.ask("GET", f"{its.path}?until=3")).headers["ETag"]
        for headers in ({}, {"If-None-Match": etag}):
            response = await its.bob.ask("GET", f"{its.path}?until=3", headers=headers)
            assert (response.status_code, response.headers["Cache-Control"]) == (404, "no-store")
            assert (await its.anyone.ask("GET", f"{its.path}?until=3", headers=headers)).status_code == 401


# Share links


async def test_a_link_shows_the_run_to_anybody_without_what_it_cost(autojump_clock: MockClock) -> None:
    async with scene() as its:
        frames = await its.frames()
        link = await its.share(expires_in=100)
        response = await its.anyone.ask("GET", link)
        assert response.status_code == 200
        assert response.headers["Cache-Control"] == "public, immutable"
        assert response.headers["Vary"] == "Accept"
        shown = [(event_id, decode_event(data)) for event_id, data in frames_of(response)]
        kinds = [type(event).__name__ for _, event in shown]
        assert "".join(getattr(event, "content", "") for _, event in shown) == "".join(WORDS)
        assert (kinds[0], kinds[-1]) == ("AgentStarted", "GenerationComplete")
        assert not {"Metadata", "UsageUpdate", "MemoryUpdate"} & set(kinds)
        assert b'"usage":{' not in response.content
        assert b'"usage":{' in b"".join(data for _, data in frames), "there was something to leave out"
        assert {event_id for event_id, _ in shown} <= {event_id for event_id, _ in frames}, "numbers stay"


async def test_a_link_expires_to_the_second(autojump_clock: MockClock) -> None:
    async with scene() as its:
        await trio.sleep(1.5 + trio.current_time() // 1 - trio.current_time())
        link = await its.share(expires_in=10)
        end = int(its.world.wall_clock().timestamp()) + 10
        first = await its.anyone.ask("GET", link)
        etag = first.headers["ETag"]
        await trio.sleep(9.4)
        for headers, status in (({}, 200), ({"If-None-Match": etag}, 304)):
            last = await its.anyone.ask("GET", link, headers=headers)
            assert last.status_code == status
            for response in (first, last):  # whenever a cache got it: an age would begin anew in the next cache
                assert response.headers["Cache-Control"] == "public, immutable"
                assert parsedate_to_datetime(response.headers["Expires"]).timestamp() == end - 1
        await trio.sleep(0.1)
        for headers in ({}, {"If-None-Match": etag}):
            gone = await its.anyone.ask("GET", link, headers=headers)
            assert (gone.status_code, gone.headers["Cache-Control"]) == (410, "no-store")


async def test_a_forged_link_opens_nothing(autojump_clock: MockClock) -> None:
    async with scene() as its:
        _, _, token, _ = (await its.share()).split("/")
        run_id, expiry, signature = token.split(".")
        theirs, _ = ShareLinks("another secret 16", its.world.wall_clock).make(its.run_id, 100)
        forged = [
            f"{run_id}.{int(expiry) + 1}.{signature}",
            f"{run_id}.{expiry}.{signature[:-1]}{'A' if signature[-1] != 'A' else 'B'}",
            f"{run_id}.{expiry}.{'A' * 43}",
            f"{run_id[:-1]}.{expiry}.{signature}",
            f"{run_id}.{expiry}",
            f"{token}.",
            f".{expiry}.{signature}",
            "x",
            theirs,
        ]
        for token in forged:
            assert (await its.anyone.ask("GET", f"/shared/{token}/events")).status_code == 404, token


async def test_deleting_the_run_takes_its_links_back(autojump_clock: MockClock) -> None:
    async with scene() as its:
        link = await its.share()
        assert (await its.anyone.ask("GET", link)).status_code == 200
        await its.ada.gone("DELETE", f"/runs/{its.run_id}")
        response = await its.anyone.ask("GET", link)
        assert response.status_code in (404, 410)
        assert response.headers["Cache-Control"] == "no-store"


async def test_only_the_owner_shares(autojump_clock: MockClock) -> None:
    async with scene() as its:
        boss = Caller(its.world, await its.world.add_key("acme", "boss", admin=True))
        path = f"/runs/{its.run_id}/share"
        await boss.refused(403, "POST", path, json={})
        await its.bob.refused(404, "POST", path, json={})
        await its.anyone.refused(401, "POST", path, json={})
        for body in ({"expires_in": 0}, {"expires_in": 30 * 86_400 + 1}, {"expires": 5}):
            await its.ada.refused(422, "POST", path, json=body)


async def test_a_link_opens_one_run_and_nothing_else_of_it(autojump_clock: MockClock) -> None:
    async with scene() as its:
        _, _, token, _ = (await its.share()).split("/")
        assert (await its.anyone.ask("GET", f"/runs/{token}/events")).status_code == 401
        assert (await its.anyone.ask("POST", f"/shared/{token}/events")).status_code == 405
        response = await its.anyone.ask("GET", f"/runs/{its.run_id}", headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 401


async def test_a_link_to_a_run_that_goes_on_opens_once_it_has_ended(autojump_clock: MockClock) -> None:
    async with scene() as its:
        body = {"message": "hi", "on_disconnect": "cancel"}
        async with its.ada.open("POST", "/agents/endless/chat/lumosai/stream", json=body) as live:
            its.run_id = live.headers["X-Run-Id"]
            link = await its.share()
            assert (await its.anyone.ask("GET", link)).status_code == 409
        await trio.sleep(1)
        assert (await its.anyone.ask("GET", link)).status_code == 200


def test_a_short_secret_is_refused_and_none_is_a_random_one() -> None:
    with pytest.raises(BadSecretError):
        ShareLinks("short")
    one, other = ShareLinks(), ShareLinks()
    token, _ = one.make("r", 10)
    assert one.open(token) is not None
    assert other.open(token) is None
    assert (one.lasting, ShareLinks("x" * 16).lasting) == (False, True)
    assert not ShareLinks("x" * 16, lasting=False).lasting, "the workers' common one was made by their parent"


class TroubledDatabase(Database):
    """Has one ``trouble`` when it is asked for events."""

    trouble = ""

    async def read(self, query: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        if query is page_of_events:
            match self.trouble:
                case "away":
                    raise StoreUnavailableError("away")
                case "slow":
                    await trio.sleep(60)
                case "dropped":
                    return []
        if query is terminal_seq_of and self.trouble.startswith("no end"):
            if self.trouble == "no end":
                raise StoreUnavailableError("away")
            await trio.sleep(60)
        return await super().read(query, *args)


@pytest.mark.parametrize("headers", [{}, JSON], ids=["SSE", "JSON"])
async def test_nothing_keeps_a_range_before_the_store_has_the_runs_end(
    headers: dict[str, str], autojump_clock: MockClock
) -> None:
    """Until then it may still get another end: its worker may die before that is written."""
    database = TroubledDatabase.open("sqlite://", inline=True)
    assert isinstance(database, TroubledDatabase)
    async with open_keeping_world(HELPER, database=database) as world:
        me = Caller(world)
        path = f"/runs/{(await me.chat('helper'))['run_id']}/events?until=2"
        early = await me.ask("GET", path, headers=headers | {"If-None-Match": "*"})
        assert (early.status_code, early.headers["Cache-Control"]) == (200, "no-store")
        assert "ETag" not in early.headers
        await trio.sleep(0.3)
        kept = await me.ask("GET", path, headers=headers)
        assert (kept.content, kept.headers["Cache-Control"]) == (early.content, f"private, {IMMUTABLE}")
        for database.trouble in ("no end", "no end, slowly"):
            unknown = await me.ask("GET", path, headers=headers | {"If-None-Match": kept.headers["ETag"]})
            assert (unknown.status_code, unknown.content) == (200, kept.content)
            assert (unknown.headers["Cache-Control"], "ETag" in unknown.headers) == ("no-store", False)
        await database.write(_end_otherwise)
        database.trouble = ""
        assert (await me.ask("GET", path, headers=headers)).headers["Cache-Control"] == "no-store"
    database.close()


def _end_otherwise(c: Connection) -> None:
    """As an heir does that took this server's worker for dead."""
    c.execute(update(runs).values(terminal_seq=RESERVED_SEQ + 1))


@pytest.mark.parametrize(("trouble", "status"), [("away", 503), ("slow", 503), ("dropped", 410)])
async def test_a_range_that_cannot_be_read_now_says_so(trouble: str, status: int, autojump_clock: MockClock) -> None:
    database = TroubledDatabase.open("sqlite://", inline=True)
    assert isinstance(database, TroubledDatabase)
    async with open_keeping_world(HELPER, database=database, retention=RetentionLimits(seconds=0.0)) as world:
        me = Caller(world)
        run_id = (await me.chat("helper"))["run_id"]
        await trio.sleep(1)  # the journal has it, and memory not any more
        assert (await me.ask("GET", f"/runs/{run_id}/events?until=2")).status_code == 200
        database.trouble = trouble
        refusal = await me.refused(status, "GET", f"/runs/{run_id}/events?until=2")
        assert refusal["code"] == ("GONE" if status == 410 else "SERVICE_UNAVAILABLE")
    database.close()
