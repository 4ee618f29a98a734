"""The rolling window, exact: at most N units in any period of so many seconds.

The state is a tuple of (expires_at, amount), in order of expiry.  In the engine a slot is held (it expires at
infinity) until the outcome of its call is known and expires `seconds` after that: so the window holds on the clock of
the server as well, whenever in between the request arrived there.  Taking and asking cost O(limit).
"""

from __future__ import annotations

import math

from ..policy import Window

Slots = tuple[tuple[float, float], ...]


class RollingWindow:
    """The rule of one `Window`."""

    __slots__ = ("most", "seconds", "unit")

    def __init__(self, window: Window) -> None:
        self.unit = window.unit
        self.most = window.limit
        self.seconds = window.seconds

    def initial(self, now: float, tokens: float | None = None) -> Slots:
        """Return the state of an empty window."""
        return ()

    def ask(
        self, slots: Slots, amount: float, now: float, slack: float = 0.0, held: bool = False
    ) -> tuple[float, Slots]:
        """Return when `amount` may be taken, and the state once it is taken now, `held` until `settle` is told.

        The instant is `now` if it may be taken now, infinity if that hangs on an outcome.
        """
        if amount == 0:
            return now, slots
        live = tuple(slot for slot in slots if slot[0] > now)
        ready_at = self._ready_at(live, amount, now)
        return ready_at, self._insert(live, math.inf if held else now + self.seconds, amount)

    def _ready_at(self, live: Slots, amount: float, now: float) -> float:
        excess = amount - self.most + sum(size for _, size in live)
        if excess <= 0:
            return now
        for expires_at, size in live:
            excess -= size
            if excess <= 0:
                return expires_at
        return math.inf

    def settle(self, slots: Slots, amount: float, now: float) -> Slots:
        """Return the state after the outcome of a call whose slot was held."""
        if amount == 0:
            return slots
        return self._insert(self.undo(slots, amount), now + self.seconds, amount)

    def undo(self, slots: Slots, amount: float) -> Slots:
        """Return the state as if the last `amount` had not been taken."""
        for position in range(len(slots) - 1, -1, -1):
            if slots[position][1] == amount:
                return slots[:position] + slots[position + 1 :]
        return slots

    def moved(self, slots: Slots, now: float, to: float) -> Slots:
        """Return the state on another clock, which shows `to` where this one shows `now`; slots held run out."""
        ends = ((min(expires_at, now + self.seconds) - now + to, size) for expires_at, size in slots)
        return tuple(slot for slot in ends if slot[0] > to)

    def available(self, slots: Slots, now: float) -> float:
        """Return the units that may be taken now."""
        return self.most - sum(size for expires_at, size in slots if expires_at > now)

    @staticmethod
    def _insert(slots: Slots, expires_at: float, amount: float) -> Slots:
        position = len(slots)
        while position and slots[position - 1][0] > expires_at:
            position -= 1
        return (*slots[:position], (expires_at, amount), *slots[position:])
