"""One run: the state machine that decides what starts, waits, is tried again, and when it is over.

    next(now)                           the next step
    finished(attempt, outcome, now)     an attempt ended
    turn(attempt, outcome, now)         both in one call
    offered(feed, ended, error, now)    a pull ended
    submitted(attempt, now)             a task from outside, where the feed is not pulled; closed(feed, now): no more
    delivered(lane, now)                a consumer took results of that lane (streams only); thinned(now): of many lanes
    wake(lane, now)                     another run had an outcome that the lane waits for
    revoked(attempt, now)               it was given up before a worker picked it up; given_up(attempt): after that
    withdrawn(attempt, reason, now)     nobody wants its result any more
    cancel(reason, now)                 stop
    alarm_at(at, ring, now)             call back at an instant
    reports()                           what each lane did

Rules: it knows no clock, lock, thread, event loop, file or random source: time and rng are passed in.  No user code
runs in it.  All waiting is in it: rate, window, retry, breaker, batch, timeout and deadline are instants, so a driver
never computes one.  Nothing that waits holds a worker.  Nothing is admitted after the outcome that decides a stop.
After `Wait(t)`, `next(t)` makes progress.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heappush
from typing import Any, NamedTuple

from ..errors import StorageError, TaskError, TaskTimeoutError
from ..model import OTHERS, Amount, Event, Hop, SourceReport, Task, TaskStatus
from ..policy import StopConditions
from .backoff import Uniform, backoff_delay
from .breaker import CLOSED
from .bucket import CATCH_UP
from .hold import Hold
from .lane import HELD_UP, LANES_KEPT, SLOW_PULL, Attempt, Feed, FeedKind, Lane, Rank
from .purse import Parts
from .quota import Allowance
from .route import Route, Standing, refuse_routes
from .steps import DONE, Cancel, Raised, Step, Wait
from .stops import StopRule
from .timers import Timer, Timers
from .tree import PULL_GRACE, Found, NodeKey, Tree, found

SUCCEEDED = TaskStatus.SUCCEEDED
FAILED = TaskStatus.FAILED
ERROR = TaskStatus.ERROR
TIMEOUT = TaskStatus.TIMEOUT
CANCELLED = TaskStatus.CANCELLED
SKIPPED = TaskStatus.SKIPPED

Record = Attempt | Found | tuple[Any, Any, str, float, float] | None
"""What is kept of a task that has its result: the attempt, or of a bare payload that succeeded at once only the
payload, the value, the lane's name, started_at and duration: less to keep, and nothing for the garbage collector to
look through; of such a query what was found.  None: it has none yet."""



class Known(NamedTuple):
    """What arrives for a bare payload whose value a journal has, from one call."""

    lane: Lane
    payload: Any
    value: Any
    started_at: float
    duration: float
    entry: Any


class Tried(NamedTuple):
    """Word for a journal that a task was tried, in vain so far, for the so-manieth time."""

    attempt: Attempt
    number: int


ON_EVENT = Wait(None)  # shared: making one for each would cost more than the decision
PULLS_DROPPED_AFTER = 0.050
SETTLING = 0.100
"""Seconds in which a call that was given up may still end, as it is told to, before it counts as one that hangs."""
INF = math.inf


class Run:
    """The decisions of one run.

    Args:
        lanes: Those known beforehand; others join with their first task.
        now: The instant it begins.
        feed: The inputs; None for a tree.
        tree: The hierarchy; None for plain inputs.
        data: The inputs' iterator, if they are plain data (a list, a range) that can be taken without user code.
        stop: When to stop.
        width: Attempts at once over all lanes; None for the sum of the lanes' concurrency.
        rng: Draws the jitter.
        records: Where every task is kept, in the order taken; None to keep none.
        completed: Where finished tasks are put for a consumer, who then counts `lane.delivered`; None for none.
        probe: Says, item by item, whether all admission is to be held; None where nobody asks.
        log: Where is put, in order, what a journal is to commit before it is told: a finished attempt; of a bare
            payload that succeeded at once its index, what is kept of it, its entry and its lane; a `Tried`; and, where
            `emit` puts them there, events.  It may be `completed` as well.  None where there is no journal.
        emit: Called with each Event; None for none.
        note: Called with those that are rare, all but "start", "answer" and "result", where there is no `emit`.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        now: float,
        *,
        feed: Feed | None = None,
        tree: Tree | None = None,
        data: Iterator[Any] | None = None,
        stop: StopConditions,
        width: int | None = None,
        rng: Uniform,
        records: list[Record] | None = None,
        completed: deque[Attempt] | None = None,
        probe: Feed | None = None,
        log: deque[Any] | None = None,
        emit: Callable[[Event], object] | None = None,
        note: Callable[[Event], object] | None = None,
    ) -> None:
        self.lanes: list[Lane] = []
        self.others: SourceReport | None = None  # what lanes did that were forgotten
        self.records = records
        self.completed = completed
        self.on_wake: Callable[[Lane], object] = lambda lane: None
        self.stop_reason: str | None = None
        self.fatal: BaseException | None = None  # raised by a task to end the run, and so by the run to its caller
        self.input_error: BaseException | None = None  # raised by the inputs, and so by the run when all is done
        self.intake_cut = False
        self.begun_at = now
        # A driver may read these: with no lane active and nothing special, `next` would say to wait until `due_at`.
        self.active: deque[Lane] = deque()  # lanes that may have something to start
        self.special = feed is not None and data is None  # whether there may be steps that start no attempt
        self.due_at = INF  # neither a timer nor a timeout is due before
        self.intake = feed if tree is None else tree.roots
        self._feed = feed if data is None else None
        self._data = data
        self._tree = tree
        self._stop = stop
        self._stop_rule = StopRule(stop)
        self._watched = self._stop_rule.counts_successes or any(who is not None for who in (tree, completed, emit))
        self._cap = INF if width is None else width
        self._rng = rng
        self._emit = emit
        self._note = emit or note
        self._log = log
        self._hold = None if probe is None else Hold(probe)
        self._hold_alarm = 0
        self._running: set[Attempt] = set()
        self._pulls: set[Feed] = set()
        self._forget_at = LANES_KEPT  # with so many lanes, those that are as new are forgotten
        self.crowd = 0  # results to come before the intake goes on, where too many lanes have something to do
        self._is_crowded = False
        self._forgotten = 0  # results of lanes that were
        self._last_end = -INF
        self._index = 0
        self._keys: set[Any] = set()
        self._is_routed = False  # whether there are tasks that several sources can do
        self._in_flight: Counter[Allowance] = Counter()  # calls that may give something back to an allowance
        self._short: dict[Lane, None] = {}  # lanes that wait for what calls may give back
        self._smooth: dict[Lane, None] = {}  # lanes that have nothing but turns like most: see `turn`
        self._steps: deque[Step] = deque()
        self.first_start: float | None = None
        self._held = False
        self._over = False
        self._timers = Timers()
        self._scan_at = INF  # no attempt times out before
        self._wait = ON_EVENT
        for lane in lanes:
            self._join(lane)
        if stop.timeout is not None:
            self._set_timer(now + stop.timeout, Timer.DEADLINE, None)

    # ---- what a driver says ------------------------------------------------------------------------------------------

    def next(self, now: float) -> Step:
        """Return the next step."""
        if now >= self.due_at:
            self._tick(now)
        places: float = self._cap
        if self.special:
            step = self._next_special(now)
            if step is not None:
                return step
            if self._held:
                places = 0
        active = self.active
        hold = self._hold
        if hold is not None and self._has_work(now):
            if hold.is_due(now):
                self._hold_alarm = self._set_timer(hold.asked(now), Timer.PROBE, None)
                return self._pull(hold.probe, now)
            if hold.holds(now):
                places = 0
        while active and (places == INF or len(self._running) < places):
            lane = active[0]
            step = self._admit(lane, now)
            if step is None or lane.running >= lane.concurrency or not self._may_go_on(lane):
                active.popleft()
                lane.active = False
            elif len(active) > 1:
                active.rotate(-1)  # the lanes take turns
            if step is not None:
                return step
        if self.special and (self._feed is None or not self._feed.pulling or self.stop_reason is not None):
            # A skip may have stopped the run or made room, and a slow feed is pulled after all that can start.
            step = self._next_special(now)
            if step is not None:
                return step
        if self._running and self.due_at == INF:
            return ON_EVENT
        return self._idle(now)

    def finished(self, attempt: Attempt, outcome: Any, now: float) -> bool:
        """Take the outcome of an attempt: its value, or a Raised.  Return False if it had been given up before."""
        lane = attempt.lane
        try:
            self._running.remove(attempt)
        except KeyError:
            self._late(attempt, outcome, now)
            return False
        lane.running -= 1
        attempt.worker = None  # whoever keeps the attempt is not to keep its worker
        attempt.duration = now - attempt.started_at
        lane.busy_seconds += attempt.duration
        lane.last_answer = now
        if lane.first_answer is None:
            lane.first_answer = now
        if self._may_go_on(lane):
            self._activate(lane)
        used = None
        is_refused = type(outcome) is Raised and outcome.throttled
        if attempt.view is not None or not attempt.is_plain or is_refused:
            used = self._count_usage(attempt, is_refused=is_refused)
            attempt.view = None  # what it records from now on comes too late
        if self._emit is not None:
            self._tell_end("answer", now, attempt, _outcome_word(outcome), used)
        if type(outcome) is Raised:
            lane.took(attempt.duration)
            self._raised(attempt, outcome, now, used)
            return True
        if not self._keeps_bare(attempt):
            lane.took(attempt.duration)
        if lane.gate.active or lane.purse is not None or lane.supply is not None:
            self._tell_gate(attempt, now, True, used)
            self._adapt(attempt, now, congested=False)
        attempt.outcome = outcome
        self._end(attempt, SUCCEEDED, now)
        return True

    def turn(self, attempt: Attempt, outcome: Any, now: float) -> Step:
        """Do what `finished` and then `next` would, in one call.

        What most turns are is written out here: a bare payload has succeeded at once, nobody watches, nothing else is
        due, and the lane goes on with another.  The rules are those of the methods that it stands for.
        """
        lane = attempt.lane
        if (
            lane.calm is not lane.gate.calm
            or now >= self.due_at
            or not attempt.is_plain
            or type(outcome) is Raised
        ):
            self.finished(attempt, outcome, now)
            step = self.next(now)
            self._smoothen(lane, now)
            return step
        started_at = attempt.started_at
        duration = now - started_at
        lane.busy_seconds += duration
        lane.last_answer = now
        records = self.records
        if records is not None:
            records[attempt.index] = kept = (attempt.payload, outcome, lane.name, started_at, duration)
            if self._log is not None:
                self._log.append((attempt.index, kept, attempt.entry, lane))
                attempt.entry = None
        lane.success_count += 1
        lane.delivered = delivered = lane.delivered + 1
        budget, take_call = lane.budget, lane.take_call
        if (
            (delivered < lane.resume_at or self._refills(lane, now))
            and lane.raw
            and (budget is None or budget >= 1)
            and (take_call is None or take_call(now, CATCH_UP))
        ):
            # The same object serves again: all that their tasks have in common is kept.
            lane.calls += 1
            if budget is not None:
                lane.budget = budget - 1
            attempt.index, attempt.payload = lane.raw.popleft()
            attempt.view = None
            attempt.started_at = now
            return attempt
        self._running.remove(attempt)
        lane.running -= 1
        attempt.worker = attempt.view = None
        if self._may_go_on(lane):
            self._activate(lane)
        if self.crowd:
            self._thin(now)
        return self.next(now)

    def _smoothen(self, lane: Lane, now: float) -> None:
        """Note if the turns of a lane are what most turns are, until something says otherwise (`_ruffle`)."""
        gate = lane.gate
        calm = gate.calm  # first: another thread may change the gate while it is being looked at
        if (
            not self._watched
            and not lane.accounts
            and lane.is_bare
            and not lane.is_kept
            and not lane.heap
            and not lane.fifo
            and not lane.abandoned
            and (self._feed is None or not self._feed.slow)
            and self._hold is None
            and lane.first_answer is not None
            and self._cap == INF  # else other lanes may be waiting for the place
            and gate.is_calm(now)
            and self._scan_at <= now + lane.timeout
            and self.stop_reason is None
        ):
            self._smooth[lane] = None
            lane.calm = calm
            lane.take_call = gate.take_call if gate.active else None

    def _ruffle(self) -> None:
        """Note that no lane's turns may be what most turns are."""
        for lane in self._smooth:
            lane.calm = None
        self._smooth.clear()

    def offered(
        self,
        feed: Feed,
        ended: bool,
        error: BaseException | None,
        now: float,
    ) -> None:
        """Note that a pull is over: take what has arrived, perhaps the end, perhaps the error that ended it."""
        if feed not in self._pulls:  # it had been given up
            return
        self._pulls.remove(feed)
        feed.pulling = False
        if self._hold is not None and feed is self._hold.probe:
            self._probed(self._hold, error, now)
            return
        if feed.kind is FeedKind.SUPPLY:
            self._supplied(feed, error, now)
            return
        self._collect(feed, now)
        took = now - feed.pulled_at
        was_late, feed.was_late = feed.was_late, took > SLOW_PULL
        feed.slow = (was_late and feed.was_late) or took > HELD_UP
        feed.ended = ended
        if feed.slow:
            self._ruffle()  # it is pulled item by item beside what runs, at every turn
        if self._tree is not None:
            self._tree.returned(feed, ended)
        if error is not None:
            self._feed_failed(feed, error, now)
        if feed.lane is not None:
            self._activate(feed.lane)
        if len(self.lanes) >= self._forget_at and feed is self._feed:  # no item is on its way to any of them
            self._forget_at = 2 * max(LANES_KEPT, self.forget_idle(now))
            if sum(lane.taken > lane.delivered for lane in self.lanes) >= 2 * LANES_KEPT and not ended:
                feed.blocked += 1
                self._is_crowded = True
                self.crowd = LANES_KEPT // 2
                self._forget_at = LANES_KEPT
                if sum(lane.taken - lane.delivered for lane in self.lanes) < self.crowd:
                    self.thinned(now)  # a consumer was quick: as many may not come

    def _probed(self, hold: Hold, error: BaseException | None, now: float) -> None:
        """Note what the probe has said."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.fatal = error
            self.cancel(type(error).__name__, now, "abandon")
            return
        self._timers.drop(self._hold_alarm)
        word = hold.answered(now)
        if hold.looks_at < INF:
            self._set_timer(hold.looks_at, Timer.PROBE, None)
        if word:
            self._tell(word, now, None)

    def _supplied(self, feed: Feed, error: BaseException | None, now: float) -> None:
        """Note what was fetched for a lane."""
        lane = feed.lane
        assert lane is not None
        if error is not None:
            self.fatal = self.fatal or error
            self.cancel("store", now, "abandon")
            return
        supply = lane.supply
        for permit in feed.arrived.popleft() if feed.arrived else ():
            supply.brought(permit, now)
        self._activate(lane)

    def _has_work(self, now: float) -> bool:
        """Say whether there may be something to start: else a probe is not asked."""
        if self.stop_reason is not None or not self._may_start():
            return False
        if self._is_routed:
            return bool(self.active) and any(lane.fifo or lane.heap for lane in self.lanes)
        for lane in self.active:
            if self._data is not None and lane.resume_at == INF:
                self._refill(lane, now)
            if lane.raw or lane.fifo or lane.heap or self._tree is not None:
                return True
        return False

    def forget_idle(self, now: float) -> int:
        """Forget the lanes that are as if they were new: keys without a bound are not to fill the memory.

        What they did is summed up in `others`.  Return how many are left.
        """
        kept, others = [], SourceReport(OTHERS)
        if self.others is not None:
            others.add(self.others)
        for lane in self.lanes:
            if not lane.is_as_new(now):
                kept.append(lane)
                continue
            lane.forgotten = True
            if lane.callers:  # one has come in the same instant, and has looked before
                lane.forgotten = False
                kept.append(lane)
                continue
            lane.gate.leave(lane)
            lane.joined = False
            others.add(lane.report(self.begun_at))
            self._last_end = max(self._last_end, lane.last_end)
            self._forgotten += lane.ended_count
        if len(kept) < len(self.lanes):
            self.lanes = kept  # before the others have it: whoever looks on counts nothing twice
            self.others = others
            self._smooth = {lane: None for lane in self._smooth if lane.joined}
        return len(kept)

    def thinned(self, now: float) -> None:
        """Go on with the intake: of the many lanes that had something to do some have less."""
        if self._is_crowded:
            self._is_crowded = False
            self.crowd = 0
            self._unblock()

    def submitted(self, attempt: Attempt, now: float) -> None:
        """Take one task that comes from outside, not from the feed."""
        if self._over:  # its lane may be another run's by now
            return
        self._take(attempt, None, now)
        if len(self.lanes) >= self._forget_at:
            self._forget_at = 2 * max(LANES_KEPT, self.forget_idle(now))
        if self.stop_reason is not None:
            self._cancel_waiting(now)

    def closed(self, feed: Feed, now: float) -> None:
        """Say that nothing more will come from outside."""
        feed.ended = True

    def delivered(self, lane: Lane, now: float) -> None:
        """Note that a consumer made room in a lane."""
        if lane.delivered >= lane.resume_at:
            self._resume(lane)

    def revoked(self, attempt: Attempt, now: float) -> None:
        """Undo an admission: no worker picked the attempt up before it was given up."""
        lane = attempt.lane
        if self._emit is not None:
            self._tell_end("revoked", now, attempt, str(attempt.reason), None, -1)
        lane.calls -= 1
        lane.abandoned -= 1
        lane.busy_seconds -= attempt.duration
        if lane.budget is not None:
            lane.budget += 1
        attempt.number -= 1
        if _is_singular(attempt.amount):
            lane.count_usage(attempt.amount, None, -1)
        lane.gate.revoke(attempt.amount)
        if lane.purse is not None:
            lane.purse.undo(attempt.holds)
            self._look_again()

    def given_up(self, attempt: Attempt) -> None:
        """Note that an attempt that was given up had been made: a worker had begun with it."""
        attempt.lane.took(attempt.duration)

    def withdrawn(self, attempt: Attempt, reason: str, now: float) -> None:
        """Cancel one task, wherever it is: whoever submitted it no longer waits for it."""
        attempt = attempt.latest
        if self._over or attempt.status is not None:
            return
        if attempt in self._running:
            self._abandon(attempt, now, reason, None)
        else:
            self._take_from_queue(attempt)
        self._cancel_one(attempt, now, reason)

    def wake(self, lane: Lane, now: float) -> None:
        """Note that a lane may go earlier than it was told: another, maybe of another run, had an outcome."""
        self._activate(lane)

    def cancel(self, reason: str, now: float, in_flight: str | None = None) -> None:
        """Stop: admit nothing more; drain or abandon what runs, as the policy or `in_flight` says."""
        if self._over:
            return
        if self.stop_reason is None:
            self._halt(reason, now, in_flight)
        elif in_flight == "abandon":
            self._abandon_all(now)

    def alarm_at(self, at: float, ring: Callable[[float], object], now: float) -> None:
        """Have `ring(now)`, which is no user code, called at an instant, unless the run is over by then."""
        self._set_timer(at, Timer.ALARM, ring)

    # ---- intake ------------------------------------------------------------------------------------------------------

    def _join(self, lane: Lane) -> None:
        lane.joined = True
        lane.forgotten = False
        self.lanes.append(lane)
        lane.guarded = lane.guarded or self._tree is not None
        self._activate(lane)

    def _next_special(self, now: float) -> Step | None:
        """Return a step that is not the start of an attempt, if there is one; a stopped run starts nothing more."""
        if self._steps:
            return self._steps.popleft()
        if self.stop_reason is not None:
            return self._idle(now)
        self._held = False
        feed = self._feed
        if feed is None or feed.ended or (feed.blocked and not feed.pulling):
            self.special = False
            return None
        if feed.pulling:
            if feed.arrived and self._collect(feed, now):  # a bad item was the last straw
                return self._idle(now)
            # A quick feed fills the queues first: whoever pulls will be back at once, and nobody need be woken.
            if not feed.slow and now < feed.hold_until:
                self._held = True
                self.due_at = min(self.due_at, feed.hold_until)
        elif not (feed.slow and self._may_start()):
            return self._pull(feed, now)
        return None

    def _may_start(self) -> bool:
        return bool(self.active) and len(self._running) < self._cap

    def _pull(self, feed: Feed, now: float) -> Feed:
        feed.pulling = True
        feed.pulled_at = now
        if feed.was_late:
            feed.wanted = 1
        elif feed.lane is not None and feed.kind is FeedKind.INPUTS:
            feed.wanted = feed.lane.room  # all of it is for this one lane
        else:
            feed.wanted = feed.handful
        if feed.hold_until == -INF:
            feed.hold_until = now + PULL_GRACE
        self._pulls.add(feed)
        return feed

    def _refills(self, lane: Lane, now: float) -> bool:
        """Go on with the intake; return whether that was all, as it is where the inputs are plain data."""
        self._resume(lane)
        if self._data is None:
            return False
        self._refill(lane, now)
        return self.stop_reason is None

    def _refill(self, lane: Lane, now: float) -> None:
        """Take inputs that are plain data, up to the lane's capacity."""
        data = self._data
        assert data is not None
        room, index = lane.room, self._index
        items = list(zip(range(index, index + room), data, strict=False))
        if len(items) < room:
            self._data = None
        if any(issubclass(kind, Task) for kind in {type(item) for _, item in items}):
            for _, item in items:
                task = item if isinstance(item, Task) else None
                self._take(Attempt(item if task is None else task.payload, task, lane), None, now)
        else:
            lane.raw.extend(items)
            self._index += len(items)
            lane.taken += len(items)
            self._leave_room(len(items))
        lane.rest()
        if lane.delivered >= lane.resume_at:
            lane.resume_at = INF
        if self.stop_reason is not None:
            self._cancel_waiting(now)

    def _draw(self, lane: Lane, count: int) -> None:
        """Queue some of the bare payloads of a lane as the tasks that they are."""
        raw = lane.raw
        for _ in range(count):
            index, payload = raw.popleft()
            attempt = Attempt(payload, None, lane)
            attempt.index = index
            lane.fifo.append(attempt)

    def _leave_room(self, count: int) -> None:
        """Leave room for what is to be kept of so many tasks more."""
        if self.records is not None:
            self.records.extend([None] * count)

    def _take(self, attempt: Attempt, feed: Feed | None, now: float) -> None:
        route = attempt.route
        if route is not None:
            for each in route.ranks:
                if not each.joined:
                    self._join(each)
            attempt.lane = self._best_lane(attempt, route, now)
            self._is_routed = True
        lane = attempt.lane
        if not lane.joined:
            self._join(lane)
        attempt.index = self._index
        self._index += 1
        lane.taken += 1
        if self.records is not None:
            self.records.append(None)
        if feed is not None and lane.taken - lane.delivered > lane.full_at:
            self._rest(lane, feed)
        if (attempt.task is not None or attempt.status is not None) and self._refused(attempt, now):
            return
        if attempt.rank is None:
            self._draw(lane, len(lane.raw))
            lane.fifo.append(attempt)
        else:
            heappush(lane.heap, (attempt.rank, attempt))
        self._ruffle()
        self._activate(lane)
        if route is not None and lane.running + len(lane.fifo) + len(lane.heap) > lane.concurrency:
            self._offer(route)

    def _refused(self, attempt: Attempt, now: float) -> bool:
        """Give a task its rank, or its result at once: a bad item, a duplicate, one its source does not support."""
        task = attempt.task
        if attempt.rank is not None:  # its place in the tree
            attempt.rank = (*attempt.rank, attempt.index)
        elif task is not None and task.priority:
            attempt.rank = (task.priority, attempt.index)
        if attempt.status is not None:  # it was recalled
            self._recalled(attempt, attempt.status, now)
            return True
        assert task is not None
        is_routed = attempt.route is not None  # and was checked for each source
        if attempt.outcome is None and attempt.reason is None and not is_routed:
            try:
                refuse_routes(task)
                if task.amount != 1:
                    attempt.lane.check(task.amount)
            except ValueError as error:
                attempt.outcome = Raised(error)
        if attempt.outcome is not None:
            self._end(attempt, ERROR, now)
        elif attempt.reason is not None:
            self._end(attempt, SKIPPED, now)
        elif self._is_duplicate(task):
            attempt.reason = "duplicate"
            self._end(attempt, SKIPPED, now)
        else:
            return False
        return True

    def _recalled(self, attempt: Attempt, status: TaskStatus, now: float) -> None:
        """Give a task the result that a journal has of it."""
        if self._is_duplicate(attempt.task):
            attempt.reason, attempt.outcome = "duplicate", None
            self._end(attempt, SKIPPED, now)
            return
        if self.stop_reason is not None:
            attempt.outcome = None
            self._cancel_one(attempt, now)
            return
        attempt.lane.stats.recalled += 1
        self._tell("recalled", now, attempt, status.value)
        self._end(attempt, status, now, recalled=True)

    def _is_duplicate(self, task: Task[Any] | None) -> bool:
        """Say whether another task of the same key was taken before."""
        if task is None or task.key is None:
            return False
        if task.key in self._keys:
            return True
        self._keys.add(task.key)
        return False

    def _rest(self, lane: Lane, feed: Feed) -> None:
        """Let the feed rest when a lane could not take another handful."""
        if self._tree is None and lane.resume_at == INF:
            lane.rest()
            feed.blocked += 1

    def _resume(self, lane: Lane) -> None:
        """Go on with the intake: the lane has room again."""
        lane.resume_at = INF
        self._activate(lane)
        self._unblock()

    def _unblock(self) -> None:
        feed = self._feed
        if feed is not None:
            self.special = True
            feed.blocked -= 1
            feed.hold_until = -INF

    def _thin(self, now: float) -> None:
        """Count a task that is over while there is a crowd of lanes; a consumer does it where there is one."""
        if self.completed is None:
            self.crowd -= 1
            if self.crowd == 0:
                self.thinned(now)

    def _collect(self, feed: Feed, now: float) -> bool:
        """Take what a feed has brought so far; return whether the run has stopped."""
        arrived = feed.arrived
        while arrived:
            kind = type(arrived[0])
            if kind is tuple:
                self._collect_bare(feed)
            elif kind is NodeKey:
                self._collect_nodes(feed)
            elif kind is Known:
                self._collect_known(feed, now)
            else:
                self._take(arrived.popleft(), None if feed.kind is FeedKind.NODES else feed, now)
        if self.stop_reason is not None:
            self._cancel_waiting(now)
        return self.stop_reason is not None

    def _collect_nodes(self, feed: Feed) -> None:
        """Take the nodes at the head of what a feed has brought."""
        assert self._tree is not None
        arrived, keys = feed.arrived, []
        while arrived and type(arrived[0]) is NodeKey:
            keys.append(arrived.popleft())
        self._tree.nodes_came(feed, keys, self.lanes)
        for lane in self.lanes:
            self._activate(lane)

    def _collect_known(self, feed: Feed, now: float) -> None:
        """Take the values at the head of what a feed has brought that a journal has: each is a result."""
        arrived, records = feed.arrived, self.records
        while arrived and type(arrived[0]) is Known:
            lane, payload, value, started_at, duration, entry = arrived.popleft()
            if self._watched or records is None:
                attempt = Attempt(payload, None, lane)
                attempt.entry = entry
                attempt.number, attempt.outcome, attempt.status = 1, value, SUCCEEDED
                attempt.started_at, attempt.duration = started_at, duration
                self._take(attempt, feed, now)
                continue
            if not lane.joined:
                self._join(lane)
            records.append((payload, value, lane.name, started_at, duration))
            self._index += 1
            lane.taken += 1
            lane.delivered += 1
            lane.success_count += 1
            lane.stats.recalled += 1

    def _collect_bare(self, feed: Feed) -> None:
        """Take the bare payloads at the head of what a feed has brought: a task is made of each when it starts."""
        arrived = feed.arrived
        index = first = self._index
        while arrived:
            item = arrived.popleft()
            if type(item) is not tuple:
                arrived.appendleft(item)
                break
            lane, payload = item
            if not lane.active and lane.running < lane.concurrency:
                if not lane.joined:
                    self._join(lane)
                self._activate(lane)
            lane.raw.append((index, payload))
            index += 1
            lane.taken = taken = lane.taken + 1
            if taken - lane.delivered > lane.full_at and lane.resume_at == INF:
                self._rest(lane, feed)
        self._index = index
        self._leave_room(index - first)

    def _feed_failed(self, feed: Feed, error: BaseException, now: float) -> None:
        """An input iterator that raises ends the intake, and is raised again at the end; a plan's error is a result."""
        if isinstance(error, StorageError):  # what a journal knows cannot be read: the input is not to blame
            self.fail(error, now)
            return
        if feed.node is None:
            self.input_error = error
            self.intake_cut = True
            self._tell("stop", now, None, "input_error")
            return
        assert feed.lane is not None
        attempt = feed.ready(Raised(error))
        attempt.reason = feed.label
        self._take(attempt, None, now)

    # ---- admission ---------------------------------------------------------------------------------------------------

    def _admit(self, lane: Lane, now: float) -> Step | None:
        """Return what a lane starts or pulls now; None if it must wait, its alarm then being set."""
        tree = self._tree
        if tree is not None and (feed := tree.next_feed(lane)) is not None:
            return self._pull(feed, now)
        if lane.supply is not None and lane.supply.news and lane.supply.asks:
            return self._pull(lane.supply.feed, now)
        if lane.running >= lane.concurrency:
            return None
        if lane.raw and lane.calm is lane.gate.calm and lane.takes_one(now):
            index, payload = lane.raw.popleft()
            fresh = Attempt(payload, None, lane)
            fresh.index = index
            return self._begin(fresh, lane.timeout, now)
        while True:
            if self._data is not None and lane.resume_at == INF:
                self._refill(lane, now)
                if self.stop_reason is not None:  # a bad item was the last straw
                    return None
            if lane.raw and not lane.fifo:
                self._draw(lane, 1)
            attempt = lane.fifo[0] if lane.fifo and not lane.heap else lane.head()
            if attempt is None and self._is_routed:
                attempt = self._help_out(lane, now)
            if attempt is None:
                if self._data is not None and lane.resume_at == INF:
                    continue  # all that was taken had its result at once
                if lane.supply is not None and lane.supply.is_left_over():
                    return self._pull(lane.supply.feed, now)
                # What was there may have been skipped: there may be more to pull now.
                feed = None if tree is None else tree.next_feed(lane)
                return None if feed is None else self._pull(feed, now)
            if lane.guarded or lane.gate.active:
                until = self._ask_gates(lane, attempt, now)
                if until > now:
                    lane.calm = None  # it has a task that goes before the bare payloads
                    if self._is_routed:
                        self._offer_once(attempt)
                    self._wake_at(lane, until, now)
                    if lane.supply is not None and lane.supply.asks:
                        return self._pull(lane.supply.feed, now)
                    return None
                if attempt.status is not None:  # skipped
                    if self.stop_reason is not None:  # ... as the last straw
                        return None
                    continue
                if attempt.lane is not lane:  # it went on to another source
                    continue
            timeout = lane.timeout
            if lane.accounts or not attempt.is_plain:
                timeout = lane.account(attempt, now)
            elif lane.budget is not None:
                lane.budget -= 1
            if lane.heap:
                lane.pop(attempt)
            else:
                lane.fifo.popleft()
            return self._begin(attempt, timeout, now)

    def _wake_at(self, lane: Lane, at: float, now: float) -> None:
        """Have a lane look at an instant to come whether it may go on."""
        if now < at < lane.wake_at:
            lane.wake_at = at
            self._set_timer(at, Timer.LANE, lane)

    def _begin(self, attempt: Attempt, timeout: float, now: float) -> Attempt:
        lane = attempt.lane
        attempt.number += 1
        attempt.started_at = now
        attempt.timeout = timeout
        if now + timeout < self._scan_at:
            self._scan_at = now + timeout
            self.due_at = min(self.due_at, self._scan_at)
        if self.first_start is None:
            self.first_start = now
        self._running.add(attempt)
        lane.running += 1
        lane.calls += 1
        if self._emit is not None:
            self._tell("start", now, attempt)
        return attempt

    def _ask_gates(self, lane: Lane, attempt: Attempt, now: float) -> float:
        """Return `now` or before if all say yes, or if the task was skipped; else when to ask again."""
        if lane.adaptive is not None and lane.gate.forgets(now):
            self._take_over_limit(lane, attempt, now)
            if lane.running >= lane.concurrency:
                return INF
        if self._tree is not None and (until := self._tree.hold_until(lane, attempt)) > now:
            return until
        gate, trail = lane.gate, attempt.trail
        breaker = gate.breaker
        shut = breaker is not None and breaker.state is not CLOSED
        hangs = lane.hangs
        if hangs:
            if now < lane.settles_at:
                return lane.settles_at
            gate.keep_shut(now)
        funds = self._funds(lane, attempt, now)
        if funds is Standing.LATER:
            self._short[lane] = None
            return INF  # what runs may turn out to use less
        spent = funds is Standing.NEVER
        if (shut or hangs or spent) and (
            self._passed_on(attempt, spent, now) or self._skipped(lane, attempt, spent, now)
        ):
            return now
        if trail is not None and trail.route is not None and lane.is_shut(now):
            self._offer(trail.route)  # another may be back before
        if lane.batch_size is not None and attempt.is_new and (until := lane.batch_takes_at()) > now:
            return until
        purse = lane.purse
        parts = () if purse is None else purse.parts(attempt.amount)
        if lane.adaptive is not None and not self._has_share(lane, lane.adaptive.quota_share, parts):
            self._short[lane] = None
            return INF  # a call runs, and will end
        until = now
        if gate.active:
            amount = 1 if attempt.task is None else attempt.task.amount
            while (until := gate.admit(attempt, amount, now)) > now and self._watches(lane, until):
                pass  # ask again, lest what is watched for came in between
        supply = lane.supply
        if supply is not None and until <= now:
            until = supply.ready_at(attempt.amount, now)
            if until > now and gate.active:
                gate.retract(attempt, attempt.amount)
        if until > now:
            return until
        if purse is not None:
            holds = purse.reserve(parts)
            if holds is None:  # another run was quicker
                if gate.active:
                    gate.retract(attempt, attempt.amount)
                return self._ask_gates(lane, attempt, now)
            attempt.holds = holds
            self._in_flight.update(purse.allowances)
        if supply is not None:
            supply.take(attempt)
        return now

    def _funds(self, lane: Lane, attempt: Attempt, now: float) -> Standing:
        """Say whether a lane can pay for a task: now, later if calls in flight give something back, or never."""
        trail = attempt.trail
        has_budget = attempt.lane is lane and trail is not None and trail.has_budget
        if lane.budget is not None and lane.budget < 1 and not has_budget:
            return Standing.NEVER
        purse = lane.purse
        supply = lane.supply
        if supply is not None and purse is not None and supply.is_spent(now, attempt.amount):
            is_used = any(self._in_flight[allowance] for allowance in purse.allowances)
            return Standing.LATER if is_used and supply.might_return(attempt.amount) else Standing.NEVER
        if purse is None or purse.fits(parts := purse.parts(attempt.amount)):
            return Standing.NOW
        may_get_back = any(self._in_flight[allowance] for allowance in purse.allowances)
        return Standing.LATER if may_get_back and purse.might_fit(parts) else Standing.NEVER

    def _has_share(self, lane: Lane, share: float, parts: Parts) -> bool:
        """Say whether with another call no more would be in flight than a share of what is left; one always may be."""
        if lane.budget is not None and lane.running and lane.running + 1 > share * (lane.budget + lane.running):
            return False
        return lane.purse is None or lane.purse.is_within(parts, share, self._in_flight)

    def _look_again(self) -> None:
        """Have lanes that wait for what others may give back ask again."""
        for lane in self._short:
            self._activate(lane)
        self._short.clear()

    def _watches(self, lane: Lane, until: float) -> bool:
        """Have a lane woken when it may go before it was told, be it after another run's outcome.

        Return whether that is new.
        """
        if until < INF:
            return lane.gate.await_relief(lane, lambda: self.on_wake(lane))
        if lane.watching:
            return False

        def wake() -> None:
            lane.watching = False
            self.on_wake(lane)

        lane.watching = True
        lane.gate.watch(lane, wake)
        return True

    def _skipped(self, lane: Lane, attempt: Attempt, spent: bool, now: float) -> bool:
        """Skip a task that will never be admitted; one that was tried before keeps the failure it had.

        `spent`: what it may use is used up.
        """
        trail = attempt.trail
        if spent:
            reason = "budget_exhausted"
        elif lane.gate.skips(now) or (lane.gate.breaker is None and lane.hangs):
            reason = "breaker_open"
        else:
            return False
        lane.pop(attempt)
        attempt.lane.return_budget(attempt)
        attempt.reason = reason
        if trail is None or trail.error is None:
            self._end(attempt, SKIPPED, now)
        else:
            self._fail_for_good(attempt, trail.error, now)
        return True

    # ---- outcomes ----------------------------------------------------------------------------------------------------

    def _raised(
        self, attempt: Attempt, raised: Raised, now: float, used: Mapping[str, float] | None
    ) -> None:
        error = raised.error
        exits = isinstance(error, (SystemExit, KeyboardInterrupt))
        says_nothing = raised.cancelled or raised.throttled or exits
        self._tell_gate(attempt, now, None if says_nothing else False, used)
        if raised.throttled:
            self._adapt(attempt, now, congested=True)
            self._throttled(attempt, raised, now)
        elif raised.cancelled:
            attempt.outcome = raised
            attempt.reason = "task_cancelled"
            self._end(attempt, CANCELLED, now)
        elif exits:
            self.fatal = error
            self._fail(attempt, error, now)
            self.cancel(type(error).__name__, now, "abandon")
        else:
            self._failed(attempt, error, raised.verdict, now)

    def _count_usage(self, attempt: Attempt, *, is_refused: bool = False) -> Mapping[str, float] | None:
        """Count what an attempt that is over used, where that is its own.

        Args:
            is_refused: The source did not take it: unless it has recorded otherwise, it has used nothing.

        Returns:
            What it has recorded, None for nothing.
        """
        amount, view, lane = attempt.amount, attempt.view, attempt.lane
        used = None
        if view is not None and view.used:  # as it is now: a call that was given up may go on recording
            used = lane.completed(amount, view.used)
        elif is_refused:
            used = dict.fromkeys(lane.used_by(amount), 0.0)
        if used is not None:
            attempt.remember().count(lane.used_by(amount, used))
        if used is not None or _is_singular(amount):
            lane.count_usage(amount, used)
        return used

    def _tell_gate(
        self, attempt: Attempt, now: float, verdict: bool | None, used: Mapping[str, float] | None
    ) -> None:
        gate, purse = attempt.lane.gate, attempt.lane.purse
        if purse is not None:
            purse.settle(attempt.holds, used)
            self._in_flight.subtract(purse.allowances)
            self._look_again()
        if attempt.lane.supply is not None:
            attempt.lane.supply.ended(attempt, used)
            if attempt.lane.supply.news:
                self._activate(attempt.lane)
        if not gate.active:
            return
        if used is not None or gate.has_windows:
            gate.forget(attempt.lane)  # it is asked again anyway
        if gate.ended(attempt, attempt.amount, now, verdict, used):
            self._tell("breaker_opened", now, attempt)

    def _adapt(self, attempt: Attempt, now: float, *, congested: bool) -> None:
        """Have an adaptive concurrency follow what became of an attempt."""
        lane = attempt.lane
        if lane.adaptive is None:
            return
        lane.gate.adapt(attempt.started_at, now, lane.running + 1, congested=congested)
        self._take_over_limit(lane, attempt, now)

    def _take_over_limit(self, lane: Lane, attempt: Attempt, now: float) -> None:
        """Have a lane follow what its gate has learned, be it from another run."""
        feedback = lane.gate.feedback
        if feedback is not None and feedback.limit != lane.concurrency:
            lane.concurrency = feedback.limit
            self._tell("concurrency", now, attempt, str(lane.concurrency))

    def _throttled(self, attempt: Attempt, raised: Raised, now: float) -> None:
        """Pause the lane as the source asked; the attempt does not count, unless it asked for too long."""
        lane, error = attempt.lane, raised.error
        lane.stats.throttled += 1
        trail = attempt.remember()
        trail.throttles += 1
        delay = raised.retry_after or backoff_delay(lane.retry, trail.throttles, self._rng)
        if delay > lane.retry.max_retry_after:
            self._fail(attempt, error, now)
            return
        lane.gate.pause(now + delay)  # whatever becomes of this task
        if lane.supply is not None:
            lane.supply.pause(delay)
            self._activate(lane)
        if now + delay >= trail.give_up_at:
            self._fail(attempt, error, now)
        elif self._keeps_trying(attempt, error, now):
            self._tell("throttled", now, attempt, f"{delay:g}")
            attempt.number -= 1
            trail.uncounted += 1
            self._note_try(attempt)
            if attempt.number == 0 and lane.batch_size is not None:  # it is to count once in its batch
                lane.batch_started -= 1
                lane.batch_open -= 1
            self._queue_again(attempt)

    def _failed(self, attempt: Attempt, error: BaseException, verdict: bool | float, now: float) -> None:
        """Try it again if the policy says so, else it failed."""
        retry = attempt.lane.retry
        if verdict is False or attempt.number >= retry.max_attempts:
            self._fail(attempt, error, now)
            return
        delay = backoff_delay(retry, attempt.number, self._rng) if verdict is True else verdict
        trail = attempt.remember()
        if now + delay >= trail.give_up_at:
            self._fail(attempt, error, now)
        elif self._keeps_trying(attempt, error, now):
            attempt.lane.stats.retries += 1
            self._note_try(attempt)
            self._tell("retry", now, attempt, f"{delay:g}")
            self._set_timer(now + delay, Timer.RETRY, attempt)

    def _keeps_trying(self, attempt: Attempt, error: BaseException, now: float) -> bool:
        """Reserve the budget of another attempt; without it, or when the run has stopped, the failure stands."""
        lane, trail = attempt.lane, attempt.remember()
        trail.error = error
        if self.stop_reason is not None:
            self._cancel_one(attempt, now)
            return False
        if self._funds(lane, attempt, now) is Standing.NEVER:
            self._fail(attempt, error, now)
            return False
        if lane.budget is not None:
            lane.budget -= 1
            trail.has_budget = True
        return True

    def _note_try(self, attempt: Attempt) -> None:
        """Have a journal know how often a task that is to be tried again was tried."""
        if self._log is not None:
            self._log.append(Tried(attempt, attempt.number))

    def _queue_again(self, attempt: Attempt) -> None:
        lane, trail = attempt.lane, attempt.trail
        rank = _by_turn(attempt)
        if lane.batch_size is not None and attempt.number:
            rank = (-INF, attempt.index)  # before any new task: its batch waits for it, and they for the batch
        heappush(lane.heap, (rank, attempt))
        self._ruffle()
        if trail is not None and trail.give_up_at < INF:
            self._timers.drop(trail.alarm)
            trail.alarm = self._set_timer(trail.give_up_at, Timer.GIVE_UP, attempt)
        self._activate(lane)

    def _fail(self, attempt: Attempt, error: BaseException, now: float) -> None:
        """The source where a task is has failed for good: another one may try it."""
        if not self._falls_back(attempt, error, now):
            self._fail_for_good(attempt, error, now)

    def _fail_for_good(self, attempt: Attempt, error: BaseException, now: float) -> None:
        attempt.outcome = Raised(error)
        self._end(attempt, _failure(error), now)

    def _end(self, attempt: Attempt, status: TaskStatus, now: float, *, recalled: bool = False) -> None:
        """Give a task its result; one that was recalled was no call of this run, and a failure then stops nothing."""
        attempt.status = status
        if attempt.trail is not None:
            self._timers.drop(attempt.trail.alarm)
        if self.records is not None:
            self.records[attempt.index] = attempt
        lane = attempt.lane
        stats = lane.stats
        if status is SUCCEEDED:
            lane.success_count += 1
            if self.records is not None and self._keeps_bare(attempt):
                kept = (attempt.payload, attempt.outcome, lane.name, attempt.started_at, attempt.duration)
                self.records[attempt.index] = kept if self._tree is None else found(attempt)
            if self._tree is not None:
                self._tree.follow(attempt)
                if attempt.outcome:
                    self._tree.grew(attempt)
        elif status is SKIPPED:
            reason = str(attempt.reason)
            stats.skipped[reason] = stats.skipped.get(reason, 0) + 1
        elif status is CANCELLED:
            stats.cancelled_count += 1
        else:
            stats.failure_count += 1
        if self.completed is not None:
            self.completed.append(attempt)
        else:
            if self._log is not None:
                self._log.append(attempt)
            lane.delivered += 1
            if lane.delivered >= lane.resume_at:
                self._resume(lane)
        if lane.supply is not None:
            self._activate(lane)  # it may have fetched a permit for this one
        if self.crowd:
            self._thin(now)
        if lane.batch_size is not None and attempt.number and not recalled:
            self._batch_ended_one(lane, now)
        if self._emit is not None:
            self._tell("result", now, attempt, status.value)
        if recalled and status is not SUCCEEDED:
            return
        if (last_straw := self._stop_rule.after(status)) is not None:
            self.cancel(last_straw, now)

    def fail(self, error: BaseException, now: float) -> None:
        """End the run for an error that is its caller's: what it brings can be kept no more."""
        self.fatal = self.fatal or error
        self.cancel("journal", now, "abandon")

    @property
    def is_quiet(self) -> bool:
        """Whether no call is under way."""
        return not self._running

    def unsaved(self, items: Iterable[Any], error: BaseException) -> None:
        """Note that some of the log could not be committed: those results are none.  For a run that is over."""
        self.fatal = self.fatal or error
        self.stop_reason = self.stop_reason or "journal"
        for item in items:
            attempt = uncommitted(item)
            if attempt is None:
                continue
            lane = attempt.lane
            if type(attempt.outcome) is Raised:
                lane.stats.failure_count -= 1
            else:
                lane.success_count -= 1
            lane.stats.cancelled_count += 1
            if isinstance(item, Attempt):  # a stream is to hand out the same
                item.status, item.outcome, item.reason = CANCELLED, attempt.outcome, attempt.reason
            if self.records is not None:
                self.records[attempt.index] = attempt

    def _keeps_bare(self, attempt: Attempt) -> bool:
        """Say whether of a task that succeeds only little is kept, from which its latency can be told."""
        is_kept = self.records is not None and self._emit is None and attempt.is_plain
        return is_kept and (attempt.lane.is_bare or self._tree is not None)

    def _batch_ended_one(self, lane: Lane, now: float) -> None:
        lane.batch_open -= 1
        if lane.batch_open == 0 and lane.batch_started == lane.batch_size:
            lane.batch_started = 0
            lane.batch_at = now + lane.batch_backoff
            self._activate(lane)

    def _late(self, attempt: Attempt, outcome: Any, now: float) -> None:
        """An attempt that had been given up came to its end: an answer is dropped, and its worker is no longer lost."""
        attempt.lane.abandoned -= 1
        if not self._over:  # else the lane may be another run's by now
            self._activate(attempt.lane)
        if not (type(outcome) is Raised and outcome.cancelled):  # a call that ended as it was told to gave no answer
            self._tell("late", now, attempt)

    # ---- several sources ---------------------------------------------------------------------------------------------

    def _best_lane(self, attempt: Attempt, route: Route, now: float) -> Lane:
        """Return where a task should go: of the lanes that take it now, else of those that may later, the first.

        Of lanes that are as good as each other, the one that has least to do.
        """
        lanes: Iterable[Lane] = route.ranks
        return min(lanes, key=lambda lane: (self._standing(lane, attempt, now), route.ranks[lane], lane.load))

    def _standing(self, lane: Lane, attempt: Attempt, now: float) -> Standing:
        """Say whether a lane takes a task, apart from its limits, which are waited for."""
        if self._funds(lane, attempt, now) is Standing.NEVER:  # what calls in flight may give back is waited for
            return Standing.NEVER
        gate, breaker = lane.gate, lane.gate.breaker
        if lane.hangs:
            return Standing.NEVER if breaker is None and now >= lane.settles_at else Standing.LATER
        if breaker is not None and breaker.state is not CLOSED:
            if gate.skips(now):
                return Standing.NEVER
            if breaker.ready_at(now) > now:
                return Standing.LATER
        return Standing.NOW

    def _offer(self, route: Route) -> None:
        """Have the lanes that can do a task, and have none of their own, look at it where it waits."""
        route.is_offered = True
        for lane in route.ranks:
            if not (lane.fifo or lane.heap):
                self._activate(lane)

    def _offer_once(self, attempt: Attempt) -> None:
        """Offer a task that has to wait, but not to and fro: whoever takes it over waits with it."""
        route = attempt.route
        if route is not None and not route.is_offered:
            self._offer(route)

    def _help_out(self, lane: Lane, now: float) -> Attempt | None:
        """Take over, for a lane that has nothing to do, a task that waits in another: the first that it takes now."""
        if lane.is_shut(now) and not self._reopens(lane, now):
            return None
        reachable = sorted(self._within_reach(lane, now), key=_by_turn)
        takable = (other for other in reachable if self._standing(lane, other, now) is Standing.NOW)
        attempt = next(takable, None)
        if attempt is not None and attempt.trail is not None and attempt.trail.route is not None:
            attempt.trail.route.was_taken_over(now)
            attempt.lane.take_out(attempt)
            self._move(attempt, lane)
        return attempt

    def _reopens(self, lane: Lane, now: float) -> bool:
        """Have a lane that is shut, and has nothing to do, look again when its breaker may let something through."""
        breaker = lane.gate.breaker
        if breaker is None:
            return False
        ready_at = breaker.ready_at(now)
        if ready_at < INF:
            self._wake_at(lane, ready_at, now)
            return False
        return self._watches(lane, INF) and not lane.is_shut(now)  # a probe of another run is out

    def _within_reach(self, lane: Lane, now: float) -> Iterator[Attempt]:
        """Give the tasks that wait in lanes which are no better for them, or shut, and that were not tried there."""
        for other in self.lanes:
            if other is lane:
                continue
            is_shut = other.is_shut(now)
            for attempt in other.waiting():
                trail = attempt.trail
                if attempt.number or trail is None or trail.route is None or trail.uncounted:
                    continue
                ranks = trail.route.ranks
                if lane in ranks and trail.route.may_be_taken_over(now) and (is_shut or ranks[lane] <= ranks[other]):
                    yield attempt

    def _passed_on(self, attempt: Attempt, spent: bool, now: float) -> bool:
        """Hand a task that its lane does not take to one that does, or at least will."""
        route = attempt.route
        if route is None:
            return False
        lane, other = attempt.lane, self._best_lane(attempt, route, now)
        if other is lane or self._standing(other, attempt, now) >= self._standing(lane, attempt, now):
            return False
        lane.pop(attempt)
        self._reroute(attempt, route, other, "budget_exhausted" if spent else "breaker_open", now)
        return True

    def _falls_back(self, attempt: Attempt, error: BaseException, now: float) -> bool:
        """Hand a task with which its source has failed for good to another one, if there is one for it."""
        route = attempt.route
        if route is None or self.stop_reason is not None or isinstance(error, (SystemExit, KeyboardInterrupt)):
            return False
        route.ranks.pop(attempt.lane, None)
        if not route.ranks:
            return False
        other = self._best_lane(attempt, route, now)
        if self._standing(other, attempt, now) is Standing.NEVER:
            return False
        attempt.remember().error = error
        self._reroute(attempt, route, other, _failure(error).value, now)
        return True

    def _reroute(self, attempt: Attempt, route: Route, other: Lane, reason: str, now: float) -> None:
        """Have a task that is in no queue begin anew with another source."""
        trail = attempt.remember()
        self._tell("rerouted", now, attempt, other.name)
        attempt.lane.stats.rerouted += 1
        was_called = attempt.number > 0 or trail.uncounted > 0
        if was_called:  # where it was tried it does not come back, and begin to count anew
            route.ranks.pop(attempt.lane, None)
        hop = Hop(attempt.lane.name, attempt.number, reason, trail.error if was_called else None)
        route.leave(hop, attempt.usage_here)
        attempt.lane.return_budget(attempt)
        self._timers.drop(trail.alarm)
        trail.begin()
        attempt.number = 0
        self._move(attempt, other)
        route.is_offered = False

    def _move(self, attempt: Attempt, other: Lane) -> None:
        """Have a task that is in no queue wait in another lane, in its turn."""
        lane = attempt.lane
        if lane.supply is not None:
            self._activate(lane)
        lane.taken -= 1
        if lane.resume_at < INF:
            lane.resume_at -= 1
            if lane.delivered >= lane.resume_at:  # it has room again, and nothing to do: it is not to look for that now
                lane.resume_at = INF
                self._unblock()
        other.taken += 1
        if other.resume_at < INF:
            other.resume_at += 1
        elif self._feed is not None and other.taken - other.delivered > other.full_at:
            self._rest(other, self._feed)
        attempt.lane = other
        heappush(other.heap, (_by_turn(attempt), attempt))
        self._ruffle()
        self._activate(other)

    # ---- time --------------------------------------------------------------------------------------------------------

    def _set_timer(self, at: float, timer: Timer, what: Any) -> int:
        if at < self.due_at:
            self.due_at = at
        return self._timers.set(at, timer, what)

    def _may_go_on(self, lane: Lane) -> bool:
        """Say whether a lane may have more to start, or to pull, as far as can be told at a glance."""
        has_some = bool(lane.raw or lane.fifo or lane.heap)
        return has_some or self._data is not None or self._tree is not None or self._is_routed

    def _activate(self, lane: Lane) -> None:
        if not lane.active:
            lane.active = True
            self.active.append(lane)

    def _tick(self, now: float) -> None:
        if now >= self._scan_at:
            self._scan(now)
        timers = self._timers
        while timers.next_at <= now:
            timer, what = timers.pop()
            if timer is Timer.LANE:
                what.wake_at = INF
                self._activate(what)
            elif timer is Timer.RETRY:
                self._queue_again(what)
            elif timer is Timer.DEADLINE:
                self.cancel("timeout", now)
            elif timer is Timer.DRAINED:
                self._abandon_all(now)
            elif timer is Timer.GIVE_UP:
                self._give_up(what, now)
            elif timer is Timer.HANGS:
                self._shut_if_hung(what, now)
            elif timer is Timer.ALARM:
                what(now)
            elif timer is Timer.PULLS:
                self._drop_pulls(now)
        self.due_at = min(self._scan_at, timers.next_at)

    def _give_up(self, attempt: Attempt, now: float) -> None:
        """End a task whose time is over while it waits for another attempt: the failure it had stands."""
        trail = attempt.trail
        if trail is None or now < trail.give_up_at:  # it is with another source by now
            return
        if trail.error is not None and attempt.lane.take_out(attempt):
            attempt.lane.return_budget(attempt)
            self._fail(attempt, trail.error, now)

    def _scan(self, now: float) -> None:
        """Time out what is over its time.  Runs seldom: not before the earliest time-out known at the last scan."""
        self._scan_at = INF
        self._ruffle()
        for attempt in sorted(self._running, key=_by_index):
            if attempt not in self._running:  # the one before has stopped the run
                continue
            # What is handed over to a worker that has not come to it yet cannot time out.
            deadline = (attempt.started_at if attempt.is_begun else now) + attempt.timeout
            if deadline <= now:
                self._time_out(attempt, now)
            else:
                self._scan_at = min(self._scan_at, deadline)

    def _time_out(self, attempt: Attempt, now: float) -> None:
        lane = attempt.lane
        self._abandon(attempt, now, "timeout", False)
        if lane.hangs:
            self._set_timer(lane.settles_at, Timer.HANGS, attempt)
        error = TaskTimeoutError(f"no answer after {attempt.timeout:g} s")
        self._failed(self._replaced(attempt), error, lane.retries_timeouts, now)

    def _shut_if_hung(self, attempt: Attempt, now: float) -> None:
        """Shut a lane's gate if as many calls hang as may; those that ended when they were told to do not."""
        lane = attempt.lane
        if lane.hangs and lane.gate.keep_shut(now):
            self._tell("breaker_opened", now, attempt, "too many calls hang")
        self._activate(lane)

    def _abandon(self, attempt: Attempt, now: float, reason: str, verdict: bool | None) -> None:
        lane = attempt.lane
        self._running.remove(attempt)
        lane.running -= 1
        lane.abandoned += 1
        lane.guarded = True
        lane.settles_at = now + SETTLING
        attempt.is_plain = False  # its late answer is to be seen as one
        self._ruffle()
        attempt.reason = reason
        attempt.duration = max(0.0, now - attempt.started_at)  # a worker that begins just now reads its clock later
        lane.busy_seconds += attempt.duration
        lane.last_given_up = now
        used = self._count_usage(attempt)
        if self._note is not None:
            kind, detail = ("timeout", "") if verdict is False else ("abandoned", reason)
            self._tell_end(kind, now, attempt, detail, used)
        self._tell_gate(attempt, now, verdict, used)
        if verdict is False:
            self._adapt(attempt, now, congested=True)
        self._steps.append(Cancel(attempt, reason))
        self.special = True
        self._activate(lane)

    def _replaced(self, attempt: Attempt) -> Attempt:
        other = attempt.successor()
        other.started_at, other.duration = attempt.started_at, attempt.duration
        return other

    # ---- stopping ----------------------------------------------------------------------------------------------------

    def _halt(self, reason: str, now: float, in_flight: str | None) -> None:
        self.stop_reason = reason
        self.special = True
        self._ruffle()
        self._tell("stop", now, None, reason)
        if self._data is not None or (self._feed is not None and not self._feed.ended):
            self.intake_cut = True
        if self._tree is not None and self._tree.cut:
            self.intake_cut = True
        self._cancel_waiting(now)
        if self._pulls:
            self._set_timer(now + PULLS_DROPPED_AFTER, Timer.PULLS, None)
        if (in_flight or self._stop.in_flight) == "abandon":
            self._abandon_all(now)
        elif self._running:
            self._set_timer(now + self._stop.drain_seconds, Timer.DRAINED, None)

    def _cancel_waiting(self, now: float) -> None:
        """Every task that waits, in a queue or for its retry, is cancelled."""
        for lane in self.lanes:
            self._draw(lane, len(lane.raw))
            waiting = lane.waiting()
            lane.fifo.clear()
            lane.heap.clear()
            for attempt in waiting:
                self._cancel_one(attempt, now)
        for attempt in self._timers.take_out(Timer.RETRY):
            self._cancel_one(attempt, now)

    def _cancel_one(self, attempt: Attempt, now: float, reason: str | None = None) -> None:
        trail = attempt.trail
        if trail is not None and trail.error is not None:
            attempt.outcome = Raised(trail.error)
            attempt.lane.return_budget(attempt)
        attempt.reason = reason or self.stop_reason
        self._end(attempt, CANCELLED, now)

    def _take_from_queue(self, attempt: Attempt) -> None:
        """Take a task that waits out of wherever it waits."""
        if not attempt.lane.take_out(attempt):
            self._timers.remove(Timer.RETRY, attempt)

    def _abandon_all(self, now: float) -> None:
        for attempt in sorted(self._running, key=_by_index):
            self._abandon(attempt, now, str(self.stop_reason), None)
            self._cancel_one(attempt, now)

    def _drop_pulls(self, now: float) -> None:
        for feed in sorted(self._pulls, key=lambda feed: feed.pulled_at):
            if feed.kind not in (FeedKind.PROBE, FeedKind.SUPPLY):
                self._collect(feed, now)
            self._steps.append(Cancel(feed, str(self.stop_reason)))
        self._pulls.clear()
        self.special = True
        self._ruffle()

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def _idle(self, now: float) -> Step:
        if not self._running and self._hold is not None and self._pulls == {self._hold.probe} and self._is_done():
            self._set_timer(now + PULLS_DROPPED_AFTER, Timer.PULLS, None)  # it is not to hold up the end
        is_done = not self._running and self._is_done()
        if is_done and (feed := self._last_word()) is not None:
            if self.stop_reason is not None:
                self._set_timer(now + PULLS_DROPPED_AFTER, Timer.PULLS, None)
            return self._pull(feed, now)
        if is_done and not self._pulls:
            self._over = True
            for lane in self.lanes:
                lane.gate.leave(lane)
            return DONE
        if self.due_at == INF:
            return ON_EVENT
        if self.due_at <= now:  # what was decided just now is due at once
            return self.next(now)
        if self._wait.until != self.due_at:
            self._wait = Wait(self.due_at)
        return self._wait

    def _last_word(self) -> Feed | None:
        """Return the feed of a supply that is to give back what it has, and to tell the last of its news."""
        for lane in self.lanes:
            supply = lane.supply
            if supply is not None and not (supply.is_closing or supply.feed.pulling):
                supply.is_closing = True
                if supply.has_rest:
                    feed: Feed = supply.feed
                    return feed
        return None

    def _is_done(self) -> bool:
        if self.stop_reason is not None:
            return True
        if self._data is not None or (self._feed is not None and not self._feed.ended):
            return False
        if self._tree is not None and self._tree.open:
            return False
        return self._index == sum(lane.ended_count for lane in self.lanes) + self._forgotten

    def reports(self) -> Iterator[SourceReport]:
        """Give what each lane did, and at the end those that were forgotten."""
        for lane in self.lanes:
            yield lane.report(self.begun_at)
        if self.others is not None:
            yield self.others

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        if self.first_start is None:
            return 0.0
        return max([self._last_end, *(lane.last_end for lane in self.lanes)]) - self.first_start

    @property
    def abandoned(self) -> int:
        """Calls that were given up and have not returned."""
        return sum(lane.abandoned for lane in self.lanes)

    def _tell_end(
        self,
        kind: str,
        now: float,
        attempt: Attempt,
        detail: str,
        recorded: Mapping[str, float] | None,
        sign: int = 1,
    ) -> None:
        """Tell that an attempt is over, and what it used."""
        used = attempt.lane.used_by(attempt.amount, recorded)
        usage = {unit: sign * number for unit, number in used.items()}
        usage["calls"] = float(sign)
        if self._note is not None:
            lane, number = attempt.lane, attempt.number
            self._note(Event(kind, now, lane.name, attempt.index, number, detail, usage))

    def _tell(self, kind: str, now: float, attempt: Attempt | None, detail: str = "") -> None:
        if self._note is not None:
            if attempt is None:
                self._note(Event(kind, now, detail=detail))
            else:
                self._note(Event(kind, now, attempt.lane.name, attempt.index, attempt.number, detail))


