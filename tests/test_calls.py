"""`call`: one payload at a time, from many threads at once, under the limits of one executor."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from shared import PATIENCE, in_threads

from qengine import BreakerOpenError, BudgetExceededError, ExecutionPolicy, Task, TaskScheduler, TaskTimeoutError


def answers_of(scheduler: TaskScheduler[Any, Any], payloads: list[Any]) -> list[Any]:
    """What each payload's call gave, made at once from a thread for each: its value, or its error."""
    answers: list[Any] = [None] * len(payloads)

    def ask(position: int) -> None:
        try:
            answers[position] = scheduler.call(payloads[position])
        except BaseException as error:
            answers[position] = error

    in_threads(len(payloads), ask)
    return answers


def test_one_task_object_may_be_called_from_many_threads() -> None:
    gate = threading.Barrier(4)

    def wait(payload: int) -> int:
        gate.wait(PATIENCE)
        return payload

    assert answers_of(TaskScheduler(wait, ExecutionPolicy(concurrency=4)), [Task(7)] * 4) == [7] * 4


def test_a_key_does_not_make_a_call_a_duplicate() -> None:
    gate = threading.Barrier(2)

    def wait(payload: int) -> int:
        gate.wait(PATIENCE)
        return payload

    scheduler = TaskScheduler(wait, ExecutionPolicy(concurrency=2), key=lambda payload: "same")
    assert answers_of(scheduler, [Task(1, key="k"), Task(2, key="k")]) == [1, 2]


def test_a_budget_holds_for_all_calls_of_each_lane() -> None:
    scheduler = TaskScheduler(str.upper, ExecutionPolicy(budget=1), lane_by=lambda payload: payload)
    assert (scheduler.call("a"), scheduler.call("b")) == ("A", "B")
    for payload in ("a", "b"):
        with pytest.raises(BudgetExceededError):
            scheduler.call(payload)


def test_the_exit_of_one_call_is_its_callers_alone() -> None:
    gate = threading.Barrier(2)

    def leave(payload: int) -> int:
        gate.wait(PATIENCE)
        if payload == 0:
            raise SystemExit("enough")
        return payload

    left, stayed = answers_of(TaskScheduler(leave, ExecutionPolicy(concurrency=2)), [0, 1])
    assert isinstance(left, SystemExit)
    assert stayed == 1


@pytest.mark.abandons("calls that hang are given up")
def test_calls_that_hang_are_counted_from_call_to_call() -> None:
    never = threading.Event()
    scheduler = TaskScheduler(lambda payload: never.wait(), ExecutionPolicy(timeout=0.02, max_abandoned=3))
    try:
        for _ in range(3):
            with pytest.raises(TaskTimeoutError):
                scheduler.call(1)
        with pytest.raises(BreakerOpenError):
            scheduler.call(1)
    finally:
        never.set()
