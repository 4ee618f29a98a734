"""A quota in a Source: counted by attempts, in every world, shared, over midnight, and left alone by `simulate`."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import pytest
from freezegun import freeze_time
from shared import PATIENCE, in_threads

from qengine import (
    BreakerPolicy,
    BudgetExceededError,
    CollectionReport,
    Query,
    QueryExecutor,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    Source,
    TaskStatus,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.aio import AsyncQueryExecutor
from qengine.quota import Quota, QuotaAlert
from qengine.testing import VirtualClock

SUCCEEDED, SKIPPED = TaskStatus.SUCCEEDED, TaskStatus.SKIPPED
NOON = dt.datetime(2026, 5, 21, 12, tzinfo=dt.UTC).timestamp()
MIDNIGHT = NOON + 12 * 3600


class Flat:
    """Asks each root as it is, a Query or a payload; nothing opens up."""

    def queries(self, node: Any, source: Source) -> Iterable[Any]:
        return [node if isinstance(node, Query) else Query(node)]

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return []


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def statuses(report: CollectionReport[Any]) -> dict[TaskStatus, int]:
    found: dict[TaskStatus, int] = {}
    for result in report.results:
        found[result.status] = found.get(result.status, 0) + 1
    return found


Run = Callable[..., CollectionReport[Any]]


def in_real_threads(source: Source, roots: Iterable[Any]) -> CollectionReport[Any]:
    return QueryExecutor([source], Flat()).run(roots)


def in_virtual_time(source: Source, roots: Iterable[Any]) -> CollectionReport[Any]:
    return QueryExecutor([source], Flat(), clock=VirtualClock()).run(roots)


def under_asyncio(source: Source, roots: Iterable[Any]) -> CollectionReport[Any]:
    fetch = source.fetch

    async def fetch_async(query: Query[Any]) -> Any:
        await asyncio.sleep(0)
        return fetch(query)

    source.fetch = fetch_async
    try:
        return asyncio.run(AsyncQueryExecutor([source], Flat()).run(roots))
    finally:
        source.fetch = fetch


worlds = pytest.mark.parametrize("run", [in_real_threads, under_asyncio, in_virtual_time])


@worlds
@pytest.mark.parametrize("gated", [False, True])
def test_64_workers_and_a_quota_of_10_make_exactly_10_calls(run: Run, gated: bool) -> None:
    calls = []
    quota = Quota(10, now_fn=Clock())
    limits = [RateLimit(per_second=1e6, burst=1000), Window(limit=1000, seconds=1)] if gated else []
    source = Source(
        "s", lambda query: calls.append(query.payload) or [1], limits, 64, quota=quota,    # type: ignore[func-returns-value]
        breaker=BreakerPolicy() if gated else None,
    )
    report = run(source, range(200))
    assert len(calls) == 10
    assert statuses(report) == {SUCCEEDED: 10, SKIPPED: 190}
    assert {result.reason for result in report.results if result.status is SKIPPED} == {"budget_exhausted"}
    assert (quota.used, quota.reserved) == (10, 0)
    assert report.remaining_budgets == {"s": 0}
    assert report.by_source["s"].remaining[quota.unit] == 0
    assert report.by_source["s"].skipped == {"budget_exhausted": 190}
    with pytest.raises(BudgetExceededError):
        report.results[-1].unwrap()
    assert statuses(run(source, range(3))) == {SKIPPED: 3}     # the next run finds it used up


@worlds
def test_what_a_call_records_is_what_counts(run: Run) -> None:
    """Ten calls of 400 reserved and 100 used fit into 1000, and none is skipped for what is only reserved."""
    def fetch(query: Query[Any]) -> list[int]:
        current_attempt().record(pages=100)
        return [1]

    quota = Quota(1000, unit="pages", now_fn=Clock())
    source = Source("s", fetch, concurrency=4, quota=quota)
    if run is under_asyncio:        # what records is the coroutine itself
        async def fetch_async(query: Query[Any]) -> list[int]:
            await asyncio.sleep(0)
            return fetch(query)

        queries = [Query(number, amount=400) for number in range(12)]
        report = asyncio.run(
            AsyncQueryExecutor([Source("s", fetch_async, concurrency=4, quota=quota)], Numbered(queries)).run(range(12))
        )
    else:
        report = run_numbered(run, source, [Query(number, amount=400) for number in range(12)])
    assert statuses(report) == {SUCCEEDED: 7, SKIPPED: 5}      # at 700 used another 400 do not fit any more
    assert (quota.used, quota.reserved) == (700, 0)
    assert report.by_source["s"].remaining[quota.unit] == 300
    assert report.remaining_budgets == {"s": None}              # that would be calls


class Numbered(Flat):
    """Asks for each root, a number, the query of that number."""

    def __init__(self, queries: list[Query[Any]]) -> None:
        self._queries = queries

    def queries(self, node: Any, source: Source) -> Iterable[Any]:
        return [self._queries[node]]


def run_numbered(run: Run, source: Source, queries: list[Query[Any]]) -> CollectionReport[Any]:
    clock = VirtualClock() if run is in_virtual_time else None
    return QueryExecutor([source], Numbered(queries), clock=clock).run(range(len(queries)))


def test_an_amount_that_does_not_fit_is_skipped_and_a_smaller_one_is_not() -> None:
    quota = Quota(10, unit="tokens", now_fn=Clock())
    queries = [Query(number, amount={"tokens": number}) for number in (6, 5, 4, 1, 11)]
    report = run_numbered(in_real_threads, Source("s", lambda query: [1], quota=quota), queries)
    assert [result.status for result in report.results] == [SUCCEEDED, SKIPPED, SUCCEEDED, SKIPPED, TaskStatus.ERROR]
    assert "allowed is at most 10 tokens: the quota never has more" in str(report.results[-1].error)
    assert quota.remaining == 0


def test_an_amount_of_a_unit_that_nothing_counts_is_refused() -> None:
    quota = Quota(10, unit="tokens", now_fn=Clock())
    source = Source("s", lambda query: [1], [RateLimit(per_second=1000, unit="bytes")], quota=quota)
    queries = [Query(0, amount={"bytes": 1, "tokens": 3, "calls": 1}), Query(1, amount={"pages": 1})]
    report = run_numbered(in_real_threads, source, queries)
    assert [result.status for result in report.results] == [SUCCEEDED, TaskStatus.ERROR]
    assert "'pages'" in str(report.results[1].error)
    assert quota.used == 3


def test_a_failed_call_counts_and_a_retry_that_finds_no_quota_keeps_the_failure_it_had() -> None:
    quota = Quota(5, now_fn=Clock())
    clock = VirtualClock()

    def fail(query: Query[Any]) -> list[int]:
        raise TransientError("down")

    source = Source("s", fail, quota=quota, retry=RetryPolicy(max_attempts=3, backoff=10.0, jitter="none"))
    report = QueryExecutor([source], Flat(), clock=clock).run(["a", "b", "c"])
    assert [(result.status.value, result.attempts) for result in report.results] == [
        ("failed", 2), ("failed", 2), ("failed", 1),
    ]
    assert {type(result.error) for result in report.results} == {TransientError}
    assert (quota.used, quota.reserved) == (5, 0)
    report = QueryExecutor([source], Flat(), clock=clock).run(["d"])
    assert [(result.status.value, result.attempts) for result in report.results] == [("skipped", 0)]


def test_no_retry_is_waited_for_that_could_not_be_made() -> None:
    clock = VirtualClock()

    def fail(query: Query[Any]) -> list[int]:
        raise RateLimitError("slow down", retry_after=200)

    source = Source("s", fail, quota=Quota(1, now_fn=Clock()), retry=RetryPolicy(max_attempts=3))
    report = QueryExecutor([source], Flat(), clock=clock).run(["a"])
    assert [(result.status.value, result.attempts) for result in report.results] == [("failed", 1)]
    assert clock.now() == 0


def test_a_call_that_times_out_counts() -> None:
    clock = VirtualClock()
    quota = Quota(10, now_fn=Clock())
    source = Source("s", lambda query: clock.sleep(60), quota=quota, timeout=1, concurrency=2)
    report = QueryExecutor([source], Flat(), clock=clock).run(["a", "b"])
    assert statuses(report) == {TaskStatus.TIMEOUT: 2}
    assert (quota.used, quota.reserved) == (2, 0)


@pytest.mark.parametrize("budget", [3, 7])
def test_budget_and_quota_both_hold_and_the_smaller_is_shown(budget: int) -> None:
    quota = Quota(10, now_fn=Clock())
    quota.reserve(5).commit()
    source = Source("s", lambda query: [1], budget=budget, quota=quota)
    report = QueryExecutor([source], Flat()).run(range(2))
    assert report.remaining_budgets == {"s": min(budget, 5) - 2}
    report = QueryExecutor([source], Flat()).run(range(20))
    assert statuses(report) == {SUCCEEDED: 3, SKIPPED: 17}
    assert report.remaining_budgets == {"s": 0}
    assert report.by_source["s"].remaining[quota.unit] == 0


def test_one_waits_for_the_rate_and_has_reserved_nothing_meanwhile() -> None:
    clock = VirtualClock()
    quota = Quota(10, now_fn=Clock())
    seen = []

    def fetch(query: Query[Any]) -> list[int]:
        seen.append((clock.now(), quota.reserved, quota.used))
        return [1]

    QueryExecutor([Source("s", fetch, [RateLimit(per_minute=1)], 4, quota=quota)], Flat(), clock=clock).run(range(3))
    assert seen == [(0, 1, 0), (60, 1, 1), (120, 1, 2)]


def test_a_refused_attempt_has_taken_nothing() -> None:
    """One quota for two sources: the one that finds it used up keeps its rate and its breaker's probe."""
    quota = Quota(1, now_fn=Clock())
    clock = VirtualClock()
    first = Source("first", lambda query: [1], quota=quota)
    second = Source("second", lambda query: [1], [RateLimit(per_hour=1, burst=2)], quota=quota)
    report = QueryExecutor([first, second], Flat(), clock=clock).run(range(3))
    assert report.success_count == 1 and report.skipped_count == 5
    second.quota = None
    report = QueryExecutor([second], Flat(), clock=clock).run(range(2))
    assert report.success_count == 2 and clock.now() == 0


