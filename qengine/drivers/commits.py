"""What a run has to commit before anybody is told of it: in order, in batches, outside the core's lock.

The core leaves word in `pending`.  Whoever comes by when something is due writes all of it, and what came meanwhile, as
one transaction, and then hands it out; the others go on (group commit, by flat combining as in `crew.py`).  Only who is
about to make a call that must be known before waits until it is.

Rules: nothing is told that is not committed.  What could not be committed is no answer, and ends the run.  Where calls
are short a commit is for many of them: one follows the other after `PAUSE` seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

from ..core.lane import Attempt
from .calls import GivenUp

PAUSE = 0.005
"""Seconds between two commits, where nobody waits for one and nothing else is to be done."""

FULL = 16384
"""Outcomes that wait for a commit at which no call is begun any more, where the commit is another thread's."""


class Writer(Protocol):
    """What writes it all: a journal."""

    def write(self, outcomes: list[Any], starts: list[Attempt], ended: str | None) -> None:
        """Commit what has come to pass, and what is about to begin; `ended` says that the run is over, and why."""

    def has(self, item: Any) -> bool:
        """Say whether an outcome was committed before, by another run."""

    def concluded(self) -> None:
        """Note that nothing more is to be written."""


Batch = tuple[list[Any], list[Attempt], str | None]
"""Outcomes, starts, and the reason for which the run is over, if it is."""


class Commits:
    """What one run commits.

    Args:
        writer: Writes it.
        hand_out: Called with what is committed, item by item and in order; with None when the run is over.
        failed: Called, once, with the error that a commit failed with.
        pause: Seconds between two commits.
    """

    def __init__(
        self,
        writer: Writer,
        hand_out: Callable[[Any], object],
        failed: Callable[[BaseException], object],
        pause: float = PAUSE,
    ) -> None:
        self.pending: deque[Any] = deque()
        self.starts: deque[Attempt] = deque()
        self.due_at = -math.inf
        """When a commit is due, if there is something."""
        self.asks_at = -math.inf
        """When somebody should see to it: at once, or when it is due, if somebody is to come by then."""
        self.unsaved: list[Any] = []
        """What could not be committed, and all that came after it."""
        self.error: BaseException | None = None
        self._writing: list[Any] = []
        self.hand_out = hand_out
        self._pause = pause
        self._is_left = False
        self._writer = writer
        self._failed = failed
        self._lock = Lock()

    def leave(self) -> None:
        """Write nothing more: after a fork all that is the parent's."""
        self._is_left = True
        self._lock = Lock()

    @property
    def is_watched(self) -> bool:
        """Whether somebody is to come by when a commit is due."""
        return self.asks_at > -math.inf

    def claim(self) -> None:
        """Note that somebody is at it, or about to."""
        self.due_at = self.asks_at = math.inf

    def watch(self) -> None:
        """Note that somebody comes by when a commit is due."""
        self.asks_at = self.due_at

    @property
    def uncommitted(self) -> list[Any]:
        """What is not committed yet, as far as is known, and what will not be."""
        return [item for item in (*self.unsaved, *self._writing, *self.pending) if not self._writer.has(item)]

    def conclude(self) -> None:
        """Say that nothing more is to be written."""
        self._writer.concluded()

    @property
    def is_full(self) -> bool:
        """Whether so much is to be committed that no call is to be begun before."""
        return len(self.pending) >= FULL

    # ---- with threads ------------------------------------------------------------------------------------------------

    def commit(self, now_fn: Callable[[], float]) -> None:
        """Commit all there is, if nobody else is at it; who is at it looks afterwards whether there is more."""
        if self._lock.acquire(False):
            try:
                self._commit(now_fn)
            finally:
                self._lock.release()

    def begin(self, attempt: Attempt, now_fn: Callable[[], float]) -> None:
        """Wait until the start of an attempt is committed, and all that was there before it.

        Raises:
            GivenUp: It could not be.
        """
        self.starts.append(attempt)
        with self._lock:
            if attempt in self.starts:
                self._commit(now_fn)
        if self.error is not None:
            raise GivenUp from self.error

    def catch_up(self, now_fn: Callable[[], float]) -> None:
        """Wait until there is not so much to be committed any more."""
        with self._lock:
            if self.is_full:
                self._commit(now_fn)

    def finish(self, now_fn: Callable[[], float], ended: str) -> None:
        """Commit the last of it."""
        with self._lock:
            self._commit(now_fn, ended)

    def _commit(self, now_fn: Callable[[], float], ended: str | None = None) -> None:
        batch = self.take(ended)
        self.write(batch)
        self.done(batch, now_fn())

    # ---- step by step, by one at a time ------------------------------------------------------------------------------

    def take(self, ended: str | None = None) -> Batch:
        """Return all there is; of starts, what is to begin stays where it is until it is done."""
        self.claim()
        starts = [*self.starts]
        self._writing = [self.pending.popleft() for _ in range(len(self.pending))]
        return self._writing, starts, ended

    def write(self, batch: Batch) -> None:
        """Write it; that is all that may take long."""
        if self.error is None and not self._is_left:
            try:
                self._writer.write(*batch)
            except BaseException as error:
                self.error = error
                self._failed(error)

    def done(self, batch: Batch, now: float) -> None:
        """Hand it out; what was not written is kept."""
        outcomes, starts, _ = batch
        if self.error is None and not self._is_left:
            for item in outcomes:
                self.hand_out(item)
        else:
            for item in outcomes:
                if self.error is not None and self._writer.has(item):
                    self.hand_out(item)
                else:
                    self.unsaved.append(item)
        self._writing = []
        for _ in starts:
            self.starts.popleft()
        self.asks_at = -math.inf
        self.due_at = now + self._pause
