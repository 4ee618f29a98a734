"""Counters: a snapshot of all runs so far that never goes back, and as text that Prometheus reads."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from contract_support import HANG, WORLDS, World
from limiter_support import in_child
from prometheus_client.parser import text_string_to_metric_families
from shared import PATIENCE, until

from qengine import (
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    ConcurrentExecutor,
    ExecutionPolicy,
    QueryExecutor,
    Quota,
    RateLimitError,
    RetryPolicy,
    Source,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.core.gate import Gate
from qengine.core.lane import Lane
from qengine.counters import MAX_SOURCES, OTHERS, Counters, SourceCounters, Tally
from qengine.model import SourceReport
from qengine.testing import VirtualClock

COUNTED = (
    "calls", "success_count", "failure_count", "cancelled_count", "retries", "throttled", "busy_seconds",
)
AGAIN = RetryPolicy(max_attempts=2, backoff=0.0)


@pytest.fixture(params=[name for name in WORLDS if name != "simulation"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


def numbers(counters: Counters) -> dict[tuple[str, ...], float]:
    """All that may never go back."""
    found: dict[tuple[str, ...], float] = {("runs",): counters.runs}
    for name, source in counters.by_source.items():
        found.update({(name, field): getattr(source, field) for field in COUNTED})
        found.update({(name, "skipped", reason): count for reason, count in source.skipped.items()})
        found.update({(name, "usage", unit): used for unit, used in source.usage.items()})
    return found


def gone_back(before: Counters, after: Counters) -> list[str]:
    now = numbers(after)
    return [f"{key}: {was} -> {now.get(key)}" for key, was in numbers(before).items() if now.get(key, -1) < was]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Each sample by its name and its labels' values, as Prometheus' own parser reads it."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_after_its_runs_the_counters_are_the_sums_of_the_reports(world: World) -> None:
    def script(payload: Any) -> Any:
        if payload is HANG:
            yield HANG
        yield 0.0
        if isinstance(payload, RateLimitError) and payload.args == ("once",):
            payload.args = ("again",)
            raise payload
        if isinstance(payload, BaseException) and not isinstance(payload, RateLimitError):
            raise payload
        return payload

    policy = ExecutionPolicy(concurrency=2, budget=9, retry=AGAIN)
    scheduler = world.scheduler(script, policy, on_event=lambda event: None, key=lambda payload: str(payload))
    hang = Task(HANG, timeout=0.05)
    inputs = [1, 1, TaskError("no"), TransientError("x"), RateLimitError("once", retry_after=0.001), hang, *range(2, 9)]
    reports = [world.run_with(scheduler, list(inputs)) for _ in range(2)]

    counters = scheduler.counters()
    found = counters.by_source["default"]
    assert (counters.runs, counters.active_runs) == (2, 0)
    for field in COUNTED:
        summed = sum(getattr(report.by_source["default"], field) for report in reports)
        assert getattr(found, field) == pytest.approx(summed), field
    assert found.retries == 2 and found.throttled >= 1 and found.calls == 18
    skipped = [report.by_source["default"].skipped for report in reports]
    assert found.skipped == {reason: sum(one[reason] for one in skipped) for reason in skipped[0]}
    assert found.skipped["duplicate"] == 2 and found.skipped["budget_exhausted"] > 0
    assert (found.running, found.queued, found.remaining, found.breaker) == (0, 0, {}, None)
    assert found.usage == {}


def test_usage_is_counted_by_unit_and_of_calls_that_are_over() -> None:
    def fetch(query: Any) -> list[int]:
        if query.payload:
            current_attempt().record(tokens=query.payload, cost=0.25)
        seen.append(executor.counters().by_source["paid"])
        return []

    class Roots:
        def queries(self, node: int, source: Source) -> list[int]:
            return [node]

        def children(self, node: int, result: object) -> list[int]:
            return []

    seen: list[SourceCounters] = []
    executor = QueryExecutor([Source("paid", fetch, cost=2.0)], Roots())
    report = executor.run([0, 10, 20])
    assert [source.usage.get("cost", 0) for source in seen] == [0, 2.0, 2.25]
    assert [(one.calls, one.running, one.success_count) for one in seen] == [(1, 1, 0), (2, 1, 1), (3, 1, 2)]
    found = executor.counters().by_source["paid"]
    assert found.usage == {"cost": 2.5, "tokens": 30}
    assert {**found.usage, "calls": 3} == report.by_source["paid"].usage


def test_what_goes_on_is_counted_and_shown_as_it_stands() -> None:
    clock = VirtualClock()
    seen: list[tuple[float, SourceCounters]] = []
    quota = Quota(100, per="day")

    def task(payload: int) -> None:
        clock.sleep(10.0 if payload < 2 else 1.0)
        if payload == 1:
            seen.append((clock.now(), scheduler.counters().by_source["default"]))
        if payload == 4:
            raise ValueError("bad")

    policy = ExecutionPolicy(concurrency=2, budget=7, breaker=BreakerPolicy(failures=1, on_open="skip"))
    scheduler = TaskScheduler(task, policy, clock=clock)
    scheduler.run(range(6))
    (at, found), = seen
    assert at == 10.0
    assert (found.calls, found.running, found.queued, found.remaining) == (3, 2, 3, {"calls": 4})
    assert found.breaker == "closed"
    after = scheduler.counters().by_source["default"]
    assert (after.running, after.queued, after.remaining, after.breaker) == (0, 0, {}, "open")

    class Roots:
        def queries(self, node: int, source: Source) -> list[int]:
            return [node] if source.name == "counted" else []

        def children(self, node: int, result: object) -> list[int]:
            return []

    source = Source("counted", lambda query: [], quota=quota, breaker=BreakerPolicy())
    executor = QueryExecutor([source, Source("free", lambda query: [])], Roots())
    executor.run(range(30))
    found = executor.counters().by_source["counted"]
    assert (found.remaining, found.breaker) == ({"calls": 70}, "closed")
    assert executor.counters().by_source["free"] == SourceCounters()
    quota.reserve(5).commit()
    assert executor.counters().by_source["counted"].remaining["calls"] == 65, "as it is now, also between two runs"


def test_single_calls_are_counted_over_and_over_though_their_lane_is_made_anew() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(budget=100))
    last = scheduler.counters()
    for number in range(1, 6):
        assert scheduler.call(-number) == number
        counters = scheduler.counters()
        assert gone_back(last, counters) == []
        assert (counters.by_source["default"].success_count, counters.runs, counters.active_runs) == (number, number, 0)
        last = counters
    scheduler.run([1, 2])
    assert scheduler.counters().by_source["default"].calls == 7

    async def task(payload: int) -> int:
        await asyncio.sleep(0)
        return payload

    async def main() -> None:
        for number in range(1, 4):
            await asyncio.gather(*(twin.call(payload) for payload in range(5)))
            assert twin.counters().by_source["default"].success_count == 5 * number

    twin = AsyncTaskScheduler(task, ExecutionPolicy())
    for _ in range(2):
        asyncio.run(main() if not twin.counters().runs else twin.run([1, 2]))
    assert twin.counters().by_source["default"].calls == 17


def test_a_prediction_is_counted_nowhere() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy())
    assert simulate(scheduler, range(10), latency=1.0).success_count == 10
    assert scheduler.counters() == Counters()


def test_sources_of_an_asyncio_hierarchy_are_counted_each() -> None:
    async def fetch(query: Any) -> list[int]:
        return [query.payload]

    class Two:
        def queries(self, node: str, source: Source) -> list[str]:
            return [node]

        def children(self, node: str, result: object) -> list[str]:
            return [node + "1", node + "2"] if len(node) < 2 else []

    executor = AsyncQueryExecutor([Source("a", fetch), Source("b", fetch, budget=1)], Two())
    asyncio.run(executor.run(["x"]))
    found = executor.counters().by_source
    assert (found["a"].success_count, found["b"].success_count, found["b"].skipped) == (3, 1, {"budget_exhausted": 2})


def test_a_stream_is_counted_while_it_goes_on_and_when_it_was_left() -> None:
    executor = ConcurrentExecutor(abs, ExecutionPolicy(concurrency=2))
    with executor.stream(iter(range(10**6))) as stream:
        next(stream)
        during = executor.counters()
        assert (during.runs, during.active_runs) == (1, 1) and during.by_source["default"].success_count >= 1
    after = executor.counters()
    assert gone_back(during, after) == []
    assert after.active_runs == 0 and after.by_source["default"].running == 0
    assert stream.report is not None
    assert after.by_source["default"].success_count == stream.report.success_count


@pytest.mark.abandons("a call that hangs is the subject")
def test_calls_that_hang_are_shown_until_they_return() -> None:
    go_on, returned = threading.Event(), threading.Semaphore(0)

    def task(payload: int) -> None:
        if payload < 2:
            go_on.wait(PATIENCE)

    def told(event: Any) -> None:
        if event.kind == "late":
            returned.release()

    scheduler = TaskScheduler(task, ExecutionPolicy(concurrency=4), on_event=told)
    scheduler.run([Task(0, timeout=0.02), Task(1, timeout=0.02), 2, 3, 4])
    assert scheduler.counters().by_source["default"].hanging == 2
    scheduler.run([7])
    assert scheduler.counters().by_source["default"].hanging == 2
    go_on.set()
    for _ in range(2):
        assert returned.acquire(timeout=PATIENCE)
    assert scheduler.counters().by_source["default"].hanging == 0


# ---- never back ------------------------------------------------------------------------------------------------------


@pytest.mark.stress
def test_a_counter_never_goes_back_whatever_goes_on(stress_count: Callable[[int], int]) -> None:
    """Runs that end, are cancelled with work that nobody had picked up, and single calls, watched by two threads."""
    window = Window(limit=10**6, seconds=0.01)
    policy = ExecutionPolicy(concurrency=4, limits=[window], retry=AGAIN, stop=StopConditions(in_flight="abandon"))
    failing = {3, 17}

    def task(payload: int) -> int:
        if payload in failing:
            raise TransientError("x")
        current_attempt().record(tokens=1)
        return payload

    scheduler = TaskScheduler(task, policy, lane_by=lambda payload: payload % 3)
    over = threading.Event()
    wrong: list[str] = []
    looks = [0, 0]

    def watch(which: int) -> None:
        last = scheduler.counters()
        while not over.is_set():
            counters = scheduler.counters()
            wrong.extend(gone_back(last, counters))
            for name, source in counters.by_source.items():
                ended = source.success_count + source.failure_count
                if ended > source.calls:
                    wrong.append(f"{name}: {ended} outcomes of {source.calls} calls")
            looks[which] += 1
            last = counters

    watchers = [threading.Thread(target=watch, args=(which,)) for which in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reports = []
    try:
        for watcher in watchers:
            watcher.start()
        for number in range(stress_count(5)):
            token = CancellationToken()
            reports.append(scheduler.run((Task(n, amount={"calls": 1}) for n in range(60)), token))
            threading.Timer(0.0005 * number, token.cancel).start()
            reports.append(scheduler.run(iter(range(400)), token))
            scheduler.call(-number)
        until(lambda: min(looks) > 2)
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
        sys.setswitchinterval(interval)
        gc.collect()
    assert wrong == []
    counters = scheduler.counters()
    done = sum(report.success_count for report in reports) + stress_count(5)
    assert sum(source.success_count for source in counters.by_source.values()) == done


class FakeRun:
    """A run that counts what it is told to."""

    def __init__(self, *names: str) -> None:
        self.lanes = [
            Lane(name, Gate((), None, threading.Lock()), abs, retry=RetryPolicy()) for name in names
        ]
        self.others: SourceReport | None = None
        self.crew = SimpleNamespace(run=self, over=False)


def test_a_call_that_is_revoked_or_a_lane_that_is_forgotten_takes_nothing_back() -> None:
    tally, run = Tally(), FakeRun("a", "b")
    tally.enter(run.crew)
    a, b = run.lanes
    a.calls, b.calls = 5, 2
    assert tally.counters().by_source["a"].calls == 5
    a.calls = 4
    assert tally.counters().by_source["a"].calls == 5
    a.calls = 6
    assert tally.counters().by_source["a"].calls == 6
    run.lanes.remove(b)
    assert tally.counters().by_source["b"].calls == 2
    run.crew.over = True
    tally.settle()
    assert {name: source.calls for name, source in tally.counters().by_source.items()} == {"a": 6, "b": 2}


def test_a_lane_that_is_made_anew_takes_nothing_back_though_its_last_run_may_not_be_over() -> None:
    tally, run = Tally(), FakeRun("a")
    lane, = run.lanes
    tally.enter(run.crew)
    lane.calls = 3
    tally.settle([lane])
    lane.renew()
    again = SimpleNamespace(run=run, over=False)
    tally.enter(again)
    lane.calls = 4
    run.crew.over = again.over = True
    tally.settle()
    assert tally.counters().by_source["a"].calls == 7


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many sources are counted each."""
    assert MAX_SOURCES == 1000
    monkeypatch.setattr("qengine.counters.MAX_SOURCES", 20)
    return 20


