"""One limiter for many: crowds of tasks of which half give up, engines of both worlds, threads and tasks in one line.

The crowds at their full 1,000 and 2,000, and 10 s of the rest, in a minute:

    QENGINE_STRESS=1000 python -m pytest tests/test_limiter_shared.py
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from time import monotonic, process_time, sleep
from typing import Any

import pytest
from limiter_support import Recorder, breach, over_rate
from shared import in_threads, timely, undisturbed

from qengine import AsyncTaskScheduler, ExecutionPolicy, RateLimit, RateLimiter, TaskScheduler, Window
from qengine.aio_limiter import AsyncRateLimiter
from qengine.testing import VirtualClock

# ---- crowds of tasks -------------------------------------------------------------------------------------------------


def due(amounts: list[int], given_up: dict[int, float], rate: float) -> dict[int, float]:
    """When each that stays is due, of a bucket that begins empty, and once those before it are served or gone."""
    first_in_line, used, instants = 0.0, 0.0, {}
    for number, amount in enumerate(amounts):
        ready_at = max(first_in_line, (used + amount) / rate)
        gives_up_at = given_up.get(number, ready_at)
        if gives_up_at < ready_at:
            first_in_line = max(first_in_line, gives_up_at)
        else:
            instants[number] = first_in_line = ready_at
            used += amount
    return instants


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
def test_those_who_stay_get_exactly_their_due_when_half_give_up(seed: int, stress_count: Callable[[int], int]) -> None:
    rng = random.Random(seed)
    count, rate, clock = stress_count(150), 8.0, VirtualClock()
    amounts = [rng.choice([1, 1, 1, 2, 5]) for _ in range(count)]
    last = sum(amounts) / rate
    given_up = {number: rng.uniform(0.0, last / 2) for number in rng.sample(range(count), count // 2)}
    served: dict[int, float] = {}
    told = 0

    async def main() -> None:
        nonlocal told
        limiter = AsyncRateLimiter(RateLimit(per_second=rate, burst=5), now_fn=clock.now, initial=0)

        async def take(number: int) -> None:
            assert await limiter.acquire(amounts[number])
            served[number] = clock.now()

        tasks = [asyncio.create_task(take(number)) for number in range(count)]
        for at, number in sorted((at, number) for number, at in given_up.items()):
            await clock.sleep(at - clock.now())
            tasks[number].cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            told += isinstance(answer, asyncio.CancelledError)
        left = min(5.0, rate * clock.now() - sum(amounts[number] for number in served))
        assert limiter.available_tokens == pytest.approx(left), "what they gave up is there, and no more"

    asyncio.run(main())
    expected = due(amounts, given_up, rate)
    assert told == count - len(expected) > count / 4
    assert [*served] == [*expected]
    assert [*served.values()] == pytest.approx([*expected.values()], abs=1e-6)


@pytest.mark.stress
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["all stay", "half give up"])
@undisturbed
def test_a_crowd_is_served_in_order_and_on_time(share: float, stress_count: Callable[[int], int]) -> None:
    rng, recorder = random.Random(5), Recorder()
    rate, count = 1000.0, 2 * stress_count(60)
    served: list[int] = []

    async def main() -> int:
        limiter = AsyncRateLimiter(RateLimit(per_second=rate), now_fn=recorder.now)

        async def take(number: int) -> None:
            assert await limiter.acquire()
            recorder.admitted()
            served.append(number)

        tasks = [asyncio.create_task(take(number)) for number in range(count)]
        loop = asyncio.get_running_loop()
        for task in rng.sample(tasks, int(share * count)):
            loop.call_later(rng.uniform(0.0, count / rate / 2), task.cancel)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return sum(isinstance(answer, asyncio.CancelledError) for answer in answers)

    cpu = process_time()
    cancelled = asyncio.run(main())
    cpu = process_time() - cpu
    instants = [at for at, _ in recorder.admissions]
    took = instants[-1] - instants[0]
    print(f"{len(served)} of {count} served at {(len(served) - 1) / took:.1f}/s, {cpu:.3f} s CPU")
    assert served == sorted(served)
    assert len(served) == count - cancelled
    with timely():
        assert share * count / 2 < cancelled <= share * count or share == 0.0
    assert over_rate(recorder.admissions, rate, 1) is None
    with timely():
        assert took < 1.2 * len(served) / rate + 0.2


# ---- engines ---------------------------------------------------------------------------------------------------------


class RecordedLimits:
    """What an engine takes from, each admission recorded at what the limiter's own clock said."""

    def __init__(self, limits: Any, recorder: Recorder) -> None:
        self._limits = limits
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._limits, name)

    def try_take(self, amount: Any, now: float, *options: Any) -> float:
        ready_at: float = self._limits.try_take(amount, now, *options)
        if ready_at <= now:
            self._recorder.admitted()
        return ready_at

    def take_call(self, now: float, slack: float) -> bool:
        taken: bool = self._limits.take_call(now, slack)
        if taken:
            self._recorder.admitted()
        return taken


