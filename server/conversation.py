"""``lumos chat``: a conversation in the terminal, with an agent in this process or with one on a running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import click
import httpx

from engine import BasicAgent, Message, StreamingAgent
from providers.http import open_client

from .agents import find_record, read_agents_file
from .factory import build_agent
from .remote import RemoteError, remote_run
from .terminal import Opening, show_answer, show_summary

PROMPT = "you> "

Ask: TypeAlias = Callable[[list[Message]], Opening]
"""How the partner of a conversation is asked: with all turns so far, the last one the user's."""


async def converse(
    agent_id: str, agents_file: Path | None, url: str | None, message: str | None, api_key: str | None = None
) -> bool:
    """Answer one message, or without one ask for messages until the input ends. False if the last answer failed.

    ``api_key`` is what the server at ``url`` asks for, if it does.
    Ctrl-C during an answer stops that run; at the prompt it ends the conversation.

    Raises:
        AgentsFileError, UnknownAgentError, ProviderConfigError: there is no such agent, or it cannot be made.
        NetworkConfigError: the environment names no usable proxy or certificates.
        RemoteError: the one message could not be sent, or its answer broke off.
    """
    async with open_client(environment=os.environ) as client:
        if url is None:
            record = find_record(agent_id, read_agents_file(agents_file) if agents_file else [])
            ask = _ask_here(build_agent(record, os.environ, client))
        else:
            ask = _ask_there(client, url, agent_id, api_key)
        if message is None:
            _greet(agent_id, url)
            return await _talk(ask)
        summary = await show_answer(ask([Message("user", message)]))
        show_summary(summary)
        return not summary.failed


def _ask_here(agent: BasicAgent) -> Ask:
    return StreamingAgent.with_config(agent, agent.streaming).execute_streaming


def _ask_there(client: httpx.AsyncClient, url: str, agent_id: str, api_key: str | None) -> Ask:
    def ask(turns: list[Message]) -> Opening:
        body = {"message": turns[-1].content, "on_disconnect": "cancel"}
        return remote_run(client, url, agent_id, body, api_key=api_key)

    return ask


async def _talk(ask: Ask) -> bool:
    turns: list[Message] = []
    answered = True
    while (message := _next_message()) is not None:
        try:
            answered = await _take_turn(ask, turns, message)
        except RemoteError as error:
            click.secho(f"lumos: {error}", fg="red", err=True)
            answered = False
    return answered


async def _take_turn(ask: Ask, turns: list[Message], message: str) -> bool:
    """One message and its answer; what was said of it stays in the conversation, also if it was stopped or failed."""
    asked = Message("user", message)
    summary = await show_answer(ask([*turns, asked]))
    show_summary(summary)
    if summary.response:
        turns += asked, Message("assistant", summary.response)
    return summary.interrupted or not summary.failed


def _greet(agent_id: str, url: str | None) -> None:
    if sys.stdin.isatty():
        where = "" if url is None else f" at {url} (each message stands alone there)"
        click.secho(f"{agent_id}{where}. Ctrl-C stops an answer, Ctrl-D ends the chat.", dim=True, err=True)


def _next_message() -> str | None:
    """The next message that is not blank; None when the input ends, or after Ctrl-C.

    Blocks, and so does everything else: nothing goes on while a person types, and only the main thread can be
    interrupted while it waits for input.
    """
    try:
        while not (message := _read_line().strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            click.echo(err=True)
        return None
    return message


def _read_line() -> str:
    if not sys.stdin.isatty():
        return input()
    if not sys.stdout.isatty():
        click.echo(PROMPT, nl=False, err=True)
        return input()
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - makes input() edit lines, where Python has it
    return input(PROMPT)
