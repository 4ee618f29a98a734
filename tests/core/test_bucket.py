"""The token bucket: a rule over one float."""

from __future__ import annotations

import math
import random

import pytest

from qengine import RateLimit
from qengine.core.bucket import CATCH_UP, TokenBucket, epsilon

ONE = TokenBucket(RateLimit(per_second=1, burst=3))
FOUR = TokenBucket(RateLimit(per_second=4, burst=8))


def take_all(bucket: TokenBucket, state: float, now: float, slack: float = 0.0) -> tuple[int, float]:
    """How many single tokens the bucket gives now, and its state then."""
    count = 0
    while True:
        ready_at, after = bucket.ask(state, 1, now, slack)
        if ready_at > now:
            return count, state
        count, state = count + 1, after


def test_a_full_bucket_gives_its_burst_and_not_one_more() -> None:
    assert take_all(ONE, ONE.initial(100.0), 100.0)[0] == 3


def test_a_bucket_may_start_with_fewer_tokens_but_never_with_more() -> None:
    assert take_all(ONE, ONE.initial(0.0, 1), 0.0)[0] == 1
    assert take_all(ONE, ONE.initial(0.0, 0), 0.0)[0] == 0
    assert take_all(ONE, ONE.initial(0.0, 99), 0.0)[0] == 3


def test_an_empty_bucket_says_when_the_next_token_is_there() -> None:
    state = ONE.initial(0.0, 0)
    assert ONE.ask(state, 1, 0.0)[0] == 1.0
    assert ONE.ask(state, 2.5, 0.0)[0] == 2.5
    assert ONE.ask(state, 1, 0.25)[0] == 1.0, "the instant does not move with the question"


def test_at_the_instant_it_named_the_tokens_are_there() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        bucket = TokenBucket(RateLimit(per_second=10 ** rng.uniform(-4, 4), burst=rng.randint(1, 9)))
        now = 10 ** rng.uniform(-3, 9)
        state, amount = bucket.initial(now, rng.uniform(0, 3)), rng.uniform(0.01, bucket.most)
        ready_at, _ = bucket.ask(state, amount, now)
        assert bucket.ask(state, amount, ready_at)[0] == ready_at


def test_rest_refills_up_to_the_burst_only() -> None:
    _, empty = take_all(ONE, ONE.initial(0.0), 0.0)
    assert take_all(ONE, empty, 2.0)[0] == 2
    assert take_all(ONE, empty, 1e6)[0] == 3


def test_a_late_taker_is_made_good_by_the_slack_and_no_more() -> None:
    bucket = TokenBucket(RateLimit(per_second=1))
    _, state = bucket.ask(bucket.initial(0.0), 1, 0.0)
    _, state = bucket.ask(state, 1, 1.015, CATCH_UP)
    assert bucket.ask(state, 1, 1.02, CATCH_UP)[0] == pytest.approx(2.0), "15 ms late: the rhythm is kept"
    _, state = bucket.ask(state, 1, 5.0, CATCH_UP)
    assert bucket.ask(state, 1, 5.0, CATCH_UP)[0] == pytest.approx(6.0 - CATCH_UP), "a second late: 20 ms are kept"


def test_a_backward_clock_refuses_but_mints_nothing() -> None:
    _, state = take_all(ONE, ONE.initial(100.0), 100.0)
    assert take_all(ONE, state, 50.0)[0] == 0
    assert ONE.ask(state, 1, 50.0)[0] == 101.0, "nobody waits for longer than the step and the token"
    assert take_all(ONE, state, 101.0)[0] == 1


def test_a_forward_clock_releases_one_burst_at_most() -> None:
    _, state = take_all(ONE, ONE.initial(0.0), 0.0)
    assert take_all(ONE, state, 1e9)[0] == 3


def test_what_was_given_back_can_be_taken_again() -> None:
    state = ONE.initial(0.0)
    _, after = ONE.ask(state, 2, 0.0)
    assert ONE.available(after, 0.0) == pytest.approx(1.0)
    assert ONE.available(ONE.undo(after, 2), 0.0) == pytest.approx(3.0)


def test_giving_back_never_fills_it_beyond_the_burst() -> None:
    assert take_all(ONE, ONE.undo(ONE.initial(0.0), 99), 0.0)[0] == 3
    assert ONE.available(ONE.undo(ONE.initial(0.0), 99), 0.0) == 3