def test_another_run_that_is_quicker_leaves_the_gate_as_it_was() -> None:
    """What is there when it is asked for may be gone when it is reserved: then limits and probe are given back."""
    quota = Quota(3, now_fn=Clock())
    account = quota.as_account()
    asked = []

    class Thief:
        """The account of a quota of which somebody else takes the last in between."""

        unit, limit = account.unit, account.limit
        might_fit, settle, undo, fits = account.might_fit, account.settle, account.undo, account.fits

        @property
        def remaining(self) -> float:
            return account.remaining

        def reserve(self, amount: float) -> Any:
            asked.append(amount)
            if len(asked) == 2:
                quota.reserve(2).commit()
            return account.reserve(amount)

    clock = VirtualClock()
    source = Source("s", lambda query: [1], [RateLimit(per_hour=1, burst=2)], quota=quota)
    executor = QueryExecutor([source], Flat(), clock=clock)
    executor.stage.account = lambda quota: Thief()          # type: ignore[method-assign, assignment, return-value]
    report = executor.run(range(4))
    assert asked == [1, 1]
    assert statuses(report) == {SUCCEEDED: 1, SKIPPED: 3}
    source.quota = None
    QueryExecutor([source], Flat(), clock=clock).run(range(1))
    assert clock.now() == 0                                 # the second permit is there again


