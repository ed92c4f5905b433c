"""From records to agents: what is built, what is shared, what is refused; and who finds which agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from engine import Emit, FinishPiece, Message, ModelRequest, RunOptions, TextPiece
from engine.builtin_tools import BUILT_IN_TOOLS
from engine.memory import MemoryRefusedError, MemoryUse, Owner
from engine.tools import Tool
from engine.trace import InMemoryTraces
from providers.failover import FailoverProvider
from providers.http import open_client
from providers.recording import load
from providers.registry import ModelConfig
from server.agents import BUILT_IN_AGENTS
from server.directory import AgentDirectory, may_change
from server.factory import AgentConfigError, AgentFactory
from server.memory import StoredMemory
from server.principal import LOCAL_USER, Principal
from server.records import AgentRecord, MemorySettings, WorkingMemorySettings
from server.store import agents, turns
from server.store.database import Database
from server.store.rows import StoredAgent
from server.testing.memory_network import MemoryNetwork
from server.tool_registry import ToolNameError, ToolRegistry, UnknownToolError
from tests.harness.raw_vendor import RawVendor
from tests.harness.vendor import Act
from tests.server.memory_scene import turn

NOW = "2026-11-22T00:00:00.000000+00:00"
OPENAI = ModelConfig(provider="openai", temperature=0.5, max_tokens=100)
REPLAY = ModelConfig(provider="replay", model="gpt4o-short")
KEYS = {"OPENAI_API_KEY": "sk-hidden", "ANTHROPIC_API_KEY": "sk-hidden"}
ANN = Principal(tenant_id="acme", user_id="ann", key_id="k")
BOB = Principal(tenant_id="acme", user_id="bob", key_id="k")
ADMIN = Principal(tenant_id="acme", user_id="root", key_id="k", admin=True)
RIVAL = Principal(tenant_id="rival", user_id="ann", key_id="k", admin=True)


def record(agent_id: str = "a", llm_config: ModelConfig = REPLAY, **fields: Any) -> AgentRecord:
    return AgentRecord(id=agent_id, llm_config=llm_config, **fields)


def stored(agent: AgentRecord, tenant_id: str = "acme", user_id: str | None = None, revision: int = 1) -> StoredAgent:
    return StoredAgent(
        record=agent, tenant_id=tenant_id, user_id=user_id, revision=revision, created_at=NOW, updated_at=NOW
    )


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(MemoryNetwork().connect) as client:
        yield client


@pytest.fixture
def inline() -> Iterator[Database]:
    database = Database.open("sqlite://", inline=True)
    yield database
    database.close()


@pytest.fixture
def factory(inline: Database, client: httpx.AsyncClient) -> AgentFactory:
    return AgentFactory(inline, KEYS, client, ToolRegistry())


def use_of(agent: Any, session_id: str = "s") -> MemoryUse:
    use = agent.run_spec("Hi", RunOptions(session_id=session_id)).memory_use
    assert isinstance(use, MemoryUse)
    return use


def memory_of(agent: Any, session_id: str = "s") -> StoredMemory:
    memory = use_of(agent, session_id).memory
    assert isinstance(memory, StoredMemory)
    return memory


def tools_of(agent: Any) -> list[str]:
    return [tool.spec.name for tool in agent.tool_use.tools]


class TestBuilding:
    async def test_every_field_of_the_record_counts(self, factory: AgentFactory) -> None:
        settings = MemorySettings(context_window=4, recall_limit=2, wait=0.5)
        whole = record(
            llm_config=OPENAI, name="A", system="Be brief.", max_steps=3, max_tool_calls=7, tools=("calculator",),
            memory=settings,
        )  # fmt: skip
        agent = factory.create_chat_agent(whole, "ann")
        spec = agent.run_spec("Hello", RunOptions(session_id="s"))
        assert (agent.name, spec.agent_id, spec.provider.name) == ("A", "a", "openai")
        assert spec.request.messages == (Message("system", "Be brief."), Message("user", "Hello"))
        assert (spec.request.model, spec.request.temperature, spec.request.max_tokens) == ("gpt-4o-mini", 0.5, 100)
        assert (tools_of(agent), agent.tool_use.max_steps, agent.tool_use.max_tool_calls) == (["calculator"], 3, 7)
        assert (use_of(agent).context_window, use_of(agent).recall_limit, use_of(agent).wait) == (4, 2, 0.5)
        assert spec.owner == Owner(tenant_id="local", user_id="ann", session_id="s")

    async def test_a_stored_agents_users_are_its_tenants(self, factory: AgentFactory) -> None:
        agent = factory.create_chat_agent(stored(record()), "ann")
        assert agent.owner == Owner(tenant_id="acme", user_id="ann")
        assert factory.create_chat_agent(stored(record()), "ann", "acme").owner == agent.owner

    async def test_another_tenants_agent_is_not_built(self, factory: AgentFactory) -> None:
        with pytest.raises(ValueError, match="another tenant's"):
            factory.create_chat_agent(stored(record()), "ann", "rival")

    async def test_the_old_name_does_the_same(self, factory: AgentFactory) -> None:
        agent = factory.create_chat_agent_arc(record(), "ann")
        again = factory.create_chat_agent(record(), "ann")
        assert (agent.provider, agent.owner) == (again.provider, again.owner)

    async def test_a_replay_answers_and_is_remembered(self, factory: AgentFactory, autojump_clock: MockClock) -> None:
        agent = factory.create_chat_agent(record(), "ann")
        answer = await agent.generate("Why?", RunOptions(session_id="s"))
        assert answer.response == load("gpt4o-short").text
        history = await memory_of(agent).history(10)
        assert history == [Message("user", "Why?"), Message("assistant", answer.response)]

    async def test_fallbacks_make_a_chain(self, factory: AgentFactory) -> None:
        chain = ModelConfig(provider="openai", fallbacks=(ModelConfig(provider="anthropic"),))
        provider = factory.create_chat_agent(record(llm_config=chain), "ann").provider
        assert isinstance(provider, FailoverProvider)
        assert provider.name == "openai+anthropic"

    async def test_traces_hear_of_its_runs(self, inline: Database, client: httpx.AsyncClient) -> None:
        traces = InMemoryTraces()
        factory = AgentFactory(inline, KEYS, client, ToolRegistry(), traces=traces)
        assert factory.create_chat_agent(record(), "ann").trace is traces

    async def test_without_a_database_there_is_no_memory(self, client: httpx.AsyncClient) -> None:
        factory = AgentFactory(None, KEYS, client, ToolRegistry())
        agent = factory.create_chat_agent(record(working_memory=WorkingMemorySettings()), "ann")
        assert (factory.memories, agent.memories, tools_of(agent)) == (None, None, [])

    async def test_a_memory_that_is_off(self, factory: AgentFactory) -> None:
        agent = factory.create_chat_agent(record(memory=MemorySettings(enabled=False)), "ann")
        assert agent.memories is None


class TestTools:
    async def test_a_working_memory_brings_its_tool(self, factory: AgentFactory) -> None:
        agent = factory.create_chat_agent(record(tools=("remember",), working_memory=WorkingMemorySettings()), "ann")
        assert tools_of(agent) == ["remember", "update_working_memory"]

    async def test_and_only_once(self, factory: AgentFactory) -> None:
        named = record(tools=("update_working_memory", "calculator"), working_memory=WorkingMemorySettings())
        assert tools_of(factory.create_chat_agent(named, "ann")) == ["update_working_memory", "calculator"]

    async def test_other_memory_tools_are_asked_for(self, factory: AgentFactory) -> None:
        assert tools_of(factory.create_chat_agent(record(), "ann")) == []

    async def test_those_of_a_source_are_looked_up_each_time(self, inline: Database, client: httpx.AsyncClient) -> None:
        class Files:
            def __init__(self) -> None:
                self.there: dict[str, Tool] = {}

            def tools(self) -> dict[str, Tool]:
                return self.there

        files = Files()
        factory = AgentFactory(inline, KEYS, client, ToolRegistry({"files": files}))
        named = record(tools=("files.*",))
        first = factory.create_chat_agent(named, "ann")
        files.there = {"count": BUILT_IN_TOOLS["calculator"]}
        second = factory.create_chat_agent(named, "ann")
        assert (tools_of(first), tools_of(second)) == ([], ["files_count"])
        assert first.provider is second.provider
        files.there = {}
        with pytest.raises(AgentConfigError, match=r"agent 'a': there is no tool 'files\.count'"):
            factory.create_chat_agent(record(tools=("files.count",)), "ann")


class TestRefusing:
    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"llm_config": ModelConfig(provider="nobody")}, "unknown provider 'nobody'"),
            ({"llm_config": ModelConfig(provider="mistral")}, "MISTRAL_API_KEY"),
            ({"llm_config": ModelConfig(provider="replay", model="nope")}, "no recording is named 'nope'"),
            ({"tools": ("colour",)}, "there is no tool 'colour'; there are: calculator"),
            ({"tools": ("files.*",)}, "there is no source 'files'"),
            (
                {"tools": ("forget", "remember"), "memory": MemorySettings(enabled=False)},
                "its memory is not enabled, so it has no use for forget, remember",
            ),
            ({"tools": ("update_working_memory",)}, "of no use without a working_memory"),
            (
                {"memory": MemorySettings(embeddings=ModelConfig(provider="anthropic"))},
                "'anthropic' gives no embeddings",
            ),
            ({"memory": MemorySettings(embeddings=ModelConfig(provider="mistral"))}, "MISTRAL_API_KEY"),
        ],
    )
    async def test_what_cannot_be_had_is_said_with_the_agents_name(
        self, factory: AgentFactory, fields: dict[str, Any], said: str
    ) -> None:
        for attempt in (factory.check, lambda broken: factory.create_chat_agent(broken, "ann")):
            with pytest.raises(AgentConfigError) as raised:
                attempt(record(**fields))
            assert str(raised.value).startswith("agent 'a': ")
            assert said in str(raised.value)
            assert "sk-hidden" not in str(raised.value)

    @pytest.mark.parametrize("error", [UnknownToolError("x", ["y"]), ToolNameError("two are called x")])
    async def test_whatever_a_source_of_tools_says(self, client: httpx.AsyncClient, error: Exception) -> None:
        class Refusing:
            def find(self, names: Sequence[str]) -> tuple[Tool, ...]:
                raise error

        with pytest.raises(AgentConfigError, match=r"agent 'a': .*x"):
            AgentFactory(None, KEYS, client, Refusing()).check(record())

    async def test_it_is_asked_again_when_the_reason_may_be_gone(
        self, inline: Database, client: httpx.AsyncClient
    ) -> None:
        environment: dict[str, str] = {}
        factory = AgentFactory(inline, environment, client, ToolRegistry())
        with pytest.raises(AgentConfigError):
            factory.create_chat_agent(record(llm_config=OPENAI), "ann")
        environment["OPENAI_API_KEY"] = "sk-hidden"
        assert factory.create_chat_agent(record(llm_config=OPENAI), "ann").provider.name == "openai"


class TestCache:
    """A provider's breaker must outlive the request that opened it, and go with the record."""

    async def test_users_of_a_record_share_its_provider(self, factory: AgentFactory) -> None:
        ann = factory.create_chat_agent(record(llm_config=OPENAI), "ann")
        bob = factory.create_chat_agent(record(llm_config=OPENAI), "bob", "acme")
        assert ann.provider is bob.provider
        assert (ann.owner.user_id, bob.owner.user_id) == ("ann", "bob")

    async def test_until_the_record_changes(self, factory: AgentFactory) -> None:
        first = factory.create_chat_agent(stored(record(system="One.")), "ann")
        same = factory.create_chat_agent(stored(record(system="One."), revision=2), "ann")
        changed = factory.create_chat_agent(stored(record(system="Two.")), "ann")
        assert first.provider is same.provider
        assert first.provider is not changed.provider
        assert changed.instructions == "Two."

    async def test_two_tenants_share_nothing(self, factory: AgentFactory) -> None:
        agents = [
            factory.create_chat_agent(stored(record(), "acme"), "ann"),
            factory.create_chat_agent(stored(record(), "rival"), "ann"),
            factory.create_chat_agent(record(), "ann"),
        ]
        assert len({id(agent.provider) for agent in agents}) == 3

    async def test_the_one_used_least_lately_goes(self, inline: Database, client: httpx.AsyncClient) -> None:
        factory = AgentFactory(inline, KEYS, client, ToolRegistry(), capacity=2)

        def provider_of(agent_id: str) -> object:
            return factory.create_chat_agent(record(agent_id), "ann").provider

        a, b = provider_of("a"), provider_of("b")
        assert provider_of("a") is a
        provider_of("c")
        assert provider_of("a") is a
        assert provider_of("b") is not b

    async def test_a_provider_that_was_dropped_answers_its_last_run(
        self, inline: Database, client: httpx.AsyncClient, autojump_clock: MockClock
    ) -> None:
        factory = AgentFactory(inline, KEYS, client, ToolRegistry(), capacity=1)
        agent = factory.create_chat_agent(record("a"), "ann")
        factory.create_chat_agent(record("b"), "ann")
        assert (await agent.generate("Why?")).response == load("gpt4o-short").text

    async def test_checking_keeps_nothing(self, factory: AgentFactory) -> None:
        provider = factory.create_chat_agent(record(system="One."), "ann").provider
        factory.check(record(system="Two."))
        assert factory.create_chat_agent(record(system="One."), "ann").provider is provider


