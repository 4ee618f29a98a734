"""The promises, each a scenario, under every driver.  A driver adds a world here; scenarios stay as they are."""

from __future__ import annotations

import random
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import pytest
from contract_support import (
    COROUTINES,
    HANG,
    IN_REAL_TIME,
    IN_VIRTUAL_TIME,
    WORLDS,
    Deaf,
    Pause,
    Ran,
    World,
    breaches,
    check_run,
    most_in_any_window,
)
from shared import timely, undisturbed, undisturbed_as_a_whole

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
    TransientError,
    Window,
    current_attempt,
    simulate,
)

NO_WAIT = RetryPolicy(max_attempts=3, backoff=0.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each scenario under each world, except for those that say which they do not concern."""
    if "world" in metafunc.fixturenames:
        left_out = getattr(metafunc.function, "left_out", {})
        metafunc.parametrize("world", [name for name in WORLDS if name not in left_out], indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


def not_under(*worlds: str, why: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Leave a scenario out of worlds that it does not concern; why, is for whoever reads it."""
    assert why and set(worlds) <= set(WORLDS)

    def leave_out(scenario: Any) -> Any:
        scenario.left_out = {**getattr(scenario, "left_out", {}), **dict.fromkeys(worlds, why)}
        return scenario

    return leave_out


def by_instants(scenario: Callable[..., None]) -> Callable[..., None]:
    """For a scenario that says what happens before what: in real time a machine that is held up may turn that round.

    There it is tried again. In virtual time, where the same scenario has no such excuse, it is not.
    """
    patient = undisturbed_as_a_whole(scenario)

    @wraps(scenario)
    def play(world: World, **options: Any) -> None:
        (scenario if world.is_exact else patient)(world=world, **options)

    return play


no_stream = not_under("simulation", why="a simulation has no stream: it hands out a report at the end")
no_token = not_under("simulation", why="a simulation takes no token")
no_call = not_under("simulation", why="a simulation calls no task: there is nothing to look around from within it")


def echo(payload: Any) -> Any:
    return payload


def by_kind(payload: Any) -> Any:
    """Ends as its payload says."""
    if isinstance(payload, BaseException):
        raise payload
    return payload


def short(seconds: float) -> Any:
    yield seconds
    return seconds


# ---- 1: one result for every input -----------------------------------------------------------------------------------


@by_instants
def test_every_way_to_end_has_its_status(world: World) -> None:
    inputs = ["fine", TaskError("no"), TransientError("later"), ValueError("bug"), TimeoutError("os")]

    def script(payload: Any) -> Any:
        if payload == HANG:
            yield HANG
        return by_kind(payload)

    ran = world.run(script, [*inputs, Task(HANG, timeout=0.05)])
    assert ran.statuses == ["succeeded", "failed", "failed", "error", "error", "timeout"]
    assert [result.error for result in ran.report.results[1:5]] == inputs[1:5]
    check_run(ran, ExecutionPolicy(), 6)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("as_inputs", [list, iter], ids=["list", "iterator"])
def test_each_input_has_one_result_in_input_order(
    world: World, count: int, as_inputs: Callable[[Iterable[int]], Iterable[int]]
) -> None:
    ran = world.run(echo, as_inputs(range(count)))
    assert ran.report.values() == list(range(count))
    check_run(ran, ExecutionPolicy(), count)


def test_a_key_that_was_there_before_is_a_duplicate(world: World) -> None:
    ran = world.run(echo, ["a", "b", "a", "a"], key=echo)
    assert ran.statuses == ["succeeded", "succeeded", "skipped", "skipped"]
    assert ran.reasons[2:] == ["duplicate", "duplicate"]


def test_what_finds_no_budget_is_skipped(world: World) -> None:
    policy = ExecutionPolicy(budget=2)
    ran = world.run(echo, range(4), policy)
    assert ran.statuses == ["succeeded", "succeeded", "skipped", "skipped"]
    assert ran.reasons[2:] == ["budget_exhausted", "budget_exhausted"]
    check_run(ran, policy, 4)


def test_what_finds_the_breaker_open_is_skipped(world: World) -> None:
    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=2, on_open="skip"))
    ran = world.run(by_kind, [TaskError("1"), TaskError("2"), "x", "y"], policy)
    assert ran.statuses == ["failed", "failed", "skipped", "skipped"]
    assert ran.reasons[2:] == ["breaker_open", "breaker_open"]
    assert len(ran.of("breaker_opened")) == 1


def test_what_a_stop_leaves_unfinished_is_cancelled_and_keeps_its_last_error(world: World) -> None:
    policy = ExecutionPolicy(
        concurrency=1,
        retry=RetryPolicy(max_attempts=2, backoff=60.0, jitter="none"),
        stop=StopConditions(max_results=1),
    )
    first = TransientError("try again")
    ran = world.run(by_kind, [first, "result", "never"], policy)
    assert ran.statuses == ["cancelled", "succeeded", "cancelled"]
    assert ran.reasons == ["max_results", None, "max_results"]
    assert ran.report.results[0].error is first


