"""The circuit breaker: closed, open, half open."""

from __future__ import annotations

import math
import random

from qengine import BreakerPolicy
from qengine.core.breaker import Breaker, BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState


def opened(policy: BreakerPolicy, now: float = 0.0) -> Breaker:
    breaker = Breaker(policy)
    for number in range(policy.failures or 0):
        breaker.failed(number, now)
    assert breaker.state is OPEN
    return breaker


def probe(breaker: Breaker, now: float) -> object:
    assert breaker.ready_at(now) <= now
    attempt = object()
    breaker.admitted(attempt)
    return attempt


def test_failures_in_a_row_open_it_at_the_last_of_them() -> None:
    breaker = Breaker(BreakerPolicy(failures=3))
    assert [breaker.failed(number, 0.0) for number in range(3)] == [False, False, True]
    assert breaker.state is OPEN


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker(BreakerPolicy(failures=2))
    for number in range(20):
        assert not breaker.failed(number, 0.0)
        breaker.succeeded(number)
    assert breaker.state is CLOSED


def test_a_share_of_failures_opens_it_once_there_are_enough_calls() -> None:
    breaker = Breaker(BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4))
    for number in range(3):
        assert not breaker.failed(number, 0.0)
    assert breaker.failed(3, 0.0)


def test_only_the_last_calls_count_in_a_share() -> None:
    breaker = Breaker(BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4))
    for outcome in "ffssssssf":
        if outcome == "s":
            breaker.succeeded("x")
        else:
            assert not breaker.failed("x", 0.0)
    assert breaker.failed("x", 0.0)


def test_a_share_is_exact() -> None:
    breaker = Breaker(BreakerPolicy(failures=None, failure_rate=0.07, min_calls=100))
    for number in range(93):
        breaker.succeeded(number)
    assert [breaker.failed(number, 0.0) for number in range(7)] == [False] * 6 + [True]


def test_an_open_one_says_when_it_may_be_probed() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30), now=5.0)
    assert breaker.ready_at(6.0) == 35.0


def test_one_probe_at_a_time() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30))
    probe(breaker, 30.0)
    assert breaker.state is HALF_OPEN
    assert breaker.ready_at(31.0) == math.inf


def test_a_probe_that_succeeds_closes_it_for_good() -> None:
    breaker = opened(BreakerPolicy(failures=2, reset_after=30))
    breaker.succeeded(probe(breaker, 30.0))
    assert breaker.state is CLOSED
    assert not breaker.failed("x", 31.0), "the failures from before are forgotten"


def test_once_closed_the_first_pause_is_the_short_one_again() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=10))
    breaker.failed(probe(breaker, 10.0), 10.0)
    assert breaker.ready_at(10.0) == 30.0
    breaker.succeeded(probe(breaker, 30.0))
    breaker.failed("x", 40.0)
    assert breaker.ready_at(40.0) == 50.0


def test_as_many_probes_must_succeed_as_the_policy_says() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30, successes=2))
    breaker.succeeded(probe(breaker, 30.0))
    assert breaker.state is HALF_OPEN
    breaker.succeeded(probe(breaker, 30.0))
    assert breaker.state is CLOSED


def test_a_probe_that_fails_takes_the_successes_before_it_along() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=1, successes=2))
    breaker.succeeded(probe(breaker, 1.0))
    assert breaker.failed(probe(breaker, 1.0), 1.0)
    breaker.succeeded(probe(breaker, 3.0))
    assert breaker.state is HALF_OPEN


def test_each_failed_probe_doubles_the_pause_up_to_the_most() -> None:
    breaker, now, pauses = opened(BreakerPolicy(failures=1, reset_after=1, max_reset_after=5)), 0.0, list[float]()
    for _ in range(5):
        pauses.append(breaker.ready_at(now) - now)
        now = breaker.ready_at(now)
        assert breaker.failed(probe(breaker, now), now)
    assert pauses == [1, 2, 4, 5, 5]


def test_it_may_reopen_for_ever_without_an_overflow() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=1, max_reset_after=5, max_reopens=None))
    for _ in range(3000):
        breaker.refuse_probe(0.0)
    assert breaker.ready_at(0.0) == 5.0
    assert not breaker.skips(0.0)


def test_what_was_in_flight_when_it_opened_decides_nothing() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30))
    breaker.succeeded("in flight")
    assert breaker.state is OPEN
    assert not breaker.failed("in flight too", 20.0)
    assert breaker.ready_at(20.0) == 30.0, "the pause is not prolonged"
    mine = probe(breaker, 30.0)
    breaker.succeeded("in flight as well")
    breaker.dropped("and this")
    assert breaker.state is HALF_OPEN and breaker.ready_at(31.0) == math.inf
    breaker.succeeded(mine)
    assert breaker.state is CLOSED


