"""The journal, as its users see it: a run that was cut short is gone on with, and nothing that was told is lost.

Lives of one run: each has a scheduler, sources and a journal of its own, as another process would; the clock goes on.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from contract_support import COROUTINES, PLAIN, WORLDS, Ran, World, breaches, most_in_any_window

from qengine import (
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    Event,
    ExecutionPolicy,
    Journal,
    QEngineError,
    Query,
    QueryExecutor,
    Quota,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    Source,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TaskStatus,
    TaskTimeoutError,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.errors import StorageError
from qengine.testing import VirtualClock

ROOT = Path(__file__).resolve().parent.parent
ABANDON = StopConditions(in_flight="abandon")
RECALLED = "recalled"


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What another program reads in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


class Lab:
    """A world, a journal's file in it, and each call that any life has made: its payload, instant and number."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self.world: Any = world
        self.path = folder / "run.db"
        self.calls: list[tuple[Any, float, int]] = []
        self.changes: list[str] = []
        self.seconds = 1.0
        self.answer: Callable[[Any], Any] = lambda payload: [payload]
        self.is_async = name in COROUTINES

    @property
    def asked(self) -> list[Any]:
        return [payload for payload, _, _ in self.calls]

    @property
    def instants(self) -> list[float]:
        return [at for _, at, _ in self.calls]

    def script(self, payload: Any) -> Any:
        asked = payload.payload if isinstance(payload, Query) else payload
        self.calls.append((asked, self.world.now(), current_attempt().number))
        yield self.seconds
        return self.answer(asked)

    @property
    def fetch(self) -> Callable[[Any], Any]:
        function: Callable[[Any], Any] = (self.world.function if self.is_async else self.world.plain)(self.script)
        return function

    def source(self, name: str = "a", **fields: Any) -> Source:
        return Source(name, self.fetch, **fields)

    def live(
        self,
        inputs: Any,
        policy: ExecutionPolicy = PLAIN,
        *,
        cut: float | None = None,
        sources: Callable[[], list[Source]] | None = None,
        plan: Any = None,
        journal: Journal | None = None,
        kept: Mapping[str, Any] = {},
        **options: Any,
    ) -> Ran:
        """Live once, until the end or for so many seconds; what calls there are then are given up."""
        events: list[Event] = []
        listen = options.pop("on_event", None)

        def on_event(event: Event) -> None:
            events.append(event)
            if listen is not None:
                listen(event)

        options |= {"clock": self.world.clock, "on_event": on_event}
        token = None if cut is None else CancellationToken(timeout=cut, now_fn=self.world.clock.now)
        opened = journal or Journal(self.path, **{"synchronous": "NORMAL"} | dict(kept))
        try:
            made: Any
            if plan is not None:
                assert sources is not None
                kind = AsyncQueryExecutor if self.is_async else QueryExecutor
                made = kind(sources(), plan, stop=policy.stop, journal=opened, **options)
            else:
                doer: Any = self.fetch if sources is None else sources()
                scheduler = AsyncTaskScheduler if self.is_async else TaskScheduler
                made = scheduler(doer, policy, journal=opened, **options)
            ran: Ran = self.world.run_to_end(made, events, inputs, token)
        finally:
            self.changes = [*opened.changes]
            if journal is None:
                opened.close()
        return ran

    def rest(self, seconds: float) -> None:
        """Let time pass between two lives."""
        self.world.clock.sleep(seconds)


@pytest.fixture(params=["stepped threads", "virtual loop"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    made = WORLDS[request.param]()
    yield Lab(made, request.param, tmp_path)
    made.close()


IN_THREADS, IN_A_LOOP = (
    pytest.mark.parametrize("lab", [name], indirect=True) for name in ("stepped threads", "virtual loop")
)
"""Of a test of what is the same in both worlds: one of them will do, so the file is quick."""


def policy(**fields: Any) -> ExecutionPolicy:
    given: dict[str, Any] = {"concurrency": 2, "stop": ABANDON} | fields
    return ExecutionPolicy(**given)


def routed(**fields: Any) -> ExecutionPolicy:
    given: dict[str, Any] = {"stop": ABANDON} | fields
    return ExecutionPolicy(**given)


def values(ran: Ran) -> list[Any]:
    return [result.value for result in ran.report.results]


# ---- resumed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [[], [RateLimit(per_second=100, burst=100)]], ids=["free", "kept"])
def test_a_run_that_was_cut_short_goes_on_where_it_was(lab: Lab, limits: list[Any]) -> None:
    first = lab.live(range(10), policy(limits=limits), cut=2.5)
    assert first.statuses.count("succeeded") == 4
    assert first.report.by_source["default"].calls == 6
    ran = lab.live(range(10), policy(limits=limits))
    assert values(ran) == [[n] for n in range(10)]
    assert [result.task.payload for result in ran.report.results] == [*range(10)]
    assert sorted(lab.asked) == sorted([*range(10), 4, 5]), "only what was in flight is asked again"
    source = ran.report.by_source["default"]
    assert (source.recalled, source.calls, source.usage["calls"], source.success_count) == (4, 12, 12, 10)
    assert source.busy_seconds == pytest.approx(11.0)
    assert [event.index for event in ran.of(RECALLED)] == [0, 1, 2, 3]
    assert len(ran.of("start")) == 6


def test_a_run_that_is_done_asks_nothing_and_says_the_same(lab: Lab) -> None:
    first = lab.live(range(5), policy())
    lab.rest(100.0)
    again = lab.live(range(5), policy())
    assert len(lab.calls) == 5
    for one, other in zip(first.report.results, again.report.results, strict=True):
        assert (one.status, one.value, one.attempts, one.source, one.usage) == (
            other.status, other.value, other.attempts, other.source, other.usage
        )
        assert one.started_at == pytest.approx(other.started_at)
        assert one.duration == pytest.approx(other.duration)
    assert again.report.all_succeeded
    assert again.report.by_source["default"].latency(0.5) is None, "it made no call"


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopConditions(max_results=3), "max_results"),
        (StopConditions(timeout=2.5, in_flight="abandon"), "timeout"),
        (StopConditions(max_failures=1), "max_failures"),
    ],
    ids=["max_results", "timeout", "max_failures"],
)
def test_a_run_that_its_stop_conditions_ended_goes_on_without_them(lab: Lab, stop: StopConditions, reason: str) -> None:
    def answer(payload: int) -> int:
        if payload == 3 and reason == "max_failures":
            raise TaskError("no such thing")
        return payload

    lab.answer = answer
    first = lab.live(range(8), policy(stop=stop))
    assert first.report.stop_reason == reason
    done = [result.task.payload for result in first.report.results if result.attempts and result.status.value in
            ("succeeded", "failed")]
    ran = lab.live(range(8), policy())
    in_flight = [n for n in lab.asked[: len(first.of("start"))] if n not in done]
    assert Counter(lab.asked) == Counter([*range(8), *in_flight])
    assert [result.status.value for result in ran.report.results] == [
        "failed" if n == 3 and reason == "max_failures" else "succeeded" for n in range(8)
    ]


def test_a_failure_that_is_recalled_stops_nothing(lab: Lab) -> None:
    def answer(payload: int) -> int:
        if payload < 3:
            raise TaskError("no")
        return payload

    lab.answer = answer
    stop = StopConditions(max_failures=3)
    assert lab.live(range(8), policy(concurrency=1, stop=stop)).report.stop_reason == "max_failures"
    ran = lab.live(range(8), policy(concurrency=1, stop=stop))
    assert ran.report.stop_reason is None
    assert (ran.report.failure_count, ran.report.success_count) == (3, 5)


def test_results_that_are_recalled_are_results_of_the_run(lab: Lab) -> None:
    stop = StopConditions(max_results=3)
    lab.live(range(8), policy(concurrency=1, stop=stop))
    ran = lab.live(range(8), policy(concurrency=1, stop=stop))
    assert lab.asked == [0, 1, 2]
    assert ran.report.stop_reason == "max_results"


def report_of(error: Any) -> Any:
    return error.report