def test_an_input_that_was_never_taken_has_no_result_and_the_report_says_so(world: World) -> None:
    policy = ExecutionPolicy(concurrency=1, lookahead=0, stop=StopConditions(max_results=1))
    ran = world.run(echo, iter(range(100)), policy)
    assert len(ran.report.results) < 4
    assert ran.report.intake_cut
    assert not ran.report.all_succeeded


def test_an_amount_that_could_never_be_had_is_an_error_of_that_item_alone(world: World) -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=1000, burst=5)])
    ran = world.run(echo, [Task("x", amount=6), "y"], policy)
    assert ran.statuses == ["error", "succeeded"]
    assert "at most 5" in str(ran.report.results[0].error)


def test_a_key_function_that_raises_is_an_error_of_that_item_alone(world: World) -> None:
    ran = world.run(echo, [1, 0, 2], key=lambda payload: str(1 / payload))
    assert ran.statuses == ["succeeded", "error", "succeeded"]


def test_lanes_whose_keys_look_alike_are_counted_apart(world: World) -> None:
    ran = world.run(echo, [1, "1", None, "None"], lane_by=echo)
    assert ran.report.success_count == 4


@no_stream
@by_instants
def test_a_stream_gives_completion_order_unless_ordered(world: World) -> None:
    inputs = [0.3, 0.0, 0.0]
    assert world.stream(short, inputs).handed_out[-1].value == 0.3
    assert [result.value for result in world.stream(short, inputs, ordered=True).handed_out] == inputs


# ---- 2: limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "burst"), [(100, 1), (200, 5), (50, 20)])
@undisturbed
def test_no_window_holds_more_admissions_than_the_rate_allows_and_the_rate_is_used(
    world: World, rate: float, burst: float
) -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=rate, burst=burst)])
    ran = world.run(echo, range(60), policy)
    check_run(ran, policy, 60)
    least = (60 - burst) / rate
    with timely():
        assert ran.report.makespan <= (least if world.is_exact else 1.25 * least) + world.late


@undisturbed
def test_a_window_holds_from_outcome_to_start(world: World) -> None:
    policy = ExecutionPolicy(limits=[Window(limit=3, seconds=0.2)])
    ran = world.run(short, [0.02] * 10, policy)
    starts, answers = [event.at for event in ran.of("start")], sorted(event.at for event in ran.of("answer"))
    assert most_in_any_window(starts, 0.2) <= 3
    for number, at in enumerate(starts[3:]):
        assert at >= answers[number] + 0.2 - 1e-6       # on the server's clock too: counted from the outcome
        with timely():
            assert at == pytest.approx(answers[number] + 0.2, abs=world.late)


def test_retries_are_admitted_like_any_attempt(world: World) -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=100)], retry=NO_WAIT)
    ran = world.run(by_kind, [TransientError(str(n)) for n in range(10)], policy)
    assert len(ran.of("start")) == 30
    check_run(ran, policy, 10)


# ---- 3, 4: nothing that waits holds a worker; no lane delays another ----------------------------------------------


@by_instants
def test_a_backoff_holds_no_worker(world: World) -> None:
    policy = ExecutionPolicy(concurrency=1, retry=RetryPolicy(max_attempts=2, backoff=0.4, jitter="none"))
    ran = world.run(by_kind, [TransientError("x"), *range(20)], policy)
    last_first_try = max(event.at for event in ran.of("start") if event.number == 1)
    retried = next(event.at for event in ran.of("start") if event.number == 2)
    assert last_first_try < retried
    assert retried - ran.events[0].at == pytest.approx(0.4, abs=world.late)


@pytest.mark.parametrize("trouble", ["rate", "slow", "throttled", "broken"])
@by_instants
def test_a_lane_in_trouble_delays_no_other(world: World, trouble: str) -> None:
    def script(payload: tuple[str, int]) -> Any:
        lane, number = payload
        if lane == "bad" and trouble == "slow":
            yield 0.15
        if lane == "bad" and trouble == "throttled":
            raise RateLimitError(retry_after=400.0)
        if lane == "bad" and trouble == "broken":
            raise OSError("down")
        return number

    limits = [RateLimit(per_second=10 if trouble == "rate" else 1000, burst=10)]
    policy = ExecutionPolicy(concurrency=2, limits=limits, breaker=BreakerPolicy(failures=2, on_open="skip"))
    inputs = [(lane, number) for number in range(10) for lane in ("bad", "good")]
    ran = world.run(script, inputs, policy, lane_by=lambda payload: payload[0])
    answers = [event.at for event in ran.of("answer") if event.source == "good"]
    assert len(answers) == 10
    assert answers[-1] - ran.events[0].at <= world.late


@by_instants
def test_a_lane_without_lookahead_uses_all_its_concurrency(world: World) -> None:
    def script(payload: int) -> Any:
        yield 0.5 if payload == 0 else 0.0

    ran = world.run(script, range(6), ExecutionPolicy(concurrency=2, lookahead=0))
    starts = {event.index: event.at for event in ran.of("start")}
    assert starts[5] - starts[0] <= world.late


# ---- 5, 6: all or nothing, budgets -------------------------------------------------------------------------------


