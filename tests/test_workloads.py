"""Random workloads, held against the promises by what is seen from outside; and an oracle that is seen to refuse.

A workload that breaks a promise is made small before it is shown (see shrink.py).

In full: QENGINE_STRESS=3000 in virtual time (-k "simulation or virtual"), 500 on the real clock, where threads are
switched every microsecond.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from shrink import keeps_every_promise, run
from workloads import (
    DRIVERS,
    Broken,
    Call,
    Driver,
    Job,
    Seen,
    Share,
    TooLate,
    Verdicts,
    Workload,
    as_code,
    as_simulated,
    check,
    make_workload,
    run_simulated,
)
from workloads.model import default_of

from qengine import (
    BreakerPolicy,
    CollectionReport,
    Event,
    ExecutionPolicy,
    Quota,
    RateLimit,
    RetryPolicy,
    RunReport,
    Source,
    SourceReport,
    StopConditions,
    Task,
    Window,
)

VIRTUAL = [name for name, driver in DRIVERS.items() if driver.exact]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    interval = sys.getswitchinterval()
    if request.param == "threads":
        sys.setswitchinterval(1e-6)
    yield DRIVERS[request.param]
    sys.setswitchinterval(interval)


@pytest.mark.stress
def test_random_workloads_keep_every_promise(driver: Driver, stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(driver.seeds)):
        keeps_every_promise(driver, driver.fit(make_workload(seed)))


@pytest.mark.stress
def test_one_workload_has_one_event_log(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(40)):
        workload = as_simulated(make_workload(seed))
        first, *others = (log_of(run(DRIVERS[name], workload)[0]) for name in VIRTUAL)
        for name, other in zip(VIRTUAL[1:], others, strict=True):
            assert other == first, f"{name}\n{workload}"


@pytest.mark.stress
def test_a_run_that_nobody_watches_comes_to_the_same(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(80)):
        workload = as_simulated(make_workload(seed))
        watched, unwatched = (run_simulated(workload, watched)[0].report for watched in (True, False))
        assert summary(unwatched) == summary(watched), str(workload)


# ---- what is drawn ---------------------------------------------------------------------------------------------------

DRAWN = 250     # of so many seeds, each field of every policy in at least two

NOT_DRAWN = {
    "Task.routes": "refused: a scheduler has one function",
    "Quota.store": "a file has a time of its own: test_quota_store.py, test_shared_in_engine.py",
    "Quota.key": "its name there",
    "Task.prefer": "as routes",
    "Task.metadata": "handed through",
    "Workload.seed": "names it",
    "Job.name": "names it",
    "Source.name": "names it",
    "Source.fetch": "the driver's",
    "Quota.per": "a run of a second sees no calendar: test_quota_engine.py",
    "Quota.tz": "as above",
    "Quota.starts": "as above",
    "Quota.alerts": "as above",
    "Quota.on_alert": "as above",
    "Quota.now_fn": "as above",
}

# Where a workload has what it gives to a class of the engine's under another name.
ELSEWHERE = {
    Task: {"payload": "Job.name", "key": "Job.key", "priority": "Job.priority", "amount": "Job.amount",
           "timeout": "Job.timeout"},
    Source: {"quota": "Source.quota", "cost": "Workload.costs", "accepts": "Job.unsupported"},
    Quota: {"limit": "Share.limit", "unit": "Share.unit"},
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, int]:
    """In how many workloads each field of each dataclass is not at its default, by `Class.field`."""
    counts: dict[str, int] = {}
    for seed in range(DRAWN):
        found: set[str] = set()
        workload = make_workload(seed)
        note_fields(workload, found)
        if workload.quotas:
            found.add("Source.quota" if workload.is_tree else "ExecutionPolicy.quota")
        for name in found:
            counts[name] = counts.get(name, 0) + 1
    return counts


def note_fields(value: Any, found: set[str]) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            part = getattr(value, entry.name)
            if part != default_of(entry):
                found.add(f"{type(value).__name__}.{entry.name}")
            note_fields(part, found)
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            note_fields(part, found)


@pytest.mark.parametrize(
    "policy",
    [ExecutionPolicy, RetryPolicy, BreakerPolicy, StopConditions, RateLimit, Window, Task, Source, Quota, Workload,
     Job, Call],
)
def test_every_field_is_drawn(policy: type[Any], drawn: dict[str, int]) -> None:
    """So that no field can be added to a policy and be forgotten here."""
    names = [entry.name for entry in fields(policy)] if is_dataclass(policy) else inspect.signature(policy).parameters
    places = {name: ELSEWHERE.get(policy, {}).get(name, f"{policy.__name__}.{name}") for name in names}
    if policy is Source:        # the rest is said by an ExecutionPolicy
        places = {name: place if name in ELSEWHERE[Source] else place.replace("Source.", "ExecutionPolicy.")
                  for name, place in places.items() if place not in NOT_DRAWN}
    missing = [place for place in places.values() if drawn.get(place, 0) < 2 and place not in NOT_DRAWN]
    assert missing == []


def test_a_workload_can_be_pasted() -> None:
    words = {**vars(sys.modules["qengine"]), **vars(sys.modules["workloads.model"])}
    for seed in range(30):
        workload = make_workload(seed)
        assert eval(as_code(workload), words) == workload


def log_of(ran: Seen) -> list[tuple[Any, ...]]:
    """The event log, from the first instant; the last bits of a sum depend on where it begins."""
    begin = ran.events[0].at if ran.events else 0.0
    return [(round(event.at - begin, 9), *_what(event)) for event in ran.events]


def _what(event: Event) -> tuple[Any, ...]:
    return event.kind, event.source, event.index, event.number, event.detail, event.usage


def summary(report: RunReport[Any, Any]) -> Any:
    """All that a report says, but for the time of day."""
    results = [
        (r.task, r.status, r.value, repr(r.error), r.reason, r.attempts, r.usage, r.source, r.started_at, r.duration)
        for r in report.results
    ]
    times = [(source.p50, source.p95, source.p99) for source in report.by_source.values()]
    return results, report.by_source, times, report.stop_reason, report.intake_cut, report.abandoned, report.makespan


# ---- limits are used -------------------------------------------------------------------------------------------------


def plain(count: int, policy: ExecutionPolicy, seconds: float = 0.0, **more: Any) -> Workload:
    """So many tasks of one lane that all succeed."""
    jobs = tuple(Job(number, "default", (Call(seconds),)) for number in range(count))
    return Workload(0, {"default": policy}, jobs, policy.stop, **more)


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize(("rate", "burst", "count"), [(100, 1, 50), (1000, 10, 64), (7, 3, 40), (50, 60, 60)])
def test_the_last_start_comes_at_the_very_instant_that_the_rate_allows(
    name: str, rate: float, burst: int, count: int
) -> None:
    workload = plain(count, ExecutionPolicy(limits=[RateLimit(per_second=rate, burst=burst)]))
    runs = DRIVERS[name].run(workload)
    check(workload, runs, True)
    ran = runs[0]
    starts = [event.at for event in ran.of("start")]
    assert starts[-1] - starts[0] == pytest.approx((count - burst) / rate, abs=1e-6)


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize(("limit", "seconds", "work"), [(1, 0.5, 0.0), (3, 1.0, 0.25), (5, 2.0, 3.0)])
def test_a_window_is_full_whenever_it_may_be(name: str, limit: int, seconds: float, work: float) -> None:
    workload = plain(4 * limit, ExecutionPolicy(limits=[Window(limit=limit, seconds=seconds)]), work)
    runs = DRIVERS[name].run(workload)
    check(workload, runs, True)
    ran = runs[0]
    starts = [event.at - ran.events[0].at for event in ran.of("start")]
    assert starts == pytest.approx([number // limit * (seconds + work) for number in range(4 * limit)], abs=1e-6)


@pytest.mark.parametrize("name", VIRTUAL)
def test_all_places_are_taken_while_there_is_work(name: str) -> None:
    workload = plain(40, ExecutionPolicy(concurrency=4), 0.5)
    runs = DRIVERS[name].run(workload)
    check(workload, runs, True)
    ran = runs[0]
    assert ran.report.makespan == pytest.approx(40 / 4 * 0.5)


# ---- the oracle can refuse -------------------------------------------------------------------------------------------


def forge(ran: Seen, events: Sequence[Event] | None = None, results: Sequence[Any] | None = None, **told: Any) -> Seen:
    """The same run, told otherwise."""
    report = ran.report
    fields: dict[str, Any] = {
        name: getattr(report, name)
        for name in ("by_source", "stop_reason", "intake_cut", "abandoned", "makespan", "started_at", "finished_at")
    }
    if isinstance(report, CollectionReport):
        fields["active_nodes"] = report.active_nodes
    fields.update(told)
    kept = report.results if results is None else tuple(results)
    forged = type(report)(results=lambda: kept, **fields)
    return replace(ran, report=forged, events=list(ran.events if events is None else events))


def place(ran: Seen, kind: str, index: int | None = None, number: int | None = None) -> int:
    """Where in the log the first event of that kind stands."""
    return next(
        at for at, event in enumerate(ran.events)
        if event.kind == kind and index in (None, event.index) and number in (None, event.number)
    )


def moved(
    ran: Seen, kind: str, index: int | None, to: float, number: int | None = None, early: bool = False
) -> Seen:
    """An event at another instant, where that stands in the log: behind all of that instant, or before them."""
    at = place(ran, kind, index, number)
    event = replace(ran.events[at], at=to)
    rest = [*ran.events[:at], *ran.events[at + 1 :]]
    before = sum(other.at < to if early else other.at <= to for other in rest)
    return forge(ran, [*rest[:before], event, *rest[before:]])


def without(ran: Seen, kind: str, index: int | None = None) -> Seen:
    at = place(ran, kind, index)
    return forge(ran, [*ran.events[:at], *ran.events[at + 1 :]])


def changed(ran: Seen, index: int, **fields: Any) -> Seen:
    """A result that says something else."""
    results = list(ran.report.results)
    results[index] = replace(results[index], **fields)
    return forge(ran, results=results)


def delayed(ran: Seen, since: float, by: float) -> Seen:
    """Everything later than an instant is later still."""
    events = [replace(event, at=event.at + by) if event.at > since else event for event in ran.events]
    return forge(ran, events, makespan=ran.report.makespan + by)


def counted(ran: Seen, **fields: Any) -> Seen:
    """A lane that counted something else."""
    name = next(iter(ran.report.by_source))
    return forge(ran, by_source={**ran.report.by_source, name: of_same_times(ran.report.by_source[name], **fields)})


def of_same_times(source: SourceReport, **fields: Any) -> SourceReport:
    """It with other fields: how long its calls took is none of them."""
    other = replace(source, **fields)
    other.times = source.times
    return other


class Told:
    """Quantiles that are all the same."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def quantile(self, q: float) -> float | None:
        return self.seconds

    def merge(self, other: Any) -> None:
        raise AssertionError("nobody merges what is in a report")


