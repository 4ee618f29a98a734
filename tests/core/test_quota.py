"""The counts of a quota, by asserting: no clock, no calendar, no threads."""

from __future__ import annotations

import random

import pytest
from core.support import Trial, answer, drive, make_gate, make_lane

from qengine import BreakerPolicy, RateLimit, Task, TaskStatus
from qengine.core.quota import Hold, Ledger
from qengine.core.steps import Cancel


def ledger(limit: float = 10, *shares: float, ends_at: float = 100.0) -> Ledger:
    made = Ledger(limit, shares)
    made.begin(0.0, ends_at)
    return made


def taken(book: Ledger, amount: float) -> Hold:
    hold = book.reserve(amount)
    assert hold is not None
    return hold


def counts(book: Ledger) -> tuple[float, float, float]:
    return book.period.reserved, book.period.used, book.remaining


def test_what_is_reserved_is_no_longer_there_and_what_is_not_there_takes_nothing() -> None:
    book = ledger(10)
    taken(book, 4)
    taken(book, 6)
    assert book.reserve(1) is None
    assert counts(book) == (10, 0, 0)


def test_all_of_it_or_nothing() -> None:
    book = ledger(10)
    taken(book, 8)
    assert book.reserve(3) is None
    assert counts(book) == (8, 0, 2)
    taken(book, 2)


@pytest.mark.parametrize(("used", "after"), [
    (None, (0, 4, 6)), (4, (0, 4, 6)), (1, (0, 1, 9)), (0, (0, 0, 10)), (15, (0, 15, -5)),
])
def test_settled_is_what_was_used(used: float | None, after: tuple[float, float, float]) -> None:
    book = ledger(10)
    assert book.settle(taken(book, 4), used)
    assert counts(book) == after


def test_the_first_settles_it() -> None:
    book = ledger(10)
    hold = taken(book, 4)
    assert book.settle(hold, 2)
    assert not book.settle(hold, 9)
    assert not book.settle(hold, 0)
    assert counts(book) == (0, 2, 8)


def test_what_was_never_made_use_of_is_taken_back_settled_or_not() -> None:
    book = ledger(10)
    open_, settled = taken(book, 4), taken(book, 5)
    book.settle(settled, 7)
    book.undo(settled)
    assert counts(book) == (4, 0, 6)
    book.undo(open_)
    assert counts(book) == (0, 0, 10)
    book.undo(open_)
    assert not book.settle(open_)
    assert counts(book) == (0, 0, 10)


def test_an_overrun_leaves_nothing_for_anybody_until_the_period_is_over() -> None:
    book = ledger(10)
    book.settle(taken(book, 1), 12)
    assert book.reserve(1) is None
    assert book.reserve(0) is None
    book.begin(100.0, 200.0)
    assert counts(book) == (0, 0, 10)


def test_an_amount_of_nothing_is_there_until_the_limit_is_reached() -> None:
    book = ledger(10)
    book.settle(taken(book, 0), 9)
    hold = taken(book, 0)
    assert counts(book) == (0, 9, 1)
    book.settle(hold, 1)
    assert book.reserve(0) is None


def test_an_amount_might_fit_as_long_as_it_is_not_for_good_that_it_does_not() -> None:
    book = ledger(10)
    hold = taken(book, 10)
    assert book.might_fit(10) and not book.might_fit(11)
    book.settle(hold, 9)
    assert book.might_fit(1) and not book.might_fit(2) and book.might_fit(0)
    book.settle(taken(book, 1))
    assert not book.might_fit(0)


def test_fractions_are_summed_up_as_one_would_by_hand() -> None:
    book = ledger(0.3)
    for _ in range(3):
        book.settle(taken(book, 0.1))
    assert book.reserve(0.1) is None and book.reserve(0) is None and book.reserve(1e-9) is None
    book = ledger(1_000_000, 1.0)
    for _ in range(10):
        book.settle(taken(book, 100_000))
    assert book.reserve(1) is None


def test_a_period_begins_when_the_last_one_is_over_and_not_before() -> None:
    book = ledger(10, ends_at=100.0)
    taken(book, 10)
    book.begin(99.9, 200.0)
    assert book.period.ends_at == 100.0 and book.remaining == 0
    book.begin(100.0, 200.0)
    assert book.period.ends_at == 200.0 and book.remaining == 10


def test_a_period_that_has_begun_is_not_left_for_an_earlier_one() -> None:
    book = ledger(10, ends_at=100.0)
    book.settle(taken(book, 6))
    book.begin(100.0, 200.0)
    book.settle(taken(book, 10))
    book.begin(50.0, 100.0)
    assert book.period.ends_at == 200.0 and book.remaining == 0


def test_what_was_reserved_in_a_period_is_settled_in_that_one() -> None:
    book = ledger(10, 0.5, ends_at=100.0)
    committed, released, undone = taken(book, 3), taken(book, 3), taken(book, 3)
    before = book.period
    book.begin(100.0, 200.0)
    after = taken(book, 2)
    book.settle(committed, 50)
    book.settle(released, 0)
    book.settle(undone)
    book.undo(undone)
    assert counts(book) == (2, 0, 8)
    assert (before.reserved, before.used) == (0, 50)
    assert book.due(before) == (0.5,) and book.due(after.period) == ()


