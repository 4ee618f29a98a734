"""Cancellation: tokens that are linked and have deadlines; what waits, runs or is nested sees them at once.

Virtual time wherever nothing but time is waited for; nested runs, which block a thread, in real time without a sleep.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract_support import WORLDS
from freezegun import freeze_time
from shared import PATIENCE, undisturbed_as_a_whole, until

from qengine import (
    AsyncConcurrentExecutor,
    BreakerPolicy,
    CancellationToken,
    ConcurrentExecutor,
    ExecutionPolicy,
    QEngineError,
    RateLimit,
    RetryPolicy,
    StopConditions,
    Task,
    TaskScheduler,
    TransientError,
    current_attempt,
    in_thread,
    simulate,
)
from qengine.testing import VirtualClock

make_token: Any = CancellationToken
absolute: Callable[[int], int] = abs


@pytest.fixture(params=["stepped threads", "virtual loop", "stepped in thread"])
def world(request: pytest.FixtureRequest) -> Iterator[Any]:
    world: Any = WORLDS[request.param]()
    yield world
    world.close()


def timed(world: Any, seconds: float) -> CancellationToken:
    return CancellationToken(timeout=seconds, now_fn=world.clock.now)


# ---- tokens by themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "kind", "words"), [
    (lambda: make_token(timeout=0), ValueError, "timeout is 0, allowed is"),
    (lambda: make_token(timeout=float("nan")), ValueError, "timeout is nan, allowed is"),
    (lambda: make_token(timeout=float("inf")), ValueError, "timeout is inf, allowed is"),
    (lambda: make_token(timeout="1"), TypeError, "timeout is '1'"),
    (lambda: make_token(now_fn=3), TypeError, "now_fn is 3"),
    (lambda: make_token("parent"), TypeError, "parents is 'parent'"),
    (lambda: make_token().link(None), TypeError, "parents is None"),
    (lambda: make_token().wait("long"), TypeError, "timeout is 'long'"),
    (lambda: make_token(timeout=1, now_fn=lambda: float("inf")), ValueError, "what now_fn returned is inf"),
])
def test_bad_arguments_are_refused(make: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value) and "allowed is" in str(caught.value)


def test_a_token_is_cancelled_with_whichever_parent_is_first() -> None:
    one, two = CancellationToken(), CancellationToken()
    child = CancellationToken(one)
    child.link(two, two)
    grandchild = CancellationToken(child)
    two.cancel("two")
    one.cancel("one")
    assert (child.reason, grandchild.reason) == ("two", "two")
    assert CancellationToken(grandchild).reason == "two", "at once, if one is already"
    assert not one._children and not two._children


def test_a_child_does_not_cancel_its_parent() -> None:
    parent = CancellationToken()
    child = CancellationToken(parent)
    child.cancel()
    assert child.cancelled and not parent.cancelled
    assert not parent._children, "who is cancelled has left"


@pytest.mark.parametrize("links", [0, 1, 2, 5])
def test_a_circle_is_refused(links: int) -> None:
    first = last = CancellationToken()
    for _ in range(links):
        last = CancellationToken(last)
    with pytest.raises(ValueError, match=r"parents is <CancellationToken>, allowed is .* a circle"):
        first.link(last)
    last.cancel("x")
    assert first.cancelled == (links == 0)


def test_a_link_that_is_refused_has_changed_nothing() -> None:
    parent, other = CancellationToken(), CancellationToken()
    child = CancellationToken(parent)
    with pytest.raises(ValueError):
        parent.link(other, child)
    other.cancel()
    assert not parent.cancelled


def test_a_chain_may_be_long() -> None:
    first = last = CancellationToken()
    for _ in range(5000):
        last = CancellationToken(last)
    first.cancel("far")
    assert last.reason == "far"


def test_thousands_of_children_leave_nothing_behind(stress_count: Callable[[int], int]) -> None:
    server, told = CancellationToken(), list[str]()
    kept = [CancellationToken(server) for _ in range(10)]
    for _ in range(stress_count(5000)):
        request = CancellationToken(server, timeout=60.0)
        request.subscribe(told.append)
    del request
    assert len(server._children) == len(kept), "not even until the garbage is collected"
    server.cancel("down")
    assert {token.reason for token in kept} == {"down"} and told == []


def test_a_deadline_is_the_earliest_of_all() -> None:
    clock = VirtualClock(100.0)
    parent = CancellationToken(timeout=5.0, now_fn=clock.now)
    child = CancellationToken(parent, timeout=9.0)
    free = CancellationToken()
    assert (parent.deadline, child.deadline, child.remaining()) == (105.0, 105.0, 5.0)
    assert (free.deadline, free.remaining()) == (None, float("inf"))
    below = CancellationToken(free)
    free.link(CancellationToken(child))
    assert below.deadline == 105.0, "also of what is linked later"
    clock.sleep(5.0)
    assert below.cancelled and below.reason == "deadline" and parent.cancelled


def test_the_first_reason_stays_though_nobody_looked_at_the_clock() -> None:
    clock = VirtualClock()
    parent = CancellationToken()
    child = CancellationToken(parent, timeout=1.0, now_fn=clock.now)
    clock.sleep(2.0)
    parent.cancel("too late for the child")
    assert (parent.reason, child.reason) == ("too late for the child", "deadline")


def test_whoever_looks_first_tells_everybody() -> None:
    clock, told = VirtualClock(), list[str]()
    parent = CancellationToken(timeout=1.0, now_fn=clock.now)
    child = CancellationToken(parent)
    parent.subscribe(lambda reason: told.append(f"parent {reason}"))
    child.subscribe(lambda reason: told.append(f"child {reason}"))
    clock.sleep(1.0)
    assert repr(child) == "<CancellationToken 'deadline'>" and told == [], "to look at it in a debugger changes nothing"
    assert child.cancelled and child.cancelled
    assert sorted(told) == ["child deadline", "parent deadline"]


def test_clocks_are_not_mixed() -> None:
    here, there = VirtualClock(), VirtualClock()
    token = CancellationToken(timeout=1.0, now_fn=here.now)
    with pytest.raises(ValueError, match=r"now_fn of a parent is .* allowed is"):
        token.link(CancellationToken(timeout=1.0, now_fn=there.now))
    above = CancellationToken()
    below = CancellationToken(above, timeout=1.0, now_fn=here.now)
    with pytest.raises(ValueError, match="now_fn of a parent"):
        above.link(CancellationToken(timeout=1.0, now_fn=there.now))
    assert below.deadline == 1.0 and above.deadline is None


def test_a_frozen_clock_is_the_clock() -> None:
    with freeze_time("2026-05-21") as frozen:
        token = CancellationToken(timeout=10.0)
        assert ConcurrentExecutor(absolute).run([1], token).all_succeeded, "though it goes by real time"
        frozen.tick(9.0)
        assert not token.cancelled and token.remaining() == pytest.approx(1.0)
        frozen.tick(2.0)
        assert token.reason == "deadline"


def test_every_callback_is_called_though_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    parent, told = CancellationToken(), list[str]()
    child = CancellationToken(parent)

    def fail(reason: str) -> None:
        raise KeyError(reason)

    def leave(reason: str) -> None:
        raise SystemExit(reason)

    for token in (parent, child):
        for callback in (told.append, fail, told.append, leave, told.append):
            token.subscribe(callback)
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit, match="stop"):
        parent.cancel("stop")
    assert told == ["stop"] * 6 and len(caplog.records) == 2
    parent.cancel("again")
    assert len(told) == 6


def test_callbacks_are_called_once_whoever_cancels(stress_count: Callable[[int], int]) -> None:
    for _ in range(stress_count(50)):
        token, told, gate = CancellationToken(), list[str](), threading.Barrier(4)

        def cancel(number: int, token: CancellationToken = token, gate: threading.Barrier = gate) -> None:
            gate.wait()
            token.cancel(f"reason {number}")

        def join(number: int, token: CancellationToken = token, gate: threading.Barrier = gate,
                 told: list[str] = told) -> None:
            gate.wait()
            for _ in range(20):
                token.subscribe(told.append)

        threads = [threading.Thread(target=action, args=(n,)) for n, action in enumerate([cancel, cancel, join, join])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 40 and set(told) == {token.reason}


def test_waiting_ends_at_the_deadline_also_one_that_is_linked_meanwhile() -> None:
    clock, seen = VirtualClock(), list[Any]()
    token = CancellationToken(now_fn=clock.now)

    def task(payload: str) -> None:
        if payload == "wait":
            seen.append((token.wait(1.0), clock.now(), token.wait(), clock.now()))
        else:
            clock.sleep(2.0)
            token.link(CancellationToken(timeout=3.0, now_fn=clock.now))

    assert ConcurrentExecutor(task, clock=clock).run(["wait", "link"]).all_succeeded
    assert seen == [(False, 1.0, True, 5.0)]
    assert not token._watchers and not token._callbacks


def test_a_signal_handler_ends_a_wait() -> None:
    if not hasattr(signal, "setitimer"):
        pytest.skip("no such alarm here")
    token = CancellationToken()
    before = signal.signal(signal.SIGALRM, lambda *_: CancellationToken.cancel(token, "signal"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert CancellationToken(token).wait(PATIENCE) and token.reason == "signal"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# ---- runs ------------------------------------------------------------------------------------------------------------

WAITS = {
    "for the rate": ExecutionPolicy(concurrency=2, limits=[RateLimit(per_hour=1)]),
    "for its retry": ExecutionPolicy(retry=RetryPolicy(3, backoff=60.0, jitter="none")),
    "for the breaker": ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=1, reset_after=60.0)),
    "for its batch": ExecutionPolicy(batch_size=1, batch_backoff=60.0),
    "for its turn": ExecutionPolicy(concurrency=1),
}


@pytest.mark.parametrize("by", ["deadline", "user"])
@pytest.mark.parametrize("waits", WAITS)
def test_what_waits_is_cancelled_at_once(world: Any, waits: str, by: str) -> None:
    def script(payload: int) -> Iterator[float]:
        if waits == "for its turn":
            yield 7.5 if by == "user" else 6.0
        if waits in ("for its retry", "for the breaker"):
            raise TransientError("once more")
        yield 0.0

    policy, token = WAITS[waits], timed(world, 5.0) if by == "deadline" else CancellationToken()
    if by == "user":
        world.clock.at(5.0, lambda: token.cancel("user"))
    ran = world.run(script, range(3), policy, token)
    stop, = ran.of("stop")
    assert (stop.at, stop.detail, ran.report.stop_reason) == (5.0, by, by)
    assert ran.report.cancelled_count >= 1
    assert {event.at for event in ran.of("result") if event.detail == "cancelled"} == {5.0}
    assert by in ran.reasons


def test_what_runs_sees_it_at_once_though_it_is_drained(world: Any) -> None:
    seen: list[Any] = []

    def script(payload: int) -> Iterator[float]:
        cancel = current_attempt().cancel
        cancel.subscribe(lambda reason: seen.append((world.now(), reason)))
        while not cancel.cancelled:
            yield 1.0
        yield 0.5
        return "put away"

    ran = world.run(script, range(2), ExecutionPolicy(concurrency=2), timed(world, 4.5))
    assert seen == [(4.5, "deadline")] * 2
    assert ran.report.values() == ["put away"] * 2 and ran.report.makespan == 5.5


def test_a_drain_by_a_stop_condition_is_not_seen_until_the_call_is_given_up(world: Any) -> None:
    seen: list[Any] = []

    def script(payload: int) -> Iterator[float]:
        cancel = current_attempt().cancel
        cancel.subscribe(lambda reason: seen.append((world.now(), reason)))
        yield 1.0 + 10.0 * payload

    stop = StopConditions(max_results=1, drain_seconds=3.0)
    ran = world.run(script, range(2), ExecutionPolicy(concurrency=2, stop=stop))
    assert ran.statuses == ["succeeded", "cancelled"] and seen == [(4.0, "max_results")]


def test_the_deadline_of_the_token_is_that_of_the_attempt_where_it_is_the_earlier(world: Any) -> None:
    def script(payload: int) -> Iterator[float]:
        attempt = current_attempt()
        yield 1.0
        return attempt.deadline, attempt.remaining(), attempt.cancel.deadline

    policy = ExecutionPolicy(timeout=5.0)
    assert world.run(script, [0], policy, timed(world, 30.0)).report.values() == [(5.0, 4.0, 5.0)]
    assert world.run(script, [0], policy, timed(world, 3.0)).report.values() == [(4.0, 2.0, 4.0)]


def test_the_stop_that_comes_first_counts(world: Any) -> None:
    def script(payload: int) -> Iterator[float]:
        yield 10.0

    policy = ExecutionPolicy(stop=StopConditions(timeout=2.0, in_flight="abandon"))
    assert world.run(script, [0], policy, timed(world, 1.0)).report.stop_reason == "deadline"
    assert world.run(script, [0], policy, timed(world, 3.0)).report.stop_reason == "timeout"


def test_one_token_for_two_runs_one_after_the_other(world: Any) -> None:
    def script(payload: int) -> Iterator[float]:
        yield 3.0

    token = timed(world, 5.0)
    assert world.run(script, [0], ExecutionPolicy(), token).report.all_succeeded
    second = world.run(script, [0], ExecutionPolicy(stop=StopConditions(in_flight="abandon")), token)
    assert second.report.stop_reason == "deadline" and second.report.makespan == 2.0
    assert not world.run(script, [0], ExecutionPolicy(), token).of("start")
    assert not token._callbacks and not token._watchers and not token._children


@pytest.mark.parametrize("now_fn", [None, VirtualClock().now], ids=["real", "another"])
def test_a_token_by_another_clock_is_refused(world: Any, now_fn: Callable[[], float] | None) -> None:
    token = CancellationToken(timeout=9.0, now_fn=now_fn)
    for use in (world.run, world.stream):
        with pytest.raises(ValueError, match=r"the clock of cancel is .* allowed is the clock of the run"):
            use(abs, [1], cancel=token)
    assert not token._callbacks and not token._children


def test_a_stream_that_begins_later_refuses_it_now() -> None:
    with pytest.raises(ValueError, match="the clock of cancel"):
        AsyncConcurrentExecutor(in_thread(absolute)).stream([1], cancel=CancellationToken(now_fn=VirtualClock().now))


def test_real_runs_refuse_a_virtual_deadline_and_predictions_any() -> None:
    executor: Any = ConcurrentExecutor(abs)
    with pytest.raises(ValueError, match="the clock of cancel"):
        executor.run([1], CancellationToken(timeout=9.0, now_fn=VirtualClock().now))
    with pytest.raises(ValueError, match="the clock of cancel"):
        simulate(executor, [1], latency=1.0, cancel=CancellationToken(timeout=9.0))


def test_a_prediction_can_be_cancelled_and_its_attempts_see_it() -> None:
    token, seen = CancellationToken(), list[Any]()

    def outcome(attempt: Any) -> None:
        if attempt.task.payload == 2:
            token.cancel("seen enough")
        seen.append(attempt.cancel.reason)

    scheduler: Any = TaskScheduler(abs, ExecutionPolicy(concurrency=1))
    report = simulate(scheduler, range(9), latency=1.0, outcome=outcome, cancel=token)
    assert report.stop_reason == "seen enough" and seen == [None, None, "seen enough"]


def test_a_run_with_a_deadline_in_real_time_needs_nobody_to_look() -> None:
    token, told = CancellationToken(timeout=0.05), threading.Event()
    token.subscribe(lambda reason: told.set())

    def task(payload: int) -> str | None:
        current_attempt().cancel.wait()
        return current_attempt().cancel.reason

    assert ConcurrentExecutor(task).run([1], token).values() == ["deadline"]
    assert told.is_set()


def test_closing_a_stream_and_cancelling_one_is_seen_by_what_runs() -> None:
    seen: list[Any] = []
    ended = threading.Event()

    def task(payload: int) -> None:
        if payload:
            cancel = current_attempt().cancel
            cancel.wait(PATIENCE)
            seen.append(cancel.reason)
            ended.set()

    with ConcurrentExecutor(task, ExecutionPolicy(concurrency=2)).stream([0, 1]) as stream:
        next(stream)
        stream.cancel("no more")
        assert [result.status.value for result in stream] == ["succeeded"], "drained"
    ended.clear()
    with ConcurrentExecutor(task, ExecutionPolicy(concurrency=2)).stream([0, 1]) as stream:
        next(stream)
    assert ended.wait(PATIENCE) and seen == ["no more", "closed"]


def test_who_looks_only_after_the_attempt_was_given_up_sees_it() -> None:
    ended, seen, looked = threading.Event(), list[Any](), threading.Event()

    def task(payload: int) -> None:
        attempt = current_attempt()
        ended.wait(PATIENCE)
        seen.append(attempt.cancel.reason)
        looked.set()

    report = ConcurrentExecutor(task, ExecutionPolicy(timeout=0.02)).run([0])
    ended.set()
    assert report.results[0].status.value == "timeout"
    assert looked.wait(PATIENCE) and seen == ["timeout"]


def test_the_token_of_an_attempt_that_came_to_its_end_is_not_cancelled_by_the_next() -> None:
    views: list[Any] = []

    def task(payload: int) -> None:
        views.append(current_attempt())
        if payload:
            current_attempt().cancel.wait(PATIENCE)

    ConcurrentExecutor(task, ExecutionPolicy(concurrency=1)).run([0, Task(1, timeout=0.02)])
    assert [view.cancel.reason for view in views] == [None, "timeout"]


def test_a_run_from_another_thread_is_cancelled_from_here() -> None:
    token, begun, reports = CancellationToken(), threading.Event(), list[Any]()

    def task(payload: int) -> bool:
        begun.set()
        return current_attempt().cancel.wait(PATIENCE)

    thread = threading.Thread(target=lambda: reports.append(ConcurrentExecutor(task).run([0], token)))
    thread.start()
    assert begun.wait(PATIENCE)
    token.cancel("from the main thread")
    thread.join()
    assert reports[0].values() == [True] and reports[0].stop_reason == "from the main thread"


def test_a_callback_of_an_attempt_may_use_the_run_and_harms_it_not(caplog: pytest.LogCaptureFixture) -> None:
    """It runs outside of the core's lock: it may wait for what another thread of the run does."""
    answers: list[Any] = []
    scheduler: Any = TaskScheduler(lambda n: n, ExecutionPolicy(concurrency=2))

    def called_back(reason: str) -> None:
        answers.append(scheduler.call(7))
        raise ValueError("ours")

    def task(payload: int) -> None:
        current_attempt().cancel.subscribe(called_back)
        current_attempt().cancel.wait(PATIENCE)

    with caplog.at_level(logging.ERROR):
        report = ConcurrentExecutor(task, ExecutionPolicy(timeout=0.02)).run([0])
    assert report.results[0].status.value == "timeout"
    assert answers == [7] and len(caplog.records) == 1


