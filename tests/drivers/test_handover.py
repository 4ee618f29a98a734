"""`in_thread`: a plain function under asyncio, on a thread that can be left to itself."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from shared import PATIENCE, timely, undisturbed

import qengine
from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    Event,
    ExecutionPolicy,
    RetryPolicy,
    TaskError,
    TransientError,
    current_attempt,
    in_thread,
)
from qengine.testing import VirtualClock

Quietly = Callable[..., Any]
ROOT = Path(qengine.__file__).resolve().parent.parent
NAME: ContextVar[str] = ContextVar("name", default="nobody")


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qengine-")]


# ---- on its own ------------------------------------------------------------------------------------------------------


def test_it_calls_the_function_on_a_daemon_thread_that_ends_with_it(quietly: Quietly) -> None:
    def where(*args: int, **kwargs: int) -> tuple[Any, ...]:
        return threading.current_thread(), args, kwargs

    thread, args, kwargs = quietly(in_thread(where)(1, 2, three=3))
    assert thread is not threading.main_thread() and thread.daemon
    assert (args, kwargs) == ((1, 2), {"three": 3})
    assert not thread.is_alive()


class Raises(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit, Raises])
def test_what_it_raises_is_raised_where_it_is_awaited(quietly: Quietly, kind: type[BaseException]) -> None:
    error = kind("mine")

    def fails() -> None:
        raise error

    async def main() -> BaseException | None:
        try:
            await in_thread(fails)()
        except BaseException as caught:
            return caught
        return None

    caught = quietly(main())
    # Python makes a RuntimeError of a StopIteration that leaves a coroutine.
    assert caught is error or (kind is StopIteration and caught.__cause__ is error)
    assert engine_threads() == []


def test_what_it_returns_is_a_value_even_an_exception(quietly: Quietly) -> None:
    error = ValueError("a value")
    assert quietly(in_thread(lambda: error)()) is error


def test_many_at_once_run_side_by_side(quietly: Quietly) -> None:
    barrier = threading.Barrier(20, timeout=PATIENCE)

    async def main() -> list[int]:
        return await asyncio.gather(*(in_thread(barrier.wait)() for _ in range(20)))

    assert sorted(quietly(main())) == list(range(20))
    assert engine_threads() == []


def test_it_is_known_by_the_name_of_the_function() -> None:
    def fetch(url: str) -> str:
        """Fetch it."""
        return url

    assert in_thread(fetch).__name__ == "fetch"
    assert in_thread(fetch).__doc__ == "Fetch it."
    assert asyncio.iscoroutinefunction(in_thread(fetch))
    assert asyncio.iscoroutinefunction(in_thread(functools.partial(fetch, "x")))


def test_it_sees_the_context_of_its_caller_and_keeps_its_changes_to_itself(quietly: Quietly) -> None:
    def task() -> str:
        before = NAME.get()
        NAME.set("changed")
        return before

    async def main() -> list[str]:
        NAME.set("caller")
        return [await in_thread(task)(), await in_thread(task)(), NAME.get()]

    assert quietly(main()) == ["caller"] * 3


def test_outside_of_a_task_there_is_no_attempt(quietly: Quietly) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="outside of a task"):
            await in_thread(current_attempt)()

    quietly(main())


@pytest.mark.abandons("a call that hangs is given up")
@undisturbed
def test_whoever_awaits_it_may_leave_at_any_time(quietly: Quietly, never: threading.Event) -> None:
    async def main() -> float:
        begin = monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await in_thread(never.wait)()
        return monotonic() - begin

    took = quietly(main())
    with timely():
        assert took < 0.3


# ---- in a run --------------------------------------------------------------------------------------------------------


@undisturbed
def test_a_call_that_hangs_costs_its_timeout_and_nothing_else(quietly: Quietly) -> None:
    free = threading.Event()
    policy = ExecutionPolicy(timeout=0.2)
    begin = monotonic()
    report = quietly(AsyncConcurrentExecutor(in_thread(lambda payload: free.wait(PATIENCE)), policy).run([1]))
    took = monotonic() - begin
    free.set()          # and its thread ends when the function returns
    assert [result.status.value for result in report.results] == ["timeout"]
    with timely():
        assert took < 0.5


@undisturbed
def test_a_process_with_a_hung_call_ends_at_once() -> None:
    code = (
        "import asyncio, time\nfrom qengine import *\nfrom qengine import AsyncConcurrentExecutor\n"
        "begin = time.monotonic()\n"
        "fn = in_thread(lambda n: time.sleep(600) if n == 3 else n)\n"
        "inputs = [Task(n, timeout=0.2 if n == 3 else 60.0) for n in range(20)]\n"
        "report = asyncio.run(AsyncConcurrentExecutor(fn).run(inputs))\n"
        "print(report.success_count, report.failure_count, time.monotonic() - begin)\n"
    )
    begin = monotonic()
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    took = monotonic() - begin
    assert (ended.stderr, ended.returncode) == ("", 0)
    *counts, seconds = ended.stdout.split()
    assert counts == ["19", "1"]
    with timely():
        assert float(seconds) < 0.5
        assert took < 5.0


def test_a_worker_uses_its_thread_again_and_no_more_threads_than_workers_are_there(quietly: Quietly) -> None:
    seen: set[int | None] = set()

    def task(payload: int) -> int:
        seen.add(threading.current_thread().ident)
        assert len(engine_threads()) <= 3
        sleep(0.0005)
        return payload

    report = quietly(AsyncConcurrentExecutor(in_thread(task), ExecutionPolicy(concurrency=3)).run(range(60)))
    assert report.values() == list(range(60))
    assert 1 <= len(seen) <= 3
    assert engine_threads() == []


def test_threads_end_with_their_run_however_it_ends(quietly: Quietly) -> None:
    async def main() -> None:
        executor = AsyncConcurrentExecutor(in_thread(abs), ExecutionPolicy(concurrency=4))
        assert (await executor.run(range(20))).all_succeeded
        assert engine_threads() == []
        assert [result.value async for result in executor.stream(range(20), ordered=True)] == list(range(20))
        assert engine_threads() == []
        assert await asyncio.gather(*map(executor.call, range(9))) == list(range(9))
        assert engine_threads() == []
        async with executor.stream(iter(int, 1)) as stream:
            await anext(stream)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await executor.run(iter(int, 1))

    quietly(main())


def test_an_attempt_is_known_in_the_thread_also_of_a_child_task(quietly: Quietly) -> None:
    def attempt_there() -> Any:
        return current_attempt()

    async def task(payload: int) -> bool:
        mine = current_attempt()
        others = await asyncio.gather(*(in_thread(attempt_there)() for _ in range(3)))
        if mine.number == 1:
            raise TransientError("once")
        return all(other is mine for other in others) and mine.task.payload == payload

    policy = ExecutionPolicy(concurrency=3, retry=RetryPolicy(max_attempts=2, backoff=0.0))
    assert quietly(AsyncConcurrentExecutor(task, policy).run(range(12))).values() == [True] * 12
    assert engine_threads() == []


def test_its_errors_are_those_of_the_task(quietly: Quietly) -> None:
    def task(payload: int) -> int:
        if payload == 1:
            raise TaskError("one")
        if payload == 2:
            raise StopIteration
        return payload

    report = quietly(AsyncConcurrentExecutor(in_thread(task)).run(range(4)))
    assert [result.status.value for result in report.results] == ["succeeded", "failed", "error", "succeeded"]


def test_an_awaitable_that_it_returns_is_closed_and_an_error(quietly: Quietly) -> None:
    async def coroutine() -> None: ...

    report = quietly(AsyncConcurrentExecutor(in_thread(lambda payload: coroutine())).run([1]))
    assert isinstance(report.results[0].error, TypeError)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_the_thread_ends_the_run_and_is_raised(quietly: Quietly, kind: type[BaseException]) -> None:
    def task(payload: int) -> int:
        if payload == 2:
            raise kind(3)
        return payload

    async def main() -> Any:
        executor = AsyncConcurrentExecutor(in_thread(task), ExecutionPolicy(concurrency=1))
        try:
            await executor.run(range(100))
        except (SystemExit, KeyboardInterrupt) as error:
            return error
        return None

    error = quietly(main())
    assert type(error) is kind
    assert error.report.success_count == 2


def test_the_token_tells_the_thread_that_it_was_given_up(quietly: Quietly) -> None:
    woken = threading.Event()

    def task(payload: int) -> None:
        if current_attempt().cancel.wait(PATIENCE):
            woken.set()

    report = quietly(AsyncConcurrentExecutor(in_thread(task), ExecutionPolicy(timeout=0.02)).run([1]))
    assert report.results[0].status.value == "timeout"
    assert woken.wait(PATIENCE)


def test_a_function_that_ends_after_the_loop_is_closed_disturbs_nobody(quietly: Quietly) -> None:
    free = threading.Event()

    def task(payload: int) -> None:
        free.wait(PATIENCE)
        raise ValueError("nobody is left to be told")

    quietly(AsyncConcurrentExecutor(in_thread(task), ExecutionPolicy(timeout=0.01)).run([1]))
    threads = engine_threads()
    assert len(threads) == 1
    free.set()
    threads[0].join(PATIENCE)
    assert not threads[0].is_alive()


def test_a_system_that_gives_no_more_threads_costs_one_item(quietly: Quietly, monkeypatch: pytest.MonkeyPatch) -> None:
    start, hired = threading.Thread.start, list[str]()

    def limited(thread: threading.Thread) -> None:
        hired.append(thread.name)
        if len(hired) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    policy = ExecutionPolicy(concurrency=3)
    report = quietly(AsyncConcurrentExecutor(in_thread(lambda payload: sleep(0.005)), policy).run(range(9)))
    assert report.success_count == 8
    assert "can't start" in str(report.errors()[0])


# ---- on virtual time -------------------------------------------------------------------------------------------------


def test_on_virtual_time_it_sleeps_on_the_clock(quietly: Quietly) -> None:
    clock = VirtualClock()

    def task(seconds: float) -> float:
        clock.sleep(seconds)
        return clock.now()

    executor = AsyncConcurrentExecutor(in_thread(task), ExecutionPolicy(concurrency=2), clock=clock)
    assert quietly(executor.run([3.0, 1.0, 1.0, 5.0])).values() == [3.0, 1.0, 2.0, 7.0]
    assert engine_threads() == []


@pytest.mark.parametrize("seconds", [100.0, 1e9])
def test_on_virtual_time_a_call_that_is_given_up_ends_where_it_sleeps(quietly: Quietly, seconds: float) -> None:
    clock, ended, events = VirtualClock(), list[float](), list[Event]()

    def task(payload: int) -> None:
        try:
            clock.sleep(seconds)
        finally:
            ended.append(clock.now())

    policy = ExecutionPolicy(timeout=1.0, concurrency=1, max_abandoned=9)
    scheduler = AsyncTaskScheduler(in_thread(task), policy, clock=clock, on_event=events.append)
    report = quietly(scheduler.run([1, 2]))
    assert [result.status.value for result in report.results] == ["timeout"] * 2
    assert ended == [1.0, 2.0]
    assert clock.now() == report.finished_at == 2.0
    assert engine_threads() == []
