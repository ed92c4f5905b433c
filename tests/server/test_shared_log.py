"""Any worker serves any run: its events from any number on, its state, stop, forget; readers anywhere count."""

from __future__ import annotations

from contextlib import closing

import pytest
import trio

from engine import AgentStopped, Error, GenerationComplete
from engine.log import RunLog
from server.journal_log import JournalSource
from server.run_directory import ElsewhereError, GoneError, RunDirectory
from server.run_uploads import SharedLimits
from server.run_view import RunView
from server.store.database import Database
from server.store.rows import Scope
from server.store.turns import begin_run
from tests.harness.redis import RedisServer
from tests.server.shared_scene import (
    LONG,
    OWNER,
    Script,
    Worker,
    eventually,
    frames,
    open_scene,
    read_to_end,
    read_until,
    said,
)


async def test_events_of_another_workers_run_are_the_same_bytes(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        received: list[bytes] = []

        async def read() -> None:
            received.append(frames(await read_to_end(remote.log)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            script.say("Grüße ", "aus ", "\n\nzwei \U0001f600")
            script.end()
        assert received == [frames(run.log.entries())]
        assert [entry.seq for entry in remote.log.entries] == list(range(1, run.log.last_seq + 1))
        assert isinstance(remote.log.terminal, GenerationComplete)


async def test_each_word_comes_live_while_the_run_has_no_reader_of_its_own(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        with remote.log.attached():
            for number in range(5):
                script.say(f"word{number} ")
                words = "".join(f"word{earlier} " for earlier in range(number + 1))
                await read_until(remote.log, lambda entries, words=words: said(entries) == words)  # type: ignore[misc]


async def test_a_run_is_read_from_any_number_on(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        with run.log.attached():
            for word in "abcdef":
                script.say(word)
                await read_until(run.log, lambda entries, word=word: said(entries).endswith(word))  # type: ignore[misc]
        script.end()
        with trio.fail_after(LONG):
            await run.log.wait_ended()
        remote = await two.find(run.id)
        for after in range(run.log.last_seq + 1):
            assert frames(await read_to_end(remote.log, after)) == frames(run.log.entries(after))


async def test_a_hundred_readers_of_one_run_cost_one_connection(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        ends: list[bytes] = []

        async def read() -> None:
            ends.append(frames(await read_to_end((await two.find(run.id)).log)))

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(read)
            await eventually(lambda: remote.log.readers == 100)
            clients = await two.shared._link.ask("CLIENT", "LIST")
            assert clients.count(b"\n") == 4  # two of each worker
            script.say("word")
            script.end()
        assert ends == [frames(run.log.entries())] * 100


async def test_cancelled_readers_leave_nothing_behind(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        for _ in range(30):
            remote = await two.find(run.id)
            with trio.move_on_after(0.005), remote.log.attached():
                await remote.log.read(remote.log.last_seq)
        clients = await two.shared._link.ask("CLIENT", "LIST")
        assert clients.count(b"\n") == 4
        assert (remote.log.readers, remote.log.in_use) == (0, False)
        script.say("word")
        script.end()
        assert said(await read_to_end(remote.log)) == "word"


async def test_a_run_that_nobody_knows_is_not_there(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one = await scene.worker("one")
        assert await one.shared.find("nosuchrun") is None


async def test_state_of_another_workers_run(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        script.say("so far")
        with remote.log.attached():
            await read_until(remote.log, lambda entries: said(entries) == "so far")
        view = (await two.find(run.id)).view()
        assert (view.status, view.response, view.agent_id) == ("running", "so far", "agent")
        assert remote.owner == run.spec.owner
        script.end()
        await read_to_end(remote.log)
        ended = (await two.find(run.id)).view()
        assert (ended.status, ended.response, ended.terminal) == ("done", "so far", run.log.terminal)
        assert ended.elapsed_ms == round(run.elapsed * 1000, 3)


async def test_stop_from_another_worker_twice(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        script.say("said")
        with remote.log.attached():
            await read_until(remote.log, lambda entries: said(entries) == "said")
        await remote.stop("enough")
        await (await two.find(run.id)).stop()
        assert remote.log.terminal == AgentStopped("enough", "said", run.usage)
        assert run.log.terminal == remote.log.terminal


async def test_forget_from_another_worker(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script())
        remote = await two.find(run.id)
        ends: list[object] = []

        async def read() -> None:
            ends.append((await read_to_end(remote.log))[-1].event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await (await two.find(run.id)).forget()
        assert [type(end) for end in ends] == [AgentStopped]
        with pytest.raises(GoneError):
            await two.shared.find(run.id)
        await eventually(lambda: one.supervisor.find(run.id) is None)


async def test_forget_at_the_runs_own_worker(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script())
        await two.find(run.id)
        await one.forget(run)
        with pytest.raises(GoneError):
            await two.shared.find(run.id)


async def test_who_waits_elsewhere_gets_the_end_of_a_run_that_its_own_worker_forgets(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script())
        remote = await two.find(run.id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote.log.wait_ended)
            await eventually(lambda: remote.log.in_use)
            await one.forget(run)
            with trio.fail_after(LONG):
                await remote.log.wait_ended()
        assert isinstance(remote.log.terminal, AgentStopped)


async def view_of_forgotten(worker: Worker, run_id: str) -> RunView:
    with pytest.raises(GoneError) as gone:
        await worker.shared.find(run_id)
    assert gone.value.owner == OWNER
    return gone.value.view


@pytest.mark.parametrize("at_its_own", [True, False], ids=["at its worker", "elsewhere"])
async def test_a_forgotten_run_tells_how_it_ended_and_nothing_that_it_said(
    at_its_own: bool, redis_server: RedisServer
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        remote = await two.find(run.id)
        script.say("secret")
        script.end()
        await read_to_end(remote.log)
        for _ in range(2):
            await (one.forget(run) if at_its_own else remote.forget())
            view = await view_of_forgotten(two, run.id)
            assert (view.run_id, view.agent_id, view.status) == (run.id, "agent", "done")
            assert (view.last_seq, view.response, view.terminal) == (0, "", None)
            assert view.elapsed_ms == run.elapsed_ms


@pytest.mark.parametrize("at_its_own", [True, False], ids=["at its worker", "elsewhere"])
async def test_a_run_that_is_forgotten_while_it_goes_on_was_stopped(
    at_its_own: bool, redis_server: RedisServer
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script())
        remote = await two.find(run.id)
        await (one.forget(run) if at_its_own else remote.forget())
        view = await view_of_forgotten(two, run.id)
        assert (view.status, view.elapsed_ms) == ("stop", run.elapsed_ms)


def nothing(log: RunLog) -> None:
    """Hear of an event, and do nothing."""


async def test_a_run_whose_end_was_not_written_yet_tells_it_when_it_is_forgotten(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        await two.find(run.id)
        one.shared.appended = nothing  # its end does not get there by itself
        script.end()
        with trio.fail_after(LONG):
            await run.log.wait_ended()
        await one.forget(run)
        assert (await view_of_forgotten(two, run.id)).status == "done"


async def test_a_reader_elsewhere_keeps_the_run_and_its_leaving_ends_it(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script, grace=0.0)
        remote = await two.find(run.id)
        with remote.log.attached():
            await eventually(lambda: run.log.readers)
            script.say("still there")
            await read_until(remote.log, lambda entries: said(entries) == "still there")
            assert not run.log.ended
        with trio.fail_after(LONG):
            await run.log.wait_ended()
        assert run.log.terminal == AgentStopped("disconnect", "still there", run.usage)


async def test_the_readers_of_a_worker_that_died_leave(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script(), grace=0.0)
        remote = await two.find(run.id)
        with remote.log.attached():
            await eventually(lambda: run.log.readers)
            two.die()
            with trio.fail_after(LONG):
                await run.log.wait_ended()
        assert isinstance(run.log.terminal, AgentStopped)


async def test_an_ended_run_expires_after_its_retention(redis_server: RedisServer) -> None:
    async with open_scene(redis_server, SharedLimits(lease=0.6, retention=0.5)) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script, lasting = Script(), Script()
        run, other = one.start(script), one.start(lasting)
        remote = await two.find(run.id)
        script.end()
        await read_to_end(remote.log)

        async def expired() -> bool:
            return await two.shared.find(run.id) is None

        await eventually(expired)
        assert await two.shared.find(other.id) is not None
        assert not [key for key in await two.shared._link.ask("KEYS", "*") if run.id.encode() in key]


async def test_a_worker_that_leaves_takes_its_name_and_leaves_its_runs(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        script = Script()
        run = one.start(script)
        script.say("word")
        script.end()
        with trio.fail_after(LONG):
            await run.log.wait_ended()
            await one.shared.leave()
        one.die()
        assert list(await two.shared._link.ask("HGETALL", "lumos:workers")) == [two.shared.worker.encode()]
        assert frames(await read_to_end((await two.find(run.id)).log)) == frames(run.log.entries())
        assert not isinstance(run.log.terminal, Error)


async def test_a_run_whose_worker_died_before_redis_heard_of_it_is_elsewhere(redis_server: RedisServer) -> None:
    async with open_scene(redis_server) as scene:
        two = await scene.worker("two")
        with closing(Database.open("sqlite://")) as database:
            scope = Scope(OWNER.tenant_id, OWNER.user_id, "agent")
            await database.write(begin_run, scope, OWNER.session_id, "run", None, "2026-11-23T12:00:00.000000+00:00")
            directory = RunDirectory(two.supervisor, (two.shared, JournalSource(database, two.supervisor)))
            with trio.fail_after(LONG), pytest.raises(ElsewhereError) as elsewhere:
                await directory.find("run")
        assert (elsewhere.value.owner, elsewhere.value.view.status) == (OWNER, "running")


async def test_where_events_are_gone_and_the_store_does_not_know_it_yet_they_are_gone(
    redis_server: RedisServer,
) -> None:
    async with open_scene(redis_server) as scene:
        one, two = await scene.worker("one"), await scene.worker("two")
        run = one.start(Script())
        await two.find(run.id)
        await one.forget(run)
        with closing(Database.open("sqlite://")) as database:
            scope = Scope(OWNER.tenant_id, OWNER.user_id, "agent")
            await database.write(begin_run, scope, OWNER.session_id, run.id, None, "2026-11-23T12:00:00.000000+00:00")
            directory = RunDirectory(two.supervisor, (two.shared, JournalSource(database, two.supervisor)))
            with pytest.raises(GoneError) as gone:
                await directory.find(run.id)
        assert gone.value.view.status == "stop"