def test_beyond_so_many_sources_the_rest_share_their_counters_and_the_sum_is_right(few: int) -> None:
    names = [f"key {number}" for number in range(few + 50)]
    tally, run, other = Tally(), FakeRun(*names), FakeRun("another", names[0], names[-1])
    tally.enter(run.crew)
    for lane in run.lanes:
        lane.calls = 2
    first = tally.counters()
    assert len(first.by_source) == few + 1
    assert list(first.by_source)[:2] == names[:2] and first.by_source[OTHERS].calls == 2 * 50
    tally.enter(other.crew)
    for lane in other.lanes:
        lane.calls = 1
    other.crew.over = True      # the younger run ends first: no name changes its place
    tally.settle()
    run.crew.over = True
    tally.settle()
    last = tally.counters()
    assert gone_back(first, last) == []
    assert last.by_source[names[0]].calls == 3 and last.by_source[OTHERS].calls == 2 * 50 + 2
    assert sum(source.calls for source in last.by_source.values()) == 2 * len(names) + 3


def test_what_a_forgotten_source_had_counted_is_not_counted_twice_when_the_others_have_it(few: int) -> None:
    names = [f"key {number}" for number in range(few)]
    tally, run = Tally(), FakeRun(*names, OTHERS)
    tally.enter(run.crew)
    for lane in run.lanes:
        lane.calls = 1
    tally.counters()
    run.lanes[-1].calls += run.lanes.pop(7).calls       # what it has counted is now counted by the others
    run.lanes[-1].calls += 4
    counters = tally.counters()
    assert counters.by_source[names[7]].calls == 1
    assert sum(source.calls for source in counters.by_source.values()) == few + 1 + 4


