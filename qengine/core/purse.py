"""What a call costs, and what a lane pays it from: budgets of one run and quotas of the calendar, in any unit.

Rules: several allowances are all-or-nothing: all are asked, then all reserved, and a refused call has taken nothing.
What is reserved when a call is admitted is an estimate; when it is over that becomes what it really used, so that an
allowance is exceeded by no more than calls in flight have used beyond their estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import refuse
from ..model import Amount
from .limits import part_of
from .quota import Allowance, Hold, Ledger

RECORDABLE = frozenset({"cost", "tokens"})
"""Units that are counted everywhere; others are those of limits, allowances and prices."""

Parts = Sequence[float]
"""How much of each allowance a call is, in their order."""


class Tariff:
    """What a call of one source costs: so much each, so much for each of some unit that it uses, or both.

    Args:
        cost: A number, of each call; or prices by unit, of which that of "calls" is of each call.
    """

    __slots__ = ("_per_call", "_prices")

    def __init__(self, cost: float | Mapping[str, float] = 0.0) -> None:
        prices = dict(cost) if isinstance(cost, Mapping) else {"calls": cost}
        self._per_call = prices.pop("calls", 0.0)
        self._prices = prices

    @property
    def units(self) -> set[str]:
        """What has a price."""
        return set(self._prices)

    @property
    def price_of_one(self) -> float:
        """What a call costs that uses one of each unit that has a price: which of two is dearer by what is known."""
        return self._per_call + sum(self._prices.values())

    @property
    def is_free(self) -> bool:
        """Whether a call costs nothing, unless it says so itself."""
        return not (self._per_call or any(self._prices.values()))

    def used_by(self, amount: Amount, recorded: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return what a call uses, by unit: what it has recorded, else what its amount names, else what any costs.

        It has an entry "cost" unless it is free.  A price goes by what was recorded, if that has a price, whatever its
        amount has said of the cost; but not where the cost itself was recorded.
        """
        used: dict[str, float] = {}
        if isinstance(amount, Mapping):
            used.update(amount)
            used.pop("calls", None)  # one call is one, whatever it counts in a limit
        if recorded is not None:
            if "cost" not in recorded and not self._prices.keys().isdisjoint(recorded):
                used.pop("cost", None)
            used.update(recorded)
        if "cost" not in used and not self.is_free:
            used["cost"] = self._per_call + sum(price * used.get(unit, 0.0) for unit, price in self._prices.items())
        return used

    def completed(self, amount: Amount, recorded: Mapping[str, float]) -> dict[str, float]:
        """Return what a call has recorded, with what that costs where it has a price."""
        if "cost" in recorded or self._prices.keys().isdisjoint(recorded):
            return dict(recorded)
        return {**recorded, "cost": self.used_by(amount, recorded).get("cost", 0.0)}


class Budget(Ledger):
    """What may be used of a unit in one run."""

    __slots__ = ("unit",)

    def __init__(self, unit: str, limit: float) -> None:
        super().__init__(limit)
        self.unit = unit