@pytest.mark.parametrize("real", [True, False])
def test_midnight(real: bool) -> None:
    calls: list[int] = []
    wall = Clock(MIDNIGHT - 1)

    def fetch(query: Query[Any]) -> list[int]:
        calls.append(query.payload)
        if len(calls) == 3:
            wall.now += 2           # the third call is in flight over midnight
        return [1]

    quota = Quota(4, now_fn=wall)
    report = (in_real_threads if real else in_virtual_time)(Source("s", fetch, quota=quota), range(20))
    assert len(calls) == 3 + 4
    assert statuses(report) == {SUCCEEDED: 7, SKIPPED: 13}
    assert (quota.used, quota.reserved) == (4, 0)


def test_midnight_under_freezegun() -> None:
    with freeze_time("2026-05-21 23:59:59", real_asyncio=True) as frozen:
        source = Source("s", lambda query: [1], concurrency=8, quota=Quota(10))
        executor = QueryExecutor([source], Flat())
        assert statuses(executor.run(range(15))) == {SUCCEEDED: 10, SKIPPED: 5}
        assert statuses(executor.run(range(15))) == {SKIPPED: 15}
        frozen.tick(1)
        assert statuses(executor.run(range(15))) == {SUCCEEDED: 10, SKIPPED: 5}