class TestMemories:
    SETTINGS = WorkingMemorySettings(template={"name": ""})

    async def say(self, agent: Any, text: str, session_id: str = "s") -> None:
        memory = memory_of(agent, session_id)
        run_id = f"{agent.owner.tenant_id} {agent.owner.user_id} {text}"
        await memory.begin_turn(run_id, Message("user", text))
        await memory.save_turn(turn(run_id))

    async def test_two_users_of_one_agent_see_nothing_of_each_other(
        self, database: Database, client: httpx.AsyncClient
    ) -> None:
        factory = AgentFactory(database, KEYS, client, ToolRegistry())
        shared = record(working_memory=self.SETTINGS)
        ann = factory.create_chat_agent(shared, "ann", "acme")
        others = [factory.create_chat_agent(shared, *owner) for owner in (("bob", "acme"), ("ann", "rival"))]
        others.append(factory.create_chat_agent(record("b", working_memory=self.SETTINGS), "ann", "acme"))
        await self.say(ann, "My dog is called Rex")
        fact = await memory_of(ann).remember("The dog is old")
        await memory_of(ann).patch_working_memory({"name": "Ann"})
        for other in others:
            memory = memory_of(other)
            assert await memory.history(10) == []
            assert await memory_of(other, "t").recall("dog", 5) == await memory.search("dog", 5) == ()
            assert await memory.working_memory() == {"name": ""}
            assert await memory.forget(fact.id) is False
        assert len(await memory_of(ann, "t").recall("dog", 5)) == 2
        assert await memory_of(ann).working_memory() == {"name": "Ann"}

    async def test_a_vendor_of_vectors_that_hangs_costs_part_of_the_wait(
        self, inline: Database, autojump_clock: MockClock
    ) -> None:
        network, asked = MemoryNetwork(), []

        class Model:
            name = "model"

            async def stream(self, request: ModelRequest, emit: Emit) -> None:
                asked.append((trio.current_time(), request.messages))
                emit([TextPiece("Rex."), FinishPiece("stop")])

            async def aclose(self) -> None:
                pass

        ollama = ModelConfig(provider="ollama", base_url="http://vendor")
        async with open_client(network.connect) as client, trio.open_nursery() as nursery:
            hanging: list[Act] = ["hang"]
            RawVendor(*[hanging] * 10).start(nursery, network.listen("vendor", 80))
            factory = AgentFactory(inline, KEYS, client, ToolRegistry())
            assert factory.memories is not None
            nursery.start_soon(factory.memories.backlog.work)
            built = factory.create_chat_agent(record(system="", memory=MemorySettings(embeddings=ollama)), "ann")
            agent = msgspec.structs.replace(built, provider=Model())
            await agent.generate("My dog is called Rex", RunOptions(session_id="monday"))
            started = trio.current_time()
            await agent.generate("What is my dog called?", RunOptions(session_id="tuesday"))
            nursery.cancel_scope.cancel()
        asked_at, messages = asked[1]
        assert asked_at - started == pytest.approx(0.15)
        assert trio.current_time() == asked_at
        assert messages[0].content.endswith(") My dog is called Rex")

    async def test_an_agent_without_a_working_memory(self, factory: AgentFactory) -> None:
        with pytest.raises(MemoryRefusedError):
            await memory_of(factory.create_chat_agent(record(), "ann")).patch_working_memory({})

    async def test_runs_count_for_the_key(self, factory: AgentFactory, inline: Database) -> None:
        agent = factory.create_chat_agent(record(), "ann", "acme", key_id="k1")
        await memory_of(agent).begin_turn("r", Message("user", "Hi"))
        run = await inline.read(turns.find_run, "r")
        assert run is not None
        assert (run.key_id, run.tenant_id, run.user_id, run.agent_id, run.session_id) == ("k1", "acme", "ann", "a", "s")

    async def test_users_share_the_embeddings_client(self, factory: AgentFactory) -> None:
        settings = MemorySettings(embeddings=ModelConfig(provider="ollama"))
        ann, bob = (memory_of(factory.create_chat_agent(record(memory=settings), user)) for user in ("ann", "bob"))
        assert ann._meaning is not None
        assert ann._meaning is bob._meaning


