"""Limits and quotas in a store, taken by the engine: in threads and asyncio, mostly on virtual time.

Another process is another store of the same file, with a limiter or a quota of its own; real ones are at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from limiter_support import Child, over_rate, over_window
from shared import in_threads, timely, undisturbed, until

from qengine import (
    AsyncTaskScheduler,
    BreakerPolicy,
    BudgetExceededError,
    CancellationToken,
    ExecutionPolicy,
    Journal,
    Quota,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskScheduler,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.core.lane import Feed, FeedKind
from qengine.core.supply import Permit, Supply
from qengine.errors import StorageError
from qengine.store import SqliteStore
from qengine.testing import VirtualClock

WORLDS = ("threads", "asyncio")
Open = Callable[[], SqliteStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the file once more, as another process would."""
    stores: list[SqliteStore] = []

    def open_store() -> SqliteStore:
        stores.append(SqliteStore(tmp_path / "shared.db"))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


class Server:
    """What is called: notes when each call began and ended, by the run's clock.

    `answer` is called with the payload at the end of each call, and says what it comes to.
    """

    def __init__(
        self, clock: VirtualClock, seconds: float = 0.0, answer: Callable[[Any], Any] = lambda payload: payload
    ) -> None:
        self.clock = clock
        self.seconds = seconds
        self.answer = answer
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.payloads: list[Any] = []

    def _begin(self, payload: Any) -> None:
        self.begun.append(self.clock.now())
        self.payloads.append(payload)

    def _end(self, payload: Any) -> Any:
        self.ended.append(self.clock.now())
        return self.answer(payload)

    def call(self, payload: Any) -> Any:
        self._begin(payload)
        self.clock.sleep(self.seconds)
        return self._end(payload)

    async def call_later(self, payload: Any) -> Any:
        self._begin(payload)
        await self.clock.sleep(self.seconds)
        return self._end(payload)

    def fn(self, world: str) -> Callable[[Any], Any]:
        return self.call if world == "threads" else self.call_later

    def run(self, world: str, policy: ExecutionPolicy, inputs: Any, **options: Any) -> RunReport[Any, Any]:
        """Run inputs in a world."""
        return run(world, self.fn(world), policy, inputs, clock=self.clock, **options)

    @property
    def admissions(self) -> list[tuple[float, float]]:
        return [(at, 1.0) for at in self.begun]


def run(
    world: str, what: Any, policy: ExecutionPolicy, inputs: Any, cancel: CancellationToken | None = None, **options: Any
) -> RunReport[Any, Any]:
    if world == "threads":
        return TaskScheduler(what, policy, **options).run(inputs, cancel=cancel)

    async def main() -> RunReport[Any, Any]:
        return await AsyncTaskScheduler(what, policy, **options).run(inputs, cancel=cancel)

    return asyncio.run(main())


def statuses(report: RunReport[Any, Any]) -> list[str]:
    return [result.reason or result.status.value for result in report.results]


def left_behind(path: Path) -> list[Any]:
    """What is reserved in a file, or promised to somebody who has not begun."""
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT 'hold', id, amount FROM quota_holds").fetchall()
        found += connection.execute("SELECT 'period', key, reserved FROM quota_periods WHERE reserved").fetchall()
        found += connection.execute("SELECT 'slot', name, ends_at FROM limit_slots WHERE NOT begun").fetchall()
    connection.close()
    return found


# ---- rates and windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_a_rate_holds_and_is_used_over_all_lives(opened: Open, clock: VirtualClock, world: str) -> None:
    server = Server(clock, 1.7)
    for _ in range(3):
        limiter = RateLimiter(RateLimit(per_second=10, burst=2), store=opened(), key="api", now_fn=clock.now)
        report = server.run(world, ExecutionPolicy(concurrency=32, limits=[limiter]), range(25))
        assert report.all_succeeded
        assert over_rate(server.admissions, 10, 2) is None
        assert report.makespan <= 24 / 10 * 1.005 + 1.7
    assert len(server.begun) == 75


@pytest.mark.parametrize("world", WORLDS)
def test_concurrency_that_does_not_suffice_loses_no_slot(opened: Open, clock: VirtualClock, world: str) -> None:
    limiter = RateLimiter(RateLimit(per_second=10), store=opened(), key="api", now_fn=clock.now)
    server = Server(clock, 1.0)
    report = server.run(world, ExecutionPolicy(concurrency=8, limits=[limiter]), range(80))
    assert over_rate(server.admissions, 10, 1) is None
    assert report.makespan <= 10 * 1.0 + 0.8


@pytest.mark.parametrize("world", WORLDS)
def test_the_slot_of_a_window_runs_from_the_outcome(opened: Open, clock: VirtualClock, world: str) -> None:
    limiter = RateLimiter(Window(2, 10.0), store=opened(), key="api", now_fn=clock.now)
    server = Server(clock, 3.0)
    report = server.run(world, ExecutionPolicy(concurrency=4, limits=[limiter]), range(8))
    assert report.all_succeeded
    assert all(begun >= ended + 10.0 - 1e-6 for begun, ended in zip(server.begun[2:], server.ended, strict=False))
    assert report.makespan == pytest.approx(3 * 13.0 + 3.0, abs=0.1)


