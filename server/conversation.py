"""``lumos chat``: a conversation in the terminal, with an agent in this process or with one on a running server."""

from __future__ import annotations

import os
from pathlib import Path

import click
import httpx
import trio

from engine import BasicAgent, Message, StreamingAgent
from providers.http import open_client

from .agents import BUILT_IN_AGENTS, build_agent, read_agents_file
from .remote import remote_run
from .terminal import StreamSummary, show_stream, show_summary


class UnknownAgentError(ValueError):
    """No agent of that id is built in or declared."""


def converse(agent_id: str, agents_file: Path | None, url: str | None, message: str | None) -> bool:
    """Answer one message, or without one ask for messages until the input ends. False if the last answer failed.

    Ctrl-C during an answer stops that run; at the prompt it ends the conversation.
    """
    turns: list[Message] = []
    if message is not None:
        return _answer(agent_id, agents_file, url, turns, message)
    answered = True
    while True:
        try:
            message = click.prompt(click.style("you", bold=True), prompt_suffix="> ", err=True)
        except click.Abort:
            click.echo(err=True)
            return answered
        answered = _answer(agent_id, agents_file, url, turns, message)


def _answer(agent_id: str, agents_file: Path | None, url: str | None, turns: list[Message], message: str) -> bool:
    turns.append(Message("user", message))
    try:
        if url is None:
            summary = trio.run(_answer_here, agent_id, agents_file, turns)
        else:
            summary = trio.run(_answer_there, url, agent_id, message)
    except KeyboardInterrupt:
        click.secho("\nstopped", fg="yellow", err=True)
        turns.pop()
        return False
    show_summary(summary)
    if summary.failed:
        turns.pop()
    else:
        turns.append(Message("assistant", summary.response))
    return not summary.failed


async def _answer_here(agent_id: str, agents_file: Path | None, turns: list[Message]) -> StreamSummary:
    async with open_client() as client:
        agent = _find_agent(agent_id, agents_file, client)
        started_at = trio.current_time()
        async with StreamingAgent.with_config(agent, agent.streaming).execute_streaming(turns) as events:
            return await show_stream(events, started_at)


async def _answer_there(url: str, agent_id: str, message: str) -> StreamSummary:
    async with open_client() as client:
        started_at = trio.current_time()
        body = {"message": message, "on_disconnect": "cancel"}
        async with remote_run(client, url, agent_id, body) as events:
            return await show_stream(events, started_at)


def _find_agent(agent_id: str, agents_file: Path | None, client: httpx.AsyncClient) -> BasicAgent:
    declared = read_agents_file(agents_file) if agents_file else []
    records = {record.id: record for record in (*BUILT_IN_AGENTS, *declared)}
    if agent_id not in records:
        raise UnknownAgentError(f"there is no agent {agent_id!r}; there are: {', '.join(records)}")
    return build_agent(records[agent_id], os.environ, client)
