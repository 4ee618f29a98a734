"""What every test is held to, and what tests share.

A test cleans up after itself: `leaves_nothing_behind` fails one that leaves a thread running, an asyncio task pending,
a file descriptor open, a timer pending or a signal handler in place. One whose subject is a hung call says so, by
`@pytest.mark.abandons("why")`: its daemon threads, and the descriptors they hold, may stay.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from shared import Late

ROOT = Path(__file__).resolve().parent.parent
FD_FOLDER = Path("/proc/self/fd")
UNDER_COVERAGE = "coverage" in sys.modules
GRACE = 5.0         # seconds in which a thread that is already on its way out may end
TIMERS = ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")
SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM")


def open_descriptors() -> dict[int, str]:
    """Each open file descriptor and what it is; nothing on a system that does not tell."""
    found: dict[int, str] = {}
    try:
        numbers = os.listdir(FD_FOLDER)
    except OSError:
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(FD_FOLDER / number)
        except OSError:
            continue        # the one that listed the folder, or one closed meanwhile
    return found


def pending_timers() -> dict[str, float]:
    """Seconds until each of the process's timers fires, for those that are set."""
    left = {name: signal.getitimer(getattr(signal, name))[0] for name in TIMERS if hasattr(signal, name)}
    return {name: seconds for name, seconds in left.items() if seconds > 0}


def signal_handlers() -> dict[str, object]:
    return {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}


def still_running(threads: list[threading.Thread]) -> list[threading.Thread]:
    """Those of them that do not end within the grace they share."""
    until = monotonic() + GRACE
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - monotonic()))
    return [thread for thread in threads if thread.is_alive()]


def pending_tasks() -> list[Any]:
    """The asyncio tasks of all loops that are not done, where asyncio keeps a list of them that can be seen.

    But for those of which asyncio itself would say nothing: a test that closes a loop under a task takes care of it.
    """
    tasks = sys.modules.get("asyncio.tasks")
    books = ("_all_tasks", "_scheduled_tasks", "_eager_tasks")      # 3.11; 3.12 and later
    known = {task for name in books for task in list(getattr(tasks, name, ()))}
    return [task for task in known if not task.done() and getattr(task, "_log_destroy_pending", True)]


class Leftovers:
    """What there was before a test, and what of it is new after."""

    def __init__(self) -> None:
        self.tasks = set(pending_tasks())
        self.threads = set(threading.enumerate())
        self.descriptors = open_descriptors()
        self.timers = pending_timers()
        self.handlers = signal_handlers()

    def new_threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in self.threads]

    def new_descriptors(self) -> dict[int, str]:
        return {fd: what for fd, what in open_descriptors().items() if self.descriptors.get(fd) != what}

    def found(self, abandons: bool = False) -> list[str]:
        """Each thing left behind, in words; ends what would hit the next test."""
        # Before the garbage is collected: one that nobody holds would be gone then, and only the log would tell.
        tasks = [f"a task: {task!r}" for task in pending_tasks() if task not in self.tasks]
        if self.new_threads() or self.new_descriptors():
            gc.collect()        # what only a cycle keeps open is closed at its own time, not left behind
        # An abandoned thread hangs, that is the point: there is no use in waiting for it.
        threads = self.new_threads()
        left = still_running([thread for thread in threads if not (abandons and thread.daemon)])
        words = tasks + [f"a thread: {thread.name}{' (daemon)' if thread.daemon else ''}" for thread in left]
        if not abandons:
            words += [f"a file descriptor: {fd} -> {what}" for fd, what in sorted(self.new_descriptors().items())]
        for name in pending_timers().keys() - self.timers.keys():
            signal.setitimer(getattr(signal, name), 0)
            words.append(f"a timer: {name}")
        for name, handler in signal_handlers().items():
            if handler != self.handlers[name]:
                signal.signal(getattr(signal, name), self.handlers[name])       # type: ignore[arg-type]
                words.append(f"a signal handler: {name} -> {handler!r}")
        return words


def pytest_collection_finish() -> None:
    """Have no later garbage collection go through all that the tests themselves are made of."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a thread, a task, a file descriptor, a timer or a signal handler behind."""
    marker = request.node.get_closest_marker("abandons")
    if marker is not None and not (marker.args or marker.kwargs.get("reason")):
        pytest.fail("the marker `abandons` needs the reason: @pytest.mark.abandons('why')", pytrace=False)
    before = Leftovers()
    yield
    words = before.found(abandons=marker is not None)
    if words:
        pytest.fail("the test left behind " + "; ".join(words), pytrace=False)


@pytest.fixture
def quietly(caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    """`quietly(coroutine)`: as asyncio.run, and asyncio says nothing of it, neither then nor when it is garbage."""
    import asyncio

    def run(main: Coroutine[Any, Any, Any], *, debug: bool = False, left: int = 0) -> Any:
        told: list[dict[str, Any]] = []

        async def watched() -> Any:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
            try:
                return await main
            finally:
                others = asyncio.all_tasks() - {asyncio.current_task()}     # type: ignore[arg-type]
                assert len(others) == left or isinstance(sys.exception(), Late), others

        try:
            return asyncio.run(watched(), debug=debug)
        finally:
            gc.collect()
            assert told == []
            said = [record for record in caplog.records if record.name == "asyncio" and record.levelno > logging.INFO]
            assert [record.message for record in said] == []

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what would hang under coverage, or tells it nothing; each such test runs where there is none.

    A lock of coverage's stays held if it is interrupted, or forked, in it; a process of its own is not measured.
    """
    if UNDER_COVERAGE:
        for item in items:
            if marker := item.get_closest_marker("not_under_coverage"):
                reason = marker.args[0] if marker.args else "a lock of coverage's does not survive it"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def stress_count() -> Callable[[int], int]:
    """`stress_count(small)`: how many rounds a test marked `stress` makes: QENGINE_STRESS, or `small` without it.

    In CI, where several Pythons make them, it is a quarter of `small`; under coverage, where each takes three times as
    long and the same lines are passed, an eighth.
    """

    def count(small: int) -> int:
        text = os.environ.get("QENGINE_STRESS", "")
        if text:
            return int(text)
        if UNDER_COVERAGE:
            return max(3, small // 8)
        return max(min(small, 10), small // 4) if "QENGINE_CI" in os.environ else small

    return count


@pytest.fixture(scope="session")
def news_data() -> Path:
    """The folder of recorded news days: QENGINE_NEWS_DATA, else ../shared/data/news; skips without either."""
    named = os.environ.get("QENGINE_NEWS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data" / "news"
    if not any(folder.glob("*.jsonl")):
        pytest.skip(f"no recorded news days: neither QENGINE_NEWS_DATA nor ../shared/data/news has any ({folder})")
    return folder
