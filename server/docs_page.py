"""The API's description as one page for people: no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from json import dumps
from typing import Any
from urllib.parse import urlencode

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dade, #3a3e46); --soft: light-dark(#f5f6f8, #1d2026);
  --quiet: light-dark(#5c6370, #9aa1ad); --accent: light-dark(#0b57d0, #8ab4f8); }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 2rem 1.2rem 5rem;
  background: light-dark(#fff, #14161a); color: light-dark(#1c1f24, #e4e6ea); }
h1 { margin: 0 } h2 { margin: 3rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
a { color: var(--accent) } .quiet { color: var(--quiet) } p { margin: .5rem 0 }
code, pre { font: .86em/1.5 ui-monospace, monospace } code { overflow-wrap: anywhere }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: .4rem; overflow-x: auto;
  padding: .7rem .9rem }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; overflow: hidden }
details > div { padding: .2rem 1rem .8rem }
summary { background: var(--soft); cursor: pointer; padding: .5rem .9rem }
summary b { color: var(--accent); display: inline-block; font: 600 .8em ui-monospace, monospace; width: 4.2rem }
summary span { color: var(--quiet); display: block; font-size: .92em; margin-left: 4.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { border-top: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top }
th { border: 0; color: var(--quiet); font-size: .85em; font-weight: 500 }
h4 { margin: 1rem 0 .2rem }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def render(document: Mapping[str, Any], origin: str) -> str:
    """The OpenAPI document as HTML; ``origin`` is this server's as the reader reaches it, for the curl lines."""
    info = document["info"]
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(info['title'])} API</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(info['title'])} <span class=quiet>{escape(info['version'])}</span></h1>",
            f"<p>{_text(info['summary'])}</p><p class=quiet>{_text(info['description'])} ",
            'For programs: <a href="/openapi.json">openapi.json</a>.</p>',
            *_operations(document, origin),
            "<h2>Types</h2>",
            *(_type(name, schema) for name, schema in document["components"]["schemas"].items()),
            "</body></html>",
        ]
    )


def _operations(document: Mapping[str, Any], origin: str) -> Iterator[str]:
    tag = ""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if operation.get("deprecated"):
                continue
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                yield f"<h2>{escape(tag)}</h2>"
            yield _operation(method.upper(), path, operation, document, origin)


def _operation(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any], origin: str) -> str:
    parts = [
        f'<details id="{escape(operation["operationId"])}"><summary><b>{method}</b> <code>{escape(path)}</code>',
        f"<span>{_text(operation['summary'])}</span></summary><div>",
        f"<pre>{escape(_curl(method, path, operation, document, origin))}</pre>",
    ]
    rows = [
        (
            f"<code>{escape(one['name'])}</code>",
            escape(one["in"]),
            _kind(one["schema"]),
            _text(one.get("description", "")),
        )
        for one in operation["parameters"]
    ]
    parts.append(_table("Parameters", ("name", "in", "type", ""), rows))
    body = operation.get("requestBody")
    if body is not None:
        content = body["content"]
        kinds = " or ".join(f"<code>{escape(name)}</code>" for name in content)
        parts.append(f"<h4>Body</h4><p>{_kind(next(iter(content.values()))['schema'])} as {kinds}</p>")
    parts.append(_table("Answers", ("status", "body", ""), _answers(operation, document)))
    return "".join([*parts, "</div></details>"])


def _answers(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for status, response in sorted(operation["responses"].items()):
        if "$ref" in response:
            response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]  # noqa: PLW2901
        kinds = [
            _kind(_said(media["schema"])) + f" <span class=quiet>{escape(name)}</span>"
            for name, media in response.get("content", {}).items()
        ]
        headers = [
            f"<br><code>{escape(name)}</code> {_text(header['description'])}"
            for name, header in response.get("headers", {}).items()
        ]
        yield (f"<code>{status}</code>", ", ".join(kinds), _text(response["description"]) + "".join(headers))


def _said(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of what is in a server-sent event, of anything else its own."""
    data: Mapping[str, Any] = schema.get("properties", {}).get("data", {})
    inner: Mapping[str, Any] = data.get("contentSchema", schema)
    return inner


def _curl(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any], origin: str) -> str:
    required = {one["name"]: "..." for one in operation["parameters"] if one["in"] == "query" and one["required"]}
    url = f"{origin}{path}" + (f"?{urlencode(required)}" if required else "")
    for name in (one["name"] for one in operation["parameters"] if one["in"] == "path"):
        url = url.replace(f"{{{name}}}", "demo" if name == "agent_id" else name.upper())
    streams = any("text/event-stream" in one.get("content", {}) for one in operation["responses"].values())
    words = ["curl -N" if streams else "curl", *([] if method in ("GET", "POST") else [f"-X {method}"]), f"'{url}'"]
    body = operation.get("requestBody")
    if method == "POST" and body is None:
        words.insert(1, "-X POST")
    if {} not in document["security"] and operation.get("security") != []:
        words.append("-H 'Authorization: Bearer '\"$LUMOS_KEY\"")
    if body is not None:
        name, media = next(iter(body["content"].items()))
        words += [f"-H 'Content-Type: {name}'", f"-d '{dumps(media.get('example', {}), ensure_ascii=False)}'"]
    return " \\\n  ".join([" ".join(words[: words.index(f"'{url}'") + 1]), *words[words.index(f"'{url}'") + 1 :]])


def _type(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>",
            _kind(described) + ("" if field in required else " <span class=quiet>optional</span>"),
            _text(described.get("description", "")),
        )
        for field, described in schema.get("properties", {}).items()
    ]
    inner = _table("", ("field", "type", ""), rows) if rows else f"<p>{_kind(schema)}</p>"
    text = _text(schema.get("description", ""))
    summary = f"<summary><code>{escape(name)}</code><span>{text}</span></summary>"
    return f'<details id="type-{escape(name)}">{summary}<div>{inner}</div></details>'


def _table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    return f"{heading}<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _kind(schema: Mapping[str, Any]) -> str:
    """The schema in a few words, with links to the types."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#type-{escape(name)}"><code>{escape(name)}</code></a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(dumps(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(dumps(schema['const']))}</code>"
    if "data" in schema.get("properties", {}):
        return _kind(schema["properties"]["data"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return escape(" ".join([str(schema.get("type", "any JSON")), *bounds]))


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _text(markdown: str) -> str:
    """The text with what stands in backticks as code."""
    return "".join(
        f"<code>{escape(part)}</code>" if number % 2 else escape(part)
        for number, part in enumerate(markdown.split("`"))
    )
