"""The rolling window, exact: at most N units in any period of so many seconds.

The state is what has not run out, in the order in which it will.  In the engine a slot is held until the outcome of its
call is known and runs out `seconds` after that: so the window holds on the clock of the server as well, whenever in
between the request arrived there.

Slots lie in chunks, and a state shares all its chunks but the last with the state before it: so taking costs O(chunk +
limit / chunk) and asking O(1), over time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..policy import Window

_CHUNK = 64
_ROUNDING = 1e-12
"""Share of the limit by which sums of fractions may be off."""

Slot = tuple[float, float]
"""When it runs out, and how much it is."""

Slots = tuple[tuple[tuple[Slot, ...], ...], int, float, float, float]
"""Chunks; how many slots of the first have run out; the total of those that have not; how much is held; and when the
last one ran out that is forgotten."""

EMPTY: Slots = ((), 0, 0.0, 0.0, -math.inf)


def live_slots(state: Slots) -> Iterator[Slot]:
    """Go through the slots that have not run out, those first that will be first."""
    chunks, skip, *_ = state
    for chunk in chunks:
        yield from chunk[skip:]
        skip = 0


class RollingWindow:
    """The rule of one `Window`."""

    __slots__ = ("most", "seconds", "unit", "_room")

    def __init__(self, window: Window) -> None:
        self.unit = window.unit
        self.most = window.limit
        self.seconds = window.seconds
        self._room = window.limit * (1.0 + _ROUNDING)

    def initial(self, now: float, tokens: float | None = None) -> Slots:
        """Return the state of an empty window."""
        return EMPTY

    def ask(
        self, state: Slots, amount: float, now: float, slack: float = 0.0, held: bool = False, early: float = 0.0
    ) -> tuple[float, Slots]:
        """Return when `amount` may be taken, and the state once it is taken now, `held` until `settle` is told.

        The instant is `now` if it may be taken now, infinity if that hangs on an outcome.  It is never before what is
        forgotten: who was held up, and asks by a clock that others have gone beyond, is to look at the clock again.
        """
        state = self._at(state, now)
        after = _holding(state, state[3] + amount) if held else self._with(state, now + self.seconds, amount)
        if now < state[4]:
            return max(state[4], self._ready_at(state, amount)), after
        if state[2] + state[3] + amount <= self._room:
            return now, after
        return self._ready_at(state, amount), after

    def _ready_at(self, state: Slots, amount: float) -> float:
        wanted = state[2] + state[3] + amount
        if wanted <= self._room:
            return -math.inf
        for ends_at, size in live_slots(state):
            wanted -= size
            if wanted <= self._room:
                return ends_at
        return math.inf

    def settle(self, state: Slots, amount: float, now: float, used: float) -> Slots:
        """Return the state after the outcome of a call whose slot was held, and turned out to have used `used`."""
        state = self._at(state, now)
        if state[3] < amount * (1.0 - _ROUNDING):  # it was not: the limit is younger than the call
            return self.charge(state, used - amount, now) if used > amount else self.refund(state, amount - used, now)
        return self._with(_holding(state, _left(state[3], amount)), now + self.seconds, used)

    def undo(self, state: Slots, amount: float) -> Slots:
        """Return the state as if `amount` had not been taken a moment ago."""
        if state[3] >= amount:
            return _holding(state, _left(state[3], amount))
        return self.refund(state, amount, -math.inf)

    def refund(self, state: Slots, amount: float, now: float) -> Slots:
        """Return the state without `amount` of what was taken last and has not run out."""
        slots = list(live_slots(self._at(state, now)))
        while slots and amount > 0:
            ends_at, size = slots.pop()
            if size > amount:
                slots.append((ends_at, size - amount))
            amount -= size
        return _packed(slots, state[3], state[4])

    def charge(self, state: Slots, amount: float, now: float, slack: float = 0.0, held: bool = False) -> Slots:
        """Return the state once `amount` is taken without asking."""
        return self.ask(state, amount, now, slack, held)[1]

    def moved(self, state: Slots, now: float, to: float) -> Slots:
        """Return the state on another clock, which shows `to` where this one shows `now`; what is held runs out."""
        held = [(now + self.seconds, state[3])] if state[3] else []
        return _packed([(ends_at - now + to, size) for ends_at, size in [*live_slots(state), *held] if ends_at > now])

    def taken_over(self, other: RollingWindow, state: Slots, now: float) -> Slots:
        """Return the state in place of another window's: what was taken then counts, for as long as this one lasts."""
        longer = self.seconds - other.seconds
        slots = live_slots(other._at(state, now))
        return _packed([(at + longer, size) for at, size in slots if at + longer > now], state[3])

    def dump(self, state: Slots, now: float) -> tuple[list[Slot], float]:
        """Return what was taken: how many seconds ago each slot was, with its amount; and how much is held."""
        begun = now + self.seconds
        return [(begun - ends_at, size) for ends_at, size in live_slots(self._at(state, now))], state[3]

    def load(
        self, state: Slots, dumped: tuple[list[Slot], float], now: float, elapsed: float, longest: float
    ) -> Slots:
        """Return the state with what was dumped so many seconds ago taken as well.

        What was held then had its outcome after `longest` seconds at the latest, or has it now.
        """
        slots, held = dumped
        slots = [*slots, (-min(elapsed, longest), held)]
        left = [(now - elapsed - ago + self.seconds, size) for ago, size in slots if size]
        left = [(ends_at, size) for ends_at, size in left if ends_at > now]
        return _packed([*live_slots(self._at(state, now)), *left], state[3], state[4])

    def available(self, state: Slots, now: float) -> float:
        """Return the units that may be taken now; below 0 where there is a debt."""
        state = self._at(state, now)
        return self.most - state[2] - state[3]

    @staticmethod
    def _at(state: Slots, now: float) -> Slots:
        """Return the state without what has run out by now."""
        chunks, gone, total, held, forgotten = state
        if not chunks or chunks[0][gone][0] > now:
            return state
        first = 0
        while first < len(chunks) and chunks[first][gone][0] <= now:
            ends_at, amount = chunks[first][gone]
            if ends_at > forgotten:  # after a step of the clock it may be less
                forgotten = ends_at
            total -= amount
            gone += 1
            if gone == len(chunks[first]):
                first, gone = first + 1, 0
        return (chunks[first:], gone, total, held, forgotten) if first < len(chunks) else ((), 0, 0.0, held, forgotten)

    @staticmethod
    def _with(state: Slots, ends_at: float, amount: float) -> Slots:
        """Return the state with one slot more."""
        if not amount:
            return state
        chunks, gone, total, held, forgotten = state
        if not chunks:
            return (((ends_at, amount),),), 0, amount, held, forgotten
        last = chunks[-1]
        if last[-1][0] > ends_at:  # after a step of the clock
            return _packed([*live_slots(state), (ends_at, amount)], held, forgotten)
        if len(last) < _CHUNK:
            return (*chunks[:-1], (*last, (ends_at, amount))), gone, total + amount, held, forgotten
        return (*chunks, ((ends_at, amount),)), gone, total + amount, held, forgotten


def _left(held: float, amount: float) -> float:
    """Return what is still held; nothing is nothing, whatever the sums of fractions say."""
    left = held - amount
    return left if left > _ROUNDING * held else 0.0


def _holding(state: Slots, held: float) -> Slots:
    """Return the state with so much held."""
    chunks, gone, total, _, forgotten = state
    return chunks, gone, total, held, forgotten


def _packed(slots: list[Slot], held: float = 0.0, forgotten: float = -math.inf) -> Slots:
    """Return the state of such slots."""
    slots.sort()
    chunks = tuple([tuple(slots[at : at + _CHUNK]) for at in range(0, len(slots), _CHUNK)])
    return chunks, 0, float(sum([size for _, size in slots])), held, forgotten
