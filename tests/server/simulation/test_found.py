"""Worlds that once failed, as they were made smaller; each names what was wrong."""

from __future__ import annotations

import pytest

from server.simulation.plan import AnswerPlan, ClientPlan, EventPlan, Plan, ReplyPlan, StepPlan, VendorPlan
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

FOUND = {
    "answered at 0": ANSWERED_AT_0,
    "cut in the handshake": CUT_IN_THE_HANDSHAKE,
    "dripped out": DRIPPED_OUT,
    "stopped without a run": STOPPED_WITHOUT_A_RUN,
}


@pytest.mark.parametrize("plan", FOUND.values(), ids=FOUND)
def test_worlds_that_failed_go_well(plan: Plan) -> None:
    assert simulate(plan).violations == []
