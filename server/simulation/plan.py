"""What happens in a simulated world, as data: drawn from a seed, made smaller by shrinking, pasted into a test.

Times are virtual seconds. ``world`` builds it; ``vendors``, ``tools`` and ``clients`` act it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

Alphabet: TypeAlias = Literal["ascii", "cjk", "emoji", "markup", "json"]
"""``markup`` has what breaks naive SSE (line ends of all kinds, ``data:``, U+2028), ``json`` quotes and escapes."""

Wire: TypeAlias = Literal["openai", "anthropic", "gemini"]

UpstreamFault: TypeAlias = Literal[
    "refuse",  # nobody listens
    "black_hole",  # connecting never ends
    "no_headers",  # the request is read, nothing comes
    "close_before_headers",
    "close_in_headers",
    "cut",  # FIN after ``where`` of the body's bytes
    "reset",  # RST there
    "stall",  # silence of ``seconds`` there, then on
    "stall_for_ever",
    "pings_only",  # keep-alives of the vendor's kind from there, for ever, every ``seconds``
    "drip",  # one byte every ``seconds`` from there; behind 2,000 of them the rest at once
    "no_end_mark",  # the body ends cleanly without the vendor's end
    "error_event",  # the vendor's overloaded error in the stream, there
    "status_400",
    "status_401",
    "status_429",  # Retry-After: ``seconds``
    "status_500",
    "status_503",
    "status_529",
    "not_sse",  # 200 with HTML
    "bad_json",  # one event is not JSON, there
    "bad_utf8",
    "endless_line",  # an event that never ends
    "more_after_end",  # bytes behind the end mark
    "compressed",  # gzip although identity was asked for
]

ToolManner: TypeAlias = Literal[
    "returns",
    "slow",  # after ``seconds``
    "hangs",
    "raises",
    "raises_group",
    "raises_base",  # a BaseException of its own
    "swallows_cancel",  # goes on for ``seconds`` after it was cancelled
    "fails_in_cleanup",
    "returns_much",  # 10 MB
    "returns_cycle",
    "returns_nan",
]

ClientManner: TypeAlias = Literal["stream", "whole", "batch", "socket", "hostile"]

ClientAct: TypeAlias = Literal[
    "leave",  # close the connection in peace
    "reset",  # RST
    "half_close",  # FIN in the direction of the server alone
    "pause",  # read nothing for ``seconds``
    "stop",  # POST stop on a connection of its own
    "stop_elsewhere",  # the same at another worker
    "resume",  # read on after the last id that came (closes what is open)
    "resume_elsewhere",
    "resume_from",  # after number ``number``
    "resume_forged",  # with an id of the future, of another run, or garbage: ``number`` chooses
    "second_reader",  # read all of it again beside
    "post_again",  # the same POST, same Idempotency-Key
    "state",  # GET the run
    "delete",
]

WorldAct: TypeAlias = Literal[
    "kill",  # worker ``number`` dies at once, as by kill -9
    "start",  # it is there again
    "sigterm",
    "sigterm_twice",
    "shared_away",  # the shared log cannot be reached
    "shared_back",
    "shared_forgets",  # it comes back without its last second
    "store_away",
    "store_back",
    "burst",  # ``number`` more clients that stream, all at once
]


class ReplyPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model says.

    Attributes:
        recording: the name of a packaged recording; empty for the fields below.
        seconds: from the first piece to the last one.
        first_after: from the request to the first piece.
        pieces_per_read: how many pieces come at once.
        tools: names of the tools that it calls, with valid arguments, after its text.
        splits: seed of where the bytes of the stream are cut into reads; 0 for whole events.
    """

    recording: str = ""
    characters: int = 100
    pieces: int = 20
    alphabet: Alphabet = "ascii"
    first_after: float = 0.5
    seconds: float = 2.0
    pieces_per_read: int = 1
    reasoning: bool = False
    tools: tuple[str, ...] = ()
    splits: int = 0


class AnswerPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request to a model server is answered.

    Attributes:
        where: 0 to 1 of the body's bytes.
        close_delimited: whether the body ends with the connection, and not in chunks.
    """

    reply: ReplyPlan = ReplyPlan()
    fault: UpstreamFault | None = None
    where: float = 0.5
    seconds: float = 1.0
    close_delimited: bool = False


class VendorPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model server: its n-th request gets the n-th answer, all further ones the last."""

    wire: Wire = "openai"
    answers: tuple[AnswerPlan, ...] = (AnswerPlan(),)


class ToolPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool of the world."""

    name: str
    manner: ToolManner = "returns"
    seconds: float = 1.0


class DeadlinePlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's deadlines."""

    total: float = 120.0
    connect: float = 10.0
    first_token: float = 30.0
    idle: float = 30.0
    tool: float = 30.0


class AgentPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An agent: vendors in the order of failover, by number; tools by name."""

    vendors: tuple[int, ...] = (0,)
    retries: int = 2
    tools: tuple[str, ...] = ()
    memory: bool = False
    max_steps: int = 4
    deadlines: DeadlinePlan = DeadlinePlan()


class StepPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client does once so many events came or so much time went by since its last step, whichever is first."""

    act: ClientAct
    events: int = 1_000_000
    after: float = 1.0
    seconds: float = 1.0
    number: int = 0


class ClientPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A client: begins at a time, at a worker, and takes its steps in order, then reads to the end.

    Attributes:
        agents: of which agent it asks; several for a batch or a socket.
        user: whose; users of the world have keys of their own (0 is without keys where the world has none).
        read_bytes: how much it takes from its connection at once.
        read_pause: how long it waits between two reads.
        window: how much its connection holds unread.
    """

    at: float = 0.0
    manner: ClientManner = "stream"
    worker: int = 0
    agents: tuple[int, ...] = (0,)
    user: int = 0
    session: int = 0
    message: str = "hello"
    on_disconnect: Literal["cancel", "grace", "continue"] = "grace"
    idempotent: bool = False
    read_bytes: int = 65_536
    read_pause: float = 0.0
    window: int = 65_536
    steps: tuple[StepPlan, ...] = ()


class EventPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What befalls the world at a time."""

    at: float
    act: WorldAct
    number: int = 0


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A world. ``seed`` is that of everything that the plan leaves open: scheduling, ids, jitter.

    Attributes:
        shared: whether the workers share a log; needed for more than one.
        keyed: whether users need keys.
        until: how long the world goes on at least: past every retention, so that all is gone at the end.
    """

    seed: int
    workers: int = 1
    shared: bool = False
    keyed: bool = False
    resume_grace: float = 5.0
    retention: float = 60.0
    drain: float = 30.0
    max_runs: int = 8
    queue: int = 4
    queue_seconds: float = 2.0
    lease: float = 10.0
    latency: float = 0.0
    vendors: tuple[VendorPlan, ...] = (VendorPlan(),)
    tools: tuple[ToolPlan, ...] = ()
    agents: tuple[AgentPlan, ...] = (AgentPlan(),)
    clients: tuple[ClientPlan, ...] = (ClientPlan(),)
    events: tuple[EventPlan, ...] = ()
    until: float = 300.0