class RecordedLimiter(RateLimiter):
    """A limiter that records what engines take of it."""

    def __init__(self, *limits: RateLimit | Window) -> None:
        self.recorder = Recorder()
        super().__init__(*limits, now_fn=self.recorder.now)

    def as_limit_set(self) -> Any:
        return RecordedLimits(super().as_limit_set(), self.recorder)


@pytest.mark.stress
@pytest.mark.parametrize(
    "limits",
    [
        (RateLimit(per_second=500, burst=3),),
        (Window(limit=20, seconds=0.05),),
        (RateLimit(per_second=500, burst=3), Window(limit=20, seconds=0.05)),
    ],
    ids=["rate", "window", "both"],
)
def test_engines_of_both_worlds_are_together_within_the_limits(
    limits: tuple[RateLimit | Window, ...], stress_count: Callable[[int], int]
) -> None:
    limiter = RecordedLimiter(*limits)
    seconds = stress_count(10) / 100
    end = monotonic() + seconds
    done = {"threads": 0, "loop": 0, "by hand": 0}

    def inputs(kind: str) -> Any:
        while monotonic() < end:
            yield kind

    def work(kind: str) -> None:
        sleep(0.001)
        done[kind] += 1

    async def async_work(kind: str) -> None:
        await asyncio.sleep(0.001)
        done[kind] += 1

    policy = ExecutionPolicy(limits=[limiter], concurrency=4, lookahead=4)

    def run(number: int) -> None:
        if number == 0:
            TaskScheduler(work, policy).run(inputs("threads"))
        elif number == 1:
            asyncio.run(AsyncTaskScheduler(async_work, policy).run(inputs("loop")))
        else:
            while limiter.acquire(timeout=max(0.0, end - monotonic())):
                limiter.recorder.admitted()
                done["by hand"] += 1

    in_threads(3, run)
    print(done)
    assert len(limiter.recorder.admissions) == sum(done.values())
    assert breach(limiter.recorder.admissions, limits) is None
    assert min(done.values()) > 0 or seconds < 1, "each goes on, though it may take its time"


# ---- threads and tasks -----------------------------------------------------------------------------------------------


@pytest.mark.stress
@pytest.mark.parametrize(
    "limits", [(RateLimit(per_second=1000),), (RateLimit(per_second=1000), Window(limit=10, seconds=0.01))]
)
@undisturbed
def test_threads_and_tasks_share_a_line_and_its_rate_by_turns(
    limits: tuple[RateLimit | Window, ...], stress_count: Callable[[int], int]
) -> None:
    recorder = Recorder()
    limiter = RateLimiter(*limits, now_fn=recorder.now)
    shares = [0] * 6
    ready = threading.Barrier(4)
    seconds = stress_count(12) / 100

    def take(number: int) -> None:
        ready.wait()
        end = monotonic() + seconds
        if number < 3:
            while limiter.acquire(timeout=max(0.0, end - monotonic())):
                recorder.admitted()
                shares[number] += 1
            return

        async def async_take(number: int) -> None:
            while await AsyncRateLimiter(limiter).acquire(timeout=max(0.0, end - monotonic())):
                recorder.admitted()
                shares[number] += 1

        async def main() -> None:
            await asyncio.gather(*[async_take(number) for number in (3, 4, 5)])

        asyncio.run(main())

    in_threads(4, take)
    print(shares)
    assert breach(recorder.admissions, limits) is None
    with timely():
        assert sum(shares) > 0.6 * 1000 * seconds
        assert max(shares) - min(shares) <= 3 + 0.1 * max(shares), "first come, first served"


@undisturbed
def test_an_engine_goes_before_nobody_who_stood_in_the_line_when_it_asked() -> None:
    limiter = RateLimiter(RateLimit(per_second=200, burst=5), initial=0)
    waited: list[float] = []

    def wait(number: int) -> None:
        if number == 0:
            TaskScheduler(abs, ExecutionPolicy(concurrency=8, limits=[limiter])).run(range(200))
            return
        sleep(0.1)
        begun = monotonic()
        assert limiter.acquire(5)
        waited.append(monotonic() - begun)

    in_threads(2, wait)
    with timely():
        assert waited[0] < 0.5, "the engine alone takes a second"