@pytest.mark.not_under_coverage
def test_ctrl_c_loses_no_answer(tmp_path: Path) -> None:
    world: Any = WORLDS["threads"]()
    lab = Lab(world, "threads", tmp_path)
    lab.seconds = 0.02
    journal = Journal(lab.path)

    def answer(payload: int) -> list[int]:
        if payload == 12:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        return [payload]

    lab.answer = answer
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    scheduler = TaskScheduler(lab.fetch, ExecutionPolicy(concurrency=2), journal=journal)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            scheduler.run(range(10_000))
    finally:
        signal.signal(signal.SIGALRM, before)
        journal.close()
    told = [result.task.payload for result in report_of(caught.value).results if result.status.value == "succeeded"]
    stored = {json.loads(key) for key, in rows(lab.path, "SELECT key FROM tasks WHERE status = 'succeeded'")}
    assert told
    assert stored == set(told)
    lab.calls.clear()
    lab.answer = lambda payload: [payload]
    with Journal(lab.path) as again:
        report = TaskScheduler(lab.fetch, ExecutionPolicy(concurrency=2), journal=again).run(range(len(told) + 5))
    assert report.all_succeeded
    assert not set(told) & set(lab.asked)


def test_a_call_that_hung_when_its_journal_was_closed_writes_nothing(tmp_path: Path) -> None:
    release, path = threading.Event(), tmp_path / "run.db"

    def hang(payload: int) -> int:
        release.wait()
        return payload

    with Journal(path) as journal:
        scheduler = TaskScheduler(hang, policy(concurrency=1), journal=journal)
        report = scheduler.run([1], CancellationToken(timeout=0.05))
    assert report.abandoned == 1
    with Journal(path) as other:
        release.set()
        assert TaskScheduler(str, journal=other).run([1]).values() == ["1"]


# ---- values and payloads ---------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Place:
    name: str
    colour: Colour = Colour.RED


VALUES = [None, True, 0, -5, 1e300, 0.1, "", "ä\U0001f600", "\ud800", [1, [2]], {"a": {"b": None}}, "x" * 10_000]


@IN_THREADS
def test_values_come_back_as_they_were(lab: Lab) -> None:
    lab.answer = lambda number: VALUES[number]
    for _ in range(2):
        ran = lab.live(range(len(VALUES)), policy())
        assert values(ran) == VALUES
        assert [type(value) for value in values(ran)] == [type(value) for value in VALUES]
    assert len(lab.calls) == len(VALUES)


@IN_A_LOOP
def test_what_json_does_not_know_comes_back_by_a_codec(lab: Lab) -> None:
    given = [Place("x"), {1: (2, 3)}, {4, 5}, datetime(2026, 5, 1, tzinfo=UTC), b"\0"]
    lab.answer = lambda number: given[number]
    for _ in range(2):
        assert values(lab.live(range(len(given)), policy(), kept={"codec": pickle})) == given
    assert len(lab.calls) == len(given)


@IN_THREADS
def test_json_gives_lists_for_tuples_and_text_for_keys(lab: Lab) -> None:
    lab.answer = lambda number: ({number: number}, 2)
    assert values(lab.live([1], policy())) == [({1: 1}, 2)]
    assert values(lab.live([1], policy())) == [[{"1": 1}, 2]]


@IN_A_LOOP
def test_a_value_that_cannot_be_stored_is_that_tasks_error(lab: Lab) -> None:
    lab.answer = lambda number: object() if number == 1 else {number} if number == 2 else number
    ran = lab.live(range(4), policy())
    assert ran.statuses == ["succeeded", "error", "error", "succeeded"]
    assert "cannot be stored in the journal" in str(ran.report.results[1].error)
    again = lab.live(range(4), policy())
    assert again.statuses == ran.statuses
    assert "cannot be stored in the journal" in str(again.report.results[1].error)
    assert len(lab.calls) == 4


@IN_THREADS
def test_a_codec_that_makes_no_text_is_that_tasks_error(lab: Lab) -> None:
    class Odd:
        @staticmethod
        def dumps(value: Any) -> Any:
            return value

        @staticmethod
        def loads(stored: Any) -> Any:
            return stored

    lab.answer = lambda number: "text" if number else ["a list"]
    ran = lab.live(range(2), policy(), kept={"codec": Odd()})
    assert ran.statuses == ["error", "succeeded"]
    assert "codec made list of the value" in str(ran.report.results[0].error)


@IN_A_LOOP
def test_a_value_that_cannot_be_read_again_is_not_lost(lab: Lab) -> None:
    class Codec:
        broken = False

        def dumps(self, value: Any) -> str:
            return json.dumps(value)

        def loads(self, stored: str) -> Any:
            if self.broken:
                raise ValueError("the class has moved")
            return json.loads(stored)

    codec = Codec()
    lab.live(range(3), policy(), kept={"codec": codec})
    codec.broken = True
    ran = lab.live(range(3), policy(), kept={"codec": codec})
    assert ran.statuses == ["error"] * 3
    assert "the class has moved" in str(ran.report.results[0].error)
    codec.broken = False
    assert values(lab.live(range(3), policy(), kept={"codec": codec})) == [[0], [1], [2]]
    assert lab.asked == [0, 1, 2]


@IN_THREADS
def test_another_codec_is_refused_and_the_file_untouched(lab: Lab) -> None:
    lab.live(range(3), policy())
    before = rows(lab.path, "SELECT * FROM tasks")
    with pytest.raises(StorageError, match="has values stored as JSON, and pickle is given now"):
        Journal(lab.path, codec=pickle)
    assert rows(lab.path, "SELECT * FROM tasks") == before
    assert values(lab.live(range(3), policy())) == [[0], [1], [2]]


PAYLOADS = [
    1, 1.0, True, None, "1", "x" * 500, "\ud800", (1, 2), [1, 2, 3], {"b": 1, "a": 2}, {"a": [{"c": 1}]}, Place("x"),
    Place("y"), Colour.RED, date(2026, 5, 1), {"p": Place("z")}, frozenset({3, 1, 2}), b"\1\2", ROOT,
]


@IN_A_LOOP
def test_payloads_of_many_kinds_are_known_again_whatever_their_order(lab: Lab) -> None:
    lab.answer = repr
    expected = {repr(payload): repr(payload) for payload in PAYLOADS}
    lab.live(PAYLOADS, policy(), cut=4.5)
    answered = {repr(payload) for payload in lab.asked[:8]}
    lab.calls.clear()
    ran = lab.live(PAYLOADS[::-1], policy())
    assert {repr(result.task.payload): result.value for result in ran.report.results} == expected
    assert not answered & {repr(payload) for payload in lab.asked}


@pytest.mark.parametrize(
    ("one", "other"),
    [(b"\x12", "12"), (ROOT, str(ROOT)), (date(2026, 5, 1), "2026-05-01"), ({1: 2}, {"1": 2}), ({"a"}, ['"a"'])],
    ids=["bytes", "path", "date", "keys", "set"],
)
@IN_THREADS
def test_payloads_that_are_not_equal_are_not_taken_for_each_other(lab: Lab, one: Any, other: Any) -> None:
    lab.answer = repr
    lab.live([one], policy())
    assert values(lab.live([other, one], policy())) == [repr(other), repr(one)]


@pytest.mark.parametrize("limits", [[], [Window(100, 1)]], ids=["free", "kept"])
@IN_A_LOOP
def test_a_payload_without_a_stable_form_is_that_tasks_error_and_not_asked(lab: Lab, limits: list[Any]) -> None:
    odd = object()
    ran = lab.live([1, odd, 2], policy(limits=limits, retry=RetryPolicy(3, backoff=0.0)))
    assert ran.statuses == ["succeeded", "error", "succeeded"]
    assert "give the task a key" in str(ran.report.results[1].error)
    assert lab.asked == [1, 2]
    ran = lab.live([1, odd, 2], policy(limits=limits))
    assert ran.statuses == ["succeeded", "error", "succeeded"]
    assert lab.asked == [1, 2]


@IN_THREADS
def test_with_a_key_of_its_own_any_payload_will_do(lab: Lab) -> None:
    lab.answer = lambda payload: "done"
    assert lab.live([Task(object(), key=("a", 1)), Task(object(), key="b")], policy()).report.all_succeeded
    ran = lab.live([Task(object(), key="b"), Task(object(), key=("a", 1)), Task(object(), key="c")], policy())
    assert ran.report.all_succeeded
    assert len(lab.calls) == 3
    assert [event.index for event in ran.of(RECALLED)] == [0, 1]


