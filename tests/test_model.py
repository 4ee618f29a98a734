"""What goes in and what comes out: tasks, results, reports, and the token that cancels."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from qengine import (
    BreakerOpenError,
    BudgetExceededError,
    CancellationToken,
    CollectionReport,
    Event,
    QEngineError,
    Query,
    QueryResult,
    RunReport,
    Task,
    TaskResult,
    TaskStatus,
)
from qengine.model import SourceReport, check_key

SUCCEEDED, FAILED, ERROR, TIMEOUT, CANCELLED, SKIPPED = TaskStatus
make_task: Any = Task


def report(*results: TaskResult[Any, Any], **fields: Any) -> RunReport[Any, Any]:
    """A report of these results, all of one source unless `by_source` says otherwise."""
    source = SourceReport("a")
    for result in results:
        if result.ok:
            source.success_count += 1
        elif result.status.is_failure:
            source.failure_count += 1
        elif result.status is CANCELLED:
            source.cancelled_count += 1
        else:
            source.skipped[str(result.reason)] = source.skipped.get(str(result.reason), 0) + 1
    facts = {"by_source": {"a": source}, "stop_reason": None, "intake_cut": False, "abandoned": 0, "makespan": 1.0}
    return RunReport(**{"results": lambda: results, **facts, "started_at": 0.0, "finished_at": 1.0, **fields})


def result(status: TaskStatus, **fields: Any) -> TaskResult[Any, Any]:
    return TaskResult(Task(1), status, **fields)


def test_a_failure_is_failed_error_or_timeout() -> None:
    assert [status for status in TaskStatus if status.is_failure] == [FAILED, ERROR, TIMEOUT]


@pytest.mark.parametrize("fields", [
    {"key": object()}, {"key": (("a",), "b")}, {"key": ["a"]}, {"priority": "high"}, {"amount": "1"}, {"timeout": "1"},
    {"amount": {1: 1}},
])
def test_a_task_refuses_a_field_of_the_wrong_kind(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(fields))}.* is "):
        make_task("payload", **fields)


@pytest.mark.parametrize("fields", [
    {"amount": 0}, {"amount": {"tokens": -1}}, {"timeout": 0}, {"priority": float("nan")},
])
def test_a_task_refuses_a_field_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.* is "):
        make_task("payload", **fields)


@pytest.mark.parametrize("key", ["a", 1, 2.5, b"a", True, ("a", 1, None)])
def test_a_key_is_plain_data(key: object) -> None:
    check_key("key", key)
    assert Task(1, key=key).key == key


def test_tasks_and_results_travel_between_processes() -> None:
    query = Query("q", key="k", amount={"calls": 1}, metadata={"a": 1}, node="n", level=2, source="s")
    found = QueryResult(query, SUCCEEDED, ["x"], attempts=2, usage={"calls": 2.0})
    assert pickle.loads(pickle.dumps(found)) == found


def test_unwrap_returns_the_value_or_raises_the_error() -> None:
    error = ValueError("bad")
    assert result(SUCCEEDED, value=None).unwrap() is None
    with pytest.raises(ValueError, match="bad") as caught:
        result(ERROR, error=error).unwrap()
    assert caught.value is error


@pytest.mark.parametrize(("status", "reason", "kind"), [
    (SKIPPED, "budget_exhausted", BudgetExceededError), (SKIPPED, "breaker_open", BreakerOpenError),
    (SKIPPED, "duplicate", QEngineError), (CANCELLED, "timeout", QEngineError),
])
def test_unwrap_of_a_task_not_tried_says_why(status: TaskStatus, reason: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"{status.value}: {reason}") as caught:
        result(status, reason=reason).unwrap()
    assert type(caught.value) is kind


def test_a_query_that_found_nothing_or_failed_has_no_items() -> None:
    query = Query("q")
    assert QueryResult(query, SUCCEEDED, [1, 2]).items == [1, 2]
    assert QueryResult(query, SUCCEEDED, None).items == []
    assert QueryResult(query, FAILED, [1], error=ValueError()).items == []


def test_a_report_counts_each_kind_of_ending() -> None:
    made = report(
        result(SUCCEEDED, value=1), result(FAILED, error=ValueError()), result(TIMEOUT, error=TimeoutError()),
        result(SKIPPED, reason="duplicate"), result(CANCELLED, reason="timeout"), result(SUCCEEDED, value=2),
    )
    assert (made.success_count, made.failure_count, made.skipped_count, made.cancelled_count) == (2, 2, 1, 1)
    assert made.success_rate == 0.5
    assert made.values() == [1, 2]
    assert [type(error) for error in made.errors()] == [ValueError, TimeoutError]


def test_the_success_rate_of_nothing_is_one() -> None:
    assert report().success_rate == 1.0
    assert report(result(SKIPPED, reason="duplicate")).success_rate == 1.0


@pytest.mark.parametrize(("made", "all_succeeded"), [
    (report(result(SUCCEEDED)), True), (report(result(SUCCEEDED), intake_cut=True), False),
    (report(result(SKIPPED, reason="duplicate")), False), (report(result(CANCELLED)), False),
    (report(result(ERROR)), False),
])
def test_all_succeeded_means_every_input(made: RunReport[Any, Any], all_succeeded: bool) -> None:
    assert made.all_succeeded is all_succeeded


def test_sums_are_taken_over_the_sources() -> None:
    one = SourceReport("one", retries=1, busy_seconds=2.0, usage={"calls": 3.0, "tokens": 10.0, "cost": 0.5})
    two = SourceReport("two", retries=2, busy_seconds=1.0, usage={"calls": 1.0, "cost": 0.25}, skipped={"x": 2, "y": 1})
    made = report(by_source={"one": one, "two": two})
    assert made.usage == {"calls": 4.0, "tokens": 10.0, "cost": 0.75}
    assert (made.total_cost, made.total_tokens, made.busy_seconds, made.retries) == (0.75, 10.0, 3.0, 3)
    assert made.skipped_count == 3
    assert report().total_tokens == 0.0


def test_failures_are_raised_together_or_not_at_all() -> None:
    fine = report(result(SUCCEEDED))
    assert fine.raise_for_failures() is fine
    errors = [ValueError("a"), OSError("b")]
    with pytest.raises(ExceptionGroup, match="2 of 3 tasks failed") as caught:
        report(result(SUCCEEDED), *[result(ERROR, error=error) for error in errors]).raise_for_failures()
    assert list(caught.value.exceptions) == errors


def test_results_are_made_once_and_when_looked_at() -> None:
    made: list[int] = []
    lazy = report(results=lambda: made.append(1) or [result(SUCCEEDED)])
    assert made == []
    assert lazy.results is lazy.results
    assert made == [1]


def test_a_report_reads_as_what_happened() -> None:
    text = repr(report(result(SUCCEEDED), result(CANCELLED), stop_reason="max_results"))
    assert "1 succeeded" in text and "1 cancelled" in text and "stopped: max_results" in text
    assert "stopped" not in repr(report())


def test_a_collection_has_its_items_flat_and_what_is_left() -> None:
    def found(status: TaskStatus, value: Any) -> QueryResult[Any]:
        return QueryResult(Query("q"), status, value)

    results = [found(SUCCEEDED, [1, 2]), found(FAILED, None), found(SUCCEEDED, None), found(SUCCEEDED, [3])]
    made: CollectionReport[Any] = CollectionReport(
        active_nodes=("n",), results=lambda: results, stop_reason=None, intake_cut=False, abandoned=0, makespan=0.0,
        started_at=0.0, finished_at=0.0,
        by_source={"a": SourceReport("a", remaining={"calls": 3}), "b": SourceReport("b")},
    )
    assert made.items == [1, 2, 3]
    assert made.active_nodes == ["n"]
    assert made.remaining_budgets == {"a": 3, "b": None}
    assert repr(made).startswith("<CollectionReport: ")


def test_an_event_is_a_value() -> None:
    assert Event("start", 1.0, "a", 3, 1) == Event("start", 1.0, "a", 3, 1)


def test_a_token_is_cancelled_once_with_the_first_reason() -> None:
    token = CancellationToken()
    assert (token.cancelled, token.reason, token.wait(0.0)) == (False, None, False)
    token.raise_if_cancelled()
    token.cancel("enough")
    token.cancel("too late")
    assert (token.cancelled, token.reason) == (True, "enough")
    assert token.wait() and token.wait(), "waiting does not use the cancellation up"
    with pytest.raises(QEngineError, match="enough"):
        token.raise_if_cancelled()


def test_a_subscriber_is_told_once() -> None:
    token, told = CancellationToken(), list[str]()
    token.subscribe(told.append)
    token.cancel("a")
    token.cancel("b")
    assert told == ["a"]


def test_a_subscriber_that_comes_late_is_told_at_once() -> None:
    token, told = CancellationToken(), list[str]()
    token.cancel("over")
    token.subscribe(told.append)()
    assert told == ["over"]


def test_a_subscriber_that_left_is_not_told() -> None:
    token, told = CancellationToken(), list[str]()
    leave = token.subscribe(told.append)
    leave()
    leave()
    token.cancel("over")
    assert told == []


def test_a_reason_is_a_word() -> None:
    reason: Any = 3
    with pytest.raises(TypeError, match="reason is 3"):
        CancellationToken().cancel(reason)


def test_a_token_reads_as_what_it_is() -> None:
    token = CancellationToken()
    assert repr(token) == "<CancellationToken>"
    token.cancel("over")
    assert repr(token) == "<CancellationToken 'over'>"
