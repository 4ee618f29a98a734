"""Admission held while a probe says so: when to ask it, and for how long its word counts.

Rules: it is asked only when there is something to admit, and not again before `PROBED_EVERY` seconds are over.  Until
its first word nothing is admitted, nor by a word that is older than that, as long as the next one is awaited: that is
`PROBE_AWAITED` seconds, after which what it said before holds on.
"""

from __future__ import annotations

import math

from .lane import Feed

PROBED_EVERY = 0.100
"""Seconds at least between two questions."""

PROBE_AWAITED = 1.0
"""Seconds for which the answer to a question is waited for."""


class Hold:
    """What a probe has said, and when.

    Args:
        probe: Gives its words, each as a tuple of one bool: whether all admission is to be held.
    """

    __slots__ = ("_awaited_until", "_is_held", "_next_at", "probe")

    def __init__(self, probe: Feed) -> None:
        self.probe = probe
        self._is_held = True  # until it has said something
        self._next_at = -math.inf  # it is not to be asked again before
        self._awaited_until = -math.inf

    def is_due(self, now: float) -> bool:
        """Say whether to ask it."""
        return now >= self._next_at and not self.probe.pulling

    def asked(self, now: float) -> float:
        """Note that it is asked; return when to look again though it has not answered."""
        self._awaited_until = now + PROBE_AWAITED
        return self._awaited_until

    def holds(self, now: float) -> bool:
        """Say whether nothing is to be admitted now."""
        return self._is_held or self._next_at <= now < self._awaited_until

    def answered(self, now: float) -> str:
        """Note what it has said; return "held" or "released" where that is new, else nothing."""
        was_held = self._is_held and self._next_at > -math.inf  # nobody was told of what went before its first word
        self._is_held = any(held for held, in self.probe.arrived)
        self.probe.arrived.clear()
        self._next_at = now + PROBED_EVERY
        return "" if self._is_held == was_held else "held" if self._is_held else "released"

    @property
    def looks_at(self) -> float:
        """The instant at which to ask again, where that is what is waited for; infinity if nothing is held."""
        return self._next_at if self._is_held else math.inf
