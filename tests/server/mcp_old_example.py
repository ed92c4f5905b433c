"""An MCP server of before 2026, by hand: it never answers what it does not know, such as the newer handshake.

It has two pages of tools, and after each call one tool more, of which it tells.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    names = ["first", "second"]
    answer: dict[str, Any]
    for line in sys.stdin:
        message = json.loads(line)
        params = message.get("params", {})
        match message["method"]:
            case "initialize":
                answer = {
                    "protocolVersion": "2025-06-18",
                    "capabilities": {"tools": {"listChanged": True}},
                    "serverInfo": {"name": "old", "version": "1"},
                }
            case "tools/list":
                page = int(params.get("cursor", 0))
                answer = {"tools": [{"name": names[page], "inputSchema": {"type": "object"}}]}
                if page + 1 < len(names):
                    answer["nextCursor"] = str(page + 1)
            case "tools/call":
                answer = {"content": [{"type": "text", "text": params["name"]}]}
                names.append(f"more{len(names)}")
                say({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
            case _:
                continue
        say({"jsonrpc": "2.0", "id": message["id"], "result": answer})


if __name__ == "__main__":
    main()