@IN_A_LOOP
def test_equal_payloads_have_a_result_each(lab: Lab) -> None:
    numbers: Iterator[int] = iter(range(100))
    lab.answer = lambda payload: next(numbers)
    first = lab.live(["x"] * 6, policy(), cut=2.5)
    told = [value for value in values(first) if value is not None]
    assert len(told) == 4
    ran = lab.live(["x"] * 7, policy())
    assert sorted(values(ran))[:4] == sorted(told)
    assert len(set(values(ran))) == 7
    assert lab.asked == ["x"] * 9


@IN_THREADS
def test_a_key_names_a_task_whatever_its_payload_and_a_second_one_is_a_duplicate(lab: Lab) -> None:
    inputs = [(1, "a"), (2, "b"), (1, "c"), (3, "d")]
    lab.live(inputs, policy(concurrency=1), key=lambda pair: pair[0], cut=2.5)
    ran = lab.live([(1, "other"), *inputs], policy(concurrency=1), key=lambda pair: pair[0])
    assert values(ran) == [[[1, "a"]], None, [[2, "b"]], None, [(3, "d")]]
    assert ran.reasons == [None, "duplicate", None, "duplicate", None]
    assert len(lab.calls) == 4, "of which one was in flight"


@IN_A_LOOP
def test_priorities_hold_among_what_is_left(lab: Lab) -> None:
    inputs = [Task(n, priority=n % 3) for n in range(9)]
    lab.live(inputs, policy(concurrency=1), cut=2.5)
    begun = lab.asked[:2]
    lab.calls.clear()
    ran = lab.live(inputs, policy(concurrency=1))
    assert values(ran) == [[n] for n in range(9)]
    assert lab.asked == [n for n in [0, 3, 6, 1, 4, 7, 2, 5, 8] if n not in begun]


@IN_THREADS
def test_batches_are_of_what_is_asked(lab: Lab) -> None:
    batches = policy(concurrency=4, batch_size=4, batch_backoff=10.0)
    lab.live(range(12), batches, cut=5.0)
    assert len(lab.calls) == 4
    ran = lab.live(range(12), batches)
    assert values(ran) == [[n] for n in range(12)]
    begun = [at for _, at, _ in lab.calls[4:]]
    assert begun == [begun[0]] * 4 + [begun[0] + 11.0] * 4, "the four that were recalled are none of a batch"


@IN_A_LOOP
def test_each_lane_goes_on(lab: Lab) -> None:
    inputs = [(lane, n) for n in range(4) for lane in range(30)]
    lanes: dict[str, Any] = {"lane_by": lambda pair: pair[0]}
    some = policy(concurrency=1, budget=3)
    lab.live(inputs, some, cut=1.5, **lanes)
    assert len(lab.calls) == 60
    ran = lab.live(inputs, some, **lanes)
    assert set(Counter(lane for lane, _ in lab.asked).values()) == {3}
    for lane in range(30):
        source = ran.report.by_source[str(lane)]
        assert (source.calls, source.recalled, source.success_count) == (3, 1, 2)
        assert source.skipped == {"budget_exhausted": 2}


# ---- failures and retries --------------------------------------------------------------------------------------------


STEADY = RetryPolicy(max_attempts=4, backoff=1.0, multiplier=1.0, jitter="none")


@pytest.mark.parametrize("limits", [[], [Window(100, 1)]], ids=["free", "kept"])
def test_attempts_count_on(lab: Lab, limits: list[Any]) -> None:
    def answer(payload: int) -> int:
        raise TransientError("busy")

    lab.answer = answer
    retrying = policy(retry=STEADY, limits=limits, concurrency=1)
    lab.live([7], retrying, cut=3.5)
    assert [number for _, _, number in lab.calls] == [1, 2]
    ran = lab.live([7], retrying)
    assert [number for _, _, number in lab.calls] == [1, 2, 3, 4]
    (result,) = ran.report.results
    assert (result.status, result.attempts, result.usage["calls"]) == (TaskStatus.FAILED, 4, 4)
    assert ran.report.by_source["default"].retries == 3
    assert ran.report.by_source["default"].calls == 4


def test_what_was_in_flight_keeps_the_count_of_its_attempts(lab: Lab) -> None:
    kept = policy(limits=[Window(100, 1)], retry=STEADY)
    lab.live([7], kept, cut=0.5)
    ran = lab.live([7], kept)
    assert [number for _, _, number in lab.calls] == [1, 2]
    assert ran.report.results[0].attempts == 2


def test_a_task_that_was_begun_twice_and_never_ended_is_told_as_that(lab: Lab) -> None:
    kept = policy(limits=[Window(1, 100.0)], retry=STEADY)
    lab.live([7, 8], kept, cut=0.5)
    ran = lab.live([7, 8], kept, cut=1.0)
    assert ran.statuses == ["cancelled"] * 2
    assert (ran.report.results[0].attempts, ran.report.results[0].started_at) == (1, 0.0)
    ran = lab.live([7, 8], kept)
    assert [result.attempts for result in ran.report.results] == [2, 1]


def test_a_throttled_attempt_does_not_count(lab: Lab) -> None:
    def answer(payload: int) -> int:
        if len(lab.calls) < 3:
            raise RateLimitError("slower", retry_after=5.0)
        return payload

    lab.answer = answer
    lab.live([7], policy(retry=STEADY), cut=2.0)
    ran = lab.live([7], policy(retry=STEADY))
    assert [number for _, _, number in lab.calls] == [1, 1, 1]
    assert lab.instants == [0.0, 6.0, 12.0], "the pause goes on"
    assert (ran.report.results[0].attempts, ran.report.by_source["default"].throttled) == (1, 2)


def test_what_the_attempts_of_a_task_used_is_known_in_every_life(lab: Lab) -> None:
    def answer(payload: int) -> int:
        current_attempt().record(tokens=5)
        if len(lab.calls) < 4:
            raise RateLimitError("slower", retry_after=2.0) if len(lab.calls) < 3 else TransientError("busy")
        return payload

    lab.answer = answer
    for cut in (2.0, None, None):
        ran = lab.live([7], policy(retry=STEADY), cut=cut)
    assert len(lab.calls) == 4
    (result,) = ran.report.results
    assert (result.attempts, dict(result.usage)) == (2, {"calls": 4, "tokens": 20})
    assert ran.report.by_source["default"].usage == {"calls": 4, "tokens": 20}


def test_what_was_throttled_is_told_of_a_task_that_is_recalled(lab: Lab) -> None:
    lab.answer = lambda payload: failing(payload) if len(lab.calls) > 2 else throttled()
    for _ in range(2):
        (result,) = lab.live([7], policy(retry=STEADY)).report.results
        assert (result.attempts, dict(result.usage)) == (1, {"calls": 3})
    assert len(lab.calls) == 3


def throttled() -> Any:
    raise RateLimitError("slower", retry_after=2.0)


def failing(payload: int) -> int:
    if payload == 1:
        raise TaskError("no such thing")
    if payload == 2:
        raise KeyError("ä")
    return payload


def test_what_failed_is_told_as_it_was(lab: Lab) -> None:
    lab.answer = failing
    lab.seconds = 3.0
    slow = policy(concurrency=1, timeout=5.0)
    first = lab.live(range(3), slow)
    lab.seconds = 6.0
    lab.live(range(4), slow)
    lab.calls.clear()
    ran = lab.live(range(4), slow)
    assert lab.calls == []
    assert ran.statuses == ["succeeded", "failed", "error", "timeout"]
    assert [type(result.error) for result in ran.report.results[1:]] == [TaskError, QEngineError, TaskTimeoutError]
    assert [str(result.error) for result in ran.report.results[1:3]] == ["no such thing", "KeyError: 'ä'"]
    assert [result.attempts for result in ran.report.results] == [1] * 4
    assert first.statuses == ran.statuses[:3]
    assert ran.report.failure_count == 3
    assert [event.detail for event in ran.of(RECALLED)] == ["succeeded", "failed", "error", "timeout"]


