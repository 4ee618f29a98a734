"""Adaptive concurrency by feedback: how many attempts may be in flight, and how soon after each other they start.

    answer, while that is what holds calls back   grow: to a plateau below the last failure, hold, probe ever faster
    429, timeout                                  shrink to SHRINK; the plateau is a little below what failed
    latency above its own baseline                shrink as far as the delay says; no growth until its effect is seen

Who holds one asks `ready_at` first, then all other gates, and then says `started`; what ended is told to `succeeded` or
`congested`.  `limit` changes in these two only.  It is pure: no clock, no random source, no lock; one call at a time.

Rules: additive increase and multiplicative decrease (Chiu and Jain 1989); the increase follows CUBIC's curve over the
time since the decrease (Ha, Rhee and Xu 2008; RFC 8312), here in shares of the plateau, so that it is the same for 2 in
flight and for 200, and held flat for a while, so that a known ceiling is not tried every second: each refusal pauses
the whole source, and that, not the refused call, is what it costs.  Calls start `latency / window` apart (pacing:
Aggarwal, Savage and Anderson 2000): else all that a pause has freed start at once, are refused at once, and so on
for good.  A pace also gives a window of 2.4 a meaning where 2 is too few and 3 too many; the window is then the mean
number in flight, and the limit leaves room for its square root more, by which that number varies of itself.

Latency: a queue at the source delays all its calls, quick and slow ones alike; so it has risen where each of several
low quantiles has, by a share of the mean (the delay of TCP Vegas, Brakmo and Peterson 1994; minima over a window
as in CoDel, Nichols and Jacobson 2012).  A slow tail, or more slow calls among quick ones, raises only some of them.
A decrease that is large enough to drain that queue shows the baseline afresh; where two in a row bring no relief,
the source itself has become slower, and that is its baseline from there on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .bucket import CATCH_UP

START = 4
"""Attempts in flight before anything is known."""

FLOOR = 0.05
"""The smallest window where the minimum is 1: one attempt at a time, with 20 times its latency between two starts."""

SHRINK = 0.8
"""What a decrease leaves.  Below 1 / (1 + RISE): so it drains the queue that a rise of latency has shown."""

LEAST = 0.2
"""What the refusals of one burst leave at the least, however many they are."""

PLATEAU = 0.95
"""Where the plateau is, in shares of what failed.  After a failed probe, which goes far too far, it is where it was, or
what the decrease leaves, if that is more."""

HOLD = 7.5
"""Seconds on the plateau before a probe.  Less costs throughput where each refusal is a pause of a second; with more,
three times the capacity is not always found within 30 s."""

CURVE = 0.004
"""CUBIC's C, in shares of the plateau: from SHRINK to the plateau in 3.4 s, and from there to three times it in 8 s."""

RISE = 0.2
"""By which share of its mean latency may rise: less than 0.15 finds rises where there is only noise."""

GLANCE, LOOK = 16, 80
"""Answers after which latency is judged: roughly, for growth may have gone far too far; and well."""

STRIDE = 1.5
"""How many times larger than at the last glance the window may be: growth must not outrun what it is judged by."""

QUANTILES = (0.1, 0.3, 0.5)
"""Of the latencies of a look; a rise is one of all three."""

MEMORY = 500
"""Answers that the mean latency remembers.  It sets the pace: with 200, its noise alone brings refusals."""


KNOWN_FOR = 600.0
"""Seconds after which what a source has said counts no more; more where its answers take long."""


class Judged(NamedTuple):
    """What latency was when it led to a decrease."""

    lows: list[float]
    relief: float  # the seconds that the decrease should take off it
    was_settled: bool  # whether nothing had grown while it was measured