# ---- nested runs -----------------------------------------------------------------------------------------------------


def wait_for_cancel(payload: Any) -> Any:
    attempt = current_attempt()
    attempt.cancel.wait(PATIENCE)
    return attempt.cancel.reason


def nested_three_deep(reasons: list[Any]) -> Callable[[int], Any]:
    def task(depth: int) -> Any:
        if depth == 0:
            return wait_for_cancel(depth)
        report = ConcurrentExecutor(task).run([depth - 1])
        reasons.append(report.stop_reason)
        return report.results[0].value

    return task


@undisturbed_as_a_whole
def test_a_run_within_a_run_within_a_run_is_cancelled_with_the_outermost() -> None:
    reasons: list[Any] = []
    token = CancellationToken(timeout=0.1)
    report = ConcurrentExecutor(nested_three_deep(reasons)).run([2], token)
    assert report.results[0].value == "deadline" and reasons == ["deadline", "deadline"]


@undisturbed_as_a_whole
def test_what_is_nested_in_an_attempt_that_is_given_up_ends_with_its_reason() -> None:
    """Also in a thread that was left behind."""
    done, reports = threading.Event(), list[Any]()

    def outer(payload: int) -> None:
        inner: Any = ConcurrentExecutor(lambda n: (current_attempt().remaining(), wait_for_cancel(n)))
        reports.append(inner.run([0]))
        done.set()

    report = ConcurrentExecutor(outer, ExecutionPolicy(timeout=0.1)).run([0])
    assert report.results[0].status.value == "timeout"
    assert done.wait(PATIENCE) and reports[0].stop_reason == "timeout"
    (remaining, reason), = reports[0].values()
    assert 0 < remaining <= 0.1 and reason == "timeout"


