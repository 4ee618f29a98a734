"""Runs with a journal that are cut short, each in a process of its own, and what must hold over all their lives.

    python journal_support.py       # a nursery: forks a child for each line that it is sent

A child says on a pipe, by one write each, which call it is about to make and what it was told: what was said stays,
however the child ends, and in order.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qengine import (
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    Event,
    ExecutionPolicy,
    Journal,
    Query,
    QueryExecutor,
    Quota,
    RateLimit,
    RetryPolicy,
    Source,
    Task,
    TaskError,
    TaskScheduler,
    TransientError,
    Window,
    current_attempt,
)
from qengine.testing import VirtualClock

PATIENCE = 30.0         # seconds after which a life that does not end shows where it hangs
DIED = 77               # the exit code of a process that a fault ends
STARTED, SUCCEEDED = "started", "succeeded"
DONE = ("succeeded", "failed", "error", "timeout")
FOREVER = 1e10          # seconds: a quota's period that has begun and does not end while a test runs
WRITES = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE", "CREATE", "COMMIT")
SET = ("PRAGMA JOURNAL_MODE=", "PRAGMA APPLICATION_ID=", "PRAGMA USER_VERSION=")


# ---- what is run -----------------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """Something to run.

    Args:
        inputs: Payloads, each once; the roots of a tree.
        kept: Of sources whose every call is known before it is made: how many there are at once.
        rates: By source, calls a second and how many at once.
        windows: By source, calls in any so many seconds.
        budget: Calls of each source in all.
        retries: Whether calls fail that are made again.
        busy: Seconds that a call takes.
        seconds: How long it takes about.
    """

    inputs: list[int]
    kept: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)
    retries: bool = False
    busy: float = 0.001
    seconds: float = 0.1

    def limits(self, source: str) -> list[RateLimit | Window]:
        """What the source allows."""
        found: list[RateLimit | Window] = []
        if source in self.rates:
            found.append(RateLimit(per_second=self.rates[source][0], burst=self.rates[source][1]))
        if source in self.windows:
            found.append(Window(*self.windows[source]))
        return found

    def task(self, payload: int) -> Any:
        """An input."""
        return payload

    def make(self, life: Life, **common: Any) -> Any:
        """An executor."""
        raise NotImplementedError

    def answer(self, source: str, payload: Any, number: int) -> Any:
        """What a call brings, unless it raises."""
        return payload * 7

    def expected(self) -> dict[Any, tuple[str, Any]]:
        """The status and the value of each task; None for a value that may be any."""
        return {payload: (SUCCEEDED, payload * 7) for payload in self.inputs}


class Free(Scenario):
    """Nothing must survive but the answers; some fail once, and some for good."""

    def make(self, life: Life, **common: Any) -> Any:
        retry = RetryPolicy(3, backoff=0.002, jitter="none")
        return life.scheduler(life.fn("default"), ExecutionPolicy(concurrency=4, retry=retry), **common)

    def answer(self, source: str, payload: int, number: int) -> Any:
        if payload % 11 == 5:
            raise TaskError(f"{payload} is bad")
        if payload % 7 == 3 and number == 1:
            raise TransientError("once")
        return payload * 7

    def expected(self) -> dict[Any, tuple[str, Any]]:
        return {payload: ("failed", None) if payload % 11 == 5 else (SUCCEEDED, payload * 7) for payload in self.inputs}


class Quick(Scenario):
    """As bare as can be: nobody is told before the end."""

    def make(self, life: Life, **common: Any) -> Any:
        return life.scheduler(life.fn("default"), ExecutionPolicy(concurrency=4), **common)


class Kept(Scenario):
    """A window, a budget and a quota, which do not reach for all."""

    def make(self, life: Life, **common: Any) -> Any:
        quota = Quota(self.budget["default"], per=FOREVER)
        policy = ExecutionPolicy(
            self.kept["default"], self.limits("default"), budget=self.budget["default"], quota=quota
        )
        return life.scheduler(life.fn("default"), policy, **common)


class Retried(Scenario):
    """Batches, keys, priorities, and calls that fail twice."""

    def task(self, payload: int) -> Any:
        return Task(payload, key=f"k{payload}", priority=payload % 3)

    def make(self, life: Life, **common: Any) -> Any:
        retry = RetryPolicy(4, backoff=0.002, jitter="none")
        policy = ExecutionPolicy(
            self.kept["default"], self.limits("default"), batch_size=5, batch_backoff=0.002, retry=retry
        )
        return life.scheduler(life.fn("default"), policy, **common)

    def answer(self, source: str, payload: int, number: int) -> Any:
        if payload % 5 == 2 and number <= 2:
            raise TransientError("twice")
        if payload % 7 == 6:
            raise TaskError("never")
        return payload * 7

    def expected(self) -> dict[Any, tuple[str, Any]]:
        return {payload: ("failed", None) if payload % 7 == 6 else (SUCCEEDED, payload * 7) for payload in self.inputs}


class Lanes(Scenario):
    """Three hosts, each with a window of its own, and a quota of all together, which does not reach for all."""

    def make(self, life: Life, **common: Any) -> Any:
        quota = Quota(self.budget["all"], per=FOREVER)
        policy = ExecutionPolicy(self.kept["0"], self.limits("0"), quota=quota)
        return life.scheduler(life.fn(""), policy, lane_by=lambda payload: str(payload % 3), **common)


class Routes(Scenario):
    """Two sources: one with a rate and a budget, where some fail, and one without."""

    def task(self, payload: int) -> Any:
        return Task(payload, routes=("a", "b"))

    def make(self, life: Life, **common: Any) -> Any:
        first = Source("a", life.fn("a"), self.limits("a"), self.kept["a"], budget=self.budget["a"])
        return life.scheduler([first, Source("b", life.fn("b"), concurrency=2)], **common)

    def answer(self, source: str, payload: int, number: int) -> Any:
        if source == "a" and payload % 4 == 1:
            raise TaskError("a cannot")
        return [source, payload]

    def expected(self) -> dict[Any, tuple[str, Any]]:
        return dict.fromkeys(self.inputs, (SUCCEEDED, None))


class Tree(Scenario):
    """A tree, asked of a source with a window and of one without."""

    def make(self, life: Life, **common: Any) -> Any:
        sources = [
            Source("x", life.fn("x"), self.limits("x"), self.kept["x"]),
            Source("y", life.fn("y"), concurrency=2),
        ]
        return life.executor(sources, self, **common)

    def queries(self, node: int, source: Any) -> list[str]:
        return [f"{source.name}{node}"]

    def children(self, node: int, result: Any) -> list[int]:
        return [10 * node + digit for digit in (1, 2, 3)] if node < 10 else []

    def answer(self, source: str, payload: str, number: int) -> Any:
        return [] if payload.endswith("3") else [f"{payload}!"]

    def expected(self) -> dict[Any, tuple[str, Any]]:
        found: dict[Any, tuple[str, Any]] = {}
        for root in self.inputs:
            below = [] if str(root).endswith("3") else [10 * root + digit for digit in (1, 2, 3)]
            for node in (root, *below):
                for source in "xy":
                    payload = f"{source}{node}"
                    found[payload] = (SUCCEEDED, self.answer(source, payload, 1))
        return found


SCENARIOS: dict[str, Scenario] = {
    "free": Free([*range(24)], retries=True, seconds=0.06),
    "quick": Quick([*range(1500)], busy=0.0, seconds=0.06),
    "kept": Kept(
        [*range(15)], kept={"default": 3}, windows={"default": (6, 0.150)},
        budget={"default": 13}, seconds=0.3,
    ),
    "retried": Retried([*range(12)], kept={"default": 3}, rates={"default": (300, 4)}, retries=True, seconds=0.15),
    "lanes": Lanes(
        [*range(14)], kept=dict.fromkeys("012", 2), windows=dict.fromkeys("012", (2, 0.150)),
        budget={"all": 11}, seconds=0.2,
    ),
    "routes": Routes([*range(14)], kept={"a": 2}, rates={"a": (100, 2)}, budget={"a": 7}, seconds=0.12),
    "tree": Tree([1, 2, 3], kept={"x": 2}, windows={"x": (5, 0.150)}, seconds=0.2),
}


# ---- one life --------------------------------------------------------------------------------------------------------


class Life:
    """A process's try at a scenario.

    Args:
        say: Takes what is noted.
        scenario: What is run.
        world: "threads" or "asyncio".
        begins: An instant of virtual time; None for real time.
    """

    def __init__(self, say: Callable[..., None], scenario: Scenario, world: str, begins: float | None) -> None:
        self.say = say
        self.scenario = scenario
        self.awaits = world == "asyncio"
        self.clock = None if begins is None else VirtualClock(begins)
        self.now = time.monotonic if self.clock is None else self.clock.now

    @property
    def scheduler(self) -> Any:
        return AsyncTaskScheduler if self.awaits else TaskScheduler

    @property
    def executor(self) -> Any:
        return AsyncQueryExecutor if self.awaits else QueryExecutor

    def fn(self, source: str) -> Callable[[Any], Any]:
        """What is called for a source: it says so first, and takes its time."""
        busy, answer = self.scenario.busy, self.scenario.answer

        def begun(given: Any) -> tuple[Any, int]:
            payload = given.payload if isinstance(given, Query) else given
            number = current_attempt().number
            self.say("call", source or str(payload % 3), payload, number, self.now())
            return payload, number

        def plain(given: Any) -> Any:
            payload, number = begun(given)
            if busy:
                (time.sleep if self.clock is None else self.clock.sleep)(busy)
            return answer(source, payload, number)

        async def awaited(given: Any) -> Any:
            payload, number = begun(given)
            if busy:
                await (asyncio.sleep if self.clock is None else self.clock.sleep)(busy)
            return answer(source, payload, number)

        return awaited if self.awaits else plain

    def go(self, journal: Journal, *, streams: bool, listens: bool) -> dict[str, Any]:
        """Run it; return its report, or with what it ended."""
        inputs = [self.scenario.task(payload) for payload in self.scenario.inputs]

        def heard(event: Event) -> None:
            if event.kind == "result" and event.index is not None:
                self.say("event", self.scenario.inputs[event.index], event.detail)

        on_event = heard if listens and not isinstance(self.scenario, Tree) else None
        executor = self.scenario.make(self, journal=journal, clock=self.clock, on_event=on_event)
        try:
            if self.awaits:
                asyncio.run(self._async_stream(executor, inputs) if streams else _awaited(executor.run, inputs))
            elif streams:
                with executor.stream(inputs) as stream:
                    for result in stream:
                        self.told(result)
            else:
                executor.run(inputs)
        except Exception as error:
            return _summary(executor.last_report, error)
        return _summary(executor.last_report, None)

    async def _async_stream(self, executor: Any, inputs: list[Any]) -> None:
        async with executor.stream(inputs) as stream:
            async for result in stream:
                self.told(result)

    def told(self, result: Any) -> None:
        self.say("told", *_row_of(result))


async def _awaited(fn: Callable[[Any], Any], inputs: list[Any]) -> None:
    await fn(inputs)


def _row_of(result: Any) -> tuple[Any, ...]:
    return result.task.payload, result.status.value, result.value, result.attempts, result.reason


def _summary(report: Any, error: BaseException | None) -> dict[str, Any]:
    if report is None:
        return {"error": None if error is None else [type(error).__name__, str(error)], "results": [], "sources": {}}
    return {
        "error": None if error is None else [type(error).__name__, str(error)],
        "has_report": error is None or getattr(error, "report", None) is report,
        "results": [_row_of(result) for result in report.results],
        "sources": {name: [source.calls, source.recalled] for name, source in report.by_source.items()},
        "stop_reason": report.stop_reason,
    }


def live(
    say: Callable[..., None],
    *,
    scenario: str,
    world: str,
    path: str,
    begins: float | None = None,
    streams: bool = True,
    listens: bool = False,
    fault: Mapping[str, Any] | None = None,
    synchronous: str = "FULL",
) -> dict[str, Any]:
    """One life, from the opening of the journal to the end; with a fault, if there is to be one."""
    with faults(**(fault or {})) as steps:
        try:
            with Journal(path, synchronous=synchronous) as journal:
                of = Life(say, SCENARIOS[scenario], world, begins)
                summary = of.go(journal, streams=streams, listens=listens)
        except Exception as error:
            summary = {"at_the_door": True, **_summary(None, error)}
    return {**summary, "steps": steps.count, "commits": steps.commits}


# ---- faults ----------------------------------------------------------------------------------------------------------


class Steps:
    """Counts the steps that write, and has a fault happen at one of them.

    Args:
        at: Its number, from 1; 0 for none.
        how: "die_before", "die_after", "full" from then on, or "full_once".
    """

    def __init__(self, at: int = 0, how: str = "") -> None:
        self.at, self.how = at, how
        self.count = 0
        self.commits: list[int] = []

    def before(self, sql: str) -> bool:
        """Note that a statement is about to be executed; return whether the process dies after it."""
        if not sql.lstrip().upper().startswith(WRITES + SET):
            return False
        self.count += 1
        if sql == "COMMIT":
            self.commits.append(self.count)
        if self.count == self.at and self.how == "die_before":
            os._exit(DIED)
        if (self.how == "full" and self.count >= self.at) or (self.how == "full_once" and self.count == self.at):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self.count == self.at and self.how == "die_after"


@contextmanager
def faults(at: int = 0, how: str = "", *, file_size: int | None = None, pages: int | None = None) -> Iterator[Steps]:
    """Have a fault happen in this process, which is forked for it.

    Args:
        at, how: See Steps.
        file_size: Bytes beyond which no file can be written; "torn" has the process die there, in mid-write.
        pages: Beyond which the file itself cannot grow: SQLite's own word for a full disk.
    """
    steps = Steps(at, how)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> Any:
            return self._with(sql, super().execute, sql, *args)

        def executemany(self, sql: str, rows: Any, /) -> Any:
            rows = list(rows)
            return self._with(sql if rows else "", super().executemany, sql, rows)

        def _with(self, sql: str, method: Callable[..., Any], *args: Any) -> Any:
            dies = steps.before(sql)
            done = method(*args)
            if dies:
                os._exit(DIED)
            return done

    before = sqlite3.connect

    def connect(name: str, **given: Any) -> Any:
        if "mode=ro" in name:
            return before(name, **given)
        connection = before(name, factory=Connection, **given)
        if pages is not None:
            connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    sqlite3.connect = connect       # type: ignore[assignment]
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if how == "torn":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        yield steps
    finally:
        sqlite3.connect = before
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)


# ---- the nursery -----------------------------------------------------------------------------------------------------


class Lived(NamedTuple):
    """A life that is over: its exit code (below 0: the signal), what it said, how it ended by itself, if it did."""

    exit: int
    said: list[list[Any]]
    end: dict[str, Any] | None


class Nursery:
    """Lives in processes that are forked from one in which all is loaded."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def live(self, kill_after: float | None = None, **given: Any) -> Lived:
        """One life; with SIGKILL after so many seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kill_after": kill_after, "given": given}) + "\n")
        self._process.stdin.flush()
        exit, said = json.loads(self._process.stdout.readline())
        if exit not in (0, -signal.SIGKILL, -signal.SIGXFSZ, DIED):
            raise AssertionError(f"a life ended with {exit}; it said {said[-5:]}")
        end = said.pop()[1] if said and said[-1][0] == "end" else None
        return Lived(exit, said, end)


def nurse() -> None:
    """Fork a child for each line, and answer with what became of it."""
    for line in sys.stdin:
        order = json.loads(line)
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            os.close(reads)
            _live(writes, order["given"])
        os.close(writes)
        said = _hear(reads, child, order["kill_after"])
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)


def _live(pipe: int, given: dict[str, Any]) -> None:
    def say(*what: Any) -> None:
        os.write(pipe, (json.dumps(what) + "\n").encode())

    code = 1
    try:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        end = live(say, **given)
        line = (json.dumps(["end", end]) + "\n").encode()
        while line:
            line = line[os.write(pipe, line) :]
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def _hear(pipe: int, child: int, kill_after: float | None) -> list[Any]:
    at = None if kill_after is None else time.monotonic() + kill_after
    heard = b""
    with closing(os.fdopen(pipe, "rb", buffering=0)) as file:
        while True:
            left = None if at is None else max(0.0, at - time.monotonic())
            if at is not None and not select.select([file], [], [], left)[0]:
                os.kill(child, signal.SIGKILL)
                at = None
                continue
            some = file.read(65536)
            if not some:
                break
            heard += some
            if at is not None and time.monotonic() >= at:
                os.kill(child, signal.SIGKILL)
                at = None
    return [json.loads(line) for line in heard.split(b"\n")[:-1]]


# ---- what is on disk -------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a journal has of a task."""

    status: str
    value: Any
    attempts: int
    source: str
    started_at: float | None