@undisturbed
def test_a_refused_attempt_has_taken_nothing_of_the_other_limit(world: World) -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=1000, burst=10), RateLimit(per_second=20)])
    ran = world.run(echo, range(6), policy)
    check_run(ran, policy, 6)
    with timely():
        assert ran.report.makespan == pytest.approx(5 / 20, abs=world.late)


def test_64_workers_and_a_budget_of_10_make_10_calls(world: World) -> None:
    policy = ExecutionPolicy(concurrency=64, budget=10, retry=RetryPolicy(max_attempts=3, backoff=0.001))
    ran = world.run(by_kind, [TransientError(str(n)) if n % 3 else n for n in range(100)], policy)
    assert len(ran.of("start")) == 10
    check_run(ran, policy, 100)


def test_a_retry_that_finds_no_budget_keeps_its_failure(world: World) -> None:
    error = TransientError("first")
    ran = world.run(by_kind, [error], ExecutionPolicy(budget=1, retry=NO_WAIT))
    assert ran.statuses == ["failed"]
    assert ran.report.results[0].error is error
    assert ran.report.results[0].attempts == 1


@by_instants
def test_a_throttled_attempt_uses_no_attempt_but_a_call(world: World) -> None:
    seen: list[int] = []

    def script(payload: int) -> Any:
        seen.append(payload)
        if len(seen) <= 2:
            raise RateLimitError(retry_after=0.1)
        return payload

    policy = ExecutionPolicy(concurrency=1, budget=3)
    ran = world.run(script, [1], policy)
    assert ran.statuses == ["succeeded"]
    assert ran.report.results[0].attempts == 1
    assert ran.report.by_source["default"].throttled == 2
    starts = [event.at for event in ran.of("start")]
    assert all(later - sooner >= 0.1 - 1e-6 for sooner, later in pairwise(starts))
    assert all(later - sooner == pytest.approx(0.1, abs=world.late) for sooner, later in pairwise(starts))
    check_run(ran, policy, 1)


def test_a_source_that_asks_for_too_long_fails_the_task(world: World) -> None:
    ran = world.run(by_kind, [RateLimitError(retry_after=301.0)])
    assert ran.statuses == ["failed"]


# ---- batches -----------------------------------------------------------------------------------------------------


@by_instants
def test_a_batch_starts_so_long_after_all_results_of_the_one_before(world: World) -> None:
    policy = ExecutionPolicy(batch_size=3, batch_backoff=0.1)
    ran = world.run(short, [0.0, 0.05, 0.01] * 3, policy)
    starts = [event.at for event in ran.of("start")]
    results = [event.at for event in ran.of("result")]
    for first in (3, 6):
        begin, end = min(starts[first : first + 3]), max(results[first - 3 : first])
        assert begin >= end + 0.1 - 1e-6
        assert begin == pytest.approx(end + 0.1, abs=world.late)
    check_run(ran, policy, 9)


# ---- 7: stops are exact ----------------------------------------------------------------------------------------------


def test_it_stops_at_the_tenth_failure(world: World) -> None:
    policy = ExecutionPolicy(concurrency=1, stop=StopConditions(max_failures=10))
    ran = world.run(by_kind, [TaskError(str(n)) for n in range(100)], policy)
    assert ran.report.failure_count == 10
    assert len(ran.of("start")) == 10
    assert ran.report.stop_reason == "max_failures"


@by_instants
def test_what_runs_at_a_stop_is_drained_and_counts(world: World) -> None:
    policy = ExecutionPolicy(concurrency=4, stop=StopConditions(max_results=1))
    ran = world.run(short, [0.05, 0.15, 0.15, 0.15, 0.15], policy)
    assert ran.statuses == ["succeeded"] * 4 + ["cancelled"]
    check_run(ran, policy, 5)


@pytest.mark.abandons("calls that hang are given up")
@pytest.mark.parametrize("stop", [{"in_flight": "abandon"}, {"drain_seconds": 0.05}], ids=["abandon", "drain_seconds"])
@by_instants
def test_a_stop_waits_for_what_runs_no_longer_than_it_may(world: World, stop: dict[str, Any]) -> None:
    def script(payload: int) -> Any:
        yield HANG if payload else 0.02

    policy = ExecutionPolicy(concurrency=3, stop=StopConditions(max_results=1, **stop))
    begin = world.now()
    ran = world.run(script, range(5), policy)
    assert world.now() - begin <= 0.07 + world.late
    assert ran.statuses == ["succeeded"] + ["cancelled"] * 4
    assert ran.report.abandoned == (2 if world.may_hang else 0)


def test_the_share_of_failures_stops_once_there_are_enough_outcomes(world: World) -> None:
    stop = StopConditions(failure_rate=0.5, min_outcomes=8)
    inputs = [TaskError("x") if n % 2 else n for n in range(100)]
    ran = world.run(by_kind, inputs, ExecutionPolicy(concurrency=1, stop=stop))
    assert (ran.report.success_count, ran.report.failure_count) == (4, 4)
    assert ran.report.stop_reason == "failure_rate"
    assert ran.report.success_rate == 0.5


