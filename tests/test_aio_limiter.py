"""The limiter for asyncio: exact in virtual time, first come first served, nothing lost by those who are cancelled.

`FastLoop` is an event loop whose time moves only when nothing else is to be done, so instants are exact and an hour
takes no time.  What concerns other threads and loops runs on real time, and asks for order, not for speed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import pytest
from contract_support import breaches
from shared import PATIENCE, assert_refused_at_the_door, in_threads, timely, undisturbed

from qengine import ExecutionPolicy, RateLimit, RateLimiter, TaskScheduler, Window
from qengine.aio_limiter import AsyncRateLimiter, LoopLatch

T = TypeVar("T")


class FastLoop(asyncio.SelectorEventLoop):
    """A loop on virtual time; that nothing will ever happen again is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        really_select = self._selector.select       # type: ignore[attr-defined]

        def select(timeout: float | None = None) -> Any:
            assert timeout is not None, "everybody waits for somebody else"
            self.now += timeout
            return really_select(0)

        self._selector.select = select              # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def in_loop(main: Coroutine[Any, Any, T], make: Callable[[], asyncio.AbstractEventLoop] | None = None) -> T:
    """Run on a loop of that kind; afterwards there is neither a task nor a timer."""

    async def alone() -> T:
        answer = await main
        assert asyncio.all_tasks() == {asyncio.current_task()}
        timers = getattr(asyncio.get_running_loop(), "_scheduled", [])      # uvloop does not tell
        assert [timer for timer in timers if not timer.cancelled()] == []
        return answer

    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(alone())


in_virtual_time: Callable[[Coroutine[Any, Any, T]], T] = partial(in_loop, make=FastLoop)


def now() -> float:
    """The instant of the loop that runs."""
    return asyncio.get_running_loop().time()


def on_loop(*limits: RateLimit | Window, **options: Any) -> AsyncRateLimiter:
    """A limiter on the time of the loop that runs."""
    return AsyncRateLimiter(*limits, now_fn=asyncio.get_running_loop().time, **options)


async def passes(turns: int = 3) -> None:
    """Let the other tasks go as far as they get in this instant."""
    for _ in range(turns):
        await asyncio.sleep(0)


def make_eager() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)       # type: ignore[attr-defined]
    return loop


def make_uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
    return loop


plain_loop = pytest.param(asyncio.new_event_loop, id="plain")
eager_loop = pytest.param(
    make_eager, id="eager", marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks before 3.12")
)
uvloop_loop = pytest.param(
    make_uvloop, id="uvloop", marks=pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed")
)
every_loop = pytest.mark.parametrize("make", [plain_loop, eager_loop, uvloop_loop])


@pytest.fixture(scope="module", autouse=True)
def _uvloop_has_its_pipe() -> None:
    """The first run opens a pipe that the process keeps; that is not what a test left behind."""
    if find_spec("uvloop") is not None:
        with asyncio.Runner(loop_factory=make_uvloop) as runner:
            runner.run(passes())


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 7, 1000])
@pytest.mark.parametrize("epoch", [0.0, 1.8e9])
def test_every_permit_comes_at_its_instant_exactly(rate: float, epoch: float) -> None:
    clock, slept = [epoch], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    limiter = AsyncRateLimiter(RateLimit(per_second=rate, burst=2), now_fn=lambda: clock[0], sleep_fn=sleep)

    async def main() -> list[float]:
        return [clock[0] - epoch for _ in range(50) if await limiter.acquire()]

    assert in_loop(main()) == pytest.approx([max(0, n - 1) / rate for n in range(50)], abs=1e-5)
    assert len(slept) == 48         # each waits once: no polling


def test_a_waiter_that_wakes_late_brings_no_window_above_its_rate() -> None:
    rng = random.Random(1)

    async def main() -> list[float]:
        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds + rng.choice([0.0, 0.019, 0.9, 5.0]))

        limiter = on_loop(RateLimit(per_second=1), sleep_fn=sleep)
        admitted = []

        async def take() -> None:
            assert await limiter.acquire()
            admitted.append(now())

        await asyncio.gather(*[take() for _ in range(30)])
        return admitted

    assert not breaches(in_virtual_time(main()), 1, 1)


