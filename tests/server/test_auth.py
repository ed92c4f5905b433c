"""Who gets in: keys in every spelling, one answer for all that do not count, and how soon a change of keys is seen."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence

import pytest
import structlog
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock
from werkzeug.datastructures import Headers

from server import auth
from server.auth import KEY_SECONDS, UNKNOWN_KEY_SECONDS, Gatekeeper, presented_text, resolve_user
from server.availability import STORE_SECONDS
from server.errors import ApiError
from server.keys import PresentedKey, parse_key
from server.principal import LOCAL_USER, KeyLimits, Principal
from tests.server.doors import URL, CountingStore, Door, open_door
from tests.server.raw_http import RawAnswer

KEY_ID = "AAAABBBBCCCCDDDD"
SECRET = "s" * 43
UNKNOWN = f"lumos_{KEY_ID}_{SECRET}"

NO_KEYS = {
    "another vendor's": "sk-proj-abcdefgh",
    "empty": "",
    "the prefix alone": "lumos_",
    "no secret": f"lumos_{KEY_ID}_",
    "no key id": f"lumos__{SECRET}",
    "a short secret": f"lumos_{KEY_ID}_{SECRET[1:]}",
    "a long secret": f"lumos_{KEY_ID}_{SECRET}s",
    "upper case": f"LUMOS_{KEY_ID}_{SECRET}",
    "a space inside": f"lumos_{KEY_ID}_{SECRET[1:]} ",
    "two in one": f"{UNKNOWN}, {UNKNOWN}",
    "not ASCII": f"lumos_{KEY_ID}_{SECRET[1:]}é",
    "digits that are not ASCII": f"lumos_{KEY_ID[1:]}²_{SECRET}",
    "SQL": f"lumos_{KEY_ID}_' OR 1=1 --",
    "unknown": UNKNOWN,
}


async def found(door: Door, key: str | None = None) -> list[object] | int:
    """What ``/who`` says: tenant, user and whether admin; or the status of its refusal."""
    response = await door.who(key)
    return response.json()[:3] if response.status_code == 200 else response.status_code


def assert_unauthorized(answer: RawAnswer) -> None:
    assert answer.status == 401, answer
    assert answer.headers["www-authenticate"] == "Bearer"
    payload = answer.json()
    del payload["timestamp"]
    message = "this needs a valid API key, as Authorization: Bearer or X-API-Key"
    assert payload == {"code": "UNAUTHORIZED", "message": message, "details": None}


# Keys that count


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer {}",
        "authorization: bearer {}",
        "AUTHORIZATION: BEARER {}",
        "Authorization:   Bearer    {}   ",
        "X-API-Key: {}",
        "x-api-key:{} ",
        "Authorization: Basic dTpw\r\nX-API-Key: {}",
        "Authorization: Bearer {}\r\nX-API-Key: {}",
        "X-API-Key: {}\r\nX-API-Key: {}",
    ],
)
async def test_a_key_is_found_in_either_header(header: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        key, text = await door.store.add_key("acme", "ada@acme.example", admin=True)
        answer = await door.raw(header.replace("{}", text))
        assert answer.json() == ["acme", "ada@acme.example", True, key.key_id]


async def test_a_principal_is_what_the_key_says(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        limits = KeyLimits(requests_per_minute=3, tokens_per_day=1e6)
        key, text = await door.store.add_key("t", "u", limits=limits)
        request = door.client.build_request("GET", URL, headers={"X-API-Key": text})
        principal = await door.gatekeeper._identify(presented_text(Headers(request.headers.items())))
        assert principal == Principal(tenant_id="t", user_id="u", key_id=key.key_id, limits=limits)
        assert not principal.operator


# Keys that do not count


@pytest.mark.parametrize("text", NO_KEYS.values(), ids=NO_KEYS)
async def test_every_key_that_does_not_count_gets_the_same_answer(text: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        await door.store.add_key()
        assert_unauthorized(await door.raw(f"Authorization: Bearer {text}"))
        assert_unauthorized(await door.raw(f"X-API-Key: {text}"))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: {}"],
        ["Authorization: Basic {}"],
        ["Authorization: Bearer{}"],
        ["Authorization: Bearer\t{}"],
        ["Authorization: Token {}"],
        ["Proxy-Authorization: Bearer {}"],
        ["X_API_Key: {}"],
        ["Cookie: X-API-Key={}; Authorization=Bearer {}"],
    ],
    ids=str,
)
async def test_a_valid_key_in_another_place_is_none(headers: Sequence[str], autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        assert_unauthorized(await door.raw(*(header.replace("{}", text) for header in headers)))


@pytest.mark.parametrize("name", ["api_key", "key", "access_token", "X-API-Key", "Authorization"])
async def test_a_valid_key_in_the_query_is_none(name: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        assert_unauthorized(await door.raw(path=f"/who?{name}={text}"))


async def test_basic_credentials_made_of_a_key_are_none(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        assert_unauthorized(await door.raw(f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"))


@pytest.mark.parametrize("first", ["Authorization: Bearer", "X-API-Key:"])
@pytest.mark.parametrize("second", ["Authorization: Bearer", "X-API-Key:"])
async def test_two_keys_that_differ_are_400_even_if_both_count(
    first: str, second: str, autojump_clock: MockClock
) -> None:
    async with open_door() as door:
        (_, one), (_, other) = await door.store.add_key(), await door.store.add_key()
        answer = await door.raw(f"{first} {one}", f"{second} {other}")
        assert (answer.status, answer.json()["code"]) == (400, "AMBIGUOUS_KEY")
        assert one not in answer.body.decode()


@pytest.mark.parametrize("size", [10_000, 100_000])
async def test_a_huge_key_is_refused_without_asking_the_store(size: int, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        await door.store.add_key()
        answer = await door.raw(f"Authorization: Bearer lumos_{KEY_ID}_{'s' * size}")
        assert answer.status in {400, 401, 431}
        assert [query for query, _ in door.store.reads if query == "find_key"] == []


async def test_a_folded_header_is_no_way_in(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        answer = await door.raw("X-Other: a", f" Authorization: Bearer {text}")
        assert answer.status in {400, 401}


async def test_another_keys_secret_does_not_count(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        (one, _), (_, other) = await door.store.add_key(), await door.store.add_key()
        secret = other.rpartition(other[6:22] + "_")[2]
        assert_unauthorized(await door.raw(f"X-API-Key: lumos_{one.key_id}_{secret}"))


async def test_an_unknown_key_id_costs_the_same_comparison(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, int]] = []
    opens = PresentedKey.opens

    def note(presented: PresentedKey, secret_hash: bytes) -> bool:
        compared.append((presented.key_id, len(secret_hash)))
        return opens(presented, secret_hash)

    monkeypatch.setattr(PresentedKey, "opens", note)
    async with open_door() as door:
        key, text = await door.store.add_key()
        revoked, revoked_text = await door.store.add_key()
        await door.store.revoke(revoked)
        for shown in (text, f"lumos_{key.key_id}_{SECRET}", revoked_text, UNKNOWN, UNKNOWN):
            await door.who(shown)
        ids = [key.key_id, key.key_id, revoked.key_id, KEY_ID, KEY_ID]
        assert compared == [(key_id, 32) for key_id in ids]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80) | st.from_regex(r"lumos_[A-Za-z0-9_-]{0,80}", fullmatch=True))
@example(text=UNKNOWN)
def test_what_is_read_as_a_key_is_exactly_its_parts(text: str) -> None:
    presented = parse_key(text)
    if presented is not None:
        assert text == f"lumos_{presented.key_id}_{presented.secret}"
        assert presented.key_id.isascii()
        assert presented.key_id.isalnum()
        assert presented.secret not in repr(presented)
    assert parse_key(f"{text}\n") is None


# No key ever gets into a log


async def test_no_key_is_logged(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_door() as door:
        key, text = await door.store.add_key()
        secret = text[-43:]
        with structlog.testing.capture_logs() as entries:
            await door.who(text)
            await door.who(f"lumos_{key.key_id}_{SECRET}")
            await door.raw(f"X-API-Key: {text}", f"X-API-Key: {UNKNOWN}")
            await trio.sleep(KEY_SECONDS)
            door.store.down = True
            assert (await door.who(text)).status_code == 503
        logged = f"{entries} {caplog.text}"
        assert "store.unavailable" in logged
        assert secret not in logged
        assert SECRET not in logged


# The store is asked seldom, and what it says counts for so long


async def test_a_key_costs_one_read_every_5_seconds(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        for _ in range(12):
            assert await found(door, text) == ["acme", "ada", False]
            await trio.sleep(1)
        assert door.store.reads == [("find_key", 0), ("find_key", 5), ("find_key", 10)]


async def test_requests_at_once_share_one_read(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        door.store.seconds = 1
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(door.who, text)
        assert len(door.store.reads) == 1
        assert len(door.gatekeeper._asking) == 0


async def test_a_read_that_is_cancelled_leaves_the_next_one_to_others(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        door.store.seconds = 1
        answers = []

        async def ask_later() -> None:
            await trio.sleep(0.25)
            answers.append((await door.who(text)).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_later)
            with trio.move_on_after(0.5):
                await door.who(text)
        assert answers == [200]
        assert trio.current_time() == 1.5


async def test_a_revoked_key_is_refused_5_seconds_after_the_store_was_asked(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        await door.store.add_key("other", "other")
        key, text = await door.store.add_key()
        door.store.seconds = 0.5
        assert await found(door, text) == ["acme", "ada", False]
        await door.store.revoke(key)
        await trio.sleep(KEY_SECONDS - 0.5 - 0.001)
        assert await found(door, text) == ["acme", "ada", False]
        await trio.sleep(0.001)
        assert trio.current_time() == KEY_SECONDS, "counted from the question, whose answer took half a second"
        assert await found(door, text) == 401


async def test_an_unknown_key_costs_one_read_a_second(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        await door.store.add_key()
        for _ in range(4):
            assert await found(door, UNKNOWN) == 401
            await trio.sleep(UNKNOWN_KEY_SECONDS / 2)
        assert door.store.reads == [("find_key", 0), ("find_key", 1)]


async def test_a_flood_of_unknown_keys_takes_no_room_from_known_ones(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "MAX_CACHED_KEYS", 10)
    async with open_door() as door:
        _, text = await door.store.add_key()
        assert await found(door, text) == ["acme", "ada", False]
        for number in range(50):
            assert await found(door, f"lumos_{number:016}_{SECRET}") == 401
        assert len(door.gatekeeper._unknown._values) == 10
        reads = len(door.store.reads)
        assert await found(door, text) == ["acme", "ada", False]
        assert await found(door, f"lumos_{49:016}_{SECRET}") == 401
        assert len(door.store.reads) == reads


# Without keys, and the first key


async def test_without_keys_everybody_is_the_local_user(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert await found(door) == [LOCAL_USER.tenant_id, LOCAL_USER.user_id, True]
        assert await found(door, "sk-any-key-that-an-sdk-insists-on") == ["local", "local", True]
        assert door.store.reads == [("any_keys", 0)]


@pytest.mark.parametrize("text", [text for text in NO_KEYS.values() if text.startswith("lumos_")])
async def test_without_keys_a_key_of_ours_is_still_refused(text: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert_unauthorized(await door.raw(f"Authorization: Bearer {text}"))


async def test_the_first_key_closes_an_open_server_within_5_seconds(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert await found(door) == ["local", "local", True]
        await trio.sleep(0.5)
        await door.store.add_key()
        await trio.sleep(KEY_SECONDS - 0.5 - 0.001)
        assert await found(door) == ["local", "local", True]
        await trio.sleep(0.001)
        assert await found(door) == 401
        assert trio.current_time() == KEY_SECONDS


async def test_the_first_use_of_a_key_closes_an_open_server_at_once(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert await found(door) == ["local", "local", True]
        _, text = await door.store.add_key()
        assert await found(door, text) == ["acme", "ada", False]
        assert await found(door) == 401


async def test_a_server_that_had_a_key_never_opens_again(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        key, text = await door.store.add_key()
        assert await found(door) == 401
        await door.store.revoke(key)
        for _ in range(3):
            await trio.sleep(2 * KEY_SECONDS)
            assert await found(door) == 401
            assert await found(door, text) == 401
        assert [query for query, _ in door.store.reads].count("any_keys") == 1


async def test_a_server_that_started_with_keys_does_not_open_when_the_last_one_is_revoked(
    autojump_clock: MockClock,
) -> None:
    """It may listen on every address by now."""
    async with open_door(keyed=True) as door:
        key, text = await door.store.add_key()
        await door.store.revoke(key)
        assert await found(door) == 401
        assert await found(door, text) == 401
        assert ("any_keys", 0) not in door.store.reads


# The store does not answer


async def test_without_its_store_a_server_is_never_open(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        door.store.down = True
        response = await door.who()
        assert (response.status_code, response.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert response.headers["Retry-After"] == "5"
        door.store.down = False
        assert await found(door) == ["local", "local", True]
        door.store.down = True
        await trio.sleep(KEY_SECONDS)
        assert await found(door) == 503


async def test_without_its_store_a_key_counts_no_longer_than_otherwise(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, text = await door.store.add_key()
        assert await found(door, text) == ["acme", "ada", False]
        door.store.down = True
        assert await found(door) == 401
        assert await found(door, text) == ["acme", "ada", False]
        await trio.sleep(KEY_SECONDS)
        assert await found(door, text) == 503
        door.store.down = False
        assert await found(door, text) == ["acme", "ada", False]


@pytest.mark.parametrize("shown", [None, UNKNOWN], ids=["no key", "a key"])
async def test_a_store_that_hangs_holds_nobody_longer_than_its_limit(
    shown: str | None, autojump_clock: MockClock
) -> None:
    async with open_door() as door:
        door.store.seconds = 1000
        answers = []

        async def ask() -> None:
            answers.append((await found(door, shown), trio.current_time()))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert answers == [(503, STORE_SECONDS)] * 5


# For whom


ADA = Principal(tenant_id="acme", user_id="ada", key_id=KEY_ID)
ADMIN = Principal(tenant_id="acme", user_id="root", key_id=KEY_ID, admin=True)


def test_a_user_is_only_oneself() -> None:
    assert resolve_user(ADA, None) == "ada"
    assert resolve_user(ADA, "ada") == "ada"
    with pytest.raises(ApiError) as refused:
        resolve_user(ADA, "bob")
    assert (refused.value.status, refused.value.code, refused.value.details) == (403, "FORBIDDEN", {"field": "user_id"})


def test_an_admin_may_name_any_user() -> None:
    assert resolve_user(ADMIN, None) == "root"
    assert resolve_user(ADMIN, "bob@acme.example") == "bob@acme.example"
    assert resolve_user(LOCAL_USER, "bob") == "bob"


@pytest.mark.parametrize("principal", [ADA, ADMIN, LOCAL_USER], ids=["user", "admin", "local"])
@pytest.mark.parametrize(
    "wished", ["", " ", "a b", "ada ", "Ada\n", "a/b", "../ada", "日", "a\0", "\ud800", "a" * 201, "*", "%"], ids=repr
)
def test_what_is_no_name_is_422_for_everybody(wished: str, principal: Principal) -> None:
    with pytest.raises(ApiError) as refused:
        resolve_user(principal, wished)
    assert (refused.value.status, refused.value.details) == (422, {"field": "user_id"})


def test_names_are_compared_exactly() -> None:
    with pytest.raises(ApiError):
        resolve_user(ADA, "Ada")


# The places of runs


async def test_open_run_checks_tokens_and_takes_a_place(autojump_clock: MockClock) -> None:
    store = CountingStore()
    gatekeeper = Gatekeeper(store)
    principal = Principal(
        tenant_id="t", user_id="u", key_id=KEY_ID, limits=KeyLimits(concurrent_runs=1, tokens_per_day=9)
    )
    slot = await gatekeeper.open_run(principal)
    assert store.reads == [("tokens_used_since", 0)]
    with pytest.raises(ApiError) as refused:
        await gatekeeper.open_run(principal)
    assert refused.value.status == 429
    slot.close()
    (await gatekeeper.open_run(principal)).close()
    store.database.close()