@pytest.mark.abandons("inputs that hang are given up")
@pytest.mark.parametrize("pause", [10.0, HANG], ids=["slow", "hangs"])
@not_under("simulation", why="inputs take no time in a simulation")
@by_instants
def test_a_run_ends_at_its_timeout_even_where_its_inputs_block(world: World, pause: float) -> None:
    def inputs() -> Iterator[Any]:
        yield 1
        yield Pause(pause)

    begin = world.now()
    ran = world.run(echo, world.inputs(inputs), ExecutionPolicy(stop=StopConditions(timeout=0.1)))
    assert world.now() - begin <= 0.2 + world.late
    assert ran.statuses == ["succeeded"]
    assert ran.report.stop_reason == "timeout"
    assert ran.report.intake_cut


@no_token
def test_a_token_stops_the_run_and_its_reason_is_recorded(world: World) -> None:
    token = CancellationToken()

    def script(payload: int) -> int:
        if payload == 3:
            token.cancel("enough")
        return payload

    ran = world.run(script, range(1000), ExecutionPolicy(concurrency=1), token)
    assert ran.error is None
    assert ran.report.stop_reason == "enough"
    assert ran.report.success_count < 1000
    assert "enough" in ran.reasons


@no_token
def test_a_token_cancelled_before_starts_nothing(world: World) -> None:
    token = CancellationToken()
    token.cancel("beforehand")
    ran = world.run(echo, range(10), cancel=token)
    assert not ran.of("start")
    assert ran.report.stop_reason == "beforehand"


# ---- 8: one failure cancels nobody -----------------------------------------------------------------------------------


def test_one_failure_cancels_no_other_task(world: World) -> None:
    ran = world.run(by_kind, [RuntimeError("x"), *range(50)])
    assert ran.statuses == ["error"] + ["succeeded"] * 50


@pytest.mark.abandons("calls that hang are given up")
@pytest.mark.parametrize("seconds", [10.0, HANG], ids=["slow", "hangs"])
@not_under("stepped threads", "simulation", why="the caller itself keeps the time: it does not wait while time passes")
@by_instants
def test_an_interrupted_caller_gets_its_exception_in_time_with_the_partial_report(world: World, seconds: float) -> None:
    def script(payload: int) -> Any:
        yield 0.0 if payload < 3 else seconds
        return payload

    ran, took = world.interrupt(script, range(6), ExecutionPolicy(concurrency=2), after=0.2)
    assert isinstance(ran.error, (KeyboardInterrupt, CancelledError))
    assert took <= 0.1 + world.late
    assert ran.error.report is ran.report       # type: ignore[union-attr]
    assert ran.statuses == ["succeeded"] * 3 + ["cancelled"] * 3
    assert ran.report.stop_reason == "interrupted"
    assert len(ran.of("start")) == 5


# ---- 9: a hung call cannot hang the run --------------------------------------------------------------------------


@pytest.mark.abandons("calls that hang are given up")
@by_instants
def test_a_hung_call_times_out_in_time_and_its_slot_is_free_again(world: World) -> None:
    def script(payload: int) -> Any:
        if payload == 0:
            yield HANG
        return payload

    begin = world.now()
    inputs = [Task(0, timeout=0.2), *range(1, 20)]
    ran = world.run(script, inputs, ExecutionPolicy(concurrency=1, max_abandoned=2))
    assert world.now() - begin <= 0.2 + world.late
    assert ran.statuses == ["timeout"] + ["succeeded"] * 19
    assert ran.report.results[0].duration == pytest.approx(0.2, abs=world.late)
    assert ran.report.abandoned == (1 if world.may_hang else 0)


@no_call
@by_instants
def test_an_attempt_that_is_given_up_is_told_so_and_its_late_answer_is_dropped(world: World) -> None:
    told: list[str | None] = []

    def script(payload: int) -> Any:
        if payload == 1:
            for _ in range(400):
                if told:
                    break
                yield 0.005
            return "in time"
        token = current_attempt().cancel
        for _ in range(400):
            if token.cancelled:
                break
            yield Deaf(0.005)
        told.append(token.reason)
        return "late"

    ran = world.run(script, [Task(0, timeout=0.1), Task(1, timeout=10.0)])
    assert told == ["timeout"]
    assert ran.statuses == ["timeout", "succeeded"]
    assert ran.report.values() == ["in time"]
    assert ran.report.results[0].value is None


@pytest.mark.parametrize("stop", [{}, {"max_results": 1, "in_flight": "abandon"}], ids=["timeout", "stop"])
@not_under("threads", "in thread", why="a thread cannot be made to end, nor told where it sleeps")
@by_instants
def test_a_call_that_listens_ends_when_it_is_given_up(world: World, stop: dict[str, Any]) -> None:
    ended: list[int] = []

    def script(payload: int) -> Any:
        try:
            yield 0.02 if payload == 0 else float("inf")
        finally:
            ended.append(payload)

    policy = ExecutionPolicy(concurrency=3, timeout=0.1, stop=StopConditions(**stop))
    begin = world.now()
    ran = world.run(script, range(3), policy)
    assert world.now() - begin <= 0.1 + world.late
    assert ran.statuses == ["succeeded"] + ["cancelled" if stop else "timeout"] * 2
    assert ran.report.abandoned == 0
    assert not ran.of("late")
    assert sorted(ended) == [0, 1, 2]


