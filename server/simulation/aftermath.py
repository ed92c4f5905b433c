"""What is there after a world's end: of what should be gone one line each, and what the store keeps of the runs."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from server.store.run_events import page_of_events
from server.store.schema import runs

from .observations import KeptRun
from .worker import Life
from .world import World


def what_is_left(world: World) -> list[str]:
    """Of workers that are alive their runs, places, readers and connections; of dead ones what still runs."""
    return [line for life in world.all_lives() for line in _of_life(world, life)]


def _of_life(world: World, life: Life) -> Iterator[str]:
    if not life.alive:
        if not life.over:
            yield f"{life.actor}: dead, but its tasks still run"
        return
    services, composition = life.services, life.composition
    if services is None or composition is None:
        return
    supervisor, journal = services.supervisor, composition.journal
    supervisor.find("")  # drops what is past its retention
    figures = {
        "runs under way": supervisor.active_runs,
        "runs kept": len(supervisor._ended),
        "tasks of runs": len(supervisor._nursery.child_tasks),
        "places taken": composition.admission.taken,
        "starts queued": composition.admission.queued,
        "slots of keys taken": sum(composition.gatekeeper.limiter._runs.values()),
        "turns not kept": len(composition.memories.unsaved),
        "runs in the journal": len(journal._followed) + len(journal._dirty) + len(journal._ended),
        "connections of clients": len(world.network.open_connections(world.address(life.worker)[0])),
        "requests to vendors": 0 if life.transport is None else len(life.transport._in_use),
    }
    if life.shared is not None:
        uploads = life.shared.uploads._uploads.values()  # what is complete is dropped with the next that is written
        figures["runs to upload"] = sum(1 for upload in uploads if not upload.complete)
    for what, count in figures.items():
        if count:
            yield f"{life.actor}: {count} {what}"


def what_batches_had(world: World) -> dict[str, list[str]]:
    """Of each batch the ids of its runs, by the batch's id: clients that left early were not told."""
    services = [life.services for life in world.all_lives() if life.services is not None]
    batches = [batch for each in services for batch in each.batches._batches.values()]
    return {batch.batch_id: [run.run_id for run in batch.runs] for batch in batches}


def what_is_kept(world: World) -> dict[str, KeptRun]:
    """The store's runs, by id."""
    world.store.away = False
    return world.store.direct.do(_kept_runs)


def _kept_runs(c: Connection) -> dict[str, KeptRun]:
    rows = c.execute(select(runs.c.run_id, runs.c.status, runs.c.response).order_by(runs.c.created_at, runs.c.run_id))
    kept = {run_id: KeptRun(run_id, status, response or "") for run_id, status, response in rows}
    for run_id, run in kept.items():
        while page := page_of_events(c, run_id, run.events[-1][0] if run.events else 0):
            run.events += [(seq, event.encode()) for seq, event in page]
    return kept
