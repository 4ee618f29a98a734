"""What became of a collection, or would: counted while it runs, then shown as a table and written as JSON.

The table and the file say the same; `summarize` makes the one mapping that both are made from.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from ..model import CollectionReport, QueryResult
from .articles import ArticleRef
from .dates import INDIA
from .queries import NewsQuery
from .regions import StateUT

__all__ = ["Tally", "aligned", "render", "silent_sources", "stamp", "summarize"]

_MOST_LINES: Final = 8

_WORDS: Final = ("source", "skipped")
_COLUMNS: Final = (
    "source", "calls", "articles", "new", "skipped", "failures", "retries", "budget left", "first", "last",
)


class Tally:
    """Counts what the engine does not know: articles, districts, and why calls failed.

    `failed`, `last_failure` and `articles` may be used from any thread, the rest from one.  `answered` are the sources
    that are known to have answered before.
    """

    def __init__(self) -> None:
        self.answered: frozenset[str] = frozenset()
        self.found: dict[str, set[tuple[str, str]]] = {}
        self.new: Counter[str] = Counter()
        self.districts: set[tuple[str, str]] = set()
        self.lost: list[dict[str, Any]] = []
        self._failed: Counter[tuple[str, str]] = Counter()
        self._last_failure: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def articles(self) -> int:
        """How many articles were new."""
        with self._lock:
            return self.new.total()

    def article(self, article: ArticleRef, is_new: bool) -> None:
        """Count an article that a source brought."""
        self.found.setdefault(article.found_by, set()).add(article.identity)
        with self._lock:
            self.new[article.found_by] += is_new

    def result(self, result: QueryResult[NewsQuery]) -> None:
        """Count a result: which districts were asked about, and what was lost."""
        asked = result.task.payload
        if result.attempts:
            self.districts.update((asked.state.slug, district) for district in asked.districts)
        if result.status.is_failure:
            self.lost.append({
                "source": result.source,
                "query": asked.text,
                "language": asked.language,
                "status": result.status.value,
                "error": str(result.error),
            })

    def failed(self, source: str, error: Exception) -> None:
        """Count a call that failed, whether or not it is tried again."""
        text = str(error) or type(error).__name__
        with self._lock:
            self._failed[source, text] += 1
            self._last_failure[source] = text

    def last_failure(self, source: str) -> str | None:
        """The error of the source's last call that failed, None before."""
        with self._lock:
            return self._last_failure.get(source)

    def failed_calls(self) -> list[tuple[str, str, int]]:
        """Source, error and how often, the most frequent first."""
        with self._lock:
            return [(source, error, count) for (source, error), count in self._failed.most_common()]


def silent_sources(report: CollectionReport[Any], tally: Tally) -> list[str]:
    """The sources that were called and never answered."""
    return [
        name
        for name, source in report.by_source.items()
        if source.calls and not source.success_count and name not in tally.answered
    ]


def summarize(
    report: CollectionReport[Any], tally: Tally, exit_code: int, simulated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything the table shows, and what it has no room for.

    Args:
        report, tally, exit_code: What became of the run.
        simulated: What a forecast took for granted: its `latency` (shortest and longest), its `seed`, and the name of
            the file of its `answers`, None where every query found something; None for a real run.
    """
    knows_articles = simulated is None or simulated["answers"] is not None
    active = [node.slug for node in report.active_nodes if isinstance(node, StateUT)]
    return {
        "sources": {name: _source(report, tally, name, knows_articles) for name in report.by_source},
        "active_states": active,
        "states_active": len(active),
        "districts_asked": len(tally.districts),
        "articles": tally.articles if knows_articles else None,
        "stop_reason": report.stop_reason,
        "exit_code": exit_code,
        "silent_sources": silent_sources(report, tally),
        "simulated": simulated,
        "started_at": stamp(report.started_at) if simulated is None else None,
        "seconds": round(report.makespan, 3),
        "failed_calls": [
            {"source": source, "error": error, "calls": count} for source, error, count in tally.failed_calls()
        ],
        "lost_queries": tally.lost,
    }


def render(summary: Mapping[str, Any]) -> str:
    """The table, and the lines below it."""
    rows = [_COLUMNS, *(_row(name, source) for name, source in summary["sources"].items())]
    lines = [*aligned(rows), ""]
    lines += [f"states active    {summary['states_active']}", f"districts asked  {summary['districts_asked']}"]
    lines += [f"articles         {_count(summary['articles'])}", f"makespan         {_seconds(summary['seconds'])}"]
    lines += [f"stopped          {summary['stop_reason'] or 'at its end'}"]
    lines += _shortened([
        f"failed calls     {call['calls']} x {call['error']}" for call in summary["failed_calls"]
    ])
    lines += _shortened([
        f"lost             {lost['source']}, {lost['status']}: {lost['query']}" for lost in summary["lost_queries"]
    ])
    lines += [f"never answered   {name}" for name in summary["silent_sources"]]
    if summary["simulated"] is not None:
        lines += [f"simulated        {_assumed(summary['simulated'])}"]
    return "\n".join(lines)


def _source(report: CollectionReport[Any], tally: Tally, name: str, knows_articles: bool) -> dict[str, Any]:
    source = report.by_source[name]
    return {
        "calls": source.calls,
        "articles": len(tally.found.get(name, ())) if knows_articles else None,
        "new": tally.new[name] if knows_articles else None,
        "successes": source.success_count,
        "skipped": dict(source.skipped),
        "failures": source.failure_count,
        "cancelled": source.cancelled_count,
        "retries": source.retries,
        "throttled": source.throttled,
        "budget_left": source.remaining_budget,
        "first_at": _rounded(source.first_at),
        "last_at": _rounded(source.last_at),
        "busy_seconds": _rounded(source.busy_seconds),
    }


def _row(name: str, source: Mapping[str, Any]) -> Sequence[str]:
    skipped = ", ".join(f"{count} {reason}" for reason, count in source["skipped"].items())
    if source["cancelled"]:
        skipped = ", ".join(filter(None, (skipped, f"{source['cancelled']} cancelled")))
    budget = "-" if source["budget_left"] is None else f"{source['budget_left']:g}"
    counts = (_count(source[column]) for column in ("calls", "articles", "new"))
    answers = (_seconds(source["first_at"]), _seconds(source["last_at"]))
    return (name, *counts, skipped or "-", str(source["failures"]), str(source["retries"]), budget, *answers)


def _assumed(simulated: Mapping[str, Any]) -> str:
    """What a forecast took for granted, in words."""
    shortest, longest = simulated["latency"]
    answers = simulated["answers"]
    found = "every state assumed to be active" if answers is None else f"answers as in {answers}"
    seconds = f"{shortest:g}" if shortest == longest else f"{shortest:g} to {longest:g}"
    return f"calls take {seconds} s (seed {simulated['seed']}); {found}; nobody was asked"


def aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The rows, of which the first names the columns, with these in line: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if name in _WORDS else cell.rjust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return lines if rest <= 0 else [*lines[:_MOST_LINES], f"                 and {rest} more like these"]


def stamp(seconds: float) -> str:
    """Seconds since the epoch as a time in India."""
    return datetime.fromtimestamp(seconds, INDIA).isoformat(timespec="seconds")


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