def test_a_day_passes_in_virtual_time_where_the_quota_goes_by_that_clock() -> None:
    clock = VirtualClock(start=NOON)
    quota = Quota(10, now_fn=clock.wall_time)
    source = Source("s", lambda query: [1], [RateLimit(per_hour=1)], quota=quota)
    report = QueryExecutor([source], Flat(), clock=clock).run(range(40))
    assert statuses(report) == {SUCCEEDED: 10, SKIPPED: 30}     # nobody waits for the next day
    assert clock.now() == NOON + 9 * 3600
    assert quota.remaining == 0
    clock.sleep(2 * 3600)
    source = Source("s", lambda query: clock.sleep(3600) or [1], quota=quota)
    clock.sleep(3600)
    assert quota.remaining == 10
    report = QueryExecutor([source], Flat(), clock=clock).run(range(40))
    assert statuses(report) == {SUCCEEDED: 10, SKIPPED: 30}


def test_shared_by_executors_in_threads_and_asyncio_at_once() -> None:
    quota = Quota(100, now_fn=Clock())
    calls: list[int] = []
    reports: list[CollectionReport[Any]] = []

    def fetch(query: Query[Any]) -> list[int]:
        calls.append(query.payload)
        return [1]

    async def fetch_async(query: Query[Any]) -> list[int]:
        await asyncio.sleep(0)
        return fetch(query)

    shared = Source("shared", fetch, concurrency=16, quota=quota)

    def work(number: int) -> None:
        if number % 2:
            source = Source("own", fetch_async, concurrency=16, quota=quota)
            reports.append(asyncio.run(AsyncQueryExecutor([source], Flat()).run(range(60))))
        else:
            reports.append(QueryExecutor([shared], Flat()).run(range(60)))

    in_threads(4, work)
    assert len(calls) == 100
    assert sum(report.success_count for report in reports) == 100
    assert sum(report.skipped_count for report in reports) == 140
    assert (quota.used, quota.reserved) == (100, 0)


def test_what_is_reserved_by_hand_counts_too() -> None:
    quota = Quota(10, now_fn=Clock())
    with quota.reserve(4):
        report = in_real_threads(Source("s", lambda query: [1], concurrency=3, quota=quota), range(20))
    assert statuses(report) == {SUCCEEDED: 6, SKIPPED: 14}


