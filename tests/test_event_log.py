"""Promise 12: one scenario, one event log, whoever runs it; and an hour of it takes less than a second."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from time import process_time
from typing import Any

import pytest
from contract_support import WORLDS, Deaf, Pause, Ran, World
from shared import timely, undisturbed

from qengine import (
    BreakerPolicy,
    CancellationToken,
    Event,
    ExecutionPolicy,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TaskTimeoutError,
    TransientError,
    Window,
    simulate,
)

ALL = ("stepped threads", "virtual loop", "simulation")
CALLING = ("stepped threads", "virtual loop")        # a simulation has no stream and no token, its inputs take no time
WITH_IN_THREAD = ("stepped threads", "stepped in thread")
RETRYING = RetryPolicy(max_attempts=3, backoff=0.5, retry_on=(OSError, TransientError, TaskTimeoutError))
HANGS = math.inf        # but ends when it is told to

Step = tuple[float, Any]
"""How long a call takes and what it comes to: a value, or an error to raise."""

pytestmark = pytest.mark.not_under_coverage("each scenario in several worlds, through lines that all others pass")


@dataclass
class Scenario:
    """Calls that are the same whoever makes them."""

    steps: Callable[[Any, int], Step]
    """What the n-th call of a payload does, from 0."""
    inputs: Any = range(12)
    """A sequence, or a function that gives an iterator whose `Pause`s take time."""
    policy: ExecutionPolicy = field(default_factory=ExecutionPolicy)
    options: dict[str, Any] = field(default_factory=dict)

    def script(self) -> Callable[[Any], Iterator[float]]:
        calls: dict[Any, int] = {}

        def script(payload: Any) -> Any:
            number = calls.get(payload, 0)
            calls[payload] = number + 1
            seconds, comes_to = self.steps(payload, number)
            yield seconds
            if isinstance(comes_to, BaseException):
                raise comes_to
            return comes_to

        return script

    def inputs_for(self, world: World) -> Any:
        return world.inputs(self.inputs) if callable(self.inputs) else self.inputs


def told(ran: Ran) -> dict[str, Any]:
    """All that a run tells, to be compared."""
    report = ran.report
    fields = "started_at finished_at makespan stop_reason intake_cut abandoned by_source usage busy_seconds retries"
    results = [
        (result.task.payload, result.status, result.value, repr(result.error), result.reason, result.attempts,
         result.source, result.started_at, result.duration)
        for result in [*ran.handed_out, *report.results]
    ]
    return {
        "events": ran.events,
        "results": results,
        "error": repr(ran.error),
        **{name: getattr(report, name) for name in fields.split()},
    }


def assert_same_everywhere(go: Callable[[World], Ran], worlds: Sequence[str] = ALL) -> dict[str, Any]:
    """Go in each world, and twice in the first; return what was told."""
    first: dict[str, Any] | None = None
    for name in (worlds[0], *worlds):
        world = WORLDS[name]()
        try:
            heard = told(go(world))
        finally:
            world.close()
        if first is None:
            first = heard
        for number, (one, other) in enumerate(zip(first["events"], heard["events"], strict=False)):
            assert one == other, f"{name}, event {number}"
        assert heard == first, name
    assert first is not None
    return first


def same_runs(scenario: Scenario, worlds: Sequence[str] = ALL) -> dict[str, Any]:
    return assert_same_everywhere(
        lambda world: world.run(
            scenario.script(), scenario.inputs_for(world), scenario.policy, **scenario.options
        ),
        worlds,
    )


def same_streams(
    scenario: Scenario,
    consume: Callable[[Any], Any] | None = None,
    ordered: bool = False,
    worlds: Sequence[str] = CALLING,
) -> dict[str, Any]:
    return assert_same_everywhere(
        lambda world: world.stream(
            scenario.script(),
            scenario.inputs_for(world),
            scenario.policy,
            ordered=ordered,
            consume=consume,
            **scenario.options,
        ),
        worlds,
    )


def kinds_of(heard: dict[str, Any]) -> set[str]:
    return {event.kind for event in heard["events"]}


def in_turn(payload: int, number: int) -> Step:
    """Takes a while, each another."""
    return 0.1 * (payload % 4), payload


def at_once(payload: Any, number: int) -> Step:
    return 0.0, payload


def in_a_second(payload: Any, number: int) -> Step:
    return 1.0, payload


def every_second_fails(payload: int, number: int) -> Step:
    return 0.25, TransientError("later") if payload % 2 and number == 0 else payload


def throttled_once(payload: int, number: int) -> Step:
    return 0.25, RateLimitError(retry_after=2.0) if payload == 3 and number == 0 else payload


def hung_now_and_then(payload: int, number: int) -> Step:
    return HANGS if payload % 5 == 2 and number == 0 else 0.25, payload


def always_fails(payload: int, number: int) -> Step:
    return 0.25, TaskError("no")


def generated() -> Iterator[int]:
    yield from range(200)


def raising() -> Iterator[int]:
    yield from range(5)
    raise LookupError("no more")


def slow() -> Iterator[Any]:
    for number in range(12):
        if number % 3 == 0:
            yield Pause(0.3)
        yield number


SCENARIOS = {
    "nothing": Scenario(in_turn, []),
    "one after the other": Scenario(in_turn, policy=ExecutionPolicy(concurrency=1)),
    "several at once": Scenario(in_turn, range(40), ExecutionPolicy(concurrency=3)),
    "many answers at the same instant": Scenario(in_a_second, range(40), ExecutionPolicy(concurrency=7)),
    "no time at all": Scenario(at_once, range(200), ExecutionPolicy(concurrency=5)),
    "no time, generated": Scenario(at_once, generated, ExecutionPolicy(concurrency=5, lookahead=3)),
    "no time, no lookahead": Scenario(at_once, generated, ExecutionPolicy(concurrency=3, lookahead=0)),
    "generated": Scenario(in_turn, generated, ExecutionPolicy(concurrency=5, lookahead=0)),
    "inputs that raise": Scenario(in_turn, raising, ExecutionPolicy(concurrency=2)),
    "rate": Scenario(in_a_second, range(40), ExecutionPolicy(limits=[RateLimit(per_second=3, burst=4)])),
    "window": Scenario(in_turn, range(40), ExecutionPolicy(limits=[Window(limit=3, seconds=2.0)])),
    "rate and window": Scenario(
        in_turn, range(40), ExecutionPolicy(limits=[RateLimit(per_second=2, burst=2), Window(limit=5, seconds=4.0)])
    ),
    "amounts": Scenario(
        in_turn,
        [Task(n, amount={"calls": 1, "tokens": 100 * n}) for n in range(10)],
        ExecutionPolicy(limits=[RateLimit(per_second=300, burst=1000, unit="tokens")]),
    ),
    "retries at once": Scenario(every_second_fails, policy=ExecutionPolicy(retry=RetryPolicy(2, backoff=0.0))),
    "backoff": Scenario(
        every_second_fails, policy=ExecutionPolicy(concurrency=2, retry=RetryPolicy(3, backoff=1.0, jitter="none"))
    ),
    "backoff with jitter": Scenario(every_second_fails, range(40), ExecutionPolicy(retry=RETRYING)),
    "a time for the whole task": Scenario(
        lambda payload, number: (0.25, TransientError("again")),
        policy=ExecutionPolicy(retry=RetryPolicy(50, backoff=0.4, multiplier=1.0, jitter="none", timeout=2.0)),
    ),
    "throttled": Scenario(throttled_once, policy=ExecutionPolicy(concurrency=2, limits=[RateLimit(per_second=2)])),
    "throttled without a word": Scenario(
        lambda payload, number: (0.0, RateLimitError() if payload == 3 and number < 2 else payload),
        policy=ExecutionPolicy(concurrency=2),
    ),
    "a breaker, waited for": Scenario(
        lambda payload, number: (0.25, OSError("down") if payload in range(3, 8) else payload),
        range(20),
        ExecutionPolicy(concurrency=2, breaker=BreakerPolicy(failures=2, reset_after=3.0)),
    ),
    "a breaker that skips": Scenario(
        lambda payload, number: (0.25, OSError("down") if payload in range(3, 8) else payload),
        range(20),
        ExecutionPolicy(concurrency=2, breaker=BreakerPolicy(failures=2, reset_after=3.0, on_open="skip")),
    ),
    "a breaker that never closes again": Scenario(
        always_fails,
        range(20),
        ExecutionPolicy(concurrency=3, breaker=BreakerPolicy(failures=2, reset_after=1.0, max_reopens=2)),
    ),
    "batches": Scenario(in_turn, range(20), ExecutionPolicy(batch_size=6, batch_backoff=0.7)),
    "batches with retries": Scenario(
        every_second_fails, range(20), ExecutionPolicy(batch_size=4, batch_backoff=0.7, retry=RETRYING)
    ),
    "a budget": Scenario(every_second_fails, policy=ExecutionPolicy(budget=7, retry=RETRYING)),
    "stopped by results": Scenario(
        in_turn, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(max_results=5))
    ),
    "stopped by failures": Scenario(
        every_second_fails, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(max_failures=4))
    ),
    "stopped by the share of failures": Scenario(
        every_second_fails,
        range(40),
        ExecutionPolicy(concurrency=3, stop=StopConditions(failure_rate=0.4, min_outcomes=10)),
    ),
    "stopped by time, drained": Scenario(
        in_a_second, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(timeout=3.5))
    ),
    "stopped by time at the instant of an answer": Scenario(
        in_a_second, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(timeout=3.0))
    ),
    "stopped by time, abandoned": Scenario(
        in_a_second, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(timeout=3.5, in_flight="abandon"))
    ),
    "stopped by time, drained not for long enough": Scenario(
        in_a_second, range(40), ExecutionPolicy(concurrency=3, stop=StopConditions(timeout=3.5, drain_seconds=0.25))
    ),
    "stopped while calls hang": Scenario(
        lambda payload, number: (HANGS if payload % 3 == 1 else 0.25, payload),
        generated,
        ExecutionPolicy(concurrency=4, stop=StopConditions(max_results=2, drain_seconds=1.0)),
    ),
    "stopped by time, generated, no time at all": Scenario(
        lambda payload, number: (0.5 if payload % 50 == 49 else 0.0, payload),
        generated,
        ExecutionPolicy(concurrency=2, stop=StopConditions(timeout=1.0)),
    ),
    "timeouts": Scenario(hung_now_and_then, range(20), ExecutionPolicy(concurrency=3, timeout=1.0)),
    "timeouts, tried again": Scenario(
        hung_now_and_then, range(20), ExecutionPolicy(concurrency=3, timeout=1.0, retry=RETRYING)
    ),
    "timeouts at the instant of the answer": Scenario(
        lambda payload, number: (1.0 + (payload % 3 - 1) * 1e-3, payload),
        range(20),
        ExecutionPolicy(concurrency=4, timeout=1.0),
    ),
    "timeouts of their own": Scenario(
        in_a_second, [Task(n, timeout=0.3 + 0.1 * n) for n in range(12)], ExecutionPolicy(concurrency=4)
    ),
    "many timeouts": Scenario(
        lambda payload, number: (HANGS, payload),
        range(20),
        ExecutionPolicy(concurrency=2, timeout=1.0, max_abandoned=2, breaker=BreakerPolicy(failures=5)),
    ),
    "timeouts open a breaker": Scenario(
        lambda payload, number: (HANGS if payload < 4 and number == 0 else 0.25, payload),
        range(12),
        ExecutionPolicy(
            concurrency=4, timeout=1.0, retry=RETRYING, breaker=BreakerPolicy(failures=3, reset_after=5.0)
        ),
    ),
    "priorities": Scenario(
        in_turn, [Task(n, priority=-n % 5) for n in range(20)], ExecutionPolicy(concurrency=2, lookahead=4)
    ),
    "lanes by key": Scenario(
        in_turn,
        range(40),
        ExecutionPolicy(concurrency=1, limits=[RateLimit(per_second=4)]),
        {"lane_by": lambda payload: payload % 3},
    ),
    "lanes of which one is throttled": Scenario(
        lambda payload, number: (0.25, RateLimitError(retry_after=3.0) if payload % 3 == number == 0 else payload),
        generated,
        ExecutionPolicy(concurrency=2, lookahead=3),
        {"lane_by": lambda payload: payload % 3},
    ),
    "duplicates": Scenario(in_turn, range(20), options={"key": lambda payload: payload % 6}),
    "bad items": Scenario(in_turn, range(20), options={"key": lambda payload: 1 // (payload % 4)}),
    "cancellations that nobody asked for": Scenario(
        lambda payload, number: (0.25, asyncio.CancelledError() if payload % 3 == 0 else payload),
        policy=ExecutionPolicy(concurrency=2),
    ),
    "an exit": Scenario(
        lambda payload, number: (0.25, SystemExit(3) if payload == 4 else payload),
        range(20),
        ExecutionPolicy(concurrency=3),
    ),
    "an interrupt, at once": Scenario(
        lambda payload, number: (0.0, KeyboardInterrupt() if payload == 4 else payload),
        range(20),
        ExecutionPolicy(concurrency=3),
    ),
    "everything": Scenario(
        lambda payload, number: (
            HANGS if payload % 7 == 3 and number == 0 else 0.1 * (payload % 3),
            (payload, OSError("down"), RateLimitError(retry_after=0.8), TaskError("no"))[(payload + number) % 4],
        ),
        generated,
        ExecutionPolicy(
            concurrency=3,
            limits=[RateLimit(per_second=10, burst=3), Window(limit=15, seconds=4.0)],
            batch_size=5,
            batch_backoff=0.3,
            retry=RETRYING,
            timeout=1.0,
            budget=90,
            breaker=BreakerPolicy(failures=4, reset_after=2.0),
            stop=StopConditions(max_failures=30, timeout=600.0),
            lookahead=4,
        ),
        {"lane_by": lambda payload: payload % 2, "key": lambda payload: payload % 70},
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_scenario_one_log(name: str) -> None:
    heard = same_runs(SCENARIOS[name])
    assert heard["results"] or name == "nothing"


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_scenario_one_log_of_plain_functions_under_asyncio(name: str) -> None:
    same_runs(SCENARIOS[name], WITH_IN_THREAD)


def test_the_scenarios_tell_of_all_that_can_happen() -> None:
    kinds: set[str] = set()
    for scenario in SCENARIOS.values():
        kinds |= kinds_of(told(WORLDS["simulation"]().run(scenario.script(), *_plain(scenario), **scenario.options)))
    ends = {"answer", "timeout", "abandoned", "revoked"}
    assert kinds == ends | {"start", "retry", "throttled", "result", "breaker_opened", "stop"}


def _plain(scenario: Scenario) -> tuple[Any, ExecutionPolicy]:
    return scenario.inputs() if callable(scenario.inputs) else scenario.inputs, scenario.policy


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
def test_one_scenario_one_log_of_a_stream(name: str, ordered: bool) -> None:
    same_streams(SCENARIOS[name], ordered=ordered)


# ---- what a simulation has none of -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.7])
def test_a_slow_consumer_holds_the_intake_in_the_same_way(seconds: float, ordered: bool) -> None:
    def consume(result: Any) -> Any:
        yield seconds

    same_streams(Scenario(in_turn, generated, ExecutionPolicy(concurrency=2, lookahead=3)), consume, ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@pytest.mark.parametrize("step", [in_turn, at_once, in_a_second], ids=["in turn", "at once", "in a second"])
def test_a_consumer_that_leaves_ends_it_in_the_same_way(step: Callable[[Any, int], Step], ordered: bool) -> None:
    def consume(result: Any) -> Any:
        yield 0.2
        return result.value != 4

    same_streams(Scenario(step, generated, ExecutionPolicy(concurrency=3, lookahead=3)), consume, ordered)


@pytest.mark.parametrize("step", [in_turn, at_once, in_a_second], ids=["in turn", "at once", "in a second"])
@pytest.mark.parametrize("lookahead", [0, 2, 64])
def test_inputs_that_take_time_are_pulled_in_the_same_way(step: Callable[[Any, int], Step], lookahead: int) -> None:
    same_runs(Scenario(step, slow, ExecutionPolicy(concurrency=2, lookahead=lookahead)), CALLING)
    same_streams(Scenario(step, slow, ExecutionPolicy(concurrency=2, lookahead=lookahead)))


def test_inputs_that_hang_are_given_up_in_the_same_way() -> None:
    def inputs() -> Iterator[Any]:
        yield 1
        yield Pause(HANGS)

    stop = StopConditions(timeout=2.0)
    assert same_runs(Scenario(in_turn, inputs, ExecutionPolicy(stop=stop)), CALLING)["stop_reason"] == "timeout"


@pytest.mark.parametrize("seconds", [0.0, 0.25])
@pytest.mark.parametrize("inputs", [range(200), generated], ids=["data", "generated"])
def test_a_token_that_a_task_cancels_stops_in_the_same_way(seconds: float, inputs: Any) -> None:
    def go(world: World) -> Ran:
        token = CancellationToken()

        def script(payload: int) -> Any:
            yield seconds
            if payload == 10:
                token.cancel("enough")
            return payload

        return world.run(script, world.inputs(inputs) if callable(inputs) else inputs, POLICY, token)

    POLICY = ExecutionPolicy(concurrency=3, lookahead=5)
    assert assert_same_everywhere(go, CALLING)["stop_reason"] == "enough"


@pytest.mark.parametrize("kind", ["start", "answer", "result", "timeout", "retry"])
@pytest.mark.parametrize("seconds", [0.0, 0.25])
def test_a_token_that_a_listener_cancels_stops_in_the_same_way(kind: str, seconds: float) -> None:
    def go(world: World) -> Ran:
        token = CancellationToken()
        events: list[Event] = []

        def listen(event: Event) -> None:
            events.append(event)
            if event.kind == kind and event.index == 7:
                token.cancel("enough")

        def script(payload: int) -> Any:
            tries = sum(event.kind == "start" and event.index == payload for event in events)
            yield HANGS if payload == 7 and tries <= 1 and kind == "timeout" else seconds
            if payload == 7 and tries <= 1:
                raise TransientError("again")
            return payload

        policy = ExecutionPolicy(concurrency=3, lookahead=5, timeout=1.0, retry=RETRYING)
        scheduler = world.scheduler(script, policy, on_event=listen)
        return world.run_to_end(scheduler, events, world.inputs(generated), token)

    # Tried again, it is the last where no other takes time: then there is nothing left to stop.
    is_last = kind == "result" and seconds == 0.0
    assert assert_same_everywhere(go, CALLING)["stop_reason"] == (None if is_last else "enough")


def test_a_token_that_was_cancelled_before_starts_nothing_anywhere() -> None:
    def go(world: World) -> Ran:
        token = CancellationToken()
        token.cancel("beforehand")
        return world.run(lambda payload: payload, range(10), ExecutionPolicy(), token)

    assert kinds_of(assert_same_everywhere(go, CALLING)) <= {"stop", "result"}


def test_calls_that_sleep_often_are_the_same() -> None:
    def go(world: World) -> Ran:
        def script(payload: int) -> Any:
            for number in range(payload % 5):
                yield 0.1 * number      # the first of them is nothing: `sleep(0)`
            return payload

        return world.run(script, range(40), ExecutionPolicy(concurrency=3, timeout=0.55))

    assert_same_everywhere(go, CALLING)


def test_tasks_that_change_a_context_variable_are_the_same() -> None:
    name: ContextVar[int] = ContextVar("name")

    def go(world: World) -> Ran:
        def script(payload: int) -> Any:
            if payload % 2:
                name.set(payload)
            yield 0.1 * (payload % 3)
            return payload

        return world.run(script, range(60), ExecutionPolicy(concurrency=3))

    assert_same_everywhere(go)


@pytest.mark.abandons("calls that do not end when they are told to are given up")
@pytest.mark.parametrize("seconds", [1.5, 5.0, 100.0])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_calls_that_do_not_listen_are_the_same(seconds: float, count: int) -> None:
    def go(world: World) -> Ran:
        def script(payload: int) -> Any:
            yield Deaf(seconds) if payload % 7 == 1 else 0.5
            return payload

        return world.run(script, range(count), ExecutionPolicy(concurrency=2, timeout=1.0, max_abandoned=2))

    heard = assert_same_everywhere(go, CALLING)
    assert heard["results"][1][1].value == "timeout"


def test_runs_that_follow_one_another_are_the_same() -> None:
    def go(world: World) -> Ran:
        events: list[Event] = []
        policy = ExecutionPolicy(
            concurrency=2, limits=[RateLimit(per_second=2, burst=3)], breaker=BreakerPolicy(failures=2, reset_after=5.0)
        )
        scheduler = world.scheduler(
            Scenario(lambda payload, number: (0.25, OSError("down") if payload > 7 else payload)).script(),
            policy,
            on_event=events.append,
        )
        world.run_with(scheduler, range(10))
        return world.run_to_end(scheduler, events, range(5))

    assert_same_everywhere(go, CALLING)


# ---- a hierarchy -----------------------------------------------------------------------------------------------------


class Regions:
    """Three levels, two to four children each, and a second page now and then; nothing is found at some places."""

    def __init__(self, world: World, pause: float = 0.0) -> None:
        self._world = world
        self._pause = [Pause(pause)] if pause else []

    def queries(self, node: str, source: Any) -> Any:
        if source.name == "lists":
            return [f"{node}?", f"{node}!"]
        return self._world.inputs(lambda: iter([f"{node}?", *self._pause, f"{node}!"]))

    def children(self, node: str, result: Any) -> Any:
        below = [f"{node}{number}" for number in range(2 + len(result.items) % 3)] if len(node) < 3 else []
        return self._world.inputs(lambda: iter([*self._pause, *below]))

    def following(self, query: Any, result: Any) -> Any:
        if query.payload.endswith("?") and query.node[-1] == "1":
            return [query.payload + " page 2"]
        return None


def found_by(seconds: float) -> Callable[[Any], Any]:
    def fetch(query: Any) -> Any:
        place = sum(map(ord, query.payload))
        yield seconds * (place % 3)
        if place % 11 == 0:
            raise OSError("down")
        return [query.payload] * (place % 4)

    return fetch


def hierarchy(world: World, seconds: float = 0.5, pause: float = 0.0, **options: Any) -> Ran:
    sources: list[tuple[Any, dict[str, Any]]] = [
        (found_by(seconds), {"name": "lists", "concurrency": 3, "limits": [RateLimit(per_second=5, burst=2)]}),
        (found_by(2 * seconds), {"name": "few", "limits": [Window(limit=4, seconds=3.0)], "budget": 15}),
        (
            found_by(0.0),
            {
                "name": "quick",
                "retry": RETRYING,
                "breaker": BreakerPolicy(failures=3, reset_after=2.0),
                "accepts": lambda query: "2" not in query.payload,
            },
        ),
        (found_by(seconds), {"name": "impatient", "concurrency": 2, "timeout": 0.75, "retry": RETRYING}),
    ]
    events: list[Event] = []
    executor = world.query_executor(sources, Regions(world, pause), on_event=events.append, **options)
    return world.run_to_end(executor, events, world.inputs(lambda: iter("abc")))


HIERARCHIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no time at all": {"seconds": 0.0},
    "few at once": {"concurrency": 2},
    "no lookahead": {"lookahead": 0},
    "stopped by results": {"stop": StopConditions(max_results=30)},
    "stopped by time": {"stop": StopConditions(timeout=6.0, in_flight="abandon")},
    "stopped by failures": {"stop": StopConditions(max_failures=2)},
}


@pytest.mark.parametrize("name", HIERARCHIES)
def test_one_hierarchy_one_log(name: str) -> None:
    heard = assert_same_everywhere(lambda world: hierarchy(world, **HIERARCHIES[name]))
    assert len(heard["by_source"]) == 4
    assert len(heard["results"]) >= 10


@pytest.mark.parametrize("name", HIERARCHIES)
@pytest.mark.parametrize("pause", [0.001, 0.1])
def test_a_plan_that_takes_time_is_the_same(name: str, pause: float) -> None:
    assert_same_everywhere(lambda world: hierarchy(world, pause=pause, **HIERARCHIES[name]), CALLING)


# ---- at random -------------------------------------------------------------------------------------------------------


class RandomRegions:
    """A plan that draws what it asks and finds from the names of the nodes, so that it is the same every time."""

    def __init__(self, world: World, seed: int, gaps: Sequence[float]) -> None:
        self._world = world
        self._seed = seed
        self._gaps = gaps

    def _items(self, what: str, items: list[str]) -> Any:
        rng = random.Random(f"{self._seed} {what}")
        paused = [one for item in items for one in (Pause(rng.choice(self._gaps)), item)] if self._gaps else items
        return self._world.inputs(lambda: iter(paused))

    def queries(self, node: str, source: Any) -> Any:
        count = random.Random(f"{self._seed} {node} {source.name}").randint(0, 2)
        return self._items(node + source.name, [f"{node}?{number}" for number in range(count)])

    def children(self, node: str, result: Any) -> Any:
        count = random.Random(f"{self._seed} {node} {result.items}").randint(0, 3) if len(node) < 3 else 0
        return self._items(node, [f"{node}{number}" for number in range(count)])

    def following(self, query: Any, result: Any) -> Any:
        pages = query.payload.count("+")
        if random.Random(f"{self._seed} {query.payload} {query.source}").random() < 0.2 and pages < 3:
            return self._items(query.payload, [query.payload + "+"])
        return None


def random_hierarchy(world: World, seed: int, paused: bool) -> Ran:
    rng = random.Random(seed)
    durations = rng.choice([[0.0], [0.0, 0.1, 0.2, 0.5], [0.1, 0.5, HANGS]])

    def fetch_of(name: str) -> Callable[[Any], Any]:
        calls: dict[str, int] = {}

        def fetch(query: Any) -> Any:
            number = calls[query.payload] = calls.get(query.payload, 0) + 1
            draw = random.Random(f"{seed} {name} {query.payload} {number}")
            yield draw.choice(durations)
            if draw.random() < 0.2:
                raise draw.choice([OSError("down"), TaskError("no"), RateLimitError(retry_after=0.7)])
            return [query.payload] * draw.randint(0, 3)

        return fetch

    sources: list[tuple[Any, dict[str, Any]]] = [
        (
            fetch_of(name),
            {
                "name": name,
                "concurrency": rng.randint(1, 4),
                "limits": rng.choice([[], [RateLimit(per_second=4, burst=2)], [Window(limit=3, seconds=2.0)]]),
                "budget": rng.choice([None, None, rng.randint(0, 20)]),
                "retry": rng.choice([RetryPolicy(), RETRYING]),
                "timeout": 1.0,
                "breaker": rng.choice([None, BreakerPolicy(failures=3, reset_after=2.0, max_reopens=2)]),
            },
        )
        for name in ("one", "two", "three")[: rng.randint(1, 3)]
    ]
    events: list[Event] = []
    executor = world.query_executor(
        sources,
        RandomRegions(world, seed, [0.0, 0.0, 0.001, 0.1] if paused else []),
        on_event=events.append,
        concurrency=rng.choice([None, None, 2]),
        lookahead=rng.choice([0, 1, 64]),
        stop=rng.choice([StopConditions(), StopConditions(max_results=20), StopConditions(timeout=3.0)]),
    )
    return world.run_to_end(executor, events, world.inputs(lambda: iter("abcd")))


@pytest.mark.stress
@pytest.mark.parametrize(("worlds", "paused"), [(ALL, False), (CALLING, True)], ids=["plain", "a plan that takes time"])
def test_random_hierarchies_have_one_log(
    stress_count: Callable[[int], int], worlds: Sequence[str], paused: bool
) -> None:
    for seed in range(stress_count(30)):
        try:
            assert_same_everywhere(partial(random_hierarchy, seed=seed, paused=paused), worlds)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def random_scenario(rng: random.Random) -> Scenario:
    count = rng.randint(1, 40)
    steps: dict[tuple[Any, int], Step] = {}
    durations = rng.choice([[0.0], [0.0, 0.1], [0.0, 0.1, 0.2, 0.3, 1.0, 1.5], [0.0, 0.5, 1.0, HANGS]])
    fails = rng.choice([0.0, 0.3, 0.7])
    for payload in range(count):
        for number in range(12):
            comes_to: Any = payload
            if rng.random() < fails:
                comes_to = rng.choice(
                    [
                        TransientError("later"),
                        TaskError("no"),
                        OSError("down"),
                        RateLimitError(retry_after=rng.choice([0.5, 0.7, 1.0])) if number < 4 else payload,
                        RateLimitError() if number < 4 else payload,
                    ]
                )
            steps[payload, number] = rng.choice(durations), comes_to
    tasks = [
        rng.choice([number, number, Task(number, priority=rng.randint(-1, 1), timeout=rng.choice([None, 0.5]))])
        for number in range(count)
    ]
    lanes = rng.choice([1, 1, 2, 5])
    keys = rng.choice([None, None, max(1, count // 2)])
    policy = ExecutionPolicy(
        concurrency=rng.choice([1, 2, 3, 8]),
        limits=rng.choice(
            [
                [],
                [RateLimit(per_second=rng.choice([2, 3, 10]), burst=rng.randint(1, 4))],
                [Window(limit=rng.randint(1, 5), seconds=rng.choice([0.5, 2.0]))],
                [RateLimit(per_second=4), Window(limit=3, seconds=1.0)],
            ]
        ),
        **rng.choice([{}, {}, {"batch_size": rng.randint(1, 6), "batch_backoff": rng.choice([0.0, 0.5])}]),
        retry=RetryPolicy(
            max_attempts=rng.randint(1, 3),
            backoff=rng.choice([0.0, 0.5]),
            jitter=rng.choice(["full", "none"]),
            timeout=rng.choice([None, None, 3.0]),
            retry_on=(OSError, TransientError, TaskTimeoutError),
        ),
        timeout=1.0 if HANGS in durations else rng.choice([None, 1.0]),
        budget=rng.choice([None, None, rng.randint(0, 40)]),
        breaker=rng.choice(
            [
                None,
                BreakerPolicy(
                    failures=rng.randint(1, 4),
                    reset_after=rng.choice([0.5, 1.0]),
                    max_reopens=rng.randint(0, 3),
                    on_open=rng.choice(["wait", "skip"]),
                ),
            ]
        ),
        stop=rng.choice(
            [
                StopConditions(),
                StopConditions(),
                StopConditions(max_failures=rng.randint(1, 5)),
                StopConditions(max_results=rng.randint(1, 20), in_flight=rng.choice(["drain", "abandon"])),
                StopConditions(failure_rate=0.5, min_outcomes=5),
                StopConditions(timeout=rng.choice([0.5, 1.0, 2.0]), drain_seconds=rng.choice([0.0, 0.5, 30.0])),
            ]
        ),
        lookahead=rng.choice([0, 1, 5, 64]),
    )
    options: dict[str, Any] = {}
    if lanes > 1:
        options["lane_by"] = lambda payload: payload % lanes
    if keys is not None:
        options["key"] = lambda payload: payload % keys
    return Scenario(
        lambda payload, number: steps[payload, min(number, 11)],
        tasks if rng.random() < 0.5 else lambda: iter(tasks),
        policy,
        options,
    )


@pytest.mark.stress
def test_random_scenarios_have_one_log(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(60)):
        try:
            same_runs(random_scenario(random.Random(seed)))
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def slow_down(scenario: Scenario, rng: random.Random) -> None:
    """Have the inputs take time."""
    tasks = list(scenario.inputs()) if callable(scenario.inputs) else scenario.inputs
    gaps = [rng.choice([0.0, 0.0, 0.001, 0.1, 0.5]) for _ in tasks]

    def inputs() -> Iterator[Any]:
        for task, gap in zip(tasks, gaps, strict=True):
            yield Pause(gap)
            yield task

    scenario.inputs = inputs


@pytest.mark.stress
def test_random_scenarios_with_inputs_that_take_time_have_one_log(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(40)):
        rng = random.Random(seed)
        scenario = random_scenario(rng)
        slow_down(scenario, rng)
        try:
            same_runs(scenario, CALLING)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.stress
def test_random_scenarios_of_plain_functions_under_asyncio_have_one_log(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(20)):
        try:
            same_runs(random_scenario(random.Random(seed)), WITH_IN_THREAD)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.stress
def test_random_streams_have_one_log(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(40)):
        rng = random.Random(seed)
        scenario = random_scenario(rng)
        pauses = [rng.choice([0.0, 0.0, 0.1, 0.5]) for _ in range(40)]
        leaves_at = rng.choice([None, None, rng.randint(0, 40)])
        if rng.random() < 0.5:
            slow_down(scenario, rng)

        def consume(result: Any, pauses: list[float] = pauses, leaves_at: int | None = leaves_at) -> Any:
            yield pauses[result.task.payload]
            return result.task.payload != leaves_at

        try:
            same_streams(scenario, consume, ordered=rng.random() < 0.5)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


# ---- an hour ---------------------------------------------------------------------------------------------------------


@undisturbed
def test_an_hour_simulates_in_under_a_second() -> None:
    policy = ExecutionPolicy(
        concurrency=8,
        limits=[RateLimit(per_second=1), Window(limit=100, seconds=100.0)],
        retry=RETRYING,
        timeout=30.0,
        breaker=BreakerPolicy(),
    )
    events: list[Event] = []
    begin = process_time()
    report = simulate(TaskScheduler(str, policy, on_event=events.append), range(3600), latency=0.5)
    took = process_time() - begin
    assert report.success_count == 3600
    assert report.makespan >= 3599.5
    assert len(events) == 3 * 3600
    with timely():
        assert took < (1.0 if sys.gettrace() is None else 10.0)     # to be traced, for coverage, costs more
