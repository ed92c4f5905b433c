"""Runs' events in the store, on both databases: kept once, read in pages, ended for the dead, dropped whole."""

from __future__ import annotations

import msgspec
import pytest
from sqlalchemy import text

from engine import Error, GenerationComplete, Usage
from engine.events import AgentStarted, Event, TerminalEvent, TextDelta, ToolCallDelta, ToolCallStart, UsageUpdate
from server.store.database import Database
from server.store.history import delete_session, list_messages
from server.store.idempotency import KeyClaim, claim_key, find_claim, release_key
from server.store.interrupted import end_run, interrupt_runs
from server.store.run_events import (
    PAGE_CHARS,
    PAGE_EVENTS,
    RESERVED_SEQ,
    ROW_CHARS,
    SWEPT_RUNS,
    NewEvents,
    Progress,
    add_events,
    event_of,
    forget_events,
    page_of_events,
    sweep_events,
    terminal_seq_of,
)
from server.store.turns import begin_run, begin_turn, find_run, save_turn
from tests.server.store.scene import SCOPE, answer, at, have_turn, said, turn

LAST = RESERVED_SEQ + 1
HARD = '{"chunk_type":"content","content":"\\u0000 \\"Grüezi\\" 👋 \u2028","step_id":"s"}'


def news(run_id: str, *events: Event, first: int = 1, terminal: bool = False) -> NewEvents:
    """Events of a run, numbered from a number on."""
    numbered = [(seq, msgspec.json.encode(event).decode()) for seq, event in enumerate(events, first)]
    return NewEvents(run_id, numbered, numbered[-1][0] if terminal else None)


def delta(text: str) -> TextDelta:
    return TextDelta(text, "step-1")


async def begin(database: Database, run_id: str, second: int = 1) -> None:
    await database.write(begin_turn, SCOPE, "session", run_id, None, said(f"question of {run_id}"), at(second))


async def read_all(database: Database, run_id: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    while page := await database.read(page_of_events, run_id, found[-1][0] if found else 0):
        found += page
    return found


async def terminal_of(database: Database, run_id: str) -> TerminalEvent:
    run = await database.read(find_run, run_id)
    assert run is not None
    assert run.terminal_seq is not None
    data = await database.read(event_of, run_id, run.terminal_seq)
    assert data is not None
    terminal: TerminalEvent = msgspec.json.decode(data, type=TerminalEvent)
    return terminal


async def test_events_are_kept_to_the_byte_and_once(database: Database) -> None:
    await begin(database, "run")
    batch = [NewEvents("run", [(1, HARD), (2, "{}")])]
    assert await database.write(add_events, batch) == 2
    assert await database.write(add_events, [NewEvents("run", [(2, "other"), (3, "{}")], 3)]) == 2
    assert await read_all(database, "run") == [(1, HARD), (2, "{}"), (3, "{}")]
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.reserved_seq, run.terminal_seq) == (RESERVED_SEQ, 3)


async def rows_of(database: Database, run_id: str) -> list[tuple[int, str]]:
    wanted = text("SELECT seq, event FROM run_events WHERE run_id = :run_id ORDER BY seq")
    return [(seq, event) for seq, event in await database.read(lambda c: c.execute(wanted, {"run_id": run_id}).all())]


async def test_what_a_batch_brings_of_a_run_is_a_row(database: Database) -> None:
    await begin(database, "run")
    large = "x" * ROW_CHARS
    events = [(1, HARD), (2, "{}"), (3, large), (4, "[]"), (7, "{}"), (8, "{}")]
    assert await database.write(add_events, [NewEvents("run", events)]) == 6
    assert await rows_of(database, "run") == [(2, f"{HARD}\n{{}}"), (3, large), (4, "[]"), (8, "{}\n{}")]
    assert await read_all(database, "run") == events
    assert await database.read(page_of_events, "run", 1) == events[1:]
    for seq, event in events:
        assert await database.read(event_of, "run", seq) == event
    for unknown in (5, 6, 9):
        assert await database.read(event_of, "run", unknown) is None


