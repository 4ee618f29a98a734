"""What the core says to a driver, and what a driver says back.

`Run.next(now)` answers with one step:

    Attempt      start it: call the task, then say `run.finished(attempt, outcome, now)`
    Feed         pull it: take up to `feed.wanted` items from its iterator, then say `run.offered(feed, ...)`
    Cancel       the attempt or the pull was given up: tell it so, and do not wait for it
    Wait(until)  nothing before that instant, or (None) before something happens
    DONE         every input taken has its result
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from .lane import Attempt, Feed


class Raised:
    """The outcome of an attempt that raised.  Tagged, because a task may also return an exception.

    `verdict` is what the retry policy made of it, asked where the task ran: True, False, or seconds to wait.
    `throttled` marks a RateLimitError, `retry_after` is what it asks for, in seconds; `cancelled` marks a
    cancellation that nobody asked for.
    """

    __slots__ = ("cancelled", "error", "retry_after", "throttled", "verdict")

    def __init__(
        self,
        error: BaseException,
        verdict: bool | float = False,
        *,
        throttled: bool = False,
        retry_after: float = 0.0,
        cancelled: bool = False,
    ) -> None:
        self.error = error
        self.verdict = verdict
        self.throttled = throttled
        self.retry_after = retry_after
        self.cancelled = cancelled


class Cancel:
    """The step that gives up on an attempt, or on a pull.  The core has already gone on without it."""

    __slots__ = ("reason", "target")

    def __init__(self, target: Attempt | Feed, reason: str) -> None:
        self.target = target
        self.reason = reason


class Wait:
    """The step that says when to ask again: at an instant, or (None) after something happened."""

    __slots__ = ("until",)

    def __init__(self, until: float | None) -> None:
        self.until = until

    def __repr__(self) -> str:
        return f"Wait({self.until})"


class Done(Enum):
    """The step after the last."""

    DONE = "done"


DONE: Final = Done.DONE
Step = Attempt | Feed | Cancel | Wait | Done
