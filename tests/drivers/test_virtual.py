"""Virtual time: whose turn it is, what a sleep costs, and that a clock can be used again whatever happened on it."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import pytest
from shared import PATIENCE, in_threads, timely, undisturbed

from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    RateLimit,
    RateLimiter,
    RetryPolicy,
    StopConditions,
    TaskScheduler,
    TransientError,
    Window,
    current_attempt,
    in_thread,
)
from qengine.testing import VirtualClock

Quietly = Callable[..., Any]
FOUR = ExecutionPolicy(concurrency=4)


_known: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def known_threads() -> None:
    _known.clear()
    _known.update(threading.enumerate())


def engine_threads() -> list[threading.Thread]:
    """Those that the engine has started in this test and that are there now; a test may not clean up after another."""
    return [thread for thread in threading.enumerate() if thread not in _known and thread.name.startswith("qengine-")]


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C, by a real signal, that many real seconds from now, and again every ten: a hang is to end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class World:
    """One of the two worlds on a virtual clock: a task is a list of seconds to sleep, one after the other."""

    def __init__(self, kind: str, quietly: Quietly) -> None:
        self.kind = kind
        self.quietly = quietly
        self.clock = VirtualClock()

    def scheduler(self, policy: ExecutionPolicy, **options: Any) -> Any:
        clock = self.clock

        def plain(sleeps: Any) -> float:
            for seconds in sleeps:
                clock.sleep(seconds)
            return clock.now()

        async def asynchronous(sleeps: Any) -> float:
            for seconds in sleeps:
                await clock.sleep(seconds)
            return clock.now()

        if self.kind == "threads":
            return TaskScheduler(plain, policy, clock=clock, **options)
        fn = asynchronous if self.kind == "asyncio" else in_thread(plain)
        return AsyncTaskScheduler(fn, policy, clock=clock, **options)

    def run(self, policy: ExecutionPolicy, inputs: Any, cancel: CancellationToken | None = None, **options: Any) -> Any:
        run = self.scheduler(policy, **options).run(inputs, cancel)
        return run if self.kind == "threads" else self.quietly(run)


@pytest.fixture(params=["threads", "asyncio", "in_thread"])
def world(request: pytest.FixtureRequest, quietly: Quietly) -> World:
    return World(request.param, quietly)


# ---- sleeping --------------------------------------------------------------------------------------------------------


@undisturbed
def test_a_sleep_outside_of_a_run_takes_no_time() -> None:
    clock = VirtualClock(100.0)
    begin = time.monotonic()
    clock.sleep(3600.0)
    clock.sleep(0)
    assert clock.now() == clock.wall_time() == 3700.0
    assert repr(clock) == "<VirtualClock at 3700 s>"
    with timely():
        assert time.monotonic() - begin < 1.0


def test_sleeps_of_threads_outside_of_a_run_come_one_after_the_other() -> None:
    clock = VirtualClock()
    in_threads(5, lambda number: clock.sleep(10.0))
    assert 10.0 <= clock.now() <= 50.0


def test_a_sleep_in_a_coroutine_takes_its_place_among_others(quietly: Quietly) -> None:
    clock = VirtualClock()
    order: list[tuple[str, float]] = []

    async def sleeper(name: str, *sleeps: float) -> None:
        for seconds in sleeps:
            await clock.sleep(seconds)
            order.append((name, clock.now()))

    async def main() -> None:
        await asyncio.gather(sleeper("a", 3.0, 3.0), sleeper("b", 1.0, 2.0, 0.0), sleeper("c", 6.0))

    quietly(main())
    assert order == [("b", 1.0), ("a", 3.0), ("b", 3.0), ("b", 3.0), ("c", 6.0), ("a", 6.0)]


def test_a_sleep_that_is_cancelled_moves_no_clock(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def main() -> None:
        sleeper = asyncio.create_task(clock.sleep(100.0))
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper
        await clock.sleep(5.0)
        for _ in range(50):
            await asyncio.sleep(0)

    quietly(main())
    assert clock.now() == 5.0


@pytest.mark.parametrize(
    ("seconds", "kind"),
    [(-1, ValueError), (-0.001, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError),
     (True, TypeError)],
)
def test_what_is_no_duration_is_refused(seconds: Any, kind: type[Exception], quietly: Quietly) -> None:
    clock = VirtualClock()
    with pytest.raises(kind, match=r"seconds is .*allowed is a number of seconds"):
        clock.sleep(seconds)

    async def main() -> None:
        with pytest.raises(kind, match="seconds is"):
            await clock.sleep(seconds)

    quietly(main())
    report = ConcurrentExecutor(clock.sleep, clock=clock).run([seconds])
    assert isinstance(report.results[0].error, kind)
    assert clock.now() == 0.0


@pytest.mark.parametrize(("start", "kind"), [(math.nan, ValueError), ("now", TypeError), (None, TypeError)])
def test_what_is_no_instant_is_refused(start: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="start is"):
        VirtualClock(start)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_what_a_task_sleeps_is_its_duration(world: World) -> None:
    report = world.run(FOUR, [[3.0], [2.0, 2.0], [1.0], [5.0], [0.0], [7.0]])
    assert report.values() == [3.0, 4.0, 1.0, 5.0, 1.0, 8.0]
    assert [result.duration for result in report.results] == [3.0, 4.0, 1.0, 5.0, 0.0, 7.0]
    assert [result.started_at for result in report.results] == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert (report.makespan, report.started_at, report.finished_at) == (8.0, 0.0, 8.0)
    assert engine_threads() == []


def test_a_run_is_the_same_every_time_and_in_every_world(quietly: Quietly) -> None:
    def log(kind: str) -> list[tuple[Any, ...]]:
        world, events = World(kind, quietly), list[Event]()
        tries: dict[int, int] = {}

        def outcome(payload: int) -> int:
            tries[payload] = tries.get(payload, 0) + 1
            if payload % 4 == 1 and tries[payload] == 1:
                raise TransientError("once")
            return payload

        clock = world.clock

        def plain(payload: int) -> int:
            clock.sleep(payload % 3 + 0.25)
            return outcome(payload)

        async def asynchronous(payload: int) -> int:
            await clock.sleep(payload % 3 + 0.25)
            return outcome(payload)

        policy = ExecutionPolicy(
            concurrency=3,
            limits=[RateLimit(per_second=2, burst=2), Window(9, 5.0)],
            retry=RetryPolicy(max_attempts=2, backoff=1.5),         # with jitter: the clock has a seed
            timeout=2.0,
            max_abandoned=99,
        )
        if kind == "threads":
            TaskScheduler(plain, policy, clock=clock, on_event=events.append).run(range(40))
        else:
            fn = asynchronous if kind == "asyncio" else in_thread(plain)
            quietly(AsyncTaskScheduler(fn, policy, clock=clock, on_event=events.append).run(range(40)))
        return [(event.kind, round(event.at, 9), event.index, event.number, event.detail) for event in events]

    first = log("threads")
    assert len(first) > 100
    assert log("threads") == first
    assert log("asyncio") == first
    assert [line for line in log("in_thread") if line[0] != "late"] == first


def test_one_clock_serves_runs_one_after_the_other_in_all_worlds(quietly: Quietly) -> None:
    clock = VirtualClock()
    plain = ConcurrentExecutor(clock.sleep, clock=clock)

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)

    asynchronous = AsyncConcurrentExecutor(sleep, clock=clock)
    for number in range(1, 4):
        assert plain.run([2.0, 1.0]).makespan == 2.0
        assert quietly(asynchronous.run([2.0, 1.0])).makespan == 2.0
        assert plain.call(1.0) is None
        assert quietly(asynchronous.call(1.0)) is None
        assert [result.duration for result in plain.stream([1.0])] == [1.0]
        clock.sleep(3.0)
        assert clock.now() == number * 10.0


def test_limits_of_an_executor_hold_across_its_runs_on_a_clock(world: World) -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=1, burst=3)])
    scheduler = world.scheduler(policy)
    for _ in range(2):
        run = scheduler.run([[]] * 5)
        if world.kind != "threads":
            world.quietly(run)
    assert world.clock.now() == 7.0


def test_retries_batches_timeouts_and_stops_go_by_the_clock(world: World) -> None:
    policy = ExecutionPolicy(batch_size=2, batch_backoff=10.0, timeout=3.0, max_abandoned=99,
                             stop=StopConditions(timeout=45.0), concurrency=1)
    report = world.run(policy, [[1.0], [1e9]] * 5)
    assert [result.status.value for result in report.results] == ["succeeded", "timeout"] * 4 + ["cancelled"] * 2
    assert [result.started_at for result in report.results][::2] == [0.0, 14.0, 28.0, 42.0, None]
    assert report.stop_reason == "timeout"
    assert world.clock.now() == 46.0        # what was under way at the stop was waited for, to its own timeout
    assert engine_threads() == []


@pytest.mark.parametrize("hang", [1e9, math.inf], ids=["long", "for ever"])
@undisturbed
def test_a_call_that_hangs_costs_its_timeout_and_leaves_no_thread(world: World, hang: float) -> None:
    policy = ExecutionPolicy(timeout=3.0, concurrency=4, max_abandoned=99)
    begin = time.monotonic()
    report = world.run(policy, [[hang] if number % 2 else [1.0] for number in range(20)])
    assert (report.success_count, report.failure_count, report.abandoned) == (10, 10, 0)
    assert world.clock.now() == report.finished_at == 12.0
    assert engine_threads() == []
    with timely():
        assert time.monotonic() - begin < 2.0


def test_a_call_that_swallows_the_interrupt_is_given_up_and_the_clock_goes_on() -> None:
    clock = VirtualClock()

    def stubborn(payload: int) -> None:
        for _ in range(3):
            try:
                clock.sleep(5.0)
            except BaseException:
                continue

    policy = ExecutionPolicy(timeout=3.0, concurrency=1, max_abandoned=99)
    report = ConcurrentExecutor(stubborn, policy, clock=clock).run(range(4))
    assert [result.status.value for result in report.results] == ["timeout"] * 4
    assert report.makespan == 12.0
    clock.sleep(100.0)          # they end where they sleep
    assert engine_threads() == []


def test_a_token_cancelled_by_a_task_stops_the_run_at_that_instant(world: World) -> None:
    token, clock = CancellationToken(), world.clock

    def listener(event: Event) -> None:
        if event.kind == "answer" and event.index == 3:
            token.cancel("enough")

    policy = ExecutionPolicy(concurrency=2, stop=StopConditions(in_flight="abandon"))
    report = world.run(policy, [[2.0]] * 50, token, on_event=listener)
    assert report.stop_reason == "enough"
    assert clock.now() == report.finished_at == 4.0
    assert report.success_count in (3, 4)
    assert report.cancelled_count == len(report.results) - report.success_count > 40


def test_a_token_cancelled_in_a_task_stops_the_run_at_that_instant() -> None:
    token, clock = CancellationToken(), VirtualClock()

    def task(payload: int) -> None:
        clock.sleep(2.0)
        if payload == 3:
            token.cancel("enough")
        clock.sleep(1.0)

    report = ConcurrentExecutor(task, ExecutionPolicy(concurrency=1), clock=clock).run(range(50), token)
    assert (report.stop_reason, report.success_count, clock.now()) == ("enough", 4, 12.0)


def test_a_consumer_may_sleep_on_the_clock() -> None:
    clock = VirtualClock()
    executor = ConcurrentExecutor(clock.sleep, ExecutionPolicy(concurrency=1, lookahead=0), clock=clock)
    at = []
    for _ in executor.stream(iter([1.0] * 5)):
        at.append(clock.now())
        clock.sleep(10.0)
    assert at == [1.0, 11.0, 21.0, 31.0, 41.0]      # the next one has been done meanwhile
    assert clock.now() == 51.0


def test_a_consumer_may_sleep_on_the_clock_under_asyncio_too(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def task(seconds: float) -> None:
        await clock.sleep(seconds)

    async def main() -> list[float]:
        executor = AsyncConcurrentExecutor(task, ExecutionPolicy(concurrency=1, lookahead=0), clock=clock)
        at = []
        async for _ in executor.stream(iter([1.0] * 5)):
            at.append(clock.now())
            await clock.sleep(10.0)
        return at

    assert quietly(main()) == [1.0, 11.0, 21.0, 31.0, 41.0]


def test_a_timeout_comes_while_the_consumer_sleeps_on_the_clock() -> None:
    clock, events = VirtualClock(), list[Event]()
    policy = ExecutionPolicy(timeout=3.0, concurrency=2, lookahead=0)
    with ConcurrentExecutor(clock.sleep, policy, clock=clock, on_event=events.append).stream([1.0, 60.0]) as stream:
        assert next(stream).ok
        clock.sleep(10.0)
        assert [event.at for event in events if event.kind == "timeout"] == [3.0]
        assert next(stream).status.value == "timeout"
    assert engine_threads() == []


def test_inputs_may_sleep_on_the_clock(quietly: Quietly) -> None:
    clock = VirtualClock()

    def plain() -> Iterator[int]:
        for number in range(3):
            clock.sleep(10.0)
            yield number

    async def asynchronous() -> AsyncIterator[int]:
        for number in range(3):
            await clock.sleep(10.0)
            yield number

    async def now(payload: int) -> float:
        return clock.now()

    assert ConcurrentExecutor(lambda payload: clock.now(), clock=clock).run(plain()).values() == [10.0, 20.0, 30.0]
    report = quietly(AsyncConcurrentExecutor(now, clock=clock).run(asynchronous()))
    assert report.values() == [40.0, 50.0, 60.0]


def test_children_of_a_task_may_sleep_on_the_clock_side_by_side(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def task(payload: int) -> float:
        await asyncio.gather(clock.sleep(3.0), clock.sleep(5.0), in_thread(clock.sleep)(4.0))
        async with asyncio.TaskGroup() as group:
            group.create_task(clock.sleep(1.0))
        return clock.now()

    report = quietly(AsyncConcurrentExecutor(task, FOUR, clock=clock).run(range(8)))
    assert report.values() == [6.0] * 4 + [12.0] * 4
    assert engine_threads() == []


def test_a_lock_of_asyncio_may_be_held_over_a_sleep(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def main() -> Any:
        lock = asyncio.Lock()

        async def task(payload: int) -> float:
            async with lock:
                await clock.sleep(2.0)
            return clock.now()

        return await AsyncConcurrentExecutor(task, FOUR, clock=clock).run(range(6))

    assert quietly(main()).values() == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


def test_a_lock_may_be_held_in_a_turn_and_a_queue_used_between_turns() -> None:
    """Within a turn nothing else runs: a lock that is let go before the next sleep is always free."""
    clock, lock, seen = VirtualClock(), threading.Lock(), list[int]()

    def task(payload: int) -> None:
        clock.sleep(1.0)
        assert not lock.locked()
        with lock:
            seen.append(payload)
        clock.sleep(1.0)

    assert ConcurrentExecutor(task, FOUR, clock=clock).run(range(40)).all_succeeded
    assert sorted(seen) == list(range(40))


def test_a_queue_of_the_clock_waits_on_virtual_time() -> None:
    clock = VirtualClock()
    queue = clock.queue()
    with pytest.raises(Empty):
        queue.get(timeout=5.0)
    assert clock.now() == 5.0
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(block=False)
    got: list[tuple[Any, float]] = []

    def reader() -> None:
        for _ in range(3):
            got.append((queue.get(), clock.now()))
        try:
            queue.get(timeout=7.0)
        except Empty:
            got.append((None, clock.now()))

    thread = clock.thread(reader, (), "reader")
    thread.start()
    queue.put("a")
    clock.sleep(2.0)
    queue.put("b")
    queue.put("c")
    clock.sleep(1.0)
    thread.join()
    assert got == [("a", 5.0), ("b", 7.0), ("c", 7.0), (None, 14.0)]


def test_turns_that_are_due_at_one_instant_are_taken_in_the_order_in_which_they_became_so() -> None:
    clock, order = VirtualClock(), list[str]()
    clock.at(5.0, lambda: order.append("last"), last=True)
    clock.at(5.0, lambda: order.append("first"))
    clock.at(5.0, lambda: order.append("second"))
    taken_back = clock.at(3.0, lambda: order.append("never"))
    taken_back.cancel()
    clock.soon(lambda: order.append("now"))
    assert not taken_back.pending
    while clock.step():
        pass
    assert order == ["now", "first", "second", "last"]
    assert clock.now() == 5.0


# ---- limiters --------------------------------------------------------------------------------------------------------


def test_a_rate_limiter_runs_on_the_clock() -> None:
    clock = VirtualClock()
    limiter = RateLimiter(RateLimit(per_minute=60, burst=2), now_fn=clock.now, sleep_fn=clock.sleep)
    for _ in range(12):
        assert limiter.acquire()
    assert clock.now() == 10.0
    assert not limiter.acquire(timeout=0.5)


def test_a_rate_limiter_on_the_clock_works_in_a_task() -> None:
    clock = VirtualClock()
    limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock.now, sleep_fn=clock.sleep)

    def task(payload: int) -> float:
        limiter.acquire()
        return clock.now()

    report = ConcurrentExecutor(task, ExecutionPolicy(concurrency=1), clock=clock).run(range(5))
    assert report.values() == [0.0, 1.0, 2.0, 3.0, 4.0]


RATE_LIMITED_IN_LINE = """
from qengine import *
from qengine.testing import VirtualClock
clock = VirtualClock()
limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock.now, sleep_fn=clock.sleep)
def task(payload):
    limiter.acquire()
    return clock.now()
