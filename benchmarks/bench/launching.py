"""How each arm is started: its command, its environment, and the headers that its requests need."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from . import environments
from .environments import ROOT

UPSTREAM_KEY = "sk-bench"
MOST_RUNS = 5_000
"""That Lumos takes at once: more than any workload opens."""

AGENT_PREFIX = "agent-"
"""Of the id of the Lumos agent that has tools, before the model's name."""

ABSENT = Path(__file__).with_name("absent")
"""What a checkout for development has and an installed Lumos has not."""

_KEY_VARIABLE = "BENCH_UPSTREAM_KEY"
_KEY = re.compile(r"lumos_[A-Za-z0-9]+_[A-Za-z0-9_-]{43}")
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TMPDIR")

_AGENT = """
[[agent]]
id = "{agent_id}"
system = ""
{tools}
[agent.llm_config]
provider = "openai_compatible"
model = "{model}"
base_url = "{upstream}"
api_key_env = "{variable}"
"""


class Order(msgspec.Struct, frozen=True):
    """What a server is to be started for.

    Attributes:
        upstream: its base URL, with ``/v1``.
        port: where the server is to listen.
        models: the upstream's names that will be asked for.
        folder: the server's own, empty.
    """

    upstream: str
    port: int
    models: Sequence[str]
    folder: Path


class Launch(msgspec.Struct, frozen=True):
    """A command, all of its environment, and the headers that the server wants of its clients."""

    command: Sequence[str]
    environment: Mapping[str, str]
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)


def launch_module(python: Path, module: str, order: Order, more: Mapping[str, str]) -> Launch:
    """One of ``arm_servers``."""
    environment = {"UPSTREAM": order.upstream, "PORT": str(order.port), "PYTHONPATH": str(ROOT), **more}
    command = [str(python), "-m", f"{__package__}.arm_servers.{module}"]
    return Launch(command, _environment(order.folder, environment))


def launch_lumos(order: Order) -> Launch:
    """Lumos whole: a database in a file, an API key, history and journal. For each model an agent, and one with tools.

    Raises:
        RuntimeError: no key could be made.
    """
    lumos = str(Path(sysconfig.get_path("scripts")) / "lumos")
    path = os.pathsep.join([str(ROOT), str(ABSENT)])
    environment = _environment(order.folder, {_KEY_VARIABLE: UPSTREAM_KEY, "PYTHONPATH": path})
    agents = order.folder / "agents.toml"
    agents.write_text("".join(_agents(model, order.upstream) for model in order.models))
    database = f"sqlite:///{order.folder / 'lumos.db'}"
    key = [lumos, "keys", "create", "--database-url", database, "--tenant", "bench", "--user", "bench", "--admin"]
    made = subprocess.run(key, env=environment, capture_output=True, text=True, check=False, cwd=order.folder)
    found = _KEY.search(made.stdout)
    if not found:
        raise RuntimeError(f"lumos keys create made no key: {made.stderr or made.stdout}")
    command = [lumos, "serve", "--port", str(order.port), "--agents", str(agents), "--database-url", database]
    command += ["--max-runs", str(MOST_RUNS), "--queue", str(MOST_RUNS), "--drain", "0"]
    return Launch(command, environment, {"Authorization": f"Bearer {found[0]}"})


def launch_litellm(python: Path, order: Order) -> Launch:
    """LiteLLM's proxy, as its production page has it, without a database. Nothing is fetched at its start."""
    models = [
        {
            "model_name": model,
            "litellm_params": {"model": f"openai/{model}", "api_base": order.upstream, "api_key": UPSTREAM_KEY},
        }
        for model in order.models
    ]
    settings = {"request_timeout": 600, "set_verbose": False, "json_logs": True, "telemetry": False}
    config = order.folder / "config.yaml"  # JSON is YAML
    config.write_bytes(msgspec.json.encode({"model_list": models, "litellm_settings": settings}))
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
    command += ["--port", str(order.port), "--num_workers", "1", "--telemetry", "False"]
    key = f"sk-{secrets.token_hex(32)}"  # without one it does not start
    more = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = _environment(order.folder, {**more, "LITELLM_MASTER_KEY": key})
    return Launch(command, environment, {"Authorization": f"Bearer {key}"})


def python_for(environment: str) -> Path:
    """The interpreter of a peer's environment; "" names our own."""
    return environments.make(environment) if environment else Path(sysconfig.get_path("scripts")) / "python"


def _agents(model: str, upstream: str) -> str:
    values = {"model": model, "upstream": upstream, "variable": _KEY_VARIABLE}
    chat = _AGENT.format(agent_id=model, tools="", **values)
    return chat + _AGENT.format(agent_id=AGENT_PREFIX + model, tools='tools = ["calculator", "current_time"]', **values)


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Little of ours, so that neither proxies nor keys nor settings reach a server; its home is its folder."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "HOME": str(folder), "NO_PROXY": "*", "no_proxy": "*", **more}