def test_an_outcome_corrects_what_was_taken() -> None:
    assert ONE.settle(5.0, 1, 9.0, 1) == 5.0
    assert ONE.settle(8.0, 2, 9.0, 1) == 7.0, "too much was taken: one token back"
    assert ONE.settle(8.0, 1, 9.0, 3) == 10.0, "an overrun is a debt"
    assert ONE.settle(6.0, 3, 9.0, 1) == 6.0, "it is full already"


def test_places_booked_in_the_line_show_as_a_debt() -> None:
    state = ONE.initial(0.0)
    for _ in range(5):
        _, state = ONE.ask(state, 1, 0.0)
    assert ONE.available(state, 0.0) == pytest.approx(-2.0)


def test_an_unlimited_rate_never_refuses() -> None:
    bucket = TokenBucket(RateLimit(per_second=math.inf, burst=2))
    state = bucket.initial(0.0)
    for _ in range(100):
        ready_at, state = bucket.ask(state, 2, 0.0)
        assert ready_at == 0.0
    assert bucket.available(state, 0.0) == 2


def test_no_period_sees_more_than_burst_and_rate_allow() -> None:
    rng = random.Random(3)
    for _ in range(30):
        rate, burst = 10 ** rng.uniform(-1, 2), rng.randint(1, 5)
        bucket, now = TokenBucket(RateLimit(per_second=rate, burst=burst)), 1e5
        state, taken = bucket.initial(now), list[float]()
        for _ in range(200):
            now += rng.expovariate(1.0) * rng.choice((0.1, 3.0)) / rate
            count, state = take_all(bucket, state, now, CATCH_UP)
            taken += [now] * count
        for first in range(0, len(taken), 3):
            for last in range(first, len(taken)):
                allowed = burst + rate * (taken[last] - taken[first] + CATCH_UP)
                assert last - first + 1 <= allowed + 1e-6


def test_the_last_bits_of_large_instants_are_no_reason_to_wait() -> None:
    for now in (0.0, 1.0, 1e5, 1.8e9, 1e12):
        assert max(1e-9, 3.9 * math.ulp(now)) <= epsilon(now) <= max(2e-9, 10 * math.ulp(now))
    assert epsilon(-5.0) == 1e-9


def test_tokens_come_at_the_rate() -> None:
    state = FOUR.initial(0.0, 2)
    assert (FOUR.available(state, 0.0), FOUR.available(state, 1.0), FOUR.available(state, 9.0)) == (2, 6, 8)
    assert FOUR.ask(state, 4, 0.0)[0] == 0.5


def test_a_taker_may_be_early_by_so_much_and_no_more() -> None:
    assert ONE.ask(0.0, 1, 0.5, early=0.5)[0] == 0.5
    assert ONE.ask(0.0, 1, 0.4375, early=0.5)[0] == 1.0


def test_what_is_charged_is_what_asking_would_have_taken() -> None:
    for zero_at in (0.0, 6.0, 7.5, 10.0):
        assert ONE.charge(zero_at, 2, 10.0, 0.5) == ONE.ask(zero_at, 2, 10.0, 0.5)[1]


@pytest.mark.parametrize("tokens", [-4, 0, 5, 8])
def test_on_another_clock_it_has_the_same_tokens_and_is_full_at_the_same_time(tokens: float) -> None:
    state = FOUR.moved(100.0 - tokens / 4, 100.0, 1000.0)
    assert FOUR.available(state, 1000.0) == tokens
    assert FOUR.available(state, 1000.25) == min(8, tokens + 1)


def test_on_another_clock_it_has_no_more_than_its_burst() -> None:
    assert take_all(FOUR, FOUR.moved(0.0, 100.0, 7.0), 7.0)[0] == 8
    assert FOUR.moved(0.0, 100.0, 7.0) == 5.0, "and none that a slack could give"


def test_another_bucket_takes_over_the_tokens_or_the_debt_but_no_more_than_it_holds() -> None:
    assert FOUR.taken_over(ONE, 98.0, 100.0) == 99.5, "two tokens, at four a second"
    assert FOUR.taken_over(ONE, 102.0, 100.0) == 100.5
    assert ONE.taken_over(FOUR, 98.0, 100.0) == 97.0
