"""What a lane takes from limits and quotas whose state is elsewhere: fetched by a worker, for one call at a time.

Rules: the core asks nobody; it says what is wanted, and a worker who pulls the feed gets it.  A permit is fetched when
all else has said yes, for the amount of the task that is next; it is used at its instant, or not at all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from ..model import Amount
from .lane import Feed

SPENT_FOR = 1.0
"""Seconds for which nobody asks again after there was nothing left."""


class Permit:
    """What was fetched for one call.

    Args:
        amount: For what.
        due_at: When it may be used.
        good_until: Until when.
        is_begun: Whether that was said when its instant had come; else it is asked once more.
        slots: What it is made of, for whoever fetches.
        settles: Whether the outcome of the call is to be told, whatever that used.
    """

    __slots__ = ("amount", "due_at", "good_until", "is_begun", "is_used", "settles", "slots")

    def __init__(
        self,
        amount: Amount,
        due_at: float,
        good_until: float,
        is_begun: bool,
        slots: Sequence[Any] = (),
        settles: bool = False,
    ) -> None:
        self.amount = amount
        self.due_at = due_at
        self.good_until = good_until
        self.is_begun = is_begun
        self.is_used = False
        self.slots = slots
        self.settles = settles


class Supply:
    """What a lane has of it, and what it wants.

    Args:
        feed: Fetches; pulled where something is wanted, or is to be told.
        close: Gives back what is not used; for whoever ends the run, not for the core.
        check: Refuses an amount that could never be had.
        might_return: Says whether calls in flight may give back so much.
        is_current: Says whether what was fetched is still of this period.
        units: What is counted.
    """

    __slots__ = (
        "_out", "_spent_until", "asked", "check", "close", "feed", "is_closing", "is_current", "might_return", "news",
        "permit", "units", "wanted",
    )

    def __init__(
        self,
        feed: Feed,
        close: Callable[[], object],
        check: Callable[[Amount], object] = lambda amount: None,
        might_return: Callable[[Amount], bool] = lambda amount: False,
        is_current: Callable[[], bool] = lambda: True,
        units: Set[str] = frozenset(),
    ) -> None:
        self.feed = feed
        self.close = close
        self.check = check
        self.might_return = might_return
        self.is_current = is_current
        self.units = units
        self.asked: Amount | None = None  # for what it was asked last; written by whoever fetches
        self.news: deque[tuple[str, Any, Any]] = deque()
        """What is to be told: ("ended", permit, used) of a call, or ("pause", seconds, None)."""
        self._spent_until = -math.inf
        self.renew()

    def renew(self) -> None:
        """Make it ready for another run."""
        self.permit: Permit | None = None
        self.wanted: Amount | None = None
        self.is_closing = False  # whether the run is over but for this
        self._out: dict[object, Permit] = {}  # permits that are used, by the attempt
        self.feed.pulling = False
        self.feed.arrived.clear()

    @property
    def asks(self) -> bool:
        """Whether its feed should be pulled."""
        return not self.feed.pulling and (self.wanted is not None or bool(self.news))

    @property
    def has_rest(self) -> bool:
        """Whether there is something to give back, or to tell."""
        return self.permit is not None or bool(self.news)

    def is_spent(self, now: float, amount: Amount | None = None) -> bool:
        """Say whether there was not so much left when it was last looked; None for whatever that was."""
        is_asked = amount is None or amount == self.asked
        return self.permit is None and now < self._spent_until and is_asked

    def ready_at(self, amount: Amount, now: float) -> float:
        """Return `now` or before if a call may be made, else when to ask again; infinity: after the feed was pulled."""
        permit = self.permit
        if permit is not None and permit.amount == amount:
            if permit.due_at > now:
                return permit.due_at
            if not self.feed.pulling and permit.is_begun and now <= permit.good_until and self.is_current():
                return now
        self.wanted = amount
        return math.inf

    def brought(self, permit: Permit | None, now: float) -> None:
        """Take what was fetched; None: there is nothing left."""
        self.permit = permit
        self.wanted = None
        if permit is None:
            self._spent_until = now + SPENT_FOR

    def is_left_over(self) -> bool:
        """Let go of a permit that nobody needs any more; return whether the feed is to be pulled, for it to go back."""
        if self.permit is None or self.feed.pulling:
            return False
        self.permit = self.wanted = None
        return True

    def take(self, attempt: object) -> None:
        """Use the permit."""
        assert self.permit is not None
        self.permit.is_used = True
        self._out[attempt] = self.permit
        self.permit = None

    def ended(self, attempt: object, used: Mapping[str, float] | None) -> None:
        """Say that a call has its outcome, and what it really used; None for what its amount says."""
        permit = self._out.pop(attempt, None)
        if permit is not None and (permit.settles or used is not None):
            self.news.append(("ended", permit, used))
        if used is not None:
            self._spent_until = -math.inf  # there may be something left again

    def pause(self, seconds: float) -> None:
        """Say that the source wants nobody for so long."""
        self.news.append(("pause", seconds, None))
