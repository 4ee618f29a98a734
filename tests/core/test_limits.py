"""Several limits as one: all say yes, or nothing is taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
from core.support import make_limits

from qengine import RateLimit, Window
from qengine.core.limits import LimitSet, check_units, part_of

PER_SECOND = RateLimit(per_second=1, burst=5)


def foresee(limits: LimitSet, amounts: list[Any], now: float) -> float:
    """When the last of some amounts, taken one after the other, could be taken."""
    states = limits.read()
    for amount in amounts:
        if now < math.inf:
            now, states = limits.ask_in_turn(states, amount, now)
    return now


def test_all_must_say_yes() -> None:
    limits = make_limits(PER_SECOND, Window(2, 10))
    assert [limits.try_take(1, 0.0) for _ in range(3)] == [0.0, 0.0, 10.0]


def test_a_refused_take_has_taken_nothing() -> None:
    limits = make_limits(PER_SECOND, Window(2, 10))
    assert limits.try_take(2, 0.0) == 0.0
    for _ in range(50):
        assert limits.try_take(1, 1.0) == 10.0
    limits.undo(2)
    assert limits.try_take(2, 1.0) == 1.0
    assert limits.available(1.0) == 0.0


def test_the_latest_of_all_instants_counts() -> None:
    limits = make_limits(Window(1, 3), RateLimit(per_second=0.1))
    limits.try_take(1, 0.0)
    assert limits.try_take(1, 0.0) == 10.0


def test_foreseeing_takes_nothing() -> None:
    limits = make_limits(RateLimit(per_second=1))
    assert [foresee(limits, [1], 0.0) for _ in range(5)] == [0.0] * 5
    assert limits.available(0.0) == 1.0


def test_each_unit_is_counted_by_its_own_limit() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=2), RateLimit(per_minute=600, burst=1000, unit="tokens"))
    assert limits.units == {"calls", "tokens"}
    assert limits.try_take({"tokens": 990}, 0.0) == 0.0
    assert limits.try_take({"tokens": 20}, 0.0) == pytest.approx(1.0), "ten tokens short, at ten a second"
    assert limits.try_take({"tokens": 10}, 0.0) == 0.0
    assert limits.try_take({"tokens": 0}, 0.0) == pytest.approx(1.0), "two calls are the burst of calls"
    assert limits.try_take({"calls": 0}, 0.0) == 0.0


def test_a_number_counts_in_every_unit_and_a_mapping_is_one_call() -> None:
    assert part_of(3, "tokens") == 3
    assert part_of({"tokens": 5}, "tokens") == 5
    assert part_of({"tokens": 5}, "calls") == 1.0
    assert part_of({"tokens": 5}, "bytes") == 0.0
    assert part_of({"calls": 2}, "calls") == 2


def test_a_unit_that_nothing_counts_is_refused_by_name() -> None:
    check_units({"calls": 1}, set())
    check_units(7, set())
    with pytest.raises(ValueError, match=r"'token': 5.*allowed is a mapping from calls or tokens to a number"):
        check_units({"token": 5}, {"tokens"})


@pytest.mark.parametrize(("limit", "amount"), [
    (RateLimit(per_second=1, burst=2), 3), (Window(2, 1), 3), (RateLimit(per_second=1, unit="tokens"), {"tokens": 2}),
])
def test_an_amount_that_could_never_be_had_is_refused(limit: RateLimit | Window, amount: Any) -> None:
    with pytest.raises(ValueError, match=r"amount is .* allowed is at most"):
        make_limits(limit).check(amount)
    assert not make_limits(limit).fits(amount)


def test_the_whole_burst_may_be_had_at_once() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=2))
    limits.check(2)
    assert limits.fits(2)
    assert limits.try_take(2, 0.0) == 0.0


def test_those_in_a_line_are_foreseen_one_after_the_other() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=2), Window(3, 10))
    assert foresee(limits, [1, 1], 0.0) == 0.0
    assert foresee(limits, [1, 1, 1], 0.0) == 1.0
    assert foresee(limits, [1, 1, 1, 1], 0.0) == 10.0
    assert foresee(limits, [2, 2], 0.0) == 10.0
    assert limits.available(0.0) == 2.0


def test_what_hangs_on_an_outcome_cannot_be_foreseen() -> None:
    limits = make_limits(Window(1, 10))
    limits.try_take(1, 0.0, held=True)
    assert foresee(limits, [1], 1.0) == math.inf
    limits.settle(1, 2.0)
    assert foresee(limits, [1], 2.0) == 12.0


def test_a_watcher_is_woken_once_by_an_outcome() -> None:
    limits, woken = make_limits(Window(1, 10)), list[int]()
    limits.watch(lambda: woken.append(1))
    limits.try_take(1, 0.0, held=True)
    assert woken == []
    limits.settle(1, 1.0)
    limits.settle(1, 2.0)
    assert woken == [1]


def test_a_backward_clock_step_mints_nothing_and_ends_by_itself() -> None:
    limits = make_limits(PER_SECOND, now=1000.0)
    for _ in range(5):
        assert limits.try_take(1, 1000.0) == 1000.0
    refused_until = limits.try_take(1, 400.0)
    assert 400.0 < refused_until <= 1001.0
    assert limits.try_take(1, refused_until) == refused_until


def test_a_forward_clock_step_releases_one_burst() -> None:
    limits = make_limits(PER_SECOND)
    assert sum(limits.try_take(1, 1e9) == 1e9 for _ in range(50)) == 5


def test_an_amount_that_breaks_one_rule_has_taken_nothing_of_another() -> None:
    limits = make_limits(PER_SECOND, RateLimit(per_second=1, burst=5, unit="tokens"))
    amount: Any = {"calls": 1, "tokens": "many"}
    with pytest.raises(TypeError):
        limits.try_take(amount, 0.0)
    assert limits.available(0.0) == 5.0
