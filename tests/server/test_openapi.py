"""The API's description is true, whole, and readable; and so is its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from trio.testing import MockClock

from engine.events import EVENT_TYPES
from server.openapi import STATUSES, refusals
from server.routes import ROUTES, description
from server.routing import STREAM, Route
from tests.harness.world import open_keeping_world
from tests.server.api_scene import BASE, HELPER, Caller


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_every_route_is_in_it_with_every_status() -> None:
    paths = description(True)["paths"]
    served = {(path, route.method.lower()) for route in ROUTES for path in (route.path, *route.aliases)}
    assert {(path, method) for path, methods in paths.items() for method in methods} == served
    for route in ROUTES:
        for path in (route.path, *route.aliases):
            statuses = {int(status) for status in paths[path][route.method.lower()]["responses"]}
            assert statuses == {route.status, *route.also, *refusals(route)}
            assert {name[1:-1] for name in re.findall(r"\{\w+\}", path)} == {
                one["name"] for one in paths[path][route.method.lower()]["parameters"] if one["in"] == "path"
            }


def test_its_references_lead_somewhere_and_its_names_are_there_once() -> None:
    document = description(True)
    for reference in _references(document):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_its_schemas_are_json_schemas_and_its_examples_fit() -> None:
    document = description(True)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for methods in document["paths"].values():
        for operation in methods.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                schema = media["schema"] | {"components": document["components"]}
                jsonschema.validate(media["example"], schema, jsonschema.Draft202012Validator)


def test_streams_are_described_by_the_events() -> None:
    document = description(True)
    streams = [route for route in ROUTES if route.answer is STREAM]
    assert len(streams) == 6
    for route in streams:
        content = document["paths"][route.path][route.method.lower()]["responses"]["200"]["content"]
        data = content["text/event-stream"]["schema"]["properties"]["data"]
        assert data["contentSchema"] == {"$ref": f"#/components/schemas/{route.frames}"}
    kinds = document["components"]["schemas"]["Event"]["discriminator"]["mapping"]
    assert set(kinds) == {kind.__struct_config__.tag for kind in EVENT_TYPES}


def test_what_a_docstring_says_of_a_field_stands_with_the_field() -> None:
    schemas = description(True)["components"]["schemas"]
    assert "Attributes:" not in repr(schemas)
    assert "``" not in repr(schemas)
    assert schemas["ChatRequest"]["properties"]["session_id"]["description"].startswith("messages of one session")


def test_a_key_is_asked_for_where_one_is_needed() -> None:
    document = description(True)
    assert document["security"] == [{"bearer": []}, {"api_key": []}]
    assert description(False)["security"] == [{"bearer": []}, {"api_key": []}, {}]
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert ("401" in operation["responses"]) is not route.open
        assert operation.get("security") == ([] if route.open else None)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: str(route.name))
def test_a_route_says_what_it_is(route: Route) -> None:
    assert route.summary
    assert not route.summary.endswith(".")
    assert set(refusals(route)) <= set(STATUSES)
    assert route.body is None or route.example is not None


async def test_it_is_served_to_everybody(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        response = await world.client.get(f"{BASE}/openapi.json")
        assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
        assert response.json()["openapi"] == "3.1.0"
        assert {} in response.json()["security"]


async def test_a_server_that_has_keys_says_so_without_one(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        await world.add_key("acme", "ada")
        response = await world.client.get(f"{BASE}/openapi.json")
        assert response.status_code == 200
        assert {} not in response.json()["security"]


class _Page(HTMLParser):
    """What a page is made of, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        self.ids |= {value for name, value in attrs if name == "id" and value}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


async def test_the_page_shows_every_route_and_needs_nothing_from_elsewhere(autojump_clock: MockClock) -> None:
    async with open_keeping_world(HELPER) as world:
        response = await world.client.get(f"{BASE}/docs")
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
        page = _Page()
        page.feed(response.text)
        page.close()
        assert page.open == []
        assert not {"script", "link", "img", "iframe"} & set(page.tags)
        assert {link for link in page.links if not link.startswith("#")} == {"/openapi.json"}
        assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
        shown = "".join(page.text)
        for route in ROUTES:
            assert route.path in shown
            assert route.summary in shown
        assert f"curl -N '{BASE}/api/v1/agents/demo/chat/lumosai/stream'" in shown


async def test_who_asks_for_nothing_is_shown_the_page(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        await world.add_key("acme", "ada")
        response = await world.client.get(f"{BASE}/")
        assert (response.status_code, response.headers["Location"], response.content) == (302, "/docs", b"")
        assert (
            (await world.client.get(f"{BASE}/", follow_redirects=True)).headers["Content-Type"].startswith("text/html")
        )


async def test_a_curl_line_of_the_page_works(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        page = (await world.client.get(f"{BASE}/docs")).text
        assert "LUMOS_KEY" not in page, "a server without keys needs none"
        example = next(route.example for route in ROUTES if route.name == "create_agent")
        assert (
            await Caller(world, await world.add_key("a", "b")).ask("POST", "/agents", json=example)
        ).status_code == 201
