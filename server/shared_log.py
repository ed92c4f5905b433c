"""Runs across workers and hosts: every worker's runs in Redis, and other workers' runs to read, stop and forget here.

Redis's streams are what is durable; what workers send each other (``inbox``) only hastens things or asks for them.
While Redis is away this worker's own runs go on from memory; ``find`` says so, and all goes on when it is back.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import trio

from engine import Run, RunSupervisor

from .batch_log import Batch
from .leases import Leases, Settle
from .redis_link import LONGEST_PAUSE_SECONDS, Command, Link, RedisAwayError, RedisLink
from .remote_log import RemoteLog, RemoteLogs
from .remote_readers import ReadElsewhere, RemoteReaders
from .run_directory import GoneError, SourceUnavailableError
from .run_uploads import RunUploads, SharedLimits
from .shared_batches import BATCH, IN_BATCH, JOIN, BatchUpload, SharedBatch
from .shared_run import SharedRun, forgotten_view, owner_of
from .shared_scripts import FORGET, SCRIPTS, events_key, inbox_key, run_key
from .worker_mail import Forget, Left, Mail, Reading, Stop, encode_mail, parse_mail

ENTRIES_AT_ONCE = 500
BLOCK_SECONDS = 5.0
STOP_SECONDS = 5.0
"""How long a stop waits for the run's end, which its worker writes."""

OPENING_SECONDS = 0.1
"""After which an unknown run is asked for once more: it may have started just now, and be on its way to Redis."""

KNOWN_SECONDS = 0.1
"""What Redis gets to hear of a new run before its id is told; it takes some milliseconds at most."""

FORGETTING_MILLISECONDS = 5000
END_SENT_SECONDS = 1.0
"""What the end of a run of this worker's that is forgotten gets to reach those who read it elsewhere."""

INBOX_LENGTH = 10_000

_XREAD = ("XREAD", "BLOCK", int(BLOCK_SECONDS * 1000), "COUNT", ENTRIES_AT_ONCE, "STREAMS")


