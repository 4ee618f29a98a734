"""The oracle: holds a run against the promises, from the workload, the event log and the report alone.

Rules: it sees nothing of the engine and decides nothing itself: where a promise leaves a choice, every choice passes.
In virtual time (`exact`) every instant is what it must be.  On a real clock nothing comes early and nothing more than
LATE seconds late; what is order or count is as strict.  What a call used is what the event of its end says, and that
must be what the workload has it use.

    promise                                  judged by
    1   one result for each input, order     read, keep_books, match_inputs, judge_endings, judge_order, judge_tree
    2   limits hold, and are used            Replay._start, Replay._look_for_idleness
    3   nothing that waits holds a worker    Replay._look_for_idleness
    4   no lane delays another               Replay._look_for_idleness
    5   all or nothing                       Replay: what a refused attempt took would be missed by the next
    6   budgets and quotas, by unit          Replay._start, Replay._is_spent, Replay.conclude, judge_usage
    7   stops are exact                      judge_stop, Replay._stop
    8   one failure ends nobody else         judge_endings, Replay._result
    9   a hung call cannot hang the run      judge_calls, judge_hanging, Replay._start
    10  inputs are lazy                      judge_intake, Replay._note_intake, Replay._stop
    11  whatever user code does              judge_endings (errors, cancellations, SystemExit, predicates that raise)
    12  one scenario, one event log          test_one_workload_has_one_event_log
    14  state has an owner                   replay: limits, breakers and quotas go on from run to run

3, 13, 15 and 16 are about threads, arguments, signals and secrets, of which a log says nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise, permutations
from typing import Any

from qengine import Event, ExecutionPolicy, RateLimit, RetryPolicy, TaskResult, TaskStatus

from .books import EPS
from .model import (
    BAD,
    BEFORE,
    CLOSED,
    DEADLINE,
    ENOUGH,
    HANG,
    Again,
    Call,
    Job,
    Workload,
    budgets_of,
    name_of,
    part_of,
    verdict_on,
)
from .replay import HELD_UP, LATE, replay
from .running import Seen
from .stories import Reader, Story, Try

PULLS_DROPPED = 0.050       # seconds in which an input that is being taken when the run stops may still arrive
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
NEAR = 0.01                 # the share of itself that a quantile may be off by
WALL_EPS = 2e-6             # what two sums of the same instants may differ by, where one went through the time of day


def check(workload: Workload, runs: Sequence[Seen], exact: bool) -> None:
    """Hold the runs of a workload against the promises.

    Raises:
        Broken: With the workload, what is wrong, and the log; TooLate if all that is wrong is that something came late.
    """
    faults = faults_of(workload, runs, exact)
    if faults:
        kind = TooLate if not exact and not faults_of(workload, runs, exact, HELD_UP) else Broken
        lines = [*faults, "", str(workload)]
        for ran in runs:
            first = ran.events[0].at if ran.events else 0.0
            lines += ["", repr(ran.report)]
            lines += [
                f"{event.at - first:10.6f} {event.kind:8} {event.source} {event.index} #{event.number} {event.detail}"
                f" {'' if event.usage is None else dict(event.usage)}"
                for event in ran.events
            ]
        raise kind("\n".join(lines), faults)


class Broken(AssertionError):
    """A promise that was not kept; `faults` say which."""

    def __init__(self, words: str, faults: Sequence[str]) -> None:
        super().__init__(words)
        self.faults = faults


class TooLate(Broken):
    """A real clock showed that something came late, and nothing else is wrong: the machine may have been held up."""


def faults_of(workload: Workload, runs: Sequence[Seen], exact: bool, late: float = LATE) -> list[str]:
    """Return every fault found, each once; on a real clock nothing is late that is so by no more than `late`."""
    oracles = [Oracle(workload, ran, exact, number, late) for number, ran in enumerate(runs)]
    legible = [oracle.judge() for oracle in oracles]
    if all(legible):
        replay(oracles)
    return list(dict.fromkeys(fault for oracle in oracles for fault in oracle.faults))


class Oracle(Reader):
    """Reads a log and a report, and says what is wrong with them."""

    def __init__(self, workload: Workload, ran: Seen, exact: bool, number: int = 0, late: float = LATE) -> None:
        super().__init__(workload, ran)
        self.number = number
        self.report = ran.report
        self.exact = exact
        self.late = EPS if exact else late
        left = list(ran.report.results)     # of a stream, what was not handed out
        self.results: list[TaskResult[Any, Any]] = left if workload.how == "run" else [*ran.handed_out, *left]
        self.job_of: dict[int, Job] = {}            # by index, where the log leaves no doubt
        self.result_of: dict[int, TaskResult[Any, Any]] = {}
        self.jobs = {job.name: job for job in workload.jobs}
        self.begun_at: float | None = None

    def judge(self) -> bool:
        """Look for faults; return whether the log can be read and played again."""
        self.read()
        known = self.jobs.keys() >= {name_of(result.task) for result in self.results}
        if self.faults or not self.claim(known, "results of tasks that nobody gave"):
            return False
        self.keep_books()
        (self.match_queries if self.workload.is_tree else self.match_inputs)()
        self.judge_usage()
        self.judge_hanging()
        self.judge_endings()
        self.judge_calls()
        self.judge_stop()
        self.judge_intake()
        self.judge_order()
        if self.workload.is_tree:
            self.judge_tree()
        return True

    @property
    def left(self) -> bool:
        """Whether the consumer of a stream has left before its end."""
        return self.workload.leave_after is not None and len(self.ran.handed_out) >= self.workload.leave_after

    @property
    def exited(self) -> bool:
        """Whether a task has ended the run."""
        return any(one.detail == "SystemExit" for story in self.stories.values() for one in story.tries)

    def may_have_recorded(self, call: Call, one: Try) -> list[Mapping[str, float]]:
        """What a call may have recorded until it ended."""
        if one.revoked:
            return [{}]
        if one.ended == "answer" or not call.recorded or (self.exact and one.end_at > one.at):
            return [call.recorded]
        return [call.recorded, {}]

    def recorded(self, story: Story, one: Try, number: int) -> list[Mapping[str, float]]:
        """What it has recorded, with what that costs: whatever goes with the usage that is told."""
        job, workload = self.job_of.get(story.index), self.workload
        if job is None:
            told = {unit: used for unit, used in one.usage.items() if unit not in ("calls", "cost")}
            return [told, {**told, "cost": one.usage.get("cost", 0.0)}]
        maybe = self.may_have_recorded(job.call(number), one)
        if one.error == "RateLimitError":
            maybe = [recorded or workload.refused(job.lane, job.amount) for recorded in maybe]
        fits = [recorded for recorded in maybe if workload.used_by(job.lane, job.amount, recorded) == one.usage]
        told = dict(job.call(number).recorded)
        self.claim(fits, f"{job.name} call {number} used {dict(one.usage)}, of {job.amount} and {told}")
        return [workload.with_cost(job.lane, job.amount, recorded) for recorded in fits or [{}]]

    def hangs(self, story: Story, one: Try, number: int) -> tuple[bool, bool]:
        """Whether a call that was given up surely, and whether it may, go on: those that listen end when told to."""
        if one.revoked:
            return False, False
        job = self.job_of.get(story.index)
        if job is None:
            return False, any(call.deaf for other in self.workload.jobs for call in other.calls)
        call = job.call(number)
        if not call.deaf:
            return False, False
        silent = call.outcome == "cancelled"        # that is taken for an end as told, and not for an answer
        late = EPS if self.exact else LATE
        at_once = call.seconds < HANG and one.at + call.seconds <= one.end_at + late
        return not (silent or at_once), True

    # ---- the books ---------------------------------------------------------------------------------------------------

    def keep_books(self) -> None:
        """Counts add up: one result for each task, and every sum of the report is what the log and the results say."""
        report, stories = self.report, list(self.stories.values())
        self.claim(len(self.results) == len(stories), f"{len(self.results)} results of {len(stories)} tasks taken")
        statuses = Counter(result.status for result in self.results)
        self.claim(
            Counter(story.result.detail for story in stories if story.result is not None)
            == Counter({status.value: count for status, count in statuses.items()}),
            "the results told are not those in the report",
        )
        self.claim(report.success_count == statuses[TaskStatus.SUCCEEDED], "success_count")
        failures = sum(count for status, count in statuses.items() if status.is_failure)
        self.claim(report.failure_count == failures, "failure_count")
        self.claim(report.skipped_count == statuses[TaskStatus.SKIPPED], "skipped_count")
        self.claim(report.cancelled_count == statuses[TaskStatus.CANCELLED], "cancelled_count")
        rate = report.success_count / max(1, report.success_count + failures)
        self.claim(report.success_rate == (rate if report.success_count + failures else 1.0), "success_rate")
        done = not (failures or report.skipped_count or report.cancelled_count or report.intake_cut)
        self.claim(report.all_succeeded == done, "all_succeeded")
        if self.workload.how == "run":
            self.claim(len(report.values()) == report.success_count, "values()")
            self.claim(len(report.errors()) == report.failure_count, "errors()")
        tries = [one for story in stories for one in story.tries]
        makespan = max(one.end_at for one in tries) - min(one.at for one in tries) if tries else 0.0
        self.claim(abs(report.makespan - makespan) < WALL_EPS, f"makespan {report.makespan}, not {makespan}")
        self.claim(set(report.by_source) >= {story.lane for story in stories}, "a lane is missing in by_source")
        for name, source in report.by_source.items():
            self._keep_books_of(name, source, [story for story in stories if story.lane == name])

    def _keep_books_of(self, name: str, source: Any, stories: list[Story]) -> None:
        tries = [one for story in stories for one in story.tries]
        made = [one for one in tries if not one.revoked]
        results = [result for result in self.results if result.source == name]
        undone = len(tries) - len(made)
        words = f"{name}: {source.calls} calls of {len(tries)} starts, of which {undone} revoked"
        self.claim(source.calls == len(made), words)
        at_once = all(one.at == one.end_at for one in tries if one.revoked)
        self.claim(at_once or not self.exact, f"{name}: one is revoked that a worker had time to begin with")
        told_of: Counter[str] = Counter()
        for event in self.ran.events:
            if event.source == name and event.usage is not None:
                for unit, used in event.usage.items():
                    told_of[unit] += used       # type: ignore[assignment]
        self.claim(_alike(source.usage, told_of), f"{name}: usage {source.usage}, and by its events {dict(told_of)}")
        self.claim(len(results) == len(stories), f"{name}: {len(results)} results of {len(stories)} tasks")
        self.claim(source.usage.get("calls") == source.calls, f"{name}: usage {source.usage}")
        self.claim(source.retries == sum(one.then == "retry" for one in tries), f"{name}: {source.retries} retries")
        throttled = sum(one.error == "RateLimitError" for one in tries)
        self.claim(source.throttled == throttled, f"{name}: {source.throttled} throttled, not {throttled}")
        busy = math.fsum(one.end_at - one.at for one in made)
        told = source.busy_seconds
        # A worker counts from when it picked the call up.
        all_told = abs(told - busy) < 1e-6
        self.claim(all_told or (0.0 <= told < busy and not self.exact), f"{name}: busy {told}, not {busy}")
        self._judge_quantiles(source, made, all_told)
        skipped = Counter(result.reason for result in results if result.status is TaskStatus.SKIPPED)
        self.claim(source.skipped == dict(skipped), f"{name}: skipped {source.skipped}, not {dict(skipped)}")
        answers = [one.end_at for one in tries if one.ended == "answer"]
        self.claim((source.first_at is None) == (not answers), f"{name}: first_at {source.first_at}")
        if source.first_at is not None and answers:
            self.begun_at = min(answers) - source.first_at
            self.claim(abs(source.last_at - source.first_at - (max(answers) - min(answers))) < 1e-6, f"{name}: last_at")

    def _judge_quantiles(self, source: Any, made: list[Try], all_told: bool) -> None:
        """They are of the durations of the calls that were made."""
        for name, share in QUANTILES.items():
            told, wanted = getattr(source, name), _nearest_rank(made, share)
            fits = _is_near(told, wanted) if all_told else _is_most(told, wanted)
            self.claim(fits, f"{source.name}: {name} {told}, not {wanted}")
            self.claim(told == source.latency(share), f"{source.name}: {name} is not latency({share})")

    # ---- which result is whose ---------------------------------------------------------------------------------------

    def match_inputs(self) -> None:
        """Inputs are taken in order, and a report keeps it: the index of a task is its place among the inputs."""
        names = [name_of(result.task) for result in self.results]
        if self.workload.how == "stream":
            self.claim(sorted(names) == list(range(len(names))), "not one result for each input taken")
        else:
            self.claim(names == list(range(len(names))), f"results are not in input order: {names}")
        for result in self.results:
            index = name_of(result.task)
            self.claim(result.task.payload == self._payload(index), f"{result.task.payload!r} is of another run")
            if index in self.stories:
                self.job_of[index] = self.jobs[index]
                self.result_of[index] = result
        reach = self.reach
        if self.stop is None:
            self.claim(len(names) == reach, f"{len(names)} inputs of {reach} were taken, and nothing stopped it")
        self.claim(len(names) <= reach, "more inputs than there were")
        self.claim(self.report.intake_cut or len(names) == len(self.workload.jobs), "intake was cut, says nobody")
        raised = isinstance(self.ran.error, LookupError)
        self.claim(not raised or len(names) == reach, "the inputs raised before their time")
        if self.workload.error_after is not None:
            self.claim(raised or self.stop is not None or self.left, "what the inputs raised was swallowed")

    def _payload(self, name: Any) -> Any:
        """What a job of that name is called in this run."""
        return name if self.number == 0 else Again(name, self.number)

    @property
    def reach(self) -> int:
        """How many inputs may be taken."""
        count = len(self.workload.jobs if self.workload.roots is None else self.workload.roots)
        return count if self.workload.error_after is None else min(count, self.workload.error_after)

    def match_queries(self) -> None:
        """Find the task of each result: it ended at the same instant, after as many attempts, in the same way."""
        offset = self.report.started_at - (self.begun_at or 0.0)
        fits: dict[int, list[int]] = {}
        for index, story in self.stories.items():
            fits[index] = [at for at, result in enumerate(self.results) if self._fits(story, result, offset)]
        whose = _matched(fits)
        missing = [self.stories[index] for index in fits if index not in whose]
        self.claim(not missing, f"no result tells of the same as {missing}")
        wanted_by = Counter(at for found in fits.values() for at in found)
        for index, at in whose.items():
            if len(fits[index]) == 1 and wanted_by[at] == 1:
                self.job_of[index] = self.jobs[name_of(self.results[at].task)]
                self.result_of[index] = self.results[at]

    @staticmethod
    def _end_of(result: TaskResult[Any, Any]) -> float:
        return (result.started_at or 0.0) + result.duration

    def _fits(self, story: Story, result: TaskResult[Any, Any], offset: float) -> bool:
        told, job = story.result, self.jobs[name_of(result.task)]
        assert told is not None
        if (story.lane, told.detail) != (result.source, result.status.value):
            return False
        if story.counted != result.attempts:
            return False
        if story.tries and result.attempts and self.begun_at is not None:
            late = self._end_of(result) - offset - story.tries[-1].end_at
            # A worker may come to a call, and read its clock, just after that was given up.
            most = LATE if story.tries[-1].ended == "given up" and not self.exact else WALL_EPS
            if not -WALL_EPS <= late <= most:
                return False
        for number, one in enumerate(story.tries, 1):
            call = job.call(number)
            if one.ended == "answer" and one.detail != call.answer(self.lane(story).retry):
                return False
            if self.exact and one.ended == "answer" and abs(one.end_at - one.at - call.seconds) > EPS:
                return False
        return True

    # ---- how tasks end -----------------------------------------------------------------------------------------------

    def judge_endings(self) -> None:
        """The status follows from the last outcome; nothing is skipped or cancelled without its reason."""
        keys: dict[Any, int] = {}
        for index, result in sorted(self.result_of.items()):
            story, job = self.stories[index], self.job_of[index]
            self._judge_ending(story, job, result)
            if job.key is not None:
                duplicate = keys.setdefault(job.key, index) < index
                words = f"{job.name}: {result.status.value} ({result.reason}), key {job.key!r} of {keys[job.key]}"
                self.claim(duplicate == (result.reason == "duplicate"), words)
        for result in self.results:
            refused = self.jobs[name_of(result.task)].unsupported
            self.claim(refused == (result.reason == "unsupported"), f"{name_of(result.task)}: {result.reason}")

    def _judge_ending(self, story: Story, job: Job, result: TaskResult[Any, Any]) -> None:
        status, last, name = result.status, story.last, f"{job.name}: {result.status.value} ({result.reason})"
        stopped = self.stop is not None
        self.claim(story.counted == result.attempts, f"{name} after {result.attempts} attempts")
        self.claim(result.attempts <= self.lane(story).retry.max_attempts, f"{name} after {result.attempts} attempts")
        throttled = sum(one.then == "throttled" for one in story.tries)     # they are calls, but no attempts
        self.claim(result.usage.get("calls") == result.attempts + throttled, f"{name}: {result.usage}")
        self.claim(result.source == story.lane == job.lane, f"{name} in {result.source}")
        itself = last is not None and last.detail == "CancelledError" and result.reason == "task_cancelled"
        if status is TaskStatus.CANCELLED and not itself:
            self.claim(stopped, f"{name}, but nothing stopped the run")
            if self.stop is not None:
                self.claim(result.reason == self.stop.detail, f"{name}: the run was stopped by {self.stop.detail}")
        if last is None:
            refused = job.bad or self._is_impossible(job)
            self.claim(refused == (status is TaskStatus.ERROR), f"{name}, never tried")
            kind = KeyError if job.bad else ValueError
            self.claim(not refused or isinstance(result.error, kind), f"{name}: {result.error!r}")
            self.claim(not job.bad or BAD in str(result.error), f"{name}: {result.error!r}")
            self.claim(refused or status in (TaskStatus.SKIPPED, TaskStatus.CANCELLED), f"{name}, never tried")
            reasons = ("budget_exhausted", "breaker_open", "unsupported", "duplicate")
            self.claim(status is not TaskStatus.SKIPPED or result.reason in reasons, name)
            return
        refused = job.bad or self._is_impossible(job)
        self.claim(not refused, f"{name} was tried, being bad or with an amount that can never be had")
        if last.ended == "answer" and not last.failed:
            self.claim(status is TaskStatus.SUCCEEDED, f"{name} after a success")
            self.claim(result.value == job.value(len(story.tries)), f"{name}: {result.value!r}")
            return
        failures = [one.error for one in story.tries if one.failed]
        expected = _status_of(failures[-1]) if failures else TaskStatus.CANCELLED
        if last.ended == "given up":
            expected = TaskStatus.CANCELLED
        allowed = (expected,) if itself else (expected, TaskStatus.CANCELLED)
        self.claim(status in allowed, f"{name} after {failures}")
        self.claim(failures[-1:] != ["CancelledError"] or itself or stopped, f"{name} after {failures}")
        told = type(result.error).__name__ if result.error is not None else None
        self.claim(told == (failures[-1] if failures else None), f"{name} with error {told} after {failures}")

    def _is_impossible(self, job: Job) -> bool:
        """Whether its amount can never be had, or is of something that nobody counts."""
        if job.unsupported or job.amount == 1:
            return False
        sizes = [
            (limit.unit, limit.burst if isinstance(limit, RateLimit) else limit.limit)
            for limit in self.workload.limits_of(job.lane)
        ]
        parts = [(part_of(job.amount, unit), size) for unit, size in sizes]
        sizes = [(share.unit, share.limit) for share in self.workload.shares_of(job.lane)]
        # Of a budget of nothing everything is skipped.
        sizes += [(unit, size) for unit, size in budgets_of(self.workload.lanes[job.lane]).items()
                  if unit != "calls" and size]
        parts += [(self.workload.reserved_part(job.lane, job.amount, unit), size) for unit, size in sizes]
        unknown = isinstance(job.amount, Mapping) and not job.amount.keys() <= self.workload.units_of(job.lane)
        return unknown or any(part > size for part, size in parts)

    # ---- what each call does, and when it ends -----------------------------------------------------------------------

    def judge_calls(self) -> None:
        """Calls do what the workload says, end at their timeout, and are made again not before their backoff."""
        for index, job in self.job_of.items():
            story, result = self.stories[index], self.result_of[index]
            policy = self.lane(story)
            give_up_at = math.inf
            if policy.retry.timeout is not None and story.tries:
                give_up_at = story.tries[0].at + policy.retry.timeout
            throttles = 0
            for number, one in enumerate(story.tries, 1):
                name = f"{job.name} call {number}"
                self._judge_call(name, one, job.call(number), job, policy, give_up_at)
                if one.then:
                    throttles += one.then == "throttled"
                    self._judge_delay(name, one, job.call(number), policy.retry, throttles)
            for before, after in pairwise(story.tries):
                due = before.end_at + before.delay * (1 - 1e-5) - EPS
                self.claim(after.at >= due, f"{job.name} was tried again at {after.at}, before {due}")
            if story.tries and result.attempts:
                last = story.tries[-1]
                took = last.end_at - last.at
                self.claim(0.0 <= result.duration <= took + 1e-6, f"{job.name} took {took}, not {result.duration}")
                self.claim(not self.exact or result.duration >= took - 1e-6, f"{job.name} took {took}")

    def _judge_call(
        self, name: str, one: Try, call: Call, job: Job, policy: ExecutionPolicy, give_up_at: float
    ) -> None:
        limit = job.timeout if job.timeout is not None else policy.timeout
        over_at = min(one.at + (math.inf if limit is None else limit), give_up_at)
        self.claim(one.at < give_up_at + self.late, f"{name} begins after the time of the whole task")
        self.claim(one.end_at <= over_at + self.late, f"{name} ends {one.end_at - over_at} after its timeout")
        if one.ended == "timeout":
            self.claim(one.end_at >= over_at - EPS, f"{name} is timed out {over_at - one.end_at} too early")
        if one.ended == "answer":
            took = one.end_at - one.at
            answer = call.answer(policy.retry)
            self.claim(one.detail == answer, f"{name} answers {one.detail}, not {answer}")
            self.claim(took >= call.seconds - EPS, f"{name} took {took}, not {call.seconds}")
            self.claim(took <= call.seconds + self.late, f"{name} took {took}, not {call.seconds}")
        elif self.exact:
            answer_at = one.at + call.seconds
            self.claim(one.end_at <= answer_at + EPS, f"{name} was given up after it had answered")

    def _judge_delay(self, name: str, one: Try, call: Call, retry: RetryPolicy, throttles: int) -> None:
        number = throttles if one.then == "throttled" else one.number
        most = min(retry.max_backoff, retry.backoff * retry.multiplier ** (number - 1))
        least = 0.0 if retry.jitter == "full" else most
        if one.then == "throttled" and call.retry_after:
            least = most = call.retry_after
        verdict = verdict_on(one.error, retry) if one.then == "retry" else True
        if not isinstance(verdict, (bool, str)):
            least = most = verdict
        fits = least * (1 - 1e-5) <= one.delay <= most * (1 + 1e-5)
        self.claim(fits, f"{name}: {one.then} after {one.delay}, not {least} to {most}")
        if one.then == "throttled":
            self.claim(one.delay <= retry.max_retry_after, f"{name} waits {one.delay}")
        else:
            self.claim(one.number < retry.max_attempts, f"{name} is retried, of {retry.max_attempts}")
            self.claim(verdict is not False, f"{name} is retried after {one.error}")

    # ---- stops -------------------------------------------------------------------------------------------------------

    def judge_stop(self) -> None:
        """A run stops at the outcome that decides it, for that reason; what waited is cancelled then, what ran ends."""
        conditions, stop = self.workload.stop, self.stop
        successes = failures = 0
        for pos, event in enumerate(self.ran.events):
            if event.kind != "result" or pos > self.stop_pos:
                continue
            successes += event.detail == "succeeded"
            failures += event.detail in ("failed", "error", "timeout")
            decided = event.detail not in ("skipped", "cancelled") and self._decided(successes, failures)
            if pos + 1 == self.stop_pos and stop is not None and stop.detail in ("max_failures", "max_results"):
                self.claim(stop.detail in (decided or ()), f"{stop.detail} after {successes}, {failures}")
            if decided:
                at_once = stop is not None and pos + 1 == self.stop_pos
                self.claim(at_once, f"{decided} was reached at {event}, and it did not stop")
        if stop is None:
            self._judge_no_cancel()
            cut = any(event.kind == "stop" for event in self.ran.events)
            self.claim(self.left or cut == isinstance(self.ran.error, LookupError), "the inputs' error")
            self.claim(self.report.stop_reason == ("input_error" if cut else None), "stop_reason")
            self.claim(self.report.intake_cut == cut, "intake_cut")
            self.claim(not self.exited, "a task has ended the run, and it went on")
            if self.begun_at is not None:
                end = max((one.end_at for story in self.stories.values() for one in story.tries), default=-math.inf)
                for bound in (conditions.timeout, self.workload.deadline):
                    over_at = math.inf if bound is None else self.begun_at + bound
                    self.claim(end <= over_at + self.late, "it outlived its timeout")
            return
        self.claim(self.report.stop_reason == stop.detail, f"stop_reason {self.report.stop_reason}, not {stop.detail}")
        counted = stop.detail in ("max_failures", "max_results", "failure_rate")
        known = counted or stop.detail in ("timeout", ENOUGH)
        known = known or (stop.detail == DEADLINE and self.workload.deadline is not None)
        known = known or (stop.detail == CLOSED and self.left) or (stop.detail == "SystemExit" and self.exited)
        if self.exited and not self.left:
            self.claim(isinstance(self.ran.error, SystemExit), "a task's SystemExit was swallowed")
        self.claim(known, f"stopped by {stop.detail}, which is no reason")
        if counted and self.stop_pos:
            before = self.ran.events[self.stop_pos - 1]
            self.claim((before.kind, before.at) == ("result", stop.at), f"stopped by {before}")
        if stop.detail == "timeout" and self.claim(conditions.timeout is not None, "no timeout was declared"):
            assert conditions.timeout is not None
            if self.begun_at is not None:
                took = stop.at - self.begun_at
                self.claim(took >= conditions.timeout - 1e-6, f"stopped after {took}, not {conditions.timeout}")
                self.claim(took <= conditions.timeout + self.late + 1e-6, f"stopped after {took}")
        if stop.detail == DEADLINE and self.workload.deadline is not None and self.begun_at is not None:
            took, early = stop.at - self.begun_at, self.late + 1e-6     # it counts from before the run
            self.claim(took >= self.workload.deadline - early, f"its deadline came after {took}")
            self.claim(took <= self.workload.deadline + self.late + 1e-6, f"its deadline came after {took}")
        if stop.detail == ENOUGH:
            self._judge_cancel(stop)
        if self.workload.cancel_by == BEFORE:
            self.claim(not any(story.tries for story in self.stories.values()), "it was cancelled before it began")
        self._judge_what_was_left(stop)

    def _decided(self, successes: int, failures: int) -> list[str]:
        """The conditions that so many outcomes fulfil."""
        stop, outcomes = self.workload.stop, successes + failures
        share = failures / max(1, outcomes)
        found = {
            "max_failures": stop.max_failures is not None and failures >= stop.max_failures,
            "max_results": stop.max_results is not None and successes >= stop.max_results,
            "failure_rate": stop.failure_rate is not None
            and outcomes >= stop.min_outcomes
            and share >= stop.failure_rate,
        }
        return [reason for reason, fulfilled in found.items() if fulfilled]

    def _cancelling_call(self) -> Try | None:
        """The call that cancelled the run, if it was made and can be seen."""
        name, number = self.workload.cancel_by or (None, 0)
        for index, job in self.job_of.items():
            tries = self.stories[index].tries
            if job.name == name and len(tries) >= number:
                return tries[number - 1]
        return None

    def _judge_cancel(self, stop: Event) -> None:
        """The call that cancels had begun, and the stop comes no later than its answer."""
        if self.workload.cancel_by == BEFORE:
            return
        name = (self.workload.cancel_by or (None,))[0]
        seen = name in {job.name for job in self.job_of.values()}
        one = self._cancelling_call()
        self.claim(name is not None and (one is not None or not seen), "cancelled, and nobody did that")
        if one is not None:
            self.claim(one.at <= stop.at, "it was cancelled before the call that cancels")
            self.claim(one.ended != "answer" or stop.at <= one.end_at + self.late, "the cancellation came late")
            if one.ended == "answer":
                self._judge_no_start_after(one)

    def _judge_no_cancel(self) -> None:
        """A cancellation counts from its call's answer on: nothing starts later."""
        self.claim(self.workload.cancel_by != BEFORE, "it was cancelled before it began, and ran")
        one = self._cancelling_call()
        if one is not None and one.ended == "answer":
            self._judge_no_start_after(one)

    def _judge_no_start_after(self, one: Try) -> None:
        """Nothing was admitted after an answer: its place in the log says more than its instant."""
        starts = [event for event in self.ran.events[one.end_pos :] if event.kind == "start"]
        self.claim(not starts, f"it was cancelled, and went on: {starts[:1]}")

    def _judge_what_was_left(self, stop: Event) -> None:
        """What waited is cancelled at once; what ran is drained so long as it may, or given up."""
        drain = 0.0 if self.workload.stop.in_flight == "abandon" else self.workload.stop.drain_seconds
        cut = self.exited or self.left      # whoever leaves leaves at once, also while it is drained
        if stop.detail in (CLOSED, "SystemExit"):
            drain = 0.0
        slow = PULLS_DROPPED if self.workload.pace else 0.0     # what is just being taken comes even then
        ended: set[int] = set()
        for pos, event in enumerate(self.ran.events):
            if pos < self.stop_pos and event.kind == "result" and event.index is not None:
                ended.add(event.index)
        for index, story in self.stories.items():
            assert story.result is not None
            if index in ended:
                continue
            at, status = story.result.at, story.result.detail
            last = story.last
            ran_on = last is not None and last.end_at > stop.at
            wait = drain if last is not None and (ran_on or last.end_at == stop.at) else slow
            self.claim(at <= stop.at + wait + self.late, f"task {index} ends {at - stop.at} after the stop")
            if last is None:
                self.claim(status in ("cancelled", "error", "skipped"), f"task {index} is {status} after the stop")
            if last is not None and last.ended == "given up":
                self.claim(cut or at >= stop.at + drain - EPS, f"task {index} was given up before its time")

    # ---- what is used, what hangs, what is taken ---------------------------------------------------------------------

    def judge_usage(self) -> None:
        """What a task used is what its calls recorded, else what it named; and every sum is the sum of that."""
        total: Counter[str] = Counter()
        for name, source in self.report.by_source.items():
            lane: Counter[str] = Counter()
            for result in self.results:
                if result.source == name:
                    lane.update(result.usage)
            total.update(lane)
            self.claim(_alike(source.usage, lane), f"{name}: usage {source.usage}, not {dict(lane)}")
            for unit, told in (("cost", source.cost), ("tokens", source.tokens)):
                self.claim(abs(told - lane[unit]) < 1e-6, f"{name}: {unit} {told}, not {lane[unit]}")
        report = self.report
        self.claim(_alike(report.usage, total), f"usage {report.usage}, not {dict(total)}")
        self.claim(abs(report.total_cost - total["cost"]) < 1e-6, f"total_cost {report.total_cost}")
        self.claim(abs(report.total_tokens - total["tokens"]) < 1e-6, f"total_tokens {report.total_tokens}")
        for index, result in self.result_of.items():
            usage: Counter[str] = Counter()
            for one in self.stories[index].made:
                usage.update(one.usage)
            words = f"{name_of(result.task)}: usage {dict(result.usage)}, not {dict(usage)}"
            self.claim(_alike(result.usage, usage), words)

    def judge_hanging(self) -> None:
        """Calls that were given up and have not come back are counted; each of them was told to end."""
        least = most = 0
        for story in self.stories.values():
            for number, one in enumerate(story.tries, 1):
                if one.ended in ("timeout", "given up"):
                    surely, maybe = self.hangs(story, one, number)
                    least, most = least + surely, most + maybe
        lates = sum(story.lates for story in self.stories.values())
        # An answer may come after the run and its report, and is told even so.
        kinds = [event.kind for event in self.ran.events]
        later = next((at for at, kind in enumerate(reversed(kinds)) if kind != "late"), lates)
        told = self.report.abandoned
        self.claim(least - lates <= told <= most - lates + later, f"{told} abandoned, not {least - lates}")
        for name, number, told_to_end in self.ran.tokens:
            for index, job in self.job_of.items():
                tries = self.stories[index].tries
                if job.name == name and len(tries) >= number:
                    self._judge_token(job, tries[number - 1], number, told_to_end)

    def _judge_token(self, job: Job, one: Try, number: int, told_to_end: bool) -> None:
        name = f"{job.name} call {number}"
        if one.ended == "answer":
            # Whoever cancels a run, or leaves it, tells what runs.
            drained = self.left or self.workload.cancel_by is not None or self.workload.deadline is not None
            self.claim(drained or not told_to_end, f"{name} was told to end, and its answer taken")
        elif one.at + job.call(number).seconds > one.end_at + self.late and not one.revoked:
            self.claim(told_to_end, f"{name} was given up, and its token not cancelled")

    def judge_intake(self) -> None:
        """Inputs given and not handed out by a stream are at most concurrency + lookahead."""
        if self.workload.how == "run" or self.workload.is_tree:
            return
        one = 0 if self.exact else 1        # it may be on its way to the consumer
        for lane, ahead in self.ran.ahead.items():
            policy = self.workload.lanes[lane]
            most = policy.concurrency + policy.lookahead + one
            self.claim(ahead <= most, f"{ahead} inputs of {lane} were taken and not handed out, of {most}")

    # ---- order -------------------------------------------------------------------------------------------------------

    def judge_order(self) -> None:
        """In a lane the lower priority number goes first, then the upper level, then who was taken first."""
        lanes: dict[str, list[tuple[Any, Story]]] = defaultdict(list)
        for index in sorted(self.job_of):
            rank = (self.job_of[index].priority, getattr(self.result_of[index].task, "level", 0))
            lanes[self.stories[index].lane].append((rank, self.stories[index]))
        seen = list(accumulate((event.index or 0 for event in self.ran.events), max))      # all up to it were taken
        for lane in lanes.values():
            for (rank, story), (other_rank, other) in permutations(lane, 2):
                if not story.tries:
                    continue
                # In a tree, of one level: by the place of the node, which the log does not show.
                before = other_rank < rank
                if other_rank == rank and not self.workload.is_tree:
                    before = other.index < story.index
                taken = other.index < story.index or (story.first_pos and other.index <= seen[story.first_pos - 1])
                if before and taken:
                    passed = other.tries and other.first_pos > story.first_pos
                    left = not other.tries and other.result is not None and other.result.detail == "cancelled"
                    self.claim(not passed and not left, f"task {story.index} goes before task {other.index}")

    # ---- hierarchies -------------------------------------------------------------------------------------------------

    def judge_tree(self) -> None:
        """What is asked follows from what was found; all of it, each once, and nothing before its parents."""
        workload, asked = self.workload, {}
        for result in self.results:
            self.claim(name_of(result.task) not in asked, f"{name_of(result.task)} was asked twice")
            asked[name_of(result.task)] = result
        found = [result for result in self.results if result.ok and result.value]
        roots = (workload.roots or ())[: self.reach]
        self._judge_report_of_tree(found, roots)
        born: dict[Any, float] = {}
        levels: dict[Any, set[int]] = defaultdict(set)
        for root in roots:
            born[root] = -math.inf
            levels[root].add(0)
        for result in found:
            job = self.jobs[name_of(result.task)]
            for child in workload.children.get((job.node, job.lane), ()):
                born[child] = min(born.get(child, math.inf), self._end_of(result))
                levels[child].add(getattr(result.task, "level", 0) + 1)
        expected = {}
        for node in born:
            for source in workload.lanes:
                for job in workload.asked(node, source):
                    expected[job.name] = born[node]
        follows = {job.page: job for job in workload.jobs if job.page is not None}
        for name in sorted(follows):        # a page's name is longer than that of the one before
            before = asked.get(follows[name].name)
            if before is not None and before.ok:
                expected[name] = self._end_of(before)
        for name, result in asked.items():
            if self.claim(name in expected, f"{name} was asked, and nothing led to it"):
                if result.attempts:
                    early = expected[name] - (result.started_at or 0.0)
                    self.claim(early <= WALL_EPS, f"{name} was asked {early} s before what led to it")
                level, node = getattr(result.task, "level", None), self.jobs[name].node
                self.claim(level in levels[node], f"{name} is of level {level}")
        if self.stop is None:
            missing = sorted(expected.keys() - asked.keys())
            self.claim(not missing, f"never asked, and nothing stopped it: {missing}")
        if workload.error_after is not None and self.stop is None and not self.left:
            self.claim(isinstance(self.ran.error, LookupError), "what the roots raised was swallowed")

    def _judge_report_of_tree(self, found: Sequence[TaskResult[Any, Any]], roots: Sequence[Any]) -> None:
        report: Any = self.report
        active = {self.jobs[name_of(result.task)].node for result in found}
        told = sorted(name_of(node) for node in report.active_nodes)
        self.claim(told == sorted(active), f"active are {sorted(active)}")
        if self.workload.how == "run":
            items = [item for result in self.results if result.ok for item in result.value or ()]
            self.claim(report.items == items, "items")
            places = [getattr(result.task, "level", 0) for result in self.results]
            self.claim(places == sorted(places), f"results are not by level: {places}")
            first = [roots.index(name_of(r.task.node)) for r in self.results if getattr(r.task, "level", 0) == 0]   # type: ignore[attr-defined]
            self.claim(first == sorted(first), "results are not in the order of the roots")
        budgets = {name: source.remaining_budget for name, source in report.by_source.items()}
        self.claim(report.remaining_budgets == budgets, "remaining_budgets")


