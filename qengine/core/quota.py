"""A quota: at most so much in a period, of which some is reserved and some is used.

Rules: it knows no clock and no calendar: a period is its end, an instant that is handed in.  What was reserved in a
period is settled in that one, also when the next has begun.  A period that has begun is never left for an earlier one,
so a clock that steps back grants nothing a second time.  Each change is one straight line without a call, so that what
a signal handler does in between is neither lost nor counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

ROUNDING = 1e-12
"""The share of the limit that sums of fractions may be off by: ten times 0.1 is to fit into 1."""


class Period:
    """What of one period is reserved, what is used, and how many of the alerts were due."""

    __slots__ = ("alerted", "ends_at", "reserved", "used")

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.reserved: float = 0
        self.used: float = 0
        self.alerted = 0


class Hold:
    """An amount that was reserved in a period; `used` is what of it turned out to be used, None until that is known."""

    __slots__ = ("amount", "period", "used")

    def __init__(self, period: Period, amount: float) -> None:
        self.period = period
        self.amount = amount
        self.used: float | None = None


class Allowance(Protocol):
    """A quota as a lane takes from it, with a lock and a calendar of its own."""

    unit: str

    @property
    def limit(self) -> float:
        """How much may be used in a period."""

    @property
    def remaining(self) -> float:
        """What is neither reserved nor used in this period."""

    @property
    def unused(self) -> float:
        """What is not used in this period, be it reserved or not."""

    def fits(self, amount: float) -> bool:
        """Say whether an amount is there."""

    def might_fit(self, amount: float) -> bool:
        """Say whether an amount is there, or would be if what is reserved were not used after all."""

    def reserve(self, amount: float) -> Hold | None:
        """Reserve an amount, all of it or nothing; None if it is not there."""

    def note(self) -> Hold:
        """Reserve nothing, though there may be nothing, for what is expected to use nothing."""

    def settle(self, hold: Hold, used: float | None = None) -> object:
        """Turn what was reserved into what was used, None for just that."""

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved, settled or not: it was never made use of."""


class Ledger:
    """What is reserved and used of a limit in the current period.

    It has no lock: who owns it lets in one at a time.

    Args:
        limit: How much may be used in a period.
        shares: Of the limit, ascending: each is due once in a period, when so much is used.
    """

    __slots__ = ("_full", "_marks", "_most", "limit", "period", "shares")

    def __init__(self, limit: float, shares: Sequence[float] = ()) -> None:
        self.limit = limit
        self.shares = tuple(shares)
        self.period = Period(-math.inf)
        slack = limit * ROUNDING
        self._most = limit + slack
        self._full = limit - slack
        self._marks = [share * limit - slack for share in self.shares]

    def twin(self) -> Ledger:
        """Return another of the same limit and period in the same state, which tells no alerts."""
        other = Ledger(self.limit)
        other.period = Period(self.period.ends_at)
        other.period.reserved, other.period.used = self.period.reserved, self.period.used
        return other

    def begin(self, now: float, ends_at: float) -> None:
        """Begin the period that ends at `ends_at`, if the current one is over by now."""
        if self.period.ends_at <= now:
            self.period = Period(ends_at)

    @property
    def remaining(self) -> float:
        """What is neither reserved nor used; below 0 after an overrun."""
        period = self.period
        left = self.limit - period.used - period.reserved
        return 0 if abs(left) <= self.limit * ROUNDING else left

    @property
    def unused(self) -> float:
        """What is not used, be it reserved or not; below 0 after an overrun."""
        return self.limit - self.period.used

    def fits(self, amount: float) -> bool:
        """Say whether an amount is there.

        When the limit is reached there is nothing for anybody, not even for an amount of 0: that is what one asks for
        who will know only afterwards how much it was.
        """
        period = self.period
        taken = period.used + period.reserved
        return taken + amount <= self._most and taken < self._full

    def reserve(self, amount: float) -> Hold | None:
        """Reserve an amount, all of it or nothing; None if it is not there."""
        hold = Hold(self.period, amount)
        period = hold.period
        taken = period.used + period.reserved
        if taken + amount > self._most or taken >= self._full:
            return None
        period.reserved += amount
        return hold

    def note(self) -> Hold:
        """Reserve nothing, though there may be nothing, for what is expected to use nothing."""
        return Hold(self.period, 0)

    def might_fit(self, amount: float) -> bool:
        """Say whether an amount is there, or would be if what is reserved were not used after all."""
        used = self.period.used
        return used + amount <= self._most and used < self._full

    def settle(self, hold: Hold, used: float | None = None) -> bool:
        """Turn what was reserved into what was used, None for just that; return False if it had been done before."""
        period, amount = hold.period, hold.amount
        if hold.used is not None:
            return False
        hold.used = amount if used is None else used
        period.reserved -= amount
        period.used += hold.used
        return True

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved, settled or not: it was never made use of."""
        period, amount = hold.period, hold.amount
        if hold.used is None:
            period.reserved -= amount
        else:
            period.used -= hold.used
        hold.used = 0

    def dump(self) -> dict[str, float | None]:
        """Return what is used or reserved of the current period, and when that ends; None where it never does."""
        period = self.period
        reserved = period.reserved  # first: what is settled in this moment counts twice rather than not at all
        ends_at = period.ends_at if math.isfinite(period.ends_at) else None
        return {"ends_at": ends_at, "used": period.used + reserved}

    def load(self, dumped: Mapping[str, float | None]) -> None:
        """Have at least so much of the same period used as was dumped; a later period is begun."""
        ends_at, used = dumped["ends_at"], dumped["used"]
        assert used is not None
        if ends_at is not None and ends_at > self.period.ends_at:
            self.period = Period(ends_at)
        if ends_at is None or ends_at == self.period.ends_at:
            self.period.used = max(self.period.used, used)

    def due(self, period: Period) -> Sequence[float]:
        """Return the shares that have become due since this was last asked about that period."""
        first = period.alerted
        while period.alerted < len(self._marks) and period.used >= self._marks[period.alerted]:
            period.alerted += 1
        return self.shares[first : period.alerted]
