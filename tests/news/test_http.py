"""One GET: what it brings, what each failure is called, and that it ends in time, in size and without a secret."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from time import monotonic, sleep

import pytest
from shared import PATIENCE, timely, undisturbed

from qengine import RateLimitError, TaskError, TaskTimeoutError, TransientError
from qengine.news import http as news_http
from qengine.news.http import MAX_BODY, check_base_url, get, is_loopback

SECRET = "s3cr3t"
Script = Callable[[socket.socket], None]


@contextmanager
def scripted(*scripts: Script) -> Iterator[str]:
    """A server that plays one script for each connection, after having read the request; its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def play() -> None:
        for script in scripts:
            try:
                with listener.accept()[0] as connection:
                    requests.append(connection.recv(65536))
                    script(connection)
            except OSError:
                pass    # the client went away, which some of these tests are about

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/path"
    finally:
        thread.join(PATIENCE)
        listener.close()


def says(text: str, body: bytes = b"") -> Script:
    return lambda connection: connection.sendall(text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)


def fetch(url: str, timeout: float = PATIENCE) -> bytes:
    return get("them", url, {"q": "a b", "apikey": SECRET}, timeout=timeout)


def failure(*scripts: Script, timeout: float = PATIENCE) -> Exception:
    with scripted(*scripts) as url:
        with pytest.raises((TaskError, TaskTimeoutError)) as caught:
            fetch(url, timeout)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert SECRET not in shown
    return caught.value


def test_a_body_by_length_by_chunks_and_by_the_end() -> None:
    for script in (
        says("HTTP/1.1 200 OK\nContent-Length: 5", b"hello"),
        says("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        says("HTTP/1.0 200 OK", b"hello"),
    ):
        with scripted(script) as url:
            assert fetch(url) == b"hello"


@pytest.mark.parametrize(("status", "kind"), [
    (400, TaskError), (403, TaskError), (404, TaskError), (500, TransientError), (503, TransientError),
])
def test_a_status_is_named(status: int, kind: type[Exception]) -> None:
    error = failure(says(f"HTTP/1.1 {status} X\nContent-Length: 0"))
    assert type(error) is kind
    assert str(error).startswith(f"them answered {status} ")


@pytest.mark.parametrize(("header", "seconds"), [
    ("Retry-After: 7", 7.0), ("Retry-After: 0", 0.0), ("Retry-After: -3", 0.0), ("Retry-After: soon", None),
    ("Retry-After: inf", None), ("X: y", None),
])
def test_429_is_a_rate_limit_with_its_pause(header: str, seconds: float | None) -> None:
    error = failure(says(f"HTTP/1.1 429 X\nContent-Length: 0\n{header}"))
    assert isinstance(error, RateLimitError)
    assert error.retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    error = failure(says(f"HTTP/1.1 429 X\nContent-Length: 0\nRetry-After: {until}"))
    assert isinstance(error, RateLimitError)
    assert error.retry_after is not None and 50 < error.retry_after <= 60


@pytest.mark.parametrize(("script", "message"), [
    (says("HTTP/1.1 200 OK\nContent-Length: 9", b"half"), "truncated"),
    (says("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"9\r\nhalf"), "truncated"),
    (says("this is not HTTP"), "not HTTP"),
    (lambda connection: None, "(cannot be reached|not HTTP)"),
], ids=["length", "chunks", "noise", "nothing"])
def test_what_a_retry_may_mend_is_transient(script: Script, message: str) -> None:
    error = failure(script)
    assert type(error) is TransientError
    with pytest.raises(TransientError, match=message):
        raise error


def test_only_who_speaks_https_waits_for_the_certificates() -> None:
    news_http._tls.cache_clear()
    with scripted(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as url:
        assert fetch(url) == b"ok"
    assert news_http._tls.cache_info().currsize == 0
    with scripted(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as url:
        with pytest.raises(TransientError, match="them cannot be reached: "):
            fetch(url.replace("http://", "https://"))      # what listens there speaks no TLS
    assert news_http._tls.cache_info().currsize == 1


def test_nobody_listening_is_transient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransientError, match="them cannot be reached: Connection refused"):
        fetch(f"http://127.0.0.1:{port}/path")


def drip(head: bytes) -> Script:
    def script(connection: socket.socket) -> None:
        connection.sendall(head)
        until = monotonic() + 3
        while monotonic() < until:
            connection.sendall(b"x")
            sleep(0.02)

    return script


@pytest.mark.parametrize("script", [
    lambda connection: connection.recv(1),
    drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    drip(b"HTTP/1.1 200 OK\r\nX-Endless: "),
], ids=["silence", "body drips", "head drips"])
@undisturbed
def test_the_deadline_is_for_the_whole_answer(script: Script) -> None:
    began = monotonic()
    assert type(failure(script, timeout=0.3)) is TaskTimeoutError
    with timely():
        assert monotonic() - began < 2.0


@undisturbed
def test_a_byte_just_before_the_deadline_does_not_put_it_off() -> None:
    def script(connection: socket.socket) -> None:
        sleep(0.5)
        connection.sendall(b"H")
        connection.recv(1)      # until the client goes

    began = monotonic()
    assert type(failure(script, timeout=0.6)) is TaskTimeoutError
    with timely():
        assert monotonic() - began < 1.0


def flood(head: bytes) -> Script:
    def script(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(4 * MAX_BODY // 65536):
            connection.sendall(b" " * 65536)

    return script


@pytest.mark.parametrize("head", [
    b"HTTP/1.0 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 200000000\r\n\r\n",
], ids=["endless", "announced", "in a redirect"])
def test_a_body_that_is_too_large_is_given_up(head: bytes) -> None:
    error = failure(flood(head), timeout=60)
    assert type(error) is TaskError
    assert "more than 10485760 bytes" in str(error)


def test_a_redirect_is_followed_to_http_only() -> None:
    with scripted(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as target:
        with scripted(says(f"HTTP/1.1 302 Found\nLocation: {target}\nContent-Length: 0")) as url:
            assert fetch(url) == b"ok"
    for target in ("ftp://127.0.0.1/x", "file:///etc/passwd"):
        error = failure(says(f"HTTP/1.1 302 Found\nLocation: {target}\nContent-Length: 0"))
        assert type(error) is TaskError


def test_loopback_is_never_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with scripted(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as url:
        assert fetch(url) == b"ok"


def test_other_hosts_are_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with scripted(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/path"))
        assert fetch("http://news.example/path") == b"ok"


@pytest.mark.parametrize(("url", "local"), [
    ("http://127.0.0.1:80/x", True), ("http://127.8.8.8/x", True), ("http://[::1]:1/", True),
    ("http://localhost/", True),
    ("http://128.0.0.1/", False), ("https://news.example/", False), ("http://localhost.example/", False), ("", False),
])
def test_loopback(url: str, local: bool) -> None:
    assert is_loopback(url) is local


@pytest.mark.parametrize("url", [
    "", "127.0.0.1:80", "ftp://a/b", "http://", "http:///x", "http://a/b?q=1", "http://a/b#c", "http://a:x/",
    "http://a b/", "http://a:99999/", "http://a/\n", "http://ä/", "http://user:pw@a/",
])
def test_a_base_url_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base URL must be like"):
        check_base_url(url)


@pytest.mark.parametrize("url", [f"http://a/?apikey={SECRET}", f"http://user:{SECRET}@a/", f"http://a/#{SECRET}"])
def test_a_base_url_that_may_hold_a_secret_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match="without a query or a user") as caught:
        check_base_url(url)
    assert SECRET not in str(caught.value)