def test_what_failed_is_asked_again_if_that_is_wanted_from_its_first_attempt_on(lab: Lab) -> None:
    lab.answer = failing
    twice = policy(retry=RetryPolicy(2, backoff=0.0, retry_on=(TaskError, KeyError)))
    lab.live(range(4), twice)
    lab.calls.clear()
    lab.answer = lambda payload: -payload
    ran = lab.live(range(4), twice, kept={"retry_failed": True})
    assert values(ran) == [0, -1, -2, 3]
    assert sorted((payload, number) for payload, _, number in lab.calls) == [(1, 1), (2, 1)]
    ran = lab.live(range(4), twice)
    assert values(ran) == [0, -1, -2, 3]
    assert len(lab.calls) == 2
    assert len(rows(lab.path, "SELECT * FROM tasks")) == 4


# ---- streams and events ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_hands_out_what_is_recalled_too(lab: Lab, ordered: bool) -> None:
    lab.live([1, 3, 5], policy())
    with Journal(lab.path) as journal:
        ran = lab.world.stream(
            lab.script, range(8), policy(concurrency=1), ordered=ordered, journal=journal
        )
    told = [result.task.payload for result in ran.handed_out]
    assert sorted(told) == [*range(8)]
    assert {result.task.payload: result.value for result in ran.handed_out} == {n: [n] for n in range(8)}
    assert (told == [*range(8)]) == ordered
    assert ran.report.success_count == 8
    assert sorted(lab.asked) == [*range(8)]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_that_was_left_goes_on(lab: Lab, ordered: bool) -> None:
    left: list[int] = []

    def consume(result: Any) -> bool:
        left.append(result.task.payload)
        return len(left) < 5

    with Journal(lab.path) as journal:
        lab.world.stream(lab.script, range(20), policy(), ordered=ordered, consume=consume, journal=journal)
    lab.calls.clear()
    with Journal(lab.path) as journal:
        ran = lab.world.stream(lab.script, range(20), policy(), ordered=ordered, journal=journal)
    assert sorted(result.task.payload for result in ran.handed_out) == [*range(20)]
    assert not set(left) & set(lab.asked)


def is_stored(path: Path, payload: Any) -> bool:
    (count,), = rows(path, f"SELECT count(*) FROM tasks WHERE key = '{json.dumps(payload)}' AND status != 'started'")
    return bool(count)


@pytest.mark.parametrize("limits", [[], [Window(1000, 0.01)]], ids=["free", "kept"])
@pytest.mark.parametrize("name", ["threads", "asyncio", "in thread", "stepped threads", "virtual loop"])
def test_nothing_is_told_that_is_not_in_the_file(name: str, limits: list[Any], tmp_path: Path) -> None:
    world = WORLDS[name]()
    path, told, early = tmp_path / "run.db", Counter[str](), list[Any]()

    def script(payload: int) -> Any:
        yield 0.001
        if payload % 7 == 3:
            raise TaskError("no")
        return payload

    def listen(event: Event) -> None:
        if event.kind in ("answer", "result"):
            told[event.kind] += 1
            if not is_stored(path, event.index):       # which is its payload
                early.append(event)

    def consume(result: Any) -> None:
        told["handed out"] += 1
        if not is_stored(path, result.task.payload):
            early.append(result)

    given = ExecutionPolicy(concurrency=4, limits=limits)
    with Journal(path, synchronous="NORMAL") as journal:
        world.run_to_end(listening(world, script, given, listen, journal), [], range(40))
    with Journal(path, synchronous="NORMAL") as journal:
        world.stream(script, range(80), given, consume=consume, journal=journal)
    world.close()
    assert early == []
    assert told == {"answer": 40, "result": 40, "handed out": 80}


def listening(world: World, script: Any, given: ExecutionPolicy, listen: Any, journal: Journal) -> Any:
    return world.scheduler(script, given, on_event=listen, journal=journal)


def test_a_call_with_limits_is_in_the_file_before_it_is_made(lab: Lab) -> None:
    known: list[bool] = []

    def answer(payload: int) -> int:
        found = rows(lab.path, f"SELECT status, attempts FROM tasks WHERE key = '{payload}'")
        known.append(found == [("started", 1)])
        return payload

    lab.answer = answer
    lab.live(range(10), policy(limits=[RateLimit(per_second=5)]))
    assert known == [True] * 10


class Locked:
    """The file, locked by another program until it is told to let go."""

    def __init__(self, path: Path, then: Callable[[], object]) -> None:
        self._other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._other.execute("BEGIN IMMEDIATE")
        self._then = then
        self.is_over = False
        self._thread = threading.Thread(target=self._let_go)
        self._thread.start()

    def _let_go(self) -> None:
        time.sleep(0.05)        # in which somebody comes to wait for it
        self._then()
        time.sleep(0.05)
        self.is_over = True
        self._other.close()

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize("name", ["threads", "asyncio", "in thread"])
def test_a_call_that_is_given_up_before_it_is_in_the_file_is_not_made(name: str, tmp_path: Path) -> None:
    path, world, token, made = tmp_path / "run.db", WORLDS[name](), CancellationToken(), list[int]()
    locks: list[Locked] = []

    def work(payload: int) -> int:
        made.append(payload)
        locks.append(Locked(path, token.cancel))
        return payload

    given = policy(limits=[Window(9, 1.0)], concurrency=1)
    with Journal(path) as journal:
        report = world.run_with(world.scheduler(work, given, on_event=print, journal=journal), range(3), token)
    locks[0].join()
    world.close()
    assert made == [0]
    assert [result.status.value for result in report.results] == ["succeeded", "cancelled", "cancelled"]


def test_a_loop_goes_on_while_a_commit_waits(tmp_path: Path) -> None:
    path, ticks, locks = tmp_path / "run.db", list[float](), list[Locked]()

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.001)
            if locks and not locks[0].is_over:
                ticks.append(time.monotonic())

    async def work(payload: int) -> int:
        if payload == 0:
            locks.append(Locked(path, lambda: None))
        return payload

    async def main() -> list[int]:
        ticking = asyncio.create_task(tick())
        scheduler = AsyncTaskScheduler(work, policy(limits=[Window(9, 1.0)], concurrency=1), journal=journal)
        report = await scheduler.run(range(3))
        ticking.cancel()
        return report.values()

    with Journal(path) as journal:
        assert asyncio.run(main()) == [0, 1, 2]
    locks[0].join()
    assert len(ticks) > 3, "the loop stood still while the file was locked"


# ---- routes ----------------------------------------------------------------------------------------------------------


def test_a_task_that_went_to_another_source_is_recalled_as_that_sources(lab: Lab) -> None:
    def fetch_of(name: str) -> Any:
        def script(payload: int) -> Any:
            lab.calls.append(((name, payload), lab.world.now(), current_attempt().number))
            yield 1.0
            if name == "first" and payload % 2:
                raise TaskError("not here")
            return [name, payload]

        function: Any = (lab.world.function if lab.is_async else lab.world.plain)(script)
        return function

    def sources() -> list[Source]:
        return [Source("first", fetch_of("first"), cost=1.0), Source("second", fetch_of("second"), cost=2.0)]

    first = lab.live(range(8), routed(), sources=sources, cut=6.5)
    done = first.statuses.count("succeeded")
    assert 0 < done < 8
    middle = len(lab.calls)
    ran = lab.live(range(8), routed(), sources=sources)
    assert values(ran) == [["second" if n % 2 else "first", n] for n in range(8)]
    assert [result.source for result in ran.report.results] == ["first", "second"] * 4
    for one, other in zip(first.report.results, ran.report.results, strict=True):
        if one.status is TaskStatus.SUCCEEDED:
            assert (one.usage, one.attempts) == (other.usage, other.attempts)
    by_source = ran.report.by_source
    counted = Counter(name for (name, _), _, _ in lab.calls)
    assert {name: source.calls for name, source in by_source.items()} == counted
    assert ran.report.total_cost == counted["first"] + 2.0 * counted["second"]
    assert by_source["first"].recalled + by_source["second"].recalled == done
    again = {payload for (_, payload), _, _ in lab.calls[middle:]}
    assert not again & {result.task.payload for result in first.report.results if result.status.value == "succeeded"}


