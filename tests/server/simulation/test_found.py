"""Worlds that once failed, as they were made smaller; each names what was wrong."""

from __future__ import annotations

import pytest

from server.simulation.plan import AgentPlan, AnswerPlan, ClientPlan, EventPlan, Plan, ReplyPlan, StepPlan, VendorPlan
from server.simulation.run_plan import simulate

ANSWERED_AT_0 = Plan(
    seed=582,
    vendors=(VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(pieces=3, first_after=0.0, pieces_per_read=3)),)),),
)
"""The simulation's own: a request that was answered at time 0 was taken for one that is open for ever."""

CUT_IN_THE_HANDSHAKE = Plan(
    seed=883, latency=0.5, clients=(ClientPlan(manner="socket"),), events=(EventPlan(at=1.4, act="kill"),)
)
"""The simulation's own: the WebSocket client crashed when the server died before the handshake was over."""

DRIPPED_OUT = Plan(seed=291, vendors=(VendorPlan(answers=(AnswerPlan(fault="drip", where=1.0, seconds=0.01),)),))
"""The simulation's own: an answer that had dripped out was over only when the longest one would have been."""

STOPPED_WITHOUT_A_RUN = Plan(
    seed=9390,
    shared=True,
    clients=(ClientPlan(manner="batch", agents=(0, 0), steps=(StepPlan(act="delete"), StepPlan(act="stop"))),),
)
"""A batch of which one run was deleted was not stopped where it runs: Redis, which had dropped it, was asked to."""

STOPPED_ELSEWHERE_WITHOUT_A_RUN = Plan(
    seed=10371,
    workers=2,
    shared=True,
    clients=(
        ClientPlan(manner="batch", agents=(0, 0), steps=(StepPlan(act="delete"), StepPlan(act="stop_elsewhere"))),
    ),
)
"""A batch of which one run was deleted was not stopped by another worker, which had no frames of it and said 200."""

AHEAD_IN_A_BATCH = Plan(
    seed=13534,
    workers=2,
    shared=True,
    clients=(ClientPlan(manner="batch", steps=(StepPlan(act="stop"), StepPlan(act="resume_elsewhere", events=1))),),
)
"""The simulation's own: who had a batch's end before another worker heard of it was to be told that end again."""

ENDED_WITHOUT_THE_STORE = Plan(
    seed=19470,
    workers=2,
    shared=True,
    clients=(ClientPlan(at=0.2),),
    events=(EventPlan(at=0.4, act="store_away"), EventPlan(at=2.6, act="kill")),
    until=33.0,
)
"""The simulation's own: the end of a lost run has another number while the store is away."""

AHEAD_OF_ALL = Plan(
    seed=24961,
    workers=2,
    shared=True,
    vendors=(VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(pieces_per_read=4)),)),),
    clients=(ClientPlan(steps=(StepPlan(act="resume_elsewhere"), StepPlan(act="resume_from", number=10))),),
)
"""The simulation's own: who asks for what follows an event that never comes was to be told of an end."""

STOPPED_UNREAD = Plan(
    seed=27888,
    clients=(
        ClientPlan(
            at=18.0,
            manner="batch",
            read_pause=1.0,
            steps=(StepPlan(act="resume_from", after=1.4, number=1), StepPlan(act="stop")),
        ),
    ),
)
"""The simulation's own: of a batch that was stopped before its first frame was read, nobody knew the runs."""

READ_WHEN_FORGOTTEN = Plan(
    seed=29095,
    workers=2,
    shared=True,
    clients=(
        ClientPlan(manner="batch", agents=(0, 0), steps=(StepPlan(act="resume_elsewhere"), StepPlan(act="delete"))),
    ),
)
"""The simulation's own: who forgets a run forgets its batch, and who reads that at another worker is cut off."""

READ_WHEN_A_RUN_IS_TOO_OLD = Plan(
    seed=107075,
    workers=2,
    shared=True,
    retention=3.0,
    vendors=(VendorPlan(answers=(AnswerPlan(fault="refuse"), AnswerPlan(reply=ReplyPlan(seconds=5.0)))),),
    agents=(AgentPlan(retries=0),),
    clients=(
        ClientPlan(
            manner="batch",
            agents=(0, 0),
            steps=(StepPlan(act="resume_elsewhere", after=2.0), StepPlan(act="stop", after=2.0)),
        ),
    ),
)
"""Who asked for a batch of which a run is not kept any more cut off all who read it at that worker."""

CUT_ON_A_SOCKET = Plan(
    seed=103647,
    workers=2,
    shared=True,
    clients=(ClientPlan(manner="socket", steps=(StepPlan(act="resume_elsewhere"),)),),
    events=(EventPlan(at=2.0, act="shared_away"),),
)
"""The simulation's own: the WebSocket client did not hear that a run cannot be read on, and waited for more."""

AHEAD_ON_A_SOCKET = Plan(
    seed=104802,
    workers=2,
    shared=True,
    vendors=(VendorPlan(answers=(AnswerPlan(reply=ReplyPlan(pieces=5)),)),),
    clients=(
        ClientPlan(manner="socket", steps=(StepPlan(act="resume_elsewhere"), StepPlan(act="resume_from", number=11))),
    ),
)
"""The simulation's own: the same, of who asked for what follows an event that never comes."""

LEFT_IN_A_REFUSAL = Plan(
    seed=47584,
    vendors=(VendorPlan(answers=(AnswerPlan(fault="refuse"),)),),
    agents=(AgentPlan(retries=1),),
    clients=(
        ClientPlan(
            manner="whole",
            read_bytes=100,
            read_pause=1.0,
            steps=(StepPlan(act="stop_elsewhere"), StepPlan(act="leave")),
        ),
    ),
)
"""The simulation's own: a failed run's answer that was read in part was taken for a refusal."""

FOUND = {
    "answered at 0": ANSWERED_AT_0,
    "cut in the handshake": CUT_IN_THE_HANDSHAKE,
    "dripped out": DRIPPED_OUT,
    "stopped without a run": STOPPED_WITHOUT_A_RUN,
    "stopped elsewhere without a run": STOPPED_ELSEWHERE_WITHOUT_A_RUN,
    "ahead in a batch": AHEAD_IN_A_BATCH,
    "ended without the store": ENDED_WITHOUT_THE_STORE,
    "ahead of all": AHEAD_OF_ALL,
    "stopped unread": STOPPED_UNREAD,
    "cut on a socket": CUT_ON_A_SOCKET,
    "ahead on a socket": AHEAD_ON_A_SOCKET,
    "left in a refusal": LEFT_IN_A_REFUSAL,
    "read when a run is too old": READ_WHEN_A_RUN_IS_TOO_OLD,
    "read when forgotten": READ_WHEN_FORGOTTEN,
}


@pytest.mark.parametrize("plan", FOUND.values(), ids=FOUND)
def test_worlds_that_failed_go_well(plan: Plan) -> None:
    assert simulate(plan).violations == []
