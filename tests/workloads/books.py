"""What is in use at an instant, event by event: the limits of a lane, its breaker, what it may use, and the lane.

Rules: a book says what is surely so.  Where the log leaves a doubt (whose call it was, whether it was made at all) it
keeps the least and the most, and both pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from qengine import BreakerPolicy, ExecutionPolicy, RateLimit, Window

from .model import budgets_of, part_of

EPS = 1e-9                  # what two ways to add up the same instants may differ by
CATCH_UP = 0.020            # the slack that promise 2 declares


class BreakerBook:
    """What the outcomes of a lane make of its breaker, by the words of BreakerPolicy."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self.closed = True
        self.opens_at_once = False      # the next event must say so
        self.reset_at = -math.inf
        self.reopens = 0
        self.probe: Hashable = None
        self.vague = False              # too many calls hung: it was kept shut, which the log does not always say
        self._row = 0
        self._passed = 0
        self._recent: deque[bool] = deque(maxlen=policy.min_calls)

    def opened(self, at: float) -> None:
        policy = self.policy
        self.closed = False
        self.opens_at_once = False
        self.probe = None
        self._passed = 0
        self.reset_at = at + min(policy.max_reset_after, policy.reset_after * 2.0**self.reopens)

    def outcome(self, who: Hashable, well: bool | None) -> None:
        """An attempt ended; None where that says nothing about the source."""
        if self.probe == who and who is not None:
            self.probe = None
            if well is False:
                self.reopens += 1
                self.opens_at_once = True
            elif well:
                self._passed += 1
                if self._passed >= self.policy.successes:
                    self.closed = True
                    self._row = self.reopens = self._passed = 0
                    self._recent.clear()
        elif self.closed and well is not None:
            self._row = 0 if well else self._row + 1
            self._recent.append(not well)
            policy, share = self.policy, sum(self._recent) / len(self._recent)
            in_a_row = policy.failures is not None and self._row >= policy.failures
            enough = len(self._recent) >= policy.min_calls
            rate = policy.failure_rate is not None and enough and share >= policy.failure_rate
            self.opens_at_once = not well and (in_a_row or rate)

    def lets_in(self, at: float) -> bool:
        return self.closed or (self.probe is None and at >= self.reset_at - EPS)

    def may_skip(self, at: float) -> bool:
        """Whether tasks may be skipped rather than wait for a probe that is due."""
        if self.vague:
            return True
        if self.closed or (self.probe is None and at >= self.reset_at + EPS):
            return False
        given_up = self.policy.max_reopens is not None and self.reopens >= self.policy.max_reopens
        return self.policy.on_open == "skip" or (given_up and self.probe is None)


class BucketBook:
    """The tokens of a `RateLimit`: at least, and at most, with what late wake-ups may make good."""

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self.rate = limit.rate
        self.least = limit.burst
        self.most = self.full = limit.burst + limit.rate * CATCH_UP
        self._at = -math.inf

    def look(self, at: float) -> None:
        """It is that instant."""
        refill = max(0.0, at - self._at) * self.rate
        self._at = max(self._at, at)
        self.least = min(self.limit.burst, self.least + refill)
        self.most = min(self.full, self.most + refill)

    def has(self, amount: float, at: float) -> bool:
        """Whether so much is there surely at an instant; at one just passed, what came since then is not yet there."""
        return min(self.limit.burst, self.least + (at - self._at) * self.rate) >= amount

    def take(self, amount: float) -> None:
        self.least -= amount
        self.most -= amount

    def give(self, least: float, most: float) -> None:
        """Something comes back, at least and at most so much; less than nothing is a charge."""
        self.least = min(self.limit.burst, self.least + least) if least > 0 else self.least + least
        self.most += most


