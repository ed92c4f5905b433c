"""What is still there of a world after its end, when nothing should be: one line each."""

from __future__ import annotations

from collections.abc import Iterator

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
        figures["runs to upload"] = len(life.shared.uploads._uploads)
    for what, count in figures.items():
        if count:
            yield f"{life.actor}: {count} {what}"
