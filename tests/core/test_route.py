"""Routes, decided without threads: where a task waits, who takes it over, and what it leaves behind where it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from core.support import STEADY, Trial, drive, make_lane, payloads

from qengine import BreakerPolicy, Hop, RateLimit, RetryPolicy, Task, TaskStatus, TaskTimeoutError
from qengine.core.lane import Attempt, Lane
from qengine.core.purse import Budget
from qengine.core.route import Route, Standing
from qengine.core.run import SETTLING
from qengine.core.steps import Cancel, Raised

HOURLY = RateLimit(per_hour=1)


def submit(trial: Trial, *tasks: Any, ranks: Mapping[Lane, int], now: float = 0.0) -> list[Attempt]:
    """Submit tasks that several lanes can do; the lower rank goes first."""
    first, attempts = next(iter(ranks)), []
    for task in tasks:
        task = task if isinstance(task, Task) else Task(task)
        attempt = Attempt(task.payload, task, first)
        attempt.remember().route = Route({lane: (rank,) for lane, rank in ranks.items()})
        trial.run.submitted(attempt, now)
        attempts.append(attempt)
    return attempts


def at_work(attempts: list[Attempt]) -> list[tuple[str, Any]]:
    return [(attempt.lane.name, attempt.payload) for attempt in attempts]


def test_a_route_sums_up_what_was_done_and_used_where_the_task_was() -> None:
    route = Route({make_lane(): (0,)})
    route.leave(Hop("a", 2, "failed", OSError()), {"calls": 3.0, "cost": 0.5})
    route.leave(Hop("b", 0, "breaker_open"), {"calls": 0.0})
    route.leave(Hop("c", 1, "error", OSError()), {"calls": 1.0, "tokens": 7})
    assert route.attempts == 3
    assert route.usage == {"calls": 4.0, "cost": 0.5, "tokens": 7}
    assert [hop.source for hop in route.hops] == ["a", "b", "c"]


def test_one_that_takes_a_task_now_goes_before_one_that_does_later_and_that_before_one_that_never_does() -> None:
    assert Standing.NOW < Standing.LATER < Standing.NEVER


def test_of_equals_the_one_that_has_least_to_do_for_what_it_can_do_at_once_gets_the_next_task() -> None:
    a, b = make_lane(name="a", concurrency=1), make_lane(name="b", concurrency=3)
    trial = Trial(a, b)
    submit(trial, *range(8), ranks={a: 0, b: 0})
    assert (a.taken, b.taken) == (2, 6)
    assert Counter(name for name, _ in at_work(trial.start())) == {"a": 1, "b": 3}


def test_the_lower_rank_gets_all_while_it_merely_has_to_wait_for_its_limits() -> None:
    a, b = make_lane(HOURLY, name="a"), make_lane(name="b")
    trial = Trial(a, b)
    submit(trial, 0, 1, ranks={a: 0, b: 1})
    attempt, = trial.start()
    trial.succeed(attempt, 1.0)
    assert trial.wait_until(1.0) == 3600
    assert (a.taken, b.taken) == (2, 0)


def test_who_has_nothing_to_do_takes_what_waits_elsewhere_the_urgent_first_and_never_what_was_tried() -> None:
    a, c = make_lane(HOURLY, name="a", concurrency=9), make_lane(name="c")     # so a is the one with less to do
    trial = Trial(a, c)
    submit(trial, Task(0), ranks={a: 0})
    tried, = trial.start()
    trial.throttle(tried, 0.0, 200.0)
    submit(trial, Task(1, priority=3), Task(2), ranks={a: 0})
    blocked = submit(trial, Task("x"), ranks={c: 0})
    running, = trial.start()
    assert running is blocked[0]
    submit(trial, Task(3, priority=3), Task(4), Task(5, priority=-1), ranks={a: 0, c: 0})
    order = []
    while True:
        trial.succeed(running, 1.0)
        started = [attempt for attempt in trial.start(1.0) if attempt.lane is c]
        if not started:
            break
        running, = started
        order.append(running.payload)
    assert order == [5, 4, 3]
    assert sorted(payloads(a.waiting())) == [0, 1, 2]
    assert (a.taken, c.taken) == (3, 4)


def test_what_is_better_done_elsewhere_is_not_taken_over() -> None:
    a, b = make_lane(HOURLY, name="a"), make_lane(name="b")
    trial = Trial(a, b)
    submit(trial, 0, 1, ranks={a: 0, b: 1})
    assert at_work(trial.start()) == [("a", 0)]
    submit(trial, 2, ranks={b: 0})
    assert at_work(trial.start()) == [("b", 2)]
    assert [attempt.payload for attempt in a.waiting()] == [1]


@pytest.mark.parametrize("equal", [False, True])
def test_who_is_better_takes_back_what_waits_at_another_once_its_breaker_lets_it(equal: bool) -> None:
    a = make_lane(name="a", breaker=BreakerPolicy(failures=1, reset_after=5.0))
    b = make_lane(name="b")
    trial = Trial(a, b)
    submit(trial, *range(20), ranks={a: 0, b: 0 if equal else 1})

    def behave(attempt: Attempt, now: float) -> tuple[float, Any]:
        return 3.0, Raised(OSError(), False) if attempt.lane is a and attempt.index < 2 and now < 1 else "ok"

    drive(trial, behave)
    at_a = [event.at for event in trial.events if event.kind == "start" and event.source == "a"]
    assert at_a[:3] == [0, 8, 11]
    assert set(trial.statuses) == {TaskStatus.SUCCEEDED}


@pytest.mark.parametrize("breaker", [None, BreakerPolicy(failures=50, reset_after=600.0)])
def test_where_as_many_calls_hang_as_may_the_others_do_the_rest(breaker: BreakerPolicy | None) -> None:
    a = make_lane(name="a", concurrency=2, timeout=1.0, max_abandoned=2, breaker=breaker)
    b = make_lane(name="b")
    trial = Trial(a, b)
    submit(trial, *range(10), ranks={a: 0, b: 1})
    ended = drive(trial, lambda attempt, now: (math.inf if attempt.lane is a else 1.0, "ok"))
    assert set(trial.statuses) == {TaskStatus.SUCCEEDED}
    assert sum(event.kind == "start" and event.source == "a" for event in trial.events) == 2
    assert ended <= 1.0 + SETTLING + 10
    trails = [attempt.trail.route.hops for attempt in trial.records]
    assert Counter(hop.reason for hops in trails for hop in hops) == {"timeout": 2, "breaker_open": 8}
    assert all(isinstance(hop.error, TaskTimeoutError) for hops in trails for hop in hops if hop.attempts)


def test_a_task_that_goes_on_gives_back_what_its_next_attempt_had_reserved() -> None:
    a = make_lane(name="a", breaker=BreakerPolicy(failures=1, reset_after=50.0), budget=3, retry=STEADY)
    b = make_lane(name="b", budget=1)
    trial = Trial(a, b)
    submit(trial, 0, ranks={a: 0, b: 1})
    attempt, = trial.start()
    trial.fail(attempt, 1.0)
    assert a.budget == 1        # one was used, one is reserved for the retry
    assert trial.start(1.0) == []
    attempt, = trial.start(2.0)
    assert (attempt.lane, attempt.number, a.budget, b.budget) == (b, 1, 2, 0)
    trial.succeed(attempt, 3.0)
    assert attempt.attempts == 2
    assert attempt.usage == {"calls": 2.0}


def test_the_last_call_of_a_shared_allowance_is_made_once() -> None:
    shared = Budget("calls", 5)
    a, b = (make_lane(name=name, concurrency=4, pooled=[shared]) for name in "ab")
    trial = Trial(a, b)
    submit(trial, *range(12), ranks={a: 0, b: 0})
    assert len(trial.start()) == 5
    assert Counter(trial.reasons) == {None: 5, "budget_exhausted": 7}


def test_the_time_of_a_task_at_the_source_that_it_left_is_no_concern_of_the_next() -> None:
    a = make_lane(name="a", retry=RetryPolicy(max_attempts=3, backoff=1.0, jitter="none", timeout=10.0))
    b = make_lane(HOURLY, name="b")
    trial = Trial(a, b)
    submit(trial, "first", ranks={b: 0})
    attempt, = trial.start()
    trial.succeed(attempt, 0.0)
    submit(trial, 0, ranks={a: 0, b: 1})
    attempt, = trial.start()
    trial.fail(attempt, 1.0)
    assert trial.wait_until(1.0) == 2
    attempt, = trial.start(2.0)
    trial.fail(attempt, 3.0, verdict=False)
    for now in (3.0, 10.0, 20.0):
        assert trial.start(now) == []
    attempt, = trial.start(3600.0)
    assert (attempt.lane, attempt.number) == (b, 1)


@pytest.mark.parametrize("moment", ["waiting", "running"])
def test_what_nobody_waits_for_any_more_is_taken_back_from_where_it_is_now(moment: str) -> None:
    a, b = make_lane(name="a"), make_lane(name="b")
    trial = Trial(a, b)
    submit(trial, "first", ranks={b: 0})
    wanted, = submit(trial, 0, ranks={a: 0, b: 1})
    first, attempt = sorted(trial.start(), key=lambda attempt: attempt.index)
    trial.fail(attempt, 1.0, verdict=False)
    assert trial.start(1.0) == []
    if moment == "running":
        trial.succeed(first, 2.0)
        assert at_work(trial.start(2.0)) == [("b", 0)]
    trial.run.withdrawn(wanted, "nobody asks", 2.0)
    steps = trial.steps(2.0)
    assert any(isinstance(step, Cancel) for step in steps) == (moment == "running")
    assert (wanted.status, wanted.reason, b.heap, b.fifo.__len__()) == (TaskStatus.CANCELLED, "nobody asks", [], 0)


def test_a_call_that_was_revoked_at_the_second_source_counts_at_the_first_only() -> None:
    a, b = make_lane(name="a"), make_lane(name="b", budget=1)
    trial = Trial(a, b, in_flight="abandon")
    wanted, = submit(trial, 0, ranks={a: 0, b: 1})
    attempt, = trial.start()
    trial.fail(attempt, 1.0, verdict=False)
    attempt, = trial.start(1.0)
    trial.run.cancel("enough", 1.0)
    trial.run.revoked(attempt, 1.0)
    assert (wanted.status, wanted.attempts, b.calls, b.budget) == (TaskStatus.CANCELLED, 1, 0, 1)
    assert wanted.usage == {"calls": 1.0}


def test_what_goes_on_makes_room_where_it_was_and_takes_it_where_it_goes() -> None:
    a, b = make_lane(name="a", lookahead=2), make_lane(name="b", lookahead=2)
    trial = Trial(a, b, stream=True)
    submit(trial, *range(3), ranks={a: 0, b: 1})
    assert (a.taken, b.taken) == (3, 0)
    attempt, = trial.start()
    trial.fail(attempt, 1.0, verdict=False)
    assert (a.taken, b.taken) == (2, 1)
    assert sorted(payloads(trial.start(1.0))) == [0, 1]
    assert (a.running, b.running) == (1, 1)
