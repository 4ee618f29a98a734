"""The journal of a collection: what was asked and found, so that the same command goes on where it was cut short.

Rules:

- in the file are the queries, the articles and what failed, and no key of a source;
- what a duration meant when the collection began it means as long as that is gone on with;
- what is asked for differently than before is said;
- only the journal of a collection is gone on with, or started over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from ..journal import STARTED, Journal
from ..model import CollectionReport
from .articles import ArticleRef
from .dates import Period
from .terms import Terms

__all__ = ["ArticleCodec", "Asked", "CollectionJournal"]

_PREFIX: Final = "collect "


class ArticleCodec:
    """The articles that a query found, as JSON: a list of objects, each with the fields of an ArticleRef."""

    @staticmethod
    def dumps(articles: Any) -> str:
        """Return what is stored; half of a surrogate pair, which a file could not hold, has all of it escaped.

        >>> ArticleCodec.loads(ArticleCodec.dumps([]))
        []
        """
        values = [asdict(article) for article in articles]
        text = json.dumps(values, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            return json.dumps(values)
        return text

    @staticmethod
    def loads(stored: str) -> list[ArticleRef]:
        """Return the articles."""
        return [ArticleRef(**article) for article in json.loads(stored)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command asks for.

    Attributes:
        when: About which period, in the words of the command.
        period: The one that this means now.
    """

    states: tuple[str, ...]
    sources: tuple[str, ...]
    terms: Terms
    when: str
    period: Period

    def in_words(self) -> dict[str, str]:
        """What is compared with the last time."""
        return {
            "states": ",".join(self.states),
            "sources": ",".join(self.sources),
            "terms": _fingerprint(self.terms),
            "when": self.when,
        }


class CollectionJournal(Journal):
    """The journal of a collection; see `Journal`.

    Args:
        path: Where.
        say: Called with each change that is noticed.
        retry_failed: As for a Journal.

    Raises:
        StorageError: As a Journal; so where it is one of something else, which has values of another kind.
    """

    def __init__(self, path: str | Path, say: Callable[[str], object], *, retry_failed: bool = False) -> None:
        self._say = say
        super().__init__(path, codec=ArticleCodec(), retry_failed=retry_failed)
        try:
            self._known: Mapping[str, str] = self.database.transact(_known)
            self._statuses: Counter[str] = Counter(self.database.transact(_statuses))
        except BaseException:
            self.close()
            raise

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self._known)

    @property
    def progress(self) -> str:
        """How far it has come, in words."""
        failed = sum(count for status, count in self._statuses.items() if status not in ("succeeded", STARTED))
        again = ", to be asked again" if failed and self.retry_failed else ""
        answered, in_flight = self._statuses["succeeded"], self._statuses[STARTED]
        return f"{answered} queries answered, {in_flight} in flight, {failed} failed{again}"

    @property
    def answered(self) -> frozenset[str]:
        """The sources that have ever answered in it."""
        return self.database.transact(_answered, only_reads=True)

    def said(self, change: str) -> None:
        """Say that something has changed."""
        self.changes.append(change)
        self._say(change)

    def start_over(self) -> None:
        """Forget what was answered, and say so."""
        super().start_over()
        self._known, self._statuses = {}, Counter()

    def begin(self, asked: Asked, out: Path, articles: int) -> tuple[Period, int]:
        """Note what is asked for and where its articles go, and say what is not as before.

        Args:
            asked: What is asked for.
            out: Where its articles go.
            articles: How many are there.

        Returns:
            The period to ask about, and how many articles were there before any of the collection's own.
        """
        known, words = self._known, asked.in_words()
        period = _fixed(asked.period)
        if known.get("when") == asked.when:
            period = _read_period(known["period"])
        place = str(out.resolve())
        if known.get("out") == place:
            articles = min(articles, int(known["articles"]))
        self._known = {
            **words,
            "period": _write_period(period),
            "out": place,
            "articles": str(articles),
            "skipped": "{}",
        }
        self._write(self._known)
        for name, value in words.items():
            if known and known[name] != value:
                self.said(_change(name, known[name], value))
        return period, articles

    def end(self, report: CollectionReport[Any]) -> None:
        """Note what was skipped, which is nowhere else."""
        self._write({"skipped": json.dumps({name: source.skipped for name, source in report.by_source.items()})})

    def _write(self, facts: Mapping[str, str]) -> None:
        rows = [(f"{_PREFIX}{name}", value) for name, value in facts.items()]
        self.database.transact(lambda c: c.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows))


def _known(connection: Any) -> dict[str, str]:
    rows = connection.execute("SELECT name, value FROM facts WHERE name LIKE ?", (f"{_PREFIX}%",))
    return {name.removeprefix(_PREFIX): value for name, value in rows}


def _statuses(connection: Any) -> dict[str, int]:
    return dict(connection.execute("SELECT status, count(*) FROM tasks GROUP BY status"))


def _answered(connection: Any) -> frozenset[str]:
    return frozenset(
        name
        for (name,) in connection.execute(
            "SELECT name FROM sources WHERE EXISTS (SELECT 1 FROM tasks WHERE source = name AND status = 'succeeded')"
        )
    )


def _change(name: str, before: str, value: str) -> str:
    if name == "terms":
        return "the terms are others than before"
    if name == "when":
        return f"the period was {before}, and is {value} now: what was found for the other is left where it is"
    return f"the {name} were {before}, and are {value} now"


def _fixed(period: Period) -> Period:
    """The period from its beginning on: "the last hours" would be others when it is gone on with."""
    return replace(period, hours=None)


def _write_period(period: Period) -> str:
    return json.dumps([None if end is None else end.isoformat() for end in (period.start, period.end)])


def _read_period(text: str) -> Period:
    start, end = (None if instant is None else datetime.fromisoformat(instant) for instant in json.loads(text))
    return Period(start, end)


def _fingerprint(terms: Terms) -> str:
    table = {
        language: {category: terms.of(language, category) for category in terms.categories(language)}
        for language in sorted(terms.languages)
    }
    return blake2b(json.dumps(table).encode(), digest_size=16).hexdigest()
