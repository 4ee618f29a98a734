"""How a workload is made from a seed: mostly small ones with a few features combined, some bigger."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from qengine import (
    BreakerPolicy,
    ExecutionPolicy,
    RateLimit,
    RetryPolicy,
    StopConditions,
    TaskError,
    TransientError,
    Window,
)

from .model import BEFORE, HANG, Call, Cost, Job, Share, Verdicts, Workload, budgets_of, priced_by
from .running import is_refused


def make_workload(seed: int) -> Workload:
    """Return the workload of a seed."""
    workload = _Maker(seed).make()
    if is_refused(workload):        # a stop that the budget comes before
        lanes = {name: replace(policy, budget=_without_calls(policy)) for name, policy in workload.lanes.items()}
        workload = replace(workload, lanes=lanes)
    return workload


def _without_calls(policy: ExecutionPolicy) -> Any:
    return {unit: limit for unit, limit in budgets_of(policy).items() if unit != "calls"} or None


class _Maker:
    """Draws a workload."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.size = rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 13, 17, 21]) if self.often(0.93) else 60
        self.crowd = max(1.0, self.size / 12)       # many tasks get quicker limits: a real run is to end soon
        self.health = rng.choice([(1, 0, 0, 0, 0), (12, 2, 1, 2, 1), (5, 1, 1, 3, 1), (3, 0, 0, 5, 1), (1, 1, 3, 3, 0)])
        self.quick = self.often(0.25)
        self.ragged = self.often(0.6)       # keys, priorities, amounts, timeouts of their own
        self.hangs = rng.choice([0, 0, 0, 1, 2, 4])     # calls that never end, at most
        self.deaf = self.often(0.3)         # some calls go on when they are told to end
        self.stuck = self.often(0.08)       # many calls hang for longer than one waits for what was told to end
        self.records = self.often(0.35)
        self.odd = self.often(0.12)         # calls that are cancelled from within, or end the program; bad items
        self.paged = False
        self.costs: dict[str, Cost] = {}
        self.shares: tuple[Share, ...] = ()

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    def some(self, share: float, *values: Any) -> Any:
        """One of the values, or mostly None."""
        return self.rng.choice(values) if self.often(share) else None

    def make(self) -> Workload:
        face = self.rng.choices(["one", "lanes", "tree", "wide"], [42, 20, 35, 3])[0]
        if face == "tree":
            workload = self.tree(self.stop())
        elif face == "wide":
            workload = self.wide()
        else:
            workload = self.tasks(face, self.stop())
        if workload.as_list:
            workload = replace(workload, error_after=None)
        elif self.often(0.1):
            workload = replace(workload, pace=max(0.0005, self.rng.choice([0.0005, 0.002, 0.006]) / self.crowd))
        if workload.how != "run":
            workload = replace(
                workload, consume=self.some(0.4, 0.001, 0.004, 0.01) or 0.0,
                leave_after=self.some(0.25, 1, 2, max(1, self.size // 2)),
            )
        if self.often(0.15):
            workload = replace(workload, shared=tuple(limit for limit in self.limits() if limit.unit == "calls"))
        if workload.jobs and self.often(0.14):
            job = self.rng.choice(workload.jobs)
            cancel_by = self.rng.choice([*[(job.name, 1)] * 4, (job.name, 2), BEFORE])
            workload = replace(workload, cancel_by=cancel_by, linked=self.often(0.3))
        if self.often(0.05):
            workload = replace(workload, deadline=self.rng.choice([0.004, 0.015, 0.04]))
        if self.size <= 10 and self.often(0.12):
            workload = replace(workload, again=self.rng.choice([1, 1, 2]), together=self.often(0.5))
            if not workload.together and self.often(0.5):
                workload = self.rested(workload)
            if workload.together:       # the consumer waits for one of them after the other
                workload = replace(workload, how="stream", leave_after=None)
        return workload

    def rested(self, workload: Workload) -> Workload:
        """The same with a rest between its runs, in which buckets fill up."""
        if self.often(0.5):
            rate = RateLimit(per_second=self.rng.choice([20, 40]), burst=self.rng.choice([1, 2]))
            lanes = {name: replace(policy, concurrency=8, limits=[rate]) for name, policy in workload.lanes.items()}
            workload = replace(workload, lanes=lanes)
        return replace(workload, rest=0.08)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def tasks(self, face: str, stop: StopConditions) -> Workload:
        policy = self.policy(stop, batches=True)
        names = ["default"] if face == "one" else [f"lane {number}" for number in range(self.rng.randint(1, 4))]
        keyed = self.often(0.15)
        self.shares = self.quotas([tuple(names)], 0.15)
        jobs = [self.job(number, self.rng.choice(names), policy, keys=True) for number in range(self.size)]
        if (keyed or face == "lanes") and self.odd:
            jobs = [
                replace(job, bad=True, lane="default", key=None, amount=1) if self.often(0.2) else job for job in jobs
            ]
            names = [*dict.fromkeys([*names, "default"])]
        return Workload(
            self.seed, dict.fromkeys(names, policy), tuple(jobs), stop, keyed=keyed,
            quotas=tuple(replace(share, lanes=tuple(names)) for share in self.shares),
            as_list=face == "one" and self.often(0.5), error_after=self.some(0.08, 0, 1, self.size // 2, self.size),
            how=self.rng.choices(["run", "stream", "ordered"], [70, 15, 15])[0],
        )

    def wide(self) -> Workload:
        """A hundred lanes and more, with one or two tasks each."""
        self.crowd = 30.0
        self.deaf = False
        self.hangs = self.rng.choice([0, 0, 3])
        count = self.rng.choice([40, 100, 160])
        stop = self.stop() if self.often(0.2) else StopConditions()
        policy = replace(self.policy(stop, batches=False), batch_size=None, batch_backoff=0.0)
        lanes = [f"lane {number}" for number in range(count)]
        jobs = tuple(self.job(number, self.rng.choice(lanes), policy) for number in range(int(count * 1.4)))
        return Workload(self.seed, dict.fromkeys(lanes, policy), jobs, stop)

    # ---- what is declared --------------------------------------------------------------------------------------------

    def policy(self, stop: StopConditions, batches: bool) -> ExecutionPolicy:
        rng = self.rng
        size = rng.choice([1, 2, 3, 5]) if batches and self.often(0.35) else None
        return ExecutionPolicy(
            concurrency=rng.choice([1, 1, 1, 2, 3, 5, 8]),
            limits=self.limits(),
            batch_size=size,
            batch_backoff=rng.choice([0.0, 0.004, 0.01]) / self.crowd if size else 0.0,
            retry=self.retry(),
            stop=stop,
            timeout=rng.choice([0.03, 0.04, 0.06]) if self.hangs or self.stuck or self.often(0.15) else None,
            budget=self.budget(),
            breaker=self.breaker() if self.often(0.3) else None,
            lookahead=rng.choice([0, 0, 1, 2, 5, 16, 64]),
            max_abandoned=self.some(0.2, 1, 2, 3),
        )

    def budget(self) -> Any:
        """None, calls, or by unit."""
        calls = self.some(0.25, 0, 1, 2, 3, 5, max(0, self.size - 1), 2 * self.size)
        if self.often(0.85):
            return calls
        units = {"calls": calls, "tokens": self.some(0.6, 0, 1, 4, 10, 30.5), "cost": self.some(0.5, 0, 1, 2.5, 8, 30)}
        return {unit: limit for unit, limit in units.items() if limit is not None} or None

    def limits(self) -> list[RateLimit | Window]:
        rng = self.rng
        pace = rng.choice([60, 100, 250, 1000]) * self.crowd
        way = rng.choice([{"per_second": pace}] * 5 + [{"per_minute": pace * 60}, {"per_hour": pace * 3600}])
        rate = RateLimit(**way, burst=rng.choice([1, 1, 2, 3, 5, 9]))
        window = Window(limit=rng.choice([1, 2, 3, 5]), seconds=rng.choice([0.01, 0.02, 0.04]) / self.crowd)
        tokens = RateLimit(per_second=rng.choice([200, 1000]) * self.crowd, burst=rng.choice([4, 6]), unit="tokens")
        day = RateLimit(per_day=1000 * self.crowd * 86400, burst=50, unit="cost")
        few = Window(limit=rng.choice([4, 8]), seconds=0.02 / self.crowd, unit="tokens")
        kinds: list[list[RateLimit | Window]] = [
            [], [rate], [window], [rate, window], [rate, tokens], [tokens, few], [rate, window, few], [tokens, day],
        ]
        return rng.choices(kinds, [40, 22, 15, 10, 6, 5, 4, 3])[0]

    def retry(self) -> RetryPolicy:
        rng = self.rng
        kinds: list[Any] = [*[(TransientError, OSError)] * 3, (TransientError,), (ValueError, OSError), self.verdicts()]
        return RetryPolicy(
            max_attempts=rng.choice([1, 2, 2, 3, 4]),
            backoff=rng.choice([0.0, 0.001, 0.005, 0.01]),
            multiplier=rng.choice([1.0, 2.0]),
            max_backoff=rng.choice([0.006, 0.015, 60.0]),
            jitter=rng.choice(["full", "none"]),
            timeout=self.some(0.2, 0.02, 0.05, 0.1),
            max_retry_after=rng.choice([300.0, 300.0, 0.01]),
            retry_on=rng.choice(kinds),
        )

    def verdicts(self) -> Verdicts:
        """A predicate that says when, and may itself be wrong."""
        answers: list[bool | float | str] = [True, True, False, 0.0, 0.002, 0.02, "raises"]
        names = (TaskError.__name__, TransientError.__name__, "ValueError", "TaskTimeoutError")
        return Verdicts(tuple((name, self.rng.choice(answers)) for name in names))

    def breaker(self) -> BreakerPolicy:
        rng = self.rng
        failures = rng.choice([1, 1, 2, 3, None])
        return BreakerPolicy(
            failures=failures,
            failure_rate=rng.choice([0.5, 0.8, 1.0]) if failures is None or self.often(0.2) else None,
            min_calls=rng.choice([1, 2, 4]),
            reset_after=rng.choice([0.004, 0.01, 0.02]),
            max_reset_after=rng.choice([0.02, 0.04]),
            successes=rng.choice([1, 1, 2, 3]),
            max_reopens=rng.choice([0, 1, 2, 5, None]),
            on_open=rng.choice(["wait", "skip"]),
        )

    def stop(self) -> StopConditions:
        if self.often(0.5):
            return StopConditions()
        while True:
            try:
                return self.some_stop()
            except ValueError:      # a condition that could never be the first is refused
                continue

    def some_stop(self) -> StopConditions:
        rng = self.rng
        kinds = rng.sample(["max_failures", "failure_rate", "timeout", "max_results"], rng.choice([1, 1, 1, 2, 3, 4]))
        return StopConditions(
            max_failures=rng.choice([1, 1, 2, 4]) if "max_failures" in kinds else None,
            failure_rate=rng.choice([0.3, 0.5, 1.0]) if "failure_rate" in kinds else None,
            min_outcomes=rng.choice([1, 2, 5, 20]),
            timeout=rng.choice([0.005, 0.02, 0.05, 0.1]) if "timeout" in kinds else None,
            max_results=rng.choice([1, 2, 3, max(1, self.size // 2)]) if "max_results" in kinds else None,
            in_flight=rng.choice(["drain", "abandon"]),
            drain_seconds=rng.choice([0.0, 0.01, 30.0]),
        )

    # ---- what the calls do -------------------------------------------------------------------------------------------

    def job(self, name: Any, lane: str, policy: ExecutionPolicy, **more: Any) -> Job:
        rng, keys = self.rng, more.pop("keys", False)
        key = self.some(0.3, "a", "b", "c", 1, (1, "x")) if keys and self.ragged else None
        units = {limit.unit for limit in policy.limits if isinstance(limit, (RateLimit, Window))}
        units |= {share.unit for share in self.shares if lane in share.lanes}
        units |= {*budgets_of(policy), *priced_by(self.costs.get(lane, 0.0))}
        calls = [self.call(policy, units) for _ in range(rng.choice([1, 2, 3, 6]))]
        return Job(
            name, lane, (*calls, self.last_call(policy)), key=key,
            priority=rng.choice([-1, 0, 1, 2]) if self.ragged and self.often(0.3) else 0,
            amount=self.amount(units) if self.ragged and key is None else 1,
            timeout=self.some(0.1, 0.035, 0.05) if self.ragged else None, **more,
        )

    def amount(self, units: set[str]) -> Any:
        """A number, or parts by unit; rarely of a unit that nobody counts."""
        others = sorted(units - {"calls"})
        if others and self.often(0.6):
            amount = {unit: self.rng.choice([0, 1, 2, 3.5, 7]) for unit in others if self.often(0.8)}
            return {**amount, "calls": self.rng.choice([0, 1, 2])} if self.often(0.2) else amount
        return self.rng.choice([2, 3, 0.5, {"bytes": 1}, {"tokens": 2}]) if self.often(0.15) else 1

    def seconds(self) -> float:
        if self.quick:
            return 0.0
        return self.rng.choice([0.0, 0.0, 0.001, 0.002, 0.005, 0.01, self.rng.uniform(0, 0.02)]) / self.crowd

    def call(self, policy: ExecutionPolicy, units: set[str]) -> Call:
        rng = self.rng
        outcome = rng.choices(["value", "failed", "bug", "transient", "throttled"], self.health)[0]
        if outcome == "value" and self.often(0.25):
            outcome = "empty"
        if self.odd and self.often(0.1):
            outcome = rng.choice(["cancelled", "cancelled", "exit"])
        after = rng.choice([None, 0.0, 0.003, 0.008, 0.02, 400.0]) if outcome == "throttled" else None
        seconds = self.seconds()
        if policy.timeout is not None and self.often(0.4 if self.stuck else 0.1):
            if self.stuck:
                return Call(policy.timeout + rng.choice([0.02, 0.15, 0.25]), outcome, after, deaf=True)
            if self.hangs:
                self.hangs -= 1
                seconds = HANG
            else:
                seconds = policy.timeout * rng.choice([1.5, 3.0])       # an answer that may come late
        recorded = {}
        if self.records and self.often(0.5):
            recorded = {unit: rng.choice([0, 1, 2.5, 9]) for unit in {*units, "tokens", "cost"} - {"calls"}
                        if self.often(0.6)}
        return Call(seconds, outcome, after, recorded, deaf=self.deaf and seconds < HANG and self.often(0.5))

    def last_call(self, policy: ExecutionPolicy) -> Call:
        """What all later calls do: nothing that could go on for ever."""
        return Call(self.seconds(), self.rng.choice(["value", "value", "empty", "failed", "transient"]))

    # ---- hierarchies -------------------------------------------------------------------------------------------------

    def tree(self, stop: StopConditions) -> Workload:
        rng = self.rng
        if self.often(0.7):     # little is asked below what finds little
            self.health = (16, 1, 1, 1, 1)
        self.paged = self.often(0.4)
        lookahead = rng.choice([0, 0, 1, 2, 5, 16, 64])
        lanes = {
            name: replace(self.policy(StopConditions(), batches=False), lookahead=lookahead)
            for name in ("red", "green", "blue")[: rng.choice([1, 2, 2, 3])]
        }
        prices: list[Cost] = [
            0.5, 2.0, {"tokens": 0.25}, {"calls": 0.5, "tokens": 0.125}, {"tokens": 0.25, "pages": 0.5},
        ]
        self.costs = {name: rng.choice(prices) for name in lanes} if self.often(0.3) else {}
        self.records = self.records or bool(self.costs)
        often = 0.6 if self.costs else 0.25
        self.shares = self.quotas([tuple(lanes), tuple(lanes)[:2], *((lane,) for lane in lanes)], often)
        depth = rng.choice([0, 1, 2, 2, 3])
        levels: list[list[str]] = [[] for _ in range(depth + 1)]
        for number in range(min(self.size, 24)):        # first one for each level
            levels[number if number <= depth else rng.randint(0, depth)].append(f"n{number}")
        nodes = [node for level in levels for node in level]
        roots = list(levels[0])
        if nodes and self.often(0.3):       # one that comes twice, or is reached from above as well
            roots.insert(rng.randint(0, len(roots)), rng.choice(nodes))
        children: dict[tuple[str, str], tuple[str, ...]] = {}
        for above, below in pairwise(levels):
            for node in above:
                for source in lanes:
                    reached = [child for child in below if self.often(max(0.4, 2 / len(above)))]
                    if self.often(0.1):
                        reached.append(rng.choice(nodes))
                    if reached:
                        children[node, source] = tuple(reached)
        jobs: list[Job] = []
        for node in nodes:
            for source, policy in lanes.items():
                for number in range(rng.choice([1, 1, 1, 1, 0, 2])):
                    jobs += self.pages(f"{node}/{source}/{number}", node, source, policy)
        return Workload(
            self.seed, lanes, tuple(jobs), stop, tuple(roots), children,
            width=self.some(0.3, 1, 2, 4), error_after=self.some(0.06, 0, 1, len(roots)),
            quotas=self.shares, costs=self.costs,
            as_list=self.often(0.5), how=rng.choices(["run", "stream"], [80, 20])[0],
        )

    def quotas(self, groups: list[tuple[str, ...]], often: float) -> tuple[Share, ...]:
        """Perhaps one or several, each of some of the lanes."""
        if not self.often(often):
            return ()
        units = ["cost", "cost", "tokens", "pages"] if self.costs else ["calls", "calls", "tokens", "cost"]
        count = self.rng.choice([1, 1, 2, 3])
        drawn = [
            Share(self.rng.choice([1, 2, 5, 12, 40]), self.rng.choice(groups), self.rng.choice(units))
            for _ in range(count)
        ]
        return tuple(dict.fromkeys(drawn))

    def pages(self, name: str, node: str, source: str, policy: ExecutionPolicy) -> Iterator[Job]:
        """A query, and perhaps the next pages of its answer."""
        count = self.rng.choice([1, 1, 2, 3]) if self.paged else 1
        for number in range(count):
            page = f"{name}+{number + 1}" if number + 1 < count else None
            this = f"{name}+{number}" if number else name
            job = self.job(this, source, policy, node=node, page=page)
            # Whether an impossible amount or the refusal is told first, nobody has promised.
            if self.odd and self.often(0.1):
                yield replace(job, bad=True, amount=1)
            else:
                yield replace(job, unsupported=True, amount=1) if self.often(0.05) else job