# ---- from anywhere ---------------------------------------------------------------------------------------------------


def test_no_lock_of_a_run_is_asked_for() -> None:
    """Though whoever speaks for everybody never lets go of the core."""
    asked: list[Counters] = []

    def task(payload: int) -> None:
        if payload == 5:
            with scheduler.tally._state.live[0]._lock:
                asked.append(scheduler.counters())

    scheduler = TaskScheduler(task, ExecutionPolicy(concurrency=1))
    assert scheduler.run(range(10)).all_succeeded
    assert asked[0].by_source["default"].success_count == 5


def storm(count: int) -> tuple[int, list[str]]:
    """Count a run and ask for the counters in a signal handler that comes at any instant of the same."""
    wrong: list[str] = []
    last = [Counters()]
    struck = 0

    def strike(*_: object) -> None:
        nonlocal struck
        struck += 1
        tally.enter(SimpleNamespace(run=FakeRun("in a handler"), over=True))
        before = last[0]        # another signal may come while this one asks
        counters = tally.counters()
        wrong.extend(gone_back(before, counters))
        last[0] = counters

    tally, run = Tally(), FakeRun("a")
    tally.enter(run.crew)
    signal.signal(signal.SIGALRM, strike)
    for number in range(count):
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + (number % 100) * 1e-6)
        run.lanes[0].calls += 1
        tally.counters()
        tally.enter(SimpleNamespace(run=FakeRun("b"), over=True))
        tally.settle()
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    tally.settle()
    if tally.counters().runs != 1 + count + struck:
        wrong.append(f"{tally.counters().runs} runs of {1 + count + struck}")
    return struck, wrong


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.not_under_coverage("a process of its own is not measured")
def test_a_signal_handler_may_ask_at_any_instant(stress_count: Callable[[int], int]) -> None:
    count = stress_count(600)
    struck, wrong = in_child(lambda: storm(count), 60.0 + count / 500)
    assert wrong == []
    assert struck > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_counts_from_0() -> None:
    executor = ConcurrentExecutor(abs)
    executor.run([1, 2])

    def child() -> Any:
        fresh = executor.counters() == Counters()
        executor.run([3])
        return fresh, executor.counters().by_source["default"].calls

    assert in_child(child, 30.0) == (True, 1)
    assert executor.counters().by_source["default"].calls == 2