@undisturbed_as_a_whole
def test_a_call_within_an_attempt_is_withdrawn_with_it() -> None:
    done, answered, errors = threading.Event(), threading.Event(), list[str]()
    seen: list[Any] = []

    def ask(payload: int) -> None:
        seen.append((current_attempt().remaining() <= 0.1, wait_for_cancel(payload)))
        answered.wait(PATIENCE)  # an answer in the instant of the deadline would be in time

    inner: Any = TaskScheduler(ask, ExecutionPolicy())

    def outer(payload: int) -> None:
        try:
            inner.call(payload)
        except QEngineError as error:
            errors.append(str(error))
        done.set()

    ConcurrentExecutor(outer, ExecutionPolicy(timeout=0.1)).run([0])
    assert done.wait(PATIENCE) and errors == ["the task was cancelled: timeout (default)"]
    answered.set()
    until(lambda: seen)
    assert seen == [(True, "timeout")]


def test_a_stream_that_is_left_to_others_outlives_the_attempt_that_began_it() -> None:
    executor: Any = ConcurrentExecutor(abs, ExecutionPolicy(lookahead=1, concurrency=1))
    outer: Any = ConcurrentExecutor(lambda n: executor.stream(range(n)), ExecutionPolicy(timeout=PATIENCE))
    with outer.run([50]).values()[0] as stream:
        assert [result.value for result in stream] == list(range(50))