print(ConcurrentExecutor(task, ExecutionPolicy(concurrency=4), clock=clock).run(range(8)).values())
"""


def run_in_a_process(code: str) -> str:
    """Run code in a fresh interpreter: one that hangs cannot be ended in any other way."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    import qengine

    environment = {**os.environ, "PYTHONPATH": str(Path(qengine.__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", code]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        return "hangs"
    return ended.stdout.strip() or ended.stderr


def test_a_rate_limiter_on_the_clock_works_in_tasks_that_wait_in_line() -> None:
    assert run_in_a_process(RATE_LIMITED_IN_LINE) == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]"


def test_a_live_limiter_on_the_clock_is_a_limit_of_runs_on_it(world: World) -> None:
    clock = world.clock
    limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock.now, sleep_fn=clock.sleep)
    assert limiter.acquire()
    report = world.run(ExecutionPolicy(limits=[limiter]), [[]] * 5)
    assert report.values() == [1.0, 2.0, 3.0, 4.0, 5.0]


# ---- one run at a time -----------------------------------------------------------------------------------------------


REFUSED = "clock is <VirtualClock at .*allowed is a VirtualClock that no other run is using"


def test_a_run_within_a_run_on_one_clock_is_refused() -> None:
    clock = VirtualClock()
    inner = ConcurrentExecutor(abs, clock=clock)
    for use in (inner.run, lambda inputs: list(inner.stream(inputs)), lambda inputs: inner.call(inputs[0])):
        report = ConcurrentExecutor(use, clock=clock).run([[1]])
        with pytest.raises(ValueError, match=REFUSED):
            report.results[0].unwrap()
    assert inner.run([-1]).values() == [1]


def test_a_run_beside_a_stream_that_is_left_open_is_refused() -> None:
    clock = VirtualClock()
    executor = ConcurrentExecutor(abs, clock=clock)
    stream = executor.stream(range(5))
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            executor.run([1])
    stream.close()
    assert executor.run([-1]).values() == [1]


def test_two_runs_at_once_on_one_clock_are_refused(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def task(payload: int) -> None:
        await clock.sleep(1.0)

    async def main() -> None:
        executor = AsyncConcurrentExecutor(task, clock=clock)
        first, second = await asyncio.gather(executor.run([1]), executor.run([2]), return_exceptions=True)
        assert not isinstance(first, BaseException) and first.all_succeeded
        assert isinstance(second, ValueError)
        stream = executor.stream([1])
        await anext(stream)
        with pytest.raises(ValueError, match=REFUSED):
            await executor.run([1])
        with pytest.raises(ValueError, match=REFUSED):
            await executor.call(1)
        await stream.aclose()
        assert (await executor.run([1])).all_succeeded

    quietly(main())
    ConcurrentExecutor(abs, clock=clock).run([1])


@pytest.mark.parametrize("clock", [time.monotonic, 5, VirtualClock], ids=repr)
def test_a_clock_of_the_wrong_kind_is_refused(clock: Any) -> None:
    with pytest.raises(TypeError, match=r"clock is .*allowed is a VirtualClock"):
        ConcurrentExecutor(abs, clock=clock)


# ---- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.not_under_coverage
def test_an_interrupted_run_leaves_a_clock_that_can_be_used_and_no_thread() -> None:
    clock = VirtualClock()

    def task(payload: int) -> int:
        for _ in range(20):
            clock.sleep(0.001)
        return payload

    def inputs(seconds: float) -> Iterator[int]:
        signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)     # not before: what has not begun has no report
        yield from range(10**6)

    executor = ConcurrentExecutor(task, FOUR, clock=clock)
    for number in range(12):
        with interrupted_after(60.0):
            with pytest.raises(KeyboardInterrupt) as caught:
                executor.run(inputs(0.003 + 0.003 * number))
        assert vars(caught.value)["report"] is executor.last_report
        assert executor.last_report is not None
        assert executor.last_report.stop_reason == "interrupted"
        assert engine_threads() == []
        before = clock.now()
        assert executor.run(range(5)).success_count == 5
        assert clock.now() - before < 1.0
        assert engine_threads() == []


INTERRUPTED = """
import signal, threading, time
from qengine import *
from qengine.testing import VirtualClock
clock = VirtualClock()
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
begin = time.monotonic()
def task(payload):
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    time.sleep(60.0)
try:
    ConcurrentExecutor(task, clock=clock).run([1])
except KeyboardInterrupt as error:
    print(error.report.stop_reason, time.monotonic() - begin)
"""


@undisturbed
def test_an_interrupt_ends_a_run_whose_task_really_waits() -> None:
    reason, seconds = run_in_a_process(INTERRUPTED).split()
    assert reason == "interrupted"
    with timely():
        assert float(seconds) < 0.2 + 0.5


def test_a_run_waits_for_a_task_that_another_thread_holds_up() -> None:
    clock, free = VirtualClock(), threading.Event()
    threading.Timer(0.05, free.set).start()

    def task(payload: int) -> float:
        free.wait()
        clock.sleep(1.0)
        return clock.now()

    assert ConcurrentExecutor(task, FOUR, clock=clock).run(range(2)).values() == [1.0, 1.0]


def test_an_interrupt_of_a_run_under_asyncio_leaves_a_clock_that_can_be_used() -> None:
    clock = VirtualClock()

    async def task(payload: int) -> int:
        for _ in range(20):
            await clock.sleep(0.001)
        return payload

    def inputs() -> Iterator[int]:      # before, there is no loop to be interrupted
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        yield from range(10**6)

    executor = AsyncConcurrentExecutor(task, FOUR, clock=clock)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(executor.run(inputs()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert asyncio.run(executor.run(range(5))).success_count == 5


def test_an_attempts_deadline_is_an_instant_of_the_clock(world: World) -> None:
    clock = VirtualClock(50.0)

    def task(payload: int) -> tuple[float, float]:
        clock.sleep(1.0)
        return current_attempt().deadline, current_attempt().remaining()

    report = ConcurrentExecutor(task, ExecutionPolicy(timeout=3.0), clock=clock).run([1])
    assert report.values() == [(53.0, 2.0)]
    assert report.started_at == 50.0
