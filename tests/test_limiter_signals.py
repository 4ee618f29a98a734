"""The limiter under signals: what a handler raises or does, at any instant, leaves no lock held and nothing half taken.

The full 100,000 signals into one limit, into three, and as many handlers that use them, take about 3 minutes:

    QENGINE_STRESS=100000 python -m pytest tests/test_limiter_signals.py

Each runs in a process of its own, which is made to show where it hangs.  Time is the limiter's alone: it moves when
somebody sleeps.  So what was ever taken is known to the last token: it is the time that has passed, which is what a
bucket of one token a second that began empty has been given, less what is there.  A window that lasts longer than the
test, and a second bucket, must say the same.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from limiter_support import in_child
from shared import PATIENCE

from qengine import RateLimit, RateLimiter, Window
from qengine.aio_limiter import AsyncRateLimiter

pytestmark = [
    pytest.mark.stress,
    pytest.mark.not_under_coverage("a process of its own is not measured"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]
MOST = 10**6
ONE = (RateLimit(per_second=1, burst=MOST),)
THREE = (
    RateLimit(per_second=1, burst=MOST, unit="a"),
    RateLimit(per_second=1, burst=MOST, unit="b"),
    Window(limit=MOST, seconds=1e9, unit="c"),
)
one_and_three = pytest.mark.parametrize("limits", [ONE, THREE], ids=["one", "three"])


class Interrupted(BaseException):
    """What a handler raises."""


class Storm:
    """Calls `strike` by a signal at a random instant of what is done meanwhile; both may be anything.

    `twice`: every other time it calls it again soon, in the midst of what the first one has made be done.
    """

    def __init__(
        self, strike: Callable[[], object], seed: int, longest: float = 1e-4, *, twice: bool = False
    ) -> None:
        self._strike = strike
        self._rng = random.Random(seed)
        self._longest = longest
        self._twice = twice
        self.to_come = False
        self._comes_again = False
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, *_: object) -> None:
        if self.to_come:
            self.to_come = False
            if self._twice and self._rng.random() < 0.5:
                self._comes_again = True
                signal.setitimer(signal.ITIMER_REAL, self._rng.uniform(1e-6, 1e-5))
            self._strike()
        elif self._comes_again:
            self._comes_again = False
            self._strike()

    def gather(self) -> None:
        """Have one strike soon."""
        self.to_come = True
        signal.setitimer(signal.ITIMER_REAL, self._rng.uniform(1e-6, self._longest))

    def over(self, work: Callable[[], object]) -> None:
        """Do something, over and over, until one has struck."""
        try:
            self._until_struck(work)
        except Interrupted:
            pass

    def _until_struck(self, work: Callable[[], object]) -> None:
        try:
            self._work_on(work)
        finally:
            self._comes_again = False

    def _work_on(self, work: Callable[[], object]) -> None:
        """In a frame of its own: what a handler raises at the head of a loop, Python 3.13 takes past a `try`."""
        self.gather()
        while self.to_come:
            work()


def interrupt() -> None:
    raise Interrupted


def at_once(waiting: Coroutine[Any, Any, bool]) -> bool:
    """Await what need not wait; give up what does."""
    try:
        waiting.send(None)
    except StopIteration as end:
        return bool(end.value)
    except RuntimeError:        # there is no loop to wait in: somebody else took it meanwhile
        return False
    finally:
        waiting.close()
    return False


class Account:
    """A limiter, and how much was taken of it: for sure, and by what is being done just now at most."""

    def __init__(self, limits: tuple[RateLimit | Window, ...], seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.limits = limits
        self.limiter = RateLimiter(*limits, now_fn=lambda: self.now, sleep_fn=self._sleep, initial=0)
        self.shared = AsyncRateLimiter(self.limiter)
        self.taken = 0
        self.pending = 0
        self.accounts = [self]

    def another(self) -> Account:
        """Another of the same limiter, to do something while this one does."""
        other = copy.copy(self)
        other.rng = random.Random(self.rng.random())
        other.taken = 0
        self.accounts.append(other)
        return other

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self) -> None:
        """Do one of all the things that can be done."""
        amount = self.rng.randint(1, 3)
        that_may_wait = self.acquire, self.acquire_in_time, self.give_up, self.call, self.reserve_and_wait
        self.rng.choice([*that_may_wait, self.await_what_is_there, *self.that_never_wait])(amount)

    def work_that_never_waits(self) -> None:
        """Do one of those that a signal handler may do."""
        self.rng.choice(self.that_never_wait)(self.rng.randint(1, 3))

    @property
    def that_never_wait(self) -> list[Callable[[int], None]]:
        return [
            self.try_acquire, self.acquire_at_once, self.reserve_and_cancel, self.refund, self.charge, self.pause,
            self.set_limits, self.look,
        ]

    def certainly(self, amount: int, act: Callable[[], object]) -> None:
        self.pending = amount
        assert act() is not False
        self.taken += amount
        self.pending = 0

    def perhaps(self, amount: int, act: Callable[[], bool]) -> None:
        self.pending = amount
        if act():
            self.taken += amount
        self.pending = 0

    def acquire(self, amount: int) -> None:
        self.certainly(amount, lambda: self.limiter.acquire(amount))

    def acquire_in_time(self, amount: int) -> None:
        self.certainly(amount, lambda: self.limiter.acquire(amount, timeout=1e5))

    def acquire_at_once(self, amount: int) -> None:
        self.perhaps(amount, lambda: self.limiter.acquire(amount, timeout=0))

    def try_acquire(self, amount: int) -> None:
        self.perhaps(amount, lambda: self.limiter.try_acquire(amount))

    def await_what_is_there(self, amount: int) -> None:
        if self.limiter.retry_after(amount) == 0.0:
            self.perhaps(amount, lambda: at_once(self.shared.acquire(amount)))

    def call(self, _: int) -> None:
        def enter() -> None:
            with self.limiter:
                pass

        self.certainly(1, enter)

    def reserve_and_wait(self, amount: int) -> None:
        self.certainly(amount, lambda: self.limiter.reserve(amount).wait())

    def reserve_and_cancel(self, amount: int) -> None:
        self.pending = amount
        assert self.limiter.reserve(amount).cancel()
        self.pending = 0

    def give_up(self, amount: int) -> None:
        self.perhaps(amount, lambda: self.limiter.acquire(amount, timeout=0.5))

    def refund(self, amount: int) -> None:
        if sum(account.taken for account in self.accounts) >= amount + 3:       # 3 may just have been given back
            self.certainly(-amount, lambda: self.limiter.refund(amount))

    def charge(self, amount: int) -> None:
        self.certainly(amount, lambda: self.limiter.charge(amount))

    def pause(self, amount: int) -> None:
        self.limiter.pause_for(amount / 8)

    def set_limits(self, _: int) -> None:
        self.limiter.set_limits(*self.limits)

    def look(self, amount: int) -> None:
        assert self.limiter.retry_after(amount) >= 0.0
        assert self.limiter.available_tokens <= MOST
        assert repr(self.limiter)

    def check(self) -> None:
        """Everything taken is accounted for in every limit; what was interrupted has taken all or nothing."""
        for account in self.accounts[1:]:
            self.taken, account.taken = self.taken + account.taken, 0
        self.now += self.limiter.retry_after(1)         # past the places of those who were interrupted
        taken = round(self.taken_of(self.limits[0]), 6)
        assert taken in (self.taken, self.taken + self.pending), (taken, self.taken, self.pending)
        if len(self.limits) > 1:
            assert round(self.taken_of(self.limits[1]), 6) == taken
            self.check_window(round(taken))
        self.taken, self.pending = round(taken), 0

    def taken_of(self, limit: RateLimit | Window) -> float:
        """How much was taken of a bucket, by how long it takes to be full."""
        return self.limiter.retry_after(MOST if limit.unit == "calls" else {limit.unit: MOST}) - MOST + self.now

    def check_window(self, taken: int) -> None:
        assert self.limiter.retry_after({"c": MOST - taken}) == 0.0
        assert taken == 0 or self.limiter.retry_after({"c": MOST - taken + 1}) > 0.0


def in_another_thread(act: Callable[[], object]) -> None:
    """Do it there; whoever still held a lock would hold it up for ever."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@one_and_three