class TestDirectory:
    @pytest.fixture
    async def directory(self, database: Database) -> AgentDirectory:
        for tenant_id, user_id, agent_id in (
            ("acme", None, "team"),
            ("acme", "ann", "anns"),
            ("acme", "bob", "bobs"),
            ("acme", None, "file"),
            ("rival", None, "theirs"),
        ):
            await database.write(agents.create_agent, tenant_id, user_id, record(agent_id), NOW)
        return AgentDirectory([record("file")], database)

    async def found(self, directory: AgentDirectory, principal: Principal) -> set[str]:
        ids = ("demo", "file", "team", "anns", "bobs", "theirs", "none")
        return {agent_id for agent_id in ids if await directory.find(principal, agent_id) is not None}

    async def test_who_finds_which(self, directory: AgentDirectory) -> None:
        assert await self.found(directory, ANN) == {"demo", "file", "team", "anns"}
        assert await self.found(directory, BOB) == {"demo", "file", "team", "bobs"}
        assert await self.found(directory, ADMIN) == {"demo", "file", "team", "anns", "bobs"}
        assert await self.found(directory, RIVAL) == {"demo", "file", "theirs"}
        assert await self.found(directory, LOCAL_USER) == {"demo", "file"}

    async def test_the_operators_agent_wins(self, directory: AgentDirectory) -> None:
        assert isinstance(await directory.find(ANN, "file"), AgentRecord)
        assert isinstance(await directory.find(ANN, "team"), StoredAgent)
        assert directory.is_operators("demo")
        assert not directory.is_operators("team")

    @pytest.mark.parametrize(
        ("principal", "theirs"),
        [
            (ANN, ["anns", "team"]),
            (ADMIN, ["anns", "bobs", "team"]),
            (RIVAL, ["theirs"]),
        ],
    )
    async def test_pages_are_of_one_list(
        self, directory: AgentDirectory, principal: Principal, theirs: list[str]
    ) -> None:
        whole = [*(agent.id for agent in BUILT_IN_AGENTS), "file", *theirs]
        for limit in range(1, len(whole) + 2):
            for offset in range(len(whole) + 2):
                page, count = await directory.list(principal, limit, offset)
                ids = [agent.id if isinstance(agent, AgentRecord) else agent.record.id for agent in page]
                assert (ids, count) == (whole[offset : offset + limit], len(whole))

    async def test_a_file_takes_a_built_ins_place(self) -> None:
        own = record("demo")
        directory = AgentDirectory([own], None)
        assert await directory.find(LOCAL_USER, "demo") is own
        assert [agent.id for agent in directory.operators()] == [agent.id for agent in BUILT_IN_AGENTS]

    async def test_without_a_database(self) -> None:
        directory = AgentDirectory([record("file")], None)
        assert await directory.find(ANN, "team") is None
        page, count = await directory.list(ANN, 1, len(BUILT_IN_AGENTS))
        assert (page, count) == ((record("file"),), len(BUILT_IN_AGENTS) + 1)

    def test_who_may_change_which(self) -> None:
        team, anns = stored(record()), stored(record(), user_id="ann")
        assert [may_change(who, team) for who in (ANN, BOB, ADMIN, RIVAL)] == [False, False, True, False]
        assert [may_change(who, anns) for who in (ANN, BOB, ADMIN, RIVAL)] == [True, False, True, False]


def test_records_are_compared_whole() -> None:
    assert record() == record()
    assert record() != msgspec.structs.replace(record(), metadata={"a": 1})