def timed(ran: Seen, seconds: float | None) -> Seen:
    """A lane whose calls took otherwise."""
    other = counted(ran)
    next(iter(other.report.by_source.values())).times = Told(seconds)
    return other


def using(ran: Seen, kind: str, usage: Mapping[str, float] | None) -> Seen:
    """The first event of that kind tells of another usage."""
    at = place(ran, kind)
    return forge(ran, [*ran.events[:at], replace(ran.events[at], usage=usage), *ran.events[at + 1 :]])


def revoked(ran: Seen, kind: str, **fields: Any) -> Seen:
    """The first attempt that ended in that way is told to have been revoked."""
    event = ran.events[place(ran, kind)]
    back = {unit: -used for unit, used in (event.usage or {}).items()}
    return forge(ran, [*ran.events, replace(ran.events[-1], **{
        "kind": "revoked", "index": event.index, "source": event.source, "number": event.number, "usage": back, **fields
    })])


def one_lane(*jobs: tuple[Call, ...], **policy: Any) -> Workload:
    """Tasks of one lane, each as its calls say."""
    named = tuple(Job(number, "default", calls) for number, calls in enumerate(jobs))
    declared = ExecutionPolicy(**policy)
    return Workload(0, {"default": declared}, named, declared.stop)


def garden(*names: str, children: Any = (), roots: tuple[str, ...] = ("a",), **policy: Any) -> Workload:
    """A hierarchy of one source, which is asked one thing about each node and takes 20 ms to find something."""
    jobs = tuple(Job(f"{name}?", "red", (SLOW,), node=name) for name in names)
    return Workload(
        0, {"red": ExecutionPolicy(**policy)}, jobs, roots=roots,
        children={(above, "red"): tuple(below) for above, below in dict(children).items()},
    )


