"""A news server on loopback that answers like the three real sources, from recorded or made-up articles.

Rules:

- real sockets and the three real formats, at the paths of the real services;
- a query that names a state and no district gets that state's articles in that language whose district is null; one
  that names districts gets the articles of those. The state's name closes the query; a district of the same name counts
  only when it is named in addition, in quotes;
- it enforces what the sources publish, on arrival: 429 with Retry-After above the rate or the window, 403 above the
  daily quota. Refused requests count towards nothing. `speed` makes all but the quota that many times faster, and
  Retry-After is in the source's own, unscaled seconds;
- `TOLERANCE` real seconds are forgiven: a request may arrive later than it was sent, so the next may seem too early;
- every request is a line in the log, in order of arrival, never with its key.
"""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TextIO
from urllib.parse import parse_qs, urlsplit

from ..errors import require_positive
from .formats import FORMATS, Article, Format
from .regions import StateUT, get_all_regions

__all__ = ["TOLERANCE", "Archive", "Fault", "FaultKind", "NewsServer", "PublishedLimits"]

TOLERANCE: Final = 0.050

_DATE_OPERATORS: Final = re.compile(r"(?:\s+(?:when|after|before):\S+)+\s*$")
_QUOTED: Final = re.compile(r'"([^"]*)"')
_STATES: Final = sorted(get_all_regions(), key=lambda state: len(state.name), reverse=True)
_LONG_BODY: Final = 200 * 2**20
_BOMB: Final = b"""<?xml version="1.0"?>
<!DOCTYPE rss [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>
<rss><channel><item><title>&c;</title><link>http://127.0.0.1/</link></item></channel></rss>"""


class FaultKind(Enum):
    """What may be wrong with a source."""

    UNAVAILABLE = "503"
    HANG = "accepts and never answers"
    DRIP = "one byte a second"
    TRUNCATED = "half of the body"
    HTML = "HTML instead of articles"
    BOMB = "XML that expands without end"
    FLOOD = "200 MB of body"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a source, and for how long.

    Args:
        kind: What happens instead of an answer; None for nothing.
        requests: For that many requests only; None for all.
        tries: Only for so many requests of the same query; None for all.
        seconds: For that long after the source's first request only; None for ever.
        latency: Seconds that pass before any answer of the source.
    """

    kind: FaultKind | None = None
    requests: int | None = None
    tries: int | None = None
    seconds: float | None = None
    latency: float = 0.0

    def strikes(self, number: int, attempt: int, elapsed: float) -> bool:
        """Whether it hits a request.

        Args:
            number: Requests admitted before it.
            attempt: Those of them with the same query.
            elapsed: Seconds since the source's first request.
        """
        return (
            self.kind is not None
            and (self.requests is None or number < self.requests)
            and (self.seconds is None or elapsed < self.seconds)
            and (self.tries is None or attempt < self.tries)
        )


@dataclass(frozen=True, slots=True)
class PublishedLimits:
    """What a source allows: calls a second with a burst of one, calls in any window of seconds, calls a day."""

    per_second: float
    window: tuple[int, float] | None = None
    per_day: int | None = None


_LIMITS: Final[Mapping[str, PublishedLimits]] = {
    "google": PublishedLimits(1.5),
    "newsdata": PublishedLimits(10.0, window=(30, 900.0), per_day=200),
    "gnews": PublishedLimits(1.0, per_day=100),
}


@dataclass(slots=True)
class Turnstile:
    """Tells whether a request that arrives now is within a source's limits. Not thread-safe."""

    limits: PublishedLimits
    speed: float
    next_at: float = -math.inf
    arrivals: deque[float] = field(default_factory=deque)
    today: int = 0

    def wait(self, now: float) -> float:
        """Real seconds until this request would be admitted, 0.0 where it is admitted now; inf: not today."""
        if self.limits.per_day is not None and self.today >= self.limits.per_day:
            return math.inf
        wait = max(self.next_at, self._window_opens(now)) - now
        if wait > TOLERANCE:
            return wait
        self._admit(now)
        return 0.0

    def _window_opens(self, now: float) -> float:
        if self.limits.window is None or len(self.arrivals) < self.limits.window[0]:
            return now
        return self.arrivals[0] + self.limits.window[1] / self.speed

    def _admit(self, now: float) -> None:
        # The schedule advances from where it stood, not from now, so that tolerance never adds up to a higher rate.
        self.next_at = max(self.next_at, now) + 1 / (self.limits.per_second * self.speed)
        self.today += 1
        if self.limits.window is not None:
            self.arrivals.append(now)
            if len(self.arrivals) > self.limits.window[0]:
                self.arrivals.popleft()


