"""A file in which state outlives a process: an SQLite database of ours, and which of its processes are alive.

Rules: each change is one transaction, so a process that is killed at any instant leaves all of it or nothing.  What is
wrong with a file is said before anything in it is touched.  A process is alive as long as it holds a lock, which the
system takes from it at its end, however that comes; its number is never given to another.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Final, TypeVar

from .errors import StorageError, refuse, refuse_type, require_choice
from .forks import restart_after_fork

if sys.platform == "win32":  # pragma: no cover - not on the systems that are tested
    import msvcrt
else:
    import fcntl

T = TypeVar("T")

APPLICATION_ID: Final = 0x716E676E
"""Says in a file's header whose it is: "qngn"."""

VERSION: Final = 1
"""The version of the tables; a file of a later one is left alone."""

BUSY_SECONDS: Final = 10.0
"""How long another process's transaction is waited for: each is short."""

WRITER: Final = 0
"""The number under which there is at most one process: that which writes the journal."""

_LEAST: Final = 512
"""Bytes of a file of ours, at the least."""

_PROCESSES: Final = """
CREATE TABLE IF NOT EXISTS processes (  -- all that have opened the file
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    pid INTEGER NOT NULL,
    opened_at REAL NOT NULL  -- seconds since the epoch
);
"""

_SAYS: Final = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it may not be written to",
    sqlite3.SQLITE_PERM: "it may not be opened",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: is its folder there, and may it be written to?",
    sqlite3.SQLITE_BUSY: f"another program has locked it for more than {BUSY_SECONDS:g} s",
    sqlite3.SQLITE_CORRUPT: "it is damaged",
    sqlite3.SQLITE_NOTADB: "it is no file of qengine's",
}


