"""A gate: what all runs of a source share; all of its limits say yes, or nothing is taken."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
from core.support import make_gate, make_limits

from qengine import BreakerPolicy, RateLimit, Window
from qengine.core.breaker import BreakerState
from qengine.core.gate import Gate
from qengine.core.limits import LimitSet


def test_an_idle_gate_lets_everything_through() -> None:
    gate = make_gate()
    assert not gate.active
    assert [gate.admit(number, 1, 0.0) for number in range(9)] == [0.0] * 9


def test_a_refusal_by_one_set_of_limits_gives_back_what_the_others_took() -> None:
    first, second = make_limits(RateLimit(per_second=1, burst=5), Window(5, 10)), make_limits(Window(1, 10))
    gate = Gate([first, second], None, nullcontext())
    assert gate.admit("a", 1, 0.0) == 0.0
    for _ in range(20):
        assert gate.admit("b", 1, 0.0) == math.inf
    assert first.available(0.0) == pytest.approx(4.0)


def test_a_refused_attempt_has_not_taken_the_probe() -> None:
    gate = make_gate(RateLimit(per_second=0.01), breaker=BreakerPolicy(failures=1, reset_after=10))
    assert gate.admit("a", 1, 0.0) == 0.0
    assert gate.ended("a", 1, 0.0, False)
    assert gate.admit("b", 1, 50.0) == 100.0, "the breaker would, the rate would not"
    assert gate.breaker is not None and gate.breaker.state is BreakerState.OPEN
    assert gate.admit("c", 1, 100.0) == 100.0
    assert gate.breaker.state is BreakerState.HALF_OPEN
    assert gate.admit("d", 1, 300.0) == math.inf


def test_an_open_breaker_takes_no_tokens() -> None:
    limits = make_limits(RateLimit(per_second=1, burst=5))
    gate = Gate([limits], BreakerPolicy(failures=1, reset_after=10), nullcontext())
    gate.admit("a", 1, 0.0)
    gate.ended("a", 1, 0.0, False)
    for _ in range(9):
        assert gate.admit("b", 1, 0.0) == 10.0
    assert limits.available(0.0) == pytest.approx(4.0)


def test_a_pause_holds_until_the_latest_instant_asked_for() -> None:
    gate = make_gate()
    gate.pause(5.0)
    gate.pause(3.0)
    assert gate.admit("a", 1, 1.0) == 5.0
    assert gate.admit("a", 1, 5.0) == 5.0


def test_a_window_slot_runs_from_the_outcome() -> None:
    gate = make_gate(Window(1, 10))
    gate.admit("a", 1, 0.0)
    assert gate.admit("b", 1, 100.0) == math.inf
    gate.ended("a", 1, 100.0, True)
    assert gate.admit("b", 1, 100.0) == 110.0


def test_what_was_never_made_is_given_back() -> None:
    gate = make_gate(RateLimit(per_second=1), Window(1, 10))
    gate.admit("a", 1, 0.0)
    gate.revoke(1)
    assert gate.admit("b", 1, 0.0) == 0.0


@pytest.mark.parametrize("verdict", [True, False, None])
def test_every_outcome_wakes_who_watches_once(verdict: bool | None) -> None:
    gate, woken = make_gate(breaker=BreakerPolicy()), list[int]()
    gate.watch(object(), lambda: woken.append(1))
    gate.ended("a", 1, 0.0, verdict)
    gate.ended("b", 1, 0.0, verdict)
    assert woken == [1]


def test_an_outcome_at_another_gate_wakes_who_shares_a_window() -> None:
    shared, woken = make_limits(Window(1, 10)), list[int]()
    one, other = (Gate([shared], None, nullcontext()) for _ in range(2))
    one.admit("a", 1, 0.0)
    other.watch(object(), lambda: woken.append(1))
    one.ended("a", 1, 1.0, True)
    assert woken == [1]


def test_an_outcome_without_a_verdict_frees_the_probe_but_counts_for_nothing() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=1, reset_after=10))
    gate.ended("a", 1, 0.0, None)
    assert gate.breaker is not None and gate.breaker.state is BreakerState.CLOSED
    gate.ended("a", 1, 0.0, False)
    gate.admit("b", 1, 10.0)
    gate.ended("b", 1, 11.0, None)
    assert gate.admit("c", 1, 11.0) <= 11.0


def test_hung_calls_open_the_breaker_whatever_its_policy_counts() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=1000))
    assert gate.keep_shut(0.0)
    assert gate.admit("a", 1, 1.0) == 30.0
    assert not gate.keep_shut(1.0), "it was open already"
    assert gate.admit("a", 1, 30.0) <= 30.0


def test_without_a_breaker_there_is_none_to_open() -> None:
    gate = make_gate(Window(1, 10))
    assert not gate.keep_shut(0.0)
    assert gate.admit("a", 1, 0.0) == 0.0


def test_a_probe_that_cannot_be_made_counts_as_failed_only_when_it_is_due() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=1, reset_after=10, max_reopens=1))
    gate.keep_shut(0.0)
    gate.keep_shut(5.0)
    assert not gate.skips(5.0)
    gate.keep_shut(10.0)
    assert gate.skips(10.0)
    assert gate.admit("a", 1, 10.0) == 30.0, "twice as long"


def test_an_amount_is_checked_against_every_set() -> None:
    gate = Gate([make_limits(Window(9, 1)), make_limits(RateLimit(per_second=1, burst=2))], None, nullcontext())
    gate.check(2)
    with pytest.raises(ValueError, match="amount is 3"):
        gate.check(3)
    with pytest.raises(ValueError, match="tokens"):
        gate.check({"tokens": 1})


# ---- what a call really used -----------------------------------------------------------------------------------------


def test_what_was_reserved_too_much_is_given_back_and_an_overrun_is_a_debt() -> None:
    gate = make_gate(RateLimit(per_second=10, burst=100, unit="tokens"))
    gate.admit("a", {"tokens": 100}, 0.0)
    gate.ended("a", {"tokens": 100}, 1.0, True, {"tokens": 20.0})
    assert gate.admit("b", {"tokens": 100}, 1.0) == pytest.approx(2.0)
    gate.admit("b", {"tokens": 100}, 2.0)
    gate.ended("b", {"tokens": 100}, 3.0, False, {"tokens": 250.0})
    assert gate.admit("c", {"tokens": 1}, 3.0) == pytest.approx(3.0 + 141 / 10)


def test_what_was_used_settles_every_set_and_every_unit_that_is_named() -> None:
    calls, tokens = make_limits(RateLimit(per_second=1, burst=5)), make_limits(Window(100, 60, unit="tokens"))
    gate = Gate([calls, tokens], None, nullcontext())
    gate.admit("a", {"tokens": 80}, 0.0)
    gate.ended("a", {"tokens": 80}, 0.0, True, {"tokens": 30.0, "cost": 9.0})
    assert (calls.available(0.0), tokens.available(0.0)) == (pytest.approx(4.0), pytest.approx(70.0))
    gate.admit("b", {"tokens": 50}, 0.0)
    gate.ended("b", {"tokens": 50}, 0.0, True, {"cost": 9.0})
    assert tokens.available(0.0) == pytest.approx(20.0), "tokens were not named: as reserved"


def test_who_waits_is_woken_by_what_is_given_back_at_another_gate() -> None:
    shared, woken = make_limits(RateLimit(per_second=1, burst=10)), list[str]()
    one, other = (Gate([shared], None, nullcontext()) for _ in range(2))
    one.admit("a", 10, 0.0)
    assert other.await_relief("lane", lambda: woken.append("lane"))
    assert not other.await_relief("lane", lambda: woken.append("lane")), "one wake is enough"
    assert other.await_relief("second", lambda: woken.append("second"))
    assert not woken
    one.ended("a", 10, 1.0, True, {"calls": 3.0})
    assert sorted(woken) == ["lane", "second"]
    one.ended("a", 10, 1.0, True, {"calls": 3.0})
    assert len(woken) == 2, "once"
    assert other.await_relief("lane", lambda: woken.append("again"))
    one.ended("a", 10, 1.0, True, {"calls": 3.0})
    assert woken[2:] == ["again"]


def test_who_no_longer_waits_is_forgotten() -> None:
    gate, woken = make_gate(RateLimit(per_second=1, burst=10)), list[int]()
    gate.await_relief("lane", lambda: woken.append(1))
    gate.forget("lane")
    gate.forget("never waited")
    gate.ended("a", 1, 0.0, True, {"calls": 0.0})
    assert not woken


def test_without_limits_there_is_nothing_to_wait_for() -> None:
    assert not make_gate(breaker=BreakerPolicy()).await_relief("lane", lambda: None)


def test_an_outcome_that_says_nothing_of_its_use_wakes_nobody_at_a_bucket() -> None:
    gate, woken = make_gate(RateLimit(per_second=1, burst=10)), list[int]()
    gate.await_relief("lane", lambda: woken.append(1))
    gate.ended("a", 1, 0.0, True)
    assert not woken


# ---- what serves where most is as usual ------------------------------------------------------------------------------


def test_it_is_calm_while_a_success_changes_nothing_and_only_limits_are_asked() -> None:
    gate = make_gate(RateLimit(per_second=1), breaker=BreakerPolicy(failures=2))
    assert gate.is_calm(0.0)
    gate.ended("a", 1, 0.0, False)
    assert not gate.is_calm(0.0), "a success would start the count anew"
    gate.ended("a", 1, 0.0, True)
    assert gate.is_calm(0.0)
    gate.watch(object(), lambda: None)
    assert not gate.is_calm(0.0), "somebody is to be woken"
    assert not make_gate(Window(1, 1)).is_calm(0.0), "a slot is to be settled"


def test_it_is_not_calm_until_a_pause_is_over() -> None:
    gate = make_gate()
    gate.pause(5.0)
    assert not gate.is_calm(math.nextafter(5.0, 0.0))
    assert gate.is_calm(5.0)


def test_an_open_breaker_is_not_calm() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=1))
    gate.ended("a", 1, 0.0, False)
    assert not gate.is_calm(0.0)


def test_one_call_of_several_sets_is_there_only_if_it_is_in_all() -> None:
    one, other = make_limits(RateLimit(per_second=1, burst=5)), make_limits(RateLimit(per_second=1, burst=2))
    gate = Gate([one, other], None, nullcontext())
    assert [gate.take_call(0.0, 0.0) for _ in range(3)] == [True, True, False]
    assert (one.available(0.0), other.available(0.0)) == (pytest.approx(3.0), pytest.approx(0.0))
    assert gate.take_call(1.0, 0.0)


# ---- a twin on another clock -----------------------------------------------------------------------------------------


def test_a_twin_has_the_same_limits_breaker_and_pause_and_is_another() -> None:
    gate = make_gate(Window(3, 10), breaker=BreakerPolicy(failures=1, reset_after=30))
    for _ in range(2):
        gate.admit("a", 1, 100.0)
    gate.ended("a", 1, 100.0, False)
    gate.pause(140.0)
    twin = gate.twin(110.0, 7.0, nullcontext, {})
    assert twin.admit("b", 1, 7.0) == 37.0, "the pause"
    assert twin.skips(8.0) is gate.skips(111.0)
    assert twin.admit("b", 1, 37.0) == 37.0, "the probe"
    assert twin.admit("c", 1, 37.0) == math.inf
    assert gate.admit("b", 1, 140.0) == 140.0, "here it is not out"


def test_gates_that_share_limits_have_twins_that_share_theirs() -> None:
    shared, own = make_limits(Window(2, 10)), make_limits(RateLimit(per_second=1, burst=5))
    gates = [Gate([shared], None, nullcontext()), Gate([own, shared], None, nullcontext())]
    twins = dict[object, LimitSet]()
    one, other = (gate.twin(0.0, 0.0, nullcontext, twins) for gate in gates)
    assert one.admit("a", 1, 0.0) == other.admit("b", 1, 0.0) == 0.0
    assert one.admit("c", 1, 0.0) == math.inf
    assert gates[0].admit("c", 1, 0.0) == 0.0


def test_a_twin_of_an_idle_gate_is_idle_even_if_there_was_a_pause() -> None:
    gate = make_gate()
    gate.pause(5.0)
    assert not gate.twin(5.0, 0.0, nullcontext, {}).active
    assert gate.twin(4.0, 0.0, nullcontext, {}).admit("a", 1, 0.0) == 1.0


# ---- as if it were new -----------------------------------------------------------------------------------------------


def test_a_gate_is_as_new_when_its_limits_are_and_its_pause_is_over() -> None:
    gate = make_gate(RateLimit(per_second=1, burst=2))
    assert gate.is_as_new(0.0)
    gate.admit("a", 1, 0.0)
    assert not gate.is_as_new(0.5) and gate.is_as_new(1.0)
    gate.pause(5.0)
    assert not gate.is_as_new(4.0) and gate.is_as_new(5.0)


def test_limits_that_are_lent_to_a_gate_are_not_its_own_to_be_as_new() -> None:
    limits = make_limits(RateLimit(per_second=1))
    gate = Gate([limits], None, nullcontext(), lent=[limits])
    gate.admit("a", 1, 0.0)
    assert gate.is_as_new(0.0)


def test_a_gate_at_which_somebody_waits_is_not_as_new() -> None:
    gate = make_gate(RateLimit(per_second=1, burst=2))
    gate.await_relief("lane", lambda: None)
    assert not gate.is_as_new(0.0)
    gate.leave("lane")
    assert gate.is_as_new(0.0)
    gate.watch(object(), lambda: None)
    assert not gate.is_as_new(0.0)


def test_a_gate_whose_breaker_has_seen_a_failure_is_not_as_new() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=2))
    gate.ended("a", 1, 0.0, False)
    assert not gate.is_as_new(0.0)
    gate.ended("a", 1, 0.0, True)
    assert gate.is_as_new(0.0)
    gate.keep_shut(0.0)
    assert not gate.is_as_new(99.0)


def test_who_has_left_is_woken_by_no_outcome_neither_here_nor_elsewhere() -> None:
    shared, woken = make_limits(Window(1, 10)), list[str]()
    one, other = (Gate([shared], None, nullcontext()) for _ in range(2))
    one.admit("a", 1, 0.0)
    other.watch("left", lambda: woken.append("left"))
    other.watch("stays", lambda: woken.append("stays"))
    other.leave("left")
    other.leave("never came")
    one.ended("a", 1, 1.0, True)
    other.ended("b", 1, 1.0, True)
    assert set(woken) == {"stays"}
