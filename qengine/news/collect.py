"""One collection, from its sources to its last line on disk; what the command line runs.

Rules:

- an article is written before the next result is looked at;
- SIGINT and SIGTERM end the run in order: nothing more is asked, what was answered is written; a second SIGINT ends it
  at once;
- the handlers that were there before are there again afterwards.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, cast

from ..model import CancellationToken, CollectionReport, Event, QueryResult
from ..policy import StopConditions
from ..query import QueryExecutor, Source
from .output import ArticleFile
from .queries import NewsQuery, QueryGenerator
from .regions import StateUT
from .summary import Tally

__all__ = ["SIGNAL_EXIT_CODES", "cancelled_by_signals", "collect"]

#: How a run that a signal stopped exits, by the name of the signal, which is its stop reason.
SIGNAL_EXIT_CODES: Final = {"SIGINT": 130, "SIGTERM": 143}

_DRAIN_SECONDS: Final = 0.3


def collect(
    sources: Sequence[Source],
    plan: QueryGenerator,
    regions: Sequence[StateUT],
    out: ArticleFile,
    *,
    tally: Tally,
    deadline: float | None = None,
    cancel: CancellationToken | None = None,
    on_progress: Callable[[], object] | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> CollectionReport[NewsQuery]:
    """Ask every source about every region, and about the districts of those that are active.

    Args:
        sources, plan, regions: Whom to ask, what, and about what.
        out: Takes each article the moment it arrives.
        tally: Counts what arrives.
        deadline: Seconds for the whole run; None for as long as it takes.
        cancel: Ends the run in order when it is cancelled.
        on_progress: Called after each result.
        on_event: Called with each Event of the engine, in any thread, one at a time.
    """
    stop = StopConditions(timeout=deadline, drain_seconds=_DRAIN_SECONDS)
    with QueryExecutor(sources, plan, stop=stop, on_event=on_event).stream(regions, cancel=cancel) as stream:
        for result in cast("Iterator[QueryResult[NewsQuery]]", stream):
            for article in result.items:
                tally.article(article, out.add(article))
            tally.result(result)
            if on_progress is not None:
                on_progress()
    return cast("CollectionReport[NewsQuery]", stream.report)  # set by the end of the stream, and of that kind


@contextmanager
def cancelled_by_signals(token: CancellationToken) -> Iterator[None]:
    """Have SIGINT and SIGTERM cancel the token, with the signal's name as the reason, while in here."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if token.cancelled and number == signal.SIGINT:
            raise KeyboardInterrupt
        token.cancel(signal.Signals(number).name)

    before: dict[str, Any] = {}
    try:
        for name in SIGNAL_EXIT_CODES:
            before[name] = signal.signal(getattr(signal, name), handle)
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