def test_another_process_learns_of_the_outcome_though_its_source_has_nothing_more_to_do(
    opened: Open, clock: VirtualClock
) -> None:
    mine, yours = (RateLimiter(Window(1, 10.0), store=opened(), key="api", now_fn=clock.now) for _ in range(2))
    a, b = Server(clock, 4.0), Server(clock, 9.0, lambda payload: yours.retry_after())
    sources = [Source("a", a.call, limits=[mine]), Source("b", b.call)]
    report = TaskScheduler(sources, clock=clock).run([Task(0, routes=("a",)), Task(1, routes=("b",))])
    assert report.results[1].value == pytest.approx(5.0, abs=0.01)  # from 4 to 14, at 9



def test_another_process_learns_of_a_failure_before_it_is_tried_again(opened: Open, clock: VirtualClock) -> None:
    mine, yours = (RateLimiter(Window(2, 10.0), store=opened(), key="api", now_fn=clock.now) for _ in range(2))

    def call(payload: str) -> float:
        clock.sleep(4.0 if payload == "a" else 9.0)
        if payload == "a":
            raise TransientError("down")
        return yours.retry_after(2)

    retry = RetryPolicy(max_attempts=2, backoff=30.0, jitter="none")
    scheduler = TaskScheduler(call, ExecutionPolicy(limits=[mine], retry=retry), lane_by=str, clock=clock)
    assert scheduler.run(["a", "b"]).results[1].value == pytest.approx(5.0)


def test_a_permit_is_used_in_its_time_or_not_at_all() -> None:
    is_current = [True]
    feed = Feed(FeedKind.SUPPLY, tuple, tuple, label="store")
    supply = Supply(feed, lambda: None, is_current=lambda: is_current[0])

    def ask(amount: int, now: float) -> tuple[float, Any]:
        supply.wanted = None
        return supply.ready_at(amount, now), supply.wanted

    assert ask(1, 0.0) == (math.inf, 1)
    supply.brought(Permit(1, 2.0, 5.0, True), 0.0)
    assert ask(1, 1.0) == (2.0, None)
    feed.pulling = True  # to tell something
    assert ask(1, 1.0) == (2.0, None)
    feed.pulling = False
    assert ask(1, 5.0) == (5.0, None)
    assert ask(1, 5.1) == (math.inf, 1)
    assert ask(2, 3.0) == (math.inf, 2)
    is_current[0] = False
    assert ask(1, 3.0) == (math.inf, 1)


def test_who_was_woken_late_loses_nothing(opened: Open) -> None:
    now = [0.0]
    line = RateLimiter(RateLimit(per_second=10), store=opened(), key="api", now_fn=lambda: now[0]).stored_line
    assert line is not None
    dues = []
    for at in (0.0, 0.11, 0.22):
        now[0] = at
        slot = line.fetch(was_held_up=True)
        assert slot is not None and slot.is_begun
        dues.append(slot.good_until / 1e9)
    assert dues == pytest.approx([0.02, 0.12, 0.225])
    assert line.due_at(1, 0.22) == pytest.approx(0.305)


@pytest.mark.parametrize(("world", "burst"), [("threads", 3), ("asyncio", 1)])
def test_lanes_take_turns_at_one_limiter(opened: Open, clock: VirtualClock, world: str, burst: int) -> None:
    limiters = [
        RateLimiter(RateLimit(per_second=10, burst=burst), store=opened(), key="api", now_fn=clock.now) for _ in "abc"
    ]
    servers = [Server(clock, 0.05) for _ in limiters]
    sources = [
        Source(name, server.fn(world), limits=[limiter], concurrency=8)
        for name, server, limiter in zip("abc", servers, limiters, strict=True)
    ]
    tasks = [Task(number, routes=("abc"[number % 3],)) for number in range(60)]
    report = run(world, sources, ExecutionPolicy(), tasks, clock=clock)
    everything = [admission for server in servers for admission in server.admissions]
    assert over_rate(everything, 10, burst) is None
    assert len(everything) == 60 and report.makespan <= (60 - burst) / 10 * 1.005 + 0.05
    for server in servers:
        assert 12 <= sum(at < 4.0 for at in server.begun) <= 15


