"""Several limits as one: all say yes, or nothing is taken."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
from core.support import make_limits

from qengine import RateLimit, Window
from qengine.core.limits import OPEN, LimitSet, check_units, paired, part_of

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


def test_each_of_a_line_is_foreseen_as_taken_when_it_will_be() -> None:
    assert foresee(make_limits(Window(1, 10)), [1, 1, 1], 0.0) == 20.0
    assert foresee(make_limits(RateLimit(per_second=1), RateLimit(per_minute=6)), [1, 1, 1], 0.0) == 20.0


def test_a_taker_may_be_early_by_so_much() -> None:
    limits = make_limits(RateLimit(per_second=1))
    limits.try_take(1, 0.0)
    limits.early = 0.25
    assert limits.try_take(1, 0.5) == 1.0
    assert limits.try_take(1, 0.75) == 0.75


def test_nobody_is_refused_for_what_rounding_makes_of_an_instant() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=5000), RateLimit(per_second=1, burst=6000), now=1024.0)
    assert limits.try_take(1, 0.1) == 0.1, "0.1 - 1024 + 1024 is more than 0.1"


# ---- one call, in short ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [[PER_SECOND], [PER_SECOND, Window(9, 10)], [PER_SECOND] * 2, [Window(5, 0.5)]])
def test_one_call_in_short_is_one_call(declared: list[RateLimit | Window]) -> None:
    limits = make_limits(*declared, now=1000.0)
    assert limits.take_call(1000.0, 0.0)
    assert limits.available(1000.0) == pytest.approx(4.0)
    assert [limits.take_call(1000.0, 0.0) for _ in range(5)] == [True] * 4 + [False]
    for _ in range(4):
        limits.undo(1)
    assert limits.available(1000.0) == pytest.approx(4.0)


@pytest.mark.parametrize("late", [0.0, 0.01, 0.5, 100.0])
def test_one_call_in_short_makes_good_what_was_late_as_any_take_does(late: float) -> None:
    limits, other = make_limits(PER_SECOND, now=1000.0), make_limits(PER_SECOND, now=1000.0)
    for now in (1000.0, 1000.0 + late, 1005.0 + late):
        for _ in range(6):
            assert limits.take_call(now, 0.02) is (other.try_take(1, now, 0.02, True) == now)
            assert limits.read()[0] == other.read()[0]


def test_one_call_in_short_is_taken_of_an_open_bucket() -> None:
    limits = opened(make_limits(PER_SECOND))
    assert limits.take_call(0.0, 0.0)
    assert limits.available(0.0) == 4.0


def test_one_call_in_short_is_remembered_where_something_may_be_taken_back() -> None:
    limits, owner = make_limits(PER_SECOND), object()
    take_as(limits, owner, 2, 0.0)
    assert limits.take_call(0.0, 0.0)
    assert limits.take_back(owner)
    assert limits.available(0.0) == 4.0


# ---- a single bucket, open -------------------------------------------------------------------------------------------

FOUR = RateLimit(per_second=4, burst=8)


def take_open(limits: LimitSet, now: float) -> bool:
    """What a limiter does by itself while the bucket is open."""
    inner = now - limits.origin
    if limits.next_at > inner:
        return False
    limits.next_at = max(limits.next_at, inner - limits.reach) + limits.interval
    return True


def opened(limits: LimitSet) -> LimitSet:
    limits.open(limits.read())
    assert limits.states is OPEN
    return limits


@pytest.mark.parametrize("rest", [0.0, 0.25, 1.0, 100.0])
def test_an_open_bucket_gives_the_same_as_one_that_is_not(rest: float) -> None:
    limits, other = opened(make_limits(FOUR, now=1000.0)), make_limits(FOUR, now=1000.0)
    for now in (1000.0, 1000.0 + rest, 1000.125 + rest, 1000.25 + rest):
        for _ in range(9):
            assert take_open(limits, now) is (other.try_take(1, now) == now)
    assert limits.available(1101.0) == other.available(1101.0)
    assert limits.states is not OPEN, "whoever asks for more than a call has shut it"


def test_a_bucket_that_was_taken_from_is_opened_as_it_is_and_shut_as_it_is() -> None:
    limits = make_limits(FOUR, now=1000.0)
    limits.try_take(8, 1000.0)
    opened(limits)
    assert not take_open(limits, 1000.2)
    assert take_open(limits, 1000.25), "at the very instant"
    assert limits.try_take(1, 1000.25) == pytest.approx(1000.5)
    limits.refund(8, 1000.5)
    assert limits.available(1000.5) == 8.0


def test_an_open_bucket_is_shut_when_the_base_is_to_follow_the_clock() -> None:
    limits = make_limits(FOUR, now=1000.0)
    assert (limits.base, limits.horizon) == (960.0, -math.inf)
    opened(limits)
    assert 960.0 + 128.0 - limits.origin == pytest.approx(limits.horizon, rel=0.0, abs=limits.early / 10)
    limits.shut()
    assert (limits.next_at, limits.horizon) == (math.inf, -math.inf)


def test_nothing_but_a_single_bucket_is_opened() -> None:
    for declared in ([Window(5, 10)], [FOUR, FOUR], [FOUR, Window(5, 10)], [Window(5, 10), FOUR]):
        limits = make_limits(*declared)
        limits.open(limits.read())
        assert limits.states is not OPEN and not limits.is_bucket
    assert make_limits(FOUR).is_bucket


def test_a_bucket_is_not_opened_as_it_was() -> None:
    limits = make_limits(FOUR)
    before = limits.read()
    limits.try_take(3, 0.0)
    limits.open(before)
    assert limits.available(0.0) == 5.0


# ---- the base --------------------------------------------------------------------------------------------------------


def test_the_base_follows_the_clock_after_two_minutes() -> None:
    limits = make_limits(RateLimit(per_hour=1), Window(1, 3600), now=1000.0)
    limits.try_take(1, 1000.0)
    for now, base in [(1030.0, 960.0), (1088.0, 960.0), (1088.5, 1088.0), (1300.0, 1280.0), (4599.0, 4544.0)]:
        assert limits.try_take(1, now) == 4600.0
        assert limits.base == base
    assert limits.try_take(1, 4600.0) == 4600.0


def test_what_is_remembered_follows_the_clock_too() -> None:
    limits, owner = make_limits(RateLimit(per_hour=1, burst=2), now=1000.0), object()
    limits.try_take(1, 1000.0)
    take_as(limits, owner, 1, 1000.0)
    assert limits.try_take(1, 2800.0) == pytest.approx(4600.0)
    assert limits.base == 2752.0
    assert limits.take_back(owner)
    assert limits.available(2800.0) == pytest.approx(1.5)


# ---- other limits ----------------------------------------------------------------------------------------------------


def left_of_each(limits: LimitSet, now: float) -> list[float]:
    return [rule.available(state, limits._time(rule, now)) for rule, state in paired(limits.read())]


def test_other_limits_go_on_from_those_of_their_kind_and_unit() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=100, unit="tokens"), Window(5, 10), PER_SECOND, now=1000.0)
    limits.try_take({"calls": 2, "tokens": 60}, 1000.0)
    assert left_of_each(limits, 1000.0) == [40, 3, 3]
    limits.declare([RateLimit(per_second=9, burst=4), Window(9, 20), Window(8, 10), RateLimit(per_second=1, burst=50,
                   unit="tokens"), RateLimit(per_second=1, burst=7, unit="bytes")], 1000.0)
    assert left_of_each(limits, 1000.0) == pytest.approx([3, 7, 8, 40, 7])
    assert limits.has_windows and not limits.is_bucket
    limits.declare([PER_SECOND], 1001.0)
    assert left_of_each(limits, 1001.0) == pytest.approx([4])
    assert limits.is_bucket and not limits.has_windows


# ---- taking back -----------------------------------------------------------------------------------------------------


def take_as(limits: LimitSet, owner: object, amount: float, now: float) -> None:
    """Take in the name of an owner, who may take it back."""
    states = limits.read()
    ready_at, after = limits.ask(states, amount, now)
    assert ready_at == now
    assert limits.swap(states, after, limits.noted(limits.taking(amount, now), owner, states))


def test_what_is_taken_back_was_never_taken_and_all_else_was() -> None:
    limits = make_limits(PER_SECOND, Window(9, 10), RateLimit(per_second=1, burst=7))
    one, other = object(), object()
    assert not limits.take_back(one), "nothing is remembered"
    take_as(limits, one, 1, 0.0)
    limits.try_take(1, 0.5)
    take_as(limits, other, 2, 1.0)
    assert not limits.take_back(object())
    assert limits.take_back(one) and not limits.take_back(one)
    assert left_of_each(limits, 1.0) == [2.5, 6, 4.5], "the bucket of 5 was full at 0.5, that of 7 too"
    assert limits.take_back(other)
    assert left_of_each(limits, 1.0) == [4.5, 8, 6.5]


def test_only_so_many_events_are_remembered() -> None:
    limits, owner = make_limits(RateLimit(per_second=1, burst=1000)), object()
    take_as(limits, owner, 1, 0.0)
    for _ in range(255):
        limits.try_take(1, 0.0)
    assert limits.take_back(owner)
    take_as(limits, owner, 1, 0.0)
    for _ in range(256):
        limits.try_take(1, 0.0)
    assert not limits.take_back(owner)
    assert limits.available(0.0) == 1000 - 255 - 1 - 256


def test_what_nobody_wants_back_is_forgotten() -> None:
    limits, one, other = make_limits(PER_SECOND, Window(9, 10)), object(), object()
    limits.forget(lambda owner: False)
    assert limits.history is None
    take_as(limits, one, 1, 0.0)
    limits.try_take(1, 0.0)
    take_as(limits, other, 1, 0.0)
    limits.forget(lambda owner: owner is other)
    assert limits.history is not None and [owner for owner, _ in limits.history[1]] == [other]
    assert not limits.take_back(one)
    assert limits.take_back(other)
    assert left_of_each(limits, 0.0) == [3, 7]
    take_as(limits, one, 1, 0.0)
    limits.forget(lambda owner: owner is one)
    assert limits.take_back(one)
    take_as(limits, one, 1, 0.0)
    limits.forget(lambda owner: False)
    assert limits.history is None, "nothing more has to be remembered"


# ---- as if they were new ---------------------------------------------------------------------------------------------


def test_limits_are_as_new_when_all_that_was_taken_is_there_again() -> None:
    limits = make_limits(PER_SECOND, Window(3, 10))
    assert limits.is_as_new(0.0)
    limits.try_take(2, 0.0, held=True)
    assert not limits.is_as_new(5.0), "nobody knows when what is held runs out"
    limits.settle(2, 6.0)
    assert not limits.is_as_new(15.0)
    assert limits.is_as_new(16.0)
    limits.charge(1, 16.0)
    assert not limits.is_as_new(16.5), "half a token is missing"


def test_limits_are_not_as_new_while_something_may_be_taken_back() -> None:
    limits = make_limits(PER_SECOND)
    take_as(limits, "owner", 1, 0.0)
    assert not limits.is_as_new(9.0)
    limits.forget(lambda owner: False)
    assert limits.is_as_new(9.0)


def test_one_call_without_the_lock_overwrites_nothing_that_came_in_between() -> None:
    came: list[float] = []

    def nobody() -> int:
        if not came:
            came.append(limits.try_take(1, 0.0))
        return 0

    limits = LimitSet([RateLimit(per_second=1, burst=2)], 0.0, nullcontext(), others=nobody)
    assert limits.take_call(0.0, 0.0) and came == [0.0]
    assert not limits.take_call(0.0, 0.0)
