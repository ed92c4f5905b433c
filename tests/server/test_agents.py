"""Agents from a file: what may be in it, what is refused and how that is told, and what becomes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args

import httpx
import msgspec
import pytest

from engine import BasicAgent, Deadlines, GenerationComplete, StreamingConfig
from engine.provider import Message
from providers.http import open_client
from providers.recording import load
from providers.registry import ModelConfig
from server.agents import (
    BUILT_IN_AGENTS,
    AgentsFileError,
    UnknownAgentError,
    find_record,
    read_agents_file,
    read_whole_agents_file,
)
from server.factory import build_agent
from server.mcp_tools import McpServerConfig
from server.records import AgentRecord, MemorySettings, WorkingMemorySettings
from server.testing.memory_network import MemoryNetwork
from tests.server.commands import write_agents

BUILT_IN = [record.id for record in BUILT_IN_AGENTS]
NEW_USER = {"name": "", "preferences": []}
EXAMPLE = Path(__file__).parents[2] / "docs" / "agents.toml"

FULL = """
[[agent]]
id = "full"
name = "Everything said"
description = "More"
system = "Be brief."
tools = ["calculator"]
max_steps = 3
max_tool_calls = 7
metadata = { team = "x" }

[agent.llm_config]
provider = "openai_compatible"
model = "m"
base_url = "http://localhost:1234/v1"
api_key_env = "LOCAL_KEY"
temperature = 0.5
max_tokens = 100

[agent.deadlines]
total = 60
connect = 1.5
first_token = 20
idle = 10
tool = 5

[agent.stream]
text_buffer_size = 10
flush_after = 0.1
emit_metadata = true
emit_memory_updates = true
text_delta_delay_ms = 20

[agent.memory]
context_window = 4
recall_limit = 2
wait = 0.5
embeddings = { provider = "ollama" }

