"""The limits of `LimitStore` in a file of ours: one row for each limit of a key, one more for each slot of a window.

Rules: each method is one transaction, and the clock is read when it has begun.  What is undone or refused is worked out
first and written at the end.  Instants are nanoseconds of the monotonic clock, which all processes of a machine have in
common until it is started again; what was left then is moved to the new one by the wall time that has passed, which is
never taken for less than nothing.

A rate and a burst are kept with what they made of the state: who comes with others finds the same tokens, or the same
debt, and goes on by its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .core.bucket import CATCH_UP
from .limit_store import ANY_TIME, NOW_OR_NEVER, Look, Part, Slot

if TYPE_CHECKING:
    from sqlite3 import Connection

    from .database import Database

LIMITS: Final = """
CREATE TABLE IF NOT EXISTS limits (  -- the state of each limit of each key; instants in nanoseconds
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    zero_at INTEGER NOT NULL,  -- when the bucket holds nothing; of a window nothing
    most REAL NOT NULL,  -- the burst, and
    interval REAL NOT NULL,  -- the nanoseconds for one, by which zero_at is meant
    ticket INTEGER NOT NULL,  -- of the slot that was taken last; 0 when it was given back
    taken REAL NOT NULL,  -- its amount
    last_at INTEGER NOT NULL,  -- when it is due
    ahead REAL NOT NULL,  -- the largest amount of the slots that were not due yet when it was taken
    paused_until INTEGER NOT NULL,  -- for all limits of the key
    boot TEXT NOT NULL,  -- whose monotonic clock it is: the system's since that start
    seen_at INTEGER NOT NULL,  -- the last change, on that clock
    wall_at INTEGER NOT NULL,  -- and since the epoch
    PRIMARY KEY (key, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS limit_slots (  -- what was taken of windows and has not run out
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    ticket INTEGER NOT NULL,
    size REAL NOT NULL,
    ends_at INTEGER NOT NULL,
    begun INTEGER NOT NULL  -- 0: it is promised from ends_at less the window on, 1: it is used
);
CREATE INDEX IF NOT EXISTS limit_slots_by_end ON limit_slots (key, name, ends_at);
CREATE INDEX IF NOT EXISTS limit_slots_by_ticket ON limit_slots (ticket);
"""

_SECOND: Final = 1_000_000_000
_CATCH_UP: Final = round(CATCH_UP * _SECOND)
_FOREVER: Final = ANY_TIME - 1
_OWN: Final = "own"
"""In place of a boot token: the clock of limiters that brought one."""
_TURNS: Final = 8
"""How often all limits are asked, each time at the instant that one of them named; two or three would do."""
_ROUNDING: Final = 1e-12

_READ: Final = (
    "SELECT name, zero_at, most, interval, ticket, taken, last_at, ahead, paused_until, boot, seen_at, wall_at "
    "FROM limits WHERE key = ?"
)
_WRITE: Final = "INSERT OR REPLACE INTO limits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SLOTS: Final = "FROM limit_slots WHERE key = ? AND name = ? AND ends_at > ?"


class SqliteLimits:
    """What `SqliteStore` does for limits.

    Args:
        database: The file.
        boot: What is the same for all processes since the system has started; None where it does not say.
    """

    def __init__(self, database: Database, boot: str | None) -> None:
        self.database = database
        self._boot = boot or ""
        self.now = time.monotonic
        self._monotonic_ns = time.monotonic_ns
        self._time_ns = time.time_ns

    def take(
        self,
        key: str,
        parts: Sequence[Part],
        ticket: int,
        until: int,
        slack: int = 0,
        instead_of: int = 0,
        not_before: int = NOW_OR_NEVER,
        now: int | None = None,
    ) -> Slot | None:
        """Take the next slot of every limit, or of none: see `LimitStore`."""

        def work(connection: Connection) -> Slot | None:
            book = self._open(connection, key, parts, now)
            if instead_of:
                book.undo(instead_of)
            due_at, bases = book.ask(parts, slack, not_before)
            if due_at <= max(book.now, until):
                return book.take(parts, ticket, due_at, bases)
            if instead_of:
                book.write()
            return None

        return self.database.transact(work)

    def begin(self, key: str, parts: Sequence[Part], ticket: int, now: int | None = None) -> int | None:
        """Begin to use a slot whose instant has come: see `LimitStore`."""
        only_reads = not any(part.is_window for part in parts)
        return self.database.transact(partial(self._begin, key, parts, ticket, now), only_reads=only_reads)

    def give_back(self, key: str, ticket: int) -> bool:
        """Give back a slot that will not be used: see `LimitStore`."""

        def work(connection: Connection) -> bool:
            undone = connection.execute(
                "UPDATE limits SET zero_at = zero_at - CAST(taken * interval AS INTEGER), ticket = 0 "
                "WHERE key = ? AND ticket = ?",
                (key, ticket),
            )
            dropped = connection.execute("DELETE FROM limit_slots WHERE ticket = ?", (ticket,))
            return undone.rowcount + dropped.rowcount > 0

        return self.database.transact(work)

    def look(self, key: str, parts: Sequence[Part], now: int | None = None) -> Look:
        """Look, and change nothing: see `LimitStore`."""

        def work(connection: Connection) -> Look:
            book = self._open(connection, key, parts, now)
            due_at, _ = book.ask(parts)
            return Look(book.now, due_at, book.paused_until, book.available(parts))

        return self.database.transact(work, only_reads=True)

    def change(self, key: str, parts: Sequence[Part], now: int | None = None) -> None:
        """Take amounts at once, or give them back: see `LimitStore`."""

        def work(connection: Connection) -> None:
            book = self._open(connection, key, parts, now)
            for part, state in zip(parts, book.states, strict=True):
                if part.is_window and part.amount < 0:
                    book.drop_slots(part.name, -part.amount)
                elif part.is_window:
                    book.add_slot(part, 0, book.now, begun=True)
                elif part.amount < 0:
                    state.refund(-part.amount, book.now)
                else:
                    state.zero_at = max(state.zero_at, book.now - state.span) + state.cost(part.amount)
            book.write()

        self.database.transact(work)

    def pause(self, key: str, parts: Sequence[Part], nanoseconds: int, now: int | None = None) -> None:
        """Let nothing through for so long: see `LimitStore`."""

        def work(connection: Connection) -> None:
            book = self._open(connection, key, parts, now)
            book.paused_until = max(book.paused_until, book.now + nanoseconds)
            book.write()

        self.database.transact(work)

    def _begin(
        self, key: str, parts: Sequence[Part], ticket: int, now: int | None, connection: Connection
    ) -> int | None:
        book = self._open(connection, key, parts, now)
        windows = [part for part in parts if part.is_window and part.amount]
        mine: list[tuple[int, Part]] = []
        has_begun = bool(windows)
        for part in windows:
            values = (key, part.name, book.now, ticket)
            found = connection.execute(f"SELECT id, begun {_SLOTS} AND ticket = ?", values).fetchone()
            if found is None:
                return None
            mine.append((found[0], part))
            has_begun = has_begun and bool(found[1])
        at = book.now if has_begun else max(book.now, book.paused_until)
        if not has_begun:
            for number, part in mine:
                at = max(at, book.room_at(part, at, number))
        for number, part in mine:
            connection.execute(
                "UPDATE limit_slots SET begun = ?, ends_at = ? WHERE id = ?",
                (at <= book.now, at + _nanoseconds(part.seconds), number),
            )
        return 0 if at <= book.now else at

    def _open(self, connection: Connection, key: str, parts: Sequence[Part], now: int | None) -> _Book:
        boot, instant = (self._boot, self._monotonic_ns()) if now is None else (_OWN, now)
        return _Book(connection, key, parts, boot, instant, self._time_ns())


class _State:
    """The row of a limit."""

    __slots__ = (
        "ahead", "boot", "interval", "last_at", "most", "name", "paused_until", "seen_at", "taken", "ticket", "wall_at",
        "zero_at",
    )

    zero_at: int
    most: float
    interval: float
    last_at: int

    def __init__(self, row: Iterable[Any]) -> None:
        (
            self.name, self.zero_at, self.most, self.interval, self.ticket, self.taken, self.last_at, self.ahead,
            self.paused_until, self.boot, self.seen_at, self.wall_at,
        ) = row

    @property
    def span(self) -> int:
        return self.cost(self.most)

    def cost(self, amount: float) -> int:
        """Return the nanoseconds that an amount takes; rounded up, for the rate to hold."""
        return math.ceil(min(amount * self.interval, _FOREVER / 2))

    def go_by(self, part: Part, now: int) -> None:
        """Have the rate and the burst of who has come, with the tokens or the debt that there are."""
        interval = part.seconds * _SECOND
        if (self.most, self.interval) != (part.most, interval):
            tokens = min(self.most, part.most, (now - self.zero_at) / self.interval)
            self.most, self.interval = part.most, interval
            if tokens >= self.most:
                self.zero_at = now - self.span
            else:
                self.zero_at = now - math.floor(tokens * interval)

    def refund(self, amount: float, now: int) -> None:
        """Have more, but no more than a burst: neither now, nor when the last slot is due that somebody waits for."""
        full = now - self.span
        if self.last_at > now:
            full = max(full, self.last_at - self.span + self.cost(self.ahead))
        self.zero_at = max(self.zero_at - self.cost(amount), min(self.zero_at, full))


class _Book:
    """The limits of a key, within a transaction.

    Attributes:
        states: One for each of the parts, in their order.
    """

    def __init__(
        self, connection: Connection, key: str, parts: Sequence[Part], boot: str, now: int, wall: int
    ) -> None:
        self._connection = connection
        self._key = key
        self._boot = boot
        self._wall = wall
        self.now = now
        rows = {row[0]: _State(row) for row in connection.execute(_READ, (key,))}
        self._moved: dict[str, int] = {}  # by which the slots of windows are off
        for state in rows.values():
            self._catch_up(state)
        self.paused_until: int = max([state.paused_until for state in rows.values()], default=0)
        self.states = [rows.get(part.name) or self._new(part) for part in parts]
        for part, state in zip(parts, self.states, strict=True):
            if not part.is_window:
                state.go_by(part, self.now)

    def _catch_up(self, state: _State) -> None:
        """Bring a row up to this clock: another one since the system was started again, or one that was set back."""
        if state.boot == self._boot and (self._boot or state.seen_at <= self.now):
            self.now = max(self.now, state.seen_at)
            return
        by = self.now - state.seen_at - max(0, self._wall - state.wall_at)
        state.zero_at += by
        state.last_at += by
        state.paused_until += by
        state.boot, state.seen_at = self._boot, self.now
        self._moved[state.name] = by

    def _new(self, part: Part) -> _State:
        interval = part.seconds * _SECOND
        state = _State((part.name, 0, part.most, interval, 0, 0.0, 0, 0.0, 0, self._boot, self.now, self._wall))
        tokens = part.most if part.tokens is None else min(part.most, part.tokens)
        state.zero_at = self.now - state.cost(tokens)
        return state

    def ask(
        self, parts: Sequence[Part], slack: int = 0, not_before: int = NOW_OR_NEVER
    ) -> tuple[int, list[int]]:
        """Return when all parts may be had, `now` if they may be now, and what the slot of each rate is made from."""
        at = max(self.now, self.paused_until, not_before)
        bases: list[int] = []
        for _ in range(_TURNS):
            latest, bases = at, []
            for part, state in zip(parts, self.states, strict=True):
                if part.is_window:
                    bases.append(0)
                    latest = max(latest, self.room_at(part, at))
                else:
                    base = max(state.zero_at, at - state.span - (slack if at <= self.now else 0))
                    bases.append(base)
                    latest = max(latest, base + state.cost(part.amount))
            if latest <= at:
                break
            at = latest
        return at, bases

    def take(self, parts: Sequence[Part], ticket: int, due_at: int, bases: Sequence[int]) -> Slot:
        """Take all parts at an instant, from what `ask` has said, and write it."""
        good_until = _FOREVER
        begun = due_at <= self.now
        for part, state, base in zip(parts, self.states, bases, strict=True):
            if part.is_window:
                self.add_slot(part, ticket, due_at, begun)
            elif part.amount:
                state.ahead = max(state.ahead, part.amount) if state.last_at > self.now else part.amount
                state.last_at = due_at
                state.zero_at = base + state.cost(part.amount)
                state.ticket = ticket
                state.taken = part.amount
                good_until = min(good_until, base + state.span + _CATCH_UP)
        self.write()
        return Slot(ticket, due_at, good_until, begun)

    def room_at(self, part: Part, at: int, mine: int | None = None) -> int:
        """Return from when on a window has room; for the slot `mine`, those promised after it do not count."""
        where, values = _SLOTS, [self._key, part.name, at - self._shift(part.name)]
        if mine is not None:
            where += " AND (begun OR id < ?) AND id != ?"
            values += [mine, mine]
        room = part.most * (1.0 + _ROUNDING)
        (taken,) = self._connection.execute(f"SELECT total(size) {where}", values).fetchone()
        wanted = taken + part.amount
        if wanted <= room:
            return at
        for ends_at, size in self._connection.execute(f"SELECT ends_at, size {where} ORDER BY ends_at", values):
            wanted -= size
            if wanted <= room:
                return int(ends_at) + self._shift(part.name)
        return _FOREVER

    def available(self, parts: Sequence[Part]) -> float:
        """Return what every limit would grant now."""
        found = []
        for part, state in zip(parts, self.states, strict=True):
            if part.is_window:
                values = (self._key, part.name, self.now - self._shift(part.name))
                (taken,) = self._connection.execute(f"SELECT total(size) {_SLOTS}", values).fetchone()
                found.append(part.most - taken)
            else:
                found.append(min(part.most, (self.now - state.zero_at) / state.interval))
        return float(min(found))

    def undo(self, ticket: int) -> None:
        """Have a slot not taken."""
        for state in self.states:
            if state.ticket == ticket:
                state.zero_at -= state.cost(state.taken)
                state.ticket = 0
        self._connection.execute("DELETE FROM limit_slots WHERE ticket = ?", (ticket,))

    def add_slot(self, part: Part, ticket: int, at: int, begun: bool) -> None:
        """Take of a window; what has run out is forgotten."""
        name = part.name
        self._connection.execute(
            "DELETE FROM limit_slots WHERE key = ? AND name = ? AND ends_at <= ?",
            (self._key, name, self.now - self._shift(name)),
        )
        if part.amount:
            self._connection.execute(
                "INSERT INTO limit_slots (key, name, ticket, size, ends_at, begun) VALUES (?, ?, ?, ?, ?, ?)",
                (self._key, name, ticket, part.amount, at + _nanoseconds(part.seconds) - self._shift(name), begun),
            )

    def drop_slots(self, name: str, amount: float) -> None:
        """Give back of a window what was taken last and has not run out."""
        values = (self._key, name, self.now - self._shift(name))
        for number, size in self._connection.execute(f"SELECT id, size {_SLOTS} ORDER BY id DESC", values).fetchall():
            if size > amount:
                self._connection.execute("UPDATE limit_slots SET size = ? WHERE id = ?", (size - amount, number))
                return
            self._connection.execute("DELETE FROM limit_slots WHERE id = ?", (number,))
            amount -= size

    def write(self) -> None:
        """Write all that has become of it."""
        for s in self.states:
            if by := self._shift(s.name):
                self._connection.execute(
                    "UPDATE limit_slots SET ends_at = ends_at + ? WHERE key = ? AND name = ?", (by, self._key, s.name)
                )
            zero_at = min(s.zero_at, _FOREVER)
            self._connection.execute(_WRITE, (
                self._key, s.name, zero_at, s.most, s.interval, s.ticket, s.taken, s.last_at, s.ahead,
                min(self.paused_until, _FOREVER), self._boot, self.now, self._wall,
            ))

    def _shift(self, name: str) -> int:
        return self._moved.get(name, 0)


def _nanoseconds(seconds: float) -> int:
    return math.ceil(min(seconds * _SECOND, _FOREVER / 2))