def boot_token() -> str | None:
    """Return what is the same for all processes since the system has started; None where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


class Database:
    """A connection to a file of ours.  Thread-safe; one transaction at a time.

    Args:
        path: Where; made if it is not there.
        schema: The tables of whoever opens it, each made if it is not there.
        synchronous: "FULL": what is committed survives a power cut; "NORMAL": the end of the process, however it comes.
        read_only: Only look; then the file must be there.
        is_checked: Whether this process has found it whole before.

    Raises:
        StorageError: It cannot be opened, is damaged, or is not ours; nothing was changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: str,
        *,
        synchronous: str = "FULL",
        read_only: bool = False,
        is_checked: bool = False,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or isinstance(path, bytes):
            refuse_type("path", path, "the name of a file")
        if not str(path):
            refuse("path", path, "the name of a file")
        require_choice("synchronous", synchronous, ("FULL", "NORMAL"))
        self.path = Path(path).absolute()  # it is opened again by that, wherever the process is by then
        self._schema = schema
        self._synchronous = synchronous
        self._read_only = read_only
        self._is_checked = is_checked
        self._is_shut = False
        self._left_to_parent: list[object] = []
        self._connection: sqlite3.Connection | None
        self.start_afresh()
        self._open()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Open it anew when it is next used: after a fork the connection is the parent's."""
        self._left_to_parent.append(getattr(self, "_connection", None))  # not even closed here
        self._connection = None
        self._lock = RLock()
        self._is_at_it = False
        self._process: int | None = None
        self._presence = Presence.of(self.path)

    def transact(self, work: Callable[[sqlite3.Connection], T], *, only_reads: bool = False) -> T:
        """Do some work as one transaction, in which nobody else writes; all of it is committed, or nothing.

        What only reads sees what was committed when it began, and holds up nobody.

        Raises:
            StorageError: It could not be.
        """
        with self._lock:
            connection = self._opened()
            if self._is_at_it:  # and so is this thread
                raise StorageError(f"cannot use {self.path}: a signal handler came back to it in a transaction")
            try:
                self._is_at_it = True
                self._roll_back(connection)  # what a signal handler has left, that raised at the end of one
                connection.execute("BEGIN" if self._read_only or only_reads else "BEGIN IMMEDIATE")
                result = work(connection)
                connection.execute("COMMIT")
                return result
            except sqlite3.Error as error:
                raise self._says(error) from error
            finally:
                self._is_at_it = False
                self._roll_back(connection)

    @staticmethod
    def _roll_back(connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    @property
    def process(self) -> int:
        """The number of this process, under which others see that it is alive."""
        with self._lock:
            if self._process is None:
                self._process = self.transact(self._enter)
            return self._process

    def is_alive(self, process: int) -> bool:
        """Say whether a process has not ended."""
        return self._presence.is_held(process)

    def claim(self, number: int) -> bool:
        """Be, until the end of this process or `yield_claim`, the one of that number; return False if another is."""
        return self._presence.hold(number)

    def yield_claim(self, number: int) -> None:
        """Be it no more."""
        self._presence.let_go(number)

    def close(self) -> None:
        """Close the connection until it is used again; harmless if it is closed."""
        with self._lock:
            connection, self._connection = self._connection, None
            if self._process is not None:
                self._presence.let_go(self._process)
                self._process = None
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()

    def shut(self) -> None:
        """Close the connection for good: whoever comes to use it after that gets a StorageError."""
        with self._lock:
            self._is_shut = True
            self.close()

    def _enter(self, connection: sqlite3.Connection) -> int:
        added = connection.execute("INSERT INTO processes (pid, opened_at) VALUES (?, ?)", (os.getpid(), time.time()))
        number = added.lastrowid
        assert number is not None
        self._presence.hold(number)
        return number

    def _opened(self) -> sqlite3.Connection:
        if self._is_shut:
            raise StorageError(f"cannot use {self.path}: it was closed")
        return self._connection or self._open()

    def _open(self) -> sqlite3.Connection:
        """Open the file, and see that it is ours and whole."""
        if self._read_only and not self.path.exists():
            raise StorageError(f"cannot read {self.path}: it is not there")
        with suppress(OSError):
            if 0 < self.path.stat().st_size < _LEAST:  # which SQLite would take for an empty one
                raise StorageError(f"cannot use {self.path}: it is no file of qengine's; nothing in it was changed")
        connection: sqlite3.Connection | None = None
        try:
            mode = "ro" if self._read_only else "rwc"
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
            self._check(connection)
            if not self._read_only:
                self._prepare(connection)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise self._says(error) from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self._connection = connection
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse a file that is not ours, that a later version has written, or of which a part is missing."""
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if not tables and not application and not version:
            if self._read_only:
                raise StorageError(f"cannot read {self.path}: it is empty")
            return  # it is new
        if application != APPLICATION_ID:
            raise StorageError(f"cannot use {self.path}: it is no file of qengine's; nothing in it was changed")
        if version > VERSION:
            raise StorageError(
                f"cannot use {self.path}: a later version of qengine has written it (tables of version {version}, "
                f"known here are those up to {VERSION}); nothing in it was changed"
            )
        if not self._is_checked:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise StorageError(f"cannot use {self.path}: it is damaged ({found}); nothing in it was changed")
            self._is_checked = True

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make what is missing, in one transaction, in the file itself: who reads only its header finds it ours."""
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={VERSION}")
            for statement in (_PROCESSES + self._schema).split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            self._roll_back(connection)
        connection.execute("PRAGMA journal_mode=WAL")

    def _says(self, error: sqlite3.Error) -> StorageError:
        """Return what an error of SQLite's means for whoever gave the file."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        said = _SAYS.get(code & 0xFF)
        if code & 0xFF == sqlite3.SQLITE_IOERR:
            said = f"reading or writing failed ({error})"
        elif isinstance(error, sqlite3.ProgrammingError) and said is None:
            said = f"it is closed ({error})"
        return StorageError(f"cannot use {self.path}: {said or error}; what it held before is untouched")


class Presence:
    """Which processes that use a file are alive: each holds a lock on a byte of its own, in a file beside it.

    One for each file in a process: to close a second descriptor would give up the locks of the first.
    """

    _known: Final[dict[str, Presence]] = {}

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None
        self._held: set[int] = set()
        self._pid = os.getpid()
        self._lock = RLock()

    @classmethod
    def of(cls, path: Path) -> Presence:
        """Return that of a file, whichever way it is named."""
        name = f"{os.path.realpath(path)}-lock"
        known = cls._known.get(name)
        if known is None or known._pid != os.getpid():  # a forked child has none of its parent's locks
            known = cls._known[name] = Presence(name)
        return known

    def hold(self, number: int) -> bool:
        """Hold a lock; return False if somebody has it, be it in this process."""
        with self._lock:
            if number not in self._held and self._try(number):
                self._held.add(number)
                return True
            self._rest()
            return False

    def let_go(self, number: int) -> None:
        """Hold it no more."""
        with self._lock:
            if number in self._held:
                self._held.discard(number)
                self._unlock(number)
                self._rest()

    def is_held(self, number: int) -> bool:
        """Say whether somebody has it."""
        with self._lock:
            if number in self._held:
                return True
            is_free = self._try(number)
            if is_free:
                self._unlock(number)
            self._rest()
            return not is_free

    def _rest(self) -> None:
        """Close the file as long as nothing in it is held."""
        if not self._held and self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _opened(self) -> int:
        if self._file is None:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            except OSError as error:
                raise StorageError(f"cannot use {self._path}: {error.strerror}") from error
        return self._file

    if sys.platform == "win32":  # pragma: no cover - not on the systems that are tested

        def _try(self, number: int) -> bool:
            os.lseek(self._opened(), number, os.SEEK_SET)
            try:
                msvcrt.locking(self._opened(), msvcrt.LK_NBLCK, 1)
            except OSError:
                return False
            return True

        def _unlock(self, number: int) -> None:
            os.lseek(self._opened(), number, os.SEEK_SET)
            msvcrt.locking(self._opened(), msvcrt.LK_UNLCK, 1)

    else:

        def _try(self, number: int) -> bool:
            try:
                fcntl.lockf(self._opened(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise StorageError(f"cannot use {self._path}: no locks to be had ({error.strerror})") from error
                return False
            return True

        def _unlock(self, number: int) -> None:
            fcntl.lockf(self._opened(), fcntl.LOCK_UN, 1, number)