[agent.working_memory]
template = { name = "" }
max_bytes = 100
"""
SERVER = '[[mcp_server]]\nname = "files"\ncommand = "serve-files"\n'
LEAST = '[[agent]]\nid = "least"\nllm_config = { provider = "replay", model = "gpt4o-short" }\n'


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(MemoryNetwork().connect) as client:
        yield client


def read(directory: Path, text: str) -> list[AgentRecord]:
    return read_agents_file(write_agents(directory, text))


def build_agents(
    records: list[AgentRecord], environment: Mapping[str, str], client: httpx.AsyncClient
) -> dict[str, BasicAgent]:
    """The built-in agents and these, by id."""
    return {record.id: build_agent(record, environment, client) for record in (*BUILT_IN_AGENTS, *records)}


def refusal(directory: Path, text: str) -> str:
    """What is said of a file that cannot be used, behind the file's name."""
    path = write_agents(directory, text)
    with pytest.raises(AgentsFileError) as raised:
        read_agents_file(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ")
    return said.removeprefix(f"{path}: ")


class TestReading:
    def test_every_field(self, tmp_path: Path) -> None:
        (record,) = read(tmp_path, FULL)
        assert record == AgentRecord(
            id="full",
            name="Everything said",
            description="More",
            system="Be brief.",
            tools=("calculator",),
            max_steps=3,
            max_tool_calls=7,
            metadata={"team": "x"},
            memory=MemorySettings(
                context_window=4, recall_limit=2, wait=0.5, embeddings=ModelConfig(provider="ollama")
            ),
            working_memory=WorkingMemorySettings(template={"name": ""}, max_bytes=100),
            llm_config=ModelConfig(
                provider="openai_compatible",
                model="m",
                base_url="http://localhost:1234/v1",
                api_key_env="LOCAL_KEY",
                temperature=0.5,
                max_tokens=100,
            ),
            deadlines=Deadlines(total=60, connect=1.5, first_token=20, idle=10, tool=5),
            stream=StreamingConfig(
                text_buffer_size=10,
                flush_after=0.1,
                emit_metadata=True,
                emit_memory_updates=True,
                text_delta_delay_ms=20,
            ),
        )

    def test_what_is_left_out_has_its_default(self, tmp_path: Path) -> None:
        (record,) = read(tmp_path, LEAST)
        assert (record.name, record.system) == ("", "You are a helpful assistant.")
        assert (record.deadlines, record.stream) == (Deadlines(), StreamingConfig())

    def test_several_agents_in_their_order(self, tmp_path: Path) -> None:
        assert [record.id for record in read(tmp_path, LEAST + FULL)] == ["least", "full"]

    def test_mcp_servers(self, tmp_path: Path) -> None:
        whole = read_whole_agents_file(write_agents(tmp_path, SERVER + LEAST))
        assert whole.mcp_server == [McpServerConfig(name="files", command="serve-files")]
        assert [record.id for record in whole.agent] == ["least"]

    def test_an_agent_and_a_server_may_have_one_name(self, tmp_path: Path) -> None:
        assert len(read(tmp_path, SERVER + LEAST.replace("least", "files"))) == 1

    def test_an_empty_file_declares_none(self, tmp_path: Path) -> None:
        assert read(tmp_path, "") == []

    @pytest.mark.parametrize("agent_id", ["a", "7", "gpt-4o.mini_2:latest", "x" * 100])
    def test_ids(self, tmp_path: Path, agent_id: str) -> None:
        assert read(tmp_path, LEAST.replace("least", agent_id))[0].id == agent_id


class TestRefusing:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[[agent", "end of document"),
            ('title = "x"', "unknown field `title`"),
            ("agent = 1", "Expected `array`, got `int` - at `$.agent`"),
            ("[[agent]]", "missing required field `id` - at `$.agent[0]`"),
            ('[[agent]]\nid = "a"', "missing required field `llm_config`"),
            ('[[agent]]\nid = "a"\nllm_config = {}', "missing required field `provider`"),
            (LEAST + 'colour = "red"', "unknown field `colour` - at `$.agent[0]`"),
            (LEAST.replace(" }", ', api_key = "sk-1" }'), "unknown field `api_key` - at `$.agent[0].llm_config`"),
            (LEAST + "[agent.deadlines]\nsum = 1", "unknown field `sum` - at `$.agent[0].deadlines`"),
            (LEAST + "[agent.stream]\nsize = 1", "unknown field `size` - at `$.agent[0].stream`"),
            (LEAST + LEAST, "agent 'least' is declared twice"),
            (LEAST + "[agent.memory]\nsize = 1", "unknown field `size` - at `$.agent[0].memory`"),
            (LEAST + "[agent.memory]\nwait = 11", "`float` <= 10.0 - at `$.agent[0].memory.wait`"),
            (LEAST + "[agent.memory]\ncontext_window = -1", "$.agent[0].memory.context_window"),
            (
                LEAST + "[agent.working_memory]\nmax_bytes = 20\ntemplate = { a = '語語語語語' }",
                "the template is 23 bytes of JSON, over its max_bytes of 20 - at `$.agent[0].working_memory`",
            ),
            (
                LEAST + "memory = { enabled = false }\nworking_memory = {}",
                "an agent whose memory is not enabled has no working_memory - at `$.agent[0]`",
            ),
            (LEAST + "max_steps = 0", "$.agent[0].max_steps"),
            ('[[mcp_server]]\nname = "files"', "MCP server 'files': give either a command or a url"),
            (SERVER + SERVER, "MCP server 'files' is declared twice"),
        ],
    )
    def test_another_shape(self, tmp_path: Path, text: str, said: str) -> None:
        assert said in refusal(tmp_path, text)

    @pytest.mark.parametrize("agent_id", ["", " ", "a b", "a/b", "a?b", "é", "-a", ".", "x" * 101, "a\\n"])
    def test_ids_that_no_url_could_name(self, tmp_path: Path, agent_id: str) -> None:
        said = refusal(tmp_path, LEAST.replace("least", agent_id))
        assert said.startswith("the id ")
        assert said.endswith(" - at `$.agent[0]`")

    @pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "true", '"30"'])
    @pytest.mark.parametrize("deadline", ["total", "connect", "first_token", "idle", "tool"])
    def test_deadlines_that_are_none(self, tmp_path: Path, deadline: str, seconds: str) -> None:
        assert "$.agent[0].deadlines" in refusal(tmp_path, LEAST + f"[agent.deadlines]\n{deadline} = {seconds}")

    @pytest.mark.parametrize("setting", ["text_buffer_size = 0", "flush_after = -1", "text_delta_delay_ms = nan"])
    def test_streaming_that_cannot_be(self, tmp_path: Path, setting: str) -> None:
        assert "$.agent[0].stream" in refusal(tmp_path, LEAST + f"[agent.stream]\n{setting}")

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "agents.toml"
        path.write_bytes(b"\xff")
        with pytest.raises(AgentsFileError, match="utf-8"):
            read_agents_file(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(AgentsFileError, match=r"agents\.toml: No such file or directory"):
            read_agents_file(tmp_path / "agents.toml")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(AgentsFileError, match="Is a directory"):
            read_agents_file(tmp_path)


class TestBuilding:
    async def test_a_record_becomes_an_agent(self, tmp_path: Path, client: httpx.AsyncClient) -> None:
        (record,) = read(tmp_path, FULL)
        agent = build_agents([record], {"LOCAL_KEY": "sk-1"}, client)["full"]
        spec = agent.run_spec("Hello")
        assert spec.agent_id == "full"
        assert spec.provider.name == "openai_compatible"
        assert spec.request.messages == (Message("system", "Be brief."), Message("user", "Hello"))
        assert (spec.request.model, spec.request.temperature, spec.request.max_tokens) == ("m", 0.5, 100)
        assert (spec.deadlines, spec.streaming) == (record.deadlines, record.stream)
        assert agent.name == "Everything said"

    async def test_the_built_in_agents_are_there_without_a_file(self, client: httpx.AsyncClient) -> None:
        assert list(build_agents([], {}, client)) == BUILT_IN

    async def test_a_record_takes_the_place_of_a_built_in_agent(
        self, tmp_path: Path, client: httpx.AsyncClient
    ) -> None:
        agents = build_agents(read(tmp_path, LEAST.replace("least", "demo")), {}, client)
        assert list(agents) == BUILT_IN
        assert agents["demo"].model == "gpt4o-short"

    @pytest.mark.parametrize(
        ("llm_config", "named"),
        [
            ('{ provider = "nobody" }', "unknown provider 'nobody'"),
            ('{ provider = "openai" }', "OPENAI_API_KEY"),
            ('{ provider = "openai", api_key_env = "MY_KEY" }', "MY_KEY"),
            ('{ provider = "openai_compatible", base_url = "http://x" }', "model"),
            ('{ provider = "openai_compatible", model = "m" }', "base_url"),
            ('{ provider = "openai_compatible", model = "m", base_url = "x" }', "base_url"),
            ('{ provider = "replay", model = "nope" }', "nope"),
        ],
    )
    async def test_a_provider_that_cannot_be_made_names_the_agent_and_what_is_missing(
        self, tmp_path: Path, client: httpx.AsyncClient, llm_config: str, named: str
    ) -> None:
        records = read(tmp_path, f'[[agent]]\nid = "a"\nllm_config = {llm_config}')
        with pytest.raises(AgentsFileError) as raised:
            build_agents(records, {"MY_KEY": "  "}, client)
        said = str(raised.value)
        assert said.startswith("agent 'a': ")
        assert named in said

    async def test_a_key_is_in_no_repr_and_no_error(self, tmp_path: Path, client: httpx.AsyncClient) -> None:
        records = read(tmp_path, FULL)
        assert "hidden" not in repr(build_agents(records, {"LOCAL_KEY": "sk-hidden"}, client))
        with pytest.raises(AgentsFileError) as raised:
            build_agents(records, {"LOCAL_KEY": "sk-hi\ndden"}, client)
        assert "dden" not in str(raised.value)


class TestFinding:
    def test_built_in_and_declared(self, tmp_path: Path) -> None:
        declared = read(tmp_path, LEAST)
        assert find_record("demo", declared) is BUILT_IN_AGENTS[0]
        assert find_record("least", declared) is declared[0]

    def test_a_declared_one_wins(self, tmp_path: Path) -> None:
        declared = read(tmp_path, LEAST.replace("least", "demo"))
        assert find_record("demo", declared) is declared[0]

    def test_one_that_is_not_there(self) -> None:
        with pytest.raises(UnknownAgentError, match=f"there is no agent 'x'; there are: {', '.join(BUILT_IN)}"):
            find_record("x", [])


class TestTheExample:
    """``docs/agents.toml`` is what people start from."""

    @asynccontextmanager
    async def agents(self) -> AsyncIterator[dict[str, BasicAgent]]:
        async with open_client(MemoryNetwork().connect) as client:
            keys = {"OPENAI_API_KEY": "sk-fake", "ANTHROPIC_API_KEY": "sk-fake"}
            yield build_agents(read_agents_file(EXAMPLE), keys, client)

    async def test_it_loads(self) -> None:
        async with self.agents() as agents:
            names = {agent_id: agent.run_spec("Hi").provider.name for agent_id, agent in agents.items()}
        assert names == {
            **dict.fromkeys(BUILT_IN, "replay"),
            "assistant": "openai",
            "local": "openai_compatible",
            "steady": "anthropic+ollama",
            "rehearsal": "replay",
        }

    async def test_what_it_says_are_the_defaults_are_the_defaults(self) -> None:
        async with self.agents() as agents:
            assert agents["assistant"].deadlines == Deadlines()
            assert agents["assistant"].streaming == StreamingConfig()
            assert read_agents_file(EXAMPLE)[0].memory == MemorySettings()
            assert read_agents_file(EXAMPLE)[0].working_memory == WorkingMemorySettings(template=NEW_USER)
            assert agents["local"].deadlines == msgspec.structs.replace(Deadlines(), first_token=110)

    async def test_its_replay_answers(self, autojump_clock: object) -> None:
        async with self.agents() as agents:
            answer = await agents["rehearsal"].generate("Why?")
        assert isinstance(answer, GenerationComplete)
        assert answer.response == load("gpt4o-short").text

    def test_what_is_commented_out_could_be_said(self, tmp_path: Path) -> None:
        lines = [uncommented(line) for line in EXAMPLE.read_text().splitlines()]
        assert lines != EXAMPLE.read_text().splitlines()
        whole = read_whole_agents_file(write_agents(tmp_path, "\n".join(lines)))
        assistant, local, *_ = whole.agent
        assert assistant.llm_config.api_key_env == "OPENAI_API_KEY"
        assert assistant.stream.text_delta_delay_ms == 20
        assert local.llm_config.api_key_env == "LOCAL_KEY"
        assert assistant.memory.embeddings == ModelConfig(provider="openai", model="text-embedding-3-small")
        assert [server.name for server in whole.mcp_server] == ["files", "tickets"]

    def test_it_names_every_field(self) -> None:
        named = EXAMPLE.read_text()
        fields = [*fields_of(AgentRecord), *fields_of(ModelConfig), *fields_of(McpServerConfig)]
        assert [field for field in fields if f"{field} = " not in named and field != "llm_config"] == []


def uncommented(line: str) -> str:
    """The line without a ``#`` in front of a setting or a table."""
    setting = line.removeprefix("# ")
    return setting if setting.partition(" = ")[0].isidentifier() or setting == "[[mcp_server]]" else line


def fields_of(record: type[msgspec.Struct]) -> Iterator[str]:
    """Names of the struct's fields, those of a struct in it instead of its own."""
    for field in msgspec.structs.fields(record):
        inner = [kind for kind in (field.type, *get_args(field.type)) if is_struct(kind)]
        if inner and inner[0] is not ModelConfig:
            yield from fields_of(inner[0])
        else:
            yield field.name


def is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
