"""Several runs of one executor, whoever starts them, and runs that are interrupted at any instant; on real time.

In full: QENGINE_STRESS=400.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from contract_support import most_in_any_window
from shared import PATIENCE, in_threads, timely, undisturbed, undisturbed_as_a_whole, until

from qengine import (
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    RateLimit,
    RateLimiter,
    RetryPolicy,
    RunReport,
    StopConditions,
    TaskScheduler,
    Window,
    current_attempt,
    in_thread,
)

TIMELY = 0.35       # 0.1 s is promised; a loaded machine may be late, but not by much more


@contextmanager
def interrupts() -> Iterator[None]:
    """Has SIGALRM do what Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qengine-")]


def echo(payload: int) -> int:
    return payload


def nap(payload: int) -> int:
    time.sleep(0.01)
    return payload


def interrupted_after(seconds: float, action: Callable[[], object]) -> KeyboardInterrupt:
    """Interrupt what is done, and return what that raised."""
    with interrupts():
        try:
            # Again, much later: one that comes where Python calls back for a weak reference is lost.
            signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
            action()
        except KeyboardInterrupt as error:
            return error
    raise AssertionError("it was over before it was interrupted")


def gone(known: list[threading.Thread]) -> bool:
    """Whether the others end, those that were given up when their calls do."""
    left = [thread for thread in engine_threads() if thread not in known]
    for thread in left:
        if vars(thread)["_started"].wait(0.5):
            thread.join(PATIENCE)
        else:       # Python for ever keeps one that was interrupted before its start
            vars(threading)["_limbo"].pop(thread, None)
    return not any(thread.is_alive() for thread in left)


# ---- several at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
def test_runs_at_once_share_limits_and_breaker_and_nothing_else(count: int) -> None:
    made: list[tuple[float, int]] = []
    window = Window(limit=12, seconds=0.02)

    def task(payload: int) -> int:
        made.append((time.monotonic(), payload))
        return payload

    policy = ExecutionPolicy(concurrency=3, limits=[window], breaker=BreakerPolicy(), budget=9, lookahead=2)
    scheduler = TaskScheduler(task, policy)
    reports: dict[int, RunReport[int, int]] = {}

    def run(number: int) -> None:
        reports[number] = scheduler.run(iter(range(100 * number, 100 * number + 12)))

    in_threads(count, run)
    for number, report in reports.items():
        payloads = list(range(100 * number, 100 * number + 12))
        assert [result.task.payload for result in report.results] == payloads
        assert report.values() == payloads[:9]
        assert [result.reason for result in report.results[9:]] == ["budget_exhausted"] * 3
        assert report.by_source["default"].calls == 9
        assert report.stop_reason is None
    assert Counter(payload for _, payload in made) == Counter(
        payload for number in range(count) for payload in range(100 * number, 100 * number + 9)
    )
    # A slot is held until so long after the outcome: no window of what was made has more, whatever run it was of.
    assert most_in_any_window([at for at, _ in made], window.seconds) <= window.limit
    assert engine_threads() == []


def test_a_stop_of_one_run_is_none_of_another() -> None:
    begun, go_on = threading.Barrier(4), threading.Event()

    def task(payload: int) -> int:
        if payload % 100 == 0:
            begun.wait()
            go_on.wait()
        if payload == 1:
            raise ValueError
        return payload

    executor = ConcurrentExecutor(task, ExecutionPolicy(concurrency=2, stop=StopConditions(max_failures=1)))
    token = CancellationToken()
    reports: dict[int, RunReport[int, int]] = {}

    def run(number: int) -> None:
        reports[number] = executor.run(range(100 * number, 100 * number + 20), token if number == 1 else None)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    token.cancel("only this one")
    go_on.set()
    for thread in threads:
        thread.join()
    assert [reports[number].stop_reason for number in range(3)] == ["max_failures", "only this one", None]
    assert reports[2].values() == list(range(200, 220))
    assert all(result.task.payload // 100 == number for number in range(3) for result in reports[number].results)


def test_the_breaker_that_one_run_opens_is_open_for_the_other() -> None:
    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=2, reset_after=60.0, on_open="skip"))
    begun, opened, reports = threading.Event(), threading.Event(), list[RunReport[int, int]]()

    def task(payload: int) -> int:
        if payload < 0:
            raise OSError
        if payload == 0:
            begun.set()
            opened.wait()
        return payload

    def listener(event: Event) -> None:
        if event.kind == "breaker_opened":
            opened.set()

    scheduler = TaskScheduler(task, policy, on_event=listener)
    other = threading.Thread(target=lambda: reports.append(scheduler.run(range(6))))
    other.start()
    begun.wait()
    report = scheduler.run([-1, -2, -3])
    other.join()
    assert [result.status.value for result in report.results] == ["error", "error", "skipped"]
    assert reports[0].values() == [0]
    assert {result.reason for result in reports[0].results[1:]} == {"breaker_open"}


