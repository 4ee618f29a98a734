"""What a journal tells: the run as its final table has it, from when to when, what is in flight, and what failed.

Rules:

- it only reads, and all of it as of one instant: also while a run writes, and after one that was killed;
- of a collection it shows the table that the collection shows at its end, over all times that it was gone on with; of
  any other run what the engine knows of it;
- what was skipped is in no journal; it is shown of a collection that has come to an end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..database import Database
from ..errors import StorageError
from .arguments import BAD_USAGE, Parser
from .articles import read_articles
from .summary import aligned, render, stamp

__all__ = ["add_to", "main", "show"]

_TABLES: Final = frozenset({"tasks", "sources", "shared", "runs", "facts"})
_QUOTA: Final = re.compile(r"Quota\((\S+) (\S+) per")
_TASKS: Final = """
SELECT source, status, started_at, duration, value, payload, key, attempts, error FROM tasks ORDER BY id
"""
_COLUMNS: Final = {
    "calls": "calls",
    "answers": "successes",
    "failures": "failures",
    "retries": "retries",
    "throttled": "throttled",
    "budget left": "budget_left",
    "first": "first_at",
    "last": "last_at",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command alone, which needs little of what the others do; return the exit code."""
    parser = Parser(prog="qengine")
    add_to(parser.add_subparsers(dest="command"))
    return show(parser.parse_args(argv))


def add_to(commands: Any) -> None:
    """Add the command to those of a parser."""
    command = commands.add_parser(
        "show",
        help="show what a journal tells of a run",
        description="Show what a journal tells of a run, also while it goes on.",
        epilog="exit codes: 0 shown; 2 the file cannot be read, or is no journal.",
    )
    command.add_argument("journal", metavar="FILE", help="the journal")
    command.add_argument("--failures", action="store_true", help="each query that failed, and why")


def show(arguments: argparse.Namespace) -> int:
    """Show it; return the exit code."""
    try:
        database = Database(arguments.journal, "", read_only=True)
        try:
            told = database.transact(partial(_Told, database.path))
        finally:
            database.close()
    except StorageError as error:
        print(f"qengine show: error: {error}", file=sys.stderr)
        return BAD_USAGE
    try:
        print("\n".join(_failures(told) if arguments.failures else [*_table(told), *_history(told)]), flush=True)
    except BrokenPipeError:  # nobody reads it any more, and the interpreter is not to try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Source:
    """What the tasks of one source came to."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.answered_at: list[float] = []  # the first and the last
        self.found: set[tuple[str, str]] = set()
        self.new = 0

    @property
    def failed(self) -> int:
        """How many tasks failed."""
        return self.statuses.total() - self.statuses["succeeded"] - self.statuses["started"]


class _Told:
    """All that a journal tells.

    Raises:
        StorageError: It is none.
    """

    def __init__(self, path: Path, connection: Any) -> None:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables >= _TABLES:
            raise StorageError(f"cannot show {path}: it is no journal of a run")
        self.facts: dict[str, str] = dict(connection.execute("SELECT name, value FROM facts"))
        self.runs: Sequence[tuple[int, float, float | None, str | None]] = connection.execute(
            "SELECT pid, started_at, ended_at, ended FROM runs ORDER BY id"
        ).fetchall()
        self.kept: dict[str, Mapping[str, Any]] = {
            name: json.loads(counts or "{}") for name, counts in connection.execute("SELECT name, counts FROM sources")
        }
        self._quotas: dict[str, Mapping[str, float]] = {
            name: json.loads(state)
            for name, state in connection.execute("SELECT name, state FROM shared WHERE name LIKE '%/quota/%'")
        }
        self.sources: dict[str, _Source] = defaultdict(_Source)
        self.failed: list[dict[str, Any]] = []
        self.active: dict[str, None] = {}
        self.districts: set[tuple[str, str]] = set()
        self.times: list[float] = []  # when the first task began, and when the last one ended
        self.is_collection = "collect states" in self.facts
        self._seen = self._seen_before()
        for row in connection.execute(_TASKS):
            self._task(*row)
        for name in self.kept:
            self.sources[name]

    @property
    def in_flight(self) -> int:
        """How many tasks are under way, or were when it was cut short."""
        return sum(source.statuses["started"] for source in self.sources.values())

    def left(self, name: str) -> float | None:
        """What is left of the calls of a source, the least where several things bound them; None where nothing does."""
        said: Mapping[str, str] = json.loads(self.facts.get("said", "{}")).get(name, {})
        left: list[float] = []
        if (budget := said.get("budget", "")).isdecimal():
            left.append(int(budget) - self.kept.get(name, {}).get("calls", 0))
        for number, (limit, unit) in enumerate(_QUOTA.findall(said.get("quota", ""))):
            used = self._quotas.get(f"{name}/quota/{number}")
            if used is not None and unit == "calls":
                left.append(float(limit) - (used["used"] if used["ends_at"] > time.time() else 0.0))
        return max(0.0, min(left)) if left else None

    def _seen_before(self) -> set[tuple[str, str]]:
        """The articles that its file held before; they are not new, whoever found them."""
        before = int(self.facts.get("collect articles", "0"))
        try:
            held = read_articles(self.facts["collect out"])[:before] if before else []
        except ValueError:  # it was moved
            held = []
        return {(article["state"], article["url"]) for article in held}

    def _task(
        self,
        name: str,
        status: str,
        started_at: float | None,
        duration: float | None,
        value: str | bytes | None,
        payload: str | None,
        key: str,
        attempts: int,
        error: str | None,
    ) -> None:
        source = self.sources[name]
        source.statuses[status] += 1
        if status == "started":
            return
        if started_at is not None and duration is not None:
            self.times = _widened(_widened(self.times, started_at), started_at + duration)
            source.answered_at = _widened(source.answered_at, started_at + duration)
        query = payload or key.removeprefix("=")
        language = None
        if self.is_collection and payload is not None:
            _, query, language, (_, slug, *_), districts, *_ = json.loads(payload)
            self.districts.update((slug, district) for district in districts)
            if status == "succeeded" and value is not None:
                found = [(article["state"], article["url"]) for article in json.loads(value)]
                source.found.update(found)
                source.new += len({*found} - self._seen)
                self._seen.update(found)
                if found:
                    self.active[slug] = None
        if status != "succeeded":
            self.failed.append({
                "source": name, "query": query, "language": language, "status": status, "error": error,
                "attempts": attempts,
            })


def _widened(times: list[float], at: float) -> list[float]:
    """The first and the last of the instants, with one more."""
    return [min(times[0], at), max(times[1], at)] if times else [at, at]


def _table(told: _Told) -> Iterator[str]:
    summary = _summary(told)
    if told.is_collection:
        yield render(summary)
        return
    rows = [
        [name, *(_shown(column, source[column]) for column in _COLUMNS.values())]
        for name, source in summary["sources"].items()
    ]
    yield from aligned([["source", *_COLUMNS], *rows])
    yield ""
    yield f"makespan         {summary['seconds']:.2f} s"
    yield f"stopped          {summary['stop_reason'] or 'at its end'}"


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column.endswith("_at"):
        return f"{value:.2f} s"
    return f"{value:g}"


def _summary(told: _Told) -> dict[str, Any]:
    """The same as a collection's at its end, with what the journal knows of it."""
    names = told.facts["collect sources"].split(",") if told.is_collection else [*told.sources]
    sources = {name: _source(told, name) for name in dict.fromkeys([*names, *told.sources])}
    return {
        "sources": sources,
        "states_active": len(told.active),
        "districts_asked": len(told.districts),
        "articles": sum(source["new"] for source in sources.values()),
        "stop_reason": _stopped(told),
        "seconds": told.times[1] - told.times[0] if told.times else 0.0,
        "failed_calls": [],
        "lost_queries": told.failed,
        "silent_sources": [name for name, source in sources.items() if source["calls"] and not source["successes"]],
        "simulated": None,
    }