def _matched(fits: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """As many pairs as there can be, of those that fit (Kuhn's augmenting paths)."""
    taken_by: dict[int, int] = {}

    def place(index: int, tried: set[int]) -> bool:
        for at in fits[index]:
            if at not in tried:
                tried.add(at)
                if at not in taken_by or place(taken_by[at], tried):
                    taken_by[at] = index
                    return True
        return False

    for index in fits:
        place(index, set())
    return {index: at for at, index in taken_by.items()}


def _status_of(error: str) -> TaskStatus:
    if error == "TaskTimeoutError":
        return TaskStatus.TIMEOUT
    if error == "CancelledError":
        return TaskStatus.CANCELLED
    return TaskStatus.ERROR if error in ("ValueError", "ArithmeticError", "SystemExit") else TaskStatus.FAILED


def _nearest_rank(tries: Sequence[Try], share: float) -> float | None:
    """The seconds that such a share of the attempts took at most; None where there are none."""
    row = sorted(one.end_at - one.at for one in tries)
    return row[max(0, math.ceil(share * len(row) - 1e-9) - 1)] if row else None


def _is_near(told: float | None, seconds: float | None) -> bool:
    """Whether a quantile is as near as it is to be."""
    if told is None or seconds is None:
        return told is seconds
    return abs(told - seconds) <= NEAR * seconds + 2 * EPS


def _is_most(told: float | None, seconds: float | None) -> bool:
    if told is None or seconds is None:
        return told is seconds
    return 0.0 <= told <= seconds * (1 + NEAR) + 2 * EPS


def _alike(told: Mapping[str, float], expected: Mapping[str, float]) -> bool:
    return all(abs(told.get(unit, 0.0) - expected.get(unit, 0.0)) < 1e-6 for unit in {*told, *expected})
