"""The limiter under real threads: promise 2 in every window of what is recorded, equal shares, stops and forks.

All of it at full length (8 threads for 10 s at each of the rates, with all that may happen to them), in 7 minutes:

    QENGINE_STRESS=1000 python -m pytest tests/test_limiter_threads.py

The count is in hundredths of a second.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from time import monotonic, process_time

import pytest
from contract_support import breaches, most_in_any_window
from limiter_support import Child, Recorder, breach, in_child, over_rate, over_window, take_for
from shared import PATIENCE, in_threads, timely, undisturbed

from qengine import RateLimit, RateLimiter, Window
from qengine.aio_limiter import AsyncRateLimiter

Limit = RateLimit | Window

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
RATES = {
    5: (RateLimit(per_second=5, burst=2), Window(limit=3, seconds=0.5)),
    50: (RateLimit(per_second=50), Window(limit=5, seconds=0.1)),
    500: (RateLimit(per_second=500, burst=10), Window(limit=30, seconds=0.06)),
    5000: (RateLimit(per_second=5000, burst=5), Window(limit=50, seconds=0.01)),
    50000: (RateLimit(per_second=50000, burst=100), Window(limit=200, seconds=0.004)),
}
every_rate = pytest.mark.parametrize("rate", RATES)


def combinations_of(rate: int) -> tuple[tuple[Limit, ...], ...]:
    bucket, window = RATES[rate]
    return (bucket,), (window,), (bucket, window)


@pytest.fixture
def switch_interval() -> Iterator[Callable[[float], None]]:
    """Sets the interpreter's, until the end of the test."""
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)


# ---- the judges ------------------------------------------------------------------------------------------------------


def test_a_window_above_its_rate_is_found_wherever_a_slow_search_finds_one() -> None:
    verdicts: Counter[bool] = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        rate, burst = rng.choice([0.5, 3.0, 40.0]), rng.randint(1, 3)
        gap = rng.uniform(0.8, 1.6) / rate
        at, admitted = 0.0, []
        for _ in range(12):
            at += rng.choice([0.0, gap, 2 * gap]) if burst > 1 else rng.uniform(0.9, 1.1) * gap
            admitted.append(at)
        slowly = breaches(admitted, rate, burst)
        quickly = over_rate([(at, 1) for at in admitted], rate, burst)
        assert (quickly is None) == (not slowly), (seed, slowly, quickly)
        verdicts[not slowly] += 1
    assert min(verdicts.values()) > 50


def test_a_window_above_its_limit_is_found_wherever_a_slow_search_finds_one() -> None:
    verdicts: Counter[bool] = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        admitted = [rng.randrange(40) / 4 for _ in range(12)]
        slowly = most_in_any_window(admitted, 1.0) <= 3
        assert slowly == (over_window([(at, 1) for at in admitted], 3, 1.0) is None), seed
        verdicts[slowly] += 1
    assert min(verdicts.values()) > 50


