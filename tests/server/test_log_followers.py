"""Followers of logs hear of every run and every event, and of nothing that goes wrong with each other."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from engine import Run, RunLog, RunSupervisor
from engine.events import data_of, encode_frame, frame_of
from server.log_followers import MIN_FRAME_BYTES, LogFollowers, may_follow
from tests.engine.scripted import SENT, ScriptedProvider, text
from tests.harness.world import RunNotes, open_world


class Notes:
    """A follower that writes down what it is told, and fails at a number."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[int] = []
        self.fails_at = fails_at

    def follow(self, run: Run) -> None:
        self._note(run.log)

    def appended(self, log: RunLog) -> None:
        self._note(log)

    def _note(self, log: RunLog) -> None:
        if self.told and self.told[-1] == log.last_seq:
            return  # other news than an event: its request was sent
        self.told.append(log.last_seq)
        if log.last_seq == self.fails_at:
            raise OSError("it cannot follow")


async def follow_a_run(*followers: Notes) -> tuple[Run, RunNotes]:
    journal = RunNotes()
    async with open_world() as world:
        world.add_agent(provider=ScriptedProvider((0, (SENT,)), (1, text("a ")), (2, text("b"))))
        supervisor = RunSupervisor(world.nursery, LogFollowers(*followers, observer=journal))
        run = supervisor.start(world.agents["demo"].run_spec("hi"))
        with run.log.attached():
            after = 0
            while entries := await run.log.read(after):
                after = entries[-1].seq
    return run, journal


@pytest.mark.parametrize("count", [1, 3])
async def test_each_follower_hears_of_the_run_and_of_each_event(count: int, autojump_clock: MockClock) -> None:
    followers = [Notes() for _ in range(count)]
    run, journal = await follow_a_run(*followers)
    for follower in followers:
        assert follower.told == list(range(1, run.log.last_seq + 1))
    assert [what for what, _, _ in journal.entries] == ["started", "first_token", "ended"]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
async def test_a_follower_that_fails_loses_the_run_and_nobody_else_does(
    fails_at: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    first, failing, last = Notes(), Notes(fails_at), Notes()
    run, journal = await follow_a_run(first, failing, last)
    assert failing.told == list(range(1, fails_at + 1))
    assert first.told == last.told == list(range(1, run.log.last_seq + 1))
    assert run.response == "a b"
    assert not journal.bugs
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_without_followers_nothing_is_on_the_way_of_a_token(autojump_clock: MockClock) -> None:
    run, _ = await follow_a_run()
    assert run.log.on_append is None


async def test_a_frame_is_made_again_from_its_data_and_none_is_shorter_than_reckoned(
    autojump_clock: MockClock,
) -> None:
    run, _ = await follow_a_run()
    assert may_follow(run)
    for entry in run.log.entries():
        assert frame_of(run.id, entry.seq, data_of(entry.frame)) == entry.frame
        assert len(encode_frame("", entry.seq, entry.event)) >= MIN_FRAME_BYTES