def test_a_nested_run_leaves_no_link_behind() -> None:
    links: list[int] = []

    def outer(payload: int) -> None:
        for _ in range(5):
            ConcurrentExecutor(absolute).run([1])
        links.append(len(current_attempt().cancel._children))

    ConcurrentExecutor(outer).run([0])
    assert links == [0]


def test_a_thread_of_the_users_own_is_linked_to_nothing() -> None:
    reports: list[Any] = []

    token = CancellationToken()

    def outer(payload: int) -> None:
        token.cancel("beforehand")
        thread = threading.Thread(target=lambda: reports.append(ConcurrentExecutor(absolute).run([1])))
        current_attempt().cancel.wait(PATIENCE)
        thread.start()
        thread.join()

    ConcurrentExecutor(outer).run([0], token)
    assert reports[0].all_succeeded


@pytest.mark.parametrize("inner", ["asyncio", "in thread"])
@undisturbed_as_a_whole
def test_nested_under_asyncio(quietly: Any, inner: str) -> None:
    reports: list[Any] = []

    async def wait(payload: int) -> Any:
        remaining = current_attempt().remaining()
        await asyncio.sleep(PATIENCE)
        return remaining

    async def outer(payload: int) -> None:
        try:
            await AsyncConcurrentExecutor(wait).run([0])
        except asyncio.CancelledError as error:
            reports.append(error.report)        # type: ignore[attr-defined]
            raise

    done = threading.Event()

    def outer_in_thread(payload: int) -> None:
        reports.append(ConcurrentExecutor(wait_for_cancel).run([0]))
        done.set()

    fn = outer if inner == "asyncio" else in_thread(outer_in_thread)
    report = quietly(AsyncConcurrentExecutor(fn, ExecutionPolicy(timeout=0.1)).run([0]))
    assert report.results[0].status.value == "timeout"
    assert inner == "asyncio" or done.wait(PATIENCE)
    assert reports[0].stop_reason == "timeout"


