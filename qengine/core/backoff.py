"""How long to wait before another attempt."""

from __future__ import annotations

from typing import Protocol

from ..policy import RetryPolicy


class Uniform(Protocol):
    """The part of `random.Random` that is needed."""

    def uniform(self, a: float, b: float, /) -> float:
        """Return a number between a and b."""


def backoff_delay(policy: RetryPolicy, number: int, rng: Uniform) -> float:
    """Return the seconds to wait after attempt `number` (1 is the first) failed."""
    try:
        delay = min(policy.max_backoff, policy.backoff * policy.multiplier ** (number - 1))
    except OverflowError:
        delay = policy.max_backoff
    return rng.uniform(0.0, delay) if policy.jitter == "full" else delay
