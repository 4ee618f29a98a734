"""A run's journal: what was asked and answered, on disk, so that a run that was cut short goes on where it was.

    tasks      each task that was begun or has its outcome; `value` is what it brought
    sources    how far each source's limits and budgets are used, and what it has done, over all runs
    shared     likewise limits and quotas that are not one source's alone
    runs       each time that the journal was gone on with: by which process, from when to when, how it ended
    facts      what was run, so that a change is noticed

Rules: an answer is committed before anybody is told of it.  A call to a source of which something must survive (a rate,
a window, a budget, a quota) is known before it is made; what was in flight when a process died counts as made, and is
asked again.  Where nothing must survive, what is not committed yet is asked again.  One process writes; what is wrong
with the file is said before anything is asked.  No key of an API is in it, unless payloads, values or errors hold it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass, replace
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from functools import partial
from hashlib import blake2b
from itertools import repeat
from pathlib import PurePath
from threading import Event, Lock
from time import sleep
from typing import Any, Final, Protocol, Self
from uuid import UUID
from weakref import WeakKeyDictionary, WeakValueDictionary

from .core.lane import Attempt, Lane
from .core.purse import Budget
from .core.run import Known, Tried
from .core.steps import Raised
from .database import BUSY_SECONDS, WRITER, Database, boot_token
from .drivers.calls import GivenUp, current_worker
from .drivers.clock import SYSTEM_CLOCK, Clock
from .drivers.commits import FULL
from .errors import QEngineError, Single, StorageError, TaskError, TaskTimeoutError, refuse_type, require_kind
from .facts import Facts, Said, name_of
from .forks import restart_after_fork
from .model import OTHERS, Query, SourceReport, Task, TaskStatus
from .quota import Account

_log = logging.getLogger(__name__)

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS tasks (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,  -- the task's own as '=' and JSON; else its payload as JSON, of a query source, level and node
                        -- before it; or '#' and the hash of that
    source TEXT NOT NULL,
    value,  -- JSON, or what the codec made of it; NULL where there is none (yet)
    started_at REAL,  -- of the last attempt, seconds since the epoch
    duration REAL,
    status TEXT NOT NULL DEFAULT 'succeeded',  -- or 'failed', 'error', 'timeout'; 'started' as long as it is under way
    attempts INTEGER NOT NULL DEFAULT 1,
    payload TEXT,  -- as JSON; NULL where the key says it
    error TEXT,  -- its class and what it says
    usage TEXT  -- by unit, as JSON; NULL for nothing but its calls
);
CREATE TABLE IF NOT EXISTS sources (
    name TEXT PRIMARY KEY,
    counts TEXT,  -- what it did in all runs, as JSON; NULL since it was started over
    state TEXT NOT NULL,  -- how far its limits, budgets and quotas are used, as JSON
    saved_at REAL NOT NULL,  -- of the state: seconds since the epoch,
    boot TEXT,  -- and of a clock that goes on until the system is started anew
    clock REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS shared (  -- limits and quotas that sources share, or that live on beyond a run
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL,  -- as JSON
    saved_at REAL NOT NULL,
    boot TEXT,
    clock REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,
    pid INTEGER NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL,  -- NULL where it was cut short
    ended TEXT  -- 'done', or the reason for which it was stopped
);
CREATE TABLE IF NOT EXISTS facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
"""

STARTED: Final = "started"

_LONGEST_KEY: Final = 64
_PAGE: Final = 1024
"""Tasks that are read ahead: a run that goes on asks for them in the order in which they were written."""

_COLUMNS: Final = (
    "id, key, source, value, started_at, duration, nullif(status, 'succeeded'), nullif(attempts, 1), error, usage"
)
"""What is read of a task; of most, that have succeeded at once, the last four are NULL."""
_SCALARS: Final = frozenset({type(None), bool, int, float, str})
_AT_ONCE: Final = 256
"""Rows of one statement: each statement lets other threads go on, and to be back among them takes its time."""

_GREAT: Final = 2**64
"""From which on a whole number may be too long to be written."""

_LONGEST_DELAY: Final = 1.0
"""Seconds between two calls that are kept, where both were known late."""

_FAILURES: Final = {status.value: status for status in TaskStatus if status.is_failure}
_COUNTED: Final = ("calls", "retries", "throttled", "rerouted", "busy_seconds")

Row = tuple[Any, ...]

_decode: Final = json.JSONDecoder().raw_decode  # as `json.loads` but for blanks, in half the time


class Codec(Protocol):
    """How values are stored: `json` is one, and so are `pickle` and most of their kin."""

    def dumps(self, value: Any, /) -> str | bytes:
        """Return what is stored of a value."""

    def loads(self, stored: Any, /) -> Any:
        """Return the value."""


class _Json:
    """Values as JSON."""

    @staticmethod
    def dumps(value: Any) -> str:
        return _encode_value(value)

    @staticmethod
    def loads(stored: str) -> Any:
        return json.loads(stored)


