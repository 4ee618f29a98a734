"""What a call costs and what it is paid from, by asserting; and at random, held against a model in plain words."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from core.support import STEADY, Trial, make_lane, payloads

from qengine import Adaptive, Task, TaskStatus
from qengine.core.gate import Gate
from qengine.core.purse import Budget, Purse, Tariff
from qengine.core.quota import Allowance, Hold, Ledger
from qengine.core.steps import Cancel

SUCCEEDED, FAILED, SKIPPED = TaskStatus.SUCCEEDED, TaskStatus.ERROR, TaskStatus.SKIPPED


class Shared(Ledger):
    """What outlives the run, as a quota does."""

    def __init__(self, limit: float, unit: str) -> None:
        super().__init__(limit)
        self.unit = unit


# ---- what a call costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "amount", "recorded", "used"), [
    (0.0, 1, None, {}),
    (0.0, 3, None, {}),
    (0.5, 1, None, {"cost": 0.5}),
    (0.5, 3, None, {"cost": 0.5}),                                          # one call is one, whatever it counts
    (0.5, {"calls": 3}, None, {"cost": 0.5}),
    (0.5, {"tokens": 7}, None, {"tokens": 7, "cost": 0.5}),
    (0.5, {"cost": 2}, None, {"cost": 2}),                                  # the amount has the last word ...
    (0.5, {"cost": 2}, {"cost": 3}, {"cost": 3}),                           # ... but for what was recorded
    (0.5, 1, {"tokens": 4}, {"tokens": 4, "cost": 0.5}),
    (0.5, 1, {"cost": 0}, {"cost": 0}),
    ({"tokens": 0.25}, 1, None, {"cost": 0.0}),                             # nobody knows how many
    ({"tokens": 0.25}, {"tokens": 8}, None, {"tokens": 8, "cost": 2.0}),
    ({"tokens": 0.25}, {"tokens": 8}, {"tokens": 4}, {"tokens": 4, "cost": 1.0}),
    ({"tokens": 0.25}, {"tokens": 8, "cost": 5}, None, {"tokens": 8, "cost": 5}),
    ({"tokens": 0.25}, {"tokens": 8, "cost": 5}, {"tokens": 4}, {"tokens": 4, "cost": 1.0}),    # it is out of date
    ({"tokens": 0.25}, {"tokens": 8, "cost": 5}, {"pages": 4}, {"tokens": 8, "pages": 4, "cost": 5}),
    ({"tokens": 0.25}, {"tokens": 8}, {"tokens": 4, "cost": 7}, {"tokens": 4, "cost": 7}),
    ({"calls": 1.0, "tokens": 0.25, "pages": 2.0}, {"tokens": 8}, {"pages": 3}, {"tokens": 8, "pages": 3, "cost": 9.0}),
    ({"calls": 0.0, "tokens": 0.0}, {"tokens": 8}, None, {"tokens": 8}),
    ({"tokens": 0.0}, {"tokens": 8, "cost": 5}, {"tokens": 4}, {"tokens": 4}),
    ({}, {"tokens": 8}, None, {"tokens": 8}),
])
def test_what_a_call_uses(cost: Any, amount: Any, recorded: Any, used: dict[str, float]) -> None:
    given = dict(amount) if isinstance(amount, dict) else amount
    assert Tariff(cost).used_by(amount, recorded) == used
    assert amount == given


def test_what_is_recorded_is_completed_only_by_what_it_costs_and_where_that_has_a_price() -> None:
    tariff = Tariff({"calls": 1.0, "tokens": 0.5})
    assert tariff.completed({"tokens": 8}, {"tokens": 4}) == {"tokens": 4, "cost": 3.0}
    assert tariff.completed({"tokens": 8}, {"tokens": 4, "cost": 9}) == {"tokens": 4, "cost": 9}
    assert tariff.completed({"tokens": 8}, {"pages": 4}) == {"pages": 4}    # what it costs stays as it was reserved
    assert Tariff(2.0).completed(1, {"tokens": 4}) == {"tokens": 4}
    recorded = {"tokens": 4.0}
    tariff.completed(1, recorded)["tokens"] = 0.0
    assert recorded == {"tokens": 4.0}                                      # a copy: a call may go on recording


@pytest.mark.parametrize(("cost", "free", "units"), [
    (0.0, True, set()), (0.5, False, set()), ({}, True, set()), ({"calls": 0.0}, True, set()),
    ({"calls": 2.0}, False, set()), ({"tokens": 0.0}, True, {"tokens"}), ({"tokens": 1e-9}, False, {"tokens"}),
    ({"calls": 1.0, "tokens": 0.0, "pages": 0.0}, False, {"tokens", "pages"}),
])
def test_what_is_free_and_what_has_a_price(cost: Any, free: bool, units: set[str]) -> None:
    tariff = Tariff(cost)
    assert (tariff.is_free, tariff.units - {"cost"}) == (free, units)
    assert ("cost" in tariff.used_by({"tokens": 1})) is not free


def test_prices_are_taken_as_they_are_at_the_beginning() -> None:
    prices = {"calls": 1.0, "tokens": 2.0}
    tariff = Tariff(prices)
    prices["tokens"] = 9.0
    assert tariff.used_by({"tokens": 3}) == {"tokens": 3, "cost": 7.0}
    assert prices == {"calls": 1.0, "tokens": 9.0}                          # and they are the caller's


# ---- a budget --------------------------------------------------------------------------------------------------------


def test_a_budget_has_no_calendar() -> None:
    budget = Budget("tokens", 10)
    assert (budget.unit, budget.limit, budget.remaining, budget.unused) == ("tokens", 10, 10, 10)
    hold = budget.reserve(4)
    assert hold is not None
    assert (budget.remaining, budget.unused) == (6, 10)
    budget.settle(hold, 7)
    assert (budget.remaining, budget.unused) == (3, 3)


@pytest.mark.parametrize("amount", [0, 1])
def test_of_a_budget_of_nothing_there_is_nothing(amount: float) -> None:
    budget = Budget("tokens", 0)
    assert budget.reserve(amount) is None
    assert not budget.fits(amount) and not budget.might_fit(amount)


def test_what_is_reserved_might_come_back_and_what_is_used_does_not() -> None:
    budget = Budget("cost", 1.0)
    holds = [budget.reserve(0.1) for _ in range(10)]                        # ten times 0.1 fit into 1
    assert None not in holds
    assert not budget.fits(0.1) and not budget.fits(0.0)
    assert budget.might_fit(0.1) and budget.might_fit(1.0) and not budget.might_fit(1.01)
    for hold in holds:
        assert hold is not None and budget.settle(hold)
    assert not budget.might_fit(0.0)


@pytest.mark.parametrize(("limit", "part", "times"), [(1.0, 0.1, 10), (0.3, 0.1, 3), (7e9, 1e9 / 3, 21)])
def test_what_remains_is_nothing_where_no_more_than_rounding_is_left(limit: float, part: float, times: int) -> None:
    budget = Budget("cost", limit)
    for _ in range(times):
        hold = budget.reserve(part)
        assert hold is not None
        budget.settle(hold)
    assert budget.remaining == 0


@pytest.mark.parametrize("used", [1.0 - 1e-6, 1.0 + 1e-6])
def test_a_small_rest_and_a_small_overrun_are_told(used: float) -> None:
    budget = Budget("cost", 1.0)
    hold = budget.reserve(1.0)
    assert hold is not None
    budget.settle(hold, used)
    assert budget.remaining == pytest.approx(1.0 - used) != 0


# ---- a purse ---------------------------------------------------------------------------------------------------------


def taken(purse: Purse, amount: Any) -> list[Hold]:
    holds = purse.reserve(purse.parts(amount))
    assert holds is not None
    return holds


def three(calls: float = 10, tokens: float = 100, cost: float = 5.0, prices: Any = 0.5) -> Purse:
    return Purse([Budget("calls", calls), Budget("tokens", tokens), Budget("cost", cost)], Tariff(prices))


@pytest.mark.parametrize(("amount", "parts"), [
    (1, [1, 1, 0.5]), (3, [1, 3, 0.5]), ({}, [1, 0, 0.5]), ({"tokens": 7}, [1, 7, 0.5]),
    ({"tokens": 7, "cost": 2, "calls": 4}, [1, 7, 2]), ({"calls": 0}, [1, 0, 0.5]),
])
def test_how_much_of_each_an_amount_is(amount: Any, parts: list[float]) -> None:
    assert three().parts(amount) == parts


@pytest.mark.parametrize(("amount", "calls"), [
    (1, 1), (3, 3), ({}, 1), ({"calls": 4, "tokens": 2}, 4), ({"calls": 0}, 0),
])
def test_a_budget_counts_attempts_and_a_quota_of_calls_what_the_amount_says(amount: Any, calls: float) -> None:
    purse = Purse([Budget("calls", 9), Shared(9, "calls")], Tariff(), [Budget("calls", 9)])
    assert purse.parts(amount) == [1, calls, 1]


@pytest.mark.parametrize(("prices", "amount", "recorded", "used"), [
    (0.5, 3, None, {"tokens": 3, "pages": 3, "cost": 0.5}),
    (0.5, 3, {"tokens": 1}, {"tokens": 1, "pages": 3, "cost": 0.5}),
    (0.0, 1, None, {"tokens": 1, "pages": 1}),
    ({"tokens": 0.25}, 4, None, {"tokens": 4, "pages": 4, "cost": 1.0}),
    ({"tokens": 0.25}, 4, {"tokens": 8}, {"tokens": 8, "pages": 4, "cost": 2.0}),
    ({"words": 0.25}, 4, None, {"tokens": 4, "pages": 4, "cost": 0.0}),        # nobody counts words here
    (0.5, {"tokens": 3}, None, {"tokens": 3, "cost": 0.5}),
])
def test_a_number_is_so_much_of_every_unit_that_is_counted_reserved_and_used_alike(
    prices: Any, amount: Any, recorded: Any, used: dict[str, float]
) -> None:
    counted = [Budget("calls", 9), Budget("tokens", 9), Shared(9, "pages"), Budget("cost", 9)]
    purse = Purse(counted[:3], Tariff(prices), counted[3:])
    assert Tariff(prices).used_by(purse.named(amount), recorded) == used
    if recorded is None:
        assert purse.parts(amount) == [1, *(used.get(unit, 0.0) for unit in ("tokens", "pages", "cost"))]
    assert Purse(counted[:1], Tariff(prices)).named(5) == {}       # a call is one, whatever its amount


def test_what_costs_by_its_tokens_is_reserved_by_them() -> None:
    purse = three(prices={"tokens": 0.01})
    assert purse.parts({"tokens": 30}) == [1, 30, 0.3]
    holds = taken(purse, {"tokens": 30})
    purse.settle(holds, {"tokens": 50, "cost": 0.5})
    assert purse.remaining == {"calls": 9, "tokens": 50, "cost": 4.5}


@pytest.mark.parametrize(("lacks", "amount"), [
    ("calls: the quota", {"calls": 11}), ("tokens: the budget", {"tokens": 101}), ("cost: the budget", {"cost": 6}),
    ("tokens: the budget", 101), ("calls: the quota", 11),
])
def test_where_one_says_no_none_has_given_anything(lacks: str, amount: Any) -> None:
    purse = Purse([*three().allowances, Shared(10, "calls")], Tariff(0.5))
    before = purse.remaining
    assert not purse.fits(purse.parts(amount))
    assert purse.reserve(purse.parts(amount)) is None
    assert purse.remaining == before
    with pytest.raises(ValueError, match=f"at most .* {lacks} never has more"):
        purse.check(amount)


def test_a_refusal_of_the_last_undoes_what_was_settled_by_none() -> None:
    purse = three(cost=1.0)
    first, second = taken(purse, 1), taken(purse, 1)
    assert purse.reserve(purse.parts(1)) is None
    assert purse.remaining == {"calls": 8, "tokens": 98, "cost": 0.0}
    purse.settle(first, None)
    purse.undo(second)
    assert purse.remaining == {"calls": 9, "tokens": 99, "cost": 0.5}


def test_calls_are_settled_as_they_were_reserved_and_a_unit_that_is_not_named_too() -> None:
    purse = three()
    quota = Shared(10, "calls")
    purse = Purse([*purse.allowances, quota], Tariff(0.5))
    purse.settle(taken(purse, {"calls": 2, "tokens": 9}), {"calls": 99.0, "cost": 0.25})
    assert purse.remaining == {"calls": 8, "tokens": 91, "cost": 4.75}
    assert (quota.remaining, purse.allowances[0].remaining) == (8, 9)


def test_it_is_settled_once_and_undone_once() -> None:
    purse = three()
    holds = taken(purse, {"tokens": 9})
    purse.settle(holds, {"tokens": 20})
    purse.settle(holds, {"tokens": 1})
    assert purse.remaining["tokens"] == 80
    purse.undo(holds)
    purse.undo(holds)
    assert purse.remaining == {"calls": 10, "tokens": 100, "cost": 5.0}
    purse.settle(holds, {"tokens": 7})
    assert purse.remaining == {"calls": 10, "tokens": 100, "cost": 5.0}


def test_an_overrun_is_a_debt_and_no_other_unit_is_the_less_for_it() -> None:
    purse = three()
    purse.settle(taken(purse, {"tokens": 9}), {"tokens": 130})
    assert purse.remaining == {"calls": 9, "tokens": -30, "cost": 4.5}
    assert not purse.fits(purse.parts({})) and not purse.might_fit(purse.parts({}))


def test_of_several_of_a_unit_the_least_is_what_remains_and_each_must_have_it() -> None:
    purse = Purse([Budget("tokens", 50), Budget("tokens", 20), Budget("tokens", 30)], Tariff())
    assert purse.remaining == {"tokens": 20}
    with pytest.raises(ValueError, match="at most 20 tokens"):
        purse.check({"tokens": 21})
    taken(purse, {"tokens": 20})
    assert [allowance.remaining for allowance in purse.allowances] == [30, 0, 10]
    assert purse.reserve(purse.parts({"tokens": 0})) is None


@pytest.mark.parametrize("amount", [1, {"tokens": 3}, {}])
def test_what_a_budget_of_nothing_refuses_is_skipped_and_no_error(amount: Any) -> None:
    purse = Purse([Budget("tokens", 0)], Tariff())
    purse.check(amount)
    assert not purse.might_fit(purse.parts(amount))


# ---- money that all sources of a run share ---------------------------------------------------------------------------


def pooled(cost: float, prices: Any = 0.0) -> tuple[Purse, Budget]:
    pool = Budget("cost", cost)
    return Purse([], Tariff(prices), [pool]), pool


def test_one_who_is_free_goes_on_when_the_money_of_all_is_used_up() -> None:
    purse, pool = pooled(1.0)
    payer = Purse([], Tariff(1.0), [pool])
    payer.settle(taken(payer, 1), None)
    assert payer.reserve(payer.parts(1)) is None and not payer.might_fit(payer.parts(1))
    assert purse.fits(purse.parts(1)) and purse.might_fit(purse.parts(1))
    holds = taken(purse, 1)
    purse.settle(holds, None)
    purse.undo(holds)
    assert pool.remaining == 0


def test_one_that_turns_out_to_cost_is_free_no_more() -> None:
    purse, pool = pooled(1.0)
    pool.settle(pool.reserve(1.0) or pytest.fail("there is 1"))
    purse.settle(taken(purse, 1), {"cost": 0.0})
    purse.settle(taken(purse, 1), {"tokens": 3})
    holds = taken(purse, 1)
    purse.settle(holds, {"cost": 0.25})
    assert pool.remaining == -0.25
    assert purse.reserve(purse.parts(1)) is None and not purse.fits(purse.parts(1))


def test_one_that_says_that_it_costs_is_not_free() -> None:
    purse, pool = pooled(1.0)
    pool.settle(pool.reserve(1.0) or pytest.fail("there is 1"))
    assert purse.reserve(purse.parts({"cost": 0.5})) is None
    assert purse.reserve(purse.parts({"cost": 0.0})) is not None


def test_what_is_its_own_or_of_another_unit_holds_back_the_free_as_well() -> None:
    spent, tokens = Budget("cost", 0.0), Budget("tokens", 0.0)
    pool = Budget("cost", 0.0)
    for purse in (Purse([spent], Tariff()), Purse([], Tariff(), [tokens]), Purse([spent], Tariff(), [pool])):
        assert not purse.fits(purse.parts({}))
        assert purse.reserve(purse.parts({})) is None


# ---- against a model -------------------------------------------------------------------------------------------------

UNITS = ("calls", "tokens", "cost", "pages")


class Model:
    """The calls that are in flight, and those that are over, each with what it is of each allowance."""

    def __init__(self, allowances: Sequence[Any], prices: Any) -> None:
        self.limits = [(allowance.unit, allowance.limit) for allowance in allowances]
        self.counts_attempts = [allowance.unit == "calls" and isinstance(allowance, Budget) for allowance in allowances]
        self.prices = prices if isinstance(prices, Mapping) else {"calls": prices}
        self.reserved: dict[int, list[float]] = {}
        self.used: dict[int, list[float]] = {}

    def parts(self, amount: Any) -> list[float]:
        """How much of each allowance a call of an amount is to use."""
        named = dict(amount) if isinstance(amount, Mapping) else {unit: amount for unit, _ in self.limits}
        calls = named.pop("calls", 1) if isinstance(amount, Mapping) else amount
        if not isinstance(amount, Mapping) or "cost" not in amount:
            named["cost"] = sum(price * {**named, "calls": 1}.get(unit, 0.0) for unit, price in self.prices.items())
        return [
            1.0 if attempts else calls if unit == "calls" else named.get(unit, 0.0)
            for (unit, _), attempts in zip(self.limits, self.counts_attempts, strict=True)
        ]

    def taken(self, place: int) -> float:
        return sum(row[place] for row in (*self.reserved.values(), *self.used.values()))

    def spent(self, place: int) -> float:
        return sum(row[place] for row in self.used.values())

    def gone(self, place: int) -> float:
        """What does not come back: what is used, and calls that are being made."""
        return self.taken(place) if self.limits[place][0] == "calls" else self.spent(place)

    def fits(self, parts: list[float], taken: Callable[[int], float]) -> bool:
        return all(
            taken(place) + part <= limit and taken(place) < limit
            for place, ((_, limit), part) in enumerate(zip(self.limits, parts, strict=True))
        )

    def settle(self, call: int, used: Mapping[str, float] | None) -> None:
        row = self.reserved.pop(call)
        self.used[call] = [
            part if used is None or unit == "calls" else used.get(unit, part)
            for (unit, _), part in zip(self.limits, row, strict=True)
        ]

    @property
    def remaining(self) -> dict[str, float]:
        left: dict[str, float] = {}
        for place, (unit, limit) in enumerate(self.limits):
            left[unit] = min(left.get(unit, limit), limit - self.taken(place))
        return left


@pytest.mark.stress
def test_at_random_it_does_what_the_model_says(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(60)):
        rng = random.Random(seed)
        allowances: list[Any] = [
            rng.choice([lambda unit, limit: Shared(limit, unit), Budget, Budget])(
                rng.choice(UNITS), rng.choice([0, 1, 2.5, 8, 30])
            )
            for _ in range(rng.choice([1, 2, 3, 5]))
        ]
        prices: Any = rng.choice([0.0, 0.5, {"tokens": 0.25}, {"calls": 1.0, "pages": 0.5}])
        purse, model = Purse(allowances, Tariff(prices)), Model(allowances, prices)
        holds: dict[int, list[Hold]] = {}
        for call in range(60):
            amount: Any = rng.choice([1, 2, {}, {"tokens": rng.randint(0, 4)}, {"cost": 0.5, "pages": 2, "calls": 0}])
            parts = model.parts(amount)
            assert purse.parts(amount) == parts, (seed, amount)
            assert purse.fits(parts) == model.fits(parts, model.taken), seed
            assert purse.might_fit(parts) == model.fits(parts, model.gone), seed
            made = purse.reserve(parts)
            assert (made is not None) == model.fits(parts, model.taken), seed
            if made is not None:
                holds[call], model.reserved[call] = made, parts
            for other in rng.sample(sorted(holds), min(len(holds), rng.choice([0, 0, 1, 2]))):
                if other in model.reserved and rng.random() < 0.7:
                    used = rng.choice([None, {}, {unit: rng.choice([0, 1, 2.5]) for unit in rng.sample(UNITS, 2)}])
                    purse.settle(holds[other], used)
                    model.settle(other, used)
                elif rng.random() < 0.3:
                    purse.undo(holds.pop(other))
                    model.reserved.pop(other, None)
                    model.used.pop(other, None)
            assert purse.remaining == pytest.approx(model.remaining, abs=1e-9), seed
            for place, allowance in enumerate(allowances):
                assert allowance.unused == pytest.approx(allowance.limit - model.spent(place), abs=1e-9), seed


# ---- in a run --------------------------------------------------------------------------------------------------------


def paying(*allowances: Allowance, **fields: Any) -> Any:
    return make_lane(allowances=allowances, **fields)


def recorded(trial: Trial, attempt: Any, now: float, **used: float) -> None:
    """An attempt succeeds, and has recorded that."""

    class View:
        pass

    View.used = used            # type: ignore[attr-defined]
    attempt.view = View
    trial.succeed(attempt, now)


def test_one_waits_for_what_another_may_give_back_and_starts_in_that_instant() -> None:
    budget = Budget("tokens", 10)
    trial = Trial(paying(budget, concurrency=4), inputs=[Task(name, amount={"tokens": 6}) for name in "abc"])
    first, = trial.start()
    recorded(trial, first, 3.0, tokens=2.0)
    second, = trial.start(3.0)
    assert (second.payload, budget.remaining) == ("b", 2)
    recorded(trial, second, 4.0, tokens=6.0)
    assert trial.start(4.0) == []
    assert trial.statuses == [SUCCEEDED, SUCCEEDED, SKIPPED] and trial.reasons[2] == "budget_exhausted"
    assert trial.told("result")[-1] == (4.0, "result", 2)
    report, = trial.run.reports()
    assert report.remaining == {"tokens": 2} and report.remaining_budget is None


def test_one_does_not_wait_when_nobody_can_give_anything_back() -> None:
    budget = Budget("tokens", 10)
    assert budget.reserve(6) is not None        # by somebody else, of whom this run will not hear
    trial = Trial(paying(budget, concurrency=4), inputs=[Task("a", amount={"tokens": 6})])
    assert trial.start() == []
    assert trial.statuses == [SKIPPED] and trial.told("result")[0][0] == 0.0


def test_a_lane_is_woken_by_what_another_gives_back_and_only_if_they_share_it() -> None:
    common = Budget("tokens", 10)
    one, other = paying(common, name="one"), paying(common, name="other")
    own = paying(Budget("tokens", 10), name="own")
    lanes = {"a": one, "b": other, "c": own, "d": own}
    trial = Trial(one, other, own, inputs=[Task(name, amount={"tokens": 6}) for name in "abcd"],
                  lane_of=lambda task: lanes[task.payload])
    started = trial.start()
    assert payloads(started) == ["a", "c"]
    recorded(trial, started[1], 1.0, tokens=5.0)
    assert trial.start(1.0) == [] and trial.told("result")[-1] == (1.0, "result", 3)    # 5 are used, and 6 not there
    recorded(trial, started[0], 2.0, tokens=4.0)
    assert payloads(trial.start(2.0)) == ["b"]
    assert common.remaining == 0


def test_what_is_revoked_is_given_back_and_is_no_usage() -> None:
    budget = Budget("tokens", 10)
    lane = paying(budget, concurrency=2, budget=5)
    trial = Trial(lane, inputs=[Task(name, amount={"tokens": 4}) for name in "ab"], in_flight="abandon")
    first, second = trial.start()
    trial.run.cancel("enough", 1.0)
    cancels = [step for step in trial.steps(1.0) if isinstance(step, Cancel)]
    assert [cancel.target for cancel in cancels] == [first, second]
    assert budget.remaining == 2
    trial.run.revoked(second, 1.0)
    assert (budget.remaining, lane.budget) == (6, 4)
    told = {event.kind: event.usage for event in trial.events if event.index == 1}
    assert told["abandoned"] == {"tokens": 4, "calls": 1.0} and told["revoked"] == {"tokens": -4, "calls": -1.0}
    report, = trial.run.reports()
    assert (report.calls, report.usage, report.remaining) == (1, {"tokens": 4, "calls": 1.0}, {"tokens": 6, "calls": 4})


def test_no_more_is_reserved_than_a_share_of_what_is_not_used_but_for_one_call_and_free_ones() -> None:
    adaptive = Adaptive(1, 8, quota_share=0.5)
    lane = paying(Budget("tokens", 100), gate=Gate([], None, nullcontext(), (), adaptive), concurrency=adaptive)
    trial = Trial(lane, inputs=[Task(name, amount={} if name == "b" else {"tokens": 20}) for name in "abcde"])
    first, free, second = trial.start()
    assert payloads([first, free, second]) == ["a", "b", "c"]       # 40 of 100, and another 20 would be too much
    trial.succeed(free, 1.0)
    assert trial.start(1.0) == []
    recorded(trial, first, 2.0, tokens=60.0)
    assert trial.start(2.0) == []                                   # 20 of 40
    recorded(trial, second, 3.0, tokens=0.0)
    third, = trial.start(3.0)                                       # 20 of 40, and of 40 there are no more
    trial.succeed(third, 4.0)
    fourth, = trial.start(4.0)                                      # all that is left: one may always be
    assert payloads([third, fourth]) == ["d", "e"]


@pytest.mark.parametrize("cost", [0.1, 0.4])
def test_a_retry_reserves_anew_and_waits_for_what_it_may_get(cost: float) -> None:
    budget = Budget("cost", 1.0)
    trial = Trial(paying(budget, tariff=Tariff(0.4), retry=STEADY, concurrency=1), inputs="ab")
    first, = trial.start()
    trial.fail(first, 0.0)                              # and waits a second
    second, = trial.start(0.0)
    assert second.payload == "b" and budget.remaining == pytest.approx(0.2)
    assert trial.wait_until(1.0) is None                # its place is taken, and so is its money
    recorded(trial, second, 2.0, cost=cost)
    started = trial.start(2.0)
    assert [(again.payload, again.number) for again in started] == ([("a", 2)] if cost == 0.1 else [])
    for again in started:
        trial.succeed(again, 3.0)
    assert trial.statuses == [SUCCEEDED if cost == 0.1 else FAILED, SUCCEEDED]
    assert trial.told("result")[-1][0] == (3.0 if cost == 0.1 else 2.0)


def test_a_retry_that_can_never_be_is_not_waited_for() -> None:
    trial = Trial(paying(Budget("cost", 1.0), tariff=Tariff(0.6), retry=STEADY, concurrency=1), inputs="a")
    first, = trial.start()
    trial.fail(first, 0.0)
    assert trial.statuses == [FAILED]
    assert trial.told("retry") == []


@pytest.mark.parametrize(("allowance", "forgets"), [(Budget("tokens", 10), False), (Shared(10, "tokens"), True)])
def test_a_lane_that_has_used_of_its_budget_is_not_as_new(allowance: Any, forgets: bool) -> None:
    """One in its place would have a whole one again."""
    lane = paying(allowance, concurrency=1)
    trial = Trial(lane, inputs=[Task("a", amount={"tokens": 6})])
    assert lane.gate.is_as_new(0.0)
    first, = trial.start()
    trial.succeed(first, 1.0)
    assert trial.start(1.0) == []
    assert lane.is_as_new(9.0) is forgets
