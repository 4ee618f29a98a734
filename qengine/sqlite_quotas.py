"""The counts of quotas in a file: they survive restarts, and several processes share them.

Rules: each method is one transaction, so a process that is killed at any instant has done all of it or nothing.  The
period it is now is the latest in which anybody has reserved: one whose clock steps back, or is slow, opens no earlier
one.  What is reserved is a row until it is settled.  Of a process that has died, what it had begun counts as used,
because the call may have been made, and the rest is free again; the dead are looked for when something does not fit,
and when somebody opens a quota or asks for its counts.  The number of a hold is drawn by who takes it, before it asks:
so who is interrupted, and never hears the answer, can give it back all the same.  The tables are described in `QUOTAS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, runtime_checkable

from .core.quota import Ledger

if TYPE_CHECKING:  # what a quota needs of this module loads no sqlite3
    from sqlite3 import Connection

    from .database import Database

QUOTAS: Final = """
CREATE TABLE IF NOT EXISTS quota_periods (  -- what is used and reserved; of each key the latest is the current one
    key TEXT NOT NULL,
    ends_at REAL NOT NULL,  -- seconds since the epoch
    unit TEXT NOT NULL,  -- what is counted
    per TEXT NOT NULL,  -- how long it is, in words: "per day"
    used NUMERIC NOT NULL,
    reserved NUMERIC NOT NULL,  -- the sum of its holds
    PRIMARY KEY (key, ends_at)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quota_holds (  -- what is reserved and not settled
    id INTEGER PRIMARY KEY,  -- drawn at random
    key TEXT NOT NULL,
    ends_at REAL NOT NULL,  -- of the period in which it was reserved
    amount NUMERIC NOT NULL,
    process INTEGER NOT NULL,  -- whose it is, an id of processes
    begun INTEGER NOT NULL  -- 1: it counts as used when that process dies; 0: it is free again
);
CREATE INDEX IF NOT EXISTS quota_holds_by_process ON quota_holds (process);
"""

KEPT_PERIODS: Final = 400
"""Of each key so many periods stay in the file, for the record: a year of days."""

_LARGEST_INTEGER: Final = 2**63 - 1
"""SQLite knows none that is larger."""


class QuotaTerms(NamedTuple):
    """What all who share a quota agree on: its key, what it counts, and its period in words."""

    key: str
    unit: str
    per: str


class QuotaCounts(NamedTuple):
    """What of a period is used and reserved, and what is counted in it."""

    ends_at: float
    used: float
    reserved: float
    unit: str
    per: str


class QuotaSettlement(NamedTuple):
    """What of a hold in the period that ends at `ends_at` turned out to be used.

    Without a `hold` nothing was reserved, and `used`, which may be below 0, is just added.
    """

    hold: int | None
    ends_at: float
    used: float


class QuotaAnswer(NamedTuple):
    """Whether it was there; the counts of the period it is now; and what `settle_quota` returns."""

    is_granted: bool
    counts: QuotaCounts
    settled: list[QuotaCounts | None]


@runtime_checkable
class QuotaStore(Protocol):
    """Where the counts of quotas are kept.  Thread-safe.

    Each method is atomic and takes plain values, so that it can be one script on a server.  A period is its end; where
    one is given as `ends_at`, it is the period by the caller's clock, and the one that counts is the later of that and
    the latest in the store.  The store knows which process reserves, and whether it is alive.
    """

    def look_at_quota(self, terms: QuotaTerms, ends_at: float) -> QuotaCounts:
        """Return the counts, without what dead processes had reserved."""

    def reserve_quota(
        self,
        terms: QuotaTerms,
        hold: int,
        ends_at: float,
        amount: float,
        limit: float,
        begun: bool,
        settled: Sequence[QuotaSettlement] = (),
    ) -> QuotaAnswer:
        """Settle some, then reserve `amount` if it fits into `limit`, maybe without what dead processes had reserved.

        `hold` is a new number, by which it is known.  Nothing is reserved where the period counts something else.
        """

    def begin_quota(self, hold: int) -> bool:
        """Have a hold count as used if its process dies; return False if it is settled."""

    def settle_quota(self, terms: QuotaTerms, settled: Sequence[QuotaSettlement]) -> list[QuotaCounts | None]:
        """Settle some; return for each the counts of its period after it, None if it had been settled before."""


class SqliteQuotas:
    """What `SqliteStore` does for quotas, in the tables of `QUOTAS`."""

    database: Database

    def look_at_quota(self, terms: QuotaTerms, ends_at: float) -> QuotaCounts:
        """Return the counts: see `QuotaStore`."""

        def look(connection: Connection) -> QuotaCounts | None:
            is_one_open = connection.execute("SELECT 1 FROM quota_holds LIMIT 1").fetchone()
            return None if is_one_open else _latest(connection, terms, ends_at)

        def work(connection: Connection) -> QuotaCounts:
            self._bury(connection)
            return _latest(connection, terms, ends_at)

        return self.database.transact(look, only_reads=True) or self.database.transact(work)

    def reserve_quota(
        self,
        terms: QuotaTerms,
        hold: int,
        ends_at: float,
        amount: float,
        limit: float,
        begun: bool,
        settled: Sequence[QuotaSettlement] = (),
    ) -> QuotaAnswer:
        """Settle some, then reserve `amount`: see `QuotaStore`."""
        process = self.database.process

        def work(connection: Connection) -> QuotaAnswer:
            written = [_settle(connection, terms, one) for one in settled]
            counts = _latest(connection, terms, ends_at)
            agreed = (counts.unit, counts.per) == (terms.unit, terms.per)
            if agreed and not _fits(counts, amount, limit) and self._bury(connection):
                counts = _latest(connection, terms, ends_at)
            if not agreed or not _fits(counts, amount, limit):
                return QuotaAnswer(False, counts, written)
            _begin_period(connection, terms, counts.ends_at)
            _count(connection, terms.key, counts.ends_at, 0, amount)
            connection.execute(
                "INSERT INTO quota_holds (id, key, ends_at, amount, process, begun) VALUES (?, ?, ?, ?, ?, ?)",
                (hold, terms.key, counts.ends_at, _bound(amount), process, begun),
            )
            return QuotaAnswer(True, counts._replace(reserved=counts.reserved + amount), written)

        return self.database.transact(work)

    def begin_quota(self, hold: int) -> bool:
        """Have a hold count as used if its process dies: see `QuotaStore`."""

        def work(connection: Connection) -> bool:
            return connection.execute("UPDATE quota_holds SET begun = 1 WHERE id = ?", (hold,)).rowcount > 0

        return self.database.transact(work)

    def settle_quota(self, terms: QuotaTerms, settled: Sequence[QuotaSettlement]) -> list[QuotaCounts | None]:
        """Settle some: see `QuotaStore`."""
        return self.database.transact(lambda connection: [_settle(connection, terms, one) for one in settled])

    def _bury(self, connection: Connection) -> bool:
        """Settle what dead processes had reserved, of all quotas; return whether there was any."""
        known = connection.execute("SELECT DISTINCT process FROM quota_holds").fetchall()
        dead = [(process,) for (process,) in known if not self.database.is_alive(process)]
        for process in dead:
            left = connection.execute(
                "SELECT key, ends_at, total(amount * begun), total(amount) FROM quota_holds WHERE process = ? "
                "GROUP BY key, ends_at",
                process,
            ).fetchall()
            for key, ends_at, used, amount in left:
                _count(connection, key, ends_at, used, -amount)
        connection.executemany("DELETE FROM quota_holds WHERE process = ?", dead)
        return bool(dead)


def _latest(connection: Connection, terms: QuotaTerms, ends_at: float) -> QuotaCounts:
    """Return the counts of the period that ends at `ends_at`, or of a later one that has begun."""
    row = connection.execute(
        "SELECT ends_at, used, reserved, unit, per FROM quota_periods WHERE key = ? ORDER BY ends_at DESC LIMIT 1",
        (terms.key,),
    ).fetchone()
    return QuotaCounts(ends_at, 0, 0, terms.unit, terms.per) if row is None or row[0] < ends_at else QuotaCounts(*row)


def _fits(counts: QuotaCounts, amount: float, limit: float) -> bool:
    ledger = Ledger(limit)
    ledger.period.used, ledger.period.reserved = counts.used, counts.reserved
    return ledger.fits(amount)


def _begin_period(connection: Connection, terms: QuotaTerms, ends_at: float) -> None:
    """Begin a period, if it has not begun; forget what is older than anybody will ask for."""
    added = connection.execute(
        "INSERT OR IGNORE INTO quota_periods (key, ends_at, unit, per, used, reserved) VALUES (?, ?, ?, ?, 0, 0)",
        (terms.key, ends_at, terms.unit, terms.per),
    )
    if added.rowcount > 0:
        connection.execute(
            "DELETE FROM quota_periods WHERE key = ? AND ends_at < (SELECT ends_at FROM quota_periods "
            "WHERE key = ? ORDER BY ends_at DESC LIMIT 1 OFFSET ?)",
            (terms.key, terms.key, KEPT_PERIODS - 1),
        )


def _settle(connection: Connection, terms: QuotaTerms, settled: QuotaSettlement) -> QuotaCounts | None:
    hold, ends_at, used = settled
    amount = 0
    if hold is None:
        _begin_period(connection, terms, ends_at)
    else:
        held = connection.execute("SELECT ends_at, amount FROM quota_holds WHERE id = ?", (hold,)).fetchone()
        if held is None:
            return None
        ends_at, amount = held
        connection.execute("DELETE FROM quota_holds WHERE id = ?", (hold,))
    _count(connection, terms.key, ends_at, used, -amount)
    row = connection.execute(
        "SELECT ends_at, used, reserved, unit, per FROM quota_periods WHERE key = ? AND ends_at = ?",
        (terms.key, ends_at),
    ).fetchone()
    return QuotaCounts(ends_at, used, 0, terms.unit, terms.per) if row is None else QuotaCounts(*row)


def _count(connection: Connection, key: str, ends_at: float, used: float, reserved: float) -> None:
    connection.execute(
        "UPDATE quota_periods SET used = used + ?, reserved = reserved + ? WHERE key = ? AND ends_at = ?",
        (_bound(used), _bound(reserved), key, ends_at),
    )


def _bound(number: float) -> float:
    """Return a number as SQLite can take it."""
    return number if abs(number) <= _LARGEST_INTEGER else float(number)
