"""The limiter, slow and obviously right: what the tests of the real one hold it against.

`Model` keeps what has happened (`history`) and who stands in line (`line`), two plain lists, and answers each question
by going through all of it from the beginning, in exact arithmetic.  To give something back that was taken is to take it
out of the history.  It keeps no state that could go wrong and shares no code with the limiter.

It does not wait: it is told when a waiter goes on, and says whether he should have.  `now` never goes back but for
steps of the clock, which the model allows where there is no reservation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qengine import RateLimit, Window

Amount = float | Mapping[str, float]
Limits = Sequence[RateLimit | Window]

EPS = Fraction(1, 10**9)        # seconds that the last bits of an instant may amount to
CATCH_UP = Fraction(0.020)      # seconds of lateness that a bucket makes good to who waited in line


class Impossible(ValueError):
    """The amount could never be had."""


def part_of(amount: Amount, unit: str, implied: int = 1) -> Fraction:
    """How much of `unit` an amount is; a mapping that does not name calls is `implied` calls."""
    if isinstance(amount, Mapping):
        return Fraction(amount.get(unit, implied if unit == "calls" else 0))
    return Fraction(amount)


class Bucket:
    """Tokens at an instant, and how they grow."""

    def __init__(self, limit: RateLimit, now: Fraction, tokens: float | None = None) -> None:
        self.limit = limit
        self.at = now
        self.tokens = Fraction(limit.burst) if tokens is None else min(Fraction(limit.burst), Fraction(tokens))

    @property
    def most(self) -> float:
        return self.limit.burst

    def left(self, now: Fraction, slack: Fraction = Fraction(0)) -> Fraction:
        rate = Fraction(self.limit.rate)
        return min(Fraction(self.most) + slack * rate, self.tokens + (now - self.at) * rate)

    def ready_at(self, amount: Fraction, now: Fraction, slack: Fraction = Fraction(0)) -> Fraction:
        return max(now, now + (amount - self.left(now, slack)) / Fraction(self.limit.rate))

    def take(self, amount: Fraction, now: Fraction, slack: Fraction = Fraction(0)) -> None:
        self.tokens = self.left(now, slack) - amount
        self.at = now

    def give_back(self, amount: Fraction, now: Fraction) -> None:
        tokens = self.tokens + (now - self.at) * Fraction(self.limit.rate)      # who comes late may have more than most
        self.tokens = max(tokens, min(tokens + amount, Fraction(self.most)))
        self.at = now

    def change(self, limit: RateLimit, now: Fraction) -> None:
        self.take(Fraction(0), now)
        self.limit = limit
        self.tokens = min(self.tokens, Fraction(self.most))


class Slots:
    """What was taken, and when, oldest first.

    What has run out when something is taken is forgotten: and then the clock is not believed that it is before that.
    """

    def __init__(self, limit: Window, now: Fraction, tokens: float | None = None) -> None:
        self.limit = limit
        self.taken: list[tuple[Fraction, Fraction]] = []
        self.not_before = -Fraction(10) ** 9        # long ago

    @property
    def most(self) -> float:
        return self.limit.limit

    def free_at(self, slot: tuple[Fraction, Fraction]) -> Fraction:
        return slot[0] + Fraction(self.limit.seconds)

    def left(self, now: Fraction, slack: Fraction = Fraction(0)) -> Fraction:
        return Fraction(self.most) - sum(slot[1] for slot in self.taken if self.free_at(slot) > now + EPS)

    def ready_at(self, amount: Fraction, now: Fraction, slack: Fraction = Fraction(0)) -> Fraction:
        now = max(now, self.not_before)
        instants = [now, *sorted(at for at in map(self.free_at, self.taken) if at > now)]
        return next(at for at in instants if self.left(at) >= amount)

    def take(self, amount: Fraction, now: Fraction, slack: Fraction = Fraction(0)) -> None:
        if amount:
            self.forget(now)
            self.taken.append((now, amount))

    def forget(self, now: Fraction) -> None:
        self.not_before = max([self.not_before, *(at for at in map(self.free_at, self.taken) if at <= now)])
        self.taken = [slot for slot in self.taken if self.free_at(slot) > now + EPS]

    def give_back(self, amount: Fraction, now: Fraction) -> None:
        while amount > 0 and self.taken:
            at, size = self.taken.pop()
            if size > amount:
                self.taken.append((at, size - amount))
            amount -= size

    def change(self, limit: Window, now: Fraction) -> None:
        self.forget(now)
        self.limit = limit


Counter = Bucket | Slots


def fresh(limit: RateLimit | Window, now: Fraction, tokens: float | None = None) -> Counter:
    return Bucket(limit, now, tokens) if isinstance(limit, RateLimit) else Slots(limit, now)


def changed(counters: Iterable[Counter], limits: Limits, now: Fraction) -> list[Counter]:
    """Those of other limits: each goes on from the first of its kind and unit that is left, or starts afresh."""
    olds = list(counters)
    news = []
    for limit in limits:
        alike = [old for old in olds if type(old.limit) is type(limit) and old.limit.unit == limit.unit]
        if alike:
            alike[0].change(limit, now)     # type: ignore[arg-type]
            olds.remove(alike[0])
        news.append(alike[0] if alike else fresh(limit, now))
    return news


@dataclass(eq=False)
class Event:
    """Something that happened: `take` (by who was admitted), `charge`, `refund` or `limits`."""

    kind: str
    at: Fraction
    what: Any
    slack: Fraction = Fraction(0)


@dataclass(eq=False)
class Place:
    """A place in the line: a reservation's, or a waiter's, or that of a reservation which is waited for."""

    amount: Amount
    waits: bool = False             # whether somebody waits here, who takes by the clock he wakes to
    latest: float = math.inf        # when he would give up
    event: Event | None = None      # how it was taken
    granted: bool = False           # whether `wait` said so
    over: str = ""                  # why it never will be: "cancelled", "impossible"


class Model:
    """The limiter.  Every method is told the instant, and says what the real one should."""

    def __init__(self, limits: Limits, now: float = 0.0, initial: float | None = None) -> None:
        self.begin = Fraction(now)
        self.declared = self.limits = tuple(limits)
        self.initial = initial
        self.history: list[Event] = []
        self.line: list[Place] = []
        self.paused_until = -math.inf
        self.now = self.begin           # of the last question: nothing that is still to come is before it

    # ---- the whole history, from the beginning -----------------------------------------------------------------------

    def replay(self) -> list[Counter]:
        counters = [fresh(limit, self.begin, self.initial) for limit in self.declared]
        for event in self.history:
            if event.kind == "limits":
                counters = changed(counters, event.what, event.at)
                continue
            for counter in counters:
                part = part_of(event.what, counter.limit.unit, implied=event.kind == "take")
                if event.kind == "refund":
                    counter.give_back(part, event.at)
                else:
                    counter.take(part, event.at, event.slack)
        return counters

    def foresee(self, amounts: Iterable[Amount], slack: Fraction = Fraction(0)) -> list[Fraction]:
        """When some amounts, one after the other, could be taken, from now on; the first of them with that slack."""
        counters = self.replay()
        at = self.now if self.paused_until == -math.inf else max(self.now, Fraction(self.paused_until))
        instants = []
        for amount in amounts:
            parts = [(counter, part_of(amount, counter.limit.unit)) for counter in counters]
            at = max(counter.ready_at(part, at, slack) for counter, part in parts)
            for counter, part in parts:
                counter.take(part, at, slack)
            instants.append(at)
            slack = Fraction(0)
        return instants

    def pass_until(self, now: float) -> None:
        """Let time pass: each reservation at the head of the line is taken, as of its instant."""
        until = Fraction(now)
        while self.line and not self.line[0].waits:
            at = self.foresee([self.line[0].amount])[0]
            if at > until + EPS:
                break
            self.admit(self.line[0], at)
            self.now = max(self.now, at)
        self.now = until

    def admit(self, place: Place, at: Fraction, slack: Fraction = Fraction(0)) -> None:
        place.event = Event("take", at, place.amount, slack)
        self.history.append(place.event)
        self.line.remove(place)

    def fits(self, amount: Amount) -> bool:
        return all(part_of(amount, limit.unit) <= fresh(limit, self.now).most for limit in self.limits)

    def check(self, amount: Amount) -> None:
        """Refuse an amount of what nothing counts."""
        known = {"calls", *(limit.unit for limit in self.limits)}
        if isinstance(amount, Mapping) and not known.issuperset(amount):
            raise Impossible(amount)

    def newcomer(self, amount: Amount) -> Fraction:
        """When one could have it who comes now."""
        if not self.fits(amount):
            raise Impossible(amount)
        return self.foresee([*(place.amount for place in self.line if not place.over), amount])[-1]

    def is_there(self, amount: Amount) -> bool:
        return not self.line and self.newcomer(amount) <= self.now + EPS

    # ---- who waits ---------------------------------------------------------------------------------------------------

    def earliest(self, place: Place, slack: Fraction = Fraction(0)) -> float:
        """The instant at which a place in the line is its holder's, as things stand."""
        before = [other for other in self.line[: self.line.index(place)] if not other.over]
        return float(self.foresee([other.amount for other in [*before, place]], slack)[-1])

    def join(self, amount: Amount, timeout: float | None) -> Place | bool:
        """Acquire: True or False if that is known at once, else a place."""
        at = self.newcomer(amount)
        if self.is_there(amount):
            self.history.append(Event("take", self.now, amount))
            return True
        if timeout is not None and at > self.now + Fraction(timeout) + EPS:
            return False
        return self.stand(amount, timeout)

    def stand(self, amount: Amount, timeout: float | None) -> Place:
        """Stand behind all the others."""
        place = Place(amount, True, math.inf if timeout is None else float(self.now) + timeout)
        self.line.append(place)
        return place

    def may_go(self, place: Place) -> bool:
        """Whether who wakes at that place may take what he waits for."""
        first = next(other for other in self.line if not other.over)
        return first is place and self.foresee([place.amount], CATCH_UP)[0] <= self.now + EPS

    def go(self, place: Place) -> None:
        self.admit(place, self.now, CATCH_UP)
        place.granted = True

    # ---- what else is done -------------------------------------------------------------------------------------------

    def try_acquire(self, amount: Amount) -> bool:
        if not self.fits(amount) or not self.is_there(amount):
            return False
        self.history.append(Event("take", self.now, amount))
        return True

    def reserve(self, amount: Amount) -> Place:
        self.newcomer(amount)
        place = Place(amount)
        self.line.append(place)
        self.pass_until(float(self.now))
        return place

    def ready_at(self, place: Place) -> float:
        if place.over:
            return math.inf
        return self.earliest(place) if place.event is None else float(place.event.at)

    def wait(self, place: Place) -> Place | bool:
        """Reservation.wait: True or False if that is known at once, else the place."""
        if place.over == "impossible":
            raise Impossible(place.amount)
        if place.over:
            return False
        place.granted = place.event is not None
        place.waits = not place.granted
        return place.granted or place

    def cancel(self, place: Place) -> bool:
        if place.over or place.granted:
            return False
        place.over = "cancelled"
        if place.event is None:
            self.line.remove(place)
        else:
            self.history.remove(place.event)
        self.pass_until(float(self.now))
        return True

    def leave(self, place: Place) -> None:
        self.line.remove(place)
        self.pass_until(float(self.now))

    def refund(self, amount: Amount) -> None:
        self.history.append(Event("refund", self.now, amount))
        self.pass_until(float(self.now))

    def charge(self, amount: Amount) -> None:
        self.history.append(Event("charge", self.now, amount))

    def pause_for(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, float(self.now) + seconds)

    def set_limits(self, limits: Limits) -> None:
        self.history.append(Event("limits", self.now, limits))
        self.limits = tuple(limits)
        for place in list(self.line):
            if not self.fits(place.amount):
                place.over = "impossible"
                if not place.waits:     # who waits leaves when he hears of it
                    self.line.remove(place)
        self.pass_until(float(self.now))

    def retry_after(self, amount: Amount) -> float:
        at = self.newcomer(amount)
        return 0.0 if at <= self.now + EPS else float(at - self.now)

    def available_tokens(self) -> float:
        return float(min(counter.left(self.now) for counter in self.replay()))