def test_each_alert_is_due_once_in_a_period_when_so_much_is_used() -> None:
    book = ledger(10, 0.1, 0.3, 0.7, 1.0)
    hold = taken(book, 10)
    assert book.due(book.period) == ()
    book.settle(hold, 1)
    assert book.due(book.period) == (0.1,)
    assert book.due(book.period) == ()
    book.settle(taken(book, 6))
    assert book.due(book.period) == (0.3, 0.7)
    hold = taken(book, 3)
    book.settle(hold)
    book.undo(hold)
    book.settle(taken(book, 3))
    assert book.due(book.period) == (1.0,)
    book.begin(100.0, 200.0)
    book.settle(taken(book, 1))
    assert book.due(book.period) == (0.1,)


def test_an_alert_at_a_share_of_fractions_is_not_missed_by_a_last_bit() -> None:
    for limit, share, steps in [(0.3, 1.0, 3), (0.7, 1.0, 7), (1, 0.7, 7), (1, 0.3, 3)]:
        book = ledger(limit, share)
        for _ in range(steps):
            assert book.due(book.period) == ()
            book.settle(taken(book, 0.1))
        assert book.due(book.period) == (share,)


def test_a_twin_has_the_same_counts_and_is_another() -> None:
    book = ledger(10, 0.1)
    book.settle(taken(book, 3))
    hold = taken(book, 2)
    twin = book.twin()
    assert counts(twin) == counts(book) == (2, 3, 5)
    assert twin.period.ends_at == 100.0
    twin.settle(taken(twin, 5))
    book.settle(hold, 0)
    assert twin.reserve(1) is None and twin.due(twin.period) == ()
    assert counts(book) == (0, 3, 7)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_schedule_against_one_who_replays_it_all(seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.randint(1, 30)
    book = Ledger(limit)
    now, ends_at = 0.0, 0.0
    held: list[tuple[float, Hold]] = []                     # the end of its period, and it
    history: list[tuple[str, float, float, Hold]] = []      # what was done, in which period, how much

    def replayed(period: float) -> tuple[float, float]:
        reserved = used = 0.0
        for what, when, amount, hold in history:
            if when == period:
                reserved += hold.amount if what == "reserve" else -hold.amount if what == "settle" else 0
                used += amount if what == "settle" else 0
        return reserved, used

    for _ in range(300):
        now += rng.choice([-30.0, 0.0, 1.0, 5.0, 20.0])
        if ends_at <= now:
            ends_at = (now // 50 + 1) * 50
        book.begin(now, (now // 50 + 1) * 50)
        reserved, used = replayed(ends_at)
        if rng.random() < 0.6:
            amount = rng.randint(0, 6)
            assert book.might_fit(amount) == (used + amount <= limit and used < limit), seed
            fits = book.fits(amount)
            hold = book.reserve(amount)
            assert fits == (hold is not None) == (reserved + used + amount <= limit and reserved + used < limit), seed
            if hold is not None:
                held.append((ends_at, hold))
                history.append(("reserve", ends_at, amount, hold))
        elif held:
            period, hold = held.pop(rng.randrange(len(held)))
            amount = rng.choice([0, hold.amount, rng.randint(0, 9)])
            book.settle(hold, amount)
            history.append(("settle", period, amount, hold))
        reserved, used = replayed(ends_at)
        assert counts(book) == (reserved, used, limit - reserved - used), seed


# -- in a run


class Book(Ledger):
    """A quota as a lane takes from it, of one period that never ends."""

    unit = "calls"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_makes_as_many_calls_as_there_are(quiet: bool) -> None:
    book = Book(10)
    lane = make_lane(concurrency=4, allowances=[book])
    trial = Trial(lane, data=range(50), quiet=quiet)
    drive(trial, answer(1.0))
    assert (lane.calls, lane.success_count, lane.stats.skipped) == (10, 10, {"budget_exhausted": 40})
    assert counts(book) == (0, 10, 0)


def test_what_does_not_fit_waits_for_what_runs_and_only_for_that() -> None:
    book = Book(10)
    book.unit = "tokens"
    lane = make_lane(concurrency=4, allowances=[book])
    trial = Trial(lane, data=[Task(number, amount=amount) for number, amount in enumerate([6, 4, 3, 11])])
    six, four = trial.start()
    trial.succeed(six, 1.0)
    assert trial.start(1.0) == []                       # as the other one might use less than 4
    assert trial.statuses[2:] == [None, TaskStatus.ERROR]
    trial.succeed(four, 2.0)
    trial.start(2.0)
    assert trial.reasons[2] == "budget_exhausted"


def test_what_no_worker_picked_up_is_given_back() -> None:
    book = Book(1)
    trial = Trial(make_lane(allowances=[book]), data=["a", "b"], in_flight="abandon")
    (first,) = trial.start()
    trial.run.cancel("enough", 0.5)
    step = trial.run.next(0.5)
    assert isinstance(step, Cancel) and step.target is first
    assert counts(book) == (0, 1, 0)                    # it may be under way
    trial.run.revoked(first, 0.5)
    assert counts(book) == (0, 0, 1)


def test_an_admission_that_is_taken_back_leaves_limits_and_probe_as_they_were() -> None:
    gate = make_gate(RateLimit(per_hour=1), breaker=BreakerPolicy(failures=1, reset_after=10.0))
    assert gate.admit("first", 1, 0.0) == 0.0
    gate.ended("first", 1, 0.0, False)
    assert gate.admit("probe", 1, 3600.0) == 3600.0
    gate.retract("probe", 1)
    assert gate.admit("other", 1, 3600.0) == 3600.0
    gate.ended("other", 1, 3601.0, True)
    assert gate.breaker is not None and gate.breaker.spotless
