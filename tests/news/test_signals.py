"""Ctrl-C and SIGTERM in the middle of a run: out within a second, and nothing of what was received is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp

import pytest
from news.support import ROOT, WORLDS, Story, command, environment, lines_of, pairs
from shared import timely, undisturbed, undisturbed_as_a_whole

from qengine import CancellationToken
from qengine.news import NewsServer
from qengine.news.collect import cancelled_by_signals
from qengine.news.dates import INDIA
from qengine.news.demo import demo_articles
from qengine.news.server import Fault, FaultKind

pytestmark = pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")

Serve = Callable[..., NewsServer]

SETTLED = 0.1       # seconds after which an answer, on loopback, has been received


@contextmanager
def collecting(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until, "the run brings nothing"
        time.sleep(0.01)


def answered(log: Path, before: float) -> set[tuple[str, str]]:
    """What the server had answered by then to queries about whole states, by its log and its stories."""
    stories = [story for story in demo_articles(datetime.now(INDIA).date()) if story["district"] is None]
    asked = {
        (line["query"].rpartition(") ")[2], line["language"])
        for line in lines_of(log)
        if line["status"] == 200 and line["time"] < before and ") (" not in line["query"]
    }
    return {(story["state"], story["url"]) for story in stories if (story["state"], story["language"]) in asked}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@undisturbed_as_a_whole
def test_a_signal_ends_it_within_a_second_and_loses_nothing(
    number: signal.Signals, code: int, world: str, tmp_path: Path
) -> None:
    tmp_path = Path(mkdtemp(dir=tmp_path))
    out, log, report = tmp_path / "out.jsonl", tmp_path / "server.jsonl", tmp_path / "run.json"
    files = ("--out", out, "--server-log", log, "--report", report)
    with collecting("--demo", "--speed", 40, world, *files) as process:
        wait_for_lines(out, 60)
        sent_at, began = time.time(), time.monotonic()
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
        assert time.monotonic() - began < 1.0
    assert process.returncode == code, shown
    assert f"stopped          {number.name}" in shown
    assert pairs(out) >= answered(log, sent_at - SETTLED) != set()
    summary = json.loads(report.read_text(encoding="utf-8"))
    assert (summary["stop_reason"], summary["exit_code"], summary["articles"]) == (number.name, code, len(pairs(out)))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("signals", [1, 2])
@undisturbed
def test_it_ends_as_fast_while_a_source_hangs(
    signals: int, world: str, tmp_path: Path, stories: list[Story], serve: Serve
) -> None:
    server = serve(stories, speed=100, faults={"google": Fault(FaultKind.HANG)})
    urls = [f"--base-url={name}={server.url(name)}" for name in ("google", "newsdata")]
    out = Path(mkdtemp(dir=tmp_path)) / "out.jsonl"
    with collecting(*urls, "--sources", "google,newsdata", "--speed", 100, world, "--out", out) as process:
        wait_for_lines(out, 1)
        began = time.monotonic()
        for _ in range(signals):        # the second may come while what runs has its moment to be answered
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, shown = process.communicate(timeout=60)
        with timely():
            assert time.monotonic() - began < 1.0
    assert process.returncode == 130
    assert "Traceback" not in shown and "Exception" not in shown
    assert pairs(out)


def test_the_first_signal_cancels_the_second_ctrl_c_interrupts_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    token = CancellationToken()
    with cancelled_by_signals(token):
        signal.raise_signal(signal.SIGTERM)
        assert token.reason == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)     # says nothing new
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with cancelled_by_signals(CancellationToken()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
