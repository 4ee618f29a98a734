"""One GET over HTTP that cannot hang, cannot flood and cannot tell a secret.

Rules:

- the deadline is for the whole answer: every read gets what is left of it, so a drip of bytes does not outlive it;
- an answer is at most `MAX_BODY` bytes, and no compression is asked for, so what is received is what is held;
- the loopback interface is never reached through a proxy, and only http and https are spoken, redirects included;
- an error says who answered what, never with which URL: an API key may be part of that;
- failures are told apart by what helps: TransientError where another try may, RateLimitError where waiting does,
  TaskError where nothing will.
"""

from __future__ import annotations

import email.message
import http.client
import io
import ipaddress
import math
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import IO, Any, Final, NoReturn
from urllib.parse import urlencode, urlsplit

from ..errors import RateLimitError, TaskError, TaskTimeoutError, TransientError

__all__ = ["MAX_BODY", "check_base_url", "get", "is_loopback", "may_hold_secret", "timed_out"]

MAX_BODY: Final = 10 * 2**20
_MAX_HEAD: Final = 2**18
_HEADERS: Final = {"User-Agent": "qengine-news/1", "Accept-Encoding": "identity"}
_SCHEMES: Final = ("http", "https")


def get(name: str, base_url: str, parameters: Mapping[str, str], *, timeout: float) -> bytes:
    """The body of the answer to a GET.

    Args:
        name: Who is asked, for the error messages.
        base_url: Where, without a query.
        parameters: The query.
        timeout: Seconds for all of it, from the look-up of the name to the last byte.

    Raises:
        RateLimitError: 429, with the seconds of its Retry-After.
        TransientError: 5xx, a refused or broken connection, a body cut short.
        TaskTimeoutError: no whole answer in time.
        TaskError: any other status, a body that is too large, a redirect to another scheme.
    """
    deadline = time.monotonic() + timeout
    request = urllib.request.Request(f"{base_url}?{urlencode(parameters)}", headers=_HEADERS)
    failure: Exception
    try:
        return _answer(name, request, deadline)
    except TaskError:
        raise
    except urllib.error.URLError as error:
        reason = error.reason
        failure = timed_out(name) if isinstance(reason, TimeoutError) else _unreachable(name, reason)
    except TimeoutError:
        failure = timed_out(name)
    except OSError as error:
        failure = _unreachable(name, error)
    except http.client.IncompleteRead:
        failure = _truncated(name)
    except http.client.HTTPException as error:  # its text may quote the URL
        failure = TransientError(f"{name} gave an answer that is not HTTP ({type(error).__name__})")
    raise failure  # outside the except clause: no chained error that could hold the URL


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine's loopback interface."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_base_url(url: str) -> str:
    """The URL, if a query can be put to it.

    Raises:
        ValueError: it is not an http or https URL with a host, or has a query, a fragment, a user or blanks; the
            message does not show a URL that may hold a secret.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or may_hold_secret(url) or not url.isascii() or not url.isprintable() or " " in url:
        shown = "" if may_hold_secret(url) else f", not {url!r}"
        raise ValueError(f"base URL must be like http://127.0.0.1:8000/rss/search, without a query or a user{shown}")
    return url


def may_hold_secret(url: str) -> bool:
    """Whether there is more to a URL than where something is: a query, a fragment, a user with a password."""
    return not {"?", "#", "@"}.isdisjoint(url)


def _answer(name: str, request: urllib.request.Request, deadline: float) -> bytes:
    try:
        response = _opener(name, deadline).open(request, timeout=max(deadline - time.monotonic(), 0.001))
    except urllib.error.HTTPError as error:
        with error:
            status, headers = error.code, error.headers
    else:
        with response:
            return _body(name, response)
    _refuse(name, status, headers)


def _body(name: str, response: http.client.HTTPResponse) -> bytes:
    if (response.length or 0) > MAX_BODY:
        raise _too_large(name)
    return response.read()


def _refuse(name: str, status: int, headers: email.message.Message) -> NoReturn:
    said = f"{name} answered {status} {http.client.responses.get(status, '')}".rstrip()
    if status == http.client.TOO_MANY_REQUESTS:
        raise RateLimitError(said, retry_after=_seconds(headers.get("Retry-After")))
    raise TransientError(said) if status >= 500 else TaskError(said)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds in a Retry-After header: a number, or an HTTP date to be counted from now (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def timed_out(name: str) -> TaskTimeoutError:
    return TaskTimeoutError(f"{name} gave no whole answer in time")


def _unreachable(name: str, reason: object) -> TransientError:
    detail = reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "no connection"
    return TransientError(f"{name} cannot be reached: {detail}")


def _truncated(name: str) -> TransientError:
    return TransientError(f"{name} sent a truncated body")


def _too_large(name: str) -> TaskError:
    return TaskError(f"{name} sent a body of more than {MAX_BODY} bytes")


def _opener(name: str, deadline: float) -> urllib.request.OpenerDirector:
    """An opener that speaks http and https only: the stock one would follow a redirect to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Proxies(),
        _Http(name, deadline),
        _Https(name, deadline),
        _Redirects(name),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Proxies(urllib.request.ProxyHandler):
    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        return None if is_loopback(req.full_url) else super().proxy_open(req, proxy, type)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, name: str) -> None:
        self._name = name

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in _SCHEMES:
            raise TaskError(f"{self._name} redirects to something other than http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except urllib.error.HTTPError:  # it holds the connection, and is an answer of its own
            raise
        except Exception:
            fp.close()  # urllib would leave it open
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Http(urllib.request.HTTPHandler):
    def __init__(self, name: str, deadline: float) -> None:
        super().__init__()
        self._connect = partial(_connection, http.client.HTTPConnection, name, deadline)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)


class _Https(urllib.request.AbstractHTTPHandler):
    """As urllib's own, which would load the certificates also where it is only asked for http."""

    def __init__(self, name: str, deadline: float) -> None:
        super().__init__()
        self._connect = partial(_connection, http.client.HTTPSConnection, name, deadline)

    def https_request(self, req: urllib.request.Request) -> urllib.request.Request:
        return self.do_request_(req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req, context=_tls())


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Made once: loading the certificates takes longer than many a call."""
    return ssl.create_default_context()


def _connection(
    make: type[http.client.HTTPConnection], name: str, deadline: float, host: str, **options: Any
) -> http.client.HTTPConnection:
    connection = make(host, **options)
    connection.response_class = partial(_Response, name=name, deadline=deadline)  # type: ignore[assignment]
    return connection


class _Response(http.client.HTTPResponse):
    """A response whose reads, headers included, end at the deadline and at the size that is allowed."""

    def __init__(self, sock: socket.socket, *args: Any, name: str, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp: io.BufferedReader = io.BufferedReader(_Bounded(self.fp, sock, name, deadline))


class _Bounded(io.RawIOBase):
    """What a socket's file gives: each wait for it cut at the deadline, and never more of it than allowed.

    The bound is here, not where the body is read, because urllib reads the body of a redirect whole by itself.
    """

    def __init__(self, file: io.BufferedReader, sock: socket.socket, name: str, deadline: float) -> None:
        self._file, self._sock, self._name, self._deadline = file, sock, name, deadline
        self._allowed = MAX_BODY + _MAX_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._sock.settimeout(remaining)
        count = self._file.readinto1(buffer)
        self._allowed -= count
        if self._allowed < 0:
            raise _too_large(self._name)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
