"""The server of one's own in ``docs/mcp.md`` works as it stands there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import msgspec
import trio

from engine.memory import Owner
from engine.tools import ToolContext, ToolResult
from server.agents import read_whole_agents_file
from server.mcp_tools import McpServers

PAGE = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text().partition("## A server of your own")[2]
CONTEXT = ToolContext(
    run_id="r", call_id="c", agent_id="a", owner=Owner(), memory=None, memory_updated=lambda key, operation: None
)


def block(language: str) -> str:
    """The first of the section."""
    match = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert match
    return match[1]


async def test_the_server_in_the_docs_works(nursery: trio.Nursery, tmp_path: Path) -> None:
    script, agents = tmp_path / "clock_server.py", tmp_path / "agents.toml"
    script.write_text(block("python"))
    agents.write_text(
        block("toml").replace("/srv/clock_server.py", str(script)).replace('"python3"', f'"{sys.executable}"')
    )
    (config,) = read_whole_agents_file(agents).mcp_server
    servers = McpServers([config], os.environ)
    await nursery.start(servers.run)
    tools = servers.by_name["clock"].tools()
    assert sorted(tools) == ["days_between", "now"]
    assert tools["now"].spec.description == "The date and time in UTC, ISO 8601."
    dates = msgspec.json.encode({"first": "2026-01-01", "last": "2026-03-01"}).decode()
    assert await tools["days_between"].call(dates, CONTEXT) == ToolResult({"result": 59})
    failed = await tools["days_between"].call('{"first": "x", "last": "y"}', CONTEXT)
    assert failed.failed
    assert "Invalid isoformat string" in str(failed.value)