def test_runs_streams_and_calls_at_once_in_both_worlds() -> None:
    """All on one live limiter, and on one executor of each world, in two loops of two threads."""
    known = engine_threads()
    limiter = RateLimiter(RateLimit(per_second=20_000, burst=5))
    policy = ExecutionPolicy(concurrency=2, limits=[limiter], lookahead=3)

    async def double(payload: int) -> int:
        await asyncio.sleep(0)
        return 2 * payload

    plain: TaskScheduler[int, int] = TaskScheduler(lambda payload: 2 * payload, policy)
    asynchronous = AsyncTaskScheduler(double, policy)
    found: dict[int, Any] = {}

    async def in_loop(first: int) -> Any:
        async def stream() -> list[int]:
            return [result.unwrap() async for result in asynchronous.stream(range(first, first + 30), ordered=True)]

        called = asyncio.gather(*map(asynchronous.call, range(first, first + 5)))
        report, streamed = await asyncio.gather(asynchronous.run(range(first, first + 30)), stream())
        return [*report.values(), *streamed, *await called]

    def act(number: int) -> None:
        first = 1000 * number
        if number < 2:
            found[number] = asyncio.run(in_loop(first))
            return
        report = plain.run(range(first, first + 30))
        streamed = [result.unwrap() for result in plain.stream(range(first, first + 30), ordered=True)]
        found[number] = [*report.values(), *streamed, *map(plain.call, range(first, first + 5))]

    in_threads(5, act)
    for number in range(5):
        doubled = [2 * (1000 * number + index) for index in range(30)]
        assert found[number] == doubled + doubled + doubled[:5]
    assert gone(known)


def test_runs_within_runs() -> None:
    def task(depth: int) -> int:
        if depth == 0:
            return 1
        return sum(executor.run([depth - 1] * 3).values()) + sum(
            result.unwrap() for result in executor.stream([depth - 1])
        )

    executor = ConcurrentExecutor(task, ExecutionPolicy(concurrency=2))
    assert executor.call(3) == 4**3
    assert engine_threads() == []


def test_an_exit_in_an_inner_run_ends_the_outer_one_too() -> None:
    def task(payload: int) -> int:
        if payload < 0:
            raise SystemExit(payload)
        return executor.run([payload + 10, -payload]).success_count if payload == 5 else payload

    executor = ConcurrentExecutor(task, ExecutionPolicy(concurrency=1))
    with pytest.raises(SystemExit) as caught:
        executor.run(range(10))
    assert caught.value.code == -5


# ---- from another thread ---------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_main_thread_is_nothing_to_a_run_in_another() -> None:
    reports = list[RunReport[int, int]]()
    executor = ConcurrentExecutor(nap, ExecutionPolicy(concurrency=2))
    other = threading.Thread(target=lambda: reports.append(executor.run(range(20))))
    other.start()
    error = interrupted_after(0.03, lambda: threading.Event().wait(10.0))
    assert not hasattr(error, "report")
    other.join()
    assert reports[0].values() == list(range(20))


def test_ctrl_c_interrupts_the_run_of_the_main_thread_alone() -> None:
    reports = list[RunReport[int, int]]()
    executor = ConcurrentExecutor(nap, ExecutionPolicy(concurrency=2))
    other = threading.Thread(target=lambda: reports.append(executor.run(range(30))))
    other.start()

    def inputs() -> Iterator[int]:      # before, there is no run to be interrupted
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        yield from range(1000)

    error = interrupted_after(PATIENCE, lambda: executor.run(inputs()))
    assert vars(error)["report"].stop_reason == "interrupted"
    other.join()
    assert reports[0].values() == list(range(30))