OK, SLOW, BAD, LATER, HANGS = Call(), Call(0.02), Call(outcome="failed"), Call(outcome="transient"), Call(float("inf"))
DEAF = (Call(10.0, deaf=True),)
GOOD, WORK, FAIL, AGAIN, HANG = (OK,), (SLOW,), (BAD,), (LATER, LATER, OK), (HANGS,)
THROTTLED = (Call(0.0, "throttled", 0.05), OK)
STEADY = RetryPolicy(max_attempts=3, backoff=0.01, jitter="none")
ONCE = StopConditions(max_failures=1)
BREAKER = BreakerPolicy(failures=2, reset_after=0.05)
AT_ONCE = BreakerPolicy(failures=1, reset_after=0.05)
TWO_AND_ONE = (Job(0, "a", WORK), Job(1, "a", WORK), Job(2, "b"))
FEW_TOKENS = RateLimit(per_second=10, burst=2, unit="tokens")
RATE = [RateLimit(per_second=100)]
TWO_IN_50_MS = [Window(2, 0.05)]
GIVEN_UP = one_lane((Call(0.02, "failed"),), HANG, concurrency=2, stop=replace(ONCE, in_flight="abandon"))


def tokens(count: float) -> Call:
    """A call that records so many."""
    return Call(recorded={"tokens": count})


def waiting(second: Call) -> Workload:
    """The second task waits for the tokens that the first is to use, and gets them if that is quick to use none."""
    first = Call(0.02, recorded={"tokens": 0 if second.seconds == 0 else 3})
    jobs = (
        Job(0, "a", (first,), amount={"tokens": 3}), Job(1, "a", (OK,), amount={"tokens": 3}),
        Job(2, "b", (Call(0.04),)),
    )
    return Workload(0, dict.fromkeys("ab", ExecutionPolicy(budget={"tokens": 4})), jobs)


def priced(cost: Any, call: Call, **fields: Any) -> Workload:
    """One query of a source with such prices."""
    jobs = (Job("a?", "red", (call,), node="a"),)
    return replace(garden("a", **fields), jobs=jobs, costs={"red": cost})


