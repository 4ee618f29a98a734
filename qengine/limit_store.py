"""What limits that several processes share ask of whatever keeps their state: a small protocol.

Rules: each method is one transaction, in which nobody else reads or writes the key, and calls nothing of ours on the
way: so it can be a script on a server.  Instants are whole nanoseconds on the store's clock, which is one for all
processes, and is read within the transaction.  What a slot is known by, its ticket, is drawn by who takes it, before it
asks: so who is interrupted, and never hears the answer, can give it back all the same.

The rule of a rate is the generic cell rate algorithm over one integer, `zero_at` (see `core/bucket.py`): each taker
gets the next slot, now or later, and is told its instant.  Order between processes is that of their transactions.

Why promise 2 holds for all processes together: a slot is made from a base, which is `zero_at` before it or, where that
is longer ago, what a full bucket has.  It may be used from `due_at`, the base and what it costs, until `good_until`,
the base and a whole burst and CATCH_UP.  Of slots i to j, in the order of the transactions, the sum of the costs is no
more than what lies between the base of i and `due_at` of j: so it is at most a burst and the time between their uses,
and CATCH_UP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from .errors import refuse_type

ANY_TIME: Final = 2**62
"""An instant that does not come."""

NOW_OR_NEVER: Final = -ANY_TIME
"""An instant that has gone by: what is not there at once is not waited for."""


class Part(NamedTuple):
    """What is wanted of one limit."""

    name: str
    """Tells the limits of a key apart."""
    is_window: bool
    """Whether at most `most` in any `seconds` are let through; else one in `seconds`, with a burst of `most`."""
    most: float
    seconds: float
    amount: float
    """Below 0: it is given back."""
    tokens: float | None
    """In the bucket when the store has never heard of it; None for a full one."""


class Slot(NamedTuple):
    """What was taken."""

    ticket: int
    due_at: int
    """When it may be used."""
    good_until: int
    """Until when: who comes later must not, for the rate would not hold, and takes another instead."""
    is_begun: bool
    """Whether it was due in the transaction, by the store's clock: it may be used at once."""


class Look(NamedTuple):
    """How things stand."""

    now: int
    due_at: int
    """When what was asked about could be had by who came now; `now` if that is now."""
    paused_until: int
    available: float
    """What every limit would grant now; below 0 what is promised to others, or a debt."""


@runtime_checkable
class LimitStore(Protocol):
    """Keeps the state of limits for all processes that know it: `SqliteStore` is one.

    `now` is the instant of a limiter that has a clock of its own; None for the store's.
    """

    def now(self) -> float:
        """Return the seconds that the store's clock shows, as well as this process knows: to wait by."""

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
        """Take the next slot of every limit, or of none; None if it would be later than both now and `until`.

        Args:
            key: Whose state.
            parts: What is wanted of each limit.
            ticket: What the slot is to be known by: a positive number of less than 64 bits that nobody else has.
            until: The latest instant.
            slack: Nanoseconds for which a full bucket goes on filling, for who would have come in time.
            instead_of: The ticket of a slot that is given back first.
            not_before: The earliest instant.
            now: The instant.
        """

    def begin(self, key: str, parts: Sequence[Part], ticket: int, now: int | None = None) -> int | None:
        """Begin to use a slot whose instant has come; a window's runs from now, also where it has begun before.

        Returns:
            0 when it has begun; else when to ask again, for there is a pause, or another has begun late.  None: the
            slot has run out, take another.
        """

    def give_back(self, key: str, ticket: int) -> bool:
        """Give back a slot that will not be used; return whether anybody has anything of it.

        That of a rate is lost if another was taken after it: its instant cannot be told to whom waits for that one.
        """

    def look(self, key: str, parts: Sequence[Part], now: int | None = None) -> Look:
        """Look, and change nothing."""

    def change(self, key: str, parts: Sequence[Part], now: int | None = None) -> None:
        """Take amounts at once, be they there or not; those below 0 are given back."""

    def pause(self, key: str, parts: Sequence[Part], nanoseconds: int, now: int | None = None) -> None:
        """Let nothing through for so long; a pause under way is never cut short."""


def require_store(store: object) -> LimitStore:
    """Refuse what lacks a method of a store."""
    if isinstance(store, type):
        refuse_type("store", store, "an object with the methods of LimitStore, not a class")
    if not isinstance(store, LimitStore):
        wanted = [name for name in vars(LimitStore) if not name.startswith("_")]
        lacking = ", ".join([name for name in wanted if not callable(getattr(store, name, None))])
        refuse_type("store", store, f"an object with the methods of LimitStore: it lacks {lacking}")
    return store
