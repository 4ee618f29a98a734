"""User code, called: whatever it does, a tagged outcome comes back."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Generator
from contextvars import ContextVar
from typing import Any

import pytest

from qengine import ConcurrentExecutor, ExecutionPolicy, RetryPolicy, Task, TaskStatus, current_attempt

closed: list[str] = []


class Promise:
    """An awaitable that wants to be closed."""

    def __await__(self) -> Generator[None, None, None]:
        yield

    def close(self) -> None:
        closed.append("promise")


async def coroutine() -> None:
    """Never awaited: a RuntimeWarning if it is not closed, and so an error here."""


async def asynchronous() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("make", [coroutine, asynchronous, Promise], ids=["coroutine", "async generator", "awaitable"])
def test_an_awaitable_returned_is_closed_and_its_items_type_error(make: Any) -> None:
    closed.clear()
    report = ConcurrentExecutor(lambda payload: make() if payload else 0).run([1, 0])
    assert [result.status for result in report.results] == [TaskStatus.ERROR, TaskStatus.SUCCEEDED]
    with pytest.raises(TypeError, match="awaitable"):
        report.results[0].unwrap()
    assert closed == (["promise"] if make is Promise else [])


def test_an_awaitable_that_cannot_be_closed_is_still_an_error_of_its_item_alone() -> None:
    class Stubborn(Promise):
        def close(self) -> None:
            raise LookupError("no")

    report = ConcurrentExecutor(lambda payload: Stubborn() if payload else 0).run([1, 0])
    assert [result.status for result in report.results] == [TaskStatus.ERROR, TaskStatus.SUCCEEDED]


def test_a_task_knows_its_own_attempt() -> None:
    def task(payload: str) -> tuple[Any, ...]:
        attempt = current_attempt()
        assert current_attempt() is attempt
        if attempt.number == 1:
            raise OSError("once")
        return attempt.task, attempt.number, attempt.cancel.cancelled, 0 < attempt.remaining() <= 9.0

    policy = ExecutionPolicy(timeout=30.0, retry=RetryPolicy(max_attempts=2, backoff=0.0))
    given = Task("x", metadata={"mine": 1}, timeout=9.0)
    assert ConcurrentExecutor(task, policy).run([given]).values() == [(given, 2, False, True)]


def test_without_a_timeout_there_is_no_deadline() -> None:
    report = ConcurrentExecutor(lambda payload: current_attempt().remaining()).run([1])
    assert report.values() == [float("inf")]


def test_a_bare_payload_is_seen_as_a_task() -> None:
    assert ConcurrentExecutor(lambda payload: current_attempt().task).run(["x"]).values() == [Task("x")]


def test_outside_of_a_task_there_is_no_attempt() -> None:
    with pytest.raises(RuntimeError, match="outside of a task"):
        current_attempt()


def test_an_input_iterator_sees_the_callers_context() -> None:
    name: ContextVar[str] = ContextVar("name")
    name.set("caller")
    assert ConcurrentExecutor(str.upper).run(name.get() for _ in range(3)).values() == ["CALLER"] * 3


class AsyncCall:
    async def __call__(self, payload: int) -> None: ...


async def coroutine_function(payload: int) -> None: ...


async def async_generator(payload: int) -> AsyncIterator[int]:
    yield payload


async def async_method_of(payload: int, other: int) -> Awaitable[None]: ...     # type: ignore[empty-body]


@pytest.mark.parametrize(
    "fn", [coroutine_function, async_generator, AsyncCall(), functools.partial(async_method_of, 1)]
)
def test_an_async_function_is_refused_by_name(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"fn is .*async"):
        ConcurrentExecutor(fn)
