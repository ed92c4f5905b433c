"""From a plan to what became of it: the trace, what was seen, and which invariants were violated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import trio

from .determinism import Chance, run
from .invariants import check
from .observations import Observations
from .output import captured_output
from .plan import Plan
from .world import Cast, World, usual_cast


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a plan.

    Attributes:
        trace: the same bytes for the same plan.
        violations: empty for a world in which all went well.
        real_seconds: of this process's CPU.
    """

    plan: Plan
    trace: str
    violations: list[str] = field(default_factory=list)
    observations: Observations
    virtual_seconds: float = 0.0
    real_seconds: float = 0.0


def simulate(plan: Plan, cast: Cast | None = None) -> Outcome:
    """Act the plan and judge it. Whatever happens in the world becomes a violation; this raises nothing of it."""
    began = time.process_time()
    stage = _Stage(plan, cast or usual_cast())
    with captured_output() as output:
        try:
            run(stage.act, plan.seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001, ASYNC103 - outside of trio: a world that is stuck, or our bug
            stage.violations.append(f"the world broke down: {_chain(error)}")
    world = stage.world
    seen = Observations() if world is None else world.observations
    seen.output = output.getvalue()
    if world is not None:
        stage.violations += world.problems
        if not stage.violations:
            stage.violations += check(plan, seen)
    return Outcome(
        plan=plan,
        trace="" if world is None else world.trace.text(),
        violations=stage.violations,
        observations=seen,
        virtual_seconds=stage.ended_at,
        real_seconds=time.process_time() - began,
    )


class _Stage:
    """Where a world is made, once there is a clock."""

    def __init__(self, plan: Plan, cast: Cast) -> None:
        self.plan = plan
        self.cast = cast
        self.world: World | None = None
        self.violations: list[str] = []
        self.ended_at = 0.0

    async def act(self, _chance: Chance) -> None:
        """Make it, and act it."""
        self.world = world = World(self.plan, self.cast)
        try:
            await world.run()
        finally:
            self.ended_at = trio.current_time()


def _chain(error: BaseException) -> str:
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__
    return "; ".join(texts)