@not_under("simulation", why="a simulated call ends when it is given up: there is no late answer")
@by_instants
def test_a_late_answer_is_an_event_and_not_a_result(world: World) -> None:
    def script(payload: float) -> Any:
        yield Deaf(payload)
        return payload

    inputs = [Task(0.15, timeout=0.08), *[0.04] * 8]
    ran = world.run(script, inputs, ExecutionPolicy(concurrency=1, max_abandoned=2))
    assert [event.index for event in ran.of("late")] == [0]
    assert ran.statuses == ["timeout"] + ["succeeded"] * 8
    assert ran.report.abandoned == 0


@pytest.mark.abandons("calls that hang are given up")
@not_under("simulation", why="a simulated call ends when it is given up: none hangs")
@by_instants
def test_too_many_hung_calls_open_the_breaker(world: World) -> None:
    def script(payload: int) -> Any:
        yield HANG

    policy = ExecutionPolicy(
        concurrency=2, timeout=0.05, max_abandoned=3, breaker=BreakerPolicy(failures=100, on_open="skip")
    )
    ran = world.run(script, range(10), policy)
    assert ran.report.abandoned in (3, 4)       # the one that ran beside the third may have been let in before
    assert ran.reasons[-1] == "breaker_open"
    assert len(ran.of("breaker_opened")) == 1


@by_instants
def test_a_timed_out_attempt_is_tried_again_where_the_policy_says_so(world: World) -> None:
    seen: list[int] = []

    def script(payload: str) -> Any:
        seen.append(1)
        if len(seen) == 1:
            yield 0.3
        return payload

    ran = world.run(script, ["x"], ExecutionPolicy(timeout=0.1, retry=NO_WAIT))
    assert [event.number for event in ran.of("start")] == [1, 2]
    assert ran.report.values() == ["x"]
    assert ran.report.results[0].attempts == 2


@no_call
@by_instants
def test_a_task_can_learn_of_its_attempt(world: World) -> None:
    def script(payload: str) -> Any:
        attempt = current_attempt()
        before = attempt.remaining()
        yield 0.1
        if attempt.number == 1:
            raise TransientError("once")
        assert current_attempt() is attempt
        return attempt.task, attempt.number, attempt.source, before, before - attempt.remaining()

    task = Task("x", key="name")
    policy = ExecutionPolicy(timeout=5.0, retry=NO_WAIT)
    learnt = world.run(script, [task], policy).report.values()[0]
    assert learnt[:3] == (task, 2, "default")
    assert learnt[3:] == (pytest.approx(5.0, abs=world.late), pytest.approx(0.1, abs=world.late))


@by_instants
def test_the_whole_task_ends_within_its_own_timeout(world: World) -> None:
    retry = RetryPolicy(max_attempts=100, backoff=0.05, multiplier=1.0, jitter="none", timeout=0.2)
    ran = world.run(by_kind, [TransientError("x")], ExecutionPolicy(retry=retry))
    assert ran.statuses == ["failed"]
    assert 3 <= ran.report.results[0].attempts <= 4


# ---- 10: laziness ----------------------------------------------------------------------------------------------------


class Counted:
    """An endless iterator that knows how far it was taken, at any time."""

    def __init__(self, count: int) -> None:
        self.taken = 0
        self._count = count

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> int:
        if self.taken == self._count:
            raise StopIteration
        self.taken += 1
        return self.taken


@pytest.mark.parametrize(("concurrency", "lookahead"), [(1, 0), (2, 0), (2, 5), (8, 64)])
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@no_stream
def test_a_stream_takes_no_more_than_it_may(world: World, concurrency: int, lookahead: int, ordered: bool) -> None:
    inputs = Counted(300)
    ahead: list[int] = []
    handed_out: list[int] = []

    def consume(result: Any) -> bool:
        handed_out.append(result.value)     # first: the intake counts it as handed out already
        ahead.append(inputs.taken - len(handed_out))
        return True

    policy = ExecutionPolicy(concurrency=concurrency, lookahead=lookahead)
    ran = world.stream(echo, inputs, policy, ordered=ordered, consume=consume)
    assert len(ran.handed_out) == 300
    assert max(ahead) <= concurrency + lookahead


def test_a_run_takes_no_more_than_it_may(world: World) -> None:
    inputs = Counted(100)
    ahead: list[int] = []
    done: list[int] = []

    def script(payload: int) -> None:
        ahead.append(inputs.taken - len(done))
        done.append(payload)

    world.run(script, inputs, ExecutionPolicy(concurrency=1, lookahead=7))
    assert max(ahead) <= 8 + 1      # `done` is told before the result counts


@no_stream
def test_an_ordered_stream_waits_for_its_head_and_takes_no_more_meanwhile(world: World) -> None:
    inputs = Counted(100)
    ahead: list[int] = []

    def script(payload: int) -> Any:
        if payload == 1:
            yield 0.1
            ahead.append(inputs.taken)
        return payload

    ran = world.stream(script, inputs, ExecutionPolicy(concurrency=2, lookahead=6), ordered=True)
    assert [result.value for result in ran.handed_out] == list(range(1, 101))
    assert ahead[0] <= 8