@pytest.mark.parametrize("again", [1, 2, 3, 5])
async def test_a_batch_that_is_written_again_may_be_cut_elsewhere(again: int, database: Database) -> None:
    """The first try was kept, and its answer lost; the second begins at the same event, and ends at another."""
    await begin(database, "run")
    events = [(seq, f"[{seq}]") for seq in range(1, 7)]
    for some in (events[:3], events[:again], events[again:]):
        await database.write(add_events, [NewEvents("run", some)])
    assert await read_all(database, "run") == events
    assert [await database.read(page_of_events, "run", after) for after, _ in events] == [
        events[after:] for after, _ in events
    ]


async def test_rows_of_an_older_lumos_are_read(database: Database) -> None:
    await begin(database, "run")
    old = text("INSERT INTO run_events (run_id, seq, event) VALUES ('run', :seq, :event)")
    events = [(1, HARD), (2, "{}"), (3, "[]"), (4, "{}")]
    for seq, event in events[:2]:
        await database.write(lambda c, *row: c.execute(old, dict(zip(("seq", "event"), row, strict=True))), seq, event)
    await database.write(add_events, [NewEvents("run", events[2:])])
    assert await read_all(database, "run") == events


async def test_many_runs_go_into_one_batch_and_unknown_ones_are_left_out(database: Database) -> None:
    run_ids = [f"run-{number}" for number in range(PAGE_EVENTS + 5)]
    for run_id in run_ids:
        assert await database.write(begin_run, SCOPE, "session", run_id, None, at(1))
    assert not await database.write(begin_run, SCOPE, "session", run_ids[0], None, at(1))
    batch = [NewEvents(run_id, [(1, "{}")], 1, 2) for run_id in [*run_ids, "unknown"]]
    assert await database.write(add_events, batch) == len(run_ids)
    for run_id in (run_ids[0], run_ids[-1]):
        run = await database.read(find_run, run_id)
        assert run is not None
        assert (run.terminal_seq, run.memory_updates) == (1, 2)


