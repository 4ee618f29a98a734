"""How long calls took, as quantiles, in bounded memory.

This is DDSketch (Masson, Rim, Lee: "DDSketch: A fast and fully-mergeable quantile sketch with relative-error
guarantees", VLDB 2019): what is counted is how many values lie in each of many buckets whose bounds grow by a constant
factor, so what is read is off by a share of itself, the same for milliseconds and for minutes.

Rules: a quantile is the nearest rank: the smallest value that at least that share of all values does not exceed.  It is
at most 1 % off, and never outside of what was seen.  What is not above a nanosecond, which no clock resolves, counts as
0; what is above `LONGEST`, about three years, may be further off.  That is what bounds the buckets, where the paper
merges the smallest ones: so no outlier costs the others their accuracy, and sketches that are merged are the sketch of
all their values.
"""

from __future__ import annotations

import math
from math import ceil, log2
from typing import Self

from ..errors import refuse, require_number

SHORTEST = 1e-9
LONGEST = 1e8
"""Seconds between which a value lies in a bucket of its own size."""

_GROWTH = 1.02
_PER_DOUBLING = 1.0 / log2(_GROWTH)  # log2: twice as quick as log
_MIDDLE = 2.0 / (1.0 + _GROWTH)
"""Share of a bucket's upper bound that is off from either bound by the same share of that, 0.99 %."""
_TINY = ceil(log2(SHORTEST) * _PER_DOUBLING) - 1
_HUGE = ceil(log2(LONGEST) * _PER_DOUBLING)
_ROUNDING = 1e-15
"""Share by which a product may be above what it would be without rounding: 0.07 * 100 is to be rank 7."""

_SHARE = "a number in [0, 1]"

_NONE: dict[int, int] = {}
"""The buckets of all that have counted nothing, so that they cost no dict each; never changed."""


class Latencies:
    """How long calls took, in seconds: a sketch of all values, which gives their quantiles.

    One thread adds or merges at a time; any other may read it, or `copy` it, meanwhile.

    >>> latencies = Latencies()
    >>> latencies.quantile(0.5) is None
    True
    >>> for milliseconds in range(1, 101):
    ...     latencies.add(milliseconds / 1000)
    >>> latencies.count, latencies.quantile(0), latencies.quantile(1)
    (100, 0.001, 0.1)
    >>> abs(latencies.quantile(0.95) - 0.095) <= 0.01 * 0.095
    True
    """

    __slots__ = ("_buckets", "_least", "_most")

    def __init__(self) -> None:
        self._buckets = _NONE
        self._least = math.inf
        self._most = -math.inf

    def add(self, seconds: float) -> None:
        """Count one value; infinity and NaN are none."""
        if seconds < self._least:  # before the bucket: whoever copies has the bounds of all that he has
            self._least = seconds
        if seconds > self._most:
            self._most = seconds
        bucket = ceil(log2(seconds) * _PER_DOUBLING) if seconds > SHORTEST else _TINY
        try:
            self._buckets[bucket] += 1
        except KeyError:
            self._open(bucket)

    def _open(self, bucket: int) -> None:
        if not self._buckets:
            self._buckets = {}
        bucket = min(bucket, _HUGE)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self._buckets.copy().values())

    def quantile(self, q: float) -> float | None:
        """Return the value at the rank q * count, rounded up; None if there is none.

        It is exact for q = 0, for q = 1 and where all values are equal.

        Args:
            q: A share from 0 to 1: 0.5 is the median.

        Raises:
            ValueError, TypeError: If it is none.
        """
        if not 0 <= require_number("q", q, _SHARE) <= 1:
            refuse("q", q, _SHARE)
        buckets = self._buckets.copy()
        if not buckets:
            return None
        count = sum(buckets.values())
        rank = ceil(q * count * (1.0 - _ROUNDING))
        if rank <= 1:
            return self._least
        if rank >= count:
            return self._most
        order = sorted(buckets, reverse=True)
        while rank > 0:
            bucket = order.pop()
            rank -= buckets[bucket]
        middle = _MIDDLE * _GROWTH**bucket if bucket > _TINY else 0.0
        return min(max(middle, self._least), self._most)

    def copy(self) -> Self:
        """Return another one of the same values; those that another thread adds in this instant may be missing."""
        other = type(self)()
        other.merge(self)
        return other

    def merge(self, other: Latencies) -> None:
        """Count all values of another one too."""
        buckets = other._buckets.copy()
        for bucket, count in self._buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + count
        self._least = min(self._least, other._least)
        self._most = max(self._most, other._most)
        self._buckets = buckets or _NONE
