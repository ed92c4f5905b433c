"""An MCP server over its standard input and output, or over HTTP, for tests. Its behaviour is in its arguments.

``http PORT``: on that port or, if 0, one of its own choice, which it prints; wants ``TOKEN``, if set, in a header.
``stubborn``: ignores SIGTERM and the end of its input. ``mute``: never answers.
``noisy``: prints what is no message, and more than a log wants.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp_types import CallToolResult, EmbeddedResource, ResourceLink, TextContent, TextResourceContents

server = MCPServer("example", log_level="CRITICAL")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(structured_output=False)
def echo(text: str) -> str:
    """Say it again."""
    return text


@server.tool(structured_output=False)
def fail(reason: str) -> str:
    """Fail."""
    raise ValueError(reason)


@server.tool(structured_output=False)
def crash() -> str:
    """End the process in the middle of a call."""
    sys.stderr.write("about to crash\n")
    sys.stderr.flush()
    os._exit(3)


@server.tool(structured_output=False)
async def wait_cancelled(started: str, cancelled: str) -> str:
    """Wait for ever; files tell that it began and that it was cancelled. Named pipes, for who waits."""
    tell(started)
    try:
        await anyio.sleep_forever()
    finally:
        tell(cancelled)
    return "never"


@server.tool(structured_output=False)
async def wait_for(started: str, go: str) -> str:
    """Answer when somebody opens the other end of a pipe."""
    tell(started)
    return await anyio.to_thread.run_sync(Path(go).read_text)


@server.tool(structured_output=False)
def block(started: str) -> str:
    """Hold the whole server up."""
    tell(started)
    time.sleep(3600)
    return "never"


@server.tool(structured_output=False)
def environment() -> str:
    """The names in its environment."""
    return " ".join(sorted(os.environ))


@server.tool(structured_output=False)
def process() -> str:
    """Its process id, and that of a child that ignores SIGTERM and holds no pipe."""
    child = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; while :; do sleep 1000; done"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return f"{os.getpid()} {child.pid}"


@server.tool(structured_output=False)
def show() -> CallToolResult:
    """One of each kind of content."""
    return CallToolResult(
        content=[
            TextContent(text="look:"),
            Image(data=b"x" * 300, format="png").to_image_content(),
            ResourceLink(name="a", uri="file:///a.txt", mime_type="text/plain", size=12),
            EmbeddedResource(resource=TextResourceContents(uri="file:///b.txt", text="inside b")),
        ]
    )


@server.tool(structured_output=False)
async def learn(name: str, context: Context) -> str:
    """Have one tool more, and tell of it."""
    server.add_tool(echo, name=name, structured_output=False)
    await context.notify_tools_changed()
    return "learnt"


def tell(pipe: str) -> None:
    """Whoever reads the other end hears of it."""
    with Path(pipe).open("w") as file:
        file.write("x")


def main(arguments: list[str]) -> None:
    if "stubborn" in arguments:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "noisy" in arguments:
        say("hello, I am no message")
        for number in range(1000):
            sys.stderr.write(f"line {number} {'x' * 1000}\n")
    if "http" in arguments:
        serve_http(int(arguments[-1]))
    elif "mute" in arguments:
        sys.stdin.read()
    else:
        server.run()
    if "stubborn" in arguments:
        time.sleep(3600)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve_http(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port))
    app = server.streamable_http_app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        token = os.environ.get("TOKEN", "").encode()
        if token and scope["type"] == "http" and (b"authorization", b"Bearer " + token) not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    say(str(listener.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(guarded, log_level="critical")).run([listener])


if __name__ == "__main__":
    main(sys.argv[1:])