def test_a_run_that_is_over_is_held_by_nobody() -> None:
    class Payload:
        pass

    payload = Payload()
    there = weakref.ref(payload)
    executor = ConcurrentExecutor(lambda payload: None)
    executor.run([payload])
    executor.last_report = None
    del payload
    gc.collect()
    assert there() is None
    assert executor.tally._state.live == executor.tally._state.hung == ()
    assert executor.counters().by_source["default"].calls == 1


# ---- as text ---------------------------------------------------------------------------------------------------------


def test_prometheus_reads_the_text_as_it_was_meant() -> None:
    names = ['plain', 'quo"te', 'back\\slash', 'new\nline', 'both\\n"', "ü \u2028 {}=,#", "", "half \ud800"]
    policy = ExecutionPolicy(budget=2, breaker=BreakerPolicy())
    scheduler = TaskScheduler(lambda payload: 1 / payload[1], policy, lane_by=lambda payload: payload[0])
    scheduler.run([(name, value) for name in names for value in (1, 0, 2)])
    counters = scheduler.counters()
    text = counters.prometheus()
    assert text.endswith("\n") and "\n\n" not in text
    text.encode("utf-8")
    found = samples(text)
    for name, source in counters.by_source.items():
        shown = name.replace("\ud800", "\\ud800")
        assert found["qengine_calls_total", shown] == source.calls == 2
        assert found["qengine_successes_total", shown] == source.success_count == 1
        assert found["qengine_failures_total", shown] == source.failure_count == 1
        assert found["qengine_skipped_total", shown, "budget_exhausted"] == 1
        assert found["qengine_busy_seconds_total", shown] == source.busy_seconds
        assert [found["qengine_breaker_state", shown, state] for state in ("closed", "open", "half open")] == [1, 0, 0]
    assert found["qengine_runs_total",] == 1 and found["qengine_runs_active",] == 0