@pytest.mark.abandons("a call that hangs is given up")
@pytest.mark.parametrize("stop", [{"max_results": 1}, {"timeout": 0.02}], ids=["max_results", "timeout"])
@undisturbed_as_a_whole
def test_ctrl_c_ends_a_drain(stop: dict[str, Any]) -> None:
    never = threading.Event()
    policy = ExecutionPolicy(concurrency=2, stop=StopConditions(**stop))

    def task(payload: int) -> int:
        if payload:
            never.wait()
        return payload

    begun = time.monotonic()
    error = interrupted_after(0.08, lambda: ConcurrentExecutor(task, policy).run(range(9)))
    assert time.monotonic() - begun < 0.08 + TIMELY
    report = vars(error)["report"]
    assert report.stop_reason == next(iter(stop))       # the one that came first
    assert report.values() == [0]
    assert report.cancelled_count == len(report.results) - 1 == 8
    never.set()


# ---- interrupts at any instant ---------------------------------------------------------------------------------------


class Interrupted:
    """One executor that is interrupted over and over, and what it was doing then."""

    def __init__(self) -> None:
        self.limiter = RateLimiter(RateLimit(per_second=1e6, burst=100))
        policy = ExecutionPolicy(concurrency=3, limits=[self.limiter, Window(500, 0.001)], lookahead=8)
        self.executor = TaskScheduler(self.task, policy)
        self.given = 0
        self.handed_out: list[int] = []

    @staticmethod
    def task(payload: int) -> int:
        time.sleep(0.0003)
        return payload

    def inputs(self) -> Iterator[int]:
        for number in range(200):       # it ends by itself: Python loses an interrupt in a weakref's callback
            self.given = number + 1
            yield number

    def run(self) -> list[int]:
        return [result.task.payload for result in self.executor.run(self.inputs()).results]

    def stream(self) -> list[int]:
        for result in self.executor.stream(self.inputs()):
            self.handed_out.append(result.task.payload)
        return self.handed_out

    def call(self) -> list[int]:
        return [self.executor.call(number) for number in range(60)]


@pytest.mark.stress
@pytest.mark.not_under_coverage
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")     # lost in a weakref's callback
@pytest.mark.parametrize("how", ["run", "stream", "call"])
@undisturbed
def test_an_interrupt_at_any_instant_loses_nothing(how: str, stress_count: Callable[[int], int]) -> None:
    known, rng = engine_threads(), random.Random(7)
    it = Interrupted()
    hits, delays = 0, list[float]()
    with interrupts():
        for _ in range(stress_count(10)):
            it.given, it.handed_out = 0, list[int]()
            after = rng.choice([rng.uniform(1e-6, 0.001), rng.uniform(0.0005, 0.015)])
            error: BaseException | None = None
            begun = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, after)
                getattr(it, how)()
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except (KeyboardInterrupt, RuntimeError) as raised:
                error = raised
            if isinstance(error, RuntimeError):     # of a lock of Python's own, interrupted in Thread.start()
                assert isinstance(error.__context__, KeyboardInterrupt)
            delays.append(time.monotonic() - begun - after)
            if hasattr(error, "report"):
                report: RunReport[int, int] = vars(error)["report"]
                hits += 1
                left = [result.task.payload for result in report.results]
                assert Counter(it.handed_out + left) == Counter(range(it.given)), "what was taken has one result each"
                assert it.executor.last_report is report
                cut = it.given < 200 or report.cancelled_count > 0
                assert report.stop_reason == ("interrupted" if cut else None)
            assert it.limiter.try_acquire(), "no lock is left held"
            assert it.executor.run(range(10)).values() == list(range(10))
            assert it.executor.call(3) == 3
    with timely():
        assert max(delays) < TIMELY
    assert hits or how == "call"
    assert gone(known)