# What is told, of which run, and by which words it is refused.
FORGERIES: dict[str, tuple[Workload, Callable[[Seen], Seen], str]] = {
    # the books
    "a result is lost": (
        one_lane(GOOD, GOOD), lambda ran: forge(ran, results=ran.report.results[:1]), "1 results of 2 tasks"
    ),
    "a result was never told": (one_lane(GOOD, GOOD), lambda ran: without(ran, "result", 1), "has no result"),
    "a result is told twice": (
        one_lane(GOOD), lambda ran: forge(ran, [*ran.events, ran.events[-1]]), "comes after the result"
    ),
    "results stand in another order": (
        one_lane(GOOD, GOOD), lambda ran: forge(ran, results=ran.report.results[::-1]), "not in input order"
    ),
    "a call was not counted": (one_lane(GOOD, GOOD), lambda ran: counted(ran, calls=1), "1 calls of 2 starts"),
    "a success was not counted": (one_lane(GOOD, GOOD), lambda ran: counted(ran, success_count=1), "success_count"),
    "a retry was not counted": (one_lane(AGAIN, retry=STEADY), lambda ran: counted(ran, retries=1), "1 retries"),
    "a 429 was not counted": (one_lane(THROTTLED), lambda ran: counted(ran, throttled=0), "0 throttled"),
    "a makespan too short": (one_lane(WORK), lambda ran: forge(ran, makespan=0.01), "makespan 0.01"),
    "busy for too short": (one_lane(WORK), lambda ran: counted(ran, busy_seconds=0.01), "busy 0.01"),
    "calls used more": (one_lane(WORK), lambda ran: counted(ran, usage={"calls": 2.0}), "usage"),
    "a rest of the budget": (one_lane(GOOD, budget=3), lambda ran: counted(ran, remaining={"calls": 3}), "3} remain"),
    "a call that hangs": (one_lane(HANG, timeout=0.05), lambda ran: forge(ran, abandoned=1), "1 abandoned, not 0"),
    "no call that hangs": (one_lane(DEAF, timeout=0.05), lambda ran: forge(ran, abandoned=0), "0 abandoned, not 1"),
    "a call that was not told to end": (
        one_lane(DEAF, WORK, WORK, WORK, WORK, concurrency=2, timeout=0.05),
        lambda ran: replace(ran, tokens=[(0, 1, False)]), "its token not cancelled",
    ),
    "a call that was told to end": (
        one_lane((Call(0.02, deaf=True),)), lambda ran: replace(ran, tokens=[(0, 1, True)]), "told to end, and its"
    ),
    "more than was recorded": (
        one_lane((Call(recorded={"tokens": 3}),)), lambda ran: changed(ran, 0, usage={"calls": 1.0, "tokens": 4.0}),
        "usage",
    ),
    "a sum of what was recorded": (
        one_lane((Call(recorded={"tokens": 3}),)), lambda ran: counted(ran, usage={"calls": 1.0, "tokens": 4.0}),
        "usage",
    ),
    "a rest of a quota": (
        replace(garden("a"), quotas=(Share(3, ("red",)),)), lambda ran: counted(ran, remaining={"calls": 3.0}),
        r"3.0\} remain, not .*2.0",
    ),
    "a rest of a budget of tokens": (
        one_lane((Call(recorded={"tokens": 3}),), budget={"tokens": 5}),
        lambda ran: counted(ran, remaining={"tokens": 3.0}), r"3.0\} remain, not .*2.0",
    ),
    "a rest of what was never bounded": (
        one_lane(GOOD), lambda ran: counted(ran, remaining={"tokens": 3.0}), r"3.0\} remain, not \{\}"
    ),
    "quicker calls": (one_lane(WORK, WORK), lambda ran: timed(ran, 0.0197), "p50 0.0197, not 0.02"),
    "slower calls": (one_lane(GOOD, WORK), lambda ran: timed(ran, 0.02), "p50 0.02, not 0.0"),
    "calls of no duration": (one_lane(WORK), lambda ran: timed(ran, None), "p99 None, not 0.02"),
    "durations of no calls": (one_lane(), lambda ran: timed(ran, 0.02), "p95 0.02, not None"),
    "an answer of no usage": (one_lane(GOOD), lambda ran: using(ran, "answer", None), "tells of usage, or does not"),
    "a start with its usage": (
        one_lane(GOOD), lambda ran: using(ran, "start", {"calls": 1.0}), "tells of usage, or does not"
    ),
    "an answer of two calls": (
        one_lane(GOOD), lambda ran: using(ran, "answer", {"calls": 2.0}), "is not of one call"
    ),
    "a timeout that used nothing": (
        one_lane((Call(float("inf"), recorded={"tokens": 3}),), timeout=0.05),
        lambda ran: using(ran, "timeout", {"calls": 1.0}), "0 call 1 used",
    ),
    "a revoked answer": (one_lane(GOOD), lambda ran: revoked(ran, "answer"), "of no attempt that was given up"),
    "a revoked timeout": (
        one_lane(HANG, timeout=0.05), lambda ran: revoked(ran, "timeout"), "of no attempt that was given up"
    ),
    "a call that counts, though it was revoked": (
        GIVEN_UP, lambda ran: revoked(ran, "abandoned"), "2 calls of 2 starts, of which 1 revoked"
    ),
    "more is taken back than was used": (
        GIVEN_UP, lambda ran: revoked(ran, "abandoned", usage={"calls": -2.0}), "takes back what was not used"
    ),
    "revoked twice": (
        GIVEN_UP, lambda ran: revoked(revoked(ran, "abandoned"), "abandoned"), "of no attempt that was given up"
    ),
    "one waits for nothing": (
        waiting(OK), lambda ran: late_start(ran, 1, 0.004), "nothing starts at 0.02"
    ),
    "one waits for what nobody can give back": (
        waiting(SLOW), lambda ran: moved(ran, "result", 1, 0.03), "for what nobody can give back"
    ),
    "a SystemExit that is swallowed": (
        one_lane((Call(outcome="exit"),)), lambda ran: replace(ran, error=None), "SystemExit was swallowed"
    ),
    "inputs whose error is swallowed": (
        replace(one_lane(GOOD, GOOD), error_after=1), lambda ran: replace(ran, error=None), "the inputs raised was"
    ),
    "a cancelled call that is no cancelled task": (
        one_lane((Call(outcome="cancelled"),)), lambda ran: changed(ran, 0, reason="stopped"), "nothing stopped the run"
    ),
    "inputs taken too far ahead": (
        replace(one_lane(GOOD, lookahead=2, concurrency=1), how="stream"),
        lambda ran: replace(ran, ahead=Counter(default=4)), "4 inputs of default were taken and not handed out, of 3",
    ),
    "a run that forgets the one before": (
        replace(one_lane(GOOD, limits=[RateLimit(per_second=1)]), again=1),
        lambda ran: forge(
            counted(ran, first_at=0.0, last_at=0.0), [replace(event, at=event.at - 0.5) for event in ran.events]
        ),
        "more than RateLimit",
    ),
    "intake was cut": (one_lane(GOOD), lambda ran: forge(ran, intake_cut=True), "all_succeeded|intake_cut"),
    "time goes back": (one_lane(WORK, WORK), lambda ran: forge(ran, ran.events[::-1]), "time goes back"),
    # how tasks end
    "a value of another task": (one_lane(GOOD, GOOD), lambda ran: changed(ran, 1, value=(0, 1)), "1: succeeded"),
    "an error of another kind": (one_lane(FAIL), lambda ran: changed(ran, 0, error=ValueError()), "error ValueError"),
    "an attempt too few": (one_lane(AGAIN, retry=STEADY), lambda ran: changed(ran, 0, attempts=2), "after 2 attempts"),
    "an attempt of a wrong number": (
        one_lane(GOOD), lambda ran: forge(ran, [replace(event, number=2) for event in ran.events]), "is not attempt 1"
    ),
    "no reason for what was left": (
        one_lane(FAIL, GOOD, concurrency=1, stop=ONCE), lambda ran: changed(ran, 1, reason="timeout"), "stopped by max"
    ),
    # instants
    "a retry before its backoff": (
        one_lane(AGAIN, retry=STEADY), lambda ran: moved(ran, "start", 0, 0.009, number=2), "was tried again at 0.009"
    ),
    "a retry after its backoff": (
        one_lane(AGAIN, retry=STEADY), lambda ran: delayed(ran, 0.009, 0.005), "nothing stands in their way"
    ),
    "a start before the rate allows it": (
        one_lane(*[GOOD] * 4, limits=[RateLimit(per_second=10)]), lambda ran: moved(ran, "start", 3, 0.25), "more than"
    ),
    "a start after the rate allows it": (
        one_lane(GOOD, GOOD, GOOD, limits=RATE), lambda ran: delayed(ran, 0.015, 0.004), "stands in their way"
    ),
    "a start before the window is free": (
        one_lane(WORK, WORK, GOOD, limits=TWO_IN_50_MS), lambda ran: moved(ran, "start", 2, 0.069), "has 0.0 left"
    ),
    "a timeout too early": (
        one_lane(HANG, timeout=0.05),
        lambda ran: forge(
            counted(ran, busy_seconds=0.04), [replace(event, at=min(event.at, 0.04)) for event in ran.events],
            makespan=0.04,
        ),
        "too early",
    ),
    "an answer too early": (
        one_lane(WORK),
        lambda ran: forge(
            counted(ran, busy_seconds=0.0, first_at=0.0, last_at=0.0),
            [replace(event, at=0.0) for event in ran.events], makespan=0.0,
        ),
        "took 0.0, not 0.02",
    ),
    # what runs at once, and in which order
    "a start of what runs": (
        one_lane(WORK), lambda ran: forge(ran, [ran.events[0], *ran.events]), "comes beside another attempt"
    ),
    "an answer of what does not run": (one_lane(GOOD), lambda ran: without(ran, "start"), "of nothing that runs"),
    "a start beside the only one": (
        one_lane(WORK, WORK, concurrency=1), lambda ran: moved(ran, "start", 1, 0.01), "has 1 running"
    ),
    "an idle place": (one_lane(WORK, WORK, concurrency=1), lambda ran: late_start(ran, 1, 0.004), "in their way"),
    "a batch too early": (
        one_lane(WORK, WORK, GOOD, batch_size=2, batch_backoff=0.01), lambda ran: moved(ran, "start", 2, 0.025),
        "its batch",
    ),
    "a start through an open breaker": (
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=BREAKER), lambda ran: moved(ran, "start", 2, 0.04),
        "the breaker is open",
    ),
    "two probes": (
        one_lane(FAIL, WORK, WORK, WORK, concurrency=2, breaker=replace(BREAKER, failures=1)),
        lambda ran: moved(ran, "start", 3, 0.06),
        "the breaker is open",
    ),
    "a breaker that says nothing": (
        one_lane(FAIL, FAIL, concurrency=1, breaker=BREAKER), lambda ran: without(ran, "breaker_opened"), "no breaker"
    ),
    "a pause that is not kept": (
        one_lane(THROTTLED, GOOD, concurrency=1), lambda ran: moved(ran, "start", 1, 0.04), "pauses until"
    ),
    # stops
    "a start after the stop": (
        one_lane(FAIL, GOOD, concurrency=1, stop=ONCE), lambda ran: moved(ran, "stop", None, 0.0, early=True),
        "comes after the stop",
    ),
    "a stop that comes later": (
        one_lane(FAIL, GOOD, concurrency=1, stop=ONCE), lambda ran: moved(ran, "stop", None, 0.01), "did not stop"
    ),
    "no stop": (
        one_lane(FAIL, stop=ONCE), lambda ran: forge(without(ran, "stop"), stop_reason=None), "did not stop"
    ),
    "another reason to stop": (
        one_lane(FAIL, stop=ONCE), lambda ran: forge(ran, stop_reason="timeout"), "stop_reason timeout"
    ),
    # hierarchies
    "a node that was never active": (
        garden("a"), lambda ran: forge(ran, active_nodes=["a", "b"]), "active are"
    ),
    "children before their parents": (
        garden("a", "b", children={"a": "b"}), lambda ran: forge(ran, results=ran.report.results[::-1]), "by level"
    ),
    "a child asked before its parent's answer": (
        garden("a", "b", children={"a": "b"}),
        lambda ran: forge(
            changed(ran, 1, started_at=(ran.report.results[1].started_at or 0.0) - 0.01, duration=0.03),
        ),
        "before what led to it",
    ),
}