def _source(told: _Told, name: str) -> dict[str, Any]:
    source, counts = told.sources[name], told.kept.get(name, {})
    began = told.runs[0][1] if told.runs else 0.0
    first, last = [at - began for at in source.answered_at] or (None, None)
    return {
        "calls": counts.get("calls", 0),
        "articles": len(source.found),
        "new": source.new,
        "successes": source.statuses["succeeded"],
        "skipped": json.loads(told.facts.get("collect skipped", "{}")).get(name, {}),
        "failures": source.failed,
        "cancelled": 0,
        "retries": counts.get("retries", 0),
        "throttled": counts.get("throttled", 0),
        "budget_left": told.left(name),
        "first_at": first,
        "last_at": last,
    }


def _stopped(told: _Told) -> str | None:
    """Why it ended, None where all was asked."""
    if not told.runs:
        return "before it began"
    pid, _, ended_at, ended = told.runs[-1]
    if ended_at is not None:
        return None if ended == "done" else ended
    return f"not yet, it goes on in process {pid}" if _is_there(pid) else "cut short"


def _is_there(pid: int) -> bool:
    """Whether there is such a process: of its lock nobody is to be deprived, not even for an instant."""
    if sys.platform == "win32":  # pragma: no cover - there it would be ended
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is somebody else's
    return True


def _history(told: _Told) -> Iterator[str]:
    if told.runs:
        ended_at = told.runs[-1][2]
        yield f"begun            {stamp(told.runs[0][1])}"
        yield f"ended            {'-' if ended_at is None else stamp(ended_at)}"
        yield f"gone on with     {_times(len(told.runs) - 1)}"
    yield f"in flight        {told.in_flight}"


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def _failures(told: _Told) -> Iterator[str]:
    for lost in told.failed:
        attempts = f"{lost['attempts']} attempt{'' if lost['attempts'] == 1 else 's'}"
        yield f"{lost['source']}, {lost['status']} after {attempts}: {lost['query']}"
        yield f"    {lost['error']}"
    if not told.failed:
        yield "nothing has failed"
