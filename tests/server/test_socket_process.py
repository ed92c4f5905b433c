"""The WebSocket of a real ``lumos serve``, over a real socket."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio

from tests.harness.websocket_client import SocketClosedError, WebSocketClient
from tests.server.socket_scene import events, hear_ends, start
from tests.server.test_compose import LONG, STEADY, site

TEXTS = 3


def kinds(socket: WebSocketClient, run_id: str) -> list[str]:
    return [event["chunk_type"] for _, event in events(socket, run_id)]


async def test_two_runs_on_a_real_socket_one_is_stopped_the_other_drained(tmp_path: Path) -> None:
    async with site(tmp_path, "--drain", "0.3", recording=STEADY) as lumos:
        port = httpx.URL(lumos.url).port
        assert port is not None
        with trio.fail_after(LONG):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                socket = WebSocketClient(stream)
                await socket.shake_hands(host=f"127.0.0.1:{port}")
                stopped, drained = await start(socket, "local"), await start(socket, "local")
                while min(kinds(socket, run_id).count("content") for run_id in (stopped, drained)) < TEXTS:
                    await socket.hear()
                await socket.say("stop", run_id=stopped)
                await hear_ends(socket, stopped)
                assert kinds(socket, stopped)[-1] == "stop"
                lumos.serve.process.terminate()
                with pytest.raises(SocketClosedError) as closed:
                    await hear_ends(socket, drained, "nothing")
                assert (closed.value.code, closed.value.reason) == (1012, "the server ends")
        for run_id in (stopped, drained):
            numbers = [seq for seq, _ in events(socket, run_id)]
            assert numbers == list(range(1, len(numbers) + 1))
        last = events(socket, drained)[-1][1]
        assert (last["chunk_type"], last["code"]) == ("error", "draining")
        text = "".join(event.get("content", "") for _, event in events(socket, drained)[:-1])
        assert text == last["response"]
        assert STEADY.text.startswith(text)
        assert await lumos.serve.wait_exit() == 0
        assert "Traceback" not in lumos.serve.output