# Which driver does what no simulation does.
HOW = {
    "no call that hangs": "virtual threads",
    "a call that was not told to end": "virtual threads",
    "a call that was told to end": "virtual threads",
    "inputs taken too far ahead": "virtual threads",
    "a run that forgets the one before": "virtual threads",
    "a gate for each run": "virtual threads",
}


def late_start(ran: Seen, index: int, by: float) -> Seen:
    """A task that begins and ends later."""
    events = [replace(event, at=event.at + by) if event.index == index else event for event in ran.events]
    name, source = next(iter(ran.report.by_source.items()))
    source = of_same_times(source, last_at=(source.last_at or 0.0) + by)
    by_source = {**ran.report.by_source, name: source}
    return forge(ran, events, makespan=ran.report.makespan + by, by_source=by_source)


@pytest.mark.parametrize("name", FORGERIES)
def test_the_oracle_refuses(name: str) -> None:
    workload, forged, words = FORGERIES[name]
    runs = DRIVERS[HOW.get(name, "simulation")].run(workload)
    check(workload, runs, True)
    with pytest.raises(Broken, match=words):
        check(workload, [*runs[:-1], forged(runs[-1])], True)


def test_what_comes_late_is_run_again_and_what_is_wrong_besides_is_not() -> None:
    workload = one_lane(HANG, timeout=0.05)
    ran = run_simulated(workload)[0]
    late = delayed(ran, 0.0, 0.6)
    with pytest.raises(TooLate, match="after its timeout"):
        check(workload, [late], False)
    runs = iter([late, late, ran])
    keeps_every_promise(Driver(lambda workload: [next(runs)], exact=False, seeds=1), workload)
    assert next(runs, None) is None
    with pytest.raises(Broken, match="after its timeout") as caught:
        check(workload, [forge(late, abandoned=1)], False)
    assert caught.type is Broken