@every_rate
def test_one_admission_more_than_a_limit_allows_is_found(rate: int) -> None:
    bucket, window = RATES[rate]
    rng = random.Random(rate)
    begin = 22222.2
    most = int(window.limit)
    for limit, instants in (
        (bucket, [begin + max(0.0, (n + 1 - bucket.burst) / rate - 0.020) for n in range(5000)]),
        (window, sorted([*accumulate([window.seconds] * (5000 // most), initial=begin)] * most)),
    ):
        admitted = [(at, 1.0) for at in instants]
        assert breach(admitted, [limit]) is None
        for _ in range(5):
            assert breach([*admitted, rng.choice(admitted[:4000])], [limit]) is not None


# ---- promise 2 -------------------------------------------------------------------------------------------------------


@every_rate
@pytest.mark.stress
@pytest.mark.parametrize("switched_every", [0.005, 1e-6])
def test_threads_that_try_and_wait_bring_no_window_above_its_limits(
    rate: int, switched_every: float, stress_count: Callable[[int], int], switch_interval: Callable[[float], None]
) -> None:
    switch_interval(switched_every)
    seconds = stress_count(2) / 100
    for limits in combinations_of(rate):
        admitted = take_for(seconds, limits)
        assert admitted
        assert breach(admitted, limits) is None


@every_rate
@needs_fork
@pytest.mark.stress
@pytest.mark.not_under_coverage("a process of its own is not measured")
def test_a_process_that_was_stopped_makes_good_no_more_than_it_may(
    rate: int, stress_count: Callable[[int], int]
) -> None:
    seconds = stress_count(4) / 100
    stopped = min(1.5, seconds)
    with ExitStack() as children_end:
        children = [
            (limits, children_end.enter_context(Child(partial(take_for, seconds + stopped, limits))))
            for limits in combinations_of(rate)
        ]
        time.sleep(seconds / 2)
        for _, child in children:
            child.stop()
        time.sleep(stopped)
        for _, child in children:
            child.go_on()
        for limits, child in children:
            admitted = child.result(60 + 10 * seconds)
            assert admitted
            assert breach(admitted, limits) is None


@pytest.mark.stress
def test_who_only_tries_is_granted_nothing_for_being_late(stress_count: Callable[[int], int]) -> None:
    recorder = Recorder()
    limiter = RateLimiter(RateLimit(per_second=5000, burst=3), now_fn=recorder.now)
    end = monotonic() + stress_count(5) / 100

    def take(_: int) -> None:
        while monotonic() < end:
            if limiter.try_acquire():
                recorder.admitted()

    in_threads(8, take)
    assert recorder.admissions
    assert over_rate(recorder.admissions, 5000, 3, slack=0.0) is None


@pytest.mark.parametrize(
    "limits", [(Window(limit=2, seconds=1),), (Window(limit=2, seconds=1), RateLimit(per_second=9, burst=9))]
)
def test_a_thread_that_was_held_up_since_it_read_the_clock_mints_nothing(limits: tuple[Limit, ...]) -> None:
    clock = [0.0]
    limiter = RateLimiter(*limits, now_fn=lambda: clock[0])
    assert limiter.try_acquire(2)
    clock[0] = 1.0
    assert limiter.try_acquire()
    clock[0] = 0.9              # a reading from before that of another thread: the two of 0.0 still count
    assert not limiter.try_acquire()
    clock[0] = 1.0
    assert limiter.try_acquire()


# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.stress
@pytest.mark.not_under_coverage("a line is served by turns where those in it keep up with the rate")
@pytest.mark.parametrize("threads", [4, 100])
@undisturbed
def test_threads_that_wait_get_equal_shares_of_the_whole_rate(
    threads: int, stress_count: Callable[[int], int]
) -> None:
    rate, recorder = 1000.0, Recorder()
    limiter = RateLimiter(RateLimit(per_second=rate), now_fn=recorder.now)
    served: list[int] = []
    left: list[int] = []
    ready = threading.Barrier(threads)
    seconds = stress_count(20) / 100

    def take(number: int) -> None:
        ready.wait()
        end = monotonic() + seconds
        while limiter.acquire(timeout=max(0.0, end - monotonic())):
            recorder.admitted()
            served.append(number)
        left.append(len(served))

    cpu = process_time()
    in_threads(threads, take)
    cpu = process_time() - cpu
    instants = sorted(at for at, _ in recorder.admissions)
    took = instants[-1] - instants[0]
    all_there = max(served.index(number) for number in range(threads))
    shares = [served[all_there : min(left)].count(number) for number in range(threads)]
    print(f"{threads} threads: {len(instants) / took:.1f}/s, shares {min(shares)} to {max(shares)}, {cpu:.3f} s CPU")
    assert over_rate(recorder.admissions, rate, 1) is None
    with timely():
        assert len(instants) > 0.7 * rate * seconds
        assert max(shares) - min(shares) <= 2 + 0.05 * max(shares)
        assert cpu < 0.5 * took + 0.2, "waiting takes no time of the processor's"


# ---- forks, copies ---------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize(
    "limits", [(RateLimit(per_hour=1, burst=2),), (RateLimit(per_hour=1, burst=2), Window(limit=2, seconds=3600))]
)
def test_a_child_of_a_process_that_waits_in_line_starts_afresh(limits: tuple[Limit, ...]) -> None:
    limiter = RateLimiter(*limits)
    assert limiter.acquire(2)
    reserved = limiter.reserve()
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(reserved.wait()))
    waiter.start()

    def look() -> list[object]:
        fresh = [limiter.retry_after(2), limiter.acquire(2, timeout=0), limiter.try_acquire()]
        placed = limiter.reserve()
        return [*fresh, placed.delay > 0, placed.cancel(), reserved.cancel(), reserved.wait()]

    try:
        assert in_child(look, PATIENCE) == [0.0, True, False, True, True, False, False]
        assert not limiter.try_acquire()
    finally:
        assert reserved.cancel()
        waiter.join()
    assert answers == [False]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(
    "make",
    [
        lambda: RateLimiter(RateLimit(per_second=1)),
        lambda: RateLimiter(RateLimit(per_second=1), Window(3, 5.0)),
        lambda: AsyncRateLimiter(RateLimit(per_second=1)),
        lambda: RateLimiter(RateLimit(per_second=1)).reserve(),
        lambda: AsyncRateLimiter(RateLimit(per_second=1)).reserve(),
    ],
    ids=["of one", "of two", "for asyncio", "reservation", "reservation for asyncio"],
)
def test_a_copy_is_refused_with_the_reason(copied: Callable[[object], object], make: Callable[[], object]) -> None:
    thing = make()
    with pytest.raises(TypeError, match=type(thing).__name__) as caught:
        copied(thing)
    assert len(str(caught.value)) > 40, "it says why, and what to do instead"