class Journal(Single):
    """Where a run is recorded, so that it can be gone on with.

    Hand it to a TaskScheduler or a QueryExecutor, or their twins; the same call of `run` or `stream` then goes on where
    the last one was cut short.  What was answered is not asked again: its result is among the others, with the value
    that was stored, and a stream hands it out again.  What was in flight is asked again, its attempts count on; where
    nothing must survive, so may be what came in the last few milliseconds.  What failed is reported with its status and
    its error's text, as a TaskError, a TaskTimeoutError or a QEngineError ("ValueError: four").  Rates, windows,
    budgets, quotas and breakers go on as if the time that passed had passed in the run.

    After a run that came to its end all is recalled, and nothing is asked: what is to be asked anew takes another file,
    or `fresh`.  A key does not say what is done with a payload: a file is for one function, or for one plan and its
    sources.  What is run differently is said, in `changes` and as a warning to the log; what was answered counts all
    the same.  Calls, retries, usage, cost and what is left are those of all runs in the file, other figures this run's.

    Args:
        path: A file; made if it is not there.  Beside it SQLite keeps `-wal` and `-shm`, and processes hold `-lock`.
        codec: Stores values: an object with `dumps` and `loads`, such as the module `pickle`.  None for JSON: a tuple
            then comes back as a list, and the keys of a dict as text.
        synchronous: "FULL": what was told survives a power cut; "NORMAL": the end of the process, whatever ends it.
        fresh: Start over: what was answered is forgotten, and what runs may use in all is there again; rates, windows,
            quotas and breakers stay.
        retry_failed: Ask again what failed, from its first attempt on.

    A task goes by its `key`; one without goes by its payload (in a hierarchy by source, level, node and payload), which
    is JSON, or made of data classes, enums, dates and the like.  Equal ones are counted, so each has a result of
    its own.  A task without a stable form, and one whose value cannot be stored, is an ERROR; the run goes on.

    For one run at a time, of one process.  Thread-safe.

    Raises:
        RuntimeError: By a run: it is closed, or another run uses it.
        StorageError: Another process has it; the file is damaged, is something else or of a later version, cannot be
            opened or written; nothing in it was changed.  By a run: what was answered cannot be stored any more, as on
            a full disk.  The run ends with that; its report has only what was stored.

    >>> import pathlib, tempfile
    >>> from qengine import TaskScheduler
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.db")
    >>> with Journal(path) as journal:
    ...     first = TaskScheduler(str.upper, journal=journal).run(["a", "b"])
    >>> with Journal(path) as journal:
    ...     report = TaskScheduler(str.upper, journal=journal).run(["a", "b", "c"])
    >>> report.values(), report.by_source["default"].recalled, report.by_source["default"].calls
    (['A', 'B', 'C'], 2, 3)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codec: Codec | None = None,
        synchronous: str = "FULL",
        fresh: bool = False,
        retry_failed: bool = False,
    ) -> None:
        for method in () if codec is None else ("dumps", "loads"):
            if not callable(getattr(codec, method, None)):
                refuse_type("codec", codec, "an object with dumps and loads, such as the module pickle")
        require_kind("fresh", fresh, bool)
        require_kind("retry_failed", retry_failed, bool)
        self.changes: list[str] = []
        """What was not as in the run before, in sentences: the plan, a policy, what was started over."""
        self.retry_failed = retry_failed
        self.codec: Codec = _Json() if codec is None else codec
        self._recorder: Recorder | None
        self.start_afresh()
        restart_after_fork(self)
        self.database = Database(path, SCHEMA, synchronous=synchronous)
        if not self.database.claim(WRITER):
            error = StorageError(f"{path} is the journal of a run that goes on, in {self._owner()}")
            self.database.close()
            raise error
        self._is_open = True
        try:
            if fresh:
                self.start_over()
            else:
                self.database.transact(self._begin)
        except BaseException:
            self.close()
            raise

    def start_afresh(self) -> None:
        """Leave it to the parent: in a child made by a fork it is closed."""
        self._in_use = Lock()
        self._recorder = None
        self._is_open = False

    @property
    def path(self) -> PurePath:
        """The file."""
        return self.database.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_is_open", False):
            self.close()

    def close(self) -> None:
        """Let others have it; harmless if it is closed.

        What a run that was interrupted has still to write is waited for; one that goes on ends with a StorageError.
        """
        if self._is_open:
            if self._recorder is not None:
                self._recorder.wait()
            self._is_open = False
            self.database.shut()
            self.database.yield_claim(WRITER)

    def start_over(self) -> None:
        """Forget what was answered, and what was used of what runs may use in all, as by `fresh`; say so."""
        self.database.transact(self._fresh)

    def record(self, clock: Clock, facts: Facts) -> Recorder:
        """Begin to record a run: for the engine."""
        return Recorder(self, clock, facts)

    def take(self, recorder: Recorder) -> None:
        """Begin to use it for a run.

        Raises:
            RuntimeError: It is closed, or another run uses it.
        """
        self.require_open()
        if self._recorder is not None:
            self._recorder.wait()
        if not self._in_use.acquire(False):
            raise RuntimeError(f"the journal {self.path} is in use: it is for one run at a time")
        self._recorder = recorder

    def require_open(self) -> None:
        """Refuse to go on with one that is closed.

        Raises:
            RuntimeError: It is.
        """
        if not self._is_open:
            raise RuntimeError(f"the journal {self.path} is closed")

    def release(self) -> None:
        """Use it no more."""
        self._recorder = None
        self._in_use.release()

    def said(self, change: str) -> None:
        """Say that something has changed."""
        self.changes.append(change)
        _log.warning("%s: %s", self.path, change)

    def _owner(self) -> str:
        sql = "SELECT value FROM facts WHERE name = 'pid'"
        row = self.database.transact(lambda c: c.execute(sql).fetchone(), only_reads=True)
        return "a process" if row is None else f"process {row[0]}"

    def _begin(self, connection: Any) -> None:
        connection.execute("INSERT OR REPLACE INTO facts VALUES ('pid', ?)", (str(os.getpid()),))
        codec = "JSON" if isinstance(self.codec, _Json) else name_of(self.codec)
        row = connection.execute("SELECT value FROM facts WHERE name = 'codec'").fetchone()
        if row is not None and row[0] != codec:
            if connection.execute("SELECT 1 FROM tasks WHERE value IS NOT NULL LIMIT 1").fetchone():
                raise StorageError(
                    f"{self.path} has values stored as {row[0]}, and {codec} is given now: "
                    f"give it the same codec, or start over with fresh=True"
                )
        connection.execute("INSERT OR REPLACE INTO facts VALUES ('codec', ?)", (codec,))

    def _fresh(self, connection: Any) -> None:
        (answered,) = connection.execute("SELECT count(*) FROM tasks").fetchone()
        if answered:
            self.said(f"started over: what was known of {answered} tasks is forgotten")
        connection.execute("DELETE FROM tasks")
        connection.execute("DELETE FROM runs")
        connection.execute("DELETE FROM facts")
        connection.execute("UPDATE sources SET counts = NULL")
        self._begin(connection)

    def __repr__(self) -> str:
        return f"<Journal {str(self.path)!r}{'' if self._is_open else ', closed'}>"


class Entry:
    """What is known of a task: its row, if it has one, and what is to be written there."""

    __slots__ = ("id", "is_recalled", "key", "payload", "value")

    def __init__(self, key: str, payload: str | None, row: int = 0) -> None:
        self.id = row
        self.key = key
        self.payload = payload
        self.value: str | bytes | None = None
        self.is_recalled = False

    def successor(self) -> Entry:
        """Return that of another attempt, which has a value of its own."""
        return Entry(self.key, self.payload, self.id)


_RECALLED: Final = Entry("", None)
_RECALLED.is_recalled = True


_known: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""In which gate, or limits, of this process what is in a journal under some name is known."""


