"""The server: its rule, its formats, its limits and its log."""

from __future__ import annotations

import io
import json
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlencode

import pytest
from news.support import Story, ask, lines_of, story
from shared import timely, undisturbed

from qengine import RateLimitError, TaskError
from qengine.news import GNewsSource, GoogleNewsSource, NewsDataSource, NewsServer
from qengine.news.formats import FORMATS
from qengine.news.server import TOLERANCE, Fault, FaultKind, PublishedLimits, Turnstile

Serve = Callable[..., NewsServer]
FAST = 1e6


def urls(server: NewsServer, query: str, language: str = "en") -> list[str]:
    return [found.url for found in GoogleNewsSource(base_url=server.url("google"))(ask(query, language=language))]


def raw(server: NewsServer, path: str, **parameters: str) -> tuple[int, Mapping[str, str], bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}?{urlencode(parameters)}") as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize(("query", "language", "found"), [
    ("loo Bihar", "en", ["http://a/bihar-en"]),
    ("loo Bihar", "hi", ["http://a/bihar-hi"]),
    ('loo ("Patna" OR "Gaya") Bihar', "en", ["http://a/patna"]),
    ('loo ("Patna" OR "Gaya") Bihar', "hi", ["http://a/gaya"]),
    ('"heat wave" Bihar', "en", ["http://a/bihar-en"]),
    ("loo Bihar when:24h", "en", ["http://a/bihar-en"]),
    ("loo Bihar after:2026-05-20 before:2026-05-22", "en", ["http://a/bihar-en"]),
    ('loo ("North Goa") Bihar', "en", ["http://a/bihar-en"]),
    ("loo Bihar hot", "en", []),
    ("loo NotBihar", "en", []),
    ("loo", "en", []),
])
def test_the_rule(query: str, language: str, found: list[str], stories: list[Story], serve: Serve) -> None:
    assert urls(serve(stories, speed=FAST), query, language) == found


def test_a_district_of_the_states_name_counts_only_when_named_in_addition(serve: Serve) -> None:
    both = story("http://a/state", "Chandigarh"), story("http://a/city", "Chandigarh", "Chandigarh")
    server = serve(both, speed=FAST)
    assert urls(server, "loo Chandigarh") == ["http://a/state"]
    assert urls(server, 'loo ("Chandigarh") Chandigarh') == ["http://a/city"]


@pytest.mark.parametrize("source", [GoogleNewsSource, NewsDataSource, GNewsSource])
def test_every_format_brings_an_article_through_unchanged(source: Any, serve: Serve) -> None:
    title = 'लू "का" <कहर> & more;\nसेकंड\tline \x00 🌡'
    there = story("https://news.example/a?b=1&c=ü%20", title=title, source="P & <Q>")
    server = serve([there, story("http://a/undated", date=None)], speed=FAST)
    key = {} if source is GoogleNewsSource else {"api_key": "k"}
    found, undated = source(base_url=server.url(source.name), **key)(ask("loo Bihar"))
    assert (found.url, found.source, found.date) == (there["url"], there["source"], there["date"])
    assert found.title == (title.replace("\x00", " ") if source is GoogleNewsSource else title)
    assert undated.date is None


def test_what_is_not_asked_properly_is_refused(serve: Serve) -> None:
    server = serve([])
    assert raw(server, "/nowhere")[0] == 404
    assert raw(server, "/rss/search")[0] == 400
    assert raw(server, "/api/1/latest", q="x")[0] == 401
    status, _, body = raw(server, "/api/v4/search", q="x")
    assert (status, list(json.loads(body))) == (401, ["errors"])


def test_a_client_without_limits_is_refused(serve: Serve) -> None:
    log = io.StringIO()
    server = serve([story("http://a/1")], speed=0.01, log=log)      # slower than any client is
    newsdata = NewsDataSource("k3y", base_url=server.url("newsdata"))
    pauses: list[float | None] = []
    for _ in range(20):
        try:
            newsdata(ask("loo Bihar"))
        except RateLimitError as error:
            pauses.append(error.retry_after)
    statuses = Counter(json.loads(line)["status"] for line in log.getvalue().splitlines())
    assert pauses == [1.0] * statuses[429]
    assert statuses[429] > 10
    assert statuses[200] + statuses[429] == 20
    assert "k3y" not in log.getvalue()


def test_above_the_daily_quota_it_says_403(serve: Serve) -> None:
    server = serve([], speed=FAST)
    gnews = GNewsSource("k", base_url=server.url("gnews"))
    for _ in range(100):
        gnews(ask("loo Bihar"))
    with pytest.raises(TaskError, match="gnews answered 403 Forbidden"):
        gnews(ask("loo Bihar"))