def test_the_lanes_of_keys_share_a_limiter(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(RateLimit(per_second=20), store=opened(), key="api", now_fn=clock.now)
    server = Server(clock, 0.5)
    policy = ExecutionPolicy(concurrency=2, limits=[limiter])
    report = TaskScheduler(server.call, policy, lane_by=lambda item: item % 30, clock=clock).run(range(90))
    assert report.all_succeeded and over_rate(server.admissions, 20, 1) is None
    assert report.makespan <= 89 / 20 * 1.005 + 0.5


@pytest.mark.parametrize("world", WORLDS)
def test_several_stores_keys_and_units(tmp_path: Path, clock: VirtualClock, world: str) -> None:
    stores = [SqliteStore(tmp_path / name) for name in ("one.db", "two.db")]
    calls = RateLimiter(RateLimit(per_second=10, burst=5), store=stores[0], key="calls", now_fn=clock.now)
    tokens = RateLimiter(
        RateLimit(per_second=100, burst=50, unit="tokens"), Window(30, 5.0), store=stores[1], key="t", now_fn=clock.now
    )
    sizes = random.Random(1).choices([5, 10, 40], k=60)
    server = Server(clock, 0.2)
    policy = ExecutionPolicy(concurrency=8, limits=[calls, tokens])
    report = server.run(world, policy, [Task(size, amount={"calls": 1, "tokens": size}) for size in sizes])
    assert report.all_succeeded
    assert over_rate(server.admissions, 10, 5) is None
    assert over_window(server.admissions, 30, 5.0) is None
    assert over_rate(zip(server.begun, server.payloads, strict=True), 100, 50) is None
    assert report.makespan <= max((sum(sizes) - 50) / 100, 59 / 10) * 1.2 + 1
    for store in stores:
        store.close()


@pytest.mark.parametrize(("world", "used"), [("threads", 1), ("asyncio", 30)])
def test_what_a_call_really_used_is_settled(opened: Open, clock: VirtualClock, world: str, used: int) -> None:
    mine, yours = (
        RateLimiter(RateLimit(per_second=10, burst=20, unit="tokens"), store=opened(), key="t", now_fn=clock.now)
        for _ in range(2)
    )
    server = Server(clock, 0.0, lambda payload: current_attempt().record(tokens=used))
    report = server.run(world, ExecutionPolicy(limits=[mine]), [Task(0, amount={"tokens": 10})])
    assert report.total_tokens == used
    assert yours.available_tokens == pytest.approx(20 - used)


@pytest.mark.parametrize("world", WORLDS)
def test_an_amount_that_can_never_be_had_is_refused(opened: Open, clock: VirtualClock, world: str) -> None:
    server = Server(clock)
    limits: list[RateLimit | Window] = [RateLimit(per_second=10, burst=5), Window(5, 10.0)]
    for number, limit in enumerate(limits):
        limiter = RateLimiter(limit, store=opened(), key=str(number), now_fn=clock.now)
        stop = StopConditions(timeout=50)
        inputs = [Task(0, amount=6), Task(1), Task(2, amount={"parsecs": 12})]
        report = server.run(world, ExecutionPolicy(limits=[limiter], stop=stop), inputs)
        assert statuses(report) == ["error", "succeeded", "error"]
        assert "at most 5 calls" in str(report.results[0].error)


@pytest.mark.parametrize("rates", [(10, 5), (5, 5), (10, 9)])
def test_two_limits_at_which_several_processes_stand_are_used(
    opened: Open, clock: VirtualClock, rates: tuple[float, float]
) -> None:
    servers = [Server(clock, 0.3) for _ in range(3)]
    sources = [
        Source(
            name, server.call, concurrency=8,
            limits=[
                RateLimiter(RateLimit(per_second=rate), store=opened(), key=key, now_fn=clock.now)
                for key, rate in zip("xy", rates, strict=True)
            ],
        )
        for name, server in zip("abc", servers, strict=True)
    ]
    report = TaskScheduler(sources, clock=clock).run([Task(n, routes=("abc"[n % 3],)) for n in range(60)])
    everything = [admission for server in servers for admission in server.admissions]
    assert over_rate(everything, min(rates), 1) is None
    assert report.makespan <= 59 / min(rates) * 1.01 + 0.3


def test_who_has_two_limits_does_not_starve_among_those_who_have_one(opened: Open, clock: VirtualClock) -> None:
    servers = [Server(clock, 0.3) for _ in range(6)]
    stop = StopConditions(timeout=10.0)

    def limits(number: int) -> list[RateLimiter]:
        rates = {"x": 10, "y": 9} if number >= 4 else {"x": 10}
        return [
            RateLimiter(RateLimit(per_second=rate), store=opened(), key=key, now_fn=clock.now)
            for key, rate in rates.items()
        ]

    sources = [
        Source(str(number), server.call, concurrency=8, limits=limits(number)) for number, server in enumerate(servers)
    ]
    tasks = [Task(number, routes=(str(number % 6),)) for number in range(300)]
    TaskScheduler(sources, ExecutionPolicy(stop=stop), clock=clock).run(tasks)
    shares = [len(server.begun) for server in servers]
    assert sum(shares) >= 80 and min(shares) >= 0.5 * max(shares)


def test_a_permit_that_nobody_needs_any_more_goes_back(opened: Open, clock: VirtualClock) -> None:
    """A task is tried again, waits for its slot, and is over its time: another source goes on for long."""
    mine, yours = shared_quota(opened(), 2), shared_quota(opened(), 2)
    limiter = RateLimiter(RateLimit(per_minute=1), store=opened(), key="api", now_fn=clock.now)
    seen: list[float] = []

    def answer(payload: int) -> None:
        if payload == 0:
            raise TransientError("down")
        seen.append(yours.remaining)

    retry = RetryPolicy(max_attempts=3, backoff=1.0, jitter="none", timeout=10.0)
    sources = [
        Source("a", Server(clock, 1.0, answer).call, limits=[limiter], quota=mine, retry=retry),
        Source("b", Server(clock, 30.0, answer).call),
    ]
    report = TaskScheduler(sources, clock=clock).run([Task(0, routes=("a",)), Task(1, routes=("b",))])
    assert report.results[0].attempts == 1 and seen == [1.0]


# ---- beside what is not shared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_a_local_rate_beside_holds_and_costs_no_shared_slot(opened: Open, clock: VirtualClock, world: str) -> None:
    mine, yours = (
        RateLimiter(RateLimit(per_second=10, burst=40), store=opened(), key="api", now_fn=clock.now) for _ in range(2)
    )
    server = Server(clock, 0.0)
    policy = ExecutionPolicy(concurrency=4, limits=[RateLimit(per_second=20), mine, Window(25, 1.0)])
    report = server.run(world, policy, range(40))
    assert report.all_succeeded and over_rate(server.admissions, 20, 1) is None
    assert report.makespan <= 39 / 20 * 1.01
    assert yours.available_tokens == pytest.approx(40 - 40 + 10 * clock.now(), abs=0.5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_budget_is_used_to_the_last_call_and_no_further(opened: Open, clock: VirtualClock, world: str) -> None:
    mine, yours = (
        RateLimiter(RateLimit(per_hour=1, burst=50), store=opened(), key="api", now_fn=clock.now) for _ in range(2)
    )
    server = Server(clock, 1.0)
    report = server.run(world, ExecutionPolicy(concurrency=64, limits=[mine], budget=10), range(70))
    assert len(server.begun) == 10 and report.skipped_count == 60
    assert yours.available_tokens == pytest.approx(40, abs=0.01)


def test_an_open_breaker_takes_nothing_from_the_store(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(RateLimit(per_hour=1, burst=50), store=opened(), key="api", now_fn=clock.now)
    answers = iter([TransientError("down")] * 3 + ["up"] * 10)

    def answer(payload: int) -> str:
        said = next(answers)
        if isinstance(said, str):
            return said
        raise said

    server = Server(clock, 0.1, answer)
    breaker = BreakerPolicy(failures=2, reset_after=30.0)
    report = server.run("threads", ExecutionPolicy(concurrency=1, limits=[limiter], breaker=breaker), range(5))
    assert report.success_count == 2 and report.failure_count == 3
    assert limiter.available_tokens == pytest.approx(45, abs=0.1)
    assert server.begun[2] >= server.ended[1] + 30.0 and server.begun[3] >= server.ended[2] + 30.0


def test_a_probe_waits_for_its_slot_and_is_made(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(RateLimit(per_minute=1), store=opened(), key="api", now_fn=clock.now)

    def answer(payload: int) -> int:
        if len(server.begun) == 1:
            raise TransientError("down")
        return payload

    server = Server(clock, 0.0, answer)
    policy = ExecutionPolicy(
        concurrency=2, limits=[limiter], breaker=BreakerPolicy(failures=1, reset_after=10.0),
        retry=RetryPolicy(max_attempts=2, jitter="none"),
    )
    report = server.run("threads", policy, range(3))
    assert report.all_succeeded and report.makespan == pytest.approx(180.0, abs=0.1)


@pytest.mark.parametrize("world", WORLDS)
def test_batches_retries_and_priorities(opened: Open, clock: VirtualClock, world: str) -> None:
    limiter = RateLimiter(RateLimit(per_second=1), store=opened(), key="api", now_fn=clock.now)
    failed: set[int] = set()

    def answer(payload: int) -> int:
        if payload == 3 and payload not in failed:
            failed.add(payload)
            raise TransientError("once more")
        return payload

    server = Server(clock, 0.1, answer)
    policy = ExecutionPolicy(
        concurrency=4, limits=[limiter], batch_size=2, batch_backoff=5.0, retry=RetryPolicy(max_attempts=2)
    )
    report = server.run(world, policy, [Task(number, priority=-number) for number in range(6)])
    assert report.all_succeeded and report.retries == 1
    assert server.payloads == [5, 4, 3, 3, 2, 1, 0]
    assert over_rate(server.admissions, 1, 1) is None
    assert server.begun[2] >= server.ended[1] + 5.0 and server.begun[5] >= server.ended[4] + 5.0


# ---- quotas ----------------------------------------------------------------------------------------------------------


def shared_quota(store: SqliteStore, limit: float, unit: str = "calls", **more: Any) -> Quota:
    return Quota(limit, unit=unit, store=store, key=f"of {unit}", **more)


@pytest.mark.parametrize("world", WORLDS)
def test_a_quota_is_used_to_the_last_call_by_all_lives(
    opened: Open, clock: VirtualClock, world: str, tmp_path: Path
) -> None:
    server = Server(clock, 1.0)
    taken = [
        server.run(world, ExecutionPolicy(concurrency=8, quota=shared_quota(opened(), 25)), range(10)).success_count
        for _ in range(4)
    ]
    assert taken == [10, 10, 5, 0]
    quota = shared_quota(opened(), 25)
    assert (quota.used, quota.reserved, left_behind(tmp_path / "shared.db")) == (25, 0, [])


def test_it_ends_in_the_middle_and_a_call_says_so(opened: Open) -> None:
    quota = shared_quota(opened(), 3)
    scheduler = TaskScheduler(str, ExecutionPolicy(quota=quota))
    assert statuses(scheduler.run(range(2))) == ["succeeded"] * 2
    assert scheduler.call(2) == "2"
    with pytest.raises(BudgetExceededError):
        scheduler.call(3)
    assert statuses(scheduler.run([4])) == ["budget_exhausted"]


SIZES: Sequence[tuple[str, float, Sequence[int]]] = [
    ("tokens", 100, [90, 50, 5]),
    ("tokens", 100, [80, 80, 80, 80]),
    ("calls", 3, [1, 1, 1, 1]),
    ("cost", 0.5, [10, 30, 10, 20]),
    ("tokens", 10, [20, 5]),
]


@pytest.mark.parametrize("case", range(len(SIZES)))
@pytest.mark.parametrize("recorded", [None, 10, 70])
def test_it_is_taken_as_one_without_a_store(opened: Open, case: int, recorded: int | None) -> None:
    unit, limit, sizes = SIZES[case]
    world, concurrency = WORLDS[case % 2], 3 if recorded == 10 else 1

    def answer(size: int) -> None:
        if recorded is not None:
            current_attempt().record(tokens=recorded)

    found = []
    for quota in (Quota(limit, unit=unit), shared_quota(opened(), limit, unit)):
        server = Server(VirtualClock(), 1.0, answer)
        source = Source("a", server.fn(world), quota=quota, concurrency=concurrency, cost={"tokens": 0.01})
        tasks = [Task(size, amount={"tokens": size}) for size in sizes]
        report = run(world, source, ExecutionPolicy(), tasks, clock=server.clock)
        found.append((statuses(report), server.begun, quota.used, quota.reserved, report.usage))
    assert found[0] == found[1]


def test_a_source_that_is_free_goes_on_when_the_cost_is_used_up(opened: Open) -> None:
    quota = shared_quota(opened(), 1, "cost")
    with quota.reserve():
        pass
    report = TaskScheduler([Source("free", str)], ExecutionPolicy(quota=quota)).run(range(3))
    assert report.all_succeeded


@pytest.mark.parametrize("world", WORLDS)
def test_a_source_whose_quota_is_empty_hands_on_at_once(opened: Open, clock: VirtualClock, world: str) -> None:
    first, second = Server(clock, 30.0), Server(clock, 1.0)
    sources = [
        Source("first", first.fn(world), quota=shared_quota(opened(), 2), concurrency=4),
        Source("second", second.fn(world), concurrency=4),
    ]
    tasks = [Task(number, routes=("first", "second")) for number in range(6)]
    report = run(world, sources, ExecutionPolicy(), tasks, clock=clock)
    assert report.all_succeeded and report.by_source["first"].success_count == 2
    assert max(second.begun) < 2.0
    trail = next(result.trail for result in report.results if result.source == "second" and len(result.trail) > 1)
    assert (trail[0].source, trail[0].reason) == ("first", "budget_exhausted")


def test_what_another_process_gives_back_is_found(opened: Open, clock: VirtualClock) -> None:
    mine, yours = shared_quota(opened(), 2), shared_quota(opened(), 2)
    reserved = yours.reserve(2)
    server = Server(clock)
    scheduler = TaskScheduler(server.call, ExecutionPolicy(quota=mine), clock=clock)
    assert statuses(scheduler.run([0])) == ["budget_exhausted"]
    reserved.commit(0)
    assert statuses(scheduler.run([1, 2, 3])) == ["succeeded", "succeeded", "budget_exhausted"]


@pytest.mark.parametrize("world", WORLDS)
def test_each_call_counts_on_its_own_day(opened: Open, world: str) -> None:
    clock = VirtualClock(start=86400.0 - 2.5)
    server = Server(clock)
    limiter = RateLimiter(RateLimit(per_second=1), store=opened(), key="api", now_fn=clock.now)
    quotas = [shared_quota(opened(), 4, now_fn=clock.now) for _ in range(2)]
    sources = [Source(f"s{n}", server.fn(world), limits=[limiter], quota=quota) for n, quota in enumerate(quotas)]
    run(world, sources, ExecutionPolicy(), [Task(n, routes=(f"s{n % 2}",)) for n in range(12)], clock=clock)
    calls = server.begun
    yesterday, today = sum(at < 86400 for at in calls), sum(86400 <= at < 2 * 86400 for at in calls)
    assert (yesterday, today) == (3, 4)
    assert quotas[0].used == 4


def test_what_was_fetched_yesterday_is_not_used_today(opened: Open) -> None:
    """Each call begins the day after its permit was fetched, if that was fetched ahead."""
    now = [86400.0 * 10 - 1]
    quota = shared_quota(opened(), 5, now_fn=lambda: now[0])
    held = threading.Event()

    def call(payload: int) -> int:
        if payload == 0:
            held.set()
            until(lambda: now[0] > 86400.0 * 10)
        return payload

    scheduler = TaskScheduler(call, ExecutionPolicy(concurrency=1, quota=quota))
    thread = threading.Thread(target=lambda: scheduler.run(range(3)))
    thread.start()
    held.wait()
    now[0] += 2
    thread.join()
    assert (quota.used, quota.reserved) == (2, 0)


@pytest.mark.parametrize("world", WORLDS)
def test_a_pause_holds_everywhere(opened: Open, clock: VirtualClock, world: str) -> None:
    mine, yours = (
        RateLimiter(RateLimit(per_second=10, burst=5), store=opened(), key="api", now_fn=clock.now) for _ in range(2)
    )

    def answer(payload: str) -> float:
        if payload == "a" and len(server.begun) == 1:
            raise RateLimitError(retry_after=20)
        return yours.retry_after()

    server = Server(clock, 0.0, answer)
    other = Server(clock, 5.0, answer)
    sources = [Source("a", server.fn(world), limits=[mine]), Source("b", other.fn(world))]
    report = run(world, sources, ExecutionPolicy(), [Task(n, routes=(n,)) for n in "ab"], clock=clock)
    assert server.begun == [0.0, pytest.approx(20.0, abs=0.1)]
    assert report.results[1].value == pytest.approx(15.0, abs=0.1)


# ---- every way out ---------------------------------------------------------------------------------------------------


def fails(payload: int) -> int:
    raise ValueError(payload)


def exits(payload: int) -> int:
    raise SystemExit(payload)


WAYS_OUT: Mapping[str, tuple[Callable[[Any], Any], Mapping[str, Any]]] = {
    "to the end": (lambda payload: payload, {}),
    "a stop condition": (fails, {"stop": StopConditions(max_failures=2)}),
    "enough": (lambda payload: payload, {"stop": StopConditions(max_results=2)}),
    "late": (lambda payload: payload, {"stop": StopConditions(timeout=2.5)}),
    "abandoned": (lambda payload: payload, {"stop": StopConditions(timeout=2.5, in_flight="abandon")}),
    "hangs": (lambda payload: payload, {"timeout": 0.5, "stop": StopConditions(timeout=5.5)}),
    "exits": (exits, {}),
}


@pytest.mark.parametrize(("way", "world"), [*zip(WAYS_OUT, itertools.cycle(WORLDS), strict=False)])
def test_nothing_is_left_reserved(opened: Open, clock: VirtualClock, tmp_path: Path, world: str, way: str) -> None:
    answer, more = WAYS_OUT[way]
    server = Server(clock, 0.8, answer)
    limits = [
        RateLimiter(RateLimit(per_second=1), store=opened(), key="rate", now_fn=clock.now),
        RateLimiter(Window(50, 100.0), store=opened(), key="window", now_fn=clock.now),
    ]
    quota = shared_quota(opened(), 1000, "tokens", now_fn=clock.now)
    policy = ExecutionPolicy(concurrency=3, limits=limits, quota=quota, **more)
    with suppress(SystemExit):
        server.run(world, policy, [Task(number, amount={"calls": 1, "tokens": 10}) for number in range(6)])
    assert left_behind(tmp_path / "shared.db") == []
    assert shared_quota(opened(), 1000, "tokens", now_fn=clock.now).used == 10 * len(server.begun)


@pytest.mark.parametrize("world", WORLDS)
def test_a_stream_that_is_left_early(opened: Open, clock: VirtualClock, tmp_path: Path, world: str) -> None:
    server = Server(clock, 0.2)
    limiter = RateLimiter(RateLimit(per_second=1), store=opened(), key="api", now_fn=clock.now)
    policy = ExecutionPolicy(concurrency=3, limits=[limiter], quota=shared_quota(opened(), 50, now_fn=clock.now))
    if world == "threads":
        with TaskScheduler(server.call, policy, clock=clock).stream(range(20)) as stream:
            assert [next(stream).value, next(stream).value] == [0, 1]
    else:

        async def main() -> None:
            async with AsyncTaskScheduler(server.call_later, policy, clock=clock).stream(range(20)) as stream:
                assert [(await anext(stream)).value for _ in range(2)] == [0, 1]

        asyncio.run(main())
    assert left_behind(tmp_path / "shared.db") == []
    assert shared_quota(opened(), 50, now_fn=clock.now).used == len(server.begun)
    assert limiter.retry_after() <= 1.0


def test_an_asyncio_run_that_is_cancelled(opened: Open, tmp_path: Path) -> None:
    limiter = RateLimiter(RateLimit(per_hour=1), store=opened(), key="api")
    quota = shared_quota(opened(), 50)

    async def call(payload: int) -> int:
        return payload

    async def main() -> float:
        scheduler = AsyncTaskScheduler(call, ExecutionPolicy(limits=[limiter], quota=quota))
        task = asyncio.create_task(scheduler.run(range(5)))
        await asyncio.sleep(0.1)
        task.cancel()
        before = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scheduler.last_report is not None and scheduler.last_report.success_count == 1
        return time.monotonic() - before

    assert asyncio.run(main()) < 0.5
    until(lambda: left_behind(tmp_path / "shared.db") == [])
    assert quota.used == 1 and 3590 < limiter.retry_after() <= 3600


@pytest.mark.not_under_coverage
def test_ctrl_c(opened: Open, tmp_path: Path) -> None:
    limiter = RateLimiter(RateLimit(per_hour=1), store=opened(), key="api")
    quota = shared_quota(opened(), 50)
    scheduler = TaskScheduler(str, ExecutionPolicy(limits=[limiter], quota=quota))
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        scheduler.run(range(5))
    timer.join()
    assert scheduler.last_report is not None and scheduler.last_report.success_count == 1
    until(lambda: left_behind(tmp_path / "shared.db") == [])
    assert quota.used == 1 and 3590 < limiter.retry_after() <= 3600


# ---- who does what, and how often ------------------------------------------------------------------------------------


class Counted:
    """Counts what is done with a store's file, and by which threads."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.count = 0
        self.threads: set[str] = set()
        self._transact = store.database.transact
        store.database.transact = self._counted  # type: ignore[method-assign]

    def _counted(self, *args: Any, **named: Any) -> Any:
        self.count += 1
        self.threads.add(threading.current_thread().name)
        return self._transact(*args, **named)


@pytest.mark.parametrize(("rate", "most"), [(1e6, 1.1), (10.0, 2.1)])
def test_a_call_costs_a_transaction_or_two(opened: Open, clock: VirtualClock, rate: float, most: float) -> None:
    store = opened()
    limiter = RateLimiter(RateLimit(per_second=rate, burst=1), store=store, key="api", now_fn=clock.now)
    counted = Counted(store)
    server = Server(clock, 0.01)
    assert server.run("threads", ExecutionPolicy(concurrency=4, limits=[limiter]), range(50)).all_succeeded
    assert counted.count <= 50 * most


def test_a_call_with_a_quota_costs_one_more(opened: Open, clock: VirtualClock) -> None:
    store = opened()
    limiter = RateLimiter(RateLimit(per_second=1e6), store=store, key="api", now_fn=clock.now)
    quota = shared_quota(store, 100)
    counted = Counted(store)
    policy = ExecutionPolicy(concurrency=4, limits=[limiter], quota=quota)
    assert Server(clock, 0.01).run("threads", policy, range(50)).all_succeeded
    assert counted.count <= 50 * 2.1


def test_who_waits_for_an_instant_asks_nobody(opened: Open) -> None:
    store = opened()
    limiter = RateLimiter(RateLimit(per_hour=1), store=store, key="api")
    counted = Counted(store)
    TaskScheduler(str, ExecutionPolicy(limits=[limiter], stop=StopConditions(timeout=0.2))).run(range(5))
    assert counted.count <= 4  # a slot, the next one, given back


def test_an_exhausted_quota_is_not_asked_for_each_task(opened: Open) -> None:
    store = opened()
    quota = shared_quota(store, 1)
    counted = Counted(store)
    report = TaskScheduler(str, ExecutionPolicy(quota=quota)).run(range(500))
    assert report.success_count == 1 and report.skipped_count == 499
    assert counted.count <= 10


@pytest.mark.parametrize("ends", ["by itself", "stopped", "cancelled", "stream"])
def test_no_file_is_touched_in_the_loop(opened: Open, ends: str) -> None:
    store = opened()
    limits = [RateLimiter(limit, store=store, key=str(limit)) for limit in (RateLimit(per_second=99), Window(3, 0.1))]
    quota = shared_quota(store, 5, "tokens")
    counted = Counted(store)

    async def call(payload: int) -> int:
        current_attempt().record(tokens=0.5)
        return payload

    async def main() -> None:
        stop = StopConditions(timeout=0.05) if ends == "stopped" else StopConditions()
        scheduler = AsyncTaskScheduler(call, ExecutionPolicy(limits=limits, quota=quota, stop=stop))
        if ends == "stream":
            async with scheduler.stream(range(6)) as stream:
                await anext(stream)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(scheduler.run(range(6)), 0.05 if ends == "cancelled" else 9)

    counted.threads.clear()
    asyncio.run(main())
    assert counted.threads and threading.current_thread().name not in counted.threads


def test_a_prediction_takes_nothing_and_knows_the_limits(opened: Open) -> None:
    store = opened()
    limiter = RateLimiter(RateLimit(per_second=1), store=store, key="api")
    quota = shared_quota(store, 50)
    scheduler = TaskScheduler(str, ExecutionPolicy(limits=[limiter], quota=quota))
    report = simulate(scheduler, range(60), latency=0.1)
    assert report.success_count == 50 and report.makespan == pytest.approx(49.1, abs=0.1)
    assert (quota.used, quota.reserved, limiter.available_tokens) == (0, 0, 1.0)


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "world"),
    [
        ("take", "threads"), ("take", "asyncio"), ("begin", "asyncio"), ("reserve_quota", "threads"),
        ("settle_quota", "asyncio"),
    ],
)
def test_a_store_that_fails_ends_the_run_with_its_report(
    opened: Open, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, world: str, method: str
) -> None:
    store = opened()
    limits = [RateLimiter(RateLimit(per_second=1), store=store, key="api", now_fn=clock.now)]
    quota = shared_quota(store, 1000, "tokens", now_fn=clock.now)
    count = itertools.count()
    works = getattr(SqliteStore, method)

    def fails_in_the_end(self: SqliteStore, *args: Any, **named: Any) -> Any:
        if next(count) >= 3:
            raise StorageError("the disk is full")
        return works(self, *args, **named)

    monkeypatch.setattr(SqliteStore, method, fails_in_the_end)
    server = Server(clock, 0.1, lambda payload: current_attempt().record(tokens=1))
    policy = ExecutionPolicy(concurrency=2, limits=limits, quota=quota)
    tasks = [Task(number, amount={"calls": 1, "tokens": 10}) for number in range(30)]
    with pytest.raises(StorageError, match="disk is full") as caught:
        server.run(world, policy, tasks)
    report = caught.value.report  # type: ignore[attr-defined]
    assert report.stop_reason == "store" and len(server.begun) <= 5
    assert report.success_count >= 2 and report.success_count + report.cancelled_count == len(report.results)


def test_a_second_limit_that_fails_costs_nothing_of_the_first(
    opened: Open, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = opened(), opened()
    limits = [
        RateLimiter(Window(5, 100.0), store=store, key=key, now_fn=clock.now)
        for store, key in ((first, "a"), (second, "b"))
    ]
    quota = shared_quota(first, 10, now_fn=clock.now)
    monkeypatch.setattr(second, "take", lambda *args: fails_to_store())
    with pytest.raises(StorageError):
        Server(clock).run("threads", ExecutionPolicy(limits=limits, quota=quota), range(3))
    assert limits[0].available_tokens == 5 and left_behind(tmp_path / "shared.db") == []


def fails_to_store() -> None:
    raise StorageError("the disk is full")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program has the file for itself."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@pytest.mark.parametrize("world", WORLDS)
@undisturbed
def test_a_locked_file_delays_no_other_source_nor_a_timeout(tmp_path: Path, world: str) -> None:
    path = tmp_path / f"{time.monotonic_ns()}.db"  # a new one where it is tried again
    store = SqliteStore(path)
    limiter = RateLimiter(RateLimit(per_second=1000), store=store, key="api")
    instants: dict[Any, float] = {}

    def call(payload: Any) -> Any:
        instants[payload] = time.monotonic()
        if payload == "hangs":
            current_attempt().cancel.wait(9)

    async def call_later(payload: Any) -> Any:
        instants[payload] = time.monotonic()
        if payload == "hangs":
            await asyncio.sleep(9)

    fn = call if world == "threads" else call_later
    sources = [Source("shared", fn, limits=[limiter]), Source("free", fn, timeout=0.1)]
    tasks = [Task("waits", routes=("shared",)), Task("goes", routes=("free",)), Task("hangs", routes=("free",))]
    began = time.monotonic()
    with locked(path):
        report = run(world, sources, ExecutionPolicy(), tasks, cancel=CancellationToken(timeout=0.25))
        took = time.monotonic() - began
    until(lambda: not any(thread.name.startswith("qengine") for thread in threading.enumerate()), 20)
    store.close()
    assert statuses(report) == ["deadline", "succeeded", "timeout"]
    with timely():
        assert instants["goes"] - began < 0.1 and report.results[2].duration < 0.2
        assert took < 0.25 + 0.2


def test_two_runs_and_many_calls_at_once(opened: Open, tmp_path: Path) -> None:
    limiter = RateLimiter(RateLimit(per_second=400, burst=2), store=opened(), key="api")
    quota = shared_quota(opened(), 60)
    begun: list[float] = []

    def call(payload: int) -> int:
        begun.append(time.monotonic())
        return payload

    scheduler = TaskScheduler(call, ExecutionPolicy(concurrency=3, limits=[limiter], quota=quota))
    refused: list[int] = []

    def user(number: int) -> None:
        if number < 2:
            report = scheduler.run(range(20))
            refused.extend(report.skipped_count * [number])
        else:
            for payload in range(5):
                try:
                    assert scheduler.call(payload) == payload
                except BudgetExceededError:
                    refused.append(number)

    in_threads(8, user)
    assert len(begun) == 60 and len(refused) == 10
    assert over_rate([(at, 1.0) for at in begun], 400, 2, slack=0.04) is None
    assert left_behind(tmp_path / "shared.db") == [] and quota.used == 60


def test_a_journal_beside(opened: Open, clock: VirtualClock, tmp_path: Path) -> None:
    server = Server(clock, 0.1)
    for _ in range(2):
        limiter = RateLimiter(RateLimit(per_second=10), store=opened(), key="api", now_fn=clock.now)
        quota = shared_quota(opened(), 100, now_fn=clock.now)
        with Journal(tmp_path / "run.db") as journal:
            policy = ExecutionPolicy(concurrency=4, limits=[limiter], quota=quota)
            assert server.run("threads", policy, range(20), journal=journal).all_succeeded
    assert len(server.begun) == 20 and quota.used == 20
    assert over_rate(server.admissions, 10, 1) is None


# ---- real processes --------------------------------------------------------------------------------------------------


def has_settled(path: Path) -> bool:
    """Whether there is a permit for the next call, and all is told that there is to tell of the one before."""
    before = left_behind(path)
    time.sleep(0.3)
    return {what for what, *_ in before} == {"hold", "period", "slot"} and left_behind(path) == before


@pytest.mark.not_under_coverage
def test_a_child_leaves_what_its_parent_has_fetched(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    limiter = RateLimiter(Window(1, 3600.0), store=opened(), key="api")
    quota = shared_quota(opened(), 50)
    with TaskScheduler(str, ExecutionPolicy(limits=[limiter], quota=quota)).stream(range(3)) as stream:
        next(stream)
        until(lambda: has_settled(path))
        before = left_behind(path)
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                stream.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert left_behind(path) == before
    assert left_behind(path) == [] and quota.used == 1


@pytest.mark.stress
@pytest.mark.not_under_coverage
@undisturbed
def test_processes_with_an_engine_each_use_one_rate_together(tmp_path: Path) -> None:
    path, rate, seconds = tmp_path / f"{time.monotonic_ns()}.db", 50.0, 1.0
    begin_at = time.monotonic() + 0.3

    def collect() -> list[float]:
        store, begun = SqliteStore(path), list[float]()

        def call(payload: int) -> None:
            begun.append(time.monotonic())
            time.sleep(0.1)

        limiter = RateLimiter(RateLimit(per_second=rate, burst=2), store=store, key="api")
        stop = StopConditions(timeout=begin_at + seconds - time.monotonic())
        policy = ExecutionPolicy(concurrency=8, limits=[limiter], stop=stop)
        time.sleep(max(0.0, begin_at - time.monotonic()))
        TaskScheduler(call, policy).run(range(10**6))
        store.close()
        return begun

    with Child(collect) as one, Child(collect) as other:
        shares = [child.result(20) for child in (one, other)]
    everything = sorted(at for begun in shares for at in begun)
    used = len(everything) - 2
    with timely():
        assert over_rate([(at, 1.0) for at in everything], rate, 2, slack=0.04) is None
        assert used >= 0.95 * rate * (everything[-1] - everything[0])
        assert min(map(len, shares)) >= 0.6 * max(map(len, shares))