def test_a_sleep_that_ends_early_is_slept_again() -> None:
    async def main() -> list[float]:
        slept = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            await asyncio.sleep(seconds if seconds < 0.3 else seconds / 2)

        limiter = on_loop(RateLimit(per_second=1), sleep_fn=sleep)
        assert await limiter.acquire() and await limiter.acquire()
        assert now() == pytest.approx(1.0)
        return slept

    assert in_virtual_time(main()) == pytest.approx([1.0, 0.5, 0.25])


def test_to_try_is_plain_and_what_is_there_is_had_without_a_pause() -> None:
    async def main() -> None:
        limiter = on_loop(RateLimit(per_second=1, burst=3))
        assert limiter.try_acquire()
        others: list[int] = []
        asyncio.get_running_loop().call_soon(others.append, 1)
        assert await limiter.acquire(2)
        assert others == []
        assert not limiter.try_acquire()
        assert limiter.available_tokens == 0
        await passes()

    in_virtual_time(main())


# ---- the line --------------------------------------------------------------------------------------------------------


def test_many_tasks_are_served_in_the_order_they_came() -> None:
    async def main() -> list[tuple[int, float]]:
        limiter = on_loop(RateLimit(per_second=10))
        served = []

        async def take(number: int) -> None:
            assert await limiter.acquire()
            served.append((number, now()))

        tasks = [asyncio.create_task(take(number)) for number in range(500)]
        await passes()
        await asyncio.sleep(0.55)
        assert not limiter.try_acquire()        # never before one who waits
        await asyncio.gather(*tasks)
        return served

    served = in_virtual_time(main())
    assert [number for number, _ in served] == list(range(500))
    assert [at for _, at in served] == pytest.approx([number / 10 for number in range(500)])


def test_a_small_amount_does_not_go_before_a_large_one() -> None:
    rng = random.Random(3)
    amounts = [rng.randint(1, 5) for _ in range(100)]

    async def main() -> list[tuple[int, float]]:
        limiter = on_loop(RateLimit(per_second=1, burst=5), Window(limit=7, seconds=7), initial=0)
        served = []

        async def take(number: int) -> None:
            assert await limiter.acquire(amounts[number])
            served.append((number, now()))

        await asyncio.gather(*map(take, range(100)))
        return served

    served = in_virtual_time(main())
    assert [number for number, _ in served] == list(range(100))
    used = [(at, amounts[number]) for number, at in served]
    for start, _ in used:
        assert sum(amount for at, amount in used if start <= at < start + 7 - 1e-6) <= 7
    assert all(sum(amount for at, amount in used if at <= end) <= end + 1e-6 for end, _ in used)


def test_waiting_costs_one_timer_and_a_turn_or_two_each() -> None:
    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        limiter = on_loop(RateLimit(per_second=1))
        calls = 0
        really_later, really_soon = loop.call_later, loop.call_soon

        def count(really: Callable[..., Any], *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return really(*args, **options)

        loop.call_later = partial(count, really_later)      # type: ignore[method-assign]
        loop.call_soon = partial(count, really_soon)        # type: ignore[method-assign]
        await asyncio.gather(*[limiter.acquire() for _ in range(1000)])
        return calls, round(now())

    calls, seconds = in_virtual_time(main())
    assert seconds == 999
    assert calls < 12 * 1000


# ---- timeouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [RateLimit(per_second=1), Window(limit=1, seconds=1)])
def test_a_timeout_that_cannot_be_met_is_refused_at_once_with_nothing_taken(limit: RateLimit | Window) -> None:
    async def main() -> None:
        limiter = on_loop(limit)
        assert await limiter.acquire(timeout=0)
        for _ in range(20):
            assert not await limiter.acquire(timeout=0.99)
        assert now() == 0
        first = asyncio.create_task(limiter.acquire(timeout=1.0))
        await passes()
        assert not await limiter.acquire(timeout=1.99)      # there is one before it
        assert now() == 0
        assert await limiter.acquire(timeout=2.0)
        assert now() == pytest.approx(2.0)
        assert await first

    in_virtual_time(main())


def test_who_can_no_longer_be_served_in_time_gives_up_in_time() -> None:
    async def main() -> None:
        lateness = [10.0, 0.0]

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds + lateness.pop(0))

        limiter = on_loop(RateLimit(per_second=1), sleep_fn=sleep)
        assert limiter.try_acquire()
        tasks = [asyncio.create_task(limiter.acquire(timeout=timeout)) for timeout in (None, 2.5, 3.5, 20)]
        await passes()
        for at, done in ((2.4, 0), (2.6, 1), (3.6, 2), (11.1, 3), (12.1, 4)):
            await asyncio.sleep(at - now())
            assert sum(task.done() for task in tasks) == done
        assert [task.result() for task in tasks] == [True, False, False, True]

    in_virtual_time(main())