@pytest.mark.parametrize("how", ["run", "stream", "call"])
@pytest.mark.parametrize("in_threads_too", [False, True], ids=["coroutines", "in thread"])
def test_a_cancellation_at_any_step_loses_nothing(how: str, in_threads_too: bool) -> None:
    """Under asyncio each pass of the loop is an instant: the caller is cancelled after none, one, two, and so on."""
    given, known = 0, engine_threads()

    async def task(payload: int) -> int:
        for _ in range(payload % 3):
            await asyncio.sleep(0)
        return payload

    async def inputs() -> Any:
        nonlocal given
        for number in range(12):
            given = number + 1
            yield number
            if number % 4 == 3:
                await asyncio.sleep(0)

    function: Any = in_thread(echo) if in_threads_too else task
    scheduler = AsyncTaskScheduler(function, ExecutionPolicy(concurrency=2, lookahead=2))

    async def use(handed_out: list[int]) -> None:
        if how == "run":
            await scheduler.run(inputs())
        elif how == "call":
            for number in range(6):
                await scheduler.call(number)
        else:
            async with scheduler.stream(inputs()) as stream:
                async for result in stream:
                    handed_out.append(result.task.payload)

    async def main() -> int:
        nonlocal given
        for passes in range(0, 100, 3 if in_threads_too else 1):
            given, handed_out = 0, list[int]()
            caller = asyncio.create_task(use(handed_out))
            for _ in range(passes):
                await asyncio.sleep(0)
            caller.cancel()
            try:
                await caller
            except asyncio.CancelledError as error:
                if how != "call" and passes:
                    report: RunReport[int, int] = vars(error)["report"]
                    assert report is scheduler.last_report
                    left = [result.task.payload for result in report.results]
                    assert Counter(handed_out + left) == Counter(range(given)), passes
            else:
                return passes
            assert asyncio.all_tasks() == {asyncio.current_task()}, passes
            assert (await scheduler.run([1, 2])).values() == [1, 2]
            assert await scheduler.call(5) == 5
        return 100

    assert asyncio.run(main()) > 10
    assert gone(known)


# ---- single calls ----------------------------------------------------------------------------------------------------


@undisturbed
def test_a_call_that_is_tried_again_after_a_time_out_has_one_result_though_its_caller_is_gone() -> None:
    again, release = threading.Event(), threading.Event()

    def task(payload: int) -> int:
        if current_attempt().number > 1:
            again.set()
        release.wait(PATIENCE)
        return payload

    retry = RetryPolicy(max_attempts=9, backoff=0.0, retry_on=lambda error: True)
    policy = ExecutionPolicy(timeout=0.05, max_abandoned=20, retry=retry)
    inner: TaskScheduler[int, int] = TaskScheduler(task, policy)

    def outer(payload: int) -> int:
        return inner.call(payload)

    report = ConcurrentExecutor(outer, ExecutionPolicy(timeout=0.3)).run([1])
    assert report.failure_count == 1
    with timely():      # so soon
        assert again.is_set()
    quick: TaskScheduler[int, int] = TaskScheduler(abs, ExecutionPolicy())
    assert quick.call(-1) == 1
    until(lambda: not inner.counters().active_runs)
    release.set()
    (found,) = inner.counters().by_source.values()
    assert (found.cancelled_count, found.success_count, found.failure_count) == (1, 0, 0)


def test_what_a_retry_policy_raises_ends_the_run_and_kills_no_worker() -> None:
    def leave(error: BaseException) -> bool:
        if isinstance(error, ValueError):
            raise SystemExit(3)
        return True

    def fail(payload: int) -> None:
        raise ValueError(payload)

    executor = ConcurrentExecutor(fail, ExecutionPolicy(retry=RetryPolicy(max_attempts=2, retry_on=leave)))
    with pytest.raises(SystemExit):
        executor.run(range(3))


def test_a_listener_may_call_the_executor_that_is_telling_it() -> None:
    asked: list[int] = []

    def listen(event: Event) -> None:
        if event.kind == "result" and len(asked) < 3:
            asked.append(executor.call(7))

    executor: ConcurrentExecutor[int, int] = ConcurrentExecutor(abs, on_event=listen)
    assert [executor.call(-number) for number in range(9)] == [*range(9)]
    until(lambda: len(asked) == 3)      # it is told in a thread of the engine's, after the answer
    assert asked == [7, 7, 7]


def test_many_threads_may_call_by_new_keys_at_once() -> None:
    executor: TaskScheduler[int, int] = TaskScheduler(abs, ExecutionPolicy(), lane_by=lambda number: number // 2)
    results: list[int] = []

    def call() -> None:
        results.extend(executor.call(number) for number in range(40))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([*range(40)] * 4)
    assert set(executor.counters().by_source) == {str(key) for key in range(20)}