class WindowBook:
    """The slots of a `Window`, each with its end, and what it has at least and at most."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._slots: dict[Hashable, tuple[float, float, float]] = {}
        self._known: dict[float, tuple[float, float]] = {}      # what was in use at an instant, as things stand

    def take(self, who: Hashable, amount: float) -> None:
        self._slots[who] = (math.inf, amount, amount)
        self._known.clear()

    def end(self, who: Hashable, at: float, least: float, most: float) -> None:
        self._slots[who] = (at, least, most)
        self._known.clear()

    def used(self, at: float) -> tuple[float, float]:
        """What is in use at an instant, at least and at most."""
        if at not in self._known:
            live = [slot for slot in self._slots.values() if slot[0] + self.window.seconds > at + EPS]
            self._known[at] = math.fsum(slot[1] for slot in live), math.fsum(slot[2] for slot in live)
        return self._known[at]


class GateBook:
    """What outlives a run: limits, breaker and pause of one lane, or of those that share a limiter."""

    def __init__(self, limits: Any, breaker: BreakerPolicy | None = None) -> None:
        self.buckets = [BucketBook(limit) for limit in limits if isinstance(limit, RateLimit)]
        self.windows = [WindowBook(limit) for limit in limits if isinstance(limit, Window)]
        self.breaker = None if breaker is None else BreakerBook(breaker)
        self.paused_until = -math.inf
        self.maybe_paused_until = -math.inf
        self._amounts: dict[Hashable, Any] = {}

    def look(self, at: float) -> None:
        for bucket in self.buckets:
            bucket.look(at)

    def too_much(self, amount: Any, at: float, slack: float) -> list[str]:
        """Name the limits that an amount surely breaks at an instant; `slack` is how late it may be seen."""
        self.look(at)
        words = []
        for bucket in self.buckets:
            part = part_of(amount, bucket.limit.unit)
            if part > bucket.most + bucket.limit.rate * slack + 1e-6:
                words.append(f"more than {bucket.limit} allows")
        for book in self.windows:
            left = book.window.limit - book.used(at + slack)[0]
            if part_of(amount, book.window.unit) > left + EPS:
                words.append(f"{book.window} has {left} left")
        return words

    def lets_in(self, amount: Any, at: float) -> bool:
        """Whether an amount surely is to be had, so that there is no reason to wait."""
        return all(bucket.has(part_of(amount, bucket.limit.unit), at - 1e-9) for bucket in self.buckets) and all(
            book.window.limit - book.used(at - 2 * EPS)[1] >= part_of(amount, book.window.unit)
            for book in self.windows
        )

    def take(self, who: Hashable, amount: Any) -> None:
        """An attempt was admitted."""
        self._amounts[who] = amount
        for bucket in self.buckets:
            bucket.take(part_of(amount, bucket.limit.unit))
        for book in self.windows:
            book.take(who, part_of(amount, book.window.unit))

    def end(self, who: Hashable, at: float, recorded: list[Mapping[str, float]]) -> None:
        """It ended; `recorded` is what it may have recorded."""
        self.look(at)
        amount = self._amounts[who]
        for bucket in self.buckets:
            part = part_of(amount, bucket.limit.unit)
            least, most = _span(recorded, bucket.limit.unit, part)
            bucket.give(part - most, part - least)
        for book in self.windows:
            part = part_of(amount, book.window.unit)
            book.end(who, at, *_span(recorded, book.window.unit, part))

    def revoke(self, who: Hashable, at: float) -> None:
        """It ended, and was never made."""
        self.look(at)
        for bucket in self.buckets:
            part = part_of(self._amounts[who], bucket.limit.unit)
            bucket.give(part, part)
        for book in self.windows:
            book.end(who, at, 0.0, 0.0)


def _span(recorded: list[Mapping[str, float]], unit: str, part: float) -> tuple[float, float]:
    """What was used of a unit, at least and at most."""
    told = [float(used.get(unit, part)) for used in recorded]
    return min(told), max(told)


Span = tuple[float, float]
"""At least, and at most."""


class AllowanceBook:
    """What is reserved and used of a budget, or of a quota."""

    def __init__(self, unit: str, limit: float) -> None:
        self.unit = unit
        self.limit = limit
        self.used: Span = (0.0, 0.0)
        self._held: dict[Hashable, Span] = {}
        self._settled: dict[Hashable, Span] = {}

    @property
    def taken(self) -> Span:
        """What is reserved or used."""
        held = list(self._held.values())
        return self.used[0] + math.fsum(h[0] for h in held), self.used[1] + math.fsum(h[1] for h in held)

    def fits(self, part: float, taken: float) -> bool:
        """Whether an amount is there if so much is taken."""
        return taken + part <= self.limit + EPS and taken < self.limit

    def take(self, who: Hashable, part: Span) -> None:
        self._held[who] = part

    def end(self, who: Hashable, usage: Mapping[str, float]) -> None:
        """What was reserved is now used, or in its place what the call used, where that says so."""
        part = self._held.pop(who)
        if self.unit == "cost":
            part = (usage.get("cost", 0.0),) * 2
        elif self.unit != "calls" and self.unit in usage:
            part = (usage[self.unit],) * 2
        self._settled[who] = part
        self._use(part, 1)

    def revoke(self, who: Hashable) -> None:
        """It was never made."""
        self._use(self._settled.pop(who), -1)

    def _use(self, part: Span, sign: int) -> None:
        self.used = self.used[0] + sign * part[0], self.used[1] + sign * part[1]


class LaneBook:
    """What a lane of one run has in use."""

    def __init__(
        self, run: int, name: str, policy: ExecutionPolicy, gate: GateBook, quotas: Sequence[AllowanceBook]
    ) -> None:
        self.run = run
        self.name = name
        self.policy = policy
        self.gate = gate
        self.running: dict[int, float] = {}
        budgets = budgets_of(policy)
        self.budget = budgets.pop("calls", None)
        self.purse = [*(AllowanceBook(unit, limit) for unit, limit in budgets.items()), *quotas]
        self.reserved: set[int] = set()         # tasks for whose next attempt a unit is kept
        self.hanging = self.hanging_at_most = 0
        self.max_abandoned = max(2, policy.concurrency) if policy.max_abandoned is None else policy.max_abandoned
        self.batch: set[int] = set()
        self.batch_open: set[int] = set()
        self.batch_over_at = -math.inf
        self.ended = 0

    @property
    def breaker(self) -> BreakerBook | None:
        return self.gate.breaker

    @property
    def hangs(self) -> bool:
        """Whether so many calls may hang that it starts no more."""
        return self.hanging_at_most >= self.max_abandoned

    def batch_takes(self, index: int, at: float) -> bool:
        """Whether a task belongs to the batch, has room in it, or may open the next."""
        if self.policy.batch_size is None or index in self.batch or len(self.batch) < self.policy.batch_size:
            return True
        return not self.batch_open and at >= self.batch_over_at + self.policy.batch_backoff - EPS

    def gives_up(self, at: float) -> bool:
        """Whether tasks that wait may be ended, because the source is left alone."""
        return self.hangs if self.breaker is None else self.breaker.may_skip(at)
