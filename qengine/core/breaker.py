"""The circuit breaker: a source that keeps failing is left alone, then probed.

    state      an attempt succeeds           an attempt fails                  reset_after passed
    CLOSED     failures in a row = 0         enough failures: OPEN
    OPEN                                                                       one probe: HALF_OPEN
    HALF_OPEN  the probe's: enough: CLOSED   the probe's: OPEN, twice as long

Rules: asking takes nothing; a probe is marked only when every other gate has said yes.  What was in flight when it
opened is no probe and decides nothing.  One that was given up, or answered by a 429, frees the probe's place.
(Nygard, "Release It!", 2007.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ..policy import BreakerPolicy


class BreakerState(Enum):
    """What the breaker lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


CLOSED = BreakerState.CLOSED


class Breaker:
    """The state machine of one `BreakerPolicy`."""

    __slots__ = (
        "_failed_in_row",
        "_policy",
        "_probe",
        "_probes_passed",
        "_recent",
        "_reopens",
        "_reset_at",
        "spotless",
        "state",
    )

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self.state = CLOSED
        self.spotless = policy.failure_rate is None  # whether another success would change nothing
        self._failed_in_row = 0
        self._recent: deque[bool] = deque(maxlen=policy.min_calls)
        self._reopens = 0
        self._reset_at = -math.inf
        self._probe: object = None
        self._probes_passed = 0

    def twin(self, now: float, to: float) -> Breaker:
        """Return another of the same state, on a clock that shows `to` where this one shows `now`; no probe is out."""
        other = Breaker(self._policy)
        other.state, other.spotless = self.state, self.spotless
        other._failed_in_row, other._reopens = self._failed_in_row, self._reopens
        other._recent.extend(self._recent)
        other._probes_passed, other._reset_at = self._probes_passed, self._reset_at - now + to
        return other

    def dump(self, now: float) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "state": self.state.value,
            "reset_in": None if self.state is CLOSED else self._reset_at - now,
            "failed_in_row": self._failed_in_row,
            "recent": [*self._recent],
            "reopens": self._reopens,
            "probes_passed": self._probes_passed,
        }

    def load(self, dumped: Mapping[str, Any], now: float, elapsed: float) -> None:
        """Be as another one was so many seconds ago; a probe that was out then brings no verdict."""
        self._failed_in_row, self._reopens = dumped["failed_in_row"], dumped["reopens"]
        self._probes_passed = dumped["probes_passed"]
        self._recent.extend(dumped["recent"])
        if dumped["reset_in"] is not None:
            self._reset_at = now + dumped["reset_in"] - elapsed
        self.spotless = self.spotless and not (self._failed_in_row or self._recent)
        self.state = BreakerState(dumped["state"])
        if self.state is not CLOSED:
            self.spotless = False

    def ready_at(self, now: float) -> float:
        """Return when it lets an attempt through: `now` or before, or infinity while a probe is out."""
        if self.state is CLOSED:
            return now
        return self._reset_at if self._probe is None else math.inf

    def skips(self, now: float) -> bool:
        """Say whether tasks should be skipped rather than wait for the next probe."""
        if self.state is CLOSED or (self._probe is None and self._reset_at <= now):
            return False
        gave_up = self._policy.max_reopens is not None and self._reopens >= self._policy.max_reopens
        return self._policy.on_open == "skip" or (gave_up and self.state is BreakerState.OPEN)

    def admitted(self, attempt: object) -> None:
        """Mark an attempt that was let through; while it is not closed, that is the probe."""
        if self.state is not CLOSED:
            self.state = BreakerState.HALF_OPEN
            self._probe = attempt

    def succeeded(self, attempt: object) -> None:
        """Count a success."""
        if self._probe is attempt:
            self._probe = None
            self._probes_passed += 1
            if self._probes_passed >= self._policy.successes:
                self._close()
        elif self.state is CLOSED:
            self._failed_in_row = 0
            self.spotless = self._policy.failure_rate is None
            if not self.spotless:
                self._recent.append(False)

    def failed(self, attempt: object, now: float) -> bool:
        """Count a failure; return whether it opened the breaker."""
        if self._probe is attempt:
            self._reopens += 1
            self.trip(now)
            return True
        if self.state is not CLOSED:
            return False
        self._failed_in_row += 1
        self.spotless = False
        self._recent.append(True)
        if self._too_many_in_row() or self._too_large_a_share():
            self.trip(now)
            return True
        return False

    def dropped(self, attempt: object) -> None:
        """Free the place of a probe that brought no verdict."""
        if self._probe is attempt:
            self._probe = None

    def trip(self, now: float) -> None:
        """Open it."""
        self.spotless = False
        self._probes_passed = 0
        reset_after = self._policy.reset_after * 2.0 ** min(self._reopens, 60)  # bounded: a float overflows at 2**1024
        self._reset_at = now + min(reset_after, self._policy.max_reset_after)
        self._probe = None
        self.state = BreakerState.OPEN  # last: a signal handler that raises before leaves no state with half its facts

    def refuse_probe(self, now: float) -> None:
        """Count a probe that was due but could not be made as one that failed."""
        self._reopens += 1
        self.trip(now)

    def _close(self) -> None:
        self._failed_in_row = self._reopens = self._probes_passed = 0
        self._recent.clear()
        self.state = CLOSED
        self.spotless = self._policy.failure_rate is None

    def _too_many_in_row(self) -> bool:
        return self._policy.failures is not None and self._failed_in_row >= self._policy.failures

    def _too_large_a_share(self) -> bool:
        rate, calls = self._policy.failure_rate, len(self._recent)
        return rate is not None and calls >= self._policy.min_calls and sum(self._recent) / calls >= rate