# Two workloads: what is right for the first breaks a promise of the second.
CONFUSIONS: dict[str, tuple[Workload, Workload, str]] = {
    "concurrency": (one_lane(WORK, WORK, concurrency=2), one_lane(WORK, WORK, concurrency=1), "has 1 running"),
    "places not used": (one_lane(WORK, WORK, concurrency=1), one_lane(WORK, WORK, concurrency=2), "in their way"),
    "a quicker rate": (
        one_lane(*[GOOD] * 9, limits=[RateLimit(per_second=200)]), one_lane(*[GOOD] * 9, limits=RATE), "more than Rate"
    ),
    "a slower rate": (
        one_lane(*[GOOD] * 9, limits=RATE), one_lane(*[GOOD] * 9, limits=[RateLimit(per_second=101)]), "in their way"
    ),
    "a smaller window": (
        one_lane(*[WORK] * 5, limits=[Window(2, 0.04)]), one_lane(*[WORK] * 5, limits=TWO_IN_50_MS), "left"
    ),
    "a window from the start": (
        one_lane(WORK, WORK, WORK, limits=[RateLimit(per_second=20)]),
        one_lane(WORK, WORK, WORK, limits=[RateLimit(per_second=20), Window(1, 0.05)]), "left",
    ),
    "a larger budget": (one_lane(GOOD, GOOD, budget=2), one_lane(GOOD, GOOD, budget=1), "beyond the budget"),
    "a smaller budget": (one_lane(GOOD, GOOD, budget=1), one_lane(GOOD, GOOD, budget=2), "the budget is 1"),
    "no batches": (one_lane(*[WORK] * 4), one_lane(*[WORK] * 4, batch_size=2), "its batch"),
    "more attempts": (
        one_lane(AGAIN, retry=STEADY), one_lane(AGAIN, retry=replace(STEADY, max_attempts=2)), "of 2|after 3 attempts"
    ),
    "fewer attempts": (one_lane(AGAIN), one_lane(AGAIN, retry=STEADY), "though it could be tried again"),
    "a shorter backoff": (
        one_lane(AGAIN, retry=STEADY), one_lane(AGAIN, retry=replace(STEADY, backoff=0.02)), "retry after 0.01"
    ),
    "another kind of error": (
        one_lane(AGAIN, retry=STEADY), one_lane(AGAIN, retry=replace(STEADY, retry_on=OSError)), "retried after"
    ),
    "a longer timeout": (one_lane(HANG, timeout=0.06), one_lane(HANG, timeout=0.05), "after its timeout"),
    "no timeout of the task": (
        one_lane(AGAIN, retry=STEADY), one_lane(AGAIN, retry=replace(STEADY, timeout=0.015)), "time of the whole task"
    ),
    "no breaker": (
        one_lane(FAIL, FAIL, GOOD, concurrency=1), one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=BREAKER),
        "no breaker opened",
    ),
    "a breaker that waits": (
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=BREAKER),
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=replace(BREAKER, on_open="skip")), "not waited for",
    ),
    "a breaker that skips": (
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=replace(BREAKER, on_open="skip")),
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=BREAKER), "the lane is given up",
    ),
    "a breaker that waits the same again": (
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=replace(AT_ONCE, max_reset_after=0.05)),
        one_lane(FAIL, FAIL, GOOD, concurrency=1, breaker=AT_ONCE),
        "the breaker is open",
    ),
    "a breaker that closes at once": (
        one_lane(FAIL, *[WORK] * 4, concurrency=2, breaker=replace(BREAKER, failures=1)),
        one_lane(FAIL, *[WORK] * 4, concurrency=2, breaker=replace(BREAKER, failures=1, successes=2)),
        "the breaker is open",
    ),
    "a breaker that opens by its share": (
        one_lane(FAIL, GOOD, FAIL, GOOD, concurrency=1),
        one_lane(FAIL, GOOD, FAIL, GOOD, concurrency=1, breaker=replace(BREAKER, failure_rate=0.6, min_calls=3)),
        "no breaker opened",
    ),
    "a breaker that counts a 429": (
        one_lane(FAIL, THROTTLED, GOOD, concurrency=1, breaker=replace(AT_ONCE, reset_after=0.02)),
        one_lane(FAIL, THROTTLED, GOOD, concurrency=1, breaker=replace(AT_ONCE, reset_after=0.01)), "in their way",
    ),
    "a predicate that says when": (
        one_lane(AGAIN, retry=replace(STEADY, retry_on=Verdicts((("TransientError", 0.03),)))),
        one_lane(AGAIN, retry=replace(STEADY, retry_on=Verdicts((("TransientError", 0.04),)))), "retry after 0.03",
    ),
    "a predicate that raises": (
        one_lane(FAIL, retry=STEADY),
        one_lane(FAIL, retry=replace(STEADY, retry_on=Verdicts((("TaskError", "raises"),)))), "not ArithmeticError",
    ),
    "what was recorded comes back": (
        one_lane(*[(Call(recorded={"tokens": 0}),)] * 3, limits=[RateLimit(per_second=10, unit="tokens")]),
        one_lane(*[GOOD] * 3, limits=[RateLimit(per_second=10, unit="tokens")]), "more than Rate|usage",
    ),
    "a debt that is not paid off": (
        one_lane(*[(Call(recorded={"tokens": 3}),)] * 2, concurrency=1, limits=[replace(FEW_TOKENS, per_second=999)]),
        one_lane(*[(Call(recorded={"tokens": 3}),)] * 2, concurrency=1, limits=[FEW_TOKENS]),
        "more than Rate",
    ),
    "a larger quota": (
        replace(garden("a", "b", roots=("a", "b")), quotas=(Share(2, ("red",)),)),
        replace(garden("a", "b", roots=("a", "b")), quotas=(Share(1, ("red",)),)), "are taken",
    ),
    "a smaller quota": (
        replace(garden("a", "b", roots=("a", "b")), quotas=(Share(1, ("red",)),)),
        replace(garden("a", "b", roots=("a", "b")), quotas=(Share(2, ("red",)),)), "the budget is None",
    ),
    "a larger budget of tokens": (
        one_lane((tokens(3),), (tokens(3),), concurrency=1, budget={"tokens": 5}),
        one_lane((tokens(3),), (tokens(3),), concurrency=1, budget={"tokens": 3}), "3.0 of 3 tokens are taken",
    ),
    "a smaller budget of tokens": (
        one_lane((tokens(3),), (tokens(3),), concurrency=1, budget={"tokens": 3}),
        one_lane((tokens(3),), (tokens(3),), concurrency=1, budget={"tokens": 5}),
        "the budget is None, and of the rest 3.0 of 5 tokens are taken",
    ),
    "a budget of money for all": (
        replace(garden("a", "b", roots=("a", "b")), costs={"red": 2.0}),
        replace(garden("a", "b", roots=("a", "b"), budget={"cost": 3.0}), costs={"red": 2.0}), "of 3.0 cost are taken",
    ),
    "a retry for which there is no money": (
        one_lane((Call(outcome="transient", recorded={"cost": 2}), OK), retry=STEADY, budget={"cost": 3}),
        one_lane((Call(outcome="transient", recorded={"cost": 2}), OK), retry=STEADY, budget={"cost": 2}),
        "nothing left for it",
    ),
    "no retry, though there is money for it": (
        one_lane((Call(outcome="transient", recorded={"cost": 2}), OK), retry=STEADY, budget={"cost": 2}),
        one_lane((Call(outcome="transient", recorded={"cost": 2}), OK), retry=STEADY, budget={"cost": 3}),
        "though it could be tried again",
    ),
    "a second quota": (
        replace(one_lane((tokens(3),), (tokens(3),), concurrency=1), quotas=(Share(9, ("default",)),)),
        replace(
            one_lane((tokens(3),), (tokens(3),), concurrency=1),
            quotas=(Share(9, ("default",)), Share(3, ("default",), "tokens")),
        ),
        "3.0 of 3 tokens are taken",
    ),
    "a lower price": (priced({"tokens": 0.25}, tokens(4)), priced({"tokens": 0.5}, tokens(4)), "a. call 1 used"),
    "a price for each call": (
        priced({"tokens": 0.25}, tokens(4)), priced({"calls": 0.5, "tokens": 0.25}, tokens(4)), "a. call 1 used"
    ),
    "a price though the cost was told": (
        priced({"tokens": 0.25}, Call(recorded={"tokens": 4})),
        priced({"tokens": 0.25}, Call(recorded={"tokens": 4, "cost": 7})), "a. call 1 used",
    ),
    "a gate for each run": (
        replace(one_lane(GOOD), again=1), replace(one_lane(GOOD, limits=[RateLimit(per_second=1)]), again=1),
        "more than Rate",
    ),
    "a lane that waits for another": (
        Workload(0, dict.fromkeys("ab", ExecutionPolicy(concurrency=1)), TWO_AND_ONE),
        Workload(0, dict.fromkeys("ab", ExecutionPolicy(concurrency=2)), TWO_AND_ONE),
        "in their way",
    ),
    "no stop": (one_lane(FAIL, FAIL), one_lane(FAIL, FAIL, stop=ONCE), "did not stop"),
    "a stop for no reason": (
        one_lane(FAIL, GOOD, concurrency=1, stop=ONCE), one_lane(FAIL, GOOD, concurrency=1), "max_failures after"
    ),
    "a longer drain": (
        one_lane(FAIL, WORK, stop=ONCE), one_lane(FAIL, WORK, stop=replace(ONCE, drain_seconds=0.01)), "after the stop"
    ),
    "a shorter drain": (
        one_lane(FAIL, WORK, stop=replace(ONCE, in_flight="abandon")), one_lane(FAIL, WORK, stop=ONCE), "before its"
    ),
    "a later timeout": (
        one_lane(GOOD, WORK, stop=StopConditions(timeout=0.015)),
        one_lane(GOOD, WORK, stop=StopConditions(timeout=0.01)), "stopped after 0.015",
    ),
    "more lookahead": (
        one_lane(WORK, WORK, GOOD, concurrency=1, stop=StopConditions(timeout=0.01)),
        one_lane(WORK, WORK, GOOD, concurrency=1, lookahead=1, stop=StopConditions(timeout=0.01)),
        "3 tasks of default",
    ),
    "another value": (one_lane((OK, BAD)), one_lane((Call(outcome="empty"), BAD)), "0: succeeded"),
    "another outcome": (one_lane(GOOD), one_lane(FAIL), "answers ok, not TaskError"),
    "a longer call": (one_lane(GOOD), one_lane(WORK), "took 0.0"),
    "more inputs": (one_lane(GOOD), one_lane(GOOD, GOOD), "1 inputs of 2 were taken"),
    "a child that nothing led to": (garden("a", "b", children={"a": "b"}), garden("a", "b"), "nothing led to it"),
    "a child that was not asked": (garden("a", "b"), garden("a", "b", children={"a": "b"}), "never asked"),
    "roots in another order": (
        garden("a", "b", roots=("a", "b")), garden("a", "b", roots=("b", "a")), "in the order of the roots"
    ),
}


@pytest.mark.parametrize("name", CONFUSIONS)
def test_the_oracle_tells_one_policy_from_another(name: str) -> None:
    first, second, words = CONFUSIONS[name]
    driver = DRIVERS[HOW.get(name, "simulation")]
    runs = driver.run(first)
    check(first, runs, True)
    check(second, driver.run(second), True)
    with pytest.raises(Broken, match=words):
        check(second, runs, True)