@pytest.mark.abandons("a call that hangs is given up")
@no_stream
@by_instants
def test_a_timeout_comes_in_time_while_the_consumer_sleeps(world: World) -> None:
    def script(payload: int) -> Any:
        if payload == 1:
            yield HANG
        return payload

    def consume(result: Any) -> Any:
        if result.value == 0:
            yield 0.4
        return True

    ran = world.stream(script, range(2), ExecutionPolicy(timeout=0.1), consume=consume)
    begin, timed_out = ran.of("start")[1].at, ran.of("timeout")[0].at
    assert timed_out - begin <= 0.1 + world.late
    assert [result.status.value for result in ran.handed_out] == ["succeeded", "timeout"]


def inputs_that_raise() -> Iterator[float]:
    yield 0.1
    yield 0.0
    raise LookupError("no more")


def check_inputs_that_raised(ran: Ran, values: list[float]) -> None:
    assert isinstance(ran.error, LookupError)
    assert ran.error.report is ran.report       # type: ignore[attr-defined]
    assert ran.report.intake_cut
    assert sorted(values) == [0.0, 0.1]


def test_inputs_that_raise_stop_the_intake_and_raise_after_all_that_was_taken(world: World) -> None:
    ran = world.run(short, inputs_that_raise())
    check_inputs_that_raised(ran, ran.report.values())


@no_stream
def test_inputs_that_raise_stop_a_stream_after_all_that_was_taken(world: World) -> None:
    ran = world.stream(short, inputs_that_raise())
    check_inputs_that_raised(ran, [result.value for result in ran.handed_out])


def test_a_dict_that_changes_while_it_is_read_stops_the_intake_like_any_input(world: World) -> None:
    inputs: dict[int, None] = dict.fromkeys(range(500))

    def script(payload: int) -> int:
        inputs.setdefault(payload + 1000)
        return payload

    ran = world.run(script, inputs)
    assert isinstance(ran.error, RuntimeError)
    assert ran.report.intake_cut
    assert set(ran.statuses) == {"succeeded"}


# ---- 11: whatever user code does ---------------------------------------------------------------------------------


class Slotted(Exception):
    __slots__ = ()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Fundamental(BaseException):
    pass


class Unfinished(RateLimitError):
    """A subclass that forgot its super().__init__, and so has no `retry_after`."""

    def __init__(self) -> None:
        Exception.__init__(self, "slow down")