class Recorder:
    """One run's use of its journal.

    Args:
        journal: Where it is recorded.
        clock: The run's.
        facts: What is run: what differs from last time is said.
    """

    def __init__(self, journal: Journal, clock: Clock, facts: Facts) -> None:
        journal.take(self)
        self.crew: Any = None
        """That of the run; set before anything is called."""
        self.pending: Sized = ()
        """What waits to be committed."""
        self._journal = journal
        self._database = journal.database
        self._clock = clock
        self._wall_offset = clock.wall_time() - clock.now()
        self._boot = boot_token() if clock is SYSTEM_CLOCK else None
        self._facts = facts
        self._begun_at = clock.wall_time()
        self._run: int | None = None
        self._name = os.path.realpath(journal.path)
        self._lanes: WeakValueDictionary[str, Lane] = WeakValueDictionary()
        self._earlier: WeakKeyDictionary[Lane, dict[str, Any]] = WeakKeyDictionary()
        self._codec = journal.codec
        self._is_json = isinstance(journal.codec, _Json)
        self._states: list[str] = []
        self._is_concluded = Event()
        self._releasing = Lock()
        self._paces: WeakKeyDictionary[Lane, tuple[float, float]] = WeakKeyDictionary()
        self._pacing = Lock()
        try:
            self._reader = Database(journal.path, "", read_only=True, is_checked=True)  # who reads waits for no commit
            self._resume(facts)
        except BaseException:
            journal.release()
            raise

    def _resume(self, facts: Facts) -> None:
        """Go on where the last run was."""
        journal = self._journal
        last, said, shared = self._database.transact(self._read, only_reads=True)
        self.next_id = last + 1
        """The number of the next new row."""
        for change in () if said is None else facts.changes_since(said):
            journal.said(change)
        for key, (names, limits) in facts.limits.items():
            if self._is_new(key, names[0]) and (saved := _latest(shared, names)) is not None:
                state, *moment = saved
                limits.load(json.loads(state), *self._since(*moment), math.inf)
        for account, names in facts.quotas.items():
            if (saved := _latest(shared, names)) is not None:
                account.load(json.loads(saved[0]))
        self._old = _Old(journal, self._reader, last)

    @property
    def recalls(self) -> bool:
        """Whether there is something to be recalled."""
        return self._old.left > 0

    def release(self) -> None:
        """Let go of the journal, at the end of the run: when all is written."""
        self._states.append("left")
        self._old.close()
        self._reader.shut()
        if self.crew is None or not self.crew.is_started:
            self.concluded()
        self._release()

    def concluded(self) -> None:
        """Note that nothing more is to be written."""
        self._is_concluded.set()
        self._release()

    def _release(self) -> None:
        with self._releasing:
            if self._is_concluded.is_set() and self._states == ["left"]:
                self._states.append("released")
                self._journal.release()

    def wait(self) -> None:
        """Wait until all is written of a run that was left, be it that it was interrupted."""
        if self._states == ["left"]:
            if self.crew.writes_by_itself():
                self._is_concluded.wait(BUSY_SECONDS)
            else:
                self.concluded()

    @staticmethod
    def _read(connection: Any) -> tuple[int, Said | None, dict[str, Row]]:
        (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM tasks").fetchone()
        said = connection.execute("SELECT value FROM facts WHERE name = 'said'").fetchone()
        shared = {name: row for name, *row in connection.execute("SELECT * FROM shared")}
        return last, None if said is None else json.loads(said[0]), shared

    def _is_new(self, thing: Any, name: str) -> bool:
        """Say whether a gate, or limits, do not know yet what is saved under a name; from now on they do."""
        is_new = _known.get((self._name, name)) is not thing
        _known[self._name, name] = thing
        return is_new

    def _since(self, saved_at: float, boot: str | None, clock: float) -> tuple[float, float]:
        """Return the instant that it is, and the seconds since something was saved."""
        now = self._clock.now()
        same_boot = boot is not None and boot == self._boot
        return now, max(0.0, now - clock if same_boot else self._clock.wall_time() - saved_at)

    # ---- lanes -------------------------------------------------------------------------------------------------------

    def adopt(self, lane: Lane, *, awaits: bool) -> None:
        """Have a lane go on where it was, and its calls be known."""
        self._lanes[lane.name] = lane
        lane.is_kept = (
            lane.gate.has_limits or lane.budget is not None or lane.purse is not None or lane.supply is not None
        )
        lane.call = self._awaited(lane, lane.call) if awaits else self._called(lane, lane.call)
        row = self._reader.transact(
            lambda c: c.execute("SELECT * FROM sources WHERE name = ?", (lane.name,)).fetchone()
        )
        is_new = self._is_new(lane.gate, lane.name)
        if row is None:
            return
        _, counts, state, *moment = row
        dumped = json.loads(state)
        if counts is not None:
            earlier = self._earlier[lane] = json.loads(counts)
            if lane.budget is not None:
                lane.budget = max(0.0, lane.budget - earlier["calls"])
            for budget in _budgets(lane):
                if budget.unit in dumped["used"]:
                    budget.load(dumped["used"][budget.unit])
        if is_new:
            lane.gate.load(dumped["gate"], *self._since(*moment), lane.timeout)

    def _called(self, lane: Lane, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return what calls a plain function."""
        is_json = self._is_json

        def call(payload: Any) -> Any:
            is_kept = lane.is_kept
            if is_kept or not ((type(payload) is int and -_GREAT < payload < _GREAT) or _is_scalar(payload)):
                attempt = self._attempt()
                self.identify(attempt)
                if is_kept:
                    admitted_at = self._waits(attempt)
                    self.crew.begin(attempt)
                    if (delay := self._delay(lane, admitted_at)) > 0:
                        sleep(delay)
                    self._begun(attempt)
            if not is_kept and len(self.pending) >= FULL:
                self.crew.catch_up()
            value = fn(payload)
            if not (is_json and ((type(value) is int and -_GREAT < value < _GREAT) or _is_scalar(value))):
                self._store(value)
            return value

        return call

    def _awaited(self, lane: Lane, fn: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """Return what calls an async function."""
        is_json = self._is_json

        async def call(payload: Any) -> Any:
            is_kept = lane.is_kept
            if is_kept or not ((type(payload) is int and -_GREAT < payload < _GREAT) or _is_scalar(payload)):
                attempt = self._attempt()
                self.identify(attempt)
                if is_kept:
                    admitted_at = self._waits(attempt)
                    await self.crew.begin(attempt)
                    if (delay := self._delay(lane, admitted_at)) > 0:
                        from asyncio import sleep as wait  # it is there by now

                        await wait(delay)
                    self._begun(attempt)
            if not is_kept and len(self.pending) >= FULL:
                await self.crew.catch_up()
            value = await fn(payload)
            if not (is_json and ((type(value) is int and -_GREAT < value < _GREAT) or _is_scalar(value))):
                self._store(value)
            return value

        return call

    @staticmethod
    def _attempt() -> Attempt:
        found = current_worker()
        assert found is not None
        attempt: Attempt = found[0].work
        return attempt

    @staticmethod
    def _waits(attempt: Attempt) -> float:
        """Note that a call is not begun before it is known, and cannot time out; return when it could have begun."""
        if attempt.reason is not None:
            raise GivenUp
        attempt.is_begun = False
        return attempt.started_at

    def _delay(self, lane: Lane, admitted_at: float) -> float:
        """Return for how long a call that is known now has to wait, lest those of one commit come all at once."""
        if not lane.gate.has_limits or self._clock is not SYSTEM_CLOCK:
            return 0.0
        with self._pacing:
            now = self._clock.now()
            before, began_at = self._paces.get(lane, (admitted_at, now))
            begins_at = max(now, began_at + min(admitted_at - before, _LONGEST_DELAY))
            self._paces[lane] = admitted_at, begins_at
            return begins_at - now

    def _begun(self, attempt: Attempt) -> None:
        """Begin a call that is known by now, unless nobody waits for it any more."""
        if attempt.reason is not None:
            raise GivenUp
        attempt.started_at = self._clock.now()
        attempt.is_begun = True

    def _store(self, value: Any) -> None:
        """Have a value in the form in which it is stored.

        Raises:
            TypeError: It has none.
        """
        try:
            stored = self._codec.dumps(value)
            if isinstance(stored, str) and not stored.isascii():
                stored.encode()
        except Exception as error:
            raise TypeError(f"the value cannot be stored in the journal by its codec: {error}") from error
        if not isinstance(stored, (str, bytes)):
            raise TypeError(f"the journal's codec made {type(stored).__name__} of the value, allowed is str or bytes")
        attempt = self._attempt()
        if attempt.reason is None:  # else another one is made, or was
            self.identify(attempt).value = stored

    def identify(self, attempt: Attempt) -> Entry:
        """Return what is known of a task, found out when first asked.

        Raises:
            TypeError: Its payload has no stable form.
        """
        entry: Entry | None = attempt.entry
        if entry is None:
            entry = attempt.entry = _entry_of(attempt)
        return entry

    # ---- what was known before ---------------------------------------------------------------------------------------

    def recalled(self, arrived: Any) -> Any:
        """Return what arrives for an input, with what is known of it; an awaitable where it was one."""
        if not self._old.left:
            return arrived
        if type(arrived) is tuple:
            return self._recalled_bare(*arrived) or arrived
        if isinstance(arrived, Attempt):
            self._recall(arrived)
            return arrived
        if hasattr(type(arrived), "__await__"):
            return self._recalled_later(arrived)
        return arrived

    def _recalled_bare(self, lane: Lane, payload: Any) -> Attempt | Known | None:
        """Return what is known of a bare payload, None for nothing; of most, in short."""
        if not (self._is_json and _is_scalar(payload)):
            attempt = Attempt(payload, None, lane)
            return attempt if self._recall(attempt) else None
        key, asked = _key_of(_of_scalar[type(payload)](payload))
        row = self._old.take(key)
        if row is None:
            return None
        _, _, source, value, started_at, duration, status, attempts, _, usage = row
        if status is None and attempts is None and usage is None and source == lane.name:
            try:
                decoded = _decode(value)[0]
                return Known(lane, payload, decoded, started_at - self._wall_offset, duration, _RECALLED)
            except (ValueError, StopIteration):  # not what we have written
                pass
        attempt = Attempt(payload, None, lane)
        attempt.entry = Entry(key, asked)
        self._fill_safely(attempt, attempt.entry, row)
        return attempt

    async def _recalled_later(self, arriving: Awaitable[Any]) -> Any:
        return self.recalled(await arriving)

    def _recall(self, attempt: Attempt) -> bool:
        """Have a task know what is known of it; return whether something is."""
        if attempt.outcome is not None or attempt.reason is not None:  # it is bad, or nobody's
            return False
        try:
            entry = self.identify(attempt)
        except Exception as error:  # the item is bad, not the run
            attempt.outcome, attempt.status = Raised(error), TaskStatus.ERROR
            return True
        row = self._old.take(entry.key)
        if row is not None:
            self._fill_safely(attempt, entry, row)
        return row is not None

    def _fill_safely(self, attempt: Attempt, entry: Entry, row: Row) -> None:
        try:
            self._fill(attempt, entry, row)
        except Exception as error:  # it cannot be read any more, and stays as it is
            attempt.outcome, attempt.status = Raised(error), TaskStatus.ERROR
            entry.is_recalled = True

    def _fill(self, attempt: Attempt, entry: Entry, row: Row) -> None:
        entry.id, _, source, value, started_at, duration, status, attempts, error, usage = row
        attempts = 1 if attempts is None else attempts
        failure = _FAILURES.get(status)
        if failure is not None and self._journal.retry_failed:
            attempt.is_plain = False  # its row is there
            return
        attempt.number = attempts
        attempt.started_at = (0.0 if started_at is None else started_at) - self._wall_offset
        attempt.duration = duration or 0.0
        if status == STARTED:
            attempt.remember().is_resumed = attempts > 0
            _remember_usage(attempt, usage)
            return
        attempt.lane = self._lanes.get(source, attempt.lane)
        if failure is None:
            attempt.outcome = self._codec.loads(value)
            attempt.status = TaskStatus.SUCCEEDED
        else:
            attempt.outcome = Raised(_error_of(failure, error))
            attempt.status = failure
        attempt.trail = None
        attempt.is_plain = attempt.is_plain and attempts == 1 and usage is None and failure is None
        _remember_usage(attempt, usage)
        entry.is_recalled = True

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, outcomes: list[Any], starts: list[Attempt], ended: str | None) -> None:
        """Commit what has come to pass, and what is about to begin; `ended` says that the run is over, and why."""
        work = _Work(self, outcomes, starts)
        if work.is_empty and ended is None:
            return
        self._database.transact(partial(self._write, work, ended))

    def has(self, item: Any) -> bool:
        """Say whether an outcome was committed before, by another run."""
        return isinstance(item, Attempt) and item.entry is not None and bool(item.entry.is_recalled)

    def _write(self, work: _Work, ended: str | None, connection: Any) -> None:
        if self._run is None:
            self._run = self._enter(connection)
        work.execute(connection)
        moment = (self._clock.wall_time(), self._boot, self._clock.now())
        saved = [(*self._state_of(lane, moment[2]), *moment) for lane in work.lanes]
        connection.executemany("INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?)", saved)
        shared = [(name, json.dumps(state), *moment) for name, state in self._shared(work.lanes, moment[2])]
        connection.executemany("INSERT OR REPLACE INTO shared VALUES (?, ?, ?, ?, ?)", shared)
        if ended is not None:
            connection.execute(
                "UPDATE runs SET ended_at = ?, ended = ? WHERE id = ?", (self._clock.wall_time(), ended, self._run)
            )

    def _enter(self, connection: Any) -> int:
        connection.execute("INSERT OR REPLACE INTO facts VALUES ('said', ?)", (json.dumps(self._facts.said),))
        added = connection.execute("INSERT INTO runs (pid, started_at) VALUES (?, ?)", (os.getpid(), self._begun_at))
        number: int = added.lastrowid
        return number

    def wall(self, at: float) -> float:
        """Return an instant of the run's clock in seconds since the epoch."""
        return at + self._wall_offset

    def stored(self, value: Any) -> str | bytes:
        """Return the form of a value that was not stored before its task was over: a plain one."""
        return _scalar(value) if self._is_json and type(value) in _SCALARS else self._codec.dumps(value)

    def _state_of(self, lane: Lane, now: float) -> Row:
        state = {"gate": lane.gate.dump(now), "used": {budget.unit: budget.dump() for budget in _budgets(lane)}}
        counts = dict(self._earlier.get(lane, {}))
        for name, counted in (("calls", lane.calls), ("busy_seconds", lane.busy_seconds)):
            counts[name] = counts.get(name, 0) + counted
        for name in ("retries", "throttled", "rerouted"):
            counts[name] = counts.get(name, 0) + getattr(lane.stats, name)
        counts["usage"] = dict(counts.get("usage", {}))
        for unit, used in lane.used.items():
            counts["usage"][unit] = counts["usage"].get(unit, 0.0) + used
        return lane.name, json.dumps(counts), json.dumps(state)

    def _shared(self, lanes: Iterable[Lane], now: float) -> Iterator[tuple[str, Any]]:
        """Give the state of what these lanes share with others, under each of its names, each once."""
        given: set[str] = set()
        for lane in lanes:
            for limits in lane.gate.lent:
                names, _ = self._facts.limits.get(limits.key, ([], None))
                if given.isdisjoint(names):
                    given.update(names)
                    yield from zip(names, repeat(limits.dump(now)))
            for account in () if lane.purse is None else lane.purse.allowances:
                names = self._facts.quotas.get(account, [])
                if isinstance(account, Account) and given.isdisjoint(names):
                    given.update(names)
                    yield from zip(names, repeat(account.dump()))

    def with_earlier(self, report: SourceReport) -> SourceReport:
        """Return a source's report with what it did in earlier runs; of the others that of all that have none here."""
        whole = replace(report, usage=dict(report.usage), skipped=dict(report.skipped))
        whole.times = report.times
        lane = self._lanes.get(report.name)
        if lane is not None:
            _add_counts(whole, self._earlier.get(lane))
        elif report.name == OTHERS:
            for counter in _COUNTED:
                setattr(whole, counter, 0)
            whole.usage.clear()
            for name, counts in self._database.transact(_all_counts, only_reads=True):
                lane = self._lanes.get(name)
                if counts is not None and (lane is None or not lane.joined):
                    _add_counts(whole, json.loads(counts))
        return whole


def _remember_usage(attempt: Attempt, usage: str | None) -> None:
    """Have a task know what its calls so far have used, where that is its own."""
    if usage is not None:
        trail = attempt.remember()
        trail.used = json.loads(usage)
        calls = int(trail.used.pop("calls", attempt.number))
        trail.uncounted, trail.told = calls - attempt.number, calls


class _Work:
    """What one commit writes."""

    def __init__(self, recorder: Recorder, outcomes: Iterable[Any], starts: Iterable[Attempt]) -> None:
        self._recorder = recorder
        self.lanes: dict[Lane, None] = {}
        self._answers: list[Any] = []  # of tasks that have no row and were answered at once: field by field
        self._asked: list[Row] = []  # likewise, where the key does not say the payload
        self._rows: list[Row] = []
        lanes = self.lanes
        add, of_scalar, longest = self._answers.extend, _of_scalar, _LONGEST_KEY
        offset, row_id = recorder.wall(0.0), recorder.next_id
        for item in outcomes:
            if type(item) is tuple:
                _, (payload, value, name, started_at, duration), entry, lane = item
                lanes[lane] = asked = None
                if entry is None:
                    key, stored = of_scalar[type(payload)](payload), of_scalar[type(value)](value)
                    if len(key) > longest:
                        key, asked = _key_of(key)
                else:
                    key, asked = entry.key, entry.payload
                    stored = of_scalar[type(value)](value) if entry.value is None else entry.value
                if asked is None:
                    add((row_id, key, name, stored, started_at + offset, duration))
                else:
                    self._asked.append((row_id, key, name, stored, started_at + offset, duration, asked))
                row_id += 1
        recorder.next_id = row_id
        for item in outcomes:
            if type(item) is Tried:
                self._tried(item.attempt, item.number)
            elif isinstance(item, Attempt):
                self._ended(item)
        for attempt in starts:
            if attempt.reason is None and attempt.status is None:  # else it was given up while it waited for this
                self._tried(attempt, attempt.number)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self._answers or self._asked or self._rows)

    def execute(self, connection: Any) -> None:
        """Write it."""
        answers, many = self._answers, 6 * _AT_ONCE
        rest = len(answers) % many
        for first in range(0, len(answers) - rest, many):
            connection.execute(_ANSWER_MANY, answers[first : first + many])
        for first in range(len(answers) - rest, len(answers), 6):
            connection.execute(_ANSWER, answers[first : first + 6])
        connection.executemany(_ANSWER_ASKED, self._asked)
        connection.executemany(_REPLACE, self._rows)

    def _tried(self, attempt: Attempt, number: int) -> None:
        """A task is about to be tried, or was tried in vain so far."""
        entry = self._entry(attempt)
        at, trail = self._recorder.wall(attempt.started_at), attempt.trail
        usage = None if trail is None or not (trail.told or trail.uncounted) else attempt.usage
        self._row(entry, attempt.lane, None, at, None, STARTED, number, None, usage)

    def _ended(self, attempt: Attempt) -> None:
        status = attempt.status
        entry: Entry | None = attempt.entry
        if status is None or not (status is TaskStatus.SUCCEEDED or status.is_failure):
            if attempt.number:
                self.lanes[attempt.lane] = None
            return
        if entry is not None and entry.is_recalled:
            return
        try:
            entry = self._entry(attempt)
        except (TypeError, ValueError):  # it has no stable form, and is asked again the next time
            return
        usage: dict[str, float] | None = attempt.usage
        if usage == {"calls": attempt.attempts}:
            usage = None
        at, duration, value, error = None, None, None, None
        if attempt.attempts:
            at, duration = self._recorder.wall(attempt.started_at), attempt.duration
        if status is TaskStatus.SUCCEEDED:
            value = self._recorder.stored(attempt.outcome) if entry.value is None else entry.value
            entry.value = None
        else:
            error = _said_by(attempt.outcome.error)
        self._row(entry, attempt.lane, value, at, duration, status.value, attempt.attempts, error, usage)

    def _entry(self, attempt: Attempt) -> Entry:
        entry = self._recorder.identify(attempt)
        if not entry.id:
            entry.id = self._recorder.next_id
            self._recorder.next_id += 1
        return entry

    def _row(
        self,
        entry: Entry,
        lane: Lane,
        value: str | bytes | None,
        at: float | None,
        duration: float | None,
        status: str,
        attempts: int,
        error: str | None,
        usage: Mapping[str, float] | None,
    ) -> None:
        self.lanes[lane] = None
        used = None if usage is None else json.dumps(usage)
        self._rows.append(
            (entry.id, entry.key, lane.name, value, at, duration, status, attempts, entry.payload, error, used)
        )


_ANSWER: Final = "INSERT INTO tasks (id, key, source, value, started_at, duration) VALUES (?, ?, ?, ?, ?, ?)"
_ANSWER_MANY: Final = _ANSWER + ", (?, ?, ?, ?, ?, ?)" * (_AT_ONCE - 1)
_ANSWER_ASKED: Final = (
    "INSERT INTO tasks (id, key, source, value, started_at, duration, payload) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_REPLACE: Final = "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class _Old:
    """The tasks that were known before the run, each to be taken once.  Thread-safe.

    They are read a page at a time in the order in which they were written, in which they are mostly asked for again.
    """

    def __init__(self, journal: Journal, reader: Database, last: int) -> None:
        self._reader = reader
        self._journal = journal
        self._has_index = False
        self._last = last
        self._read_to = 0
        self._taken = bytearray(last // 8 + 1)
        self._page: list[Row] = []
        self._at = 0  # in the page, as long as they are asked for in its order
        self._ahead: dict[str, Row] = {}  # those of pages of which another was asked for
        self._lock = Lock()
        self.left: int = reader.transact(lambda c: c.execute("SELECT count(*) FROM tasks").fetchone()[0])

    def take(self, key: str) -> Row | None:
        """Return a task of that key that was not taken yet, if there is one."""
        with self._lock:
            if not self.left:
                return None
            row = self._next(key) or self._ahead.pop(key, None)
            if row is None or not self._is_free(row):
                row = self._find(key)
            if row is not None:
                self._taken[row[0] >> 3] |= 1 << (row[0] & 7)
                self.left -= 1
                if not self.left:
                    self._forget()
            return row

    def close(self) -> None:
        """Take nothing more."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self.left = 0
        self._page, self._at = [], 0
        self._ahead.clear()

    def _is_free(self, row: Row) -> bool:
        return not self._taken[row[0] >> 3] & (1 << (row[0] & 7))

    def _next(self, key: str) -> Row | None:
        """Return the next one in the order in which they were written, if it is of that key; else put those aside."""
        if self._at == len(self._page) and self._read_to < self._last and len(self._ahead) < _PAGE:
            sql = f"SELECT {_COLUMNS} FROM tasks WHERE id > ? AND id <= ? ORDER BY id LIMIT {_PAGE}"
            self._page = self._reader.transact(lambda c: c.execute(sql, (self._read_to, self._last)).fetchall())
            self._read_to = self._page[-1][0] if self._page else self._last
            self._at = 0
        if self._at < len(self._page):
            row = self._page[self._at]
            if row[1] == key:
                self._at += 1
                return row
            for other in self._page[self._at :]:
                self._ahead.setdefault(other[1], other)
            self._page, self._at = [], 0
        return None

    def _find(self, key: str) -> Row | None:
        if not self._has_index:  # made when first needed: it would make each answer dearer
            self._journal.database.transact(
                lambda c: c.execute("CREATE INDEX IF NOT EXISTS tasks_by_key ON tasks (key)")
            )
            self._has_index = True
        sql = f"SELECT {_COLUMNS} FROM tasks WHERE key = ? AND id <= ? ORDER BY id"
        rows = self._reader.transact(lambda c: c.execute(sql, (key, self._last)).fetchall())
        return next((row for row in rows if self._is_free(row)), None)


def _latest(shared: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    """Return what was saved last under one of these names."""
    return max((shared[name] for name in names if name in shared), key=lambda row: row[1], default=None)


def _budgets(lane: Lane) -> list[Budget]:
    """Return the budgets of a lane, but for that of calls."""
    return [] if lane.purse is None else [one for one in lane.purse.allowances if isinstance(one, Budget)]


def _all_counts(connection: Any) -> list[Row]:
    found: list[Row] = connection.execute("SELECT name, counts FROM sources").fetchall()
    return found


def _add_counts(report: SourceReport, counts: Mapping[str, Any] | None) -> None:
    if counts is not None:
        earlier = SourceReport(report.name, **counts)
        report.add(earlier)


# ---- keys and values as text -----------------------------------------------------------------------------------------


def _stable(thing: Any) -> Any:
    """Return what stands for something in a key that JSON does not know.

    Raises:
        TypeError: Nothing does that would be the same in another process.
    """
    if is_dataclass(thing) and not isinstance(thing, type):
        return [type(thing).__qualname__, *(getattr(thing, of.name) for of in fields(thing))]
    if isinstance(thing, Enum):
        return [type(thing).__qualname__, thing.name]
    if isinstance(thing, (set, frozenset)):
        return ["set", *sorted(map(_encode_key, thing))]
    if isinstance(thing, Mapping):
        return dict(thing)
    if isinstance(thing, (bytes, bytearray)):
        return ["bytes", thing.hex()]
    if isinstance(thing, (datetime, date, time_of_day)):
        return [type(thing).__name__, thing.isoformat()]
    if isinstance(thing, Decimal | UUID | PurePath):
        return [type(thing).__name__, str(thing)]
    raise TypeError(
        f"{type(thing).__name__} has no form that is the same in another process: "
        "give the task a key, or make its payload of plain values"
    )


def _told_apart(thing: Any) -> Any:
    """Return a payload with the type of what JSON would make equal to something else: tuples, keys that are no text."""
    kind = type(thing)
    if kind in _SCALARS:
        return thing
    if isinstance(thing, dict):
        plain = {key: _told_apart(value) for key, value in thing.items()}
        if all(type(key) is str for key in plain):
            return plain
        return ["dict", *sorted((_encode_key(key), value) for key, value in plain.items())]
    if kind is list:
        return [_told_apart(item) for item in thing]
    if isinstance(thing, tuple):
        return [kind.__qualname__, *map(_told_apart, thing)]
    return [kind.__qualname__, thing.name] if isinstance(thing, Enum) else thing


def _encoder(**options: Any) -> Callable[[Any], str]:
    """Return what makes JSON, of text as it is unless a file could not hold that."""
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, **options).encode
    escape = json.JSONEncoder(separators=(",", ":"), **options).encode

    def encoded(value: Any) -> str:
        text = encode(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # half of a surrogate pair
                return escape(value)
        return text

    return encoded


_encode_key = _encoder(sort_keys=True, default=_stable)
_encode_value = _encoder()

_of_scalar: Final[dict[type, Callable[[Any], str]]] = {
    int: int.__repr__,
    str: _encode_value,
    float: _encode_value,
    bool: _encode_value,
    type(None): _encode_value,
}


def _is_scalar(value: Any) -> bool:
    """Say whether a value is so plain that its form as JSON need not be looked at before it is written."""
    kind = type(value)
    return kind in _SCALARS and (kind is not int or -_GREAT < value < _GREAT)


def _scalar(value: Any) -> str:
    """Return a plain value as JSON."""
    return _of_scalar[type(value)](value)


def _key_of(text: str) -> tuple[str, str | None]:
    """Return the key of a text, and the text where the key does not say it."""
    if len(text) <= _LONGEST_KEY:
        return text, None
    return "#" + blake2b(text.encode("utf-8"), digest_size=16).hexdigest(), text


def _entry_of(attempt: Attempt) -> Entry:
    """Return a new entry of a task."""
    task: Task[Any] | None = attempt.task
    payload = attempt.payload if task is None else task.payload
    if task is not None and task.key is not None:
        key, _ = _key_of("=" + _encode_key(task.key))
        try:
            return Entry(key, _encode_key(_told_apart(payload)))
        except TypeError:  # its key is enough
            return Entry(key, None)
    text = _encode_key(_told_apart(payload))
    if not isinstance(task, Query):
        return Entry(*_key_of(text))
    of = _encode_key([attempt.lane.name, task.level, _told_apart(task.node)])
    return Entry(_key_of(of + text)[0], text)


def _said_by(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()


def _error_of(status: TaskStatus, said: str | None) -> QEngineError:
    """Return what stands for the error that a task had in another process."""
    name, _, text = (said or "").partition(": ")
    if status is TaskStatus.FAILED:
        return TaskError(text)
    return TaskTimeoutError(text) if status is TaskStatus.TIMEOUT else QEngineError(f"{name}: {text}")