def test_who_comes_to_the_head_too_late_gives_up_at_once() -> None:
    async def main() -> None:
        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds + 1.2)

        limiter = on_loop(RateLimit(per_second=1), sleep_fn=sleep)
        assert limiter.try_acquire()
        first, second = (asyncio.create_task(limiter.acquire(timeout=timeout)) for timeout in (None, 2.5))
        assert await first and now() == pytest.approx(2.2)
        assert not await second
        assert now() == pytest.approx(2.2)      # 2.5 was its last instant, and 3.2 would be its turn

    in_virtual_time(main())


def test_what_can_never_be_had_is_an_error_to_wait_for_and_a_refusal_to_try() -> None:
    async def main() -> None:
        limiter = on_loop(RateLimit(per_second=1, burst=2))
        with pytest.raises(ValueError, match="amount is 3, allowed is at most 2 calls"):
            await limiter.acquire(3)
        assert not limiter.try_acquire(3)
        assert limiter.available_tokens == 2

    in_virtual_time(main())


# ---- cancellation ----------------------------------------------------------------------------------------------------


def test_cancelled_at_any_instant_nobody_loses_a_permit_or_a_place(stress_count: Callable[[int], int]) -> None:
    async def main(rng: random.Random) -> None:
        limiter = on_loop(RateLimit(per_second=1))
        served: list[int] = []
        instants: list[float] = []

        async def take(number: int) -> None:
            timeout = rng.choice([None, None, 1000.0])
            if rng.random() < 0.2:
                await asyncio.wait_for(limiter.acquire(timeout=timeout), rng.choice([0.0, 1.0, 3.0, 5.5, 100.0]))
            elif rng.random() < 0.2:
                async with asyncio.timeout(rng.choice([0.0, 1.0, 3.0, 5.5, 100.0])):
                    await limiter.acquire(timeout=timeout)
            else:
                await limiter.acquire(timeout=timeout)
            served.append(number)
            instants.append(now())

        tasks = []
        for number in range(40):
            tasks.append(asyncio.create_task(take(number)))
            await passes()                      # wait_for may make a task of its own: so each joins before the next
        loop = asyncio.get_running_loop()
        for task in rng.sample(tasks, 20):      # on the instant at which a permit is due, and in between
            loop.call_later(rng.choice([rng.uniform(0, 20), float(rng.randint(0, 20))]), task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(max(0.0, 20.5 - now()))     # the last cancel has come
        await asyncio.wait(tasks)
        assert served == sorted(served)
        assert served
        # Somebody was waiting all the time, so a permit went at every instant, whoever had given up before.
        assert instants == pytest.approx([float(second) for second in range(len(served))], abs=1e-6)
        assert not limiter._line.count()

    for seed in range(stress_count(150)):
        in_virtual_time(main(random.Random(seed)))


def test_the_next_goes_on_at_once_when_the_first_is_cancelled() -> None:
    async def main() -> None:
        limiter = on_loop(RateLimit(per_second=1, burst=10), initial=0)
        large = asyncio.create_task(limiter.acquire(10))
        small = asyncio.create_task(limiter.acquire(2))
        await asyncio.sleep(5.0)
        large.cancel()
        assert await small
        assert now() == 5.0
        assert limiter.available_tokens == pytest.approx(3.0)
        with pytest.raises(asyncio.CancelledError):
            await large

    in_virtual_time(main())


@pytest.mark.parametrize("cancelled", [(0,), (1,), (2,), (0, 1), (1, 0), (1, 2), (0, 1, 2), (2, 1, 0), (0, 2)])
@pytest.mark.parametrize("turns", range(5))
def test_cancelled_in_the_tick_in_which_they_are_woken_they_pass_it_on(cancelled: tuple[int, ...], turns: int) -> None:
    async def main() -> None:
        limiter = on_loop(RateLimit(per_second=1), initial=0)
        tasks = [asyncio.create_task(limiter.acquire()) for _ in range(5)]
        await passes()

        async def cancel() -> None:
            await asyncio.sleep(1.0)            # due in the tick in which the first wakes
            await passes(turns)                 # or just after, when it has woken the second
            for number in cancelled:
                tasks[number].cancel()

        canceller = asyncio.create_task(cancel())
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await canceller
        served = answers.count(True)
        assert served >= 5 - len(cancelled)
        assert now() == pytest.approx(float(served))        # no instant was lost
        assert limiter.available_tokens == pytest.approx(0.0, abs=1e-6)

    in_virtual_time(main())


def test_a_task_that_is_cancelled_while_it_waits_for_an_outcome_leaves_nothing() -> None:
    limiter = AsyncRateLimiter(Window(limit=1, seconds=0.01))
    started, free = threading.Event(), threading.Event()

    def task(_: int) -> None:
        started.set()
        free.wait(PATIENCE)

    run = threading.Thread(target=TaskScheduler(task, ExecutionPolicy(limits=[limiter])).run, args=([1],))
    run.start()
    assert started.wait(PATIENCE)

    async def main() -> None:
        for _ in range(50):
            assert not await limiter.acquire(timeout=0.001)
        waiters = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
        await passes()
        waiters[0].cancel()
        await passes()
        assert len(limiter._limits._watchers) == 1, "one watch is enough until there is an outcome"
        free.set()                                          # the outcome comes from another thread
        assert await asyncio.gather(*waiters[1:]) == [True, True]

    in_loop(main())
    run.join()


def test_who_waits_for_several_outcomes_is_told_of_each() -> None:
    limiter = AsyncRateLimiter(Window(limit=2, seconds=0.01))
    free = [threading.Event(), threading.Event()]
    started = threading.Semaphore(0)

    def task(number: int) -> None:
        started.release()
        free[number].wait(PATIENCE)

    scheduler = TaskScheduler(task, ExecutionPolicy(limits=[limiter], concurrency=2))
    run = threading.Thread(target=scheduler.run, args=([0, 1],))
    run.start()
    assert started.acquire(timeout=PATIENCE) and started.acquire(timeout=PATIENCE)

    async def main() -> None:
        both = asyncio.create_task(limiter.acquire(2))
        await passes()
        free[0].set()
        assert await limiter.acquire(timeout=0) is False
        while limiter.available_tokens < 1:     # the first outcome is known, and its slot is free
            await asyncio.sleep(0.001)
        free[1].set()
        assert await asyncio.wait_for(both, PATIENCE)

    in_loop(main())
    run.join()


def test_a_latch_lets_one_through_for_all_that_was_before() -> None:
    async def main() -> None:
        latch = LoopLatch()
        latch.wake()
        latch.wake()
        assert await latch.wait(math.inf)
        assert not await latch.wait(2.0)
        assert now() == 2.0
        asyncio.get_running_loop().call_later(1.0, latch.wake)
        assert await latch.wait(2.0)
        assert now() == 3.0
        assert not await latch.wait(-1.0)

    in_virtual_time(main())


# ---- other loops, other threads --------------------------------------------------------------------------------------


@every_loop
def test_one_loop_after_the_other_may_use_it(make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_second=200))
    admitted: list[float] = []

    async def take() -> None:
        assert await limiter.acquire()
        admitted.append(monotonic())

    async def main() -> None:
        await asyncio.gather(*[take() for _ in range(5)])

    for _ in range(3):
        in_loop(main(), make)
    assert len(admitted) == 15
    assert not breaches(admitted, 200, 1)


