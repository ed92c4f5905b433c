"""Schemathesis reads the API's description over HTTP and asks the server what can be asked by it, and what cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, given, settings
from quart_trio import QuartTrio
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from engine import BasicAgent, RunSupervisor
from engine.trace import InMemoryTraces
from providers.http import open_client
from server.app import Services, create_app
from server.auth import Gatekeeper
from server.directory import AgentDirectory
from server.factory import AgentFactory
from server.guard import RequestGuard
from server.keys import make_key
from server.principal import KeyLimits
from server.routes import ROUTES
from server.routing import Route
from server.share_links import ShareLinks
from server.store import keys as key_rows
from server.store.database import Database
from server.tool_registry import ToolRegistry
from tests.engine.scripted import ScriptedProvider, text
from tests.harness.background import served
from tests.server.api_scene import HELPER

NOW = "2026-11-22T12:00:00+00:00"
EXAMPLES = {"without keys": 2, "as a user": 4}
"""Of each trial. The requests are the same for both: what only one of them could answer wrongly is little."""


@dataclass(frozen=True)
class Server:
    """A real one on loopback over a SQLite file, with one of everything, and the headers of who has it.

    Its description is read once: Schemathesis keeps with it what it needs to make requests up.
    """

    url: str
    headers: dict[str, str]
    ids: dict[str, str]
    api: Any
    examples: int


def _app(nursery: trio.Nursery, database: Database) -> QuartTrio:
    """Everything real but the models: they answer at once."""
    tools, traces, gatekeeper = ToolRegistry(), InMemoryTraces(), Gatekeeper(database)
    quick = BasicAgent(agent_id="quick", provider=ScriptedProvider((0, text("hello")), (0, text(" there"))), model="m")
    services = Services(
        {"quick": quick},
        RunSupervisor(nursery),
        directory=AgentDirectory([HELPER], database),
        factory=AgentFactory(database, {}, open_client(), tools, traces=traces),
        database=database,
        gatekeeper=gatekeeper,
        share_links=ShareLinks(),
        guard=RequestGuard(gatekeeper.is_keyed),
        tools=tools,
        traces=traces,
    )
    return create_app(services)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("schemathesis")
    database = Database.open(f"sqlite:///{folder / 'lumos.db'}")
    headers = {}
    if request.param != "without keys":
        key, key_text = make_key("acme", "ada", False, "", KeyLimits(), NOW)
        trio.run(database.write, key_rows.create_key, key)
        headers = {"Authorization": f"Bearer {key_text}"}
    with served(lambda nursery: _app(nursery, database)) as url:
        api = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
        refusing = api.config.checks.negative_data_rejection
        refusing.expected_statuses = [*refusing.expected_statuses, "413"]  # what breaks a length may be over 1 MiB
        yield Server(url, headers, _make_things(url, headers), api, EXAMPLES[request.param])
    database.close()


def _make_things(url: str, headers: dict[str, str]) -> dict[str, str]:
    """One of everything, so that requests find what they name."""
    agent = f"{url}/api/v1/agents/helper"
    with httpx.Client(headers=headers) as client:
        run = client.post(f"{agent.replace('helper', 'quick')}/chat/lumosai", json={"message": "hi"}).json()["data"]
        memory = client.post(f"{agent}/memories", json={"text": "she likes tea"}).json()["data"]
        share = client.post(f"{url}/api/v1/runs/{run['run_id']}/share", json={}).json()["data"]
        batch = {"requests": [{"agent_id": "quick", "message": "hi"}]}
        batch_id = client.post(f"{url}/api/v1/batch/stream", json=batch).headers["X-Batch-Id"]
    return {
        "agent_id": "helper",
        "run_id": run["run_id"],
        "memory_id": memory["id"],
        "session_id": "default",
        "token": share["token"],
        "batch_id": batch_id,
    }


@dataclass(frozen=True)
class Trial:
    """Which requests to make up for a route: that fit its description, or not; for things that are there, or not."""

    name: str
    mode: GenerationMode
    known: bool

    def __str__(self) -> str:
        fitting = "" if self.mode is GenerationMode.POSITIVE else "-broken"
        return f"{self.name}{'' if self.known else '-of-nothing'}{fitting}"


def _trials(route: Route) -> Iterator[Trial]:
    for known in (True, False) if route.path_ids else (True,):
        yield Trial(route.name, GenerationMode.POSITIVE, known)
        if not known or route.body is not None or route.query is not None:  # else there is nothing to break
            yield Trial(route.name, GenerationMode.NEGATIVE, known)


def _pairs() -> Iterator[tuple[str, Trial]]:
    """Which server is asked what. What is not there is not there for anybody: one of them is asked for it."""
    for name in EXAMPLES:
        trials = [trial for route in ROUTES for trial in _trials(route)]
        yield from ((name, trial) for trial in trials if trial.known or name == "as a user")


@pytest.mark.parametrize(("server", "trial"), list(_pairs()), indirect=["server"], ids=str)
def test_the_server_keeps_to_its_description(server: Server, trial: Trial) -> None:
    for operation in server.api.include(operation_id=trial.name).get_all_operations():
        assert isinstance(operation, Ok)
        _try_out(operation.ok(), server, trial)


def _try_out(operation: Any, server: Server, trial: Trial) -> None:
    names = {parameter.name for parameter in operation.path_parameters} if trial.known else ()
    strategy = operation.as_strategy(trial.mode, path_parameters={name: server.ids[name] for name in names})
    # What fits the description can still be refused: a provider or a tool that is not there, a blank message.
    excluded = [schemathesis.checks.positive_data_acceptance]

    # The same requests each time: what is new is found by raising EXAMPLES, not by CI on somebody else's change.
    @settings(
        max_examples=server.examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        case.call_and_validate(headers=server.headers, excluded_checks=excluded)

    ask()