def everything() -> Counters:
    """Counters with all there is."""
    full = SourceCounters(
        calls=7, success_count=3, failure_count=2, cancelled_count=1, skipped={"unsupported": 2, "duplicate": 1},
        retries=4, throttled=5, rerouted=14, busy_seconds=1e-7, usage={"tokens": 1e21, "cost": float("inf")},
        running=6, queued=8, hanging=9, breaker="half open", remaining={"calls": 10, "tokens": -11.5},
    )
    return Counters(12, 13, {"one": SourceCounters(), "all": full})


def test_every_field_is_in_the_text_with_its_kind_and_in_the_same_order_always() -> None:
    text = everything().prometheus("my_app")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        assert family.documentation
        ends = {sample.name.endswith("_total") for sample in family.samples}
        assert ends == {family.type == "counter"} and family.type in ("counter", "gauge")
        assert family.name.startswith("my_app_")
    values = sorted(sample.value for family in families.values() for sample in family.samples if sample.value)
    everywhere = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -11.5, 12, 13, 14, 1, 2, 1, 1e-7, 1e21, float("inf")]
    assert values == sorted(everywhere)
    assert samples(text)["my_app_remaining", "all", "tokens"] == -11.5
    assert "my_app_remaining" in families and ("my_app_remaining", "one", "tokens") not in samples(text)
    assert text == everything().prometheus("my_app")
    reasons = [line for line in text.splitlines() if line.startswith("my_app_skipped_total")]
    assert [line.split('reason="')[1].split('"')[0] for line in reasons] == ["duplicate", "unsupported"]
    assert {line.split()[1] for line in text.splitlines() if "cost" in line and "#" not in line} == {"+Inf"}
    assert len(fields(SourceCounters)) == 15, "a new field belongs into this test"


@pytest.mark.parametrize("prefix", ["", "1st", "with-dash", "with space", "ünicode", "a:b", "a\n"])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"prefix is .* allowed is"):
        Counters().prometheus(prefix)


def test_so_is_one_that_is_no_string() -> None:
    with pytest.raises(TypeError, match=r"prefix is 3 \(int\), allowed is"):
        Counters().prometheus(3)        # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_run_that_could_not_begin_does_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    executor = ConcurrentExecutor(abs)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="new thread"):
            executor.run([1])
    assert (executor.counters().runs, executor.counters().active_runs) == (1, 0)
    assert executor.run([-1]).values() == [1] and executor.counters().by_source["default"].calls == 1


def test_neither_payload_nor_value_nor_error_is_in_the_text() -> None:
    def task(payload: str) -> str:
        if payload == "sesame-2":
            raise TaskError(payload)
        return payload

    executor = ConcurrentExecutor(task)
    executor.run([Task("sesame-1", key="sesame-key", metadata={"key": "sesame"}), "sesame-2"])
    assert "sesame" not in executor.counters().prometheus() + repr(executor.counters())
