"""How long to wait before another attempt."""

from __future__ import annotations

import random

import pytest

from qengine import RetryPolicy
from qengine.core.backoff import backoff_delay


def test_without_jitter_each_wait_is_longer_up_to_the_most() -> None:
    policy = RetryPolicy(9, backoff=2, multiplier=3, max_backoff=50, jitter="none")
    assert [backoff_delay(policy, number, random.Random(0)) for number in range(1, 6)] == [2, 6, 18, 50, 50]


def test_full_jitter_takes_any_share_of_the_wait() -> None:
    policy, rng = RetryPolicy(9, backoff=8, multiplier=1), random.Random(0)
    delays = [backoff_delay(policy, 1, rng) for _ in range(4000)]
    assert 0 <= min(delays) < 0.1 and 7.9 < max(delays) <= 8
    assert sum(delays) / len(delays) == pytest.approx(4.0, rel=0.05)


def test_the_random_source_given_is_the_one_used() -> None:
    policy = RetryPolicy(9, backoff=8)
    assert backoff_delay(policy, 2, random.Random(5)) == random.Random(5).uniform(0, 16)


def test_no_number_of_attempts_is_too_many() -> None:
    policy = RetryPolicy(10**6, backoff=1, multiplier=10.0, max_backoff=60, jitter="none")
    assert backoff_delay(policy, 10**5, random.Random(0)) == 60
