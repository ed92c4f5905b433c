"""Without keys: only this machine, by its own name, and no page of another origin. CORS. How deep bodies nest."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quart_trio import QuartTrio
from trio.testing import MockClock
from werkzeug.datastructures import Headers

from server.cors import Cors, parse_origin
from server.errors import ApiError
from server.guard import BindingRefusedError, RequestGuard, check_binding
from server.json_depth import MAX_JSON_DEPTH, MAX_JSON_PARTS, nesting_fault
from server.sockets import listen_tcp
from tests.server.doors import HOST, URL, open_door

PAGE = "https://app.example"

LOOPBACK = [
    "127.0.0.1",
    "127.0.0.53",
    "127.1",
    "0x7f.1",
    "2130706433",
    "localhost",
    "LocalHost",
    "localhost.",
    "::1",
    "[::1]",
    "0:0:0:0:0:0:0:1",
    "::ffff:127.0.0.1",
    "[::ffff:127.0.0.1]",
    "::ffff:7f00:1",
]
REACHABLE = [
    "0.0.0.0",
    "0",
    "00.0.0.0",
    "",
    "::",
    "[::]",
    "0::0",
    "::ffff:0.0.0.0",
    "192.168.1.7",
    "10.0.0.1",
    "8.8.8.8",
    "fe80::1",
    "2001:db8::1",
    "169.254.169.254",
    "128.0.0.1",
    "126.255.255.255",
    "::2",
    "::127.0.0.1",
]

EXPOSED = "X-Run-Id, X-Session-Id, X-Batch-Id, Location, Retry-After, ETag"
ALLOWED = "Authorization, X-API-Key, Content-Type, Last-Event-ID, Idempotency-Key, If-Match"


# Where it listens


@pytest.mark.parametrize("host", LOOPBACK)
def test_without_keys_loopback_browser(host: str) -> None:
    check_binding(host, keyed=False)


@pytest.mark.parametrize("host", REACHABLE)
def test_without_keys_every_other_address_is_refused(host: str) -> None:
    with pytest.raises(BindingRefusedError, match="without API keys whoever reaches the server") as refused:
        check_binding(host, keyed=False)
    assert "lumos keys create" in str(refused.value)


@pytest.mark.parametrize("host", [*LOOPBACK, *REACHABLE, "no such name"])
def test_with_keys_every_address_browser(host: str) -> None:
    check_binding(host, keyed=True)


@pytest.mark.parametrize("host", ["no such name", " 127.0.0.1", "127.0.0.1 ", "localhost..", "[[::1]]", "127.0.0.1:80"])
def test_what_has_no_address_is_not_taken_for_loopback(host: str) -> None:
    with pytest.raises(OSError, match=r"."):
        check_binding(host, keyed=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433"])
async def test_what_was_judged_is_what_is_bound(host: str) -> None:
    check_binding(host, keyed=False)
    for listener in listen_tcp(host, 0):
        check_binding(listener.address[0], keyed=False)
        await listener.aclose()


# By which name it is asked


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST:8080",
        "localhost.",
        "localhost:",
        "app.localhost:3000",
        "a.b.localhost",
        "127.0.0.1",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:8080",
        "[::FFFF:127.0.0.1]:80",
    ],
)
async def test_names_of_this_machine_are_answered(host: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert (await door.raw(host=host)).status == 200


FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "localhost.evil.example:80",
    "evillocalhost",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "0.0.0.0:8080",
    "[::]",
    "192.168.1.7:8080",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "[::1",
    "::1",
    "[::1]evil.example",
    "[::1%25eth0]",
    "localhost:80:80",
    "localhost:80@evil.example",
    "user@localhost",
    "localhost/",
    "localhost#",
    "localhost, evil.example",
    "localhost evil.example",
    "löcalhost",
    "localhost:²",
    "lumos",
    "",
]


@pytest.mark.parametrize("host", FOREIGN)
async def test_every_other_name_is_refused_on_every_route(host: str, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        for method, path in [
            ("GET", "/who"),
            ("GET", "/open"),
            ("GET", "/stream"),
            ("POST", "/change"),
            ("GET", "/no"),
        ]:
            answer = await door.raw(host=host, method=method, path=path)
            assert answer.status == 421 or (answer.status == 400 and not answer.body), (method, path, answer)
        assert door.changes == 0


async def test_the_refusal_tells_what_to_look_at(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        payload = (await door.raw(host="evil.example")).json()
        assert payload["code"] == "MISDIRECTED_REQUEST"
        assert "Host header" in payload["message"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /who HTTP/1.1\r\n\r\n",
        b"GET /who HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /who HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /who HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /who HTTP/1.0\r\n\r\n",
        b"GET /who HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_a_missing_or_second_host_is_refused(head: bytes, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        assert (await door.raw_bytes(head)).status in {400, 421}
        assert door.store.reads in ([], [("any_keys", 0)])


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
async def test_exactly_one_host_counts_whatever_the_server_lets_through(hosts: Sequence[str]) -> None:
    """h11 refuses these before us."""

    async def no_keys() -> bool:
        return False

    app = QuartTrio("guarded")
    headers = Headers([("Host", host) for host in hosts])
    asked = app.request_class("GET", "http", "/", b"", headers, "", "1.1", {}, send_push_promise=no_push)  # type: ignore[typeddict-item]
    with pytest.raises(ApiError) as refused:
        await RequestGuard(no_keys).check(asked)
    assert refused.value.status == 421


async def no_push(path: str, headers: Headers) -> None:
    """HTTP/1.1 has none."""


async def test_with_keys_the_host_does_not_matter_and_the_first_key_is_noticed(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        _, key = await door.store.add_key()
        answer = await door.raw(f"X-API-Key: {key}", host="lumos.example:443")
        assert answer.status == 200
        assert (await door.raw(host="lumos.example", path="/open")).status == 200
        assert (await door.raw(host="lumos.example")).status == 401


async def test_when_the_store_cannot_tell_about_keys_a_foreign_name_is_503(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        door.store.down = True
        assert (await door.raw(host="evil.example", path="/open")).status == 503
        assert (await door.raw(path="/open")).status == 200, "nothing has to be asked"


# From which page


def browser(origin: str | None, site: str | None) -> list[str]:
    headers = [] if origin is None else [f"Origin: {origin}"]
    return headers if site is None else [*headers, f"Sec-Fetch-Site: {site}"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "headers",
    [
        browser(None, None),
        browser(None, "none"),
        browser(None, "same-origin"),
        browser(URL, "same-origin"),
        browser(URL, None),
        browser(f"https://{HOST}", None),
        browser(PAGE, "cross-site"),
    ],
    ids=str,
)
async def test_own_and_allowed_pages_may_change_things(
    headers: Sequence[str], method: str, autojump_clock: MockClock
) -> None:
    async with open_door(PAGE) as door:
        assert (await door.raw(*headers, method=method, path="/change")).status == 200
        assert door.changes == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "headers",
    [
        browser("https://evil.example", "cross-site"),
        browser("https://evil.example", None),
        browser("https://evil.example", "same-origin"),
        browser(f"http://{HOST}:3000", "same-site"),
        browser("http://localhost.evil.example", None),
        browser("null", None),
        browser("", None),
        browser("file://", None),
        browser(f"{PAGE}.evil.example", None),
        browser(f"{PAGE}/", None),
        browser(f"{PAGE} {URL}", None),
        browser("*", None),
        [f"Origin: {URL}", "Origin: https://evil.example"],
        browser(None, "cross-site"),
        browser(None, "same-site"),
        browser(None, "surprise"),
    ],
    ids=str,
)
async def test_other_pages_may_not_change_anything(
    headers: Sequence[str], method: str, autojump_clock: MockClock
) -> None:
    async with open_door(PAGE) as door:
        answer = await door.raw(*headers, method=method, path="/change")
        assert (answer.status, answer.json()["code"]) == (403, "FORBIDDEN")
        assert door.changes == 0


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None, ""]
)
@pytest.mark.parametrize("origin", ["https://evil.example", None])
async def test_what_a_page_can_send_without_asking_changes_nothing(
    origin: str | None, content_type: str | None, autojump_clock: MockClock
) -> None:
    """The "simple" requests of CORS; of old browsers without any header that tells where it is from."""
    async with open_door() as door:
        headers = browser(origin, None)
        if content_type is not None:
            headers.append(f"Content-Type: {content_type}")
        answer = await door.raw(*headers, "Content-Length: 0", method="POST", path="/json")
        assert answer.status == (403 if origin else 415)
        assert door.changes == 0


async def test_with_keys_the_page_does_not_matter(autojump_clock: MockClock) -> None:
    async with open_door(keyed=True) as door:
        _, key = await door.store.add_key()
        headers = [f"X-API-Key: {key}", *browser("https://evil.example", "cross-site")]
        assert (await door.raw(*headers, method="POST", path="/change")).status == 200
        assert (await door.raw(*headers[1:], method="POST", path="/change")).status == 401


# CORS

ALL_CORS = ("access-control-allow-origin", "access-control-expose-headers", "access-control-allow-methods", "vary")


@pytest.mark.parametrize("origins", [[], [PAGE]])
async def test_without_an_allowed_origin_no_answer_is_for_pages(
    origins: Sequence[str], autojump_clock: MockClock
) -> None:
    async with open_door(*origins) as door:
        ask = ["Origin: https://evil.example", "Access-Control-Request-Method: POST"]
        for answer in (await door.raw(*ask, method="OPTIONS"), await door.raw(ask[0]), await door.raw()):
            present = {name: answer.headers[name] for name in ALL_CORS if name in answer.headers}
            assert present == ({"vary": "Origin"} if origins else {})


@pytest.mark.parametrize("path", ["/change", "/who", "/no/such/route"])
async def test_a_preflight_is_answered_without_a_key(path: str, autojump_clock: MockClock) -> None:
    async with open_door(PAGE, keyed=True) as door:
        await door.store.add_key()
        ask = [f"Origin: {PAGE}", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-api-key"]
        answer = await door.raw(*ask, method="OPTIONS", path=path)
        assert (answer.status, answer.body) == (204, b"")
        assert not {"content-length", "content-type"} & set(answer.headers)
        cors = {name: value for name, value in answer.headers.items() if name.startswith("access-control")}
        assert cors == {
            "access-control-allow-origin": PAGE,
            "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE",
            "access-control-allow-headers": ALLOWED,
            "access-control-max-age": "600",
            "access-control-expose-headers": EXPOSED,
        }
        assert answer.headers["vary"] == "Origin"
        assert door.store.reads == []


@pytest.mark.parametrize(
    ("path", "status"), [("/who", 200), ("/stream", 200), ("/no", 404), ("/change", 405), ("/open", 200)]
)
async def test_answers_errors_and_streams_carry_the_headers(path: str, status: int, autojump_clock: MockClock) -> None:
    async with open_door(PAGE) as door:
        answer = await door.raw(f"Origin: {PAGE}", path=path)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == EXPOSED
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers


async def test_a_401_can_be_read_by_an_allowed_page(autojump_clock: MockClock) -> None:
    async with open_door(PAGE) as door:
        await door.store.add_key()
        answer = await door.raw(f"Origin: {PAGE}")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, PAGE)


async def test_any_origin_is_for_servers_with_keys(autojump_clock: MockClock) -> None:
    with pytest.raises(ValueError, match="name the origins"):
        Cors(["*"])
    async with open_door("*", keyed=True) as door:
        _, key = await door.store.add_key()
        answer = await door.raw("Origin: https://anywhere.example", f"X-API-Key: {key}")
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://App.Example", "https://app.example"),
        (" http://localhost:3000 ", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
    ],
)
def test_an_origin_is_written_as_browsers_send_it(text: str, origin: str) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "app.example",
        "https://",
        "https://a.example/",
        "https://a.example/x",
        "https://*.example",
        "//a",
        "a b",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        Cors([text])


# How deep bodies nest


def nested(levels: int, opening: str = "[", closing: str = "]", core: str = "") -> bytes:
    return (opening * levels + core + closing * levels).encode()


@pytest.mark.parametrize(
    ("opening", "closing", "core"),
    [("[", "]", ""), ('{"a":', "}", "1"), ('[{"[":', "}]", '"]"')],
)
def test_levels_are_counted_exactly(opening: str, closing: str, core: str) -> None:
    step = opening.replace('"["', "").count("[") + opening.count("{")
    deepest = MAX_JSON_DEPTH // step
    assert nesting_fault(nested(deepest, opening, closing, core)) is None
    assert nesting_fault(nested(deepest + 1, opening, closing, core))


def depth_of(value: object) -> int:
    """The plain way to count."""
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


JSON = st.recursive(
    st.none() | st.integers() | st.text('ab[]{}\\",:', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[]{}\\"', max_size=3), inner, max_size=3),
)


@given(value=JSON, limit=st.integers(0, 6), ascii_only=st.booleans(), indent=st.none() | st.just(1))
def test_brackets_in_strings_do_not_count(value: object, limit: int, ascii_only: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert (nesting_fault(body, limit) is not None) == (depth_of(value) > limit)


@pytest.mark.parametrize("part", ["[],", "{},", '{"a":1},', "[[]],", '"",[],'])
def test_a_body_has_a_bounded_number_of_parts(part: str) -> None:
    parts = part.count("[") + part.count("{")
    most = (MAX_JSON_PARTS - 1) // parts
    assert nesting_fault(f"[{part * most}1]".encode()) is None
    assert nesting_fault(f"[{part * (most + 1 + parts)}1]".encode())


@pytest.mark.parametrize("text", ["[" * 200_000, '[{"a":"b"},' * 15_000, '\\"[' * 30_000])
def test_brackets_in_a_message_are_text(text: str) -> None:
    assert nesting_fault(json.dumps({"message": text}).encode()) is None


@pytest.mark.parametrize(
    "body",
    [b'["' + b'","['.join([b""] * 200_000), b'["\\\\"' + b',["\\\\"' * 150_000, b"[" * 2**20, b"[]," * 300_000],
    ids=["strings", "backslashes", "open", "flat"],
)
def test_a_hostile_body_is_told_without_taking_it_apart(body: bytes) -> None:
    assert nesting_fault(body)


@pytest.mark.parametrize("levels", [MAX_JSON_DEPTH, MAX_JSON_DEPTH + 1, 900, 1100, 100_000])
async def test_a_deep_body_is_400(levels: int, autojump_clock: MockClock) -> None:
    async with open_door() as door:
        body = b'{"x":' + nested(levels - 1) + b"}"
        response = await door.client.post(f"{URL}/json", content=body, headers={"Content-Type": "application/json"})
        if levels <= MAX_JSON_DEPTH:
            assert response.status_code == 200
        else:
            assert (response.status_code, response.json()["code"]) == (400, "INVALID_JSON")


async def test_of_a_field_that_is_there_twice_the_last_one_counts(autojump_clock: MockClock) -> None:
    async with open_door() as door:
        headers = {"Content-Type": "application/json"}
        response = await door.client.post(f"{URL}/json", content=b'{"a":1,"\\u0061":2}', headers=headers)
        assert response.json() == {"a": 2}
        lone = await door.client.post(f"{URL}/json", content=b'{"a":"\\ud800"}', headers=headers)
        assert lone.status_code == 400