class Boastful(RateLimitError):
    """One that says when in a way nobody understands."""

    def __init__(self) -> None:
        super().__init__("slow down")
        self.retry_after = "soon"       # type: ignore[assignment]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Slotted(), "error"),
        (Unspeakable(), "error"),
        (Fundamental(), "error"),
        (GeneratorExit(), "error"),
        (ExceptionGroup("many", [ValueError("a")]), "error"),
        (RecursionError(), "error"),
        (Unfinished(), "failed"),
        (Boastful(), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_odd_error_is_the_result_of_its_item_alone(world: World, error: BaseException, status: str) -> None:
    retry = RetryPolicy(backoff=1.0, jitter="none", max_retry_after=0.5)
    ran = world.run(by_kind, [1, error, 2], ExecutionPolicy(retry=retry))
    assert ran.error is None
    assert ran.statuses[0] == ran.statuses[2] == "succeeded"
    assert ran.report.results[1].error is not None
    if not isinstance(error, RateLimitError):       # those may also be FAILED by max_retry_after, or ERROR
        assert ran.statuses[1] == status
        assert ran.report.results[1].error is error


@not_under(*COROUTINES, why="Python makes a RuntimeError of a StopIteration that a coroutine raises")
def test_a_stop_iteration_is_the_result_of_its_item_alone(world: World) -> None:
    error = StopIteration()
    ran = world.run(by_kind, [1, error, 2])
    assert ran.statuses == ["succeeded", "error", "succeeded"]
    assert ran.report.results[1].error is error


@not_under("threads", "stepped threads", "simulation", why="without a coroutine it is the error that was raised")
def test_a_stop_iteration_from_a_coroutine_is_what_python_makes_of_it(world: World) -> None:
    error = StopIteration()
    ran = world.run(by_kind, [1, error, 2])
    assert ran.statuses == ["succeeded", "error", "succeeded"]
    assert isinstance(ran.report.results[1].error, RuntimeError)
    assert ran.report.results[1].error.__cause__ is error


@pytest.mark.parametrize("value", [ValueError("a value"), None, (), iter(()), object], ids=repr)
def test_whatever_is_returned_is_a_value(world: World, value: Any) -> None:
    ran = world.run(lambda payload: value, [0])
    assert ran.report.values() == [value]
    assert ran.report.results[0].unwrap() is value


def test_a_generator_returned_is_a_value(world: World) -> None:
    ran = world.run(lambda payload: (n for n in [payload]), [7])
    assert list(ran.report.values()[0]) == [7]


@pytest.mark.parametrize("module", ["asyncio", "concurrent.futures"])
def test_a_cancellation_nobody_asked_for_is_cancelled_and_harms_no_other(world: World, module: str) -> None:
    kind = __import__(module, fromlist=["CancelledError"]).CancelledError
    ran = world.run(by_kind, [kind(), *range(10)], ExecutionPolicy(concurrency=1, retry=NO_WAIT))
    assert ran.statuses == ["cancelled"] + ["succeeded"] * 10
    assert ran.reasons[0] == "task_cancelled"
    assert ran.report.results[0].attempts == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_exit_raised_by_a_task_ends_the_run_and_is_raised(world: World, kind: type[BaseException]) -> None:
    error = kind(3)
    ran = world.run(by_kind, [1, error, *range(100)], ExecutionPolicy(concurrency=1))
    assert ran.error is error
    assert error.report is ran.report       # type: ignore[attr-defined]
    assert ran.report.results[1].error is error
    assert len(ran.of("start")) == 2


@no_call
def test_each_attempt_sees_the_callers_context_and_keeps_its_changes_to_itself(world: World) -> None:
    from contextvars import ContextVar

    name: ContextVar[str] = ContextVar("name", default="nobody")
    name.set("caller")

    def script(payload: str) -> str:
        before = name.get()
        name.set(payload)
        return before

    ran = world.run(script, [f"task {n}" for n in range(30)], ExecutionPolicy(concurrency=2))
    assert set(ran.report.values()) == {"caller"}
    assert name.get() == "caller"


def test_a_predicate_that_raises_ends_that_task_with_its_error(world: World) -> None:
    retry = RetryPolicy(max_attempts=3, retry_on=lambda error: error.code == 503)   # type: ignore[attr-defined]
    ran = world.run(by_kind, [TransientError("no code"), 1], ExecutionPolicy(retry=retry))
    assert ran.statuses == ["error", "succeeded"]
    assert isinstance(ran.report.results[0].error, AttributeError)


@by_instants
def test_a_predicate_may_say_how_long_to_wait(world: World) -> None:
    retry = RetryPolicy(max_attempts=2, retry_on=lambda error: 0.15)
    ran = world.run(by_kind, [TransientError("x")], ExecutionPolicy(retry=retry))
    first, second = [event.at for event in ran.of("start")]
    assert second - first == pytest.approx(0.15, abs=world.late)
    assert second - first >= 0.15


@pytest.mark.parametrize("kind", [ValueError, SystemExit, Fundamental])
def test_a_listener_that_raises_harms_no_run_and_is_reported_once(
    world: World, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: object) -> None:
        raise kind("listener")

    report = world.run_with(world.scheduler(echo, ExecutionPolicy(timeout=5.0), on_event=listener), range(20))
    assert report.success_count == 20
    assert len([record for record in caplog.records if record.name == "qengine.events"]) == 1


# ---- 14: state has an owner ------------------------------------------------------------------------------------------


afresh = not_under("simulation", why="a simulation leaves the state of its executor as it is")


@afresh
@undisturbed
def test_rate_state_holds_across_runs_and_a_budget_is_per_run(world: World) -> None:
    admitted: list[float] = []
    policy = ExecutionPolicy(limits=[RateLimit(per_second=100, burst=3)], budget=8)
    scheduler = world.scheduler(echo, policy, on_event=lambda e: admitted.append(e.at) if e.kind == "start" else None)
    for _ in range(3):
        world.run_with(scheduler, range(10))
    assert len(admitted) == 3 * 8
    assert not breaches(admitted, 100, 3)
    with timely():
        assert admitted[-1] - admitted[0] == pytest.approx((24 - 3) / 100, abs=world.late)


@not_under(*IN_VIRTUAL_TIME, why="one run at a time: a virtual clock refuses a second one")
def test_rate_state_holds_across_concurrent_runs(world: World) -> None:
    admitted: list[float] = []
    policy = ExecutionPolicy(limits=[RateLimit(per_second=100, burst=3)], budget=8)
    scheduler = world.scheduler(echo, policy, on_event=lambda e: admitted.append(e.at) if e.kind == "start" else None)
    reports = world.together(scheduler, [range(10)] * 3)
    assert [len(report.results) for report in reports] == [10] * 3
    world.run_with(scheduler, range(10))
    assert len(admitted) == 4 * 8
    assert not breaches(admitted, 100, 3)


@not_under(*IN_REAL_TIME, "simulation", why="only a virtual clock is one run's")
def test_a_virtual_clock_refuses_a_second_run_and_the_first_goes_on(world: World) -> None:
    events: list[Event] = []
    scheduler = world.scheduler(short, on_event=events.append)
    refused: list[str] = []

    def inputs() -> Iterator[Any]:
        try:
            TaskScheduler(echo, ExecutionPolicy(), clock=world.clock).run([1])      # type: ignore[attr-defined]
        except ValueError as error:
            refused.append(str(error))
        yield 0.5

    assert world.run_with(scheduler, world.inputs(inputs)).values() == [0.5]
    assert "clock" in refused[0]
    assert "allowed is" in refused[0]


@afresh
def test_an_open_breaker_holds_across_runs(world: World) -> None:
    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=1, on_open="skip", reset_after=100.0))
    events: list[Event] = []
    scheduler = world.scheduler(by_kind, policy, on_event=events.append)
    assert world.run_with(scheduler, [TaskError("x")]).failure_count == 1
    assert world.run_with(scheduler, [1, 2]).by_source["default"].skipped == {"breaker_open": 2}