def test_what_nobody_picked_up_is_given_back() -> None:
    """A run that is stopped at once: what was begun counts, what was only handed out does not."""
    for _ in range(20):
        quota = Quota(100, now_fn=Clock())
        begun: list[int] = []
        ended = threading.Event()

        def fetch(query: Query[Any], to: list[int] = begun, until: threading.Event = ended) -> list[int]:
            to.append(query.payload)
            until.wait(PATIENCE)
            return [1]

        stream = QueryExecutor([Source("s", fetch, concurrency=8, quota=quota)], Flat()).stream(range(50))
        while not begun:
            pass
        stream.close()
        ended.set()
        assert stream.report is not None
        calls = stream.report.by_source["s"].calls
        until = monotonic() + PATIENCE
        while len(begun) < calls and monotonic() < until:
            pass        # a worker has picked it up, and is about to begin
        assert quota.used + quota.reserved == calls == len(begun)
        assert quota.reserved == 0


@worlds
def test_alerts_are_told_while_it_runs_and_outside_of_every_lock(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    told: list[float] = []

    def on_alert(alert: QuotaAlert) -> None:
        told.append(alert.share)
        assert quota.try_reserve(100) is None
        if alert.share == 0.5:
            raise SystemExit

    quota = Quota(10, alerts=[0.2, 0.5, 1.0], on_alert=on_alert, now_fn=Clock())
    with caplog.at_level(logging.ERROR):
        report = run(Source("s", lambda query: [1], concurrency=4, quota=quota), range(20))
    assert statuses(report) == {SUCCEEDED: 10, SKIPPED: 10}
    assert told == [0.2, 0.5, 1.0]
    assert caplog.text.count("on_alert raised") == 1


def test_simulate_leaves_the_quota_as_it_is_and_begins_with_what_is_left() -> None:
    told: list[QuotaAlert] = []
    wall = Clock()
    quota = Quota(10, alerts=[0.5], on_alert=told.append, now_fn=wall)
    quota.reserve(3).commit()
    held = quota.reserve(1)
    source = Source("s", lambda query: [1], concurrency=4, quota=quota)
    other = Source("t", lambda query: [1], concurrency=4, quota=quota)
    executor = QueryExecutor([source, other], Flat())
    for _ in range(2):
        report = simulate(executor, range(10), latency=1.0)
        assert (report.success_count, report.skipped_count) == (6, 14)
        assert report.remaining_budgets == {"s": 0, "t": 0}
        assert (quota.used, quota.reserved, quota.remaining) == (3, 1, 6)
    held.release()
    assert told == []
    assert executor.run(range(10)).success_count == 7


def test_in_a_simulation_the_days_of_a_quota_pass() -> None:
    wall = Clock(MIDNIGHT - 3600)
    quota = Quota(10, now_fn=wall)
    quota.reserve(8).commit()
    executor = QueryExecutor([Source("s", lambda query: [1], quota=quota)], Flat())
    report = simulate(executor, range(20), latency=1799.0)
    assert statuses(report) == {SUCCEEDED: 2, SKIPPED: 18}
    report = simulate(executor, range(20), latency=3600.0)      # the first call ends at midnight
    assert statuses(report) == {SUCCEEDED: 11, SKIPPED: 9}
    assert quota.remaining == 2 and wall.now == MIDNIGHT - 3600


@pytest.mark.parametrize("quota", [10, "10", RateLimit(per_day=10)])
def test_a_quota_that_is_none_is_refused(quota: Any) -> None:
    with pytest.raises(TypeError, match=r"quota is .*allowed is a Quota"):
        Source("s", lambda query: [1], quota=quota)


def test_a_quota_of_money_is_used_by_what_the_source_costs() -> None:
    quota = Quota(0.05, unit="cost", per="day")
    source = Source("paid", lambda query: [query.payload], cost=0.02, quota=quota)
    report = QueryExecutor([source], Flat()).run(range(4))
    assert (report.success_count, report.skipped_count) == (2, 2)
    assert quota.used == pytest.approx(0.04) == report.total_cost
