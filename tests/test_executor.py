"""The faces of one function: what they refuse, `call`, streams, events, reports."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from shared import PATIENCE, assert_refused_at_the_door, in_threads

from qengine import (
    BreakerOpenError,
    BreakerPolicy,
    BudgetExceededError,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QEngineError,
    RateLimit,
    RetryPolicy,
    RunManifest,
    RunReport,
    StopConditions,
    Stream,
    Task,
    TaskError,
    TaskScheduler,
    TaskStatus,
    TransientError,
    Window,
)


def fails_if_odd(payload: int) -> int:
    if payload % 2:
        raise TaskError(f"{payload} is odd")
    return payload


# ---- refused at the door ---------------------------------------------------------------------------------------------


async def coroutine(payload: int) -> None: ...


def used_up() -> Iterator[int]:
    inputs = (number for number in range(3))
    list(inputs)
    return inputs


LIMIT = RateLimit(per_second=1)
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ExecutionPolicy(concurrency=0), ValueError, "concurrency is 0"),
    (lambda: ExecutionPolicy(concurrency=2.0), TypeError, "concurrency is 2.0"),        # type: ignore[arg-type]
    (lambda: ExecutionPolicy(concurrency=True), TypeError, "concurrency is True"),
    (lambda: ExecutionPolicy(lookahead=-1), ValueError, "lookahead is -1"),
    (lambda: ExecutionPolicy(timeout=0), ValueError, "timeout is 0"),
    (lambda: ExecutionPolicy(timeout=float("inf")), ValueError, "timeout is inf"),
    (lambda: ExecutionPolicy(budget=-1), ValueError, "budget is -1"),
    (lambda: ExecutionPolicy(budget=1.5), TypeError, "budget is 1.5"),
    (lambda: ExecutionPolicy(batch_size=0), ValueError, "batch_size is 0"),
    (lambda: ExecutionPolicy(batch_backoff=float("nan")), ValueError, "batch_backoff is nan"),
    (lambda: ExecutionPolicy(limits=LIMIT), TypeError, "limits is RateLimit"),          # type: ignore[arg-type]
    (lambda: ExecutionPolicy(limits=[60]), TypeError, "limits is 60"),                  # type: ignore[list-item]
    (lambda: ExecutionPolicy(retry=3), TypeError, "retry is 3"),                        # type: ignore[arg-type]
    (lambda: ExecutionPolicy(max_abandoned=0), ValueError, "max_abandoned is 0"),
    (lambda: RateLimit(per_second=0), ValueError, "per_second is 0"),
    (lambda: RateLimit(per_second=float("nan")), ValueError, "per_second is nan"),
    (lambda: RateLimit(per_second=1, burst=0.5), ValueError, "burst is 0.5"),
    (lambda: RateLimit(per_second=1, per_minute=1), ValueError, "exactly one of per_second, per_minute"),
    (lambda: RateLimit(), ValueError, "exactly one of per_second, per_minute"),
    (lambda: Window(0, 1), ValueError, "limit is 0"),
    (lambda: Window(1, 0), ValueError, "seconds is 0"),
    (lambda: RetryPolicy(max_attempts=0), ValueError, "max_attempts is 0"),
    (lambda: RetryPolicy(jitter="some"), ValueError, "jitter is 'some'"),               # type: ignore[arg-type]
    (lambda: RetryPolicy(multiplier=0.5), ValueError, "multiplier is 0.5"),
    (lambda: RetryPolicy(retry_on=("OSError",)), TypeError, "retry_on is 'OSError'"),   # type: ignore[arg-type]
    (lambda: StopConditions(failure_rate=1.5), ValueError, "failure_rate is 1.5"),
    (lambda: StopConditions(in_flight="kill"), ValueError, "in_flight is 'kill'"),      # type: ignore[arg-type]
    (lambda: BreakerPolicy(failures=0), ValueError, "failures is 0"),
    (lambda: BreakerPolicy(reset_after=50.0, max_reset_after=5.0), ValueError, "max_reset_after is 5.0"),
    (lambda: Task(1, key=object()), TypeError, "key is <object"),
    (lambda: Task(1, amount=0), ValueError, "amount is 0"),
    (lambda: Task(1, priority=float("nan")), ValueError, "priority is nan"),            # type: ignore[arg-type]
    (lambda: Task(1, timeout=-1), ValueError, "timeout is -1"),
    (lambda: ConcurrentExecutor(5), TypeError, "fn is 5"),                              # type: ignore[arg-type]
    (lambda: ConcurrentExecutor(coroutine), TypeError, "fn is"),
    (lambda: ConcurrentExecutor(abs, key=coroutine), TypeError, "key is"),
    (lambda: ConcurrentExecutor(abs, on_event=coroutine), TypeError, "on_event is"),
    (lambda: ConcurrentExecutor(abs, 8), TypeError, "policy is 8"),                     # type: ignore[arg-type]
    (lambda: ConcurrentExecutor(abs, ExecutionPolicy(limits=[LIMIT])), ValueError, "use TaskScheduler"),
    (lambda: ConcurrentExecutor(abs, ExecutionPolicy(batch_size=2)), ValueError, "use TaskScheduler"),
    (lambda: TaskScheduler(abs, ExecutionPolicy(), lane_by=5), TypeError, "lane_by is 5"),  # type: ignore[arg-type]
    (lambda: ConcurrentExecutor(abs).run(5), TypeError, "inputs is 5"),                 # type: ignore[arg-type]
    (lambda: ConcurrentExecutor(abs).run(used_up()), ValueError, "only once"),
    (lambda: ConcurrentExecutor(abs).stream(used_up()), ValueError, "only once"),
    (lambda: ConcurrentExecutor(abs).run([1], "stop"), TypeError, "cancel is 'stop'"),  # type: ignore[arg-type]
    (lambda: TaskScheduler.from_manifest(abs, 5), TypeError, "manifest is 5"),          # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "kind", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_a_bad_argument_is_refused_by_name_before_anything_starts(
    make: Callable[[], object], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(make, kind, words, monkeypatch)


def test_a_predicate_is_not_asked_about_a_timeout_it_cannot_know_before_one_happens() -> None:
    retry = RetryPolicy(max_attempts=2, retry_on=lambda error: error.code == 503)       # type: ignore[attr-defined]
    assert ConcurrentExecutor(abs, ExecutionPolicy(retry=retry)).run([-1]).values() == [1]


# ---- call ------------------------------------------------------------------------------------------------------------


def test_a_call_returns_the_value_or_raises_the_error() -> None:
    executor = ConcurrentExecutor(fails_if_odd)
    assert executor.call(2) == 2
    assert executor.call(Task(4)) == 4
    with pytest.raises(TaskError, match="3 is odd"):
        executor.call(3)


def test_a_call_is_tried_again_like_any_task() -> None:
    tries: list[int] = []

    def flaky(payload: int) -> int:
        tries.append(payload)
        if len(tries) < 3:
            raise TransientError("not yet")
        return payload

    policy = ExecutionPolicy(retry=RetryPolicy(max_attempts=3, backoff=0.001))
    assert ConcurrentExecutor(flaky, policy).call(7) == 7
    assert tries == [7, 7, 7]


def test_a_call_that_was_not_tried_says_why() -> None:
    with pytest.raises(BudgetExceededError):
        ConcurrentExecutor(abs, ExecutionPolicy(budget=0)).call(1)
    breaker = BreakerPolicy(failures=1, on_open="skip")
    executor = ConcurrentExecutor(fails_if_odd, ExecutionPolicy(breaker=breaker))
    with pytest.raises(TaskError):
        executor.call(1)
    with pytest.raises(BreakerOpenError):
        executor.call(2)


def test_calls_from_many_threads_each_get_their_own_answer_within_the_concurrency() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def task(payload: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= 1
        return payload * 10

    executor = ConcurrentExecutor(task, ExecutionPolicy(concurrency=3))
    answers: dict[int, list[int]] = {}
    in_threads(12, lambda n: answers.update({n: [executor.call(n * 100 + k) for k in range(8)]}))
    assert answers == {n: [(n * 100 + k) * 10 for k in range(8)] for n in range(12)}
    assert most == [3]


@pytest.mark.stress
def test_calls_share_one_budget_exactly(stress_count: Callable[[int], int]) -> None:
    for _ in range(stress_count(40)):
        calls: list[int] = []
        executor = ConcurrentExecutor(calls.append, ExecutionPolicy(budget=10))
        refused: list[int] = []

        def use(number: int, executor: Any = executor, refused: list[int] = refused) -> None:
            for _ in range(5):
                try:
                    executor.call(number)
                except BudgetExceededError:
                    refused.append(number)

        in_threads(6, use)
        assert (len(calls), len(refused)) == (10, 20)


def test_calls_and_runs_share_the_limits() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(limits=[RateLimit(per_second=50, burst=1)]))
    begin = time.monotonic()
    in_threads(4, lambda n: scheduler.call(n) if n else scheduler.run([1, 2]))
    assert time.monotonic() - begin >= 4 / 50 - 0.021


def test_a_call_sees_the_context_of_its_own_caller() -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    both = threading.Barrier(2)

    def task(payload: str) -> str:
        both.wait(PATIENCE)
        return name.get()

    executor = ConcurrentExecutor(task)
    answers: dict[str, str] = {}

    def use(number: int) -> None:
        caller = "ab"[number]
        name.set(caller)
        answers[caller] = executor.call(caller)

    in_threads(2, use)
    assert answers == {"a": "a", "b": "b"}


def test_a_call_from_within_a_task_is_answered() -> None:
    inner = ConcurrentExecutor(abs)
    assert ConcurrentExecutor(inner.call).run([-1, -2]).values() == [1, 2]


def test_a_call_that_exits_raises_that_and_the_next_one_works() -> None:
    def task(payload: int) -> int:
        if payload == 0:
            raise SystemExit(3)
        return payload

    executor = ConcurrentExecutor(task)
    with pytest.raises(SystemExit):
        executor.call(0)
    assert executor.call(1) == 1


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_ends_once_and_keeps_its_report() -> None:
    stream = ConcurrentExecutor(abs).stream([-1, -2])
    assert stream.report is None
    assert sorted(result.value for result in stream) == [1, 2]
    assert list(stream) == []
    assert stream.report is not None and stream.report.success_count == 2
    assert list(stream.report.results) == []       # they were handed out


def leave_by_break(stream: Stream[int, int]) -> None:
    for _ in stream:
        break


def leave_by_close(stream: Stream[int, int]) -> None:
    next(stream)
    stream.close()
    stream.close()


def leave_by_exception(stream: Stream[int, int]) -> None:
    for _ in stream:
        raise LookupError("of the consumer's")


@pytest.mark.abandons("close gives up what runs")
@pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_by_exception])
def test_leaving_a_stream_early_stops_the_run(leave: Callable[[Stream[int, int]], None]) -> None:
    free = threading.Event()
    executor = ConcurrentExecutor(lambda payload: free.wait() if payload > 2 else payload)
    stream = executor.stream(range(1000))
    with contextlib.suppress(LookupError), stream:
        leave(stream)
    free.set()
    report = stream.report
    assert report is not None and report is executor.last_report
    assert report.stop_reason == "closed"
    assert {result.status.value for result in report.results} <= {"succeeded", "cancelled"}
    assert report.cancelled_count > 0 and report.intake_cut
    assert next(stream, None) is None


def test_a_stream_that_nobody_holds_ends_its_run() -> None:
    taken = [0]

    def inputs() -> Iterator[int]:
        while True:
            taken[0] += 1
            yield taken[0]

    stream = ConcurrentExecutor(abs).stream(inputs())
    next(stream)
    del stream
    gc.collect()        # its threads must end: the fixture of all tests looks


def test_a_stream_that_is_cancelled_still_hands_out_what_was_taken() -> None:
    executor = ConcurrentExecutor(abs, ExecutionPolicy(concurrency=1))
    stream = executor.stream(iter(range(10**9)))
    first = next(stream)
    stream.cancel("enough")
    rest = list(stream)
    assert first.ok
    assert stream.report is not None and stream.report.stop_reason == "enough"
    assert {result.reason for result in rest if not result.ok} <= {"enough"}
    assert len({result.task.payload for result in [first, *rest]}) == len(rest) + 1


# ---- events ----------------------------------------------------------------------------------------------------------


def test_events_tell_what_happened_in_order() -> None:
    events: list[Event] = []
    tries: Counter[str] = Counter()

    def task(payload: str) -> str:
        tries[payload] += 1
        if payload == "again" and tries[payload] == 1:
            raise TransientError("once")
        return payload

    policy = ExecutionPolicy(concurrency=1, retry=RetryPolicy(max_attempts=2, backoff=0.0))
    TaskScheduler(task, policy, on_event=events.append).run(["fine", "again"])
    assert [(event.kind, event.index, event.number) for event in events] == [
        ("start", 0, 1), ("answer", 0, 1), ("result", 0, 1),
        ("start", 1, 1), ("answer", 1, 1), ("retry", 1, 1),
        ("start", 1, 2), ("answer", 1, 2), ("result", 1, 2),
    ]
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert {event.source for event in events} == {"default"}


def test_a_listener_is_called_by_one_thread_at_a_time() -> None:
    inside, overlaps = [0], [0]

    def listener(event: Event) -> None:
        inside[0] += 1
        overlaps[0] += inside[0] > 1
        time.sleep(0)
        inside[0] -= 1

    ConcurrentExecutor(abs, on_event=listener).run(range(300))
    assert overlaps == [0]


def test_a_listener_may_stop_the_run() -> None:
    token = CancellationToken()
    executor = ConcurrentExecutor(
        abs, ExecutionPolicy(concurrency=1), on_event=lambda event: token.cancel("seen") if event.index == 5 else None
    )
    assert executor.run(iter(range(10**6)), token).stop_reason == "seen"


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_lower_priority_number_goes_first_among_those_taken() -> None:
    order: list[str] = []
    tasks = [Task("c", priority=5), Task("b"), Task("a", priority=-1), Task("b2")]
    ConcurrentExecutor(order.append, ExecutionPolicy(concurrency=1)).run(tasks)
    assert order == ["a", "b", "b2", "c"]


def test_a_tasks_own_timeout_comes_before_the_policys() -> None:
    free = threading.Event()
    report = ConcurrentExecutor(
        lambda payload: free.wait(payload), ExecutionPolicy(timeout=PATIENCE)
    ).run([Task(PATIENCE, timeout=0.05), Task(0.0)])
    free.set()
    assert [result.status for result in report.results] == [TaskStatus.TIMEOUT, TaskStatus.SUCCEEDED]


def test_a_manifest_makes_a_scheduler() -> None:
    manifest = RunManifest.from_mapping({"concurrency": 2, "budget": 2, "inputs": [1, 2, 3]})
    report = TaskScheduler.from_manifest(abs, manifest).run(manifest.inputs)
    assert (report.success_count, report.skipped_count) == (2, 1)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_has_all_its_sums() -> None:
    def task(payload: int) -> int:
        time.sleep(0.01)
        return fails_if_odd(payload)

    policy = ExecutionPolicy(
        concurrency=1, budget=3, limits=[RateLimit(per_second=1e6, burst=1e6, unit="tokens")]
    )
    before = time.time()
    report = TaskScheduler(task, policy).run([Task(n, amount={"tokens": 100}) for n in range(5)])
    assert (report.success_count, report.failure_count, report.skipped_count, report.cancelled_count) == (2, 1, 2, 0)
    assert report.success_rate == pytest.approx(2 / 3)
    assert not report.all_succeeded
    assert report.usage == {"calls": 3.0, "tokens": 300.0}
    assert report.total_tokens == 300.0
    assert report.total_cost == 0.0
    assert 0.03 <= report.busy_seconds <= report.makespan + 0.01
    assert report.retries == report.abandoned == 0
    assert report.stop_reason is None
    assert not report.intake_cut
    assert before - 0.01 <= report.started_at <= report.finished_at - report.makespan + 0.01
    assert report.values() == [0, 2]
    assert [str(error) for error in report.errors()] == ["1 is odd"]
    source = report.by_source["default"]
    assert (source.calls, source.remaining_budget, source.skipped) == (3, 0, {"budget_exhausted": 2})
    assert source.first_at is not None and source.last_at is not None and 0 < source.first_at < source.last_at
    assert "2 succeeded, 1 failed, 2 skipped" in repr(report)
    result = report.results[0]
    assert result.started_at is not None and result.started_at >= before - 0.01
    assert result.duration >= 0.01
    assert report.results[4].started_at is None and report.results[4].duration == 0.0


def test_an_empty_run_succeeded() -> None:
    report = ConcurrentExecutor(abs).run([])
    assert report.all_succeeded and report.success_rate == 1.0 and report.makespan == 0.0
    assert report.raise_for_failures() is report


def test_failures_are_raised_as_a_group_or_not_at_all() -> None:
    executor = ConcurrentExecutor(fails_if_odd)
    assert executor.run([0, 2]).raise_for_failures().values() == [0, 2]
    with pytest.raises(ExceptionGroup, match="2 of 4 tasks failed") as caught:
        executor.run(range(4)).raise_for_failures()
    assert [str(error) for error in caught.value.exceptions] == ["1 is odd", "3 is odd"]


def test_a_result_of_a_task_that_was_not_finished_says_so_when_unwrapped() -> None:
    policy = ExecutionPolicy(concurrency=1, stop=StopConditions(max_results=1))
    report: RunReport[int, int] = ConcurrentExecutor(abs, policy).run([1, 2])
    with pytest.raises(QEngineError, match="cancelled: max_results"):
        report.results[1].unwrap()


def test_one_token_stops_several_runs_and_keeps_none_of_them() -> None:
    token, executor = CancellationToken(), ConcurrentExecutor(abs)
    executor.run(range(10), token)
    list(executor.stream(range(10), cancel=token))
    assert not token._callbacks and not token._children       # a token that outlives many runs must not hold on to them
    token.cancel("late")
    assert executor.run(range(10), token).stop_reason == "late"


def test_what_a_task_used_of_each_unit_is_in_its_result() -> None:
    policy = ExecutionPolicy(limits=[RateLimit(per_second=1e6, burst=1e6, unit="tokens")])
    report = TaskScheduler(str, policy).run([Task(1, amount={"tokens": 100}), 2])
    assert [dict(result.usage) for result in report.results] == [{"calls": 1.0, "tokens": 100.0}, {"calls": 1.0}]
    assert report.usage == {"calls": 2.0, "tokens": 100.0}


def test_a_streams_report_does_not_hide_failures_that_were_handed_out() -> None:
    with ConcurrentExecutor(lambda payload: 1 / payload).stream([0, 1, 0]) as stream:
        assert sorted(result.ok for result in stream) == [False, False, True]
    assert stream.report is not None
    with pytest.raises(ExceptionGroup, match="2 of 3 tasks failed"):
        stream.report.raise_for_failures()


@pytest.mark.parametrize("inputs", ["http://a.example", b"payload"])
def test_a_string_is_not_taken_for_many_inputs(inputs: Any) -> None:
    with pytest.raises(TypeError, match="put a single one into a list"):
        ConcurrentExecutor(len).run(inputs)
