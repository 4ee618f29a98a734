"""What a lane takes from limits and quotas whose state is elsewhere: fetched by a worker, for one call at a time.

Rules: the core asks nobody; it says what is wanted, and a worker who pulls the feed gets it.  A permit is fetched when
all else has said yes, for the amount of the task that is next; it is used at its instant, or not at all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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

    __slots__ = ("amount", "due_at", "good_until", "is_begun", "settles", "slots")

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
        self.slots = slots
        self.settles = settles


class Supply:
    """What a lane has of it, and what it wants.

    Args:
        feed: Fetches; pulled where something is wanted, or is to be told.
        close: Gives back what is not used; for whoever ends the run, not for the core.
    """

    __slots__ = ("_out", "_spent_until", "close", "feed", "news", "permit", "wanted")

    def __init__(self, feed: Feed, close: Callable[[], object]) -> None:
        self.feed = feed
        self.close = close
        self.permit: Permit | None = None
        self.wanted: Amount | None = None
        self.news: deque[tuple[str, Any, Any]] = deque()
        """What is to be told: ("ended", permit, used) of a call, or ("pause", seconds, None)."""
        self._out: dict[object, Permit] = {}  # permits that are used, by the attempt
        self._spent_until = -math.inf

    @property
    def asks(self) -> bool:
        """Whether its feed should be pulled."""
        return not self.feed.pulling and (self.wanted is not None or bool(self.news))

    def is_spent(self, now: float) -> bool:
        """Say whether there was nothing left when it was last looked."""
        return self.permit is None and now < self._spent_until

    def ready_at(self, amount: Amount, now: float) -> float:
        """Return `now` or before if a call may be made, else when to ask again; infinity: after the feed was pulled."""
        permit = self.permit
        if permit is not None and permit.amount == amount and not self.feed.pulling:
            if permit.due_at > now:
                return permit.due_at
            if permit.is_begun and now <= permit.good_until:
                return now
        self.wanted = amount
        return math.inf

    def brought(self, permit: Permit | None, now: float) -> None:
        """Take what was fetched; None: there is nothing left."""
        self.permit = permit
        self.wanted = None
        if permit is None:
            self._spent_until = now + SPENT_FOR

    def take(self, attempt: object) -> None:
        """Use the permit."""
        assert self.permit is not None
        self._out[attempt] = self.permit
        self.permit = None

    def ended(self, attempt: object, used: Mapping[str, float] | None) -> None:
        """Say that a call has its outcome, and what it really used; None for what its amount says."""
        permit = self._out.pop(attempt, None)
        if permit is not None and (permit.settles or used is not None):
            self.news.append(("ended", permit, used))

    def pause(self, seconds: float) -> None:
        """Say that the source wants nobody for so long."""
        self.news.append(("pause", seconds, None))