def test_answers_of_a_source_that_is_gone_stay(lab: Lab) -> None:
    def sources(names: str) -> Callable[[], list[Source]]:
        return lambda: [lab.source(name) for name in names]

    lab.live(range(3), routed(), sources=sources("ab"))
    ran = lab.live(range(4), routed(), sources=sources("c"))
    assert values(ran) == [[n] for n in range(4)]
    assert lab.asked == [0, 1, 2, 3]
    assert lab.changes == ["c is new", "a is gone", "b is gone"]


# ---- a hierarchy -----------------------------------------------------------------------------------------------------


class Places:
    """Each node has three children down to a depth; roots have a page more, and each node one query of both."""

    def queries(self, node: str, source: Source) -> Iterable[Any]:
        return [node, Query("same", node=node)]

    def children(self, node: str, result: Any) -> Iterable[str]:
        return [node + digit for digit in "123"] if len(node) < 3 else []

    def following(self, query: Query[str], result: Any) -> Iterable[Any]:
        return [f"{query.payload}+"] if query.level == 0 and query.payload == query.node else []


class ChangedPlaces(Places):
    pass


@pytest.mark.parametrize("limits", [[], [Window(5, 1.0)]], ids=["free", "kept"])
def test_a_tree_is_built_anew_from_its_answers(lab: Lab, limits: list[Any]) -> None:
    numbers = iter(range(10_000))
    lab.answer = lambda payload: [[payload, next(numbers)]]

    def sources() -> list[Source]:
        return [lab.source("x", limits=limits), lab.source("y", concurrency=2)]

    told: dict[tuple[str, str, str], Any] = {}
    for cut in (2.5, 4.5, 5.5, None):
        ran = lab.live(["a", "b"], policy(), sources=sources, plan=Places(), cut=cut)
        now = {
            (result.task.source, result.task.node, result.task.payload): result.value
            for result in ran.report.results if result.status is TaskStatus.SUCCEEDED
        }
        assert told.items() <= now.items(), "answered once is answered for good"
        told = now
    assert ran.report.all_succeeded
    nodes = 2 * (1 + 3 + 9)
    assert len(told) == 2 * (2 * nodes + 2)
    assert len(set(map(str, told.values()))) == len(told), "equal queries of two nodes have an answer each"
    whole = simulate(
        QueryExecutor([Source(name, list) for name in "xy"], Places()), ["a", "b"], latency=0.1, outcome=lambda _: [1]
    )
    assert [result.task.payload for result in whole.results] == [result.task.payload for result in ran.report.results]
    assert set(whole.active_nodes) == set(ran.report.active_nodes)
    assert sum(source.calls for source in ran.report.by_source.values()) == len(lab.calls)
    assert len(lab.calls) - len(told) <= 3 * 3, "at most what was in flight three times"
    assert lab.changes == []


def test_queries_of_two_levels_or_sources_are_told_apart(lab: Lab) -> None:
    class Same:
        def queries(self, node: str, source: Source) -> Iterable[Any]:
            return ["same"]

        def children(self, node: str, result: Any) -> Iterable[str]:
            return [f"{node}1"] if len(node) < 2 else []

    numbers = iter(range(100))
    lab.answer = lambda payload: [next(numbers)]

    def sources() -> list[Source]:
        return [lab.source(name) for name in "xy"]

    first = lab.live(["a"], policy(), sources=sources, plan=Same())
    lab.rest(100.0)
    again = lab.live(["a"], policy(), sources=sources, plan=Same())
    for one, other in zip(first.report.results, again.report.results, strict=True):
        assert (one.started_at, one.duration, one.usage) == (other.started_at, other.duration, other.usage)
    assert [result.value for result in first.report.results] == [result.value for result in again.report.results]
    assert len({str(result.value) for result in again.report.results}) == 4


