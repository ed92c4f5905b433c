"""``make mutate``: breaks the code in many small ways, each in a copy of its own, and shows which test notices.

First the tests run on the code as it is: one that is red without a break proves nothing, and is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec
import trio

from .mutations import ROOT, Mutation, load_mutations

COPIED = ("engine", "providers", "server", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")
TEST_SECONDS = 20
"""For one test; one that hangs has noticed."""

SECONDS = 120.0
"""For all tests of one break; then they are killed, which counts as noticed too."""

BASELINE_SECONDS = 900.0

_NOTICED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::[^\[\s]+)*(?:\[.*?\](?= - |$))?)", re.MULTILINE)


class Outcome(msgspec.Struct, frozen=True):
    """What the tests made of one break.

    Attributes:
        caught_by: the test that failed, or ``a hang``; empty if the break survived.
        invalid: the tests could not even be collected, so that the break shows nothing.
    """

    mutation: Mutation
    caught_by: str
    seconds: float
    invalid: bool = False

    def row(self) -> str:
        """As a line of the table."""
        verdict = "INVALID" if self.invalid else "caught" if self.caught_by else "SURVIVED"
        by = self.caught_by.removeprefix("tests/")
        return f"{verdict:<9} {self.seconds:5.1f} s  {self.mutation.file}: {self.mutation.name}\n{'':19}{by or '-'}"


def noticed_by(output: str) -> list[str]:
    """The ids of the tests that failed, from pytest's short summary."""
    return _NOTICED.findall(output)


def judge(mutation: Mutation, code: int | None, output: str, seconds: float) -> Outcome:
    """What pytest's exit code (None: it was killed) and its output say."""
    if code == 0:
        return Outcome(mutation, "", seconds)
    if code is None:
        return Outcome(mutation, "a hang", seconds)
    if code == 1:  # no summary: pytest-timeout has ended the process
        return Outcome(mutation, next(iter(noticed_by(output)), "a hang"), seconds)
    last_line = (output.strip() or "nothing").splitlines()[-1]
    return Outcome(mutation, f"pytest ended with {code}: {last_line}", seconds, invalid=True)


@contextmanager
def copy_of(source: Path) -> Iterator[Path]:
    """A copy of the tree, compiled files and all, which goes with the block."""
    with TemporaryDirectory(prefix="lumos-mutation-") as directory:
        tree = Path(directory)
        for name in COPIED:
            part = source / name
            (shutil.copytree if part.is_dir() else shutil.copy2)(part, tree / name)
        yield tree


async def run_tests(tree: Path, options: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Pytest's exit code and output; None for the code if it took longer than that and was killed."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]

    async def kill_all(process: trio.Process) -> None:
        os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started

    with trio.move_on_after(seconds):
        process = await trio.run_process(
            [*command, f"--timeout={TEST_SECONDS}", *options],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            start_new_session=True,
            deliver_cancel=kill_all,
        )
        return process.returncode, process.stdout.decode(errors="replace")
    return None, ""


async def find_red(tree: Path, tests: Collection[str]) -> list[str]:
    """Which tests fail as it is."""
    code, output = await run_tests(tree, sorted(tests), BASELINE_SECONDS)
    if code not in {0, 1}:
        raise click.ClickException(f"the tests do not run as they are:\n{output[-2000:]}")
    return noticed_by(output)


async def check(mutation: Mutation, snapshot: Path, red: Collection[str]) -> Outcome:
    """Break a copy and see."""
    with copy_of(snapshot) as tree:
        path = tree / mutation.file
        path.write_text(mutation.apply(path.read_text()))
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        left_out = [f"--deselect={test}" for test in red]
        begun_at = trio.current_time()
        code, output = await run_tests(tree, ["-x", *left_out, *mutation.tests], SECONDS)
        return judge(mutation, code, output, trio.current_time() - begun_at)


async def check_all(mutations: Sequence[Mutation], snapshot: Path, jobs: int) -> list[Outcome]:
    """Check them, so many at once, and tell of each as it is done."""
    red = await find_red(snapshot, {test for mutation in mutations for test in mutation.tests})
    for test in red:
        click.echo(f"red as it is, left out: {test}")
    outcomes: list[Outcome] = []
    waiting = iter(mutations)

    async def work() -> None:
        for mutation in waiting:
            outcomes.append(await check(mutation, snapshot, red))
            click.echo(outcomes[-1].row())

    async with trio.open_nursery() as nursery:
        for _ in range(jobs):
            nursery.start_soon(work)
    return outcomes


@click.command()
@click.argument("words", nargs=-1)
@click.option("--jobs", default=2, show_default=True, help="How many at once.")
def main(words: Sequence[str], jobs: int) -> None:
    """Break the code in each way whose file or name has one of the WORDS in it (all of them without any)."""
    every = load_mutations()
    mutations = [one for one in every if not words or any(word in f"{one.file}: {one.name}" for word in words)]
    with copy_of(ROOT) as snapshot:  # of one moment, though somebody may be at work in the checkout
        outcomes = trio.run(check_all, mutations, snapshot, jobs)
    bad = [outcome for outcome in outcomes if outcome.invalid or not outcome.caught_by]
    click.echo(f"{len(outcomes) - len(bad)} of {len(outcomes)} caught")
    for outcome in bad:
        click.echo(outcome.row())
    sys.exit(1 if bad or not outcomes else 0)


if __name__ == "__main__":
    main()