def test_the_rate_has_a_burst_of_one_and_a_tolerance_that_does_not_add_up() -> None:
    turnstile = Turnstile(PublishedLimits(per_second=10.0), speed=1.0)
    assert turnstile.wait(0.0) == 0.0
    assert turnstile.wait(0.01) == pytest.approx(0.09)
    assert turnstile.wait(0.06) == 0.0
    assert turnstile.wait(0.12) == pytest.approx(0.08)     # due at 0.2, however early the one before came
    assert turnstile.wait(0.16) == 0.0


def test_refused_requests_count_towards_nothing() -> None:
    turnstile = Turnstile(PublishedLimits(per_second=1.0, per_day=2), speed=1.0)
    assert [turnstile.wait(now) == 0.0 for now in (0.0, 0.1, 0.2, 1.0)] == [True, False, False, True]
    assert turnstile.wait(100.0) == float("inf")


def test_a_window_rolls() -> None:
    turnstile = Turnstile(PublishedLimits(per_second=1e9, window=(3, 900.0)), speed=100.0)
    assert [turnstile.wait(now) for now in (0.0, 1.0, 2.0)] == [0.0, 0.0, 0.0]
    assert turnstile.wait(8.9) == pytest.approx(0.1)
    assert turnstile.wait(9.0 - TOLERANCE / 2) == 0.0
    assert turnstile.wait(9.1) == pytest.approx(0.9)


def test_retry_after_is_in_the_sources_own_seconds(serve: Serve) -> None:
    slow, quick = serve([], speed=0.001), serve([], speed=10.0)
    assert raw(slow, FORMATS["google"].path, q="x Goa")[0] == 200
    status, headers, _ = raw(slow, FORMATS["google"].path, q="x Goa")
    assert (status, headers["Retry-After"]) == (429, "1")       # two thirds, which at this speed are 11 real minutes
    admitted = 0
    while admitted < 30:        # as many as newsdata's window of 15 minutes takes: of 90 real seconds at this speed
        admitted += raw(quick, FORMATS["newsdata"].path, q="x Goa", apikey="k")[0] == 200
    status, headers, _ = raw(quick, FORMATS["newsdata"].path, q="x Goa", apikey="k")
    assert status == 429
    assert 90 < int(headers["Retry-After"]) <= 900


def test_every_request_is_a_line_of_the_log(tmp_path: Path, stories: list[Story], serve: Serve) -> None:
    path = tmp_path / "server.jsonl"
    with path.open("w", encoding="utf-8") as log:
        server = serve(stories, speed=FAST, log=log)
        urls(server, "लू Bihar", "hi")
        NewsDataSource("k", base_url=server.url("newsdata"))(ask("loo Goa"))
        first, second = lines_of(path)      # on disk before the server is closed
    assert first.pop("time") <= second.pop("time")
    assert first == {"source": "google", "query": "लू Bihar", "language": "hi", "status": 200, "articles": 1}
    assert second == {"source": "newsdata", "query": "loo Goa", "language": "en", "status": 200, "articles": 0}


def test_a_port_in_use_is_refused(serve: Serve) -> None:
    port = serve([]).port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for number in (taken.getsockname()[1], port, 70000):
            with pytest.raises(ValueError, match=f"port {number} cannot be listened on"):
                NewsServer([], port=number)


@pytest.mark.parametrize("speed", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_speed_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match="speed"):
        NewsServer([], speed=speed)


@undisturbed
def test_close_ends_hanging_answers_at_once_and_may_come_twice() -> None:
    server = NewsServer([], faults={"google": Fault(FaultKind.HANG)})
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /rss/search?q=x+Goa HTTP/1.1\r\nHost: x\r\n\r\n")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        began = monotonic()
        server.close()
        server.close()
        with timely():
            assert monotonic() - began < 1.0


@pytest.mark.parametrize(("fault", "number", "attempt", "elapsed", "strikes"), [
    (Fault(), 0, 0, 0.0, False),
    (Fault(FaultKind.HANG), 9, 9, 9.0, True),
    (Fault(FaultKind.HANG, requests=3), 2, 2, 0.0, True),
    (Fault(FaultKind.HANG, requests=3), 3, 0, 0.0, False),
    (Fault(FaultKind.HANG, seconds=1.0), 3, 0, 0.5, True),
    (Fault(FaultKind.HANG, seconds=1.0), 3, 0, 1.5, False),
    (Fault(FaultKind.HANG, tries=1), 9, 0, 0.0, True),
    (Fault(FaultKind.HANG, tries=1), 9, 1, 0.0, False),
])
def test_a_fault_strikes_when_it_should(
    fault: Fault, number: int, attempt: int, elapsed: float, strikes: bool
) -> None:
    assert fault.strikes(number, attempt, elapsed) is strikes