def test_another_plan_is_noticed(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.live(["a"], policy(), sources=lambda: [lab.source("x")], plan=Places())
    caplog.clear()
    ran = lab.live(["a"], policy(), sources=lambda: [lab.source("x", budget=99)], plan=ChangedPlaces())
    assert lab.changes == ["the plan was Places, and is ChangedPlaces now", "the budget of x was None, and is 99 now"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all(change in caplog.text for change in lab.changes)
    assert ran.report.all_succeeded


# ---- limits, budgets and breakers go on ------------------------------------------------------------------------------


@IN_THREADS
def test_a_rate_goes_on(lab: Lab) -> None:
    limited = policy(limits=[RateLimit(per_second=0.5, burst=3)], concurrency=9)
    lab.live(range(20), limited, cut=5.0)
    lab.rest(3.0)
    lab.live(range(20), limited, cut=5.0)
    lab.rest(1.0)
    ran = lab.live(range(20), limited)
    assert ran.report.all_succeeded
    assert breaches(lab.instants, 0.5, 3) == []
    assert lab.instants[:8] == pytest.approx([0, 0, 0, 2, 4, 8, 8, 10]), "nor is any of it lost"


@IN_A_LOOP
def test_a_window_goes_on_and_what_was_in_flight_counts(lab: Lab) -> None:
    limited = policy(limits=[Window(3, 10)], concurrency=9)
    lab.seconds = 4.0
    lab.live(range(9), limited, cut=2.0)
    assert lab.instants == [0.0] * 3
    lab.rest(5.0)
    ran = lab.live(range(9), limited)
    assert ran.report.all_succeeded
    assert most_in_any_window(lab.instants, 10.0) == 3
    assert lab.instants[3] <= 17.0, "a slot that was in flight counts from the restart at the latest"


@IN_THREADS
def test_what_a_window_still_holds_counts_from_when_a_call_had_to_end(lab: Lab) -> None:
    limited = policy(limits=[Window(3, 10)], concurrency=9, timeout=1.0)
    lab.seconds = 99.0
    lab.live(range(3), limited, cut=0.5)
    lab.seconds = 0.5
    lab.rest(30.0)
    lab.live(range(3), limited)
    assert lab.instants[3:] == [30.5] * 3, "a call cannot have had its outcome later than its timeout says"


@IN_A_LOOP
def test_a_pause_that_was_asked_for_goes_on(lab: Lab) -> None:
    def answer(payload: int) -> int:
        if len(lab.calls) == 1:
            raise RateLimitError("slower", retry_after=20.0)
        return payload

    lab.answer = answer
    lab.live(range(3), policy(concurrency=1), cut=3.0)
    lab.rest(7.0)
    lab.live(range(3), policy(concurrency=1))
    assert lab.instants == [0.0, 21.0, 22.0, 23.0]


@pytest.mark.parametrize("rest", [2.0, 50.0])
@IN_THREADS
def test_an_open_breaker_goes_on(lab: Lab, rest: float) -> None:
    def answer(payload: int) -> int:
        if lab.world.now() < 50.0:
            raise TaskError("down")
        return payload

    lab.answer = answer
    broken = policy(concurrency=1, breaker=BreakerPolicy(failures=2, reset_after=10.0, max_reset_after=1000.0))
    lab.live(range(20), broken, cut=15.0)
    assert lab.instants == [0.0, 1.0, 12.0]
    lab.rest(rest)
    lab.live(range(20), broken)
    assert lab.instants[3:5] == ([33.0, 74.0] if rest == 2.0 else [65.0, 66.0])


@IN_A_LOOP
def test_a_probe_that_was_out_is_made_again(lab: Lab) -> None:
    lab.answer = lambda payload: failing(1) if lab.world.now() < 5.0 else payload
    broken = policy(
        concurrency=1, breaker=BreakerPolicy(failures=1, reset_after=10.0), limits=[Window(100, 1)], retry=STEADY
    )
    lab.live(range(5), broken, cut=11.5)
    assert lab.instants == [0.0, 11.0]
    ran = lab.live(range(5), broken)
    assert ran.report.success_count == 4
    assert lab.instants[2:] == [11.5, 12.5, 13.5, 14.5]


@IN_THREADS
def test_failures_in_a_row_count_on(lab: Lab) -> None:
    lab.answer = lambda payload: failing(1)
    broken = policy(concurrency=1, breaker=BreakerPolicy(failures=4, reset_after=100.0))
    lab.live(range(9), broken, cut=3.0)
    assert len(lab.calls) == 3
    lab.live(range(9), broken, cut=20.0)
    assert len(lab.calls) in (4, 5), "and what was in flight"


@pytest.mark.parametrize(
    "budget", [6, {"calls": 6}, {"tokens": 30.0}, {"cost": 3.0}], ids=["calls", "by name", "tokens", "cost"]
)
@IN_A_LOOP
def test_a_budget_is_of_all_lives(lab: Lab, budget: Any) -> None:
    def answer(payload: int) -> int:
        current_attempt().record(tokens=5, cost=0.5)
        return payload

    lab.answer = answer
    bounded = policy(budget=budget, concurrency=1)
    inputs = [Task(n, amount={"tokens": 5, "cost": 0.5}) for n in range(20)]
    lab.live(inputs, bounded, cut=2.0)
    lab.live(inputs, bounded, cut=2.5)
    ran = lab.live(inputs, bounded)
    assert len(lab.calls) == 6
    (source,) = ran.report.by_source.values()
    assert source.calls == 6
    assert ran.report.skipped_count == 20 - ran.report.success_count
    assert set(source.remaining.values()) == {0}
    fresh = lab.live(inputs, bounded, kept={"fresh": True})
    assert fresh.report.by_source["default"].calls == 6, "what it may use in all is there again"


@IN_THREADS
def test_a_budget_of_several_sources_is_of_all_lives(lab: Lab) -> None:
    def sources() -> list[Source]:
        return [lab.source("a", budget=2, cost=1.0), lab.source("b", cost=1.0)]

    bounded = routed(budget={"calls": 7, "cost": 6.0})
    for cut in (1.5, 1.5, None):
        ran = lab.live(range(20), bounded, sources=sources, cut=cut)
    assert len(lab.calls) == 6
    assert ran.report.by_source["a"].calls == 2
    assert ran.report.total_cost == 6.0


NOON = datetime(2026, 5, 21, 12, tzinfo=UTC).timestamp()


class Day:
    """The wall clock of a quota beside the lab's: it starts at noon."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def now(self) -> float:
        return NOON + float(self._lab.world.clock.now())


@IN_A_LOOP
def test_a_quota_goes_on_until_its_midnight(lab: Lab) -> None:
    day = Day(lab)

    def daily() -> ExecutionPolicy:
        return policy(quota=Quota(5, per="day", now_fn=day.now), concurrency=1)

    lab.live(range(30), daily(), cut=2.5)
    assert len(lab.calls) == 3
    lab.rest(3600.0)
    ran = lab.live(range(30), daily())
    assert len(lab.calls) == 5
    assert ran.report.skipped_count == 30 - ran.report.success_count
    lab.live(range(30), daily())
    assert len(lab.calls) == 5
    lab.rest(12 * 3600.0)
    lab.live(range(30), daily())
    assert len(lab.calls) == 10


@IN_THREADS
def test_a_quota_of_several_sources_goes_on_as_one(lab: Lab) -> None:
    day = Day(lab)

    def sources() -> list[Source]:
        quota = Quota(6, per="day", now_fn=day.now)
        return [lab.source("a", quota=quota), lab.source("b", quota=quota)]

    lab.live(range(30), routed(), sources=sources, cut=1.5, route_by="cost")
    assert len(lab.calls) == 4
    lab.live(range(30), routed(), sources=sources, route_by="cost")
    assert len(lab.calls) == 6


@IN_A_LOOP
def test_a_quota_that_lives_on_is_not_charged_twice(lab: Lab) -> None:
    day = Day(lab)
    daily = policy(quota=Quota(6, per="day", now_fn=day.now), concurrency=1)
    lab.live(range(3), daily)
    lab.live(range(3), daily)
    lab.live(range(30), daily)
    assert len(lab.calls) == 6


@IN_THREADS
def test_a_quota_that_lanes_share_goes_on_whichever_comes_first(lab: Lab) -> None:
    day = Day(lab)

    def daily() -> ExecutionPolicy:
        return policy(quota=Quota(10, per="day", now_fn=day.now), concurrency=1, lookahead=0)

    lanes: dict[str, Any] = {"lane_by": lambda payload: payload[0]}
    lab.live([("b", n) for n in range(5)], daily(), **lanes)
    lab.live([*(("a", n) for n in range(4)), *(("b", n) for n in range(20))], daily(), **lanes)
    assert len(lab.calls) == 10


@IN_A_LOOP
def test_limits_that_sources_share_go_on_as_the_last_of_them_left_them(lab: Lab) -> None:
    def sources() -> list[Source]:
        shared = RateLimiter(Window(4, 100.0), now_fn=lab.world.clock.now, sleep_fn=lab.world.clock.sleep)
        return [lab.source("a", limits=[shared], budget=1), lab.source("b", limits=[shared])]

    lab.live(range(20), routed(), sources=sources, cut=10.5)
    assert len(lab.calls) == 4
    lab.live(range(20), routed(), sources=sources, cut=20.0)
    assert most_in_any_window(lab.instants, 100.0) == 4
    lab.live(range(20), routed(), sources=sources, cut=80.0)
    assert len(lab.calls) == 8, "nor do they count twice"


@pytest.mark.parametrize("order", ["ba", "b", "xba"])
@pytest.mark.parametrize("kind", ["limits", "quota"])
@IN_THREADS
def test_what_sources_share_goes_on_whichever_of_them_are_left(lab: Lab, order: str, kind: str) -> None:
    def sources(names: str) -> Callable[[], list[Source]]:
        def make() -> list[Source]:
            now_fn, sleep_fn = lab.world.clock.now, lab.world.clock.sleep
            shared: dict[str, Any] = {"quota": Quota(4, per=1000.0, now_fn=now_fn)} if kind == "quota" else {
                "limits": [RateLimiter(Window(4, 1000.0), now_fn=now_fn, sleep_fn=sleep_fn)]
            }
            return [lab.source(name, **shared) for name in names]

        return make

    lab.live(range(3), routed(), sources=sources("ab"), route_by="cost")
    lab.live(range(9), routed(), sources=sources(order), cut=50.0, route_by="cost")
    assert len(lab.calls) == 4


@IN_A_LOOP
def test_a_source_that_lives_on_is_not_charged_twice(lab: Lab) -> None:
    source = lab.source("a", limits=[Window(6, 100.0)])
    for count in (1, 2, 4, 6, 8):
        lab.live(range(count), routed(), sources=lambda: [source], cut=20.0)
    assert lab.instants == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@IN_THREADS
def test_a_scheduler_that_lives_on_is_not_charged_twice(lab: Lab) -> None:
    with Journal(lab.path) as journal:
        kind: Any = AsyncTaskScheduler if lab.is_async else TaskScheduler
        scheduler = kind(lab.fetch, policy(limits=[Window(6, 100.0)]), clock=lab.world.clock, journal=journal)
        for count in (2, 4, 6):
            lab.world.run_with(scheduler, range(count))
    assert lab.instants == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


@IN_A_LOOP
def test_a_limiter_that_lives_on_is_not_charged_twice(lab: Lab) -> None:
    shared = RateLimiter(Window(7, 100.0), now_fn=lab.world.clock.now, sleep_fn=lab.world.clock.sleep)
    for count in (1, 2, 4, 6):
        lab.live(range(count), policy(limits=[shared], concurrency=1), cut=20.0)
    assert lab.instants == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert shared.try_acquire(), "the seventh"


@IN_THREADS
def test_a_wall_clock_that_steps_back_frees_nothing(lab: Lab) -> None:
    limited = policy(limits=[Window(2, 10.0)])
    lab.rest(1000.0)
    lab.live(range(9), limited, cut=5.0)
    back = Lab(type(lab.world)(), "virtual loop" if lab.is_async else "stepped threads", lab.path.parent)
    back.rest(500.0)
    back.live(range(9), limited, cut=6.0)
    assert back.calls == [], "as if no time had passed"
    ran = back.live(range(9), limited)
    assert ran.report.all_succeeded
    assert back.instants[0] <= 516.0, "nor does it hold up for longer"
    assert most_in_any_window(back.instants, 10.0) == 2
    back.world.close()


@IN_A_LOOP
def test_another_limit_takes_over_what_was_taken_of_its_kind(lab: Lab) -> None:
    lab.live(range(3), policy(limits=[Window(3, 100.0)]))
    lab.live(range(9), policy(limits=[RateLimit(per_second=1.0), Window(4, 100.0)]), cut=50.0)
    assert len(lab.calls) == 4
    (change,) = lab.changes
    assert change == (
        "the limits of policy were [Window(limit=3, seconds=100.0)], "
        "and are [RateLimit(per_second=1.0), Window(limit=4, seconds=100.0)] now"
    )


# ---- whose it is -----------------------------------------------------------------------------------------------------


def test_fresh_starts_over_and_says_so(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.live(range(3), policy(limits=[Window(4, 100.0)]))
    caplog.clear()
    ran = lab.live(range(3), policy(limits=[Window(4, 100.0)]), kept={"fresh": True}, cut=50.0)
    assert lab.changes == ["started over: what was known of 3 tasks is forgotten"]
    assert lab.changes[0] in caplog.text
    assert lab.asked == [0, 1, 2, 0], "the window stays"
    assert ran.report.by_source["default"].calls == 1
    assert ran.report.by_source["default"].recalled == 0


def test_fresh_of_nothing_says_nothing(lab: Lab) -> None:
    lab.live(range(3), policy(), kept={"fresh": True})
    assert lab.changes == []


def test_runs_are_noted_with_how_they_ended(lab: Lab) -> None:
    lab.live(range(5), policy(), cut=1.5)
    lab.live(range(5), policy())
    noted = rows(lab.path, "SELECT pid, started_at, ended_at, ended FROM runs ORDER BY id")
    assert noted == [(os.getpid(), 0.0, 1.5, "deadline"), (os.getpid(), 1.5, 3.5, "done")]


def test_no_two_runs_have_it_at_once(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(payload: int) -> int:
        begun.set()
        assert go_on.wait(30.0)
        return payload

    with Journal(tmp_path / "run.db") as journal:
        scheduler = TaskScheduler(work, journal=journal)
        other = threading.Thread(target=scheduler.run, args=([1],))
        other.start()
        try:
            assert begun.wait(30.0)
            with pytest.raises(RuntimeError, match="is in use: it is for one run at a time"):
                scheduler.run([2])
            with pytest.raises(RuntimeError, match="is in use"):
                TaskScheduler(work, journal=journal).stream([2])
            with pytest.raises(RuntimeError, match="is in use"):
                QueryExecutor([Source("a", list)], Places(), journal=journal).run(["a"])
        finally:
            go_on.set()
            other.join()
        assert scheduler.run([1, 2]).values() == [1, 2]


def test_a_run_that_is_refused_leaves_it_free(tmp_path: Path) -> None:
    with Journal(tmp_path / "run.db") as journal:
        for inputs in (5, "abc"):
            with pytest.raises(TypeError):
                TaskScheduler(str, journal=journal).run(inputs)     # type: ignore[arg-type]

        def lane_by(payload: Any) -> Any:
            raise KeyError(payload)

        assert TaskScheduler(str, journal=journal, lane_by=lane_by).run([2]).failure_count == 1
        with pytest.raises(ValueError, match="the clock of cancel"):
            TaskScheduler(str, journal=journal).run([1], CancellationToken(now_fn=VirtualClock().now))
        assert TaskScheduler(str, journal=journal).run([1]).values() == ["1"]


def test_one_object_is_for_one_run_after_the_other(lab: Lab) -> None:
    with Journal(lab.path) as journal:
        for count in (3, 5, 5):
            ran = lab.live(range(count), policy(), journal=journal)
            assert values(ran) == [[n] for n in range(count)]
        assert len(lab.calls) == 5
        assert journal.changes == []


def test_a_run_that_did_not_ask_for_all_leaves_nothing_open(lab: Lab) -> None:
    lab.live(range(9), policy())
    lab.live(range(3), policy())
    assert not [name for name in os.listdir(lab.path.parent) if name.endswith(("-wal", "-shm"))], "it was closed"


def test_a_closed_one_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.db")
    assert repr(journal) == f"<Journal {str(tmp_path / 'run.db')!r}>"
    journal.close()
    journal.close()
    assert repr(journal).endswith(", closed>")
    with pytest.raises(RuntimeError, match=r"run\.db is closed"):
        TaskScheduler(str, journal=journal).run([1])


def test_another_one_of_the_same_file_is_refused_with_whose_it_is(tmp_path: Path) -> None:
    os.symlink(tmp_path / "run.db", tmp_path / "link.db")
    with Journal(tmp_path / "run.db"):
        for name in ("run.db", "link.db"):
            with pytest.raises(StorageError, match=f"is the journal of a run that goes on, in process {os.getpid()}"):
                Journal(tmp_path / name)
    Journal(tmp_path / "run.db").close()


SECOND = """
import sys
from qengine import Journal
try:
    Journal(sys.argv[1], fresh=True)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.not_under_coverage
def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with Journal(path) as journal:
        TaskScheduler(str, journal=journal).run([1])
        command = [sys.executable, "-c", SECOND, str(path)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        assert said.startswith(f"StorageError {path} is the journal of a run that goes on, in process {os.getpid()}")
        assert TaskScheduler(str, journal=journal).run([1]).by_source["default"].recalled == 1


@pytest.mark.not_under_coverage
def test_a_journal_that_was_dropped_is_free_again(tmp_path: Path) -> None:
    TaskScheduler(str, journal=Journal(tmp_path / "run.db")).run([1])
    gc.collect()
    assert TaskScheduler(str, journal=Journal(tmp_path / "run.db")).run([1]).by_source["default"].recalled == 1


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda path: TaskScheduler(str, journal="run.db"), TypeError, "is 'run.db' (str), allowed is a Journal"),
        (lambda path: AsyncTaskScheduler(print, journal=7), TypeError, "journal is 7 (int), allowed is a Journal"),
        (lambda path: QueryExecutor([Source("a", list)], Places(), journal={}), TypeError, "allowed is a Journal"),
        (lambda path: Journal(path, codec=str), TypeError, "allowed is an object with dumps and loads"),
        (lambda path: Journal(path, codec="json"), TypeError, "codec is 'json' (str), allowed is an object with dumps"),
        (lambda path: Journal(path, synchronous="off"), ValueError, "is 'off', allowed is 'FULL' or 'NORMAL'"),
        (lambda path: Journal(path, fresh=1), TypeError, "fresh is 1 (int), allowed is a bool"),
        (lambda path: Journal(path, retry_failed="no"), TypeError, "retry_failed is 'no' (str), allowed is a bool"),
        (lambda path: Journal(b"run.db"), TypeError, "path is b'run.db' (bytes), allowed is the name of a file"),
        (lambda path: Journal(7), TypeError, "path is 7 (int), allowed is the name of a file"),
    ],
)
def test_bad_arguments_are_refused(make: Any, kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        make(tmp_path / "run.db")
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_simulation_neither_reads_nor_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with Journal(path) as journal:
        scheduler = TaskScheduler(str, policy(limits=[Window(4, 1e6)], budget=4), journal=journal)
        scheduler.run(range(3))
        before = rows(path, "SELECT * FROM tasks"), rows(path, "SELECT * FROM runs")
        report = simulate(scheduler, range(9), latency=1.0)
        assert report.by_source["default"].recalled == 0
        assert (rows(path, "SELECT * FROM tasks"), rows(path, "SELECT * FROM runs")) == before
        assert scheduler.run(range(4)).values() == ["0", "1", "2", "3"]


def test_single_calls_go_by_the_same_limits_and_are_not_recorded(tmp_path: Path) -> None:
    path, clock = tmp_path / "run.db", VirtualClock()
    with Journal(path) as journal:
        TaskScheduler(str, policy(limits=[Window(2, 50.0)]), journal=journal, clock=clock).run([1])
    with Journal(path) as journal:
        scheduler = TaskScheduler(str, policy(limits=[Window(2, 50.0)]), journal=journal, clock=clock)
        assert scheduler.run([1]).values() == ["1"]
        assert scheduler.call(2) == "2"
        assert clock.now() == 0.0
        assert scheduler.call(3) == "3"
        assert clock.now() == 50.0
    assert rows(path, "SELECT key FROM tasks") == [("1",)]


@pytest.mark.not_under_coverage
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle_of_a_run_writes_nothing(tmp_path: Path) -> None:
    path, children = tmp_path / "run.db", list[int]()

    def work(payload: int) -> int:
        if payload == 5:
            pid = os.fork()
            if not pid:
                try:
                    journal.close()
                finally:
                    os._exit(0)
            children.append(os.waitpid(pid, 0)[1])
        return payload

    with Journal(path) as journal:
        for _ in range(2):
            report = TaskScheduler(work, policy(limits=[Window(1000, 1.0)]), journal=journal).run(range(20))
            assert report.values() == [*range(20)]
        with pytest.raises(StorageError, match="goes on"):
            Journal(path)
    assert children == [0]
    assert len(rows(path, "SELECT * FROM tasks")) == 20


def test_it_is_empty_of_what_was_not_asked(lab: Lab) -> None:
    lab.live([1, Task(2, key="a"), Task(3, key="a")], policy(budget=2))
    kept = rows(lab.path, "SELECT key, status, payload FROM tasks ORDER BY id")
    assert sorted(kept) == [("1", "succeeded", None), ('="a"', "succeeded", "2")]


def test_more_lanes_than_are_kept_count_in_all_lives(tmp_path: Path) -> None:
    count = 1100
    inputs = [(n % count, n) for n in range(count * 2)]

    def live(some: list[Any]) -> Any:
        with Journal(tmp_path / "run.db", synchronous="NORMAL") as journal:
            scheduler: TaskScheduler[Any, Any] = TaskScheduler(
                lambda pair: pair[1], ExecutionPolicy(concurrency=1), lane_by=lambda pair: pair[0], journal=journal
            )
            return scheduler.run(some)

    live(inputs[:count])
    report = live(inputs)
    assert report.values() == [*range(count * 2)]
    assert sum(source.recalled for source in report.by_source.values()) == count
    assert sum(source.calls for source in report.by_source.values()) == 2 * count


# ---- an oracle -------------------------------------------------------------------------------------------------------


class Workload:
    """A run drawn at random: its inputs, what its calls come to, and its policy; all that may not depend on lives."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = rng.randrange(5, 40)
        keyed = rng.random() < 0.3
        self.inputs = [self._input(number, keyed) for number in range(self.count)]
        errors = [TaskError, KeyError, TransientError]
        self.bad = {n: rng.choice(errors) for n in range(self.count) if rng.random() < 0.15}
        self.flaky = {n: rng.randrange(1, 3) for n in range(self.count) if rng.random() < 0.15}
        self.long = {n: rng.choice([0.0, 0.3, 1.0, 2.5]) for n in range(self.count)}
        self.limits: list[Any] = rng.choice([
            [],
            [RateLimit(per_second=rng.choice([0.5, 2.0]), burst=rng.choice([1, 3]))],
            [Window(rng.choice([2, 5]), rng.choice([3.0, 10.0]))],
            [RateLimit(per_second=1.0, burst=4), Window(7, 10.0)],
        ])
        self.retry = rng.choice([
            RetryPolicy(), RetryPolicy(6, backoff=0.5, jitter="none"), RetryPolicy(6, backoff=2.0, jitter="full")
        ])      # enough for two that fail and three that are cut
        self.concurrency = rng.choice([1, 2, 5])
        self.lanes = rng.choice([1, 1, 3])
        self.lookahead = rng.choice([0, 2, 64])
        self.attempts = Counter[int]()      # that have come to something

    def _input(self, number: int, keyed: bool) -> Any:
        payload = {"number": number, "text": "x" * self.rng.choice([0, 90])} if self.rng.random() < 0.3 else number
        if keyed:
            return Task(payload, key=f"k{number}", priority=self.rng.randrange(3))
        return payload

    @staticmethod
    def number(payload: Any) -> int:
        return int(payload["number"] if isinstance(payload, dict) else payload)

    def policy(self) -> ExecutionPolicy:
        return ExecutionPolicy(
            concurrency=self.concurrency, limits=self.limits, retry=self.retry, stop=ABANDON, lookahead=self.lookahead
        )

    def options(self) -> dict[str, Any]:
        return {} if self.lanes == 1 else {"lane_by": lambda payload: self.number(payload) % self.lanes}

    def answer(self, payload: Any) -> Any:
        number = self.number(payload)
        self.attempts[number] += 1
        if number in self.bad:
            raise self.bad[number]("bad")
        if self.attempts[number] <= self.flaky.get(number, 0):
            raise TransientError("flaky")
        return {"is": number}


def shown(ran: Ran) -> list[Any]:
    return [(result.task.payload, result.status, result.value, result.source) for result in ran.report.results]


def live_through(seed: int, name: str, folder: Path, max_cuts: int) -> None:
    """A run that is cut several times comes to what it comes to without a journal, within its limits."""
    rng = random.Random(seed)
    workload = Workload(rng)
    folder.mkdir()
    worlds = [WORLDS[name](), WORLDS[name]()]
    alone, lab = (Lab(world, name, folder) for world in worlds)
    for each in (alone, lab):
        each.answer = workload.answer
        each.seconds = 0.0

        def script(payload: Any, each: Lab = each) -> Any:
            each.calls.append((workload.number(payload), each.world.now(), current_attempt().number))
            yield workload.long[workload.number(payload)]
            return workload.answer(payload)

        each.script = script        # type: ignore[method-assign]
    with Journal(folder / "alone.db", synchronous="NORMAL") as whole:
        expected = alone.live(workload.inputs, workload.policy(), journal=whole, **workload.options())
    workload.attempts.clear()
    told: dict[int, Any] = {}
    given_up = 0
    for life in range(max_cuts + 1):
        cut = rng.uniform(0.0, 1.2 * (worlds[0].now() + 0.1)) / 2 if life < max_cuts else None
        before = len(lab.calls)
        ran = lab.live(workload.inputs, workload.policy(), cut=cut, **workload.options())
        lab.world.clock.sleep(rng.choice([0.0, 0.7, 5.0]))
        begun = Counter(number for number, _, _ in lab.calls[before:])
        assert not told.keys() & begun.keys(), "answered once is not asked again"
        ended = {
            workload.number(result.task.payload): (result.status, result.value, result.attempts)
            for result in ran.report.results if result.status is TaskStatus.SUCCEEDED or result.status.is_failure
        }
        assert told.items() <= ended.items(), "nor told in another way"
        told = ended
        given_up += len(ran.of("abandoned"))
        calls = {source: of.calls for source, of in ran.report.by_source.items() if of.calls}
        made = Counter(str(number % workload.lanes) if workload.lanes > 1 else "default" for number, _, _ in lab.calls)
        if workload.limits:
            assert calls.items() <= made.items()
        for limit in workload.limits:
            for lane in range(workload.lanes):
                instants = [at for number, at, _ in lab.calls if number % workload.lanes == lane]
                if isinstance(limit, Window):
                    assert most_in_any_window(instants, limit.seconds - 1e-6) <= limit.limit
                else:
                    assert breaches(instants, limit.rate, limit.burst) == []
    assert shown(ran) == shown(expected)
    assert sum(of.calls for of in ran.report.by_source.values()) == len(lab.calls)
    assert ran.report.stop_reason is None
    assert len(lab.calls) <= len(alone.calls) + given_up, "what was in flight is asked once more"
    for world in worlds:
        world.close()


@pytest.mark.stress
@pytest.mark.parametrize("name", ["stepped threads", "virtual loop"])
def test_a_run_in_pieces_comes_to_the_same_as_one_in_one_piece(
    name: str, stress_count: Callable[[int], int], tmp_path: Path
) -> None:
    for seed in range(stress_count(4)):
        try:
            live_through(seed, name, tmp_path / f"{seed}", max_cuts=3)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
