"""Clients that go in every phase leave nothing, in short; ``python -m benchmarks.cancels`` does it 10,000 times."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks.cancels import PHASES, main, measure, percentile


async def test_clients_that_go_at_random_moments_leave_nothing() -> None:
    report = await measure(clients=150, at_once=5, seed=7)
    assert (report.left_runs, report.left_upstream, report.left_tasks, report.left_descriptors) == (0, 0, 0, 0)
    assert report.went == dict.fromkeys(PHASES, 30)
    assert sum(report.reached.values()) > 0
    for phase in PHASES:
        assert all(0 <= value < 5000 for value in report.milliseconds[phase]), phase


def test_percentiles_are_of_the_values() -> None:
    values = [float(number) for number in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 99.0)


def test_the_command_prints_a_row_for_each_phase() -> None:
    result = CliRunner().invoke(main, ["--count", "10", "--at-once", "5"])
    assert result.exit_code == 0, result.output
    assert [phase for phase in PHASES if f"| {phase} | 2 |" in result.output] == list(PHASES)
    assert "Left behind: 0 runs, 0 upstream connections, 0 tasks, 0 descriptors." in result.output
