"""A socket at one worker, a run at another: through a real Redis it is read, joined and stopped as one of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from server.app import create_app
from server.services import Services
from server.serving import serve
from server.testing.memory_network import MemoryNetwork
from tests.harness.redis import RedisServer
from tests.harness.websocket_client import WebSocketClient
from tests.server.shared_scene import Script, Worker, open_scene, read_until, said
from tests.server.socket_scene import assert_whole, events, hear_ends, refusal


@asynccontextmanager
async def socket_at(worker: Worker) -> AsyncIterator[WebSocketClient]:
    """A socket to that worker, in memory."""
    network = MemoryNetwork()
    services = Services({}, worker.supervisor, sources=(worker.shared,), shared_log=worker.shared)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, create_app(services), [network.listen("lumos", 80)], trio.Event())
        async with await network.connect("lumos", 80) as stream:
            socket = WebSocketClient(stream)
            await socket.shake_hands()
            yield socket
        nursery.cancel_scope.cancel()


def text_of(socket: WebSocketClient, run_id: str) -> str:
    return "".join(event.get("content", "") for _, event in events(socket, run_id))


async def test_a_run_of_another_worker_is_read_live_and_to_its_end(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        await two.find(run.id)
        async with socket_at(two) as socket:
            assert await socket.ask("subscribe", run_id=run.id) == {"type": "subscribed", "run_id": run.id, "after": 0}
            for number in range(5):
                script.say(f"word{number} ")
                words = "".join(f"word{earlier} " for earlier in range(number + 1))
                while text_of(socket, run.id) != words:
                    await socket.hear()
            script.end()
            await hear_ends(socket, run.id)
            assert_whole(socket, run)


async def test_it_is_read_from_any_number_on_and_stopped(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        await two.find(run.id)
        script.say("so far")
        with run.log.attached():
            await read_until(run.log, lambda entries: said(entries) == "so far")
            after = run.log.last_seq
            async with socket_at(two) as socket:
                await socket.say("subscribe", run_id=run.id, after=after)
                assert await socket.hear_until("subscribed")
                await socket.say("stop", run_id=run.id)
                assert (await socket.hear_until("stopped"))["status"] == "stop"
                if not any(one["type"] == "end" for _, one in socket.heard):
                    await hear_ends(socket, run.id)
                assert [seq for seq, _ in events(socket, run.id)] == [entry.seq for entry in run.log.entries(after)]
                far = await refusal(socket, "subscribe", run_id=run.id, after=run.log.last_seq + 1)
                assert far == {"code": "INVALID_CURSOR", "run_id": run.id}


async def test_a_number_that_redis_does_not_have_yet_is_waited_for(redis_server: RedisServer) -> None:
    """The reader has it from the run's own worker, which is ahead of what the others know."""
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        ahead = remote.log.last_seq + 2
        async with socket_at(two) as socket:
            await socket.say("subscribe", run_id=run.id, after=ahead)
            assert (await socket.hear())["type"] == "subscribed"
            with run.log.attached():
                for word in "abcd":
                    script.say(word)
                    await read_until(
                        run.log,
                        lambda entries, word=word: said(entries).endswith(word),  # type: ignore[misc]
                    )
            script.end()
            await hear_ends(socket, run.id)
            assert_whole(socket, run, ahead)


async def test_the_run_of_a_dead_worker_ends_on_the_socket_with_one_error(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        await two.find(run.id)
        async with socket_at(two) as socket:
            await socket.say("subscribe", run_id=run.id)
            script.say("word")
            while text_of(socket, run.id) != "word":
                await socket.hear()
            one.die()
            await hear_ends(socket, run.id)
            *_, (_, last) = events(socket, run.id)
            assert (last["chunk_type"], last["code"]) == ("error", "worker_lost")
            numbers = [seq for seq, _ in events(socket, run.id)]
            assert numbers == sorted(set(numbers))
