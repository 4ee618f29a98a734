"""The sources that can do one task: which goes first, and what became of it at those that it has left."""

from __future__ import annotations

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
    """Whether a source takes a task."""

    NOW = 0  # as soon as its limits allow, or calls in flight have given back what they do not use
    LATER = 1  # when its breaker has closed
    NEVER = 2


class Route:
    """Where a task may go, and where it was.

    Args:
        ranks: The lanes that can do it, each with its rank: the lower one goes first, and those of the same share
            their tasks.
    """

    __slots__ = ("attempts", "hops", "is_offered", "ranks", "usage")

    def __init__(self, ranks: dict[Any, tuple[Any, ...]]) -> None:
        self.ranks = ranks
        self.is_offered = False  # whether the others know that it waits where it is
        self.hops: list[Hop] = []
        self.attempts = 0  # made at the sources that it has left
        self.usage: dict[str, float] = {}  # of those

    def leave(self, hop: Hop, usage: Mapping[str, float]) -> None:
        """Note that the task goes on from where it is, and what it has used there."""
        self.hops.append(hop)
        self.attempts += hop.attempts
        for unit, used in usage.items():
            self.usage[unit] = self.usage.get(unit, 0.0) + used