def of_payload(source: str, payload: Any) -> Any:
    """What names a task here: its payload, which no other has."""
    return payload


def rows_of(path: Path, name: Callable[[str, Any], Any] = of_payload) -> dict[Any, Row]:
    """The tasks in a journal, each once; of a copy, so that the next to open the file finds it as it was left."""
    with copied(path) as copy:
        found = copy.execute("SELECT key, payload, status, value, attempts, source, started_at FROM tasks").fetchall()
    rows: dict[Any, Row] = {}
    for key, payload, status, value, attempts, source, started_at in found:
        task = name(source, json.loads(key if payload is None else payload))
        assert task not in rows, f"{task} has two rows"
        rows[task] = Row(status, None if value is None else json.loads(value), attempts, source, started_at)
    return rows


def begun_since(rows: Mapping[Any, Row], before: Mapping[Any, Row]) -> list[Any]:
    """The tasks that were in flight when a process died, but for those that were so when the one before it died."""
    return [task for task, row in rows.items() if row.status == STARTED and row != before.get(task)]


def saved_at(path: Path) -> float:
    """When the state of a source was last saved; 0 for never."""
    with copied(path) as copy:
        try:
            (at,) = copy.execute("SELECT max(saved_at) FROM sources").fetchone()
        except sqlite3.OperationalError:        # the table is not there yet
            return 0.0
    return at or 0.0


