"""What a batch sends is what the API's description says of it."""

from __future__ import annotations

from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from trio.testing import MockClock

from engine import Error
from server.routes import description
from tests.engine.scripted import text
from tests.harness.world import open_keeping_world
from tests.server.batch_scene import ask, speaking, two, whole_batch


def _check(frame: Any) -> None:
    document = description(True)
    route = document["paths"]["/api/v1/batch/{batch_id}/events"]["get"]["responses"]["200"]["content"]
    frame_schema = route["text/event-stream"]["schema"]["properties"]["data"]["contentSchema"]
    schema = frame_schema | {"components": document["components"]}
    jsonschema.validate(frame, schema, jsonschema.Draft202012Validator)


async def test_every_frame_of_a_batch_fits_its_schema(autojump_clock: MockClock) -> None:
    async with open_keeping_world() as world:
        two(world)
        world.add_agent("broken", speaking((1, text("x")), (2, ValueError("a bug"))))
        reader = await whole_batch(world, ask("left", "nobody", "right", "broken"))
        kinds = {frame["chunk_type"] for frame in reader.frames}
        assert kinds >= {
            "batch_start",
            "batch_error",
            "batch_done",
            "start",
            "content",
            "step_complete",
            "done",
            "error",
        }
        for frame in reader.frames:
            _check(frame)


def test_its_own_end_fits_and_what_is_nobodys_does_not() -> None:
    _check(msgspec.to_builtins(Error("worker_lost", "the worker of this batch is gone")))
    lonely = {"chunk_type": "content", "content": "whose?", "step_id": "step-1"}
    _check(lonely | {"run_id": "a"})
    for wrong in (lonely, {"chunk_type": "batch_done"}, {"chunk_type": "error", "code": "internal", "content": ""}):
        with pytest.raises(jsonschema.ValidationError):
            _check(wrong)
