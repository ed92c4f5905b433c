"""The list of deliberate breaks cannot rot: each still applies to the code as it is. ``make mutate`` runs them."""

from __future__ import annotations

import pytest

from tests.mutation.mutations import ROOT, Mutation, load_mutations
from tests.mutation.run import judge, noticed_by

MUTATIONS = load_mutations()
ONE = Mutation(
    name="a break", file="engine/log.py", old="seq = ", new="seq = 1 + ", tests=("tests/engine/test_log.py",)
)

SUMMARY = """\
..F
=========================== short test summary info ============================
FAILED tests/engine/test_log.py::test_one[a - b] - AssertionError: assert 1 == 2
ERROR tests/engine/test_log.py::test_two
!!!!!!!!!!!!!!!!!!!!!!!!!! stopping after 1 failures !!!!!!!!!!!!!!!!!!!!!!!!!!!
1 failed, 2 passed in 0.10s
"""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_it_still_applies(mutation: Mutation) -> None:
    mutation.apply((ROOT / mutation.file).read_text())
    assert mutation.tests
    assert [test for test in mutation.tests if not (ROOT / test.partition("::")[0]).is_file()] == []


def test_there_are_enough_of_them_each_named_once() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert sum(mutation.file.startswith("engine/") for mutation in MUTATIONS) >= 40
    assert sum(not mutation.file.startswith("engine/") for mutation in MUTATIONS) >= 12


@pytest.mark.parametrize(
    ("text", "refused"),
    [("", "0 times"), ("seq = 1\nseq = 2\n", "2 times"), ("if seq = 1", "invalid syntax")],
)
def test_one_that_does_not_apply_is_refused(text: str, refused: str) -> None:
    with pytest.raises((ValueError, SyntaxError), match=refused):
        ONE.apply(text)


def test_the_summary_tells_who_noticed() -> None:
    assert noticed_by(SUMMARY) == ["tests/engine/test_log.py::test_one[a - b]", "tests/engine/test_log.py::test_two"]


@pytest.mark.parametrize(
    ("code", "caught_by", "invalid"),
    [
        (0, "", False),
        (1, "tests/engine/test_log.py::test_one[a - b]", False),
        (None, "a hang", False),
        (2, "pytest ended with 2: 1 failed, 2 passed in 0.10s", True),
    ],
)
def test_only_a_test_that_ran_and_failed_or_hung_has_caught_a_break(
    code: int | None, caught_by: str, invalid: bool
) -> None:
    outcome = judge(ONE, code, SUMMARY, 1.0)
    assert (outcome.caught_by, outcome.invalid) == (caught_by, invalid)


def test_a_process_that_ended_without_a_summary_hung() -> None:
    assert judge(ONE, 1, "+++ Timeout +++", 1.0).caught_by == "a hang"