def test_a_probe_without_a_verdict_frees_its_place() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30))
    breaker.dropped(probe(breaker, 30.0))
    assert breaker.ready_at(31.0) <= 31.0
    breaker.succeeded(probe(breaker, 31.0))
    assert breaker.state is CLOSED


def test_tasks_are_skipped_only_when_the_policy_is_not_to_wait() -> None:
    waiting, skipping = (opened(BreakerPolicy(failures=1, on_open=on_open)) for on_open in ("wait", "skip"))
    assert not waiting.skips(1.0)
    assert skipping.skips(1.0)
    assert not skipping.skips(30.0), "the probe is due: the next task is it"
    probe(skipping, 30.0)
    assert skipping.skips(30.0), "the rest do not wait for the probe"


def test_after_the_last_reopening_waiting_tasks_are_skipped() -> None:
    breaker, now = opened(BreakerPolicy(failures=1, reset_after=1, max_reopens=2)), 0.0
    for reopened in (1, 2):
        now = breaker.ready_at(now)
        assert not breaker.skips(now)
        breaker.failed(probe(breaker, now), now)
        assert breaker.skips(now) is (reopened == 2)
    now = breaker.ready_at(now)
    assert not breaker.skips(now), "a new task may still probe it, run by run"
    breaker.succeeded(probe(breaker, now))
    assert breaker.state is CLOSED and not breaker.skips(now)


def test_no_sequence_of_events_breaks_the_rules() -> None:
    rng = random.Random(11)
    for _ in range(200):
        policy = BreakerPolicy(
            failures=rng.randint(1, 4), reset_after=1, max_reset_after=8, successes=rng.randint(1, 3), max_reopens=None
        )
        breaker, now, out, in_row = Breaker(policy), 0.0, list[object](), 0
        for _ in range(100):
            now += rng.random()
            if breaker.ready_at(now) <= now and rng.random() < 0.6:
                before = breaker.state
                out.append(object())
                breaker.admitted(out[-1])
                assert breaker.state is (CLOSED if before is CLOSED else HALF_OPEN)
            elif out:
                attempt = out.pop(rng.randrange(len(out)))
                before = breaker.state
                match rng.randrange(3):
                    case 0:
                        breaker.succeeded(attempt)
                        in_row = 0 if before is CLOSED or breaker.state is CLOSED else in_row
                    case 1:
                        tripped = breaker.failed(attempt, now)
                        assert tripped is (breaker.state is OPEN and before is not OPEN)
                        in_row += before is CLOSED
                        assert not (before is CLOSED and in_row >= (policy.failures or 0)) or breaker.state is OPEN
                        in_row = 0 if breaker.state is OPEN else in_row
                    case 2:
                        breaker.dropped(attempt)
                        assert breaker.state is before
            assert breaker.state is not OPEN or breaker.ready_at(now) <= now + 8


def test_as_long_as_nothing_fails_a_success_changes_nothing_but_a_share() -> None:
    by_share = Breaker(BreakerPolicy(failures=2, failure_rate=0.5))
    assert not by_share.spotless
    breaker = Breaker(BreakerPolicy(failures=2))
    assert breaker.spotless
    breaker.failed("x", 0.0)
    assert not breaker.spotless, "a success would start the count anew"
    breaker.succeeded("x")
    assert breaker.spotless


def test_a_twin_on_another_clock_is_probed_after_as_long_and_goes_its_own_way() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30), now=5.0)
    twin = breaker.twin(15.0, 1000.0)
    assert (twin.state, twin.ready_at(1000.0)) == (OPEN, 1020.0)
    twin.succeeded(probe(twin, 1020.0))
    assert (twin.state, breaker.state) == (CLOSED, OPEN)


def test_a_twin_counts_on_where_the_other_is() -> None:
    by_share = Breaker(BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4))
    for number in range(2):
        by_share.succeeded(number)
    by_share.failed("x", 0.0)
    assert by_share.twin(0.0, 0.0).failed("x", 0.0), "two of four"
    in_row = Breaker(BreakerPolicy(failures=2))
    in_row.failed("x", 0.0)
    assert in_row.twin(0.0, 0.0).failed("x", 0.0)
    assert in_row.state is by_share.state is CLOSED


def test_a_probe_is_not_out_at_a_twin() -> None:
    breaker = opened(BreakerPolicy(failures=1, reset_after=30, successes=2))
    breaker.succeeded(probe(breaker, 30.0))
    probe(breaker, 30.0)
    twin = breaker.twin(30.0, 0.0)
    twin.succeeded(probe(twin, 0.0))
    assert twin.state is CLOSED, "one had succeeded"
