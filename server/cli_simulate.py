"""``lumos simulate``: whole systems acted from seeds, on virtual time; what fails is replayed and made smaller."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_support import give_up, option

if TYPE_CHECKING:
    from .simulation.plan import Plan

_MISSING = "to simulate needs what `pip install 'lumos-stream[simulate]'` adds: there is no {}"


@click.command()
@option("--seed", type=click.IntRange(min=0), help="Act this seed's world and print its trace.")
@option("--seeds", help="Act many: 1000 for the first thousand, or A-B.")
@option("--plan", "file", type=click.Path(dir_okay=False, path_type=Path), help="Act a plan that was kept as JSON.")
@option("--show-plan", is_flag=True, help="Print the plan as JSON; without --shrink nothing is acted.")
@option("--shrink", "shrink_it", is_flag=True, help="Make a plan that fails smaller and print it as a test.")
@option(
    "--failures", default=5, show_default=True, type=click.IntRange(min=1), help="With --seeds: stop after so many."
)
@option(
    "--jobs", type=click.IntRange(min=1), help="With --seeds: over so many processes.  [default: one for each core]"
)
def simulate(
    seed: int | None,
    seeds: str | None,
    file: Path | None,
    show_plan: bool,
    shrink_it: bool,
    failures: int,
    jobs: int | None,
) -> None:
    """Simulate whole systems from seeds, with all that befalls them.

    Exits with 1 if anything was violated that is to hold in every world.
    """
    if [seed, seeds, file].count(None) != 2:
        raise click.UsageError("name one of --seed, --seeds and --plan")
    if seeds is not None and (show_plan or shrink_it):
        raise click.UsageError("--show-plan and --shrink are for one world")
    try:
        from .simulation import telling
    except ModuleNotFoundError as error:
        give_up(_MISSING.format(error.name))
    if seeds is not None:
        sys.exit(0 if telling.tell_many(_range(seeds), jobs, failures) else 1)
    plan = _plan(seed, file)
    if shrink_it:
        sys.exit(telling.tell_shrunk(plan, as_json=show_plan))
    if show_plan:
        telling.tell_plan(plan)
        return
    sys.exit(0 if telling.tell_one(plan) else 1)


def _range(text: str) -> range:
    from .simulation.seeds import seeds_of

    try:
        return seeds_of(text)
    except ValueError as error:
        raise click.BadParameter("say 1000, or 5000-5999", param_hint="--seeds") from error


def _plan(seed: int | None, file: Path | None) -> Plan:
    from msgspec import DecodeError

    from .simulation.draw import draw
    from .simulation.plan_text import plan_of_json

    if file is None:
        assert seed is not None
        return draw(seed)
    try:
        return plan_of_json(file.read_bytes())
    except OSError as error:
        give_up(f"{file}: {error.strerror or error}")
    except DecodeError as error:
        give_up(f"{file}: {error}")