class SharedLog:
    """What a worker shares with the others: a ``LogFollower`` of its own runs, a ``RunSource`` of theirs.

    ``run`` does the work, and ends by being cancelled; ``leave`` before that ends it in peace.
    """

    _supervisor: RunSupervisor
    _readers: RemoteReaders

    def __init__(
        self,
        url: str,
        worker_id: str,
        limits: SharedLimits | None = None,
        open_link: Callable[[str, str], Link] = RedisLink,
    ) -> None:
        """Share runs through the Redis at that URL, whether it is there now or not.

        ``open_link`` gets the URL and what the link is for; it is called once for each of the two links.

        Raises:
            ValueError: the URL is none of Redis's.
            ImportError: coredis is not there.
        """
        self._worker_id = worker_id
        self._limits = limits = limits or SharedLimits()
        self._link = open_link(url, "commands")
        self._reading_link = open_link(url, "events")
        self.worker = self._new_name()
        self.uploads = RunUploads(self._link, self.worker, limits)
        self.uploads.on_lost = self._end_lost
        self._leases = Leases(self._link, self.worker, limits)
        self._leases.on_buried = self._begin_again
        self.logs = RemoteLogs()
        self.logs.on_reading = self._note_reading
        self.logs.on_wanted = self._note_wanted
        self._link.on_changed = self._reading_link.on_changed = self._link_changed
        self._inbox_at = b"0-0"
        self._news: dict[str, tuple[str, bool]] = {}
        self._wake_up = False
        self._missing_since: dict[str, float] = {}
        self._any_news = trio.Event()
        self._ready = trio.Event()
        self.follow = self.uploads.follow
        self.appended = self.uploads.appended

    @property
    def available(self) -> bool:
        """Whether Redis is there."""
        return self._link.up and self._reading_link.up

    async def run(self, supervisor: RunSupervisor) -> None:
        """Do the work, for ever. The supervisor is that of the runs which ``follow`` hears of."""
        async with trio.open_nursery() as nursery:
            self._supervisor = supervisor
            self._readers = RemoteReaders(nursery, self._find_read_here, self.uploads, self._limits.lease)
            nursery.start_soon(self._link.run, self._work)
            nursery.start_soon(self.uploads.drop_ended)
            await self._reading_link.run(self._read)

    def settle_with(self, settle: Settle) -> None:
        """Have the ends of runs that this worker ends for dead ones kept by the store (``Leases.settle``)."""
        self._leases.settle = settle

    async def wait_available(self) -> None:
        """Until Redis is there, and knows this worker."""
        await self._ready.wait()

    async def wait_known(self, run_id: str) -> None:
        """Until the others know of this run, or batch, of this worker's: ``KNOWN_SECONDS`` at most.

        Whoever is told an id before is not told at all how the run ended if its worker dies now: nobody else has it.
        """
        if self._link.up:
            with trio.move_on_after(KNOWN_SECONDS):
                await self.uploads.wait_opened(run_id)

    async def leave(self) -> None:
        """Write what is unwritten, and sign off. Whoever calls it sets the limit, and cancels ``run`` afterwards."""
        if not self._link.up:
            return
        await self.uploads.wait_all_sent()
        with suppress(RedisAwayError):  # the others find out by the lease
            await self._leases.leave()

    # Runs of others

    async def find(self, run_id: str) -> SharedRun | None:
        """The run, if Redis knows of it, with all of its events so far.

        Raises:
            SourceUnavailableError: Redis is away.
            GoneError: it was there; it is forgotten, or Redis has lost its events.
        """
        try:
            facts = await self._ask_facts(run_id)
            if not facts or BATCH in facts:
                return None
            if facts["status"] == "forgotten":
                self.logs.drop(run_id)
                raise GoneError(forgotten_view(run_id, facts), owner_of(facts))
            run = SharedRun(run_id, facts, self.logs.get(run_id, facts["worker"]), self)
            await self._catch_up(run.log)
        except RedisAwayError as error:
            raise SourceUnavailableError(str(error)) from error
        return run

    async def find_batch(self, batch_id: str) -> SharedBatch | None:
        """The batch, if Redis knows of it, with all of its frames so far, or without a log if a run of it is gone.

        Raises:
            SourceUnavailableError: Redis is away.
        """
        try:
            facts = await self._ask_facts(batch_id)
            if BATCH not in facts:
                return None
            batch = SharedBatch(batch_id, facts, self)
            asked = await self._link.ask_all([["HGET", run_key(run.run_id), "status"] for run in batch.runs])
            statuses = {facts["status"].encode(), *asked}
            if b"forgotten" in statuses:
                self.logs.drop(batch_id)
            if statuses & {None, b"forgotten"}:  # who reads it already reads on while a run is only too old
                return batch
            batch.log = log = self.logs.get(batch_id, facts["worker"], batched=True)
            await self._catch_up(log)
        except RedisAwayError as error:
            raise SourceUnavailableError(str(error)) from error
        return batch

    def follow_batch(self, batch: Batch, runs: Sequence[Run]) -> None:
        """Let the others have this batch of these runs of this worker's."""
        self.uploads.follow_batch(BatchUpload(batch, runs))

    async def stop(self, logs: Iterable[RemoteLog], reason: str) -> None:
        """Have other workers stop these runs, or batches; returns once their ends are here, or ``STOP_SECONDS`` on.

        Raises:
            SourceUnavailableError: Redis is away: whether they stop is not known.
        """
        under_way = [log for log in logs if not log.ended]
        try:
            for log in under_way:
                await self.send(log.owner, Stop(log.run_id, reason))
            with trio.move_on_after(STOP_SECONDS):  # noqa: ASYNC912 - they may have ended
                for log in under_way:
                    await log.wait_ended()
        except (RedisAwayError, trio.BrokenResourceError) as error:
            raise SourceUnavailableError(str(error)) from error

    async def forget(self, run_id: str) -> None:
        """Drop what Redis has of the run, and of its batch; who reads the run just now still gets its end."""
        if self._link.up:
            with trio.move_on_after(END_SENT_SECONDS):
                await self.uploads.wait_sent(run_id)
        ending = self.uploads.ending(run_id)
        self.uploads.abandon(run_id)
        times = (FORGETTING_MILLISECONDS, self._limits.retention_milliseconds)
        try:
            batch_id = await self._link.ask("HGET", run_key(run_id), IN_BATCH)
            for each in (run_id,) if batch_id is None else (run_id, batch_id.decode()):
                known = msgspec.json.encode(ending if each == run_id else [])
                await self._link.ask(*FORGET.call([events_key(each), run_key(each)], *times, known))
        except RedisAwayError as error:
            raise SourceUnavailableError(str(error)) from error

    async def send(self, worker: str, mail: Mail) -> None:
        """Put it into the worker's inbox, if it has one: a worker that is gone gets none."""
        await self._link.ask(*_mail_command(worker, mail))

    async def _ask_facts(self, run_id: str) -> dict[str, str]:
        """What the run's hash says; nothing if there is none."""
        facts = await self._link.ask("HGETALL", run_key(run_id))
        if not facts:
            await trio.sleep(OPENING_SECONDS)
            facts = await self._link.ask("HGETALL", run_key(run_id))
        if not facts:
            self.logs.drop(run_id)
        return {name.decode(): text.decode() for name, text in facts.items()}

    async def _catch_up(self, log: RemoteLog) -> None:
        while not log.ended:
            entries = await self._link.ask(
                "XRANGE", events_key(log.run_id), f"({log.last_seq}-0", "+", "COUNT", ENTRIES_AT_ONCE
            )
            _admit(log, entries)
            if len(entries) < ENTRIES_AT_ONCE:
                return

    # The tasks on the two connections

    async def _work(self) -> None:
        await self._link.ask_all([["SCRIPT", "LOAD", script.text] for script in (*SCRIPTS, JOIN)])
        self._readers.forgive()
        await self._leases.beat()
        self._ready.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.uploads.work)
            nursery.start_soon(self.uploads.touch_all)
            nursery.start_soon(self._send_news)
            await self._leases.work(self._look_after_readers)

    async def _read(self) -> None:
        """Read this worker's inbox and every run that is read here, for ever."""
        while True:
            self._wake_up = False
            logs = self.logs.wanted()
            inbox = inbox_key(self.worker)
            keys = [inbox, *(events_key(log.run_id) for log in logs)]
            positions: list[str | bytes] = [self._inbox_at, *(f"{log.last_seq}-0" for log in logs)]
            command: Command = [*_XREAD, *keys, *positions]
            (answer,) = await self._reading_link.ask_all([command], seconds=2 * BLOCK_SECONDS)
            by_key = dict(zip((key.encode() for key in keys[1:]), logs, strict=True))
            for key, entries in (answer or {}).items():
                if key == inbox.encode():
                    self._take_mail(entries)
                else:
                    _admit(by_key[key], entries)

    def _take_mail(self, entries: list[Any]) -> None:
        for entry_id, (_, text) in entries:
            self._inbox_at = entry_id
            match parse_mail(text):
                case Stop(run_id, reason):
                    for each in self._runs_of(run_id):
                        each.stop(reason)
                case Forget(run_id):
                    self.uploads.abandon(run_id)
                    if run := self._supervisor.find(run_id):
                        self._supervisor.forget(run)
                case Reading(worker, run_ids):
                    self._readers.came(worker, run_ids)
                case Left(worker, run_ids):
                    self._readers.left(worker, run_ids)

    async def _send_news(self) -> None:
        """Tell other workers who reads their runs here, and this one's own reading task that there is more to read."""
        while True:
            if not (self._news or self._wake_up):
                self._any_news = trio.Event()
                await self._any_news.wait()
            news, self._news = self._news, {}
            wake_up, self._wake_up = self._wake_up, False
            commands = self._reading_mail(news)
            if wake_up:
                commands.append(["XADD", inbox_key(self.worker), "MAXLEN", "~", INBOX_LENGTH, "*", "m", ""])
            try:
                await self._link.ask_all(commands)
            except BaseException:
                self._news = news | self._news
                self._wake_up |= wake_up
                raise

    def _reading_mail(self, news: dict[str, tuple[str, bool]]) -> list[list[str | bytes | int]]:
        by_worker: dict[tuple[str, bool], list[str]] = defaultdict(list)
        for run_id, (worker, reading) in news.items():
            by_worker[worker, reading].append(run_id)
        return [
            _mail_command(worker, Reading(self.worker, run_ids) if reading else Left(self.worker, run_ids))
            for (worker, reading), run_ids in by_worker.items()
        ]

    async def _look_after_readers(self) -> None:
        """Each third of a lease: tell of readers here again, forget those elsewhere, look whether runs are there."""
        self._readers.drop_silent()
        now = trio.current_time()
        read_here = self.logs.read_here()
        facts = await self._link.ask_all([["HMGET", run_key(log.run_id), "worker", "status"] for log in read_here])
        for log, (worker, status) in zip(read_here, facts, strict=True):
            if status not in (None, b"forgotten"):
                log.owner = worker.decode()
                self._missing_since.pop(log.run_id, None)
                self._note_reading(log, True)
            elif now - self._missing_since.setdefault(log.run_id, now) > self._limits.lease + LONGEST_PAUSE_SECONDS:
                del self._missing_since[log.run_id]
                self.logs.drop(log.run_id)  # not lost in an outage: its worker would have written it again

    def _find_read_here(self, run_id: str) -> ReadElsewhere | None:
        """What others read here by that id."""
        return self._supervisor.find(run_id) or self.uploads.batch(run_id)

    def _runs_of(self, run_id: str) -> Iterable[Run]:
        """The run of that id, or the runs of the batch of that id."""
        batch = self.uploads.batch(run_id)
        run = self._supervisor.find(run_id)
        return batch.runs if batch is not None else () if run is None else (run,)

    # What happens

    def _note_reading(self, log: RemoteLog, reading: bool) -> None:
        self._news[log.run_id] = (log.owner, reading)
        self._any_news.set()

    def _note_wanted(self) -> None:
        self._wake_up = True
        self._any_news.set()

    def _link_changed(self) -> None:
        self.logs.link_changed(min(self._link.went_down_at, self._reading_link.went_down_at))

    def _begin_again(self) -> str:
        """Others have taken this worker for dead. Its runs are not its any more; new ones get a new name."""
        for run in self.uploads.lose_all():
            self._end_lost(run)
        self.worker = self.uploads.worker = self._new_name()
        self._inbox_at = b"0-0"
        self._reading_link.renew()  # it waits at the old inbox
        return self.worker

    def _end_lost(self, run: Run) -> None:
        run.fail("worker_lost", "this worker was taken for dead")
        self._supervisor.forget(run)  # how it ended is what its heir says, here too

    def _new_name(self) -> str:
        return f"{self._worker_id}.{secrets.token_urlsafe(9)}"


def _admit(log: RemoteLog, entries: list[Any]) -> None:
    for entry_id, (_, event_json) in entries:
        log.admit(int(entry_id.partition(b"-")[0]), event_json)


def _mail_command(worker: str, mail: Mail) -> list[str | bytes | int]:
    return ["XADD", inbox_key(worker), "NOMKSTREAM", "MAXLEN", "~", INBOX_LENGTH, "*", "m", encode_mail(mail)]