def simulated(scheduler: Any, inputs: Iterable[Any], events: list[Event]) -> tuple[list[str], list[float]]:
    """Simulate calls that take no time and come to what `by_kind` makes of them; return their statuses and starts."""
    begin = len(events)
    report = simulate(scheduler, inputs, latency=0.0, outcome=lambda attempt: by_kind(attempt.task.payload))
    return (
        [result.status.value for result in report.results],
        [event.at for event in events[begin:] if event.kind == "start"],
    )


@not_under(*IN_REAL_TIME, "simulation", why="it takes an instant at which the state is looked at, and a real run")
def test_a_simulation_goes_by_the_state_of_its_executor_and_leaves_it_as_it_is(world: World) -> None:
    limits = [RateLimit(per_second=1, burst=2)]
    policy = ExecutionPolicy(concurrency=1, limits=limits, budget=4, breaker=BreakerPolicy(failures=1, on_open="skip"))
    events: list[Event] = []
    scheduler = world.scheduler(by_kind, policy, on_event=events.append)
    inputs = [1, 2, 3, TaskError("x"), 5]
    for _ in range(2):
        assert simulated(scheduler, inputs, events) == (["succeeded"] * 3 + ["failed", "skipped"], [0.0, 0.0, 1.0, 2.0])
    events.clear()
    assert world.run_with(scheduler, range(3)).success_count == 3
    assert [event.at for event in events if event.kind == "start"] == [0.0, 0.0, 1.0]
    for _ in range(2):
        assert simulated(scheduler, inputs[2:], events) == (["succeeded", "failed", "skipped"], [1.0, 2.0])
    events.clear()
    assert world.run_with(scheduler, [1, TaskError("x")]).failure_count == 1
    assert [event.at for event in events if event.kind == "start"] == [2.0, 3.0]
    for _ in range(2):
        assert simulated(scheduler, [1, 2], events) == (["skipped"] * 2, [])


# ---- random workloads ------------------------------------------------------------------------------------------------


def random_policy(rng: random.Random) -> ExecutionPolicy:
    return ExecutionPolicy(
        concurrency=rng.choice([1, 2, 5, 16]),
        limits=rng.choice([[], [RateLimit(per_second=500, burst=rng.randint(1, 5))]]),
        batch_size=rng.choice([None, None, rng.randint(1, 9)]),
        retry=RetryPolicy(max_attempts=rng.randint(1, 3), backoff=rng.choice([0.0, 0.002])),
        timeout=rng.choice([None, 5.0]),
        budget=rng.choice([None, None, rng.randint(0, 60)]),
        breaker=rng.choice([None, BreakerPolicy(failures=rng.randint(1, 4), reset_after=0.005)]),
        stop=rng.choice([StopConditions(), StopConditions(max_failures=rng.randint(1, 9))]),
        lookahead=rng.choice([0, 1, 8, 64]),
    )


def keep_the_books(count_of_seeds: int, switch_interval: float, go: Callable[..., Ran], is_ordered: bool) -> None:
    before = sys.getswitchinterval()
    for seed in range(count_of_seeds):
        rng = random.Random(seed)
        policy, count = random_policy(rng), rng.randint(0, 80)
        plan = {n: rng.choices(["ok", "sleep", "transient", "throttled", "bug"], [9, 4, 2, 1, 1])[0] for n in range(80)}
        tries: dict[int, int] = {}

        def script(payload: int, plan: dict[int, str] = plan, tries: dict[int, int] = tries) -> Any:
            tries[payload] = tries.get(payload, 0) + 1
            behaviour = plan[payload]
            if behaviour == "sleep":
                yield 0.001
            elif behaviour == "transient" and tries[payload] < 2:
                raise TransientError("once")
            elif behaviour == "throttled" and tries[payload] < 2:
                raise RateLimitError(retry_after=0.002)
            elif behaviour == "bug":
                raise ValueError("always")
            return payload

        inputs: Iterable[int] = range(count) if rng.random() < 0.5 else iter(range(count))
        sys.setswitchinterval(switch_interval)
        try:
            ran = go(script, inputs, policy)
        finally:
            sys.setswitchinterval(before)
        assert ran.error is None, seed
        taken = len(ran.report.results or ran.handed_out)
        assert taken == count or ran.report.intake_cut, seed
        check_run(ran, policy, taken)
        if is_ordered:
            payloads = [result.task.payload for result in ran.handed_out]
            assert payloads == sorted(payloads)


calm_or_hectic = pytest.mark.parametrize("switch_interval", [0.005, 1e-6], ids=["calm", "hectic"])


@pytest.mark.stress
@calm_or_hectic
def test_random_runs_keep_the_books(
    world: World, stress_count: Callable[[int], int], switch_interval: float
) -> None:
    keep_the_books(stress_count(8), switch_interval, world.run, is_ordered=False)


@pytest.mark.stress
@calm_or_hectic
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@no_stream
def test_random_streams_keep_the_books(
    world: World, stress_count: Callable[[int], int], switch_interval: float, ordered: bool
) -> None:
    keep_the_books(stress_count(8), switch_interval, partial(world.stream, ordered=ordered), is_ordered=ordered)
