"""The shelf of a stream: results that have come and were not handed out yet.

Rules: it is filled by whoever speaks to the core and emptied by one consumer, without a lock.  Each result leaves it
once: to the consumer, or to the report.  A consumer who finds nothing says that he waits, looks once more, and is
rung for; nobody rings for one who does not wait, or not for this result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .lane import Attempt


class Shelf:
    """See above.

    Args:
        ordered: Whether they are taken in the order of the inputs.
        ring: Wakes the consumer.
    """

    __slots__ = ("_by_index", "_next_index", "_ready", "handing", "is_complete", "is_watched", "ring")

    def __init__(self, ordered: bool, ring: Callable[[], object]) -> None:
        self._ready: deque[Attempt] = deque()
        self._by_index: dict[int, Attempt] | None = {} if ordered else None
        self._next_index = 0
        self.ring = ring
        self.handing: Attempt | None = None  # what the consumer is taking: if he is interrupted it may be nowhere else
        self.is_complete = False  # no more will come
        self.is_watched = False  # the consumer waits, or is about to

    def put(self, attempt: Attempt | None) -> None:
        """Put in a result; None after the last."""
        if attempt is None:
            self.is_complete = True
        elif self._by_index is None:
            self._ready.append(attempt)
        else:
            self._by_index[attempt.index] = attempt
            if attempt.index != self._next_index:  # it is not its turn yet
                return
        if self.is_watched:
            self.is_watched = False
            self.ring()

    def take(self) -> Attempt | None:
        """Take out the next; None if it has not come."""
        try:
            if self._by_index is None:
                self.handing = self._ready[0]
                return self._ready.popleft()
            self.handing = self._by_index[self._next_index]
            attempt = self._by_index.pop(self._next_index)
        except LookupError:
            self.handing = None
            return None
        self._next_index += 1
        return attempt

    def saved(self, left: list[Attempt]) -> None:
        """Put what the consumer was taking, when he was interrupted, to what is left, if it is nowhere else."""
        attempt = self.handing
        known = self._ready if self._by_index is None else self._by_index.values()
        if attempt is not None and attempt not in known and attempt not in left:
            left.append(attempt)

    def empty_into(self, left: list[Attempt]) -> None:
        """Take out all that there is; nothing more is to come."""
        self.is_complete = True
        while self._ready:
            left.append(self._ready.popleft())
        while self._by_index:
            left.append(self._by_index.popitem()[1])
        self.ring()  # in any case: should several wait, who finds the end rings for the next