class Purse:
    """The allowances that every call of a lane is paid from.

    Args:
        allowances: Those of its own, and those that it shares with others.
        tariff: What its calls cost.
        pooled: Of the allowances, those that all sources of the run share.  One of "cost" that is used up holds nobody
            back whose calls are free, as far as is known.
    """

    __slots__ = ("_is_free", "_pooled_cost", "_tariff", "_units_beside", "allowances", "has_own")

    def __init__(self, allowances: Sequence[Allowance], tariff: Tariff, pooled: Sequence[Allowance] = ()) -> None:
        self.allowances = (*allowances, *pooled)
        self.has_own = bool(allowances)
        self._tariff = tariff
        self._units_beside = sorted(self.units - {"calls", "cost"})
        self._is_free = tariff.is_free
        self._pooled_cost = frozenset(allowance for allowance in pooled if allowance.unit == "cost")

    @property
    def units(self) -> set[str]:
        """What its allowances count."""
        return {allowance.unit for allowance in self.allowances}

    def parts(self, amount: Amount) -> Parts:
        """Return how much of each allowance an amount is: of a budget of calls one, of all else what it would use."""
        used = self._tariff.used_by(self.named(amount))
        return [
            used.get(allowance.unit, 0.0) if allowance.unit != "calls" else self._calls(allowance, amount)
            for allowance in self.allowances
        ]

    @staticmethod
    def _calls(allowance: Allowance, amount: Amount) -> float:
        return 1.0 if isinstance(allowance, Budget) else part_of(amount, "calls")

    def named(self, amount: Amount) -> Mapping[str, float]:
        """Return an amount by unit: a number counts in every unit that is counted here."""
        return amount if isinstance(amount, Mapping) else dict.fromkeys(self._units_beside, amount)

    def check(self, amount: Amount) -> None:
        """Refuse an amount that could never be had."""
        for allowance, part in zip(self.allowances, self.parts(amount), strict=True):
            if part > allowance.limit > 0:  # with nothing at all it is skipped, like every other
                kind = "budget" if isinstance(allowance, Budget) else "quota"
                refuse("amount", amount, f"at most {allowance.limit:.12g} {allowance.unit}: the {kind} never has more")

    def fits(self, parts: Parts) -> bool:
        """Say whether all of it is there."""
        return all(
            allowance.fits(part) or self.lets_pass(allowance, part)
            for allowance, part in zip(self.allowances, parts, strict=True)
        )

    def might_fit(self, parts: Parts) -> bool:
        """Say whether all of it is there, or would be if what is reserved were not used after all; a call always is."""
        return all(
            (allowance.fits if allowance.unit == "calls" else allowance.might_fit)(part)
            or self.lets_pass(allowance, part)
            for allowance, part in zip(self.allowances, parts, strict=True)
        )

    def is_within(self, parts: Parts, share: float, in_flight: Mapping[Allowance, int]) -> bool:
        """Say whether with this call no more would be reserved than a share of what has not been used.

        `in_flight`: calls that an allowance has reserved something for.  Where there are none, one may always be.
        """
        return all(
            not part
            or not in_flight[allowance]
            or allowance.unused - allowance.remaining + part <= share * allowance.unused
            for allowance, part in zip(self.allowances, parts, strict=True)
        )

    def reserve(self, parts: Parts) -> list[Hold] | None:
        """Reserve all of it, or nothing; None if it is not there."""
        holds: list[Hold] = []
        for allowance, part in zip(self.allowances, parts, strict=True):
            hold = allowance.reserve(part)
            if hold is None and self.lets_pass(allowance, part):
                hold = allowance.note()
            if hold is None:
                self.undo(holds)
                return None
            holds.append(hold)
        return holds

    def settle(self, holds: Sequence[Hold], used: Mapping[str, float] | None) -> None:
        """Turn what was reserved into what was used; a unit that is not named, and None all of them, as reserved."""
        if used and used.get("cost"):
            self._is_free = False
        for allowance, hold in zip(self.allowances, holds, strict=True):
            allowance.settle(hold, None if used is None or allowance.unit == "calls" else used.get(allowance.unit))

    def undo(self, holds: Sequence[Hold]) -> None:
        """Take back what was reserved, settled or not: it was never made use of."""
        for allowance, hold in zip(self.allowances, holds, strict=False):  # fewer where one was refused
            allowance.undo(hold)

    @property
    def remaining(self) -> dict[str, float]:
        """What is neither reserved nor used, by unit: of several allowances of a unit the least."""
        remaining: dict[str, float] = {}
        for allowance in self.allowances:
            left = allowance.remaining
            remaining[allowance.unit] = min(left, remaining.get(allowance.unit, left))
        return remaining

    def lets_pass(self, allowance: Allowance, part: float) -> bool:
        """Say whether a call that uses nothing of an allowance is made though that is used up."""
        return not part and self._is_free and allowance in self._pooled_cost
