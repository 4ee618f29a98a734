"""What outlives a process: a state dumped as plain values, and gone on with after so many seconds."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from typing import Any

import pytest
from core.support import make_gate, make_limits

from qengine import BreakerPolicy, RateLimit, Window
from qengine.core.breaker import Breaker, BreakerState
from qengine.core.bucket import TokenBucket
from qengine.core.gate import Gate
from qengine.core.limits import LimitSet
from qengine.core.quota import Ledger
from qengine.core.window import RollingWindow, Slots, live_slots

NO_TIMEOUT = math.inf
THREE = RollingWindow(Window(3, 10))


def through_a_file(dumped: Any) -> Any:
    return json.loads(json.dumps(dumped))


def gone_on(limits: LimitSet, at: float, now: float) -> LimitSet:
    """Limits of the same policy, on a clock that started at 0 again, which shows `now` after `now` seconds."""
    made = make_limits(*DECLARED)
    made.load(through_a_file(limits.dump(at)), now, now, NO_TIMEOUT)
    return made


DECLARED = (RateLimit(per_second=1, burst=5), Window(8, 20))


# ---- a bucket --------------------------------------------------------------------------------------------------------


def test_a_bucket_goes_on_with_what_was_taken_less_what_came_back() -> None:
    bucket = TokenBucket(RateLimit(per_second=2, burst=10))
    state = bucket.charge(bucket.initial(100.0), 7, 100.0)
    for elapsed, left in ((0.0, 3.0), (1.0, 5.0), (3.5, 10.0), (99.0, 10.0)):
        other = bucket.load(bucket.initial(5.0), bucket.dump(state, 100.0), 5.0, elapsed, NO_TIMEOUT)
        assert bucket.available(other, 5.0) == pytest.approx(left)


def test_a_debt_goes_on() -> None:
    bucket = TokenBucket(RateLimit(per_second=1, burst=2))
    state = bucket.charge(bucket.initial(0.0), 9, 0.0)
    other = bucket.load(bucket.initial(0.0), bucket.dump(state, 0.0), 0.0, 4.0, NO_TIMEOUT)
    assert bucket.available(other, 0.0) == pytest.approx(-3.0)


def test_what_was_taken_meanwhile_counts_as_well() -> None:
    bucket = TokenBucket(RateLimit(per_second=1, burst=10))
    here = bucket.charge(bucket.initial(0.0), 3, 0.0)
    there = bucket.dump(bucket.charge(bucket.initial(0.0), 4, 0.0), 0.0)
    assert bucket.available(bucket.load(here, there, 0.0, 1.0, NO_TIMEOUT), 0.0) == pytest.approx(4.0)


def test_a_bucket_without_bound_takes_no_time() -> None:
    bucket = TokenBucket(RateLimit(per_second=math.inf, burst=3))
    state = bucket.charge(bucket.initial(0.0), 2, 0.0)
    assert bucket.ask(bucket.load(bucket.initial(9.0), bucket.dump(state, 0.0), 9.0, 0.0, NO_TIMEOUT), 3, 9.0)[0] == 9.0


# ---- a window --------------------------------------------------------------------------------------------------------


def filled(*instants: float, held: int = 0) -> Slots:
    slots = THREE.initial(0.0)
    for number, now in enumerate(instants):
        _, slots = THREE.ask(slots, 1, now, held=number >= len(instants) - held)
    return slots


def loaded(
    slots: Slots, at: float, now: float, elapsed: float, longest: float = NO_TIMEOUT, into: Slots | None = None
) -> Slots:
    dumped = through_a_file(THREE.dump(slots, at))
    return THREE.load(THREE.initial(now) if into is None else into, dumped, now, elapsed, longest)


def test_each_slot_runs_out_when_it_would_have() -> None:
    slots = loaded(filled(0.0, 4.0, 5.0), 6.0, now=100.0, elapsed=1.0)
    assert [THREE.ask(slots, amount, 100.0)[0] for amount in (1, 2, 3)] == [103.0, 107.0, 108.0]
    assert [*live_slots(loaded(filled(0.0, 4.0, 5.0), 6.0, now=100.0, elapsed=8.5))] == [(100.5, 1)]


def test_what_was_held_has_its_outcome_now() -> None:
    slots = loaded(filled(0.0, 0.0, held=1), 1.0, now=50.0, elapsed=7.0)
    assert [*live_slots(slots)] == [(52.0, 1), (60.0, 1)]
    assert slots[3] == 0, "nothing is held that nobody will settle"


def test_what_was_held_had_its_outcome_when_its_time_was_over() -> None:
    slots = loaded(filled(0.0, held=1), 1.0, now=50.0, elapsed=7.0, longest=2.0)
    assert [*live_slots(slots)] == [(55.0, 1)]
    assert [*live_slots(loaded(filled(0.0, held=1), 1.0, now=50.0, elapsed=12.0, longest=2.0))] == []


def test_slots_of_both_run_out_in_order() -> None:
    into = filled(98.0)
    slots = loaded(filled(0.0, 4.0), 5.0, now=100.0, elapsed=0.0, into=into)
    assert [ends_at for ends_at, _ in live_slots(slots)] == [105.0, 108.0, 109.0]
    assert THREE.ask(slots, 1, 100.0)[0] == 105.0


def test_the_window_of_a_changed_policy_counts_what_was_taken_for_as_long_as_it_lasts() -> None:
    limits = make_limits(Window(3, 10))
    assert [limits.try_take(1, 0.0) for _ in range(3)] == [0.0] * 3
    longer = make_limits(Window(3, 100))
    longer.load(through_a_file(limits.dump(5.0)), 5.0, 0.0, NO_TIMEOUT)
    assert longer.try_take(1, 5.0) == 100.0


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_limits_that_are_gone_on_with_grant_what_they_would_have(seed: int) -> None:
    rng = random.Random(seed)
    here, now = make_limits(*DECLARED), 0.0
    for _ in range(40):
        now += rng.choice([0.0, 0.1, 1.0, 3.0])
        here.try_take(rng.choice([1, 1, 2]), now)
    elapsed = rng.choice([0.0, 0.5, 4.0, 30.0])
    there = gone_on(here, now, elapsed)
    for _ in range(40):
        elapsed += rng.choice([0.0, 0.1, 1.0, 3.0])
        amount = rng.choice([1, 2])
        expected, got = here.try_take(amount, now + elapsed), there.try_take(amount, elapsed)
        assert got + now == pytest.approx(expected, abs=1e-6)


def test_another_order_of_limits_changes_nothing() -> None:
    minute, day = Window(10, 60), Window(30, 86400)
    limits = make_limits(minute, day)
    for number in range(3):
        assert [limits.try_take(1, 100.0 * number) for _ in range(10)] == [100.0 * number] * 10
    assert limits.try_take(1, 300.0) == 86400.0
    for others in ((day, minute), (day,), (RateLimit(per_second=10), day)):
        other = make_limits(*others)
        other.load(through_a_file(limits.dump(300.0)), 300.0, 0.0, NO_TIMEOUT)
        assert other.try_take(1, 300.0) == 86400.0


def test_limits_of_another_kind_or_unit_start_anew() -> None:
    limits = make_limits(Window(1, 100, unit="tokens"))
    limits.try_take({"tokens": 1}, 0.0)
    for others in ((Window(1, 100),), (RateLimit(per_hour=1, unit="tokens"),)):
        other = make_limits(*others)
        other.load(through_a_file(limits.dump(0.0)), 0.0, 0.0, NO_TIMEOUT)
        assert other.try_take({"tokens": 1, "calls": 1}, 0.0) == 0.0


# ---- a gate ----------------------------------------------------------------------------------------------------------


def both(policy: BreakerPolicy, *limits: Window) -> tuple[Gate, Gate]:
    return make_gate(*limits, breaker=policy), make_gate(*limits, breaker=policy)


def test_a_pause_goes_on_for_what_is_left_of_it() -> None:
    for elapsed, until in ((0.0, 25.0), (5.0, 20.0), (99.0, 10.0)):
        here, there = make_gate(), make_gate()
        here.pause(20.0)
        there.load(through_a_file(here.dump(5.0)), 10.0, elapsed, NO_TIMEOUT)
        assert there.admit("a", 1, 10.0) == until


def test_limits_that_others_own_are_not_loaded_with_a_gate() -> None:
    lent, own = make_limits(Window(4, 100)), make_limits(Window(3, 100))
    here = Gate([own, lent], None, nullcontext(), [lent])
    assert here.admit("a", 1, 0.0) == 0.0
    dumped = through_a_file(here.dump(0.0))
    lent, own = make_limits(Window(4, 100)), make_limits(Window(3, 100))
    there = Gate([own, lent], None, nullcontext(), [lent])
    there.load(dumped, 1.0, 1.0, NO_TIMEOUT)
    assert (own.available(1.0), lent.available(1.0)) == (2, 4)
    assert there.lent == {lent}


def test_a_gate_of_more_or_fewer_limits_loads_what_it_can() -> None:
    here = Gate([make_limits(Window(1, 10)), make_limits(RateLimit(per_second=1))], None, nullcontext())
    here.admit("a", 1, 0.0)
    there = make_gate(Window(1, 10), breaker=BreakerPolicy())
    there.load(through_a_file(here.dump(0.0)), 0.0, 0.0, NO_TIMEOUT)
    assert there.admit("b", 1, 0.0) == 10.0
    make_gate().load(through_a_file(here.dump(0.0)), 0.0, 0.0, NO_TIMEOUT)


def failed(gate: Gate, count: int, now: float) -> None:
    for number in range(count):
        assert gate.admit(number, 1, now) == now
        gate.ended(number, 1, now, False)


def test_an_open_breaker_lets_its_probe_through_when_it_would_have() -> None:
    here, there = both(BreakerPolicy(failures=2, reset_after=30.0))
    failed(here, 2, 100.0)
    there.load(through_a_file(here.dump(110.0)), 5.0, 7.0, NO_TIMEOUT)
    assert there.admit("a", 1, 5.0) == 18.0
    assert there.admit("a", 1, 18.0) == 18.0
    assert there.admit("b", 1, 18.0) == math.inf, "one probe at a time"
    assert there.ended("a", 1, 18.0, False)
    assert there.admit("c", 1, 18.0) == 78.0, "and its pauses go on to grow"


def test_a_breaker_that_was_half_open_sends_another_probe() -> None:
    here, there = both(BreakerPolicy(failures=1, reset_after=30.0, successes=2))
    failed(here, 1, 0.0)
    here.admit("a", 1, 30.0)
    here.ended("a", 1, 31.0, True)
    here.admit("b", 1, 31.0)
    there.load(through_a_file(here.dump(32.0)), 0.0, 0.0, NO_TIMEOUT)
    assert there.breaker is not None and there.breaker.state is BreakerState.HALF_OPEN
    assert there.admit("c", 1, 0.0) == 0.0
    there.ended("c", 1, 1.0, True)
    assert there.breaker.state is BreakerState.CLOSED, "the one that had passed before counts"


@pytest.mark.parametrize(
    "policy", [BreakerPolicy(failures=4), BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4)]
)
def test_failures_count_on(policy: BreakerPolicy) -> None:
    here, there = both(policy)
    failed(here, 3, 0.0)
    there.load(through_a_file(here.dump(0.0)), 0.0, 9.0, NO_TIMEOUT)
    assert there.breaker is not None and there.breaker.state is BreakerState.CLOSED
    failed(there, 1, 0.0)
    assert there.breaker.state is BreakerState.OPEN


def test_a_breaker_dumps_the_same_after_it_was_loaded() -> None:
    rng = random.Random(1)
    for _ in range(200):
        policy = BreakerPolicy(failures=3, failure_rate=0.5, min_calls=4, reset_after=5.0)
        here, now = Breaker(policy), 0.0
        for number in range(rng.randrange(12)):
            now += rng.choice([0.0, 1.0, 6.0])
            if here.ready_at(now) <= now:
                here.admitted(number)
                here.failed(number, now) if rng.random() < 0.7 else here.succeeded(number)
        there = Breaker(policy)
        there.load(through_a_file(here.dump(now)), 0.0, 0.0)
        expected = here.dump(now)
        if expected["reset_in"] is not None:
            expected["reset_in"] = pytest.approx(expected["reset_in"])
        assert there.dump(0.0) == expected
        assert there.spotless == here.spotless


# ---- a ledger --------------------------------------------------------------------------------------------------------


def ledger(limit: float = 10, ends_at: float = 100.0) -> Ledger:
    made = Ledger(limit)
    made.begin(0.0, ends_at)
    return made


def test_what_was_reserved_counts_as_used() -> None:
    here, there = ledger(), ledger()
    hold = here.reserve(4)
    assert hold is not None
    here.settle(hold, 3)
    assert here.reserve(2) is not None
    there.load(through_a_file(here.dump()))
    assert (there.period.used, there.period.reserved, there.remaining) == (5, 0, 5)


def test_a_period_that_is_over_is_over() -> None:
    here, there = ledger(ends_at=100.0), ledger(ends_at=200.0)
    here.reserve(4)
    there.load(through_a_file(here.dump()))
    assert there.remaining == 10


def test_a_later_period_is_not_left_for_an_earlier_one() -> None:
    here, there = ledger(ends_at=200.0), ledger(ends_at=100.0)
    here.reserve(4)
    there.load(through_a_file(here.dump()))
    assert (there.period.ends_at, there.remaining) == (200.0, 6)


def test_one_that_lives_on_is_not_charged_twice() -> None:
    book = ledger()
    book.reserve(4)
    dumped = through_a_file(book.dump())
    book.load(dumped)
    assert book.remaining <= 6
    other = ledger()
    other.load(dumped)
    other.load(dumped)
    assert other.remaining == 6


def test_one_without_end_goes_on() -> None:
    here, there = Ledger(10), Ledger(10)
    here.reserve(4)
    dumped = through_a_file(here.dump())
    assert dumped == {"ends_at": None, "used": 4}
    there.load(dumped)
    assert there.remaining == 6
