"""The sources: what they ask for, what they make of an answer, what they allow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from news.support import ask

from qengine import (
    AsyncQueryExecutor,
    QueryExecutor,
    RateLimit,
    RateLimitError,
    StopConditions,
    TaskError,
    TransientError,
    Window,
)
from qengine.news import (
    GNewsSource,
    GoogleNewsSource,
    NewsDataSource,
    Period,
    QueryGenerator,
    create_gnews_scheduler,
    create_google_scheduler,
    create_newsdata_scheduler,
    for_asyncio,
    get_region_by_slug,
)
from qengine.news import http as news_http
from qengine.news.terms import HEAT

SECRET = "s3cr3t"


class Wire:
    """Stands in for the network: keeps what was asked, gives the body it was told to, or raises it."""

    def __init__(self) -> None:
        self.asked: Mapping[str, str] = {}
        self.answer: bytes | Exception = b""

    def get(self, name: str, base_url: str, parameters: Mapping[str, str], *, timeout: float) -> bytes:
        self.asked = parameters
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(news_http, "get", wire.get)
    return wire


def rss(*items: str) -> bytes:
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>G</title>{"".join(items)}</channel></rss>'.encode()


ITEM = (
    "<item><title>Heat &amp; dust in Gaya - The Paper</title><link>http://a/1</link><guid>x</guid>"
    '<pubDate>Wed, 20 May 2026 18:30:00 GMT</pubDate><source url="http://p/">The Paper</source></item>'
)


def test_google_reads_rss(wire: Wire) -> None:
    wire.answer = rss(ITEM)
    [found] = GoogleNewsSource()(ask('loo ("Gaya" OR "Patna") Bihar', language="hi", districts=("Gaya", "Patna")))
    assert wire.asked == {"q": 'loo ("Gaya" OR "Patna") Bihar', "hl": "hi", "gl": "IN", "ceid": "IN:hi"}
    assert (found.title, found.url, found.source) == ("Heat & dust in Gaya - The Paper", "http://a/1", "The Paper")
    assert (found.date, found.language, found.state) == ("2026-05-21T00:00:00+05:30", "hi", "Bihar")
    assert (found.district, found.found_by) == ("Gaya", "google")
    assert found.search_term == 'loo ("Gaya" OR "Patna") Bihar'


def test_newsdata_reads_json(wire: Wire) -> None:
    wire.answer = json.dumps({"status": "success", "totalResults": 2, "nextPage": None, "results": [
        {"title": "T", "link": "http://a/1", "source_name": "P", "pubDate": "2026-05-20 18:30:00", "language": "hindi"},
        {"title": None, "link": "http://a/2", "source_id": "p", "pubDate": None},
    ]}).encode()
    first, second = NewsDataSource(SECRET)(ask("loo Bihar", language="hi"))
    assert wire.asked == {"apikey": SECRET, "q": "loo Bihar", "language": "hi", "country": "in"}
    assert (first.title, first.source, first.date, first.language) == ("T", "P", "2026-05-21T00:00:00+05:30", "hi")
    assert (second.title, second.source, second.date) == ("", "p", None)


def test_gnews_reads_json(wire: Wire) -> None:
    wire.answer = json.dumps({"totalArticles": 1, "articles": [
        {"title": "T", "url": "http://a/1", "publishedAt": "2026-05-20T18:30:00Z", "source": {"name": "P", "url": "u"}},
    ]}).encode()
    [found] = GNewsSource(SECRET)(ask("loo Bihar"))
    assert wire.asked == {"apikey": SECRET, "q": "loo Bihar", "lang": "en", "country": "in", "max": "10"}
    assert (found.title, found.source, found.date) == ("T", "P", "2026-05-21T00:00:00+05:30")


def test_an_item_without_a_url_is_no_article(wire: Wire) -> None:
    wire.answer = rss("<item><title>T</title></item>", ITEM)
    assert [found.url for found in GoogleNewsSource()(ask("loo Bihar"))] == ["http://a/1"]


def test_what_is_outside_the_period_is_dropped_and_what_has_no_date_is_kept(wire: Wire) -> None:
    wire.answer = rss(ITEM, "<item><title>T</title><link>http://a/2</link></item>")
    day_before = Period.parse_days("2026-05-20:2026-05-20")
    assert [found.url for found in GoogleNewsSource()(ask("loo Bihar", period=day_before))] == ["http://a/2"]


def test_the_period_goes_into_the_parameters_that_a_source_has_for_it(wire: Wire) -> None:
    now = datetime(2026, 5, 21, 12, 0, tzinfo=UTC)
    wire.answer = b'{"articles": [], "results": []}'
    GNewsSource(SECRET)(ask("loo Bihar", period=Period.parse_days("2026-05-20:2026-05-20")))
    assert (wire.asked["from"], wire.asked["to"]) == ("2026-05-19T18:30:00Z", "2026-05-20T18:30:00Z")
    NewsDataSource(SECRET)(ask("loo Bihar", period=Period.since(6 * 3600, now)))
    assert wire.asked["timeframe"] == "6"
    NewsDataSource(SECRET)(ask("loo Bihar", period=Period.since(60 * 3600, now)))
    assert "timeframe" not in wire.asked


BOMB = b'<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><rss>&b;</rss>'


@pytest.mark.parametrize(("body", "kind", "message"), [
    (b"", TransientError, "not well-formed XML"),
    (rss(ITEM)[:150], TransientError, "not well-formed XML"),
    (b"<!DOCTYPE html><html><body>consent<br></body></html>", TransientError, "HTML instead of articles"),
    (b"<html><body>consent<br></body></html>", TransientError, "HTML instead of articles"),
    (b"<html/>", TransientError, "HTML instead of articles"),
    (b"<feed/>", TransientError, "XML that is not RSS"),
    (b'<?xml version="1.0" encoding="x-none"?><rss/>', TransientError, "(unknown encoding|not well-formed)"),
    (BOMB, TaskError, "document type declaration"),
    (BOMB.decode().encode("utf-16"), TaskError, "document type declaration"),
])
def test_a_body_that_is_not_rss_is_a_failure_that_says_what_it_is(
    body: bytes, kind: type[Exception], message: str, wire: Wire
) -> None:
    wire.answer = body
    with pytest.raises(kind, match=f"google sent .*{message}") as caught:
        GoogleNewsSource()(ask("loo Bihar"))
    assert type(caught.value) is kind


@pytest.mark.parametrize(("body", "message"), [
    (b"", "malformed JSON"),
    (b'{"results": [', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b" <html></html>", "HTML instead of articles"),
    (b"[]", "JSON that is not an object"),
    (b'{"status": "error", "results": {"message": "m", "code": "c"}}', "JSON without a list of results"),
    (b'{"results": [5]}', "JSON without a list of results"),
])
def test_a_body_that_is_not_the_json_expected_is_a_failure(body: bytes, message: str, wire: Wire) -> None:
    wire.answer = body
    with pytest.raises(TransientError, match=f"newsdata sent {message}"):
        NewsDataSource(SECRET)(ask("loo Bihar"))


def test_a_pause_is_asked_for_in_the_sources_own_seconds(wire: Wire) -> None:
    wire.answer = RateLimitError("slow down", retry_after=900.0)
    with pytest.raises(RateLimitError) as caught:
        NewsDataSource(SECRET, speed=450.0)(ask("loo Bihar"))
    assert caught.value.retry_after == 2.0


def test_failures_are_told_to_whoever_wants_to_know(wire: Wire) -> None:
    heard: list[Any] = []
    wire.answer = TransientError("no")
    with pytest.raises(TransientError):
        GoogleNewsSource(on_failure=lambda *what: heard.append(what))(ask("loo Bihar"))
    assert heard == [("google", wire.answer)]


def test_a_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GNEWS_API_KEY", raising=False)
    with pytest.raises(ValueError, match="gnews needs an API key: give one, or set GNEWS_API_KEY"):
        GNewsSource()
    monkeypatch.setenv("GNEWS_API_KEY", SECRET)
    assert SECRET not in repr(GNewsSource())
    assert SECRET not in repr(create_gnews_scheduler())


@pytest.mark.parametrize(("name", "value"), [
    ("speed", 0.0), ("speed", float("nan")), ("speed", float("inf")), ("timeout", 0.0), ("base_url", "nowhere"),
])
def test_bad_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.replace("_url", " URL")):
        create_google_scheduler(**{name: value})


def test_schedulers_have_the_published_limits() -> None:
    google, newsdata, gnews = create_google_scheduler(), create_newsdata_scheduler("k"), create_gnews_scheduler("k")
    assert (google.name, google.limits, google.concurrency, google.budget) == (
        "google", (RateLimit(per_second=1.5),), 5, None)
    assert (newsdata.name, newsdata.limits, newsdata.concurrency, newsdata.budget) == (
        "newsdata", (RateLimit(per_second=10), Window(30, 900)), 1, 200)
    assert (gnews.name, gnews.limits, gnews.concurrency, gnews.budget) == (
        "gnews", (RateLimit(per_second=1),), 1, 100)


def test_speed_scales_limits_and_backoff_but_neither_timeout_nor_budget() -> None:
    fast, real = create_newsdata_scheduler("k", speed=10), create_newsdata_scheduler("k")
    assert fast.limits == (RateLimit(per_second=100), Window(30, 90))
    assert (fast.retry.backoff, fast.retry.max_retry_after) == (0.1, 90.0)
    assert (fast.timeout, fast.budget) == (real.timeout, real.budget)


def test_no_repr_shows_a_password() -> None:
    with pytest.raises(ValueError, match="without a query or a user") as caught:
        GNewsSource(SECRET, base_url=f"http://user:{SECRET}@news.example/")
    assert SECRET not in str(caught.value)
    assert repr(GNewsSource(SECRET, base_url="http://h/x")) == "GNewsSource('http://h/x')"


def test_gnews_speaks_eight_languages_the_others_all() -> None:
    asked = [ask("loo Bihar", language=language) for language in HEAT.languages]

    def spoken(source: Any) -> int:
        return sum(source.accepts(query) for query in asked)

    assert spoken(create_google_scheduler()) == spoken(create_newsdata_scheduler("k")) == 14
    assert spoken(create_gnews_scheduler("k")) == 8


def test_a_source_for_asyncio_is_the_same_but_for_being_awaited(wire: Wire) -> None:
    source = create_newsdata_scheduler("k", timeout=7.0)
    twin: Any = for_asyncio(source)
    assert {**vars(twin), "fetch": None} == {**vars(source), "fetch": None}
    wire.answer = b'{"results": [{"title": "Loo", "link": "http://a/1"}]}'
    asked = ask("loo Bihar")
    assert asyncio.run(twin.fetch(asked)) == list(source.fetch(asked)) != []


def test_what_was_used_of_the_limits_by_threads_is_used_for_asyncio_too(wire: Wire) -> None:
    wire.answer = b'{"results": []}'
    source = create_newsdata_scheduler("k", speed=10.0)     # so that filling the window takes no seconds
    plan, bihar, delhi = QueryGenerator(), get_region_by_slug("bihar"), get_region_by_slug("delhi")
    for _ in range(15):
        QueryExecutor([source], plan).run([bihar])      # two queries each time: the window is full
    stop = StopConditions(timeout=0.2)
    report = asyncio.run(AsyncQueryExecutor([for_asyncio(source)], plan, stop=stop).run([delhi]))
    assert (report.by_source["newsdata"].calls, report.stop_reason) == (0, "timeout")
