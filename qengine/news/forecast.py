"""What a collection would come to: how many calls, and when, at the real limits; nothing is asked and nothing written.

Rules:

- the sources, their limits and budgets and the plan are those of a real run;
- from recorded articles an answer is what the server that replays them would send, read as the source reads it; without
  any every query finds something, so every state is active;
- how long a call takes is drawn from the seed, the query and the number of the attempt, from nothing else: the same
  command gives the same forecast, and one call more changes no other;
- a call that would take longer than its timeout is the failure that it would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Self, cast

from ..drivers.calls import CurrentAttempt
from ..model import CollectionReport, TaskResult
from ..query import QueryExecutor
from ..simulation import simulate
from ..source import Source
from .articles import ArticleRef
from .collect import stop_conditions, take
from .formats import FORMATS, Article
from .http import timed_out
from .queries import NewsQuery, QueryGenerator
from .regions import StateUT
from .server import Archive
from .sources import NewsSource
from .summary import Tally

__all__ = ["Forecast", "Latency"]

_ANY: Final[Article] = {"url": "http://127.0.0.1/"}  # what a query finds where nobody knows


@dataclass(frozen=True, slots=True)
class Latency:
    """How long calls take: anything from `shortest` to `longest` seconds, all equally likely."""

    shortest: float
    longest: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """The seconds written as ``0.4:1.2``, or one number for all calls.

        >>> Latency.parse("0.4:1.2")
        Latency(shortest=0.4, longest=1.2)
        """
        parts = text.split(":")
        numbers = [float(part) if part.replace(".", "", 1).isdecimal() else math.nan for part in parts]
        if len(numbers) > 2 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"latency must be seconds like 0.4:1.2 or 0.8, finite and not negative, not {text!r}")
        if numbers[0] > numbers[-1]:
            raise ValueError(f"latency must begin with the shorter time, not {text!r}")
        return cls(numbers[0], numbers[-1])

    def draw(self, *drawn_from: object) -> float:
        """Seconds that depend on what is given, and on nothing else."""
        return Random(repr(drawn_from)).uniform(self.shortest, self.longest)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a forecast goes by.

    Args:
        latency: How long calls take.
        seed: With another one, other calls are the slow ones.
        archive: What there is to find; None where that is not known.
    """

    latency: Latency
    seed: int = 0
    archive: Archive | None = None

    def run(
        self,
        sources: Sequence[Source],
        plan: QueryGenerator,
        regions: Sequence[StateUT],
        *,
        tally: Tally,
        deadline: float | None = None,
    ) -> CollectionReport[NewsQuery]:
        """Return the report of a collection that asks nobody; its instants are seconds from the start.

        Args:
            sources, plan, regions: Whom it would ask, what, and about what; each `fetch` is a NewsSource.
            tally: Counts what would arrive.
            deadline: Seconds for the whole run; None for as long as it takes.
        """
        asked = {source.name: cast(NewsSource, source.fetch) for source in sources}
        report: Any = simulate(
            QueryExecutor(sources, plan, stop=stop_conditions(deadline)),
            regions,
            latency=lambda attempt: min(self._seconds(attempt), asked[attempt.source].timeout),
            outcome=lambda attempt: self._answer(attempt, asked[attempt.source], tally),
            seed=self.seed,
        )
        shelf = _Shelf()
        for result in sorted(report.results, key=_ended_at):  # who would be first to find an article
            take(result, shelf, tally)
        return cast("CollectionReport[NewsQuery]", report)

    def _seconds(self, attempt: CurrentAttempt) -> float:
        asked: NewsQuery = attempt.task.payload
        return self.latency.draw(self.seed, attempt.source, asked.text, asked.language, attempt.number)

    def _answer(self, attempt: CurrentAttempt, source: NewsSource, tally: Tally) -> list[ArticleRef]:
        if self._seconds(attempt) > source.timeout:
            error = timed_out(source.name)
            tally.failed(source.name, error)
            raise error
        asked: NewsQuery = attempt.task.payload
        articles = [_ANY] if self.archive is None else self.archive.find(asked.text, asked.language)
        return source.read(FORMATS[source.name].body(articles, asked.language), asked)


class _Shelf:
    """Where articles would go."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def add(self, article: ArticleRef) -> bool:
        known = article.identity in self._seen
        self._seen.add(article.identity)
        return not known


def _ended_at(result: TaskResult[Any, Any]) -> float:
    return (result.started_at or 0.0) + result.duration