def uncommitted(item: Any) -> Attempt | None:
    """Return what becomes of a result in the log that is not committed: it is none; None where it was none before."""
    if isinstance(item, tuple) and not isinstance(item, Tried):
        index, (payload, _, _, started_at, duration), _, lane = item
        attempt = Attempt(payload, None, lane)
        attempt.number = 1
    elif isinstance(item, Attempt) and item.status is not None and item.status not in (CANCELLED, SKIPPED):
        index, lane = item.index, item.lane
        started_at, duration = (item.started_at, item.duration) if item.attempts else (0.0, 0.0)
        attempt = Attempt(item.payload, item.task, lane)
        attempt.number, attempt.rank, attempt.trail = item.number, item.rank, item.trail
        attempt.node = getattr(item, "node", None)
        attempt.outcome = item.outcome if type(item.outcome) is Raised else None
    else:
        return None
    attempt.index, attempt.started_at, attempt.duration = index, started_at, duration
    attempt.status, attempt.reason = CANCELLED, "not_committed"
    return attempt


def _is_singular(amount: Amount) -> bool:
    """Say whether a call of an amount uses something else than most."""
    return isinstance(amount, Mapping) or amount != 1


def _failure(error: BaseException) -> TaskStatus:
    """Return how a task ends that fails with an error."""
    if isinstance(error, TaskTimeoutError):
        return TIMEOUT
    return FAILED if isinstance(error, TaskError) else ERROR


def _by_index(attempt: Attempt) -> int:
    return attempt.index


def _by_turn(attempt: Attempt) -> Rank:
    return attempt.rank or (0, attempt.index)


def _outcome_word(outcome: Any) -> str:
    return type(outcome.error).__name__ if type(outcome) is Raised else "ok"


