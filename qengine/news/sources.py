"""The three news sources: how each is asked, what its answers look like, and what it allows.

Rules:

- a source object is a plain callable from a `Query` whose payload is a `NewsQuery` to the articles found; it holds no
  state, so any number of threads may call it;
- an answer that is not what the source publishes is a failure that says what it is, never an empty result: truncated or
  HTML where a retry may mend it, a document type declaration (the door to XML bombs) where it will not;
- articles outside the period that was asked for are dropped here, whatever the source made of it;
- `speed` makes limits, windows, backoff and pauses that many times faster, for servers that do the same; timeouts and
  budgets stay what they are;
- keys are in no message and no repr.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, NoReturn, TypedDict, Unpack, cast

from ..drivers.handover import in_thread
from ..errors import RateLimitError, TaskError, TransientError, require_positive
from ..model import Query
from ..policy import BreakerPolicy, Limit, RateLimit, RetryPolicy, Window
from ..quota import Quota
from ..source import Source
from . import http
from .articles import ArticleRef, mentioned_district
from .dates import Period, read_stamp
from .queries import NewsQuery
from .terms import HEAT

__all__ = [
    "GNewsSource",
    "GoogleNewsSource",
    "NewsDataSource",
    "SOURCES",
    "NewsSource",
    "SourceOptions",
    "budget_by_day",
    "create_gnews_scheduler",
    "create_google_scheduler",
    "create_newsdata_scheduler",
    "create_scheduler",
    "for_asyncio",
]

ALL_LANGUAGES: Final = HEAT.languages
GNEWS_LANGUAGES: Final = frozenset({"en", "hi", "bn", "ta", "te", "mr", "ml", "pa"})

_NEWSDATA_HOURS: Final = 48
_NEWSDATA_WINDOW: Final = 900.0
_GRACE: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Found:
    """An item as the source gives it, before it is known to belong to the period."""

    title: str
    url: str
    publisher: str
    stamp: datetime | None


class SourceOptions(TypedDict, total=False):
    """What every source can be told; see `NewsSource`."""

    base_url: str | None
    timeout: float
    speed: float
    on_failure: Callable[[str, Exception], object] | None


class NewsSource(ABC):
    """A source of articles over HTTP.

    Args:
        base_url: Where it is asked; the real service unless given.
        timeout: Seconds for one whole answer.
        speed: How many times faster than the real service this one runs its clock.
        on_failure: Called with the source's name and the error of each call that failed, in the thread that made it.
    """

    name: ClassVar[str]
    url: ClassVar[str]
    key_variable: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        base_url: str | None = None,
        timeout: float = 30.0,
        speed: float = 1.0,
        on_failure: Callable[[str, Exception], object] | None = None,
    ) -> None:
        self._base_url = http.check_base_url(self.url if base_url is None else base_url)
        self.timeout = require_positive("timeout", timeout)
        self.speed = require_positive("speed", speed)
        self._on_failure = on_failure

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base_url!r})"

    def __call__(self, query: Query[Any]) -> list[ArticleRef]:
        """Ask, and return the articles of the period that was asked for; see `http.get` for what it raises."""
        asked: NewsQuery = query.payload
        try:
            return self.read(self._get(asked), asked)
        except Exception as error:
            if self._on_failure is not None:
                self._on_failure(self.name, error)
            raise

    def read(self, body: bytes, asked: NewsQuery) -> list[ArticleRef]:
        """The articles in the body of an answer, of the period that was asked for."""
        found = self._parse(body)
        return [self._article(item, asked) for item in found if item.url and item.stamp in asked.period]

    def _get(self, asked: NewsQuery) -> bytes:
        try:
            return http.get(self.name, self._base_url, self._parameters(asked), timeout=self.timeout)
        except RateLimitError as error:
            if error.retry_after is not None:
                error.retry_after /= self.speed
            raise

    def _article(self, item: _Found, asked: NewsQuery) -> ArticleRef:
        return ArticleRef(
            title=item.title,
            url=item.url,
            source=item.publisher,
            date=item.stamp.isoformat() if item.stamp else None,
            language=asked.language,
            state=asked.state.name,
            district=mentioned_district(item.title, asked.districts),
            search_term=asked.text,
            found_by=self.name,
        )

    @abstractmethod
    def _parameters(self, asked: NewsQuery) -> dict[str, str]:
        """The parameters of the request."""

    @abstractmethod
    def _parse(self, body: bytes) -> Iterator[_Found]:
        """The items of an answer."""


class GoogleNewsSource(NewsSource):
    """Google News: RSS 2.0, no key, date operators in the query text."""

    name = "google"
    url = "https://news.google.com/rss/search"

    def _parameters(self, asked: NewsQuery) -> dict[str, str]:
        return {"q": asked.text, "hl": asked.language, "gl": "IN", "ceid": f"IN:{asked.language}"}

    def _parse(self, body: bytes) -> Iterator[_Found]:
        for item in _rss(self.name, body).iterfind("channel/item"):
            yield _Found(
                title=item.findtext("title", ""),
                url=item.findtext("link", "").strip(),
                publisher=item.findtext("source", ""),
                stamp=read_stamp(item.findtext("pubDate")),
            )


class _KeyedSource(NewsSource):
    """A source that wants an API key and answers in JSON."""

    key_variable: ClassVar[str]
    results: ClassVar[str]

    def __init__(self, api_key: str | None = None, **options: Unpack[SourceOptions]) -> None:
        """Take the key given, else the one in the environment variable `key_variable`.

        Raises:
            ValueError: there is neither.
        """
        super().__init__(**options)
        self._api_key = api_key or os.environ.get(self.key_variable, "").strip()
        if not self._api_key:
            raise ValueError(f"{self.name} needs an API key: give one, or set {self.key_variable}")

    def _parse(self, body: bytes) -> Iterator[_Found]:
        answer = _json(self.name, body)
        items = answer.get(self.results)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise TransientError(f"{self.name} sent JSON without a list of {self.results}")
        yield from map(self._item, items)

    @abstractmethod
    def _item(self, item: Mapping[str, Any]) -> _Found:
        """One item of the list of results."""


class NewsDataSource(_KeyedSource):
    """NewsData.io, the free endpoint: the last 48 hours, in JSON."""

    name = "newsdata"
    url = "https://newsdata.io/api/1/latest"
    key_variable = "NEWSDATA_API_KEY"
    results = "results"

    def _parameters(self, asked: NewsQuery) -> dict[str, str]:
        hours = asked.period.hours
        recent = {"timeframe": str(hours)} if hours is not None and hours <= _NEWSDATA_HOURS else {}
        return {"apikey": self._api_key, "q": asked.text, "language": asked.language, "country": "in", **recent}

    def _item(self, item: Mapping[str, Any]) -> _Found:
        publisher = _text(item, "source_name") or _text(item, "source_id")
        return _Found(_text(item, "title"), _text(item, "link"), publisher, read_stamp(item.get("pubDate")))


class GNewsSource(_KeyedSource):
    """GNews.io: JSON, ten articles an answer, 8 of the 14 languages."""

    name = "gnews"
    url = "https://gnews.io/api/v4/search"
    key_variable = "GNEWS_API_KEY"
    results = "articles"

    def _parameters(self, asked: NewsQuery) -> dict[str, str]:
        return {
            "q": asked.text,
            "lang": asked.language,
            "country": "in",
            "max": "10",
            "apikey": self._api_key,
            **_bounds(asked.period),
        }

    def _item(self, item: Mapping[str, Any]) -> _Found:
        publisher = item.get("source")
        name = _text(publisher, "name") if isinstance(publisher, dict) else ""
        return _Found(_text(item, "title"), _text(item, "url"), name, read_stamp(item.get("publishedAt")))


#: The sources by their names, the one with the most generous limits first.
SOURCES: Final[Mapping[str, type[NewsSource]]] = {
    source.name: source for source in (GoogleNewsSource, NewsDataSource, GNewsSource)
}


def create_google_scheduler(**options: Unpack[SourceOptions]) -> Source:
    """Google News as the engine runs it: 1.5 calls a second, 5 at once, no budget, 14 languages."""
    fetch = GoogleNewsSource(**options)
    return _scheduled(fetch, limits=(RateLimit(per_second=1.5 * fetch.speed),), concurrency=5)


def create_newsdata_scheduler(
    api_key: str | None = None, **options: Unpack[SourceOptions]
) -> Source:
    """NewsData as the engine runs it: 10 calls a second, 30 in any 900 s, 200 a run, one at once, 14 languages."""
    fetch = NewsDataSource(api_key, **options)
    limits = (RateLimit(per_second=10 * fetch.speed), Window(limit=30, seconds=_NEWSDATA_WINDOW / fetch.speed))
    return _scheduled(fetch, limits=limits, budget=200)


def create_gnews_scheduler(
    api_key: str | None = None, **options: Unpack[SourceOptions]
) -> Source:
    """GNews as the engine runs it: 1 call a second, 100 a run, one at once, 8 languages."""
    fetch = GNewsSource(api_key, **options)
    limits = (RateLimit(per_second=1.0 * fetch.speed),)
    return _scheduled(fetch, limits=limits, budget=100, languages=GNEWS_LANGUAGES)


def create_scheduler(
    name: str, api_key: str | None = None, **options: Unpack[SourceOptions]
) -> Source:
    """The source of that name as the engine runs it; google needs no key."""
    if name == "google":
        return create_google_scheduler(**options)
    return {"newsdata": create_newsdata_scheduler, "gnews": create_gnews_scheduler}[name](api_key, **options)


def for_asyncio(source: Source) -> Source:
    """The same source for an AsyncQueryExecutor: its calls are made in threads of the engine.

    The two share what they have used of their limits, and their breaker.
    """
    twin = copy(source)
    twin.fetch = cast(Any, in_thread(source.fetch))  # Source takes both kinds of function, its annotation only one
    return twin


def budget_by_day(source: Source) -> Source:
    """The same source with its budget of a run as one of each day: with a journal a run may be of several days.

    A day is one of UTC.  The two share what they have used of their limits, and their breaker.
    """
    twin = copy(source)
    if isinstance(source.budget, int):
        twin.budget, twin.quota = None, Quota(source.budget, per="day")
    return twin


def _scheduled(
    fetch: NewsSource,
    *,
    limits: tuple[Limit, ...],
    concurrency: int = 1,
    budget: int | None = None,
    languages: frozenset[str] = ALL_LANGUAGES,
) -> Source:
    speed = fetch.speed
    return Source(
        fetch.name,
        fetch,
        limits=limits,
        concurrency=concurrency,
        budget=budget,
        breaker=BreakerPolicy(reset_after=30 / speed, max_reset_after=600 / speed),
        # To wait out the longest window there is is better than to lose what was asked.
        retry=RetryPolicy(3, backoff=1 / speed, max_backoff=60 / speed, max_retry_after=_NEWSDATA_WINDOW / speed),
        # A call ends itself in time; the engine ends what cannot, such as the look-up of a name.
        timeout=fetch.timeout + _GRACE,
        accepts=_speaks(languages),
    )


def _speaks(languages: frozenset[str]) -> Callable[[Query[NewsQuery]], bool]:
    return lambda query: query.payload.language in languages


def _bounds(period: Period) -> dict[str, str]:
    bounds = {"from": period.start, "to": period.end}
    return {
        name: instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for name, instant in bounds.items() if instant
    }


class _NoDoctype(ET.TreeBuilder):
    """Builds a tree, and refuses a document type: without one there are no entities to expand, so no bomb."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        if name.lower() == "html":
            raise _html(self._name)
        raise TaskError(f"{self._name} sent XML with a document type declaration, which is refused: it may be a bomb")


def _rss(name: str, body: bytes) -> ET.Element:
    try:
        root = ET.fromstring(body, ET.XMLParser(target=_NoDoctype(name)))
    except ET.ParseError as error:
        if b"<html" in body[:1024].lower():
            raise _html(name) from None
        raise TransientError(f"{name} sent a body that is not well-formed XML: {error}") from None
    except (ValueError, LookupError):  # an encoding that expat or Python does not know
        raise TransientError(f"{name} sent XML in an unknown encoding") from None
    if root.tag.lower() == "html":
        raise _html(name)
    if root.tag != "rss":
        raise TransientError(f"{name} sent XML that is not RSS")
    return root


def _json(name: str, body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise (_html(name) if body.lstrip()[:1] == b"<" else TransientError(f"{name} sent malformed JSON")) from None
    if not isinstance(answer, dict):
        raise TransientError(f"{name} sent JSON that is not an object")
    return answer


def _html(name: str) -> TransientError:
    return TransientError(f"{name} sent HTML instead of articles")


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    return value if isinstance(value, str) else ""