class Archive:
    """Articles, and which of them answer a query: what a server serves from, and what a prediction goes by. Immutable.

    Args:
        articles: What there is to find: objects like the lines of a recorded day.
    """

    def __init__(self, articles: Iterable[Article]) -> None:
        self._index: dict[tuple[str, str | None, str], list[Article]] = defaultdict(list)
        for article in articles:
            self._index[article["state"], article.get("district"), article.get("language", "en")].append(article)

    def find(self, query: str, language: str) -> list[Article]:
        """The articles for a query in a language, by the rule at the top of this module."""
        state = _closing_state(_DATE_OPERATORS.sub("", query))
        if state is None:
            return []
        names = {district.name for district in state.districts}
        districts = dict.fromkeys(phrase for phrase in _QUOTED.findall(query) if phrase in names)
        keys = list(districts) if districts else [None]
        return [article for key in keys for article in self._index.get((state.name, key, language), ())]


class NewsServer:
    """A server for the three sources on 127.0.0.1, serving from the moment it is made until `close()`.

    Thread-safe. A context manager that closes itself.

    Args:
        articles: What there is to find: objects like the lines of a recorded day.
        speed: How many times faster than the real sources it counts time.
        port: Where to listen; 0 for any free port.
        log: A text file that gets a line of JSON for each request, or None.
        faults: What is wrong with which source.

    Raises:
        ValueError: the port is in use or not allowed.
    """

    def __init__(
        self,
        articles: Iterable[Article],
        *,
        speed: float = 1.0,
        port: int = 0,
        log: TextIO | None = None,
        faults: Mapping[str, Fault] | None = None,
    ) -> None:
        require_positive("speed", speed)
        self._desk = _Desk(articles, speed, log, faults or {})
        try:
            self._server = _Server(("127.0.0.1", port), self._desk)
        except (OSError, OverflowError) as error:
            raise ValueError(f"port {port} cannot be listened on: {error}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="qengine-news-server", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def url(self, source: str) -> str:
        """The base URL of a source on this server."""
        return f"http://127.0.0.1:{self.port}{FORMATS[source].path}"

    def close(self) -> None:
        """Stop serving, end what is being answered, free the port. May be called twice."""
        self._desk.closing.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _Request:
    """A request as it was understood."""

    source: str
    query: str
    language: str
    number: int
    attempt: int
    elapsed: float


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the turnstile says to a request: 200, or a refusal and the seconds after which it may come again."""

    status: int
    retry_after: float = 0.0


class _Desk:
    """What all connections share: the articles, the turnstiles and the log."""

    def __init__(
        self, articles: Iterable[Article], speed: float, log: TextIO | None, faults: Mapping[str, Fault]
    ) -> None:
        self.closing = threading.Event()
        self.faults = faults
        self.archive = Archive(articles)
        self._speed, self._log = speed, log
        self._turnstiles = {name: Turnstile(limits, speed) for name, limits in _LIMITS.items()}
        self._first_at: dict[str, float] = {}
        self._admitted: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._lock = threading.Lock()
        self._epoch = time.time() - time.monotonic()  # stamps look like clock time and never jump

    def admit(self, source: str, query: str, language: str, found: int) -> tuple[_Verdict, _Request]:
        """Pass a request through its source's turnstile and write it into the log, both at the same instant."""
        with self._lock:
            now = time.monotonic()
            wait = self._turnstiles[source].wait(now)
            verdict = self._verdict(wait)
            elapsed = now - self._first_at.setdefault(source, now)
            admitted = self._admitted[source]
            request = _Request(source, query, language, admitted.total(), admitted[query, language], elapsed)
            if verdict.status == 200:
                admitted[query, language] += 1
                if self.fault(request) is FaultKind.UNAVAILABLE:
                    verdict = _Verdict(503)
            self._write(now, request, verdict.status, found if verdict.status == 200 else 0)
        return verdict, request

    def fault(self, request: _Request) -> FaultKind | None:
        """What goes wrong with this request."""
        fault = self.faults.get(request.source)
        if fault is None or not fault.strikes(request.number, request.attempt, request.elapsed):
            return None
        return fault.kind

    def latency(self, source: str) -> float:
        """Seconds to wait before an answer of that source."""
        return self.faults[source].latency if source in self.faults else 0.0

    def _verdict(self, wait: float) -> _Verdict:
        if wait == 0.0:
            return _Verdict(200)
        return _Verdict(403) if math.isinf(wait) else _Verdict(429, wait * self._speed)

    def _write(self, now: float, request: _Request, status: int, found: int) -> None:
        if self._log is None:
            return
        line = {
            "time": round(now + self._epoch, 6),
            "source": request.source,
            "query": request.query,
            "language": request.language,
            "status": status,
            "articles": found,
        }
        self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._log.flush()


def _closing_state(text: str) -> StateUT | None:
    """The state whose name closes the text; of several the longest."""
    ends = text.rstrip()
    return next((s for s in _STATES if ends.endswith(s.name) and not ends[: -len(s.name)][-1:].isalnum()), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], desk: _Desk) -> None:
        self.desk = desk
        self._connections: dict[socket.socket, threading.Thread] = {}
        super().__init__(address, _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._connections[request] = threading.current_thread()
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is no error of the server's."""

    def hang_up(self) -> None:
        """End every connection and wait for its thread, which the closed socket wakes."""
        connections = list(self._connections.items())
        for connection, _ in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it went away by itself
                pass
        for _, thread in connections:
            thread.join(1.0)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, asks the desk, answers in the source's format."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60.0
    server: _Server

    formats: ClassVar[Mapping[str, Format]] = {form.path: form for form in FORMATS.values()}

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        form = self.formats.get(url.path)
        given = {name: values[0] for name, values in parse_qs(url.query).items()}
        if form is None:
            self._send(404, "text/plain", b"no such source\n")
        elif form.key_name and not given.get(form.key_name):
            self._send(401, form.content_type, form.error(401))
        elif not given.get("q"):
            self._send(400, form.content_type, form.error(400))
        else:
            self._answer(form, given["q"], given.get(form.language_name, "en").split("-")[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log is the desk's, and a request line may hold a key."""

    def _answer(self, form: Format, query: str, language: str) -> None:
        desk = self.server.desk
        found = desk.archive.find(query, language)
        verdict, request = desk.admit(form.source, query, language, len(found))
        if latency := desk.latency(form.source):
            desk.closing.wait(latency)
        if verdict.status != 200:
            self._send(verdict.status, form.content_type, form.error(verdict.status), verdict.retry_after)
        elif fault := desk.fault(request):
            self._misbehave(fault, form, form.body(found, language))
        else:
            self._send(200, form.content_type, form.body(found, language))

    def _misbehave(self, fault: FaultKind, form: Format, body: bytes) -> None:
        self.close_connection = True
        match fault:
            case FaultKind.HANG:
                self.server.desk.closing.wait()
            case FaultKind.DRIP:
                self._drip(form, body)
            case FaultKind.TRUNCATED:
                self._head(200, form.content_type, len(body))
                self.wfile.write(body[: len(body) // 2])
            case FaultKind.HTML:
                self._send(200, "text/html", b"<!DOCTYPE html><html><body>Before you continue</body></html>")
            case FaultKind.BOMB:
                self._send(200, "application/xml", _BOMB)
            case FaultKind.FLOOD:
                self._flood(form)

    def _drip(self, form: Format, body: bytes) -> None:
        self._head(200, form.content_type, len(body))
        for byte in body:
            self.wfile.write(bytes((byte,)))
            if self.server.desk.closing.wait(1.0):
                return

    def _flood(self, form: Format) -> None:
        self._head(200, form.content_type, None)
        chunk = b" " * 2**16
        for _ in range(_LONG_BODY // len(chunk)):
            self.wfile.write(chunk)

    def _send(self, status: int, content_type: str, body: bytes, retry_after: float = 0.0) -> None:
        self._head(status, content_type, len(body), retry_after)
        self.wfile.write(body)

    def _head(self, status: int, content_type: str, length: int | None, retry_after: float = 0.0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        if retry_after:
            self.send_header("Retry-After", str(max(1, math.ceil(retry_after))))
        self.end_headers()
