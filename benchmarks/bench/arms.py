"""The arms: Lumos, the floor and the peers, each a server that can be started and asked in its own way.

    python -m benchmarks.bench.arms --smoke [NAME ...]

makes the peers' environments, has each arm stream one answer (and run one agent with two tools, where it can), and
prints a table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import click
import msgspec

from . import environments
from .launching import AGENT_PREFIX, Launch, Order, launch_litellm, launch_lumos, launch_module, python_for
from .process import START_SECONDS, ServerProcess, free_port, running


class Request(msgspec.Struct, frozen=True):
    """A POST for a running arm, but for ``Host`` and ``Content-Length``."""

    path: str
    headers: Mapping[str, str]
    body: str


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve a model's answers.

    Attributes:
        name, title: for files and for people.
        packages: whose versions tell what was measured.
        environment: the name of its environment and pins; "" for those of this checkout.
        module: of ``arm_servers``; "" for Lumos and LiteLLM, which have commands of their own.
        settings: environment variables for the module.
        path: where it answers. Of Lumos, ``{agent}`` stands for the agent's id.
        agent_path: where it runs an agent with tools and memory; "" if it does not.
        completions: whether it takes bodies of chat completions and replies with such chunks.
        ready_path: what answers 200 as soon as it serves.
        text_marker: what stands right before each piece of text in its stream, and before nothing else.
        end_marker: what stands in the last event of a whole answer.
        optional: left out unless named.
    """

    name: str
    title: str
    packages: Sequence[str]
    environment: str = ""
    module: str = ""
    settings: Mapping[str, str] = msgspec.field(default_factory=dict)
    path: str = "/chat"
    agent_path: str = ""
    completions: bool = False
    ready_path: str = "/health"
    text_marker: bytes = b'"content":"'
    end_marker: bytes = b"data: [DONE]"
    optional: bool = False

    def versions(self) -> dict[str, str]:
        """Of its packages, those first that tell most."""
        pins = environments.versions(self.environment) if self.environment else {}
        names = {name.lower().replace("_", "-"): number for name, number in pins.items()}
        return {name: names.get(name) or version(name) for name in self.packages}

    def request(
        self,
        model: str,
        message: str,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        session: str = "",
        agent: bool = False,
        leaving_cancels: bool = False,
    ) -> Request:
        """What asks that model of the upstream through the arm.

        All texts go into path and body as they are, so a caller may put marks into them that it replaces later.

        Args:
            model: one of those that the arm was started for.
            message: the user's.
            headers: those that a running server wants of its clients.
            session: whose messages are one conversation, of a user of its own; "" for none. Letters, digits, ``._:-``.
            agent: ask the agent with tools.
            leaving_cancels: have Lumos end the run as soon as the client leaves, and not after its grace of 5 s, as
                all other arms do anyway.
        """
        path = self.agent_path if agent else self.path
        body: dict[str, object] = {"message": message}
        if self.completions:
            body = {"model": model, "messages": [{"role": "user", "content": message}], "stream": True}
            body["stream_options"] = {"include_usage": True}
        elif "{agent}" in path:
            path = path.replace("{agent}", AGENT_PREFIX + model if agent else model)
            body |= {"user_id": session, "session_id": session} if session else {}
            body |= {"on_disconnect": "cancel"} if leaving_cancels else {}
        else:
            body |= {"model": model} | ({"session_id": session} if session else {})
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **headers}
        return Request(path, headers, msgspec.json.encode(body).decode())


_LUMOS_PATH = "/api/v1/agents/{agent}/chat/lumosai/stream"
_COMPLETIONS_PATH = "/v1/chat/completions"
_OPENAI_SDK = Arm(
    name="fastapi-openai",
    title="FastAPI + openai SDK",
    packages=("fastapi", "uvicorn", "openai", "httpx2"),
    environment="fastapi-openai",
    module="openai_sdk",
    agent_path="/agent",
)

