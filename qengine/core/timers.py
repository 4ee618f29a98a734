"""The alarms of a run, in order of their instants; those of one instant in the order in which they were set."""

from __future__ import annotations

import math
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import Any


class Timer(Enum):
    """What an alarm is for."""

    LANE = "lane"  # a lane may admit again
    RETRY = "retry"  # an attempt's backoff is over
    GIVE_UP = "give up"  # a task's time is over while it waits
    DEADLINE = "deadline"  # the run's time is over
    DRAINED = "drained"  # what still runs is given up
    PULLS = "pulls"  # what is still being pulled is given up
    HANGS = "hangs"  # a lane's calls that were given up had their time to end
    ALARM = "alarm"  # somebody else asked for it
    PROBE = "probe"  # a probe may be asked again


_FEW = 64


class Timers:
    """A heap of alarms."""

    __slots__ = ("_dropped", "_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer, Any]] = []
        self._number = 0
        self._dropped: set[int] = set()

    @property
    def next_at(self) -> float:
        """The instant of the next, infinity if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def set(self, at: float, timer: Timer, what: Any) -> int:
        """Set one; return its number."""
        self._number += 1
        heappush(self._heap, (at, self._number, timer, what))
        return self._number

    def drop(self, number: int) -> None:
        """Forget one that may still be set, by its number; 0 is none.

        Most are dropped long before their time: when half of them are, the heap is made anew.
        """
        if number:
            self._dropped.add(number)
            if 2 * len(self._dropped) > len(self._heap) + _FEW:
                self._heap = [entry for entry in self._heap if entry[1] not in self._dropped]
                heapify(self._heap)
                self._dropped.clear()

    def pop(self) -> tuple[Timer, Any]:
        """Take out the next."""
        _, _, timer, what = heappop(self._heap)
        return timer, what

    def remove(self, kind: Timer, what: Any) -> None:
        """Take out what is set for one thing."""
        self._heap = [entry for entry in self._heap if not (entry[2] is kind and entry[3] is what)]
        heapify(self._heap)

    def take_out(self, kind: Timer) -> list[Any]:
        """Take out all of one kind, and return what they were for, in order."""
        out = sorted(entry[:2] + entry[3:] for entry in self._heap if entry[2] is kind)
        self._heap = [entry for entry in self._heap if entry[2] is not kind]
        heapify(self._heap)
        return [what for _, _, what in out]