@contextmanager
def copied(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a copy of what a process has left; an empty one where it left nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (path.name, f"{path.name}-wal", f"{path.name}-journal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(path.with_name(name), Path(folder, name))
        with closing(sqlite3.connect(Path(folder, path.name))) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'tasks'").fetchone()[0]:
                connection.execute("CREATE TABLE tasks (key, payload, status, value, attempts, source, started_at)")
            yield connection


# ---- what must hold --------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that was begun."""

    life: int
    source: str
    payload: Any
    number: int
    at: float


class Book:
    """What is known of all lives of one run.

    `add` says what must hold after each, `close` what must at the end, and `check_limits` what must of the instants.
    """

    def __init__(self, scenario: Scenario, path: Path) -> None:
        self.scenario, self.path = scenario, path
        self.calls: list[Call] = []
        self.calls_of: defaultdict[Any, list[Call]] = defaultdict(list)
        self.told: dict[Any, tuple[int, str]] = {}     # after how many calls, and what
        self.in_flight: Counter[Any] = Counter()
        self.rows: dict[Any, Row] = {}
        self.lives = self.kills = self.repeated = 0

    def add(self, lived: Lived) -> None:
        """Take in a life, which is over, however it ended; of one that ended with an error, its report as well."""
        before = self.rows
        self.rows = rows_of(self.path)
        for payload, row in self.rows.items():
            assert row.status == STARTED or payload not in before or before[payload].status in (STARTED, row.status)
        self._hear(lived)
        error = None if lived.end is None else lived.end["error"]
        if error is not None:
            self._check_failed(lived, error)
        if lived.end is None or error is not None:
            fresh = begun_since(self.rows, before)
            self.kills += 1
            self.in_flight.update(fresh)
            self._check_in_flight(fresh)
        self.lives += 1

    def _check_failed(self, lived: Lived, error: list[str]) -> None:
        """A run that could not write its journal says so, and reports what is stored."""
        assert lived.end is not None
        kind, text = error
        assert kind == "StorageError" and str(self.path) in text, error
        assert lived.end.get("has_report", not lived.said), "there is no report"
        for payload, status, value, *_ in lived.end["results"]:
            assert status != "cancelled" or lived.end["stop_reason"] == "journal"
            if status in DONE:
                row = self.rows.get(payload)
                assert row is not None and (row.status, row.value) == (status, value), (payload, status, row)

    def _check_in_flight(self, fresh: list[Any]) -> None:
        for source, most in self.scenario.kept.items():
            there = [payload for payload in fresh if self.rows[payload].source == source]
            assert self.scenario.retries or len(there) <= most, f"more in flight at {source} than at once: {there}"

    def _hear(self, lived: Lived) -> None:
        for kind, *what in lived.said:
            if kind == "call":
                source, payload, number, at = what
                self._check_call(Call(self.lives, source, payload, number, at))
            else:
                payload, status = what[:2]
                if status in DONE:
                    row = self.rows.get(payload)
                    assert row is not None and row.status == status, f"{payload} was told as {status}; stored: {row}"
                    assert kind == "event" or status != SUCCEEDED or row.value == what[2]
                    self.told.setdefault(payload, (len(self.calls), status))

    def _check_call(self, call: Call) -> None:
        payload = call.payload
        assert payload not in self.told, f"{payload} is asked again: {self.told[payload]}"
        mine = self.calls_of[payload]
        if call.source in self.scenario.kept:
            row = self.rows.get(payload)
            assert row is not None and row.attempts >= call.number, f"{payload} is called, but not known: {row}"
            numbers = [other.number for other in mine]
            assert not numbers or call.number > max(numbers), f"attempt {call.number} of {payload} after {numbers}"
        if mine and mine[-1].life < self.lives:
            self.repeated += 1
        mine.append(call)
        self.calls.append(call)

    def check_limits(self, slack: float = 0.0) -> None:
        """No limit was exceeded, over all lives, if a call begins so many seconds after its admission at the most."""
        by_source: defaultdict[str, list[float]] = defaultdict(list)
        for call in self.calls:
            by_source[call.source].append(call.at)
        for source, (per_second, burst) in self.scenario.rates.items():
            check_rate(sorted(by_source[source]), per_second, burst, slack)
        for source, (limit, seconds) in self.scenario.windows.items():
            check_window(sorted(by_source[source]), limit, seconds, slack)

    def close(self, lived: Lived) -> None:
        """The last life has ended by itself: one result for each input, what it should be."""
        assert lived.end is not None and lived.end["error"] is None, lived.end
        results = [what for kind, *what in lived.said if kind == "told"] + lived.end["results"]
        found = {payload: (status, value, attempts, reason) for payload, status, value, attempts, reason in results}
        expected = self.scenario.expected()
        assert len(results) == len(found) and found.keys() == expected.keys()
        made = Counter(call.payload for call in self.calls)
        calls_of = Counter(call.source for call in self.calls) + Counter({"all": len(self.calls)})
        for source, most in self.scenario.budget.items():
            assert calls_of[source] <= most, f"{calls_of[source]} calls of {source}: its budget is {most}"
        budget = sum(self.scenario.budget.values()) if "a" not in self.scenario.budget else 0
        for payload, (status, value) in expected.items():
            got, brought, attempts, reason = found[payload]
            if got == "skipped":
                assert budget and reason == "budget_exhausted"
                continue
            assert got == status and (value is None or value == brought), (payload, found[payload])
            row = self.rows[payload]
            assert (row.status, row.value, row.attempts) == (got, brought, attempts)
            if row.source in self.scenario.kept and "a" not in self.scenario.kept:
                assert made[payload] <= attempts <= made[payload] + self.in_flight[payload]
                if not self.scenario.retries:
                    assert made[payload] <= 1 + self.in_flight[payload]
        if budget:
            done, wasted = sum(status != "skipped" for status, *_ in found.values()), self._wasted(*self.scenario.kept)
            assert budget - wasted <= done <= budget, f"{done} of {budget} were done, and at most {wasted} wasted"
        for source in self.scenario.kept:
            calls = calls_of[source]
            counted, _ = lived.end["sources"].get(source, (0, 0))
            assert calls <= counted <= calls + self._wasted(source)

    def _wasted(self, *sources: str) -> int:
        """How many calls the kills may have cost: those that were admitted, begun or not."""
        return self.kills * sum(self.scenario.kept[source] for source in sources)


def check_rate(instants: list[float], per_second: float, burst: int, slack: float = 0.0) -> None:
    """In any stretch there are no more than the burst and what has come in it."""
    for first, begins in enumerate(instants):
        for last in range(first, len(instants)):
            most = burst + per_second * (instants[last] - begins + slack)
            assert last - first + 1 <= most + 1e-6, f"{last - first + 1} calls in {instants[last] - begins:.4f} s"


def check_window(instants: list[float], limit: int, seconds: float, slack: float = 0.0) -> None:
    """In any so many seconds there are no more than the limit."""
    for first in range(len(instants) - limit):
        passed = instants[first + limit] - instants[first]
        assert passed >= seconds - slack - 1e-6, f"{limit + 1} calls in {passed:.4f} s, not in {seconds}"


if __name__ == "__main__":
    nurse()
