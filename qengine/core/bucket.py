"""The token bucket, as a rule over one float.

The state is `zero_at`: the instant at which the bucket would hold no token, so that

    tokens(now) = min(burst, (now - zero_at) * rate)

Taking n tokens moves the instant forward by n / rate.  Unless something is given back it only grows: a stale or
backward clock reading can refuse, but never mint a token.  The rule holds no state; who owns the state commits it by
one assignment.  (The generic cell rate algorithm, ITU-T I.371, in its virtual scheduling form.)
"""

from __future__ import annotations

from ..policy import RateLimit

CATCH_UP = 0.020
"""Seconds of late wake-ups that are made good: declared as slack in the promise about windows."""

EPSILON = 1e-9
"""Seconds by which a taker may be early, at the least: so that the last bits of an instant refuse nobody."""


def epsilon(now: float) -> float:
    """Return what two instants near `now` may differ by in the last bits: at least 1 ns, about 4 ulp."""
    return EPSILON + now * 9e-16 if now > 0 else EPSILON


class TokenBucket:
    """The rule of one `RateLimit`."""

    __slots__ = ("interval", "most", "span", "unit")

    def __init__(self, limit: RateLimit) -> None:
        self.unit = limit.unit
        self.most = limit.burst
        rate = limit.rate
        self.interval = 1.0 / rate
        self.span = limit.burst / rate

    def initial(self, now: float, tokens: float | None = None) -> float:
        """Return the state of a bucket with so many tokens; None for a full one."""
        return now - (self.span if tokens is None else min(self.span, tokens * self.interval))

    def ask(
        self,
        zero_at: float,
        amount: float,
        now: float,
        slack: float = 0.0,
        held: bool = False,
        early: float = EPSILON,
    ) -> tuple[float, float]:
        """Return when `amount` may be taken (`now` if it may be now), and the state once it is taken."""
        oldest = now - self.span - slack
        taken = (zero_at if zero_at > oldest else oldest) + amount * self.interval
        return (taken if taken > now + early else now), taken

    def settle(self, zero_at: float, amount: float, now: float, used: float) -> float:
        """Return the state after the outcome of a call that took `amount`, and turned out to have used `used`."""
        if used > amount:
            return self.charge(zero_at, used - amount, now)
        return self.refund(zero_at, amount - used, now)

    def undo(self, zero_at: float, amount: float) -> float:
        """Return the state as if `amount` had not been taken a moment ago."""
        return zero_at - amount * self.interval

    def refund(self, zero_at: float, amount: float, now: float) -> float:
        """Return the state with `amount` more in it, but not above the burst."""
        return max(zero_at - amount * self.interval, min(zero_at, now - self.span))

    def charge(self, zero_at: float, amount: float, now: float, slack: float = 0.0, held: bool = False) -> float:
        """Return the state with `amount` less in it, be it below nothing."""
        return max(zero_at, now - self.span - slack) + amount * self.interval

    def shifted(self, zero_at: float, seconds: float) -> float:
        """Return the state where instants count from so many seconds later."""
        return zero_at - seconds

    def moved(self, zero_at: float, now: float, to: float) -> float:
        """Return the state on another clock, which shows `to` where this one shows `now`."""
        return max(to - self.span, zero_at - now + to)

    def taken_over(self, other: TokenBucket, zero_at: float, now: float) -> float:
        """Return the state in place of another bucket's: its tokens, or its debt, stay."""
        return now - min(self.most, other.available(zero_at, now)) * self.interval

    def dump(self, zero_at: float, now: float) -> float:
        """Return what was taken and is not there again."""
        return self.most - self.available(zero_at, now)

    def load(self, zero_at: float, dumped: float, now: float, elapsed: float, longest: float) -> float:
        """Return the state with what was dumped so many seconds ago taken as well."""
        left = dumped - (elapsed / self.interval if self.interval else 0.0)
        return self.charge(zero_at, left, now) if left > 0 else zero_at

    def available(self, zero_at: float, now: float) -> float:
        """Return the tokens there now; below 0 where there is a debt."""
        if self.interval == 0.0:
            return self.most
        return min(self.most, (now - zero_at) / self.interval)