ARMS = (
    Arm(
        name="lumos",
        title="Lumos",
        packages=("lumos-stream", "trio", "quart-trio", "hypercorn", "msgspec"),
        path=_LUMOS_PATH,
        agent_path=_LUMOS_PATH,
        ready_path="/health/ready",
        text_marker=b'"chunk_type":"content","content":"',
        end_marker=b'"chunk_type":"done"',
    ),
    Arm(
        name="floor",
        title="Floor (bare trio sockets)",
        packages=("trio",),
        module="floor",
        path=_COMPLETIONS_PATH,
        completions=True,
    ),
    Arm(
        name="fastapi-aiohttp",
        title="FastAPI + aiohttp relay",
        packages=("fastapi", "uvicorn", "aiohttp"),
        environment="fastapi-aiohttp",
        module="relay_aiohttp",
    ),
    Arm(
        name="fastapi-httpx",
        title="FastAPI + httpx relay",
        packages=("fastapi", "uvicorn", "httpx"),
        environment="fastapi-httpx",
        module="relay_httpx",
    ),
    _OPENAI_SDK,
    Arm(
        name="openai-agents",
        title="OpenAI Agents SDK",
        packages=("openai-agents", "openai", "fastapi", "uvicorn"),
        environment="openai-agents",
        module="openai_agents",
        agent_path="/agent",
    ),
    Arm(
        name="pydantic-ai",
        title="pydantic-ai",
        packages=("pydantic-ai-slim", "openai", "fastapi", "uvicorn"),
        environment="pydantic-ai",
        module="pydantic_agent",
        agent_path="/agent",
    ),
    Arm(
        name="litellm",
        title="LiteLLM proxy",
        packages=("litellm", "fastapi", "uvicorn", "aiohttp"),
        environment="litellm",
        path=_COMPLETIONS_PATH,
        completions=True,
        ready_path="/health/liveliness",
    ),
    msgspec.structs.replace(
        _OPENAI_SDK,
        name="fastapi-openai-aiohttp",
        title="FastAPI + openai SDK over aiohttp",
        packages=("fastapi", "uvicorn", "openai", "aiohttp"),
        settings={"HTTP_CLIENT": "aiohttp"},
        optional=True,
    ),
)
"""Ours and the floor first, then the peers, the leanest first."""


def find_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        KeyError: there is none; the text names those there are.
    """
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise KeyError(f"no arm {name!r}; there are {', '.join(arm.name for arm in ARMS)}")


class RunningArm(msgspec.Struct, frozen=True):
    """A started arm, its process, and the headers that it wants of its clients (``Arm.request``)."""

    arm: Arm
    process: ServerProcess
    headers: Mapping[str, str]


def _launch(arm: Arm, order: Order) -> Launch:
    if arm.name == "lumos":
        return launch_lumos(order)
    python = python_for(arm.environment)
    if arm.name == "litellm":
        return launch_litellm(python, order)
    return launch_module(python, arm.module, order, arm.settings)


@contextmanager
def started(
    arm: Arm,
    upstream: str,
    models: Sequence[str],
    *,
    core: int | None = None,
    first: bool = False,
    start_seconds: float = START_SECONDS,
) -> Iterator[RunningArm]:
    """The arm's server, ready, until the end of the block; a folder of its own goes with it.

    Args:
        arm: which.
        upstream: its base URL, with ``/v1``.
        models: the upstream's names that it will be asked for.
        core, first: as ``process.running`` has them.
        start_seconds: what it may take to be ready.

    Raises:
        ServerFailedError: it did not get ready.
        EnvironmentFailedError: its environment could not be made.
    """
    with tempfile.TemporaryDirectory(prefix=f"bench-{arm.name}-") as folder:
        order = Order(upstream, free_port(), tuple(models), Path(folder))
        launch = _launch(arm, order)
        run = partial(running, launch.command, launch.environment, port=order.port, ready_path=arm.ready_path)
        with run(folder=order.folder, core=core, first=first, start_seconds=start_seconds) as process:
            yield RunningArm(arm, process, launch.headers)


@click.command()
@click.option("--smoke", is_flag=True, help="Start each arm and have it stream one answer.")
@click.argument("names", nargs=-1)
def main(smoke: bool, names: tuple[str, ...]) -> None:
    """List the arms, or try them."""
    try:
        arms = [find_arm(name) for name in names] or list(ARMS)
    except KeyError as error:
        raise click.UsageError(error.args[0]) from error
    if not smoke:
        for arm in arms:
            print(f"{arm.name:24} {arm.title}{' (optional)' if arm.optional else ''}")
        return
    from .smoke import smoke_table  # noqa: PLC0415 - it imports this module

    sys.exit(0 if smoke_table(arms) else 1)


if __name__ == "__main__":
    main()
