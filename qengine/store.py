"""What outlives a process, in one file for several of them: limits and quotas that a machine's processes share.

Rules: each method is one transaction.  SQLite is loaded when a store is made, not before.
"""

from __future__ import annotations

import os
from typing import Self

from .limit_store import LimitStore, Look, Part, Slot
from .sqlite_limits import LIMITS, SqliteLimits
from .sqlite_quotas import (
    QUOTAS,
    QuotaAnswer,
    QuotaCounts,
    QuotaSettlement,
    QuotaStore,
    QuotaTerms,
    SqliteQuotas,
)

__all__ = [
    "LimitStore",
    "Look",
    "Part",
    "QuotaAnswer",
    "QuotaCounts",
    "QuotaSettlement",
    "QuotaStore",
    "QuotaTerms",
    "Slot",
    "SqliteStore",
]


class SqliteStore(SqliteLimits, SqliteQuotas):
    """A file in which limits and quotas are kept for all processes of one machine.

    Args:
        path: Where; made if it is not there.  On a disk of this machine: a file on a network has no locks to rely on.
        synchronous: "NORMAL": what was taken survives the end of the process, however that comes; "FULL": a power cut
            too, for half a millisecond a permit or more.

    Any number of limiters and quotas, with different keys and different limits, may have it; each process makes its own
    of the same path.  After a fork the child opens the file anew.

    Thread-safe.  A permit costs a transaction: tens of microseconds, and O(slots of the window) where there is one.

    Raises:
        StorageError: The file cannot be opened or is not ours, here and wherever it is used; nothing was changed.

    >>> from tempfile import TemporaryDirectory
    >>> from qengine import RateLimit, RateLimiter
    >>> folder = TemporaryDirectory()
    >>> path = f"{folder.name}/limits.db"
    >>> with SqliteStore(path) as store, SqliteStore(path) as other:  # as in two programs
    ...     mine = RateLimiter(RateLimit(per_hour=1, burst=2), store=store, key="api")
    ...     yours = RateLimiter(RateLimit(per_hour=1, burst=2), store=other, key="api")
    ...     [limiter.try_acquire() for limiter in (mine, yours, mine, yours)]
    [True, True, False, False]
    >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: str = "NORMAL") -> None:
        from .database import Database, boot_token

        super().__init__(Database(path, LIMITS + QUOTAS, synchronous=synchronous), boot_token())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it is opened again when it is next used."""
        self.database.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self.database.path}>"
