"""The log, played again: every start, skip and final failure is held against what was in use at that instant."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from qengine import Event

from .books import EPS, AllowanceBook, GateBook, LaneBook, Span
from .model import Job, Workload, part_of, verdict_on

if TYPE_CHECKING:
    from .oracle import Oracle
    from .stories import Story, Try

LATE = 0.25                 # seconds by which a loaded machine may be late on the real clock
HELD_UP = 60.0              # and one that stands still: what is wrong beyond that has nothing to do with time


class Lasting:
    """What outlives a run: the limits and breakers of the lanes, what they share, and their quotas."""

    def __init__(self, workload: Workload) -> None:
        self.gates = {name: GateBook(policy.limits, policy.breaker) for name, policy in workload.lanes.items()}
        self.shared = GateBook(workload.shared)
        self.quotas = {share: AllowanceBook(share.unit, share.limit) for share in workload.quotas}


def replay(oracles: Sequence[Oracle]) -> None:
    """Play the logs of all runs of one executor, one after the other or as they were told."""
    lasting = Lasting(oracles[0].workload)
    replays = [Replay(oracle, number, lasting) for number, oracle in enumerate(oracles)]
    first = oracles[0]
    if not first.workload.together:
        for one in replays:
            for pos in range(len(one.events)):
                one.play(pos)
            one.conclude()
        return
    turns = [(oracle.ran.told[pos], number, pos) for number, oracle in enumerate(oracles)
             for pos in range(len(oracle.ran.events))]
    if not first.exact:     # what one run decided may be told before what another had decided earlier
        turns = [(oracles[number].ran.events[pos].at, number, pos) for _, number, pos in turns]     # type: ignore[misc]
        for gate in lasting.gates.values():
            if gate.breaker is not None:
                gate.breaker.vague = True
    for _, number, pos in sorted(turns):
        replays[number].play(pos)


class Replay:
    """Plays the log of one run."""

    def __init__(self, oracle: Oracle, number: int, lasting: Lasting) -> None:
        self.oracle = oracle
        self.workload = oracle.workload
        self.claim = oracle.claim
        self.events = oracle.ran.events
        self.number = number
        self.lasting = lasting
        self.books = {
            name: LaneBook(
                number, name, policy, lasting.gates[name],
                [lasting.quotas[share] for share in self.workload.shares_of(name)],
            )
            for name, policy in self.workload.lanes.items()
        }
        self.number_of: Counter[int] = Counter()        # tries so far
        self.stopped = False
        self._seen: set[int] = set()
        self._top = -1                                  # all inputs up to this one were taken
        self._fresh: dict[str, dict[int, None]] = defaultdict(dict)         # tasks of a lane never tried
        self._again: dict[str, dict[int, float]] = defaultdict(dict)        # and those to be tried again, and when
        if not self.workload.is_tree:
            for index, job in enumerate(self.workload.jobs[: oracle.reach]):
                self._fresh[job.lane][index] = None
        # Several runs wait for one another, which the log of the one does not show.
        plain = not self.workload.is_tree and self.workload.how == "run" and not self.workload.together
        self._shows_all = oracle.exact and plain
        self._is_mixed = self.workload.together and not oracle.exact       # what came first, the log does not say
        self._slack = oracle.late if self._is_mixed else 0.0

    def play(self, pos: int) -> None:
        """Play the event at that place."""
        event = self.events[pos]
        if event.kind == "stop":
            if event.detail != "input_error":
                self._stop(pos)
        else:
            assert event.index is not None
            book, story = self.books[event.source], self.oracle.stories[event.index]
            self._expect_opening(book, event)
            self._note_intake(book, story)
            getattr(self, f"_{event.kind}")(book, story, event)
            self.claim(book.budget is None or book.budget >= 0, f"{event} is beyond the budget of {book.name}")
        next_at = self.events[pos + 1].at if pos + 1 < len(self.events) else -math.inf
        if next_at > event.at + EPS and self._shows_all and not self.stopped:
            # What stands in the way of a task goes by itself, or by an event: so now, and just before the next.
            busy = [book for name, book in self.books.items() if self._fresh[name] or self._again[name]]
            for book in busy:
                self._look_for_idleness(book, event.at)
                self._look_for_idleness(book, next_at - 1e-6)

    def conclude(self) -> None:
        """Hold what is left against what the report says is left."""
        for name, source in self.oracle.report.by_source.items():
            book = self.books[name]
            left: dict[str, Span] = {} if book.budget is None else {"calls": (book.budget, book.budget)}
            for allowance in book.purse:
                least, most = (allowance.limit - taken for taken in reversed(allowance.taken))
                other = left.get(allowance.unit, (math.inf, math.inf))
                left[allowance.unit] = min(least, other[0]), min(most, other[1])
            words = f"{name}: {source.remaining} remain, not {left}"
            self.claim(source.remaining.keys() == left.keys(), words)
            for unit, (least, most) in left.items():
                self.claim(least - 1e-6 <= source.remaining.get(unit, math.nan) <= most + 1e-6, words)
            calls = source.remaining.get("calls")
            rest = None if calls is None else max(0, calls)
            self.claim(source.remaining_budget == rest, f"{name}: {source.remaining_budget} calls remain, not {rest}")

    def _stop(self, pos: int) -> None:
        """What a stop finds taken and not finished is at most concurrency + lookahead, in each lane."""
        self.stopped = True
        ended = {event.index for event in self.events[:pos] if event.kind == "result"}
        left = Counter(story.lane for index, story in self.oracle.stories.items() if index not in ended)
        for name, count in left.items():
            most = self.books[name].policy.concurrency + self.books[name].policy.lookahead
            self.claim(count <= most, f"{count} tasks of {name} were taken and not finished at the stop")

    def _expect_opening(self, book: LaneBook, event: Event) -> None:
        if book.breaker is not None and book.breaker.opens_at_once and not book.breaker.vague:
            if not self.claim(event.kind == "breaker_opened", f"{book.name}: no breaker opened before {event}"):
                book.breaker.opens_at_once = False

    def _note_intake(self, book: LaneBook, story: Story) -> None:
        """Inputs taken and not finished are at most concurrency + lookahead."""
        if self.workload.is_tree or story.index in self._seen:
            return
        self._seen.add(story.index)
        self._top = max(self._top, story.index)
        taken = sum(job.lane == book.name for job in self.workload.jobs[: story.index + 1])
        most = book.policy.concurrency + book.policy.lookahead
        self.claim(taken - book.ended <= most, f"{taken - book.ended} inputs of {book.name} taken and not finished")

    # ---- events ------------------------------------------------------------------------------------------------------

    def _who(self, index: int) -> Hashable:
        return (self.number, index, self.number_of[index])

    def _start(self, book: LaneBook, story: Story, event: Event) -> None:
        index, at, policy, job = story.index, event.at, book.policy, self.oracle.job_of.get(story.index)
        self.claim(len(book.running) < policy.concurrency, f"{event}: {book.name} has {policy.concurrency} running")
        width = self.workload.width
        running = sum(len(other.running) for other in self.books.values())
        self.claim(width is None or running < width, f"{event}: {width} are running")
        paused = at < book.gate.paused_until - EPS - self._slack
        self.claim(not paused, f"{event}: {book.name} pauses until {book.gate.paused_until}")
        self.claim(book.hanging < book.max_abandoned, f"{event}: {book.hanging} calls of {book.name} hang")
        self.number_of[index] += 1
        who = self._who(index)
        amount = 1 if job is None else job.amount
        if job is None and self.workload.is_tree:
            # Whose it is cannot be seen: it counts as the least that it may be.
            jobs = [other for other in self.workload.jobs if other.lane == event.source]
            units = self.workload.units_of(event.source)
            amount = {unit: min(part_of(other.amount, unit) for other in jobs) for unit in units}
        # A live limiter has a clock of its own, which it reads a little later.
        late = 0.0 if self.oracle.exact else self.oracle.late
        for gate, slack in ((book.gate, self._slack), (self.lasting.shared, late)):
            for words in gate.too_much(amount, at, slack):
                self.claim(False, f"{event}: {words}")
            gate.take(who, amount)
        self._reserve(book, index, event)
        self.claim(book.batch_takes(index, at), f"{event}: its batch is not yet to begin")
        if policy.batch_size is not None and index not in book.batch:
            if len(book.batch) == policy.batch_size:
                book.batch.clear()
            book.batch.add(index)
            book.batch_open.add(index)
        if book.breaker is not None and not book.breaker.vague:
            self.claim(book.breaker.lets_in(at), f"{event}: the breaker is open until {book.breaker.reset_at}")
            if not book.breaker.closed:
                book.breaker.probe = who
        if index in book.reserved:
            book.reserved.remove(index)
        elif book.budget is not None:
            book.budget -= 1
        book.running[index] = at
        self._judge_order(book, index, at)
        self._fresh[book.name].pop(index, None)
        self._again[book.name].pop(index, None)

    def _judge_order(self, book: LaneBook, index: int, at: float) -> None:
        """Of those that are ready the lower priority number goes first, then who was taken first, be it once more."""
        if self.workload.is_tree or not self.oracle.exact or book.policy.batch_size is not None:
            return
        jobs = self.workload.jobs
        ready = [other for other, due in self._again[book.name].items() if due + EPS < at]
        taken = [other for other in self._fresh[book.name] if other < self._top]
        passed = [other for other in (*ready, *taken) if (jobs[other].priority, other) < (jobs[index].priority, index)]
        self.claim(not passed, f"task {index} goes before {passed}")

    def _parts(self, book: LaneBook, index: int) -> list[Span]:
        """How much of each of its allowances a task is; of one that is not known, at least and at most."""
        job, reserved = self._job(index), self.workload.reserved_part
        jobs = [other for other in self.workload.jobs if other.lane == book.name] if job is None else [job]
        rows = [[reserved(book.name, other.amount, allowance.unit) for other in jobs] for allowance in book.purse]
        return [(min(row), max(row)) for row in rows]

    def _job(self, index: int) -> Job | None:
        return self.oracle.job_of.get(index) if self.workload.is_tree else self.workload.jobs[index]

    def _reserve(self, book: LaneBook, index: int, event: Event) -> None:
        """Whatever a call takes from was there: that a budget is exceeded is what calls in flight have recorded."""
        for allowance, part in zip(book.purse, self._parts(book, index), strict=True):
            words = f"{event}: {allowance.taken[0]} of {allowance.limit} {allowance.unit} are taken"
            self.claim(allowance.fits(part[0], allowance.taken[0]) or self._is_mixed, words)
            allowance.take(self._who(index), part)

    def _is_spent(self, book: LaneBook, index: int, surely: bool = False) -> bool:
        """Whether what a task is to use may not be there, or surely is not, and nobody could give it back."""
        bound = 0 if surely else 1
        lacking = any(
            not allowance.fits(part[bound], allowance.taken[bound])
            for allowance, part in zip(book.purse, self._parts(book, index), strict=True)
        )
        return self._is_lost(book, index, surely) or (lacking and not self._may_get_back(book))

    def _is_lost(self, book: LaneBook, index: int, surely: bool = False) -> bool:
        """Whether what a task is to use may be used up, or surely is, be it that all that is reserved came back.

        A call that is made does not come back.
        """
        bound = 0 if surely else 1
        lost = any(
            not allowance.fits(part[bound], (allowance.taken if allowance.unit == "calls" else allowance.used)[bound])
            for allowance, part in zip(book.purse, self._parts(book, index), strict=True)
        )
        return lost or (book.budget is not None and book.budget < 1 and not (surely and index in book.reserved))

    def _may_get_back(self, book: LaneBook) -> bool:
        """Whether a call that runs shares what a lane takes from."""
        ours = set(map(id, book.purse))
        return any(
            other.running and not ours.isdisjoint(map(id, other.purse)) for other in self.books.values()
        )

    def _ends(self, book: LaneBook, index: int, one: Try, well: bool | None) -> None:
        book.running.pop(index)
        who = self._who(index)
        recorded = self.oracle.recorded(self.oracle.stories[index], one, self.number_of[index])
        for gate in (book.gate, self.lasting.shared):
            gate.end(who, one.end_at, recorded)
        for allowance in book.purse:
            allowance.end(who, one.usage)
        if book.breaker is not None:
            book.breaker.outcome(who, well)

    def _try(self, story: Story) -> Try:
        return story.tries[self.number_of[story.index] - 1]

    def _answer(self, book: LaneBook, story: Story, event: Event) -> None:
        says_nothing = event.detail in ("RateLimitError", "CancelledError", "SystemExit")
        self._ends(book, story.index, self._try(story), None if says_nothing else event.detail == "ok")
        if event.detail == "RateLimitError":
            self._note_pause(book.gate, story, event.at, book.policy.retry.max_retry_after)

    def _note_pause(self, gate: GateBook, story: Story, at: float, most: float) -> None:
        """A source has asked for a pause: it says for how long, or it is a backoff."""
        job = self.oracle.job_of.get(story.index)
        after = None if job is None else job.call(self.number_of[story.index]).retry_after
        if not after:
            longest = min(most, self._longest_wait(story, self._try(story))[0])
            gate.maybe_paused_until = max(gate.maybe_paused_until, at + longest)
        elif after <= most:
            gate.paused_until = max(gate.paused_until, at + after)

    def _given_up(self, book: LaneBook, story: Story) -> None:
        least, most = self.oracle.hangs(story, self._try(story), self.number_of[story.index])
        book.hanging += least
        book.hanging_at_most += most
        if book.hangs and book.breaker is not None:
            book.breaker.vague = True

    def _timeout(self, book: LaneBook, story: Story, event: Event) -> None:
        self._ends(book, story.index, self._try(story), False)
        self._given_up(book, story)

    def _abandoned(self, book: LaneBook, story: Story, event: Event) -> None:
        self._ends(book, story.index, self._try(story), None)
        self._given_up(book, story)

    def _revoked(self, book: LaneBook, story: Story, event: Event) -> None:
        """All that it took is given back."""
        who = self._who(story.index)
        for gate in (book.gate, self.lasting.shared):
            gate.revoke(who, event.at)
        for allowance in book.purse:
            allowance.revoke(who)
        if book.budget is not None:
            book.budget += 1

    def _late(self, book: LaneBook, story: Story, event: Event) -> None:
        book.hanging -= 1
        book.hanging_at_most -= 1

    def _retry(self, book: LaneBook, story: Story, event: Event) -> None:
        lost = self._is_lost(book, story.index, surely=True) and not self._is_mixed
        self.claim(not lost, f"{event}: there is nothing left for it")
        if book.budget is not None:
            book.budget -= 1
            book.reserved.add(story.index)
        one = self._try(story)
        self._again[book.name][story.index] = event.at + one.delay * (1 + 1e-5)

    def _throttled(self, book: LaneBook, story: Story, event: Event) -> None:
        self._retry(book, story, event)
        one = self._try(story)
        book.gate.paused_until = max(book.gate.paused_until, event.at + one.delay * (1 - 1e-5))
        if one.number == 1:     # it has not had its first attempt: it is not yet one of its batch
            book.batch.discard(story.index)
            book.batch_open.discard(story.index)

    def _breaker_opened(self, book: LaneBook, story: Story, event: Event) -> None:
        breaker = book.breaker
        if not self.claim(breaker is not None, f"{event}, and there is none"):
            return
        assert breaker is not None
        if event.detail:
            self.claim(book.hangs, f"{event}, but {book.hanging_at_most} do")
        else:
            self.claim(breaker.opens_at_once or breaker.vague, f"{event} without the failures for it")
        breaker.opened(event.at)

    def _result(self, book: LaneBook, story: Story, event: Event) -> None:
        index = story.index
        waited = index in book.reserved or bool(story.tries and story.tries[-1].then)
        if index in book.reserved:
            book.reserved.remove(index)
            assert book.budget is not None
            book.budget += 1
        if event.detail == "skipped":
            self._judge_skip(book, story, event)
        elif story.tries and event.detail in ("failed", "error", "timeout"):
            self._judge_final_failure(book, story, event, waited)
        elif story.tries and event.detail == "cancelled":
            itself = story.tries[-1].detail == "CancelledError" and not waited
            self.claim(self.stopped or itself, f"{event} before a stop")
        book.ended += 1
        self._fresh[book.name].pop(index, None)
        self._again[book.name].pop(index, None)
        book.batch_open.discard(index)
        if len(book.batch) == book.policy.batch_size and not book.batch_open and index in book.batch:
            book.batch_over_at = event.at

    def _judge_skip(self, book: LaneBook, story: Story, event: Event) -> None:
        result = self.oracle.result_of.get(story.index)
        if result is None:
            return
        if result.reason == "budget_exhausted":
            spent = self._is_spent(book, story.index) or self._is_mixed
            self.claim(spent, f"{event}: the budget is {book.budget}, and of the rest {self._rest(book)}")
        elif result.reason == "breaker_open":
            self.claim(book.gives_up(event.at), f"{event}: nothing says that the lane is given up")

    def _judge_final_failure(self, book: LaneBook, story: Story, event: Event, waited: bool) -> None:
        """Say why a failure is final: it is not to be lost to anything else."""
        last, retry = story.tries[-1], book.policy.retry
        over_at = math.inf if retry.timeout is None else story.tries[0].at + retry.timeout
        if waited:
            spent = self._is_spent(book, story.index) or self._is_mixed
            reason = book.gives_up(event.at) or event.at >= over_at - EPS or spent
            self.claim(reason, f"{event}: it waited to be tried again, and has no reason to end")
            late = event.at - over_at
            self.claim(late <= self.oracle.late, f"{event}: its time is over since {late}")
            return
        longest, final = self._longest_wait(story, last)
        if final or event.at + longest >= over_at - EPS:
            return
        self.claim(not self.stopped, f"{event}: what was to be tried again is cancelled by a stop")
        lost = self._is_lost(book, story.index) or self._is_mixed
        self.claim(lost, f"{event}: final, though it could be tried again")

    def _rest(self, book: LaneBook) -> str:
        """What is left of what a lane takes from, in words."""
        return ", ".join(f"{one.taken[1]} of {one.limit} {one.unit}" for one in book.purse) + " are taken"

    def _longest_wait(self, story: Story, last: Try) -> tuple[float, bool]:
        """How long it may be until it is tried again, and whether it is not to be at all."""
        retry, job = self.oracle.lane(story).retry, self.oracle.job_of.get(story.index)
        if last.error == "RateLimitError":
            after = None if job is None else job.call(self.number_of[story.index]).retry_after
            throttles = sum(one.error == last.error for one in story.tries)
            longest = after or min(retry.max_backoff, retry.backoff * retry.multiplier ** (throttles - 1))
            return longest, job is None or longest > retry.max_retry_after
        if last.error in ("ArithmeticError", "SystemExit"):
            return 0.0, True
        verdict = verdict_on(last.error, retry)
        if isinstance(verdict, bool):
            longest = min(retry.max_backoff, retry.backoff * retry.multiplier ** (last.number - 1))
        else:
            longest = 0.0 if isinstance(verdict, str) else verdict
        return longest, verdict is False or verdict == "raises" or last.number >= retry.max_attempts

    # ---- limits are used ---------------------------------------------------------------------------------------------

    def _look_for_idleness(self, book: LaneBook, at: float) -> None:
        """While a task is ready, something must stand in its way: checked at each instant once all was done."""
        breaker, policy = book.breaker, book.policy
        if len(book.running) >= policy.concurrency or book.hangs:
            return
        if breaker is not None and breaker.vague:
            return
        fresh = [*self._fresh[book.name]]
        again = [index for index, due in self._again[book.name].items() if due + EPS < at]
        taken = [index for index in fresh if index < self._top]
        if len(self.books) == 1 and not self.workload.pace:     # of those that are open the first are taken at once
            open_ = sorted([*book.running, *self._again[book.name], *fresh])
            taken = [index for index in open_[: policy.concurrency] if index in self._fresh[book.name]]
        if not again and not taken:
            return
        if breaker is not None and not breaker.lets_in(at):
            words = f"{[*taken, *again]} wait at {at} for a breaker that is not waited for"
            self.claim(not breaker.may_skip(at), words)
            return
        if max(book.gate.paused_until, book.gate.maybe_paused_until) > at:
            return
        jobs = self.workload.jobs
        free = [
            index for index in (*fresh, *again)
            if book.batch_takes(index, at - 2 * EPS)
            and book.gate.lets_in(jobs[index].amount, at)
            and self.lasting.shared.lets_in(jobs[index].amount, at)
        ]
        if len(free) == len(fresh) + len(again):
            words = f"nothing starts at {at}, though {free} are ready and nothing stands in their way"
            self.claim(not all(self._has(book, index) for index in free), words)
            spent = all(self._is_spent(book, index, surely=True) for index in free)
            self.claim(not spent, f"{free} wait at {at} for what nobody can give back")

    def _has(self, book: LaneBook, index: int) -> bool:
        """Whether all that a task is to use is surely there."""
        return all(
            allowance.fits(part[1], allowance.taken[1])
            for allowance, part in zip(book.purse, self._parts(book, index), strict=True)
        )
