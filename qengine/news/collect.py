"""One collection, from its sources to its last line on disk; what the command line runs.

Rules:

- by threads or under asyncio: whom to ask, when to stop and what becomes of a result is the same;
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
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..model import CancellationToken, CollectionReport, Event, QueryResult
from ..policy import StopConditions
from ..query import QueryExecutor
from ..source import Source
from .articles import ArticleRef
from .queries import NewsQuery, QueryGenerator
from .regions import StateUT
from .sources import for_asyncio
from .summary import Tally

if TYPE_CHECKING:  # only for those who have one
    from ..journal import Journal

__all__ = ["SIGNAL_EXIT_CODES", "Shelf", "cancelled_by_signals", "collect", "stop_conditions", "take"]

#: How a run that a signal stopped exits, by the name of the signal, which is its stop reason.
SIGNAL_EXIT_CODES: Final = {"SIGINT": 130, "SIGTERM": 143}

_DRAIN_SECONDS: Final = 0.3


class Shelf(Protocol):
    """Where articles go."""

    def add(self, article: ArticleRef) -> bool:
        """Keep the article unless it is there; return whether it was new."""


def collect(
    sources: Sequence[Source],
    plan: QueryGenerator,
    regions: Sequence[StateUT],
    out: Shelf,
    *,
    tally: Tally,
    under_asyncio: bool = False,
    deadline: float | None = None,
    cancel: CancellationToken | None = None,
    on_progress: Callable[[], object] | None = None,
    on_event: Callable[[Event], object] | None = None,
    journal: Journal | None = None,
) -> CollectionReport[NewsQuery]:
    """Ask every source about every region, and about the districts of those that are active.

    Args:
        sources, plan, regions: Whom to ask, what, and about what.
        out: Takes each article the moment it arrives.
        tally: Counts what arrives.
        under_asyncio: Run it in an event loop of its own instead of in threads; it is not for a program that has one.
        deadline: Seconds for the whole run; None for as long as it takes.
        cancel: Ends the run in order when it is cancelled.
        on_progress: Called after each result.
        on_event: Called with each Event of the engine, in any thread, one at a time.
        journal: Records it; what is known there is not asked again, and counts as if it had been found now.

    Raises:
        StorageError: The journal can be written no more; its `report` is of what was stored.
    """

    def took(result: Any) -> None:
        take(result, out, tally)
        if on_progress is not None:
            on_progress()

    run = _under_asyncio if under_asyncio else _by_threads
    report: CollectionReport[NewsQuery] = run(
        sources, regions, cancel, took, plan=plan, stop=stop_conditions(deadline), on_event=on_event,
        journal=journal,
    )
    return report


def take(result: QueryResult[NewsQuery], out: Shelf, tally: Tally) -> None:
    """Keep what a query found, and count it."""
    for article in result.items:
        tally.article(article, out.add(article))
    tally.result(result)


def stop_conditions(deadline: float | None) -> StopConditions:
    """When a collection stops before its end; what is being asked then has a moment to be answered."""
    return StopConditions(timeout=deadline, drain_seconds=_DRAIN_SECONDS)


def _by_threads(
    sources: Sequence[Source],
    regions: Sequence[StateUT],
    cancel: CancellationToken | None,
    took: Callable[[Any], None],
    **options: Any,
) -> Any:
    with QueryExecutor(sources, **options).stream(regions, cancel=cancel) as stream:
        for result in stream:
            took(result)
    return stream.report


def _under_asyncio(
    sources: Sequence[Source],
    regions: Sequence[StateUT],
    cancel: CancellationToken | None,
    took: Callable[[Any], None],
    **options: Any,
) -> Any:
    import asyncio  # only here: it is not for everybody

    from ..aio import AsyncQueryExecutor

    async def run() -> Any:
        executor = AsyncQueryExecutor([for_asyncio(source) for source in sources], **options)
        async with executor.stream(regions, cancel=cancel) as stream:
            async for result in stream:
                took(result)  # in the loop, for it waits for nobody: a line goes into the file at once
        return stream.report

    return asyncio.run(run())


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
