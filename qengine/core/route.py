"""The sources that can do one task: which goes first, and what became of it at those that it has left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from ..errors import refuse
from ..model import Hop, Task


def refuse_routes(task: Task[Any]) -> None:
    """Refuse a task that names sources, where it has no choice."""
    if task.routes or task.prefer is not None:
        name = "routes" if task.routes else "prefer"
        refuse(name, getattr(task, name), "none here: a TaskScheduler of several sources takes them")


class Standing(IntEnum):
    """Whether a source takes a task, or can pay for it."""

    NOW = 0  # as soon as its limits allow
    LATER = 1  # when its breaker lets something through; when calls in flight have given something back
    NEVER = 2


class Route:
    """Where a task may go, and where it was.

    Args:
        ranks: The lanes that can do it, each with its rank: the lower one goes first, and those of the same share
            their tasks.
    """

    __slots__ = ("_taken_over", "_taken_over_at", "attempts", "hops", "is_offered", "ranks", "usage")

    def __init__(self, ranks: dict[Any, tuple[Any, ...]]) -> None:
        self.ranks = ranks
        self._taken_over_at = -math.inf
        self._taken_over = 0  # how many times at that instant
        self.is_offered = False  # whether the others know that it waits where it is
        self.hops: list[Hop] = []
        self.attempts = 0  # made at the sources that it has left
        self.usage: dict[str, float] = {}  # of those

    def may_be_taken_over(self, now: float) -> bool:
        """Say whether it was not to and fro already, in this instant."""
        return self._taken_over_at != now or self._taken_over < len(self.ranks)

    def was_taken_over(self, now: float) -> None:
        """Note that a source with nothing to do has taken it from another."""
        self._taken_over = self._taken_over + 1 if self._taken_over_at == now else 1
        self._taken_over_at = now

    def leave(self, hop: Hop, usage: Mapping[str, float]) -> None:
        """Note that the task goes on from where it is, and what it has used there."""
        self.hops.append(hop)
        self.attempts += hop.attempts
        for unit, used in usage.items():
            self.usage[unit] = self.usage.get(unit, 0.0) + used
