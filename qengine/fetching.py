"""How an engine takes from limits and quotas that several processes share: in a worker, where a file may take its time.

Rules: one permit at a time for each lane of a run, fetched when all else has said yes: so a run is at most one slot
ahead of what it uses.  A quota is reserved first, for what a rate has given cannot always be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .core.lane import Feed, FeedKind
from .core.limits import part_of
from .core.purse import Tariff
from .core.quota import Hold
from .core.supply import Permit, Supply
from .drivers.clock import Clock
from .errors import StorageError
from .model import Amount
from .probe import Answers
from .quota import StoredAccount
from .stored_line import StoredLine


class FetchedAccount:
    """A quota in a store, as a lane's purse takes from it: what was fetched."""

    def __init__(self, account: StoredAccount) -> None:
        self.account = account
        self.unit = account.unit
        self.hold: Hold | None = None

    @property
    def limit(self) -> float:
        """How much may be used in a period."""
        return self.account.limit

    @property
    def remaining(self) -> float:
        """What is neither reserved nor used in this period, as far as is known."""
        return self.account.remaining

    @property
    def unused(self) -> float:
        """What is not used in this period, as far as is known."""
        return self.account.unused

    def fits(self, amount: float) -> bool:
        """Say yes: whether it is there is found out when it is fetched."""
        return True

    might_fit = fits

    def reserve(self, amount: float) -> Hold | None:
        """Hand out what was fetched."""
        hold, self.hold = self.hold, None
        return hold

    def note(self) -> Hold:
        """Reserve nothing."""
        return self.account.note()

    def settle(self, hold: Hold, used: float | None = None) -> object:
        """Turn what was reserved into what was used; written with what is fetched next."""
        return self.account.settle(hold, used)

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved."""
        self.account.undo(hold)


class Fetcher:
    """Fetches for one lane of a run.

    Args:
        lines: Its limits that are in a store.
        accounts: Its quotas that are.
        tariff: What its calls cost.
        clock: The run's.
        lend: Makes an async function of a plain one, where nothing may block; None for threads.
    """

    def __init__(
        self,
        lines: Sequence[StoredLine],
        accounts: Sequence[FetchedAccount],
        tariff: Tariff,
        clock: Clock,
        lend: Callable[[Callable[[], Any]], Callable[[], Any]] | None,
    ) -> None:
        self._lines = lines
        self._accounts = accounts
        self._tariff = tariff
        self._clock = clock
        fetched = iter(self.fetch, None) if lend is None else Answers(lend(self.fetch))
        feed = Feed(FeedKind.SUPPLY, lambda: fetched, lambda permits: permits, label="store", handful=1)
        self.supply = Supply(feed, self.close)

    def fetch(self) -> tuple[Permit | None, ...]:
        """Tell what is to be told, and return what is wanted, None if there is nothing left; for a worker.

        Raises:
            StorageError: The store cannot be used.
        """
        supply = self.supply
        while supply.news:
            kind, what, used = supply.news[0]
            for position, line in enumerate(self._lines):
                if kind == "pause":
                    line.pause(what)
                else:
                    line.settle(what.slots[position], what.amount)
                    self._settle(line, what.amount, used or {})
            supply.news.popleft()
        for account in self._accounts:
            account.account.flush()
        wanted, permit = supply.wanted, supply.permit
        if wanted is None:
            return ()
        if permit is not None and permit.amount == wanted:
            return (self._begun(permit),)
        if permit is not None:
            self._give_back(permit)
        return (self._fetched(wanted),)

    def close(self) -> None:
        """Give back what is not used, and write what is to be written."""
        with suppress(StorageError):  # then it counts as used
            permit, self.supply.permit = self.supply.permit, None
            self.supply.wanted = None
            if permit is not None:
                self._give_back(permit)
            self.fetch()

    def _fetched(self, amount: Amount) -> Permit | None:
        used = self._tariff.used_by(amount if isinstance(amount, Mapping) else {})
        holds: list[Hold] = []
        for fetched in self._accounts:
            part = part_of(amount, "calls") if fetched.unit == "calls" else self._part(amount, used, fetched.unit)
            hold = fetched.account.fetch(part)
            if hold is None:
                for taken, other in zip(holds, self._accounts, strict=False):
                    other.account.undo(taken)
                return None
            holds.append(hold)
        for fetched, taken in zip(self._accounts, holds, strict=True):
            fetched.hold = taken
        return self._permit(amount, [line.fetch(amount) for line in self._lines])

    @staticmethod
    def _part(amount: Amount, used: Mapping[str, float], unit: str) -> float:
        return used.get(unit, 0.0) if isinstance(amount, Mapping) or unit == "cost" else amount

    def _permit(self, amount: Amount, slots: Sequence[Any]) -> Permit:
        now = self._clock.now()
        pairs = [(line, slot) for line, slot in zip(self._lines, slots, strict=True)]
        due_at = max((now + slot.due_at / 1e9 - line.now_fn() for line, slot in pairs), default=now)
        good_until = min((now + slot.good_until / 1e9 - line.now_fn() for line, slot in pairs), default=float("inf"))
        is_begun = all(slot.is_begun for slot in slots)
        settles = any(line.limits.has_windows for line in self._lines)
        return Permit(amount, min(due_at, now) if is_begun else due_at, good_until, is_begun, slots, settles)

    def _begun(self, permit: Permit) -> Permit | None:
        """Return a permit whose instant has come, begun; or one for later."""
        slots = []
        for line, slot in zip(self._lines, permit.slots, strict=True):
            again = line.begin(slot, permit.amount) if line.is_good(slot) else None
            if again is None:
                slot = line.fetch(permit.amount, instead_of=slot)
            elif again:
                permit.due_at = self._clock.now() + again - line.now_fn()
                return permit
            else:
                slot = slot._replace(is_begun=True)
            slots.append(slot)
        return self._permit(permit.amount, slots)

    def _give_back(self, permit: Permit) -> None:
        for line, slot in zip(self._lines, permit.slots, strict=True):
            line.give_back(slot.ticket)
        for fetched in self._accounts:
            unused = fetched.reserve(0)
            if unused is not None:
                fetched.account.undo(unused)
                fetched.account.flush()

    @staticmethod
    def _settle(line: StoredLine, amount: Amount, used: Mapping[str, float]) -> None:
        for unit in line.limits.units & used.keys() - {"calls"}:
            more = used[unit] - part_of(amount, unit)
            if more > 0:
                line.charge({unit: more})
            elif more < 0:
                line.refund({unit: -more})