@undisturbed_as_a_whole
def test_a_call_nested_under_asyncio_is_withdrawn_with_the_reason(quietly: Any) -> None:
    reasons: list[Any] = []

    async def wait(payload: int) -> None:
        cancel = current_attempt().cancel
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            reasons.append(cancel.reason)

    calls = AsyncConcurrentExecutor(wait)

    async def outer(payload: int) -> None:
        await calls.call(payload)

    quietly(AsyncConcurrentExecutor(outer, ExecutionPolicy(timeout=0.05)).run([0]))
    assert reasons == ["timeout"]


def test_a_run_begun_by_the_inputs_ends_with_the_run_that_takes_them() -> None:
    token, inner = CancellationToken(), list[Any]()

    def inputs() -> Iterator[int]:
        yield 1
        inner.append(ConcurrentExecutor(wait_for_cancel).run([0]))

    def task(payload: int) -> None:
        token.cancel("both")

    report = ConcurrentExecutor(task).run(inputs(), token)
    assert report.stop_reason == "both"
    gc.collect()
    assert not inner or inner[0].stop_reason == "both"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_is_no_copy_of_a_token(again: Any) -> None:
    with pytest.raises(TypeError, match="CancellationToken cannot be copied or pickled"):
        again(CancellationToken())


@pytest.mark.parametrize("register", ["subscribe", "watch"])
def test_only_what_can_be_called_is_told(register: str) -> None:
    with pytest.raises(TypeError, match="callback is 5"):
        getattr(CancellationToken(), register)(5)