async def test_pages_are_bounded_and_together_everything(database: Database) -> None:
    await begin(database, "run")
    large = "x" * (PAGE_CHARS // 2)
    events = [(seq, large if seq % 7 == 0 else "{}") for seq in range(1, 2 * PAGE_EVENTS)] + [(10**6, 3 * large)]
    await database.write(add_events, [NewEvents("run", events)])
    found: list[tuple[int, str]] = []
    while page := await database.read(page_of_events, "run", found[-1][0] if found else 0):
        assert len(page) <= PAGE_EVENTS
        assert len(page) == 1 or sum(len(event) for _, event in page) <= PAGE_CHARS
        found += page
    assert found == events


async def test_a_run_of_a_dead_process_ends_once_with_what_it_had_said(database: Database) -> None:
    await begin(database, "left")
    events = (AgentStarted("agent", "left", ""), delta("Hel"), delta("lo"))
    await database.write(add_events, [news("left", *events)])
    assert await database.write(interrupt_runs, at(9)) == 1
    after_first = await read_all(database, "left")
    assert await database.write(interrupt_runs, at(10)) == 0
    assert await read_all(database, "left") == after_first
    assert [seq for seq, _ in after_first] == [1, 2, 3, LAST]
    terminal = await terminal_of(database, "left")
    assert isinstance(terminal, Error)
    assert (terminal.code, terminal.response) == ("interrupted", "Hello")
    assert terminal.usage == Usage(4, 2, estimated=True)
    run = await database.read(find_run, "left")
    assert run is not None
    assert (run.status, run.error_code, run.ended_at, run.response) == ("error", "interrupted", at(9), "Hello")
    shown = await database.read(list_messages, SCOPE, None, 10, 0)
    assert [(message.content, message.partial) for message in shown] == [("question of left", False), ("Hello", True)]
    assert not await database.write(save_turn, turn("left", answer("too late")), at(11))


async def test_usage_that_the_vendor_told_stands(database: Database) -> None:
    await begin(database, "left")
    await database.write(add_events, [news("left", UsageUpdate(Usage(70, 30)), delta("Hello"))])
    ending = await database.write(end_run, "left", "worker_lost", at(9))
    assert ending is not None
    assert await database.write(end_run, "left", "interrupted", at(9)) == ending
    terminal = await terminal_of(database, "left")
    assert isinstance(terminal, Error)
    assert (terminal.code, terminal.usage) == ("worker_lost", Usage(70, 30))


def numbered(*events: Event, first: int = 1) -> list[tuple[int, str]]:
    """As somebody else has them."""
    return list(news("", *events, first=first).events)


async def end_lost(database: Database, known: list[tuple[int, str]], run_id: str = "left") -> list[tuple[int, str]]:
    """What the store has of the run beyond what is known, after it has ended it."""
    ending = await database.write(end_run, run_id, "worker_lost", at(9), known)
    assert ending is not None
    return list(ending.missing)


async def test_the_store_gets_what_it_lacks_of_a_lost_run_and_the_same_end(database: Database) -> None:
    await begin(database, "left")
    whole = numbered(delta("Hel"), delta("lo"), delta(" you"))
    await database.write(add_events, [NewEvents("left", whole[:1])])
    ((seq, end),) = await end_lost(database, whole)
    assert seq == LAST
    assert await read_all(database, "left") == [*whole, (LAST, end)]
    terminal = await terminal_of(database, "left")
    assert (terminal.response, msgspec.json.encode(terminal).decode()) == ("Hello you", end)
    run = await database.read(find_run, "left")
    assert run is not None
    assert run.response == "Hello you"
    assert await end_lost(database, whole) == [(LAST, end)], "another heir gets the same"
    assert await end_lost(database, [*whole, (LAST, end)]) == []


async def test_who_ends_a_lost_run_gets_what_only_the_store_has(database: Database) -> None:
    await begin(database, "left")
    whole = numbered(delta("Hel"), delta("lo"))
    await database.write(add_events, [NewEvents("left", whole)])
    *more, (seq, _) = await end_lost(database, whole[:1])
    assert (more, seq) == (whole[1:], LAST)
    assert (await terminal_of(database, "left")).response == "Hello"


async def test_a_lost_run_that_has_ended_in_the_store_keeps_that_end(database: Database) -> None:
    await have_turn(database, "done", "question")
    whole = numbered(delta("ok"), GenerationComplete("ok", 1, 5.0, 2.0, None))
    await database.write(add_events, [NewEvents("done", whole, 2)])
    assert await end_lost(database, whole[:1], "done") == whole[1:]
    assert await read_all(database, "done") == whole


async def test_an_end_that_was_told_while_the_store_was_away_becomes_its_own(database: Database) -> None:
    """Events that only the store has came too late: who read the run to its end has not seen them."""
    await begin(database, "left")
    whole = numbered(delta("Hel"), delta("lo"), delta(" never"))
    await database.write(add_events, [NewEvents("left", whole)])
    end = (RESERVED_SEQ, msgspec.json.encode(Error("worker_lost", "gone", "Hello", Usage(3, 2))).decode())
    assert await end_lost(database, [*whole[:2], end]) == []
    assert await read_all(database, "left") == [*whole[:2], end]
    assert await database.read(terminal_seq_of, "left") == RESERVED_SEQ
    assert await database.write(interrupt_runs, at(10)) == 0
    run = await database.read(find_run, "left")
    assert run is not None
    assert (run.status, run.error_code, run.response, run.usage) == ("error", "worker_lost", "Hello", Usage(3, 2))


async def test_of_a_run_that_was_forgotten_there_is_no_end(database: Database) -> None:
    await begin(database, "left")
    await database.write(forget_events, "left")
    for run_id in ("left", "unknown"):
        assert await database.write(end_run, run_id, "worker_lost", at(9), numbered(delta("Hel"))) is None
    assert await read_all(database, "left") == []


async def test_a_process_that_was_taken_for_dead_adds_nothing_after_the_end(database: Database) -> None:
    await begin(database, "left")
    await database.write(add_events, [news("left", delta("Hel"))])
    await end_lost(database, numbered(delta("Hel")))
    ended = await read_all(database, "left")
    late = news("left", delta("lo"), Error("worker_lost", "I was taken for dead"), first=2, terminal=True)
    assert await database.write(add_events, [late]) == 0
    assert await read_all(database, "left") == ended
    assert await database.read(terminal_seq_of, "left") == LAST


@pytest.mark.parametrize(
    ("events", "sent", "used"),
    [
        ((), 61, Usage(61, 0, estimated=True)),
        ((delta("Hello"),), 61, Usage(61, 2, estimated=True)),
        ((ToolCallStart("c", "tool", "s"), ToolCallDelta("c", '{"a":1}', "s")), 61, Usage(61, 3, estimated=True)),
        ((UsageUpdate(Usage(70, 30)), delta("Hello")), 70, Usage(70, 30)),
        ((UsageUpdate(Usage(70, 30)), delta("Hello")), 150, Usage(150, 30, estimated=True)),  # a second step
    ],
    ids=["sent", "text", "call", "reported", "second-step"],
)
async def test_an_interrupted_run_tells_what_was_sent_and_how_long_it_took(
    events: tuple[Event, ...], sent: int, used: Usage, database: Database
) -> None:
    await begin(database, "left")
    for progress in (Progress(100.5, None, None), Progress(900.25, 300.5, sent)):
        batch = NewEvents("left", numbered(*events), progress=progress)
        await database.write(add_events, [batch])
    assert await database.write(interrupt_runs, at(9)) == 1
    assert (await terminal_of(database, "left")).usage == used
    run = await database.read(find_run, "left")
    assert run is not None
    assert (run.usage, run.elapsed_ms, run.ttfb_ms) == (used, 900.25, 300.5)


async def test_a_report_that_only_others_know_is_newer_than_what_the_row_says(database: Database) -> None:
    await begin(database, "left")
    known = numbered(delta("Hello"), UsageUpdate(Usage(70, 30)))
    await database.write(add_events, [NewEvents("left", known[:1], progress=Progress(1.0, 1.0, 61))])
    await end_lost(database, known)
    assert (await terminal_of(database, "left")).usage == Usage(70, 30)


async def test_a_run_of_which_nothing_was_kept_ends_too(database: Database) -> None:
    await begin(database, "left")
    assert await database.write(interrupt_runs, at(9)) == 1
    assert [seq for seq, _ in await read_all(database, "left")] == [LAST]
    terminal = await terminal_of(database, "left")
    assert isinstance(terminal, Error)
    assert (terminal.response, terminal.usage) == ("", None)


@pytest.mark.parametrize(
    ("ended", "fields"),
    [
        ("done", {"type": "done", "response": "ok"}),
        ("stop", {"type": "stop", "reason": "requested"}),
        ("error", {"type": "error", "code": "timeout.idle"}),
    ],
)
async def test_an_end_that_did_not_reach_the_journal_is_told_by_the_row(
    ended: str, fields: dict[str, str], database: Database
) -> None:
    reason, code = ("requested", None) if ended == "stop" else (None, "timeout.idle" if ended == "error" else None)
    await have_turn(database, "ended", "question", status=ended, reason=reason, error_code=code)
    await database.write(add_events, [news("ended", delta("o"))])
    assert await database.write(interrupt_runs, at(9)) == 0
    terminal = await terminal_of(database, "ended")
    told = msgspec.to_builtins(terminal)
    assert {"type": told["chunk_type"]} | {name: told[name] for name in fields if name != "type"} == fields
    assert terminal.response == "ok"
    run = await database.read(find_run, "ended")
    assert run is not None
    assert (run.status, run.terminal_seq) == (ended, LAST)
    if isinstance(terminal, GenerationComplete):
        assert (terminal.total_steps, terminal.elapsed_ms, terminal.ttfb_ms) == (1, 120.5, 20.25)


async def test_forgotten_events_are_gone_and_no_batch_brings_them_back(database: Database) -> None:
    await begin(database, "run")
    await begin(database, "other")
    await database.write(add_events, [news("run", delta("a")), news("other", delta("b"))])
    await database.write(forget_events, "run")
    assert await database.write(add_events, [news("run", delta("c"), first=2, terminal=True)]) == 0
    assert await read_all(database, "run") == []
    assert len(await read_all(database, "other")) == 1
    run = await database.read(find_run, "run")
    assert run is not None
    assert (run.reserved_seq, run.terminal_seq) == (None, None)
    assert await database.write(interrupt_runs, at(9)) == 2


async def test_a_deleted_session_takes_its_runs_events_with_it(database: Database) -> None:
    await have_turn(database, "run", "question")
    await begin(database, "under way")
    await have_turn(database, "other", "question", session_id="other")
    for run_id, session_id in (("without memory", "session"), ("another's", "other")):
        await database.write(begin_run, SCOPE, session_id, run_id, None, at(1))
    gone, kept = ("run", "under way", "without memory"), ("other", "another's")
    await database.write(add_events, [news(run_id, delta("a")) for run_id in (*gone, *kept)])
    assert await database.write(delete_session, SCOPE, "session")
    assert [await read_all(database, run_id) for run_id in gone] == [[], [], []]
    assert [len(await read_all(database, run_id)) for run_id in kept] == [1, 1]


async def test_the_sweep_takes_old_ended_runs_in_bounded_batches(database: Database) -> None:
    for number in range(SWEPT_RUNS + 3):
        await have_turn(database, f"old-{number}", "question", second=1)
        await database.write(add_events, [news(f"old-{number}", delta("a"))])
    await have_turn(database, "new", "question", second=5)
    await begin(database, "old and under way", second=1)
    await database.write(add_events, [news("new", delta("a")), news("old and under way", delta("a"))])
    assert await database.write(sweep_events, at(5)) == SWEPT_RUNS
    assert await database.write(sweep_events, at(5)) == 3
    assert await database.write(sweep_events, at(5)) == 0
    assert await read_all(database, "old-0") == []
    assert len(await read_all(database, "new")) == len(await read_all(database, "old and under way")) == 1


async def test_a_key_stands_for_one_run_until_that_is_dropped(database: Database) -> None:
    await begin(database, "run")
    claim = KeyClaim("run", b"print", at(1))
    assert await database.read(find_claim, SCOPE, "key") is None
    assert await database.write(claim_key, SCOPE, "key", claim)
    assert not await database.write(claim_key, SCOPE, "key", KeyClaim("second", b"other", at(2)))
    assert await database.read(find_claim, SCOPE, "key") == claim
    taken = KeyClaim("second", b"other", at(2))
    assert not await database.write(claim_key, SCOPE, "key", taken, "unknown")
    await database.write(release_key, SCOPE, "key", "second")
    assert await database.read(find_claim, SCOPE, "key") == claim
    await database.write(forget_events, "run")
    assert await database.read(find_claim, SCOPE, "key") is None


async def test_a_key_whose_run_never_began_is_free_after_a_restart(database: Database) -> None:
    await begin(database, "run")
    await database.write(claim_key, SCOPE, "kept", KeyClaim("run", b"p", at(1)))
    await database.write(claim_key, SCOPE, "lost", KeyClaim("never began", b"p", at(1)))
    await database.write(interrupt_runs, at(9))
    assert await database.read(find_claim, SCOPE, "kept") is not None
    assert await database.read(find_claim, SCOPE, "lost") is None