@every_loop
def test_cancelled_on_every_kind_of_loop_they_lose_nothing(make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    rng = random.Random(4)
    limiter = AsyncRateLimiter(RateLimit(per_second=500))
    admitted: list[float] = []

    async def take() -> None:
        assert await limiter.acquire()
        admitted.append(monotonic())

    async def main() -> None:
        tasks = [asyncio.create_task(take()) for _ in range(60)]
        for task in rng.sample(tasks, 30):
            asyncio.get_running_loop().call_later(rng.uniform(0, 0.06), task.cancel)
        await asyncio.wait(tasks)
        await asyncio.sleep(0.07)

    in_loop(main(), make)
    assert len(admitted) >= 30
    assert not breaches(admitted, 500, 1)
    assert not limiter._line.count()


class SteppedClock:
    """A clock that the test moves, and on which threads and tasks sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.moved = threading.Condition()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        due = self.now + seconds
        with self.moved:
            assert self.moved.wait_for(lambda: self.now >= due, PATIENCE)

    async def async_sleep(self, seconds: float) -> None:
        due = self.now + seconds
        while self.now < due:
            await asyncio.sleep(0.001)

    def move(self, instant: float) -> None:
        with self.moved:
            self.now = instant
            self.moved.notify_all()


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def spawn(self, main: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(main, self.loop)

    def close(self) -> None:
        self.stop()
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    until = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < until


def test_threads_and_tasks_of_two_loops_stand_in_one_line() -> None:
    clock = SteppedClock()
    plain = RateLimiter(RateLimit(per_second=1), now_fn=clock, sleep_fn=clock.sleep, initial=0)
    limiters = [AsyncRateLimiter(plain, sleep_fn=clock.async_sleep) for _ in range(2)]
    loops = [LoopThread(), LoopThread()]
    served: queue.SimpleQueue[int] = queue.SimpleQueue()
    threads, futures = [], []

    def take(number: int) -> None:
        assert plain.acquire()
        served.put(number)

    async def async_take(limiter: AsyncRateLimiter, number: int) -> None:
        assert await limiter.acquire()
        served.put(number)

    rng = random.Random(7)
    kinds = [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 2, *[rng.randrange(3) for _ in range(10)]]
    for number, kind in enumerate(kinds):
        if kind == 2:
            threads.append(threading.Thread(target=take, args=(number,), daemon=True))
            threads[-1].start()
        else:
            futures.append(loops[kind].spawn(async_take(limiters[kind], number)))
        wait_until(lambda: plain._line.count() > number)    # noqa: B023 - asked within this round only
    for number in range(len(kinds)):
        clock.move(number + 1.0)
        assert not plain.try_acquire() and not limiters[0].try_acquire()
        assert served.get(timeout=10) == number
    for thread in threads:
        thread.join()
    for future in futures:
        future.result(10)
    for loop in loops:
        loop.close()
    assert not plain._line.count()


def test_a_cancelled_task_lets_a_thread_go_on_and_a_task_of_another_loop() -> None:
    limiter = RateLimiter(RateLimit(per_hour=3600, burst=1000), initial=0)
    shared = AsyncRateLimiter(limiter)
    one, other = LoopThread(), LoopThread()
    futures = [one.spawn(shared.acquire(1000)), other.spawn(shared.acquire(999))]
    wait_until(lambda: limiter._line.count() == 2)
    thread = threading.Thread(target=limiter.acquire, daemon=True)
    thread.start()
    wait_until(lambda: limiter._line.count() == 3)
    futures[0].cancel()
    wait_until(lambda: limiter._line.count() == 2)
    assert thread.is_alive()
    futures[1].cancel()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    for loop in (one, other):
        loop.close()


@pytest.mark.stress
@undisturbed
def test_threads_and_loops_that_wait_get_the_whole_rate_and_no_window_gets_more(
    stress_count: Callable[[int], int],
) -> None:
    count = stress_count(160) // 4
    rate, burst = 400.0, 3
    limiter = RateLimiter(RateLimit(per_second=rate, burst=burst))
    admitted: list[float] = []

    def take() -> None:
        for _ in range(count):
            assert limiter.acquire()
            admitted.append(monotonic())

    async def async_take(shared: AsyncRateLimiter) -> None:
        for _ in range(count // 4):
            assert await shared.acquire()
            admitted.append(monotonic())

    async def main() -> None:
        shared = AsyncRateLimiter(limiter)
        await asyncio.gather(*[async_take(shared) for _ in range(4)])

    def work(number: int) -> None:
        if number < 2:
            take()
        else:
            in_loop(main())

    begin = monotonic()
    in_threads(4, work)
    took = monotonic() - begin
    assert len(admitted) == 2 * count + 2 * (count // 4 * 4)
    assert took >= (len(admitted) - burst) / rate
    with timely():
        assert took < 1.5 * len(admitted) / rate + 0.2
    assert not breaches(admitted, rate, burst)


@pytest.mark.parametrize("make", [plain_loop, uvloop_loop])
@pytest.mark.parametrize("waiting", [1, 3])
@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_waiter_of_a_closed_loop_holds_up_nobody(
    make: Callable[[], asyncio.AbstractEventLoop], waiting: int, comes: str
) -> None:
    limiter = RateLimiter(RateLimit(per_second=50), initial=0)
    shared = AsyncRateLimiter(limiter)
    loop = make()
    tasks = [loop.create_task(shared.acquire()) for _ in range(waiting)]
    loop.run_until_complete(passes())
    assert limiter._line.count() == waiting
    thread = threading.Thread(target=limiter.acquire, daemon=True)
    if comes == "before":
        thread.start()
        wait_until(lambda: limiter._line.count() > waiting)
    loop.close()
    if comes == "after":
        thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert limiter.acquire(timeout=PATIENCE)
    assert not limiter._line.count()
    for task in tasks:
        task._log_destroy_pending = False       # type: ignore[attr-defined]
        task.get_coro().close()


def test_a_waiter_that_was_woken_just_before_its_loop_was_closed_holds_up_nobody() -> None:
    limiter = RateLimiter(RateLimit(per_second=50, burst=1000), initial=0)
    shared = AsyncRateLimiter(limiter)
    other = LoopThread()
    first = other.spawn(shared.acquire(1000))
    wait_until(lambda: limiter._line.count() == 1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(shared.acquire())
    loop.run_until_complete(passes())
    thread = threading.Thread(target=limiter.acquire, daemon=True)
    thread.start()
    wait_until(lambda: limiter._line.count() == 3)
    first.cancel()                              # wakes the task of the loop that stands still
    wait_until(lambda: limiter._line.count() == 2)
    loop.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    other.close()
    task._log_destroy_pending = False           # type: ignore[attr-defined]
    task.get_coro().close()


def test_a_loop_with_timers_of_its_own_kind_will_do() -> None:
    class Timer:
        __slots__ = ("cancel",)     # nothing refers to it weakly

    class OtherLoop(FastLoop):
        def call_later(self, *args: Any, **options: Any) -> Any:
            timer = Timer()
            timer.cancel = super().call_later(*args, **options).cancel      # type: ignore[attr-defined]
            return timer

    async def main() -> None:
        limiter = on_loop(ONE)
        assert await asyncio.gather(*[limiter.acquire() for _ in range(5)]) == [True] * 5
        assert now() == pytest.approx(4.0)

    in_loop(main(), OtherLoop)


def test_a_wake_for_a_closed_loop_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    limiter = AsyncRateLimiter(RateLimit(per_second=1))

    async def latch() -> Any:
        return limiter._make_latch()

    made = loop.run_until_complete(latch())
    loop.close()
    made.wake()


# ---- what it leaves alone --------------------------------------------------------------------------------------------


def test_debug_mode_has_nothing_to_say_and_no_thread_is_started(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = RateLimiter(RateLimit(per_second=500), initial=0)
    shared = AsyncRateLimiter(limiter)
    thread = threading.Thread(target=limiter.acquire, daemon=True)
    thread.start()
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)

    async def main() -> None:
        asyncio.get_running_loop().slow_callback_duration = 10
        tasks = [asyncio.create_task(shared.acquire(timeout=5)) for _ in range(20)]
        await passes()
        for task in tasks[::3]:
            task.cancel()
        await asyncio.wait(tasks)
        assert await asyncio.wait_for(shared.acquire(), PATIENCE)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*[shared.acquire() for _ in range(100)]), 0.01)

    with caplog.at_level(logging.INFO, logger="asyncio"):
        asyncio.run(main(), debug=True)
    thread.join()
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    assert started == []


def test_only_the_limiter_for_asyncio_loads_asyncio() -> None:
    ask = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qengine.limiter; print('asyncio' in sys.modules);"
        "import qengine.aio_limiter; print('asyncio' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", ask, root], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "True"]


# ---- sharing ---------------------------------------------------------------------------------------------------------


def test_a_shared_limiter_has_one_state_and_one_fork_of_it() -> None:
    limiter = RateLimiter(RateLimit(per_hour=1, burst=3))
    shared = AsyncRateLimiter(limiter)
    assert limiter.try_acquire() and shared.try_acquire()
    assert asyncio.run(shared.acquire())
    assert not limiter.try_acquire() and not shared.try_acquire()
    limiter._line.start_afresh()                # what a forked child does
    assert shared.try_acquire(3) and not limiter.try_acquire()


def test_an_engine_takes_from_it() -> None:
    limiter = AsyncRateLimiter(RateLimit(per_hour=1, burst=5))
    assert TaskScheduler(abs, ExecutionPolicy(limits=[limiter])).run(range(3)).success_count == 3
    assert limiter.available_tokens == pytest.approx(2, abs=0.1)


def test_its_words_name_it_and_its_limits() -> None:
    limiter = AsyncRateLimiter(RateLimit(per_second=1, burst=5))
    assert repr(limiter) == "<AsyncRateLimiter of 1 calls/s (burst 5): 5 available, nobody waiting>"


# ---- bad arguments ---------------------------------------------------------------------------------------------------


def plain_sleep(seconds: float) -> None:
    raise AssertionError("it must not be called")


ONE = RateLimit(per_second=1)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: AsyncRateLimiter(), ValueError, "limits"),
        (lambda: AsyncRateLimiter(5), TypeError, "limits is 5"),
        (lambda: AsyncRateLimiter(AsyncRateLimiter(ONE)), ValueError, "limits"),
        (lambda: AsyncRateLimiter(RateLimiter(ONE), ONE), ValueError, "one RateLimiter alone"),
        (lambda: AsyncRateLimiter(RateLimiter(ONE), now_fn=monotonic), ValueError, "now_fn is"),
        (lambda: AsyncRateLimiter(RateLimiter(ONE), initial=0), ValueError, "initial is 0"),
        (lambda: AsyncRateLimiter(ONE, now_fn=3), TypeError, "now_fn is 3"),
        (lambda: AsyncRateLimiter(ONE, initial=-1), ValueError, "initial is -1"),
        (lambda: AsyncRateLimiter(ONE, sleep_fn=3), TypeError, "sleep_fn is 3"),
        (lambda: AsyncRateLimiter(ONE, sleep_fn=plain_sleep), TypeError, "sleep_fn is <function plain_sleep"),
        (lambda: RateLimiter(ONE, sleep_fn=asyncio.sleep), TypeError, "sleep_fn is <function sleep"),
        (lambda: RateLimiter(ONE, sleep_fn=partial(asyncio.sleep)), TypeError, "allowed is a plain function"),
        (lambda: asyncio.run(AsyncRateLimiter(ONE).acquire(0)), ValueError, "amount is 0"),
        (lambda: asyncio.run(AsyncRateLimiter(ONE).acquire({"tokens": 1})), ValueError, "tokens"),
        (lambda: AsyncRateLimiter(ONE).try_acquire(True), TypeError, "amount is True"),
        (lambda: asyncio.run(AsyncRateLimiter(ONE).acquire(timeout=-1)), ValueError, "timeout is -1"),
        (lambda: asyncio.run(AsyncRateLimiter(ONE).acquire(timeout="1")), TypeError, "timeout is '1'"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    make: Callable[[], object], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(make, kind, words, monkeypatch)
