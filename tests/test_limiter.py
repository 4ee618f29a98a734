"""The limiter: exact on a fake clock, first come first served, all or nothing, and true with real threads."""

from __future__ import annotations

import queue
import random
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from time import monotonic
from typing import Any

import pytest
from contract_support import breaches, most_in_any_window
from freezegun import freeze_time
from shared import PATIENCE, in_threads, timely, undisturbed

from qengine import ExecutionPolicy, RateLimit, RateLimiter, TaskScheduler, Window


class Clock:
    """A clock that moves when somebody sleeps on it, `late` seconds further than asked."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.late = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.late

    def limiter(self, *limits: RateLimit | Window, **options: Any) -> RateLimiter:
        return RateLimiter(*limits, now_fn=self, sleep_fn=self.sleep, **options)


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 3, 7, 1000])
@pytest.mark.parametrize("epoch", [0.0, 1e5, 1.8e9])
def test_every_permit_comes_at_its_instant_exactly(rate: float, epoch: float) -> None:
    clock = Clock(epoch)
    limiter = clock.limiter(RateLimit(per_second=rate, burst=2))
    admitted = []
    for _ in range(50):
        assert limiter.acquire()
        admitted.append(clock.now - epoch)
    assert admitted == pytest.approx([max(0, n - 1) / rate for n in range(50)], abs=1e-5)
    assert len(clock.slept) == 48       # each waits once: no polling


def test_a_full_bucket_grants_its_burst_and_not_one_more(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=1, burst=3))
    assert [limiter.try_acquire() for _ in range(5)] == [True, True, True, False, False]
    clock.now = 100.0
    assert limiter.available_tokens == 3
    assert [limiter.try_acquire() for _ in range(5)] == [True, True, True, False, False]


def test_the_last_bit_refuses_nobody() -> None:
    clock = Clock(0.1)
    limiter = clock.limiter(RateLimit(per_second=10))
    for _ in range(1000):
        assert limiter.try_acquire()
        clock.now += 0.1


@pytest.mark.parametrize(("initial", "granted"), [(None, 5), (0, 0), (2, 2), (50, 5)])
def test_a_bucket_starts_with_the_tokens_it_is_told_to(clock: Clock, initial: float | None, granted: int) -> None:
    limiter = clock.limiter(RateLimit(per_second=1, burst=5), initial=initial)
    assert sum(limiter.try_acquire() for _ in range(10)) == granted


def test_an_amount_counts_for_so_many(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=2, burst=10))
    assert limiter.try_acquire(8)
    assert not limiter.try_acquire(3)
    assert limiter.acquire(4)
    assert clock.now == pytest.approx(1.0)


def test_a_window_is_exact_at_both_ends(clock: Clock) -> None:
    limiter = clock.limiter(Window(limit=2, seconds=10))
    assert limiter.try_acquire()
    clock.now = 4.0
    assert limiter.try_acquire()
    clock.now = 9.999999
    assert not limiter.try_acquire()
    clock.now = 10.0
    assert [limiter.try_acquire(), limiter.try_acquire()] == [True, False]
    clock.now = 14.0
    assert limiter.try_acquire()


# ---- several limits --------------------------------------------------------------------------------------------------


def test_every_limit_holds_and_what_one_refuses_no_other_has_taken(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=1, burst=5), Window(limit=2, seconds=100))
    assert [limiter.try_acquire() for _ in range(4)] == [True, True, False, False]
    clock.now = 100.0
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]


def test_a_refusal_takes_nothing_of_any_unit(clock: Clock) -> None:
    limiter = clock.limiter(
        RateLimit(per_second=1, burst=5), RateLimit(per_second=100, burst=1000, unit="tokens")
    )
    assert limiter.try_acquire({"tokens": 900})
    for _ in range(50):
        assert not limiter.try_acquire({"tokens": 900})
    assert limiter.available_tokens == 4        # calls: one was used
    assert [limiter.try_acquire({"tokens": 25}) for _ in range(5)] == [True] * 4 + [False]


def test_a_number_counts_in_every_unit_and_a_mapping_is_one_call(clock: Clock) -> None:
    limits = RateLimit(per_second=1, burst=9), RateLimit(per_second=1, burst=9, unit="bytes")
    assert clock.limiter(*limits).try_acquire(9)
    limiter = clock.limiter(*limits)
    assert sum(limiter.try_acquire({"bytes": 1}) for _ in range(20)) == 9
    assert not clock.limiter(*limits).try_acquire({"calls": 10, "bytes": 1})


# ---- timeouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [RateLimit(per_second=1), Window(limit=1, seconds=1)])
def test_a_timeout_that_cannot_be_met_is_refused_at_once_with_nothing_taken(
    clock: Clock, limit: RateLimit | Window
) -> None:
    limiter = clock.limiter(limit)
    assert limiter.acquire()
    for _ in range(20):
        assert not limiter.acquire(timeout=0.99)
    assert clock.slept == []
    assert limiter.acquire(timeout=1.0)
    assert clock.now == pytest.approx(1.0)


def test_a_timeout_of_zero_takes_what_is_there(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=1))
    assert limiter.acquire(timeout=0)
    assert not limiter.acquire(timeout=0)


@pytest.mark.parametrize("limit", [RateLimit(per_second=1, burst=2), Window(limit=2, seconds=1)])
def test_what_can_never_be_had_is_an_error_to_wait_for_and_a_refusal_to_try(
    clock: Clock, limit: RateLimit | Window
) -> None:
    limiter = clock.limiter(limit)
    with pytest.raises(ValueError, match="amount is 3, allowed is at most 2 calls"):
        limiter.acquire(3)
    assert not limiter.try_acquire(3)
    assert limiter.available_tokens == 2


def test_even_an_endless_rate_never_grants_more_than_its_burst(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=float("inf"), burst=2))
    assert not limiter.try_acquire(3)
    assert all(limiter.try_acquire(2) for _ in range(100))


# ---- clock steps, late wake-ups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [RateLimit(per_second=1, burst=2), Window(limit=2, seconds=2)])
def test_a_backward_step_mints_nothing_and_locks_out_for_no_longer_than_itself(
    clock: Clock, limit: RateLimit | Window
) -> None:
    clock.now = 1000.0
    limiter = clock.limiter(limit)
    assert [limiter.try_acquire() for _ in range(2)] == [True, True]
    clock.now = 900.0
    assert not limiter.try_acquire()
    clock.now = 1000.0
    assert not limiter.try_acquire()
    clock.now = 1002.0
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]


def test_a_forward_step_releases_one_capacity(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=1, burst=2))
    clock.now = 1e6
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("late", [0.0, 0.019, 0.3, 0.9, 5.0])
def test_a_waiter_that_wakes_late_brings_no_window_above_its_rate(clock: Clock, late: float) -> None:
    limiter = clock.limiter(RateLimit(per_second=1))
    admitted = []
    rng = random.Random(1)
    for _ in range(30):
        clock.late = late if rng.random() < 0.5 else 0.0
        limiter.acquire()
        admitted.append(clock.now)
    assert not breaches(admitted, 1, 1)


def test_a_waiter_that_wakes_late_brings_no_window_above_its_limit(clock: Clock) -> None:
    limiter = clock.limiter(Window(limit=2, seconds=1))
    admitted = []
    rng = random.Random(2)
    for _ in range(30):
        clock.late = rng.choice([0.0, 0.001, 0.5])
        limiter.acquire()
        admitted.append(clock.now)
    assert most_in_any_window(admitted, 1.0 - 1e-9) <= 2


def test_a_sleep_that_ends_early_is_slept_again() -> None:
    clock = Clock()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds if seconds < 0.1 else seconds / 2

    limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock, sleep_fn=sleep)
    assert limiter.acquire() and limiter.acquire()
    assert slept == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625])
    assert clock.now == pytest.approx(1.0)


def test_random_use_on_a_fake_clock_keeps_every_window(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(60)):
        rng = random.Random(seed)
        clock = Clock(rng.choice([0.0, 1e4, 1.7e9]))
        rate, burst = rng.choice([0.5, 3.0, 40.0]), rng.randint(1, 4)
        window = Window(limit=rng.randint(1, 6), seconds=rng.choice([0.3, 2.0]))
        limiter = clock.limiter(RateLimit(per_second=rate, burst=burst), window)
        admitted = []
        for _ in range(80):
            kind = rng.random()
            if kind < 0.3:
                clock.now += rng.expovariate(rate)
            granted = limiter.try_acquire() if kind < 0.7 else limiter.acquire(timeout=rng.choice([None, 0.0, 1.0]))
            if granted:
                admitted.append(clock.now)
        assert not breaches(admitted, rate, burst, slack=1e-5), seed
        assert most_in_any_window(admitted, window.seconds - 1e-6) <= window.limit, seed


# ---- real threads ----------------------------------------------------------------------------------------------------


def test_waiters_are_served_in_the_order_they_came() -> None:
    clock, moved = Clock(), threading.Condition()

    def sleep(seconds: float) -> None:
        due = clock.now + seconds
        with moved:
            moved.wait_for(lambda: clock.now >= due)

    limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock, sleep_fn=sleep)
    assert limiter.try_acquire()
    served: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait(number: int) -> None:
        limiter.acquire()
        served.put(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in (1, 2, 3)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while limiter._line.count() < number:      # only the line itself tells when somebody has joined it
            pass
    for number in (1, 2, 3):
        with moved:
            clock.now = float(number)
            moved.notify_all()
        assert not limiter.try_acquire()        # never before one who waits, not even when a token is due
        assert served.get(timeout=PATIENCE) == number
    for thread in threads:
        thread.join()


@pytest.mark.stress
@undisturbed
def test_threads_that_wait_get_the_whole_rate_and_no_window_gets_more(stress_count: Callable[[int], int]) -> None:
    count = stress_count(120)
    rate, burst = 400.0, 3
    limiter = RateLimiter(RateLimit(per_second=rate, burst=burst))
    admitted: list[float] = []

    def take(_: int) -> None:
        for _ in range(count // 4):
            assert limiter.acquire()
            admitted.append(monotonic())

    begin = monotonic()
    in_threads(4, take)
    took = monotonic() - begin
    assert took >= (len(admitted) - burst) / rate
    with timely():
        assert took < 1.5 * len(admitted) / rate + 0.2
    assert not breaches(admitted, rate, burst)


def test_threads_that_try_share_what_there_is() -> None:
    limiter = RateLimiter(RateLimit(per_day=1, burst=1000), Window(limit=700, seconds=1e6))
    granted: list[int] = []

    def take(number: int) -> None:
        granted.extend(number for _ in range(500) if limiter.try_acquire())

    in_threads(8, take)
    assert len(granted) == 700
    assert limiter.available_tokens == 0


def test_an_engine_and_threads_share_a_live_limiter() -> None:
    limiter = RateLimiter(RateLimit(per_second=200, burst=2))
    admitted: list[float] = []
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            limiter.acquire()
            admitted.append(monotonic())

    thread = threading.Thread(target=take)
    policy = ExecutionPolicy(limits=[limiter])
    scheduler = TaskScheduler(abs, policy, on_event=lambda e: admitted.append(e.at) if e.kind == "start" else None)
    others = TaskScheduler(abs, policy, on_event=lambda e: admitted.append(e.at) if e.kind == "start" else None)
    thread.start()
    in_threads(2, lambda number: (scheduler, others)[number].run(range(20)))
    done.set()
    thread.join()
    assert not breaches(admitted, 200, 2)


@undisturbed
def test_a_limiter_whose_window_an_engine_holds_waits_for_an_outcome() -> None:
    limiter = RateLimiter(Window(limit=1, seconds=0.2))
    started, free = threading.Event(), threading.Event()

    def task(payload: int) -> None:
        started.set()
        free.wait()

    run = threading.Thread(target=TaskScheduler(task, ExecutionPolicy(limits=[limiter])).run, args=([1],))
    run.start()
    started.wait()
    assert not limiter.acquire(timeout=0.02)
    waiter = threading.Thread(target=limiter.acquire)
    waiter.start()
    free.set()
    waiter.join()
    run.join()
    with timely():
        assert not limiter.try_acquire()


@undisturbed
def test_an_interrupted_wait_leaves_no_lock_held() -> None:
    limiter = RateLimiter(RateLimit(per_hour=1))
    assert limiter.try_acquire()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def acquire_and_be_interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        limiter.acquire()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        begin = monotonic()
        with pytest.raises(KeyboardInterrupt):
            acquire_and_be_interrupted()
        with timely():
            assert monotonic() - begin < 0.3
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not limiter.try_acquire(), "it left the line, and took nothing"
    assert limiter.available_tokens == pytest.approx(0.0, abs=0.1)


@pytest.mark.stress
@pytest.mark.not_under_coverage
def test_interrupted_at_any_point_a_limiter_still_serves(stress_count: Callable[[int], int]) -> None:
    rng = random.Random(5)
    limiter = RateLimiter(RateLimit(per_second=1e5, burst=1))
    interrupts = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(stress_count(400)):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-4))
                while True:
                    limiter.acquire()
            except KeyboardInterrupt:
                interrupts += 1
            assert limiter.acquire(timeout=PATIENCE), f"after {interrupts} interrupts"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- frozen time -----------------------------------------------------------------------------------------------------


def test_a_limiter_made_under_frozen_time_obeys_it() -> None:
    with freeze_time("2026-05-21") as frozen:
        limiter = RateLimiter(RateLimit(per_minute=60, burst=2))
        assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]
        frozen.tick(1.0)
        assert [limiter.try_acquire() for _ in range(2)] == [True, False]
        assert not limiter.acquire(timeout=0.5)
        frozen.tick(3600)
        assert limiter.available_tokens == 2


@undisturbed
def test_a_run_goes_on_under_frozen_time_and_its_timestamps_are_frozen() -> None:
    with freeze_time("2026-05-21"):
        report = TaskScheduler(abs, ExecutionPolicy(limits=[RateLimit(per_second=50)])).run(range(5))
    assert report.success_count == 5
    with timely():
        assert 4 / 50 - 0.021 <= report.makespan < 0.5
    assert report.started_at == 1779321600.0


# ---- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: RateLimiter(), ValueError, "limits"),
        (lambda: RateLimiter(5), TypeError, "limits is 5"),
        (lambda: RateLimiter(RateLimiter(RateLimit(per_second=1))), ValueError, "limits"),
        (lambda: RateLimiter(RateLimit(per_second=1), now_fn=3), TypeError, "now_fn is 3"),
        (lambda: RateLimiter(RateLimit(per_second=1), initial=-1), ValueError, "initial is -1"),
        (lambda: RateLimiter(RateLimit(per_second=1)).acquire(0), ValueError, "amount is 0"),
        (lambda: RateLimiter(RateLimit(per_second=1)).acquire(True), TypeError, "amount is True"),
        (lambda: RateLimiter(RateLimit(per_second=1)).try_acquire(float("nan")), ValueError, "amount is nan"),
        (lambda: RateLimiter(RateLimit(per_second=1)).try_acquire({"tokens": 1}), ValueError, "tokens"),
        (lambda: RateLimiter(RateLimit(per_second=1)).try_acquire({"calls": -1}), ValueError, "-1"),
        (lambda: RateLimiter(RateLimit(per_second=1)).acquire(timeout=-1), ValueError, "timeout is -1"),
        (lambda: RateLimiter(RateLimit(per_second=1)).acquire(timeout="1"), TypeError, "timeout is '1'"),
    ],
)
def test_a_bad_argument_is_refused_by_name(make: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "allowed is" in str(caught.value)


def test_the_words_of_a_limiter_name_its_limits() -> None:
    limiter = RateLimiter(RateLimit(per_second=1, burst=5), Window(30, 900))
    assert repr(limiter) == (
        "<RateLimiter of 1 calls/s (burst 5), 30 calls in any 900 s: 5 available, nobody waiting>"
    )


def test_waits_grow_by_one_interval_each(clock: Clock) -> None:
    limiter = clock.limiter(RateLimit(per_second=4))
    admitted = [clock.now for _ in range(9) if limiter.acquire()]
    assert [later - sooner for sooner, later in pairwise(admitted)] == pytest.approx([0.25] * 8)


def test_a_wait_that_hangs_on_an_outcome_is_not_refused_beforehand() -> None:
    limiter = RateLimiter(Window(limit=1, seconds=0.05))
    begun, end = threading.Event(), threading.Event()
    scheduler = TaskScheduler(lambda _: begun.set() or end.wait(10), ExecutionPolicy(limits=[limiter]))
    runner = threading.Thread(target=lambda: scheduler.run([0]))
    runner.start()
    assert begun.wait(10)
    threading.Timer(0.05, end.set).start()
    assert limiter.acquire(timeout=10), "the engine held the only slot, and gave it back in time"
    runner.join()
