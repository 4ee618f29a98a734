"""Which outcome is the last straw."""

from __future__ import annotations

import pytest

from qengine import StopConditions, TaskStatus
from qengine.core.stops import StopRule

S, F, SKIPPED = TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.SKIPPED


def stopped_after(stop: StopConditions, *statuses: TaskStatus) -> tuple[int, str | None]:
    """How many results were counted until one was the last straw, and why it was."""
    rule = StopRule(stop)
    for count, status in enumerate(statuses, start=1):
        if reason := rule.after(status):
            return count, reason
    return len(statuses), None


@pytest.mark.parametrize(("statuses", "after"), [
    ([F, S, S, S, S, S], (6, None)),                # a fifth, a sixth: below the half
    ([F, S, S, F, S, S], (4, "failure_rate")),      # two of four
    ([F, F, F, S, S, S], (4, "failure_rate")),      # not before there are four
    ([F, F, SKIPPED, SKIPPED, S, S], (6, "failure_rate")),
])
def test_a_share_of_failures_is_that_of_all_outcomes_so_far(
    statuses: list[TaskStatus], after: tuple[int, str | None]
) -> None:
    assert stopped_after(StopConditions(failure_rate=0.5, min_outcomes=4), *statuses) == after


def test_the_nth_failure_and_the_nth_result_stop_exactly() -> None:
    assert stopped_after(StopConditions(max_failures=2), F, S, F, F) == (3, "max_failures")
    assert stopped_after(StopConditions(max_results=2), S, F, S, S) == (3, "max_results")


def test_without_conditions_nothing_is_the_last_straw() -> None:
    assert stopped_after(StopConditions(), *[F, S] * 50) == (100, None)