def test_what_a_handler_raises_leaves_no_lock_held_and_nothing_half_taken(
    limits: tuple[RateLimit | Window, ...], stress_count: Callable[[int], int]
) -> None:
    def many(count: int) -> bool:
        for start in range(0, count, 500):
            account = Account(limits, start)
            storm = Storm(interrupt, start, twice=True)
            for _ in range(min(500, count - start)):
                storm.over(account.work)
                account.check()
            in_another_thread(partial(account.acquire, 2))
            account.check()
        return True

    count = stress_count(200)
    assert in_child(partial(many, count), 60 + count / 200)


@one_and_three
def test_a_handler_may_use_the_limiter_that_it_interrupts(
    limits: tuple[RateLimit | Window, ...], stress_count: Callable[[int], int]
) -> None:
    def many(count: int) -> bool:
        for start in range(0, count, 500):
            account = Account(limits, start)
            storm = Storm(account.another().work_that_never_waits, start)
            for _ in range(min(500, count - start)):
                storm.over(account.work)
                account.check()
            in_another_thread(partial(account.acquire, 2))
            account.check()
        return True

    count = stress_count(200)
    assert in_child(partial(many, count), 60 + count / 200)


@one_and_three
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "uses it"])
def test_those_who_wait_in_threads_go_on_whatever_a_handler_does(
    limits: tuple[RateLimit | Window, ...], raises: bool, stress_count: Callable[[int], int]
) -> None:
    fast = tuple(
        RateLimit(per_second=20000, burst=5, unit=limit.unit)
        if isinstance(limit, RateLimit)
        else Window(limit=100, seconds=0.005, unit=limit.unit)
        for limit in limits
    )

    def many(count: int) -> bool:
        limiter = RateLimiter(*fast)
        done = threading.Event()
        granted = [0, 0]

        def others(number: int) -> None:
            while not done.is_set():
                assert limiter.acquire()
                granted[number] += 1

        def strike() -> None:
            if raises:
                raise Interrupted
            limiter.try_acquire()
            limiter.acquire(timeout=0)
            limiter.reserve().cancel()
            limiter.retry_after()

        threads = [threading.Thread(target=others, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        storm = Storm(strike, count, longest=5e-4, twice=raises)
        rng = random.Random(count)

        def work() -> None:
            reserved = limiter.reserve(rng.randint(1, 4))
            limiter.acquire(rng.randint(1, 4))
            rng.choice([reserved.wait, reserved.cancel])()
            limiter.acquire(timeout=rng.choice([0.0, 0.0005, 1.0]))

        for _ in range(count):
            before = sum(granted)
            storm.over(work)
            if not raises:
                work()
            while sum(granted) == before:       # a lost turn would be lost for ever
                limiter.acquire(timeout=0.001)
        done.set()
        for thread in threads:
            thread.join()
        limiter.acquire()
        return True

    count = max(40, stress_count(40) // 50)
    assert in_child(partial(many, count), 60 + count / 10)


@one_and_three
def test_a_loop_that_is_interrupted_holds_up_nobody_after_it(
    limits: tuple[RateLimit | Window, ...], stress_count: Callable[[int], int]
) -> None:
    def interrupt_loop() -> None:
        raise KeyboardInterrupt

    def many(count: int) -> bool:
        fast = [RateLimit(per_second=50000, burst=5, unit=limit.unit) for limit in limits]
        limiter = RateLimiter(*fast)
        storm = Storm(interrupt_loop, count, longest=1e-3)
        logging.disable()           # asyncio tells of the tasks that its loop was closed under
        gc.freeze()                 # of all that the tests had made before

        async def take(shared: AsyncRateLimiter, amount: int) -> None:
            while storm.to_come:
                await shared.acquire(amount)
                await asyncio.sleep(0)

        async def main() -> None:
            shared = AsyncRateLimiter(limiter)
            storm.gather()
            await asyncio.gather(*[take(shared, amount) for amount in (1, 2, 3, 4)])

        for _ in range(count):
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(main())
            except KeyboardInterrupt:
                pass
            loop.close()            # without another pass: a loop that was interrupted may have lost the turn of a task
            del loop
            gc.collect()
            assert limiter.acquire(5, timeout=PATIENCE), "somebody is left in the line"
            in_another_thread(limiter.acquire)
        return True

    count = max(10, stress_count(100) // 10)
    assert in_child(partial(many, count), 60 + count / 20)
