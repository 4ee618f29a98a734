"""Every way to stop a run, times every bound on a call, times whatever its calls do meanwhile.

A `Case` is a value made from a seed.  `judge` sees the case, the event log and the report, nothing of the engine, and
decides by promises 1, 7, 8 and 9 alone; in virtual time, so each instant is either right or wrong.

In full: QENGINE_STRESS=3000.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from contract_support import IN_VIRTUAL_TIME, WORLDS, Deaf, Pause, Ran, World
from shared import live_stop

from qengine import (
    BreakerPolicy,
    CancellationToken,
    Event,
    ExecutionPolicy,
    Query,
    RateLimit,
    RetryPolicy,
    RunReport,
    StopConditions,
    Task,
    TaskError,
    TaskResult,
    TaskTimeoutError,
    TransientError,
    current_attempt,
)

EPS = 1e-9
PULL = 0.050        # seconds after a stop for which a pull that is under way is waited for
SETTLING = 0.100    # seconds in which a call that was given up may still end before it counts as one that hangs
ENOUGH = "that is enough"

BOUNDS = ("none", "attempt", "task", "own", "attempt and task")
TRIGGERS = ("max_failures", "failure_rate", "timeout", "max_results", "cancel", "exit", "input_error", "close")
IN_FLIGHT = ("drain", "abandon")
DRAINS = (0.0, 0.3, 30.0)
FACES = ("run", "stream", "ordered", "tree", "tree stream")
PRODUCT = tuple(itertools.product(TRIGGERS, BOUNDS, IN_FLIGHT, DRAINS, FACES))
RAISES: dict[str, Callable[[], BaseException]] = {
    "failed": lambda: TaskError("no"),
    "bug": lambda: ValueError("no"),
    "transient": lambda: TransientError("not now"),
    "exit": lambda: SystemExit(3),
}
WORDS = {"failed": "TaskError", "bug": "ValueError", "transient": "TransientError", "exit": "SystemExit"}
STATUS = {"ok": "succeeded", "failed": "failed", "transient": "failed", "bug": "error", "exit": "error"}


@dataclass(frozen=True)
class Call:
    """What a call does: it takes so long, deaf to whoever gives it up, and comes to that."""

    seconds: float
    how: str
    deaf: bool = False


@dataclass(frozen=True)
class Case:
    """One run and what may stop it."""

    seed: int
    triggers: tuple[str, ...]
    face: str
    policy: ExecutionPolicy
    own: float | None           # each task's own timeout
    size: int
    hangs: bool
    deaf: bool
    health: tuple[int, ...]
    special: int                # the task that cancels, or exits; or so many inputs, or results
    pauses: bool                # inputs take time
    slow: float                 # seconds that the consumer takes for a result
    lanes: int                  # or sources

    @property
    def is_tree(self) -> bool:
        return self.face.startswith("tree")

    @property
    def stop(self) -> StopConditions:
        return self.policy.stop

    def calls(self, name: Any) -> list[Call]:
        """What the attempts of a task do, one after the other; the last goes for all after it."""
        rng = random.Random(f"{self.seed} {name}")
        calls = [self.call(rng) for _ in range(3)]
        first: Any = f"0/{self.special % 2} of 0" if self.is_tree else self.special % self.size
        for trigger in ("exit", "cancel"):
            if trigger in self.triggers and name == first:
                calls[rng.choice([0, 0, 1])] = Call(rng.uniform(0.1, 2.0), trigger, self.deaf and rng.random() < 0.3)
                first = None
        return calls

    def call(self, rng: random.Random) -> Call:
        how = rng.choices(["ok", "failed", "bug", "transient"], self.health)[0]
        seconds = rng.choice([0.0, 0.5, rng.uniform(0.0, 1.0), rng.uniform(0.0, 1.0), rng.uniform(1.0, 3.0)])
        if self.hangs and rng.random() < 0.2:
            seconds = math.inf
        return Call(seconds, how, self.deaf and rng.random() < 0.5)

    def give_up_after(self) -> float:
        return min(self.policy.timeout or math.inf, self.own or math.inf)


def make_case(seed: int, trigger: str, bound: str, in_flight: Any, drain: float, face: str) -> Case:
    rng = random.Random(f"{seed} {trigger} {bound} {in_flight} {drain} {face}")
    if trigger == "close" and "stream" not in face and face != "ordered":
        face = "stream"
    triggers: tuple[str, ...] = (trigger,)
    if rng.random() < 0.5:
        others = [other for other in TRIGGERS if other not in (trigger, "close")]
        triggers = (trigger, rng.choice(others))
    if "close" not in triggers and face in ("stream", "ordered", "tree stream") and rng.random() < 0.15:
        triggers += ("close",)
    bounds = bound.split(" and ")
    stop = live_stop(
        max_failures=rng.choice([1, 2, 3, 5]) if "max_failures" in triggers else None,
        failure_rate=rng.choice([0.3, 0.5, 1.0]) if "failure_rate" in triggers else None,
        min_outcomes=rng.choice([1, 3, 5]),
        timeout=rng.choice([0.5, 1.0, rng.uniform(0.1, 4.0)]) if "timeout" in triggers else None,
        max_results=rng.choice([1, 2, 4]) if "max_results" in triggers else None,
        in_flight=in_flight,
        drain_seconds=drain,
    )
    is_tree = face.startswith("tree")
    batch = rng.choice([2, 3]) if not is_tree and rng.random() < 0.2 else None
    retry_on: Any = rng.choice([(TransientError,), (TransientError, TaskTimeoutError)])
    policy = ExecutionPolicy(
        concurrency=rng.choice([1, 2, 3, 4]),
        limits=[RateLimit(per_second=2, burst=2)] if rng.random() < 0.2 else [],
        batch_size=batch,
        batch_backoff=0.7 if batch else 0.0,
        retry=RetryPolicy(
            max_attempts=rng.choice([1, 2, 3]),
            backoff=rng.choice([0.2, 1.0]),
            jitter="none",
            timeout=1.6 if "task" in bounds else None,
            retry_on=retry_on,
        ),
        stop=stop,
        timeout=0.9 if "attempt" in bounds else None,
        breaker=BreakerPolicy(failures=2, reset_after=0.8, on_open=rng.choice(["wait", "skip"]))
        if rng.random() < 0.2 else None,
        lookahead=rng.choice([0, 1, 8]),
        max_abandoned=rng.choice([None, None, 1, 3]),
    )
    return Case(
        seed, triggers, face, policy, 0.7 if "own" in bounds else None,
        size=rng.randint(3, 12),
        hangs=bound != "none" and rng.random() < 0.5,
        deaf=rng.random() < 0.4,
        health=rng.choice([(8, 1, 1, 2), (2, 1, 1, 1), (1, 2, 1, 3)]),
        special=rng.randrange(12),
        pauses=not is_tree and rng.random() < 0.2,
        slow=0.4 if face not in ("run", "tree") and rng.random() < 0.2 else 0.0,
        lanes=rng.choice([1, 1, 1, 2]),
    )


# ---- running it ------------------------------------------------------------------------------------------------------


class InputsEnd(Exception):
    """What the inputs raise."""


class Plan:
    """Two queries about each root, and a child below what was found."""

    def __init__(self, case: Case) -> None:
        self._own = case.own

    def queries(self, node: str, source: Any) -> Iterable[Any]:
        count = 2 if "." not in node else 1
        return [Query(f"{node}/{number} of {source.name}", timeout=self._own) for number in range(count)]

    def children(self, node: str, result: Any) -> Iterable[str]:
        return [f"{node}.1"] if node.count(".") < 2 else []


class Show:
    """A case as it runs: what its calls, its inputs and its consumer saw."""

    def __init__(self, case: Case, world: World) -> None:
        self.case = case
        self.world = world
        self.is_simulated = not world.may_hang
        self.token = None if self.is_simulated else CancellationToken()
        self.begun: Counter[Any] = Counter()
        self.given = 0                              # inputs
        self.handed_out = 0
        self.left_at = math.inf                     # when the consumer left
        self.told: dict[tuple[Any, int], str | None] = {}       # what calls learnt from their tokens at their end

    def run(self) -> Ran:
        case = self.case
        options: dict[str, Any] = {}
        if case.is_tree:
            self.world = _AsTree(self.world, self.query_executor)
        elif case.lanes > 1:
            options["lane_by"] = lambda number: number % case.lanes
        inputs = self.world.inputs(self.inputs)
        if case.face in ("run", "tree") or self.is_simulated:
            return self.world.run(self.script, inputs, case.policy, self.token, **options)
        return self.world.stream(
            self.script, inputs, case.policy, self.token, ordered=case.face == "ordered", consume=self.consume,
            **options,
        )

    def query_executor(self, world: World, on_event: Callable[[Event], object]) -> Any:
        policy = self.case.policy
        fields = {
            "limits": policy.limits, "concurrency": policy.concurrency, "breaker": policy.breaker,
            "retry": policy.retry, "timeout": policy.timeout, "max_abandoned": policy.max_abandoned,
        }
        sources = [(self.script, {"name": str(number), **fields}) for number in range(self.case.lanes)]
        made = world.query_executor(sources, Plan(self.case), stop=policy.stop, on_event=on_event)
        made.in_order = lambda records: records     # as they were taken: so it is seen which event is of which query
        return made

    def inputs(self) -> Iterator[Any]:
        case = self.case
        for number in range(case.size):
            if case.pauses and not self.is_simulated and number % 3 == 2:
                yield Pause(0.03 if number % 2 else 0.6)
            if "input_error" in case.triggers and number == case.special:
                raise InputsEnd
            self.given += 1
            yield str(number) if case.is_tree else number if case.own is None else Task(number, timeout=case.own)

    def script(self, payload: Any) -> Iterator[float]:
        name = payload.payload if isinstance(payload, Query) else payload
        calls = self.case.calls(name)
        number = self.begun[name]
        self.begun[name] += 1
        call = calls[min(number, len(calls) - 1)]
        token = None if self.is_simulated else current_attempt().cancel
        kind = Deaf if call.deaf and not self.is_simulated else float
        if call.how == "cancel" and self.token is not None:
            yield kind(call.seconds / 2)
            self.token.cancel(ENOUGH)
            yield kind(call.seconds / 2)
        else:
            yield kind(call.seconds)
        if token is not None:
            self.told[name, number] = token.reason
        if call.how in RAISES:
            raise RAISES[call.how]()
        return [name]       # type: ignore[return-value]  # the value of a generator

    def consume(self, result: Any) -> Any:
        self.handed_out += 1
        if "close" in self.case.triggers and self.handed_out == 1 + self.case.special % 4:
            self.left_at = self.world.now()
            return False
        if self.case.slow:
            yield self.case.slow
        return True


class _AsTree(World):
    """A world whose schedulers ask a tree."""

    def __new__(cls, world: World, make: Callable[..., Any]) -> Any:
        def scheduler(script: Any, policy: Any, *, on_event: Callable[[Event], object]) -> Any:
            return make(world, on_event=on_event)

        vars(world)["scheduler"] = scheduler
        return world


# ---- the oracle ------------------------------------------------------------------------------------------------------


@dataclass
class Try:
    """One attempt, as the log shows it."""

    start: Event
    call: Call
    bound_at: float             # when it is to time out
    end: Event | None = None    # its answer, or that it timed out

    @property
    def answer_at(self) -> float:
        return self.start.at + self.call.seconds

    @property
    def failure(self) -> str | None:
        """The name of what it raised."""
        if self.end is None:
            return None
        return "TaskTimeoutError" if self.end.kind == "timeout" else WORDS.get(self.call.how)


@dataclass
class Story:
    """One task."""

    name: Any
    tries: list[Try] = field(default_factory=list)
    result: Event | None = None


class Judge:
    """Holds a run against the promises."""

    def __init__(self, show: Show, ran: Ran) -> None:
        self.show, self.case, self.ran = show, show.case, ran
        self.policy = show.case.policy
        self.faults: list[str] = []
        self.report: RunReport[Any, Any] = ran.report
        kinds = [(event.kind, event.detail == "input_error") for event in ran.events]
        self.stop_pos = kinds.index(("stop", False)) if ("stop", False) in kinds else len(kinds)
        self.stop = ran.events[self.stop_pos] if self.stop_pos < len(kinds) else None
        self.stories: dict[int, Story] = {}
        self.results: dict[int, TaskResult[Any, Any]] = {}
        self.deaf = not show.is_simulated

    def claim(self, holds: object, words: str) -> None:
        if not holds:
            self.faults.append(words)

    def judge(self) -> list[str]:
        self.match()
        if self.faults:
            return self.faults
        self.read()
        self.give_up_at = self.when_given_up()
        self.judge_stop()
        for index, story in self.stories.items():
            for one in story.tries:
                self.judge_try(story, one, self.results[index])
            self.judge_ending(story, self.results[index])
        self.judge_books()
        self.judge_late()
        self.judge_end()
        self.judge_idleness()
        return self.faults

    def match(self) -> None:
        """Each task that was taken has one result, told once, and which it is."""
        ran, ends = self.ran, [event for event in self.ran.events if event.kind == "result"]
        told = Counter(event.index for event in ends if event.index is not None)
        results = [*ran.handed_out, *ran.report.results]
        taken = len(results)
        self.claim(told == Counter(range(taken)), f"results of {sorted(told)}, told {max(told.values(), default=0)} x")
        if not self.case.is_tree:
            self.claim(taken == self.show.given or self._lost_a_pull(taken), f"{taken} of {self.show.given} taken")
            by_name = {result.task.payload: result for result in results}
            self.claim(sorted(by_name) == list(range(taken)), f"results of {sorted(by_name)}")
            self.results = by_name
            if not ran.handed_out:
                self.claim([result.task.payload for result in results] == list(range(taken)), "not in input order")
        elif not self.faults:
            names = [result.task.payload for result in results]
            self.claim(len(set(names)) == taken, f"twice: {names}")
            self.results = self._matched_tree(ends, results)

    def _lost_a_pull(self, taken: int) -> bool:
        """Say whether the one input more came when its pull had been given up."""
        return self.case.pauses and self.stop is not None and taken == self.show.given - 1

    def _matched_tree(
        self, ends: list[Event], results: list[TaskResult[Any, Any]]
    ) -> dict[int, TaskResult[Any, Any]]:
        """Which result is whose: those handed out come as they end, the others as they were taken."""
        count = len(self.ran.handed_out)
        told = [event.index for event in ends if event.index is not None]
        return dict(zip([*told[:count], *sorted(told[count:])], results, strict=True))

    def read(self) -> None:
        for index, result in sorted(self.results.items()):
            self.stories[index] = Story(result.task.payload)
        for pos, event in enumerate(self.ran.events):
            story = self.stories.get(-1 if event.index is None else event.index)
            if story is None:
                continue
            if event.kind == "start":
                self.claim(pos < self.stop_pos, f"{event} after the stop")
                calls = self.case.calls(story.name)
                call = calls[min(len(story.tries), len(calls) - 1)]
                bound_at = event.at + self.case.give_up_after()
                if self.policy.retry.timeout is not None:
                    first = story.tries[0].start.at if story.tries else event.at
                    bound_at = min(bound_at, first + self.policy.retry.timeout)
                story.tries.append(Try(event, call, bound_at))
            elif event.kind in ("answer", "timeout"):
                self.claim(story.tries and story.tries[-1].end is None, f"{event} of nothing that runs")
                story.tries[-1].end = event
            elif event.kind == "result":
                story.result = event

    def when_given_up(self) -> float:
        """The instant at which what still runs is given up."""
        if self.stop is None:
            return self.show.left_at
        drain = 0.0 if self.case.stop.in_flight == "abandon" else self.case.stop.drain_seconds
        exits = [
            one.end.at for story in self.stories.values() for one in story.tries
            if one.call.how == "exit" and one.end is not None and one.end.kind == "answer"
        ]
        return min([self.stop.at + drain, self.show.left_at, *exits])

    def judge_stop(self) -> None:
        """It stops at the very outcome, or instant, that decides it; its reason is recorded."""
        stop, conditions = self.stop, self.case.stop
        successes = failures = 0
        for pos, event in enumerate(self.ran.events[: self.stop_pos]):
            if event.kind != "result":
                continue
            successes += event.detail == "succeeded"
            failures += event.detail in ("failed", "error", "timeout")
            outcomes = successes + failures
            decided = []
            if event.detail not in ("skipped", "cancelled"):
                if conditions.max_failures is not None and failures >= conditions.max_failures:
                    decided.append("max_failures")
                if conditions.max_results is not None and successes >= conditions.max_results:
                    decided.append("max_results")
                if conditions.failure_rate is not None and outcomes >= conditions.min_outcomes:
                    if failures / outcomes >= conditions.failure_rate:
                        decided.append("failure_rate")
            last = pos + 1 == self.stop_pos
            if decided:
                fits = last and stop is not None and stop.detail in decided and stop.at == event.at
                self.claim(fits, f"{decided} at {event}, and it did not stop there")
            elif last and stop is not None:
                counted = ("max_failures", "max_results", "failure_rate")
                self.claim(stop.detail not in counted, f"{stop.detail} after {successes}, {failures}")
        for at, why in self._instants():
            if stop is None:
                end = max((event.at for event in self.ran.events if event.kind == "result"), default=0.0)
                self.claim(at >= end - EPS, f"{why} at {at}, and it did not stop")
            else:
                self.claim(stop.at <= at + EPS, f"{why} at {at}, stopped at {stop.at}")
                if stop.detail == why:
                    self.claim(stop.at >= at - EPS, f"{why} at {at}, stopped at {stop.at}")
        if stop is not None:
            known = {"timeout", "SystemExit", ENOUGH, "max_failures", "max_results", "failure_rate", "closed"}
            self.claim(stop.detail in known and stop.detail != "input_error", f"stopped by {stop.detail}")
            self.claim(stop.detail in [why for _, why in self._instants()] or stop.detail in known - {
                "timeout", "SystemExit", ENOUGH, "closed"}, f"stopped by {stop.detail}, which nobody asked for")
        failed = any(event.detail == "input_error" for event in self.ran.events if event.kind == "stop")
        expected = stop.detail if stop is not None else "input_error" if failed else None
        self.claim(self.report.stop_reason == expected, f"stop_reason {self.report.stop_reason}, not {expected}")
        exits = any(why == "SystemExit" for _, why in self._instants())
        raised = "SystemExit" if exits else "InputsEnd" if failed else None
        if self.show.left_at == math.inf:
            told = None if self.ran.error is None else type(self.ran.error).__name__
            self.claim(told == raised, f"it raised {told}, not {raised}")
            self.claim(self.ran.error is None or vars(self.ran.error).get("report") is self.report, "no report on it")
        if not self.case.is_tree:
            cut = self.show.given < self.case.size or len(self.results) < self.show.given
            self.claim(self.report.intake_cut >= cut, f"intake_cut {self.report.intake_cut}, {self.show.given} given")
            self.claim(not self.report.intake_cut or expected is not None, "intake was cut, and nothing stopped")

    def _instants(self) -> list[tuple[float, str]]:
        """When something else than the count of outcomes asks for a stop, and what."""
        found = [] if self.case.stop.timeout is None else [(self.case.stop.timeout, "timeout")]
        if self.show.left_at < math.inf:
            found.append((self.show.left_at, "closed"))
        for story in self.stories.values():
            for one in story.tries:
                if one.call.how == "exit" and one.end is not None and one.end.kind == "answer":
                    found.append((one.end.at, "SystemExit"))
                at = one.start.at + one.call.seconds / 2
                if one.call.how == "cancel" and not self.show.is_simulated:
                    gone = min(one.bound_at, self.give_up_at) if not one.call.deaf else math.inf
                    if at <= gone + EPS:
                        found.append((at, ENOUGH))
        return found

    def judge_try(self, story: Story, one: Try, result: TaskResult[Any, Any]) -> None:
        """A call ends by itself, at its bound, or when what still runs is given up; whatever comes first."""
        name, ends_at = f"{story.name} {one.start}", min(one.answer_at, one.bound_at, self.give_up_at)
        self.claim(one.start.at <= self.give_up_at + EPS, f"{name} begins after all was given up")
        if one.end is None:
            assert story.result is not None
            self.claim(one is story.tries[-1], f"{name} came to nothing, and was made again")
            self.claim(abs(self.give_up_at - ends_at) < EPS, f"{name} was given up, it ends at {ends_at}")
            self.claim(abs(story.result.at - ends_at) < EPS, f"{name} was given up at {story.result.at}")
            return
        self.claim(abs(one.end.at - ends_at) < EPS, f"{name} ends at {one.end.at}, not {ends_at}")
        if one.end.kind == "timeout":
            self.claim(one.bound_at <= one.answer_at + EPS, f"{name} would have answered at {one.answer_at}")
        else:
            self.claim(one.answer_at <= one.bound_at + EPS, f"{name} should time out at {one.bound_at}")
            self.claim(one.end.detail == WORDS.get(one.call.how, "ok"), f"{name} answers {one.end.detail}")

    def judge_ending(self, story: Story, result: TaskResult[Any, Any]) -> None:
        """The status follows from the last call, the reason from the stop; the last error is kept."""
        assert story.result is not None
        name, status, at = f"{story.name} {result.status.value}", result.status.value, story.result.at
        self.claim(status == story.result.detail, f"{name}, told as {story.result.detail}")
        last = story.tries[-1] if story.tries else None
        failures = [one.failure for one in story.tries if one.failure is not None]
        told = None if result.error is None else type(result.error).__name__
        kept = failures[-1] if failures and status != "succeeded" else None
        self.claim(told == kept, f"{name} with {told} after {failures}")
        count = len(story.tries)
        revoked = last is not None and last.end is None and abs(last.start.at - at) < EPS
        self.claim(count - revoked <= result.attempts <= count, f"{name} after {result.attempts} of {count} calls")
        ran_on = last is not None and last.end is None
        waited = last is None or last.failure is not None
        if status == "cancelled":
            reason = self.stop.detail if self.stop is not None else "closed"
            self.claim(result.reason == reason, f"{name} for {result.reason}, not {reason}")
            self.claim(ran_on or waited, f"{name} after a success")
            if waited and self.stop is not None:
                since = self.stop.at if last is None or last.end is None else max(self.stop.at, last.end.at)
                late = PULL if last is None and self.case.pauses else 0.0
                self.claim(since - EPS <= at <= since + late + EPS, f"{name} at {at}, the stop was at {since}")
            if last is not None and last.failure is not None:
                self.claim(self._is_retried(story), f"{name}, but nothing more was to be tried")
            return
        if status == "skipped":
            self.claim(last is None and result.reason == "breaker_open", f"{name} for {result.reason}")
            hangs = self._hanging(result.source, at) >= self._max_abandoned()
            self.claim(self.policy.breaker is not None or hangs, f"{name}, and nothing hangs or is open")
            return
        assert last is not None, f"{name} without a call"
        self.claim(not ran_on, f"{name} without an answer")
        expected = "timeout" if last.failure == "TaskTimeoutError" else STATUS.get(last.call.how, "succeeded")
        self.claim(status == expected, f"{name}, not {expected}")
        if status != "succeeded" and self._is_retried(story):
            at_end = last.end is not None and at > last.end.at + EPS
            whole = self.policy.retry.timeout
            given_up = whole is not None and abs(at - story.tries[0].start.at - whole) < EPS
            opened = self.policy.breaker is not None or self._hanging(result.source, at) >= self._max_abandoned()
            self.claim((at_end and given_up) or opened, f"{name} at {at}, and it was to be tried again")
        elif last.end is not None:
            self.claim(abs(at - last.end.at) < EPS, f"{name} at {at}, its last call ended at {last.end.at}")

    def _is_retried(self, story: Story) -> bool:
        """Whether what the last call came to is worth another."""
        last, retry = story.tries[-1], self.policy.retry
        kinds = [kind.__name__ for kind in retry.retry_on] if isinstance(retry.retry_on, tuple) else []
        if last.end is None or last.failure not in kinds or len(story.tries) >= retry.max_attempts:
            return False
        delay = retry.backoff * retry.multiplier ** (len(story.tries) - 1)
        whole = math.inf if retry.timeout is None else story.tries[0].start.at + retry.timeout
        return last.end.at + delay < whole

    def _max_abandoned(self) -> int:
        return self.policy.max_abandoned or max(2, self.policy.concurrency)

    def _given_up(self, one: Try) -> float:
        """When a call was given up; infinity if it was not."""
        if one.end is not None:
            return one.end.at if one.end.kind == "timeout" else math.inf
        return self.give_up_at

    def _hanging(self, lane: str, at: float, settled: float = 0.0) -> int:
        """How many calls of a lane hang, some time after they were given up."""
        return sum(
            self._given_up(one) <= at - settled + EPS and one.answer_at > at + EPS
            for story in self.stories.values() for one in story.tries
            if self.deaf and one.call.deaf and one.start.source == lane
        )

    def judge_books(self) -> None:
        statuses = Counter(result.status.value for result in self.results.values())
        report, failed = self.report, ("failed", "error", "timeout")
        counts = report.success_count, report.failure_count, report.cancelled_count, report.skipped_count
        expected = (
            statuses["succeeded"], sum(map(statuses.__getitem__, failed)), statuses["cancelled"], statuses["skipped"],
        )
        self.claim(counts == expected, f"the report counts {counts}, not {expected}")
        starts = sum(event.kind == "start" for event in self.ran.events)
        calls = sum(source.calls for source in report.by_source.values())
        revocable = sum(
            one.end is None and abs(one.start.at - self.give_up_at) < EPS
            for story in self.stories.values() for one in story.tries
        )
        self.claim(starts - revocable <= calls <= starts, f"{calls} calls, {starts} starts")
        made = sum(self.show.begun.values())
        self.claim(self.show.is_simulated or made == calls, f"{calls} calls told, {made} were made")

    def judge_late(self) -> None:
        """What was given up and goes on is counted, until its late answer is dropped."""
        late = {(event.index, event.number): event.at for event in self.ran.events if event.kind == "late"}
        end = max((event.at for event in self.ran.events if event.kind == "result"), default=0.0)
        most = least = 0
        for index, story in self.stories.items():
            for one in story.tries:
                given_up = self._given_up(one)
                is_late = self.deaf and one.call.deaf and given_up < math.inf and given_up < one.answer_at - EPS
                unsure = one.end is None and abs(one.start.at - self.give_up_at) < EPS      # may have been revoked
                came = late.pop((index, one.start.number), None)
                if came is not None:
                    fits = is_late or abs(given_up - one.answer_at) < EPS
                    self.claim(fits, f"{story.name}: a late answer of a call that was not given up")
                    self.claim(abs(came - one.answer_at) < EPS, f"{story.name}: late at {came}, not {one.answer_at}")
                elif is_late:
                    self.claim(unsure or one.answer_at >= end - EPS, f"{story.name}: no late answer at {one.answer_at}")
                    most += 1
                    least += not unsure and one.answer_at > end + PULL + EPS
        self.claim(not late, f"late answers of nothing: {late}")
        for (name, number), reason in self.show.told.items():
            self.judge_token(name, number, reason)
        if self.case.slow == 0:
            self.claim(least <= self.report.abandoned <= most, f"{self.report.abandoned} abandoned, {least} to {most}")

    def judge_token(self, name: Any, number: int, reason: str | None) -> None:
        """A call learns by its token that it was given up, or that the caller cancelled the run; what came first."""
        one = next(story for story in self.stories.values() if story.name == name).tries[number]
        stopped = "closed" if self.stop is None else self.stop.detail
        word = "timeout" if one.end is not None and one.end.kind == "timeout" else stopped
        cancelled = [at for at, why in self._instants() if why == ENOUGH and at <= self._ends_at() + EPS]
        told = [(self._given_up(one), word), *((at, ENOUGH) for at in cancelled), (one.answer_at, None)]
        first = min(at for at, _ in told)
        fitting = [why for at, why in told if at <= first + EPS]        # in one instant any may come first
        if self.stop is not None and abs(self.stop.at - first) < EPS:
            fitting.append(stopped)
        self.claim(reason in fitting, f"{name} call {number} was told {reason}, not {fitting}")

    def _ends_at(self) -> float:
        return max((event.at for event in self.ran.events if event.kind == "result"), default=0.0)

    def judge_end(self) -> None:
        """The run ends with its last result; only a pull that goes on is waited for a moment longer."""
        last = max((event.at for event in self.ran.events if event.kind in ("result", "stop")), default=0.0)
        if self.case.pauses:
            last = max(last, math.inf if self.stop is None else self.stop.at + PULL)
        end = self.report.finished_at
        self.claim(self.case.slow or end <= last + EPS, f"it ended at {end}, what it did at {last}")

    def judge_idleness(self) -> None:
        """A place that is free is taken at once; none is where too many calls hang."""
        case, policy = self.case, self.policy
        events = self.ran.events[: self.stop_pos]
        for event in events:
            if event.kind == "start":
                hanging = self._hanging(event.source, event.at, SETTLING)
                if policy.breaker is None:
                    self.claim(hanging < self._max_abandoned(), f"{event}, and {hanging} calls hang")
        gated = policy.limits or policy.batch_size or policy.breaker is not None or case.pauses or case.slow
        if case.is_tree or case.lanes > 1 or gated or case.deaf or any(event.kind == "stop" for event in events):
            return
        running, tried, waiting = 0, 0, case.size       # `tried` with what waits to be tried again: it counts as taken
        for event, after in itertools.pairwise(self.ran.events[: self.stop_pos + 1]):
            running += {"start": 1, "answer": -1, "timeout": -1}.get(event.kind, 0)
            tried += {"start": event.number == 1, "result": -1}.get(event.kind, 0)
            waiting -= event.kind == "start" and event.number == 1
            self.claim(running <= policy.concurrency, f"{running} at once at {event.at}")
            if after.at > event.at + EPS and waiting and case.face != "ordered":
                self.claim(tried >= policy.concurrency, f"only {running} run after {event}, {waiting} wait")


def judge(case: Case, world: World) -> list[tuple[Any, ...]]:
    """Run a case, hold it against the promises, and return its event log."""
    show = Show(case, world)
    try:
        ran = show.run()
        faults = Judge(show, ran).judge()
    except BaseException as error:
        error.add_note(repr(case))
        raise
    finally:
        world.close()
    log = [(round(event.at, 9), event.kind, event.index, event.number, event.detail) for event in ran.events]
    if faults:
        raise AssertionError("\n".join([*dict.fromkeys(faults), "", repr(case), repr(ran.report), *map(str, log)]))
    return log


def cases(count: int) -> Iterator[Case]:
    """So many, no combination twice before each has come once."""
    combinations = random.Random(1).sample(PRODUCT, len(PRODUCT))
    for number in range(count):
        yield make_case(number, *combinations[number % len(PRODUCT)])


@pytest.mark.stress
@pytest.mark.parametrize("name", IN_VIRTUAL_TIME)
def test_every_stop_is_exact_whatever_runs_meanwhile(name: str, stress_count: Callable[[int], int]) -> None:
    for case in cases(stress_count(25)):
        if name != "simulation" or not {"close", "cancel"} & {*case.triggers}:      # it has neither stream nor token
            judge(case, WORLDS[name]())


@pytest.mark.stress
def test_a_stop_is_the_same_in_every_world(stress_count: Callable[[int], int]) -> None:
    for case in cases(stress_count(25)):
        if case.face in ("run", "tree") and not (case.deaf or case.pauses or "cancel" in case.triggers):
            first, *others = (judge(case, WORLDS[name]()) for name in IN_VIRTUAL_TIME if name != "stepped in thread")
            assert all(other == first for other in others), case