class Feedback:
    """What a source's answers say about how many calls it can take at once.

    `limit` attempts may be in flight, minimum <= limit <= maximum; none should start before `ready_at`.
    """

    __slots__ = (
        "_answers",
        "_base",
        "_failed",
        "_failed_at",
        "_fair_at",
        "_growing_for",
        "_hold",
        "_is_answered",
        "_is_held_back",
        "_judged",
        "_last_at",
        "_maximum",
        "_mean",
        "_minimum",
        "_plateau",
        "_ready_at",
        "_recent",
        "_refused",
        "_rise",
        "_shrunk_at",
        "_starting",
        "_top",
        "_window",
        "limit",
    )

    def __init__(self, minimum: int, maximum: int) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._window = float(min(maximum, max(minimum, START)))
        self.limit = int(self._window)
        self._starting = True  # nothing has failed yet: the window grows with every answer
        self._plateau = math.inf
        self._hold = 0.0
        self._rise = 0.0  # seconds from the last decrease to the plateau
        self._growing_for = 0.0  # seconds since then in which the limit was what held calls back
        self._top = STRIDE * self._window
        self._shrunk_at = -math.inf
        self._failed = math.inf  # the window that was too large
        self._refused = 0  # calls of the burst that said so
        self._failed_at = -math.inf
        self._is_answered = True  # whether a call that started since then was
        self._last_at = math.inf
        self._answers = 0
        self._mean = 0.0  # of the latency
        self._recent: list[float] = []
        self._base: list[float] | None = None  # the baseline: what the lowest were without a queue
        self._fair_at = -math.inf  # before, the quick ones are the only ones of those started since that have ended
        self._judged: Judged | None = None  # the latency for which it was decreased, until it is seen what that did
        self._ready_at = -math.inf
        self._is_held_back = False  # whether the pace is what holds calls back

    def twin(self, now: float, to: float) -> Feedback:
        """Return another of the same state, on a clock that shows `to` where this one shows `now`."""
        other = Feedback(self._minimum, self._maximum)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        other._recent = list(self._recent)
        for name in ("_shrunk_at", "_failed_at", "_last_at", "_fair_at", "_ready_at"):
            setattr(other, name, getattr(self, name) - now + to)
        return other

    def is_as_new(self, now: float) -> bool:
        """Say whether a new one in its place would do about the same: nothing has failed yet, or that was long ago."""
        return self._shrunk_at == -math.inf or self._is_outdated(now)

    def forgets(self, now: float) -> bool:
        """Begin anew if what is known is too old; return whether it is."""
        if not self._is_outdated(now):
            return False
        self.__init__(self._minimum, self._maximum)  # type: ignore[misc]
        return True

    def _is_outdated(self, now: float) -> bool:
        heard_at = max(self._last_at if self._last_at < math.inf else -math.inf, self._shrunk_at)
        return heard_at > -math.inf and now - heard_at > max(KNOWN_FOR, 10.0 * self._mean)

    def ready_at(self, now: float) -> float:
        """Return when another attempt may start: `now` or before, else the instant."""
        return now if self._window >= self._maximum else self._ready_at

    def started(self, now: float) -> None:
        """Say that an attempt starts."""
        if self._answers:
            interval = self._mean / self._window
            at_least = now - max(CATCH_UP, 0.1 * interval)  # a start that is a little late is made good
            self._is_held_back = self._ready_at > at_least
            self._ready_at = max(self._ready_at, at_least) + interval

    def succeeded(self, started_at: float, now: float, running: int) -> bool:
        """Count an answer; return whether the limit changed.

        Args:
            running: Attempts in flight when it ended, itself included.
        """
        latency = max(0.0, now - started_at)
        self._answers += 1
        self._mean += (latency - self._mean) / min(self._answers, MEMORY)
        # More time than this is some in which nothing was asked.
        since_last = min(max(0.0, now - self._last_at), max(latency, self._mean / self._window))
        self._last_at = now
        if started_at >= self._failed_at:
            self._is_answered = True
        if started_at < self._shrunk_at:
            return False
        if now >= self._fair_at:
            self._recent.append(latency)
            if len(self._recent) % GLANCE == 0 and self._has_risen(now):
                return True
        holds_back = running >= self.limit or (self._is_held_back and 2 * running >= self._window)
        if self._judged is not None or not holds_back:
            return False
        if self._starting:
            return self._set(min(self._window + 1.0, self._top))
        self._growing_for += since_last
        beyond = self._growing_for - self._rise
        beyond = min(beyond, 0.0) if beyond < self._hold else beyond - self._hold
        return self._set(max(self._window, min(self._top, self._plateau * (1.0 + CURVE * beyond**3))))

    def congested(self, started_at: float, now: float) -> bool:
        """Count a 429 or a timeout; return whether the limit changed.

        Those of one burst are one decrease, but where they are many, so many were too many in flight.  Until a call
        that was started later is answered, LEAST is left: a source that is down does not say how many calls it takes.
        """
        if started_at < self._shrunk_at:
            self._refused += 1
            left = self._failed - self._refused
            return not self._is_answered and left < self._window and self._fall_to(max(left, LEAST * self._failed))
        self._judged = None
        self._fair_at = now + 2.0 * self._mean
        return self._shrink(SHRINK, now)

    def _set(self, window: float) -> bool:
        floor = self._minimum if self._minimum > 1 else FLOOR
        self._window = min(float(self._maximum), max(floor, window))
        room = math.sqrt(self._window) if self._window > floor else 0.0
        most = math.ceil(self._window + room)
        before, self.limit = self.limit, min(self._maximum, max(self._minimum, most))
        return self.limit != before

    def _shrink(self, share: float, now: float) -> bool:
        failed = self._window
        was_probing = not self._starting and self._growing_for > self._rise + self._hold
        self._plateau = max(self._plateau, failed * SHRINK) if was_probing else failed * PLATEAU
        self._hold = 0.0 if self._starting else HOLD
        self._starting = False
        self._shrunk_at = now
        self._growing_for = 0.0
        if self._is_answered:
            self._failed, self._failed_at, self._refused = failed, now, 0
        self._refused += 1
        self._is_answered = False
        self._recent = []
        return self._fall_to(max(failed * share, LEAST * self._failed))

    def _fall_to(self, window: float) -> bool:
        changed = self._set(window)
        self._top = STRIDE * self._window
        self._plateau = min(self._plateau, self._window * PLATEAU / SHRINK)
        self._rise = (max(0.0, 1.0 - self._window / self._plateau) / CURVE) ** (1 / 3)
        return changed

    def _has_risen(self, now: float) -> bool:
        """Judge the latest latencies; return whether that changed the limit."""
        self._top = STRIDE * self._window
        is_look = len(self._recent) >= LOOK
        some = sorted(self._recent[-LOOK if is_look else -GLANCE :])
        lows = [some[int(len(some) * part)] for part in QUANTILES]
        mean = sum(some) / len(some)
        if self._base is None:
            self._base = lows
            return False
        judged = self._judged
        if is_look:
            self._recent = []
            if abs(mean - self._mean) > RISE * self._mean:  # the mean remembers what is no more
                self._mean, self._answers = mean, LOOK
            if judged is not None and judged.was_settled and _rise(lows, judged.lows) > -judged.relief / 2:
                self._base = lows
                self._hold = 0.0
            self._judged = None
        elif judged is not None:
            return False
        rise = _rise(lows, self._base)
        if is_look:
            self._base = [base + min(0.0, low - base) / 8 for low, base in zip(lows, self._base, strict=True)]
        if self._window <= max(1, self._minimum) or rise <= (RISE if is_look else 3 * RISE) * mean:
            return False
        share = min(SHRINK, max(0.5, 1.0 - rise / mean))
        changed = self._shrink(share, now)
        self._judged = Judged(lows, (1.0 - share) * mean, judged is not None)
        self._fair_at = now + 2.0 * mean
        return changed


def _rise(lows: list[float], base: list[float]) -> float:
    return min(low - before for low, before in zip(lows, base, strict=True))
