"""The stub does as it is told, under the real rules of a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qengine import ExecutionPolicy, RetryPolicy, StopConditions, Task, TaskError, TaskStatus
from qengine.testing import StubExecutor


def statuses(stub: StubExecutor, inputs: list[Any]) -> list[str]:
    return [result.status.value for result in stub.run(inputs).results]


def test_without_orders_every_task_returns_its_payload() -> None:
    stub = StubExecutor()
    assert stub.run([1, 2, 3]).values() == [1, 2, 3]
    assert sorted(stub.calls) == [1, 2, 3]


def test_a_status_is_what_a_task_ends_with() -> None:
    ways = [status for status in TaskStatus if status is not TaskStatus.SKIPPED]
    stub = StubExecutor(behaviours={status.value: status for status in ways})
    assert statuses(stub, [status.value for status in ways]) == [status.value for status in ways]


def test_an_exception_is_raised_be_it_an_instance_or_a_class() -> None:
    error = ValueError("so")
    results = StubExecutor(behaviours={1: error, 2: KeyError}).run([1, 2]).results
    assert results[0].error is error
    assert isinstance(results[1].error, KeyError)


def test_a_sequence_is_followed_attempt_by_attempt_and_its_last_stays() -> None:
    stub = StubExecutor(
        ExecutionPolicy(retry=RetryPolicy(max_attempts=5, backoff=0.0)),
        behaviours={"a": [OSError("1"), OSError("2"), TaskStatus.SUCCEEDED], "b": [OSError("for ever")]},
    )
    results = stub.run(["a", "b"]).results
    assert [(result.status, result.attempts) for result in results] == [
        (TaskStatus.SUCCEEDED, 3),
        (TaskStatus.ERROR, 5),
    ]


def test_a_key_goes_before_the_payload_and_a_payload_need_not_be_hashable() -> None:
    stub = StubExecutor(behaviours={"k": TaskStatus.FAILED, "p": TaskStatus.TIMEOUT})
    assert statuses(stub, [Task("p", key="k"), ["p"], "p"]) == ["failed", "succeeded", "timeout"]


def test_the_failure_rate_is_drawn_from_the_seed() -> None:
    def failures(seed: int, rate: float) -> int:
        stub = StubExecutor(ExecutionPolicy(concurrency=1), failure_rate=rate, seed=seed)
        return stub.run(range(200)).failure_count

    assert failures(1, 0.25) == failures(1, 0.25)
    assert 20 < failures(1, 0.25) < 80
    assert (failures(1, 0.0), failures(1, 1.0)) == (0, 200)


def test_limits_stops_and_timeouts_are_real() -> None:
    stub = StubExecutor(
        ExecutionPolicy(concurrency=1, stop=StopConditions(max_failures=2)), behaviours={0: TaskStatus.FAILED}
    )
    report = stub.run([0, 0, 0, 0])
    assert (report.failure_count, report.cancelled_count, report.stop_reason) == (2, 2, "max_failures")
    late = StubExecutor(ExecutionPolicy(timeout=0.05), simulated_delay=30.0).run([1])
    assert late.results[0].status is TaskStatus.TIMEOUT, "and the call ends with its token: no thread is left behind"


def test_one_call_raises_what_it_was_told_to() -> None:
    stub = StubExecutor(behaviours={"a": TaskStatus.FAILED})
    with pytest.raises(TaskError):
        stub.call("a")
    assert stub.call("b") == "b"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: StubExecutor(simulated_delay=-1.0), ValueError, "simulated_delay is -1.0"),
        (lambda: StubExecutor(failure_rate=1.5), ValueError, "failure_rate is 1.5"),
        (lambda: StubExecutor(behaviours=[1]), TypeError, "behaviours is [1]"),  # type: ignore[arg-type]
        (lambda: StubExecutor(behaviours={"a": 7}), TypeError, "behaviours['a'] is 7"),  # type: ignore[dict-item]
        (lambda: StubExecutor(behaviours={"a": []}), ValueError, "behaviours['a'] is []"),
        (lambda: StubExecutor(behaviours={"a": TaskStatus.SKIPPED}), TypeError, "behaviours['a']"),
    ],
)
def test_orders_that_no_call_could_follow_are_refused(
    make: Callable[[], StubExecutor], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert says in str(caught.value)
