"""A lane: one queue of a run, with its limits; and what is in it: attempts, and the feeds that bring them.

Rules: a lane, with its queue, budget and batches, belongs to one run; its gate may serve several.  An attempt and a
feed are also the steps that start the one and pull the other: a wrapper would cost as much as the decision.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from heapq import heapify, heappop
from typing import Any

from ..model import Amount, SourceReport, Task, TaskStatus
from ..policy import Adaptive, RetryPolicy, adaptive_of
from .bucket import CATCH_UP
from .gate import Gate
from .latency import Latencies
from .purse import RECORDABLE, Budget, Purse, Tariff
from .quota import Allowance, Hold
from .route import Route

Rank = tuple[Any, ...]

LANES_KEPT = 1000
"""Lanes of a run, and gates of an executor, from which on those are forgotten that are as if they were new."""

SLOW_PULL = 0.0002
"""Seconds after which a pull is late: the next one brings one item.  If that is late too, the feed is slow: it is
pulled item by item, and nothing waits for it."""

HELD_UP = 0.050
"""Seconds that a pull may take because its thread was held up by others; one that takes longer is slow at once."""


class Trail:
    """What only few tasks need to remember between their attempts."""

    __slots__ = (
        "alarm", "error", "give_up_at", "has_budget", "is_resumed", "route", "throttles", "told", "uncounted", "used",
    )

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.is_resumed = False  # whether its attempts so far were those of another run, and in this one it is new
        self.route: Route | None = None  # where several sources can do it
        self.begin()

    def count(self, used: Mapping[str, float]) -> None:
        """Count a call that has told what it used."""
        self.told += 1
        _add(self.used, used)

    def begin(self) -> None:
        """Begin with another source: what was there so far is another's, but for the error."""
        self.give_up_at = math.inf
        self.alarm = 0  # the number of the one that is set for that instant
        self.has_budget = False
        self.throttles = 0
        self.uncounted = 0  # calls that were throttled, and are no attempts
        self.told = 0  # those of the calls that have told what they used
        self.used: dict[str, float] = {}  # by them


class Attempt:
    """One task on its way, and the step that starts it.

    The same object serves all attempts of a task, unless one of them is abandoned: its late answer must not be taken
    for that of the next.
    """

    __slots__ = (
        "duration",
        "entry",
        "followed_by",
        "holds",
        "index",
        "is_begun",
        "is_plain",
        "lane",
        "node",
        "number",
        "outcome",
        "payload",
        "rank",
        "reason",
        "started_at",
        "status",
        "task",
        "timeout",
        "trail",
        "view",
        "worker",
    )

    def __init__(self, payload: Any, task: Task[Any] | None, lane: Lane) -> None:
        self.payload = payload
        self.task = task
        self.is_begun = True  # the driver says so if it is not
        self.is_plain = task is None  # a bare payload of which nothing is to be remembered
        self.lane = lane
        self.number = 0
        self.rank: Rank | None = None
        self.status: TaskStatus | None = None
        self.outcome: Any = None
        self.reason: str | None = None
        self.trail: Trail | None = None
        self.view: Any = None  # what the task sees of its attempt, while it runs; the driver's, but for what it `used`
        self.entry: Any = None  # what a journal knows of the task

    # Set by the core before anybody reads them; annotated only, because each assignment here costs every task.
    index: int
    started_at: float
    duration: float
    timeout: float
    worker: Any
    followed_by: Attempt  # where it was given up, and the task tried again
    holds: Sequence[Hold]  # where the lane has a purse
    node: Any  # of a query: the NodeKey of its node

    @property
    def amount(self) -> Amount:
        """What it uses of each limit."""
        return 1 if self.task is None else self.task.amount

    @property
    def route(self) -> Route | None:
        """The sources that can do it, where there are several."""
        return None if self.trail is None else self.trail.route

    @property
    def is_new(self) -> bool:
        """Whether it was not begun yet in this run."""
        return self.number == 0 or (self.trail is not None and self.trail.is_resumed)

    @property
    def attempts(self) -> int:
        """Attempts made that count, at all sources."""
        route = self.route
        return self.number if route is None else self.number + route.attempts

    @property
    def usage(self) -> dict[str, float]:
        """What all calls made for the task used, by unit."""
        usage = self.usage_here
        if self.route is not None:
            _add(usage, self.route.usage)
        return usage

    @property
    def usage_here(self) -> dict[str, float]:
        """What all calls used that were made for the task at the source where it is now."""
        trail = self.trail
        calls = self.number if trail is None else self.number + trail.uncounted
        usage = {} if trail is None else dict(trail.used)
        rest = calls if trail is None else calls - trail.told
        if rest:
            _add(usage, self.lane.used_by(self.amount), rest)
        usage["calls"] = float(calls)
        return usage

    def remember(self) -> Trail:
        """Return its trail, made when first needed."""
        if self.trail is None:
            self.trail = Trail()
            self.is_plain = False
        return self.trail

    def successor(self) -> Attempt:
        """Return what takes its place when it was abandoned and the task is to be tried again."""
        other = Attempt(self.payload, self.task, self.lane)
        other.index, other.number, other.rank, other.trail = self.index, self.number, self.rank, self.trail
        other.is_plain = False
        other.entry = None if self.entry is None else self.entry.successor()
        other.node = getattr(self, "node", None)
        self.followed_by = other
        return other

    @property
    def latest(self) -> Attempt:
        """What has taken its place in the end, or itself."""
        latest = self
        while (other := getattr(latest, "followed_by", None)) is not None:
            latest = other
        return latest


def _add(usage: dict[str, float], used: Mapping[str, float], times: int = 1) -> None:
    for unit, number in used.items():
        usage[unit] = usage.get(unit, 0.0) + times * number


class FeedKind(Enum):
    """What a feed brings."""

    INPUTS = "inputs"
    NODES = "nodes"
    QUERIES = "queries"
    PROBE = "probe"
    SUPPLY = "supply"


class Feed:
    """An iterator of the user's, and the step that pulls it.  The core never touches the iterator itself.

    Whoever pulls puts each item into `arrived` as it comes, so that what an iterator gave does not wait for what it
    gives next.

    Args:
        kind: What it brings.
        open_fn: Opens the iterable, sync or async; user code, run by whoever pulls.
        prepare: Turns an item into what arrives (an Attempt, a NodeKey, or of a bare payload its lane and itself), or
            returns an awaitable of that; user code may run in it.
        lane: Whose queue it feeds; None where each item says so itself.
        node: Of a plan's feed the NodeKey of the node that it is about; `open_fn` and `prepare` are then called with
            the feed itself first.  None for what the caller gave.
        rank: Where its items stand in the order of admission.
        rest: The nodes that a pull may go on to, one after the other, as (rank, order, NodeKey).
    """

    __slots__ = (
        "arrived",
        "blocked",
        "ended",
        "enough",
        "handful",
        "hold_until",
        "iterator",
        "kind",
        "label",
        "lane",
        "node",
        "open_fn",
        "prepare",
        "pulled_at",
        "pulling",
        "rank",
        "rest",
        "slow",
        "taken",
        "wanted",
        "was_late",
        "worker",
    )

    def __init__(
        self,
        kind: FeedKind,
        open_fn: Callable[..., Any],
        prepare: Callable[..., Any],
        *,
        label: str,
        lane: Lane | None = None,
        node: Any = None,
        rank: Rank = (),
        rest: deque[tuple[Rank, int, Any]] | None = None,
        handful: int = 16,
    ) -> None:
        self.kind = kind
        self.open_fn = open_fn
        self.prepare = prepare
        self.label = label
        self.lane = lane
        self.node = node
        self.rank = rank
        self.rest = rest
        self.iterator: Any = None
        self.handful = handful  # how many items a pull takes at the most, where they come quickly
        self.enough = 1  # how many it brings before it goes on to no other node
        self.wanted = 1
        self.arrived: deque[Any] = deque()
        self.taken = 0
        self.blocked = 0  # lanes without room
        self.pulling = False
        self.pulled_at = -math.inf
        self.was_late = False  # whether the last pull took long
        self.slow = False  # whether the last two did
        self.hold_until = -math.inf  # a quick feed fills the queues before anything starts, but not for long
        self.ended = False
        self.worker: Any = None

    def open(self) -> Any:
        """Open what is to be iterated over next.  For whoever pulls."""
        return self.open_fn() if self.node is None else self.open_fn(self)

    def ready(self, item: Any) -> Any:
        """Return what arrives for an item.  For whoever pulls."""
        return self.prepare(item) if self.node is None else self.prepare(self, item)

    def goes_on(self, brought: int) -> bool:
        """Go on to the next node, if there is one and so many items are not enough.  For whoever pulls."""
        if not self.rest or brought >= self.enough:
            return False
        _, _, self.node = self.rest.popleft()
        self.iterator = None
        self.taken = 0
        return True


def handful_of(lookahead: int) -> int:
    """Return how many inputs are taken at a time where they are plain data."""
    return max(1, min(32, lookahead // 2))


FREE = Tariff()
"""Of calls that cost nothing unless they say so."""


class Lane:
    """One queue of a run, and what it counts.

    Args:
        name: The source's name, or the lane's key.
        gate: Its limits.
        call: Runs one of its tasks; for the driver, the core never calls it.
        concurrency: Attempts at once (the bulkhead); an adaptive one is what its gate's feedback says.
        lookahead: Inputs taken beyond those.
        retry: Its retry policy; `retries_timeouts` is what that policy makes of a timeout.
        timeout: Seconds for an attempt.
        budget: Attempts in this run.
        allowances: What else it may use, in this run or in a period of the calendar, be it together with others.
        pooled: Likewise, of what all lanes of the run share.
        batch_size, batch_backoff: See ExecutionPolicy.
        max_abandoned: Calls given up at once before the breaker opens.
        tariff: What its calls cost.
        supply: What it takes from limits and quotas whose state is elsewhere, a `Supply`; None where there are none.
    """

    __slots__ = (
        "__weakref__",
        "abandoned",
        "accounts",
        "active",
        "adaptive",
        "batch_at",
        "batch_backoff",
        "batch_open",
        "batch_size",
        "batch_started",
        "budget",
        "busy_seconds",
        "call",
        "callers",
        "calls",
        "calm",
        "capacity",
        "concurrency",
        "delivered",
        "fifo",
        "full_at",
        "first_answer",
        "forgotten",
        "gate",
        "growth",
        "guarded",
        "heap",
        "is_bare",
        "is_kept",
        "handful",
        "has_budget",
        "joined",
        "last_answer",
        "last_given_up",
        "latencies",
        "max_abandoned",
        "name",
        "nodes",
        "pulling",
        "purse",
        "raw",
        "resume_at",
        "retries_timeouts",
        "retry",
        "running",
        "settles_at",
        "singled_out",
        "stats",
        "success_count",
        "supply",
        "take_call",
        "taken",
        "tariff",
        "timeout",
        "usage",
        "wake_at",
        "watching",
    )

    def __init__(
        self,
        name: str,
        gate: Gate,
        call: Callable[[Any], Any],
        *,
        concurrency: int | Adaptive = 1,
        lookahead: int = 64,
        retry: RetryPolicy,
        retries_timeouts: bool | float = False,
        timeout: float | None = None,
        budget: float | None = None,
        allowances: Sequence[Allowance] = (),
        pooled: Sequence[Allowance] = (),
        batch_size: int | None = None,
        batch_backoff: float = 0.0,
        max_abandoned: int | None = None,
        tariff: Tariff = FREE,
        supply: Any = None,
    ) -> None:
        self.name = name
        self.gate = gate
        self.call = call
        self.adaptive = adaptive_of(concurrency)
        most = concurrency.maximum if isinstance(concurrency, Adaptive) else concurrency
        self.concurrency = most if gate.feedback is None else gate.feedback.limit
        self.capacity = most + lookahead
        self.retry = retry
        self.retries_timeouts = retries_timeouts
        self.timeout = math.inf if timeout is None else timeout
        self.budget = budget
        self.has_budget = budget is not None or any(isinstance(allowance, Budget) for allowance in allowances)
        self.purse = Purse(allowances, tariff, pooled) if allowances or pooled else None
        self.batch_size = batch_size
        self.batch_backoff = batch_backoff
        # One hung call must not end a lane of one: so at least two.
        self.max_abandoned = max(2, most) if max_abandoned is None else max_abandoned
        self.tariff = tariff
        self.is_bare = self.purse is None and tariff.is_free  # a bare payload uses nothing but a call
        self.handful = handful_of(lookahead)
        self.full_at = self.capacity - self.handful  # with more than this taken, another handful would not fit
        # Whether a start changes more than a count.
        self.supply = supply
        if supply is not None:
            supply.feed.lane = self
        self.accounts = (
            batch_size is not None or retry.timeout is not None or self.purse is not None or supply is not None
        )
        self.callers = 0  # who are about to submit a task, or wait for one: in `call` only
        self.is_kept = False  # whether a journal is to know of each call before it is made
        self.abandoned = 0
        self.settles_at = -math.inf  # before, those given up last may still end
        self.renew()

    def renew(self) -> None:
        """Make it ready for another run: all but the budget left and the calls that still hang begins anew."""
        if self.supply is not None:
            self.supply.renew()
        self.joined = False  # whether it is among the run's lanes
        self.forgotten = False  # whether it was: its key is to have another
        self.running = 0
        self.taken = 0
        self.delivered = 0  # in a stream, written by the consumer alone
        self.calls = 0
        self.singled_out = 0  # those of the calls whose use was counted one by one, in `usage`
        self.usage: dict[str, float] = {}
        self.success_count = 0
        self.busy_seconds = 0.0
        self.latencies: Latencies | None = None  # of calls whose duration is in no record
        self.first_answer: float | None = None
        self.last_answer: float | None = None
        self.last_given_up = -math.inf
        self.stats = SourceReport(self.name)
        self.batch_started = 0  # tasks of this batch that were started
        self.batch_open = 0  # those of them without a result
        self.batch_at = -math.inf  # when the next batch may start
        # Whether more than its gate has to be asked.
        self.guarded = self.accounts or self.budget is not None or self.abandoned > 0
        self.fifo: deque[Attempt] = deque()  # tasks of the default rank
        self.raw: deque[tuple[int, Any]] = deque()  # bare payloads, by index; those in `fifo` go before them
        self.heap: list[tuple[Rank, Attempt]] = []  # all others: by priority, by place in the tree, and retries
        self.active = False
        self.calm: object = None  # the gate's mark, as long as its turns are like most
        self.take_call: Callable[[float, float], bool] | None = None  # asks the limits for such a turn
        self.resume_at = math.inf  # the count of results delivered at which the intake goes on; infinity: it is on
        self.watching = False
        self.wake_at = math.inf
        self.nodes: list[tuple[Rank, int, Any]] = []  # nodes to ask about, and feeds of queries begun
        self.growth: deque[Feed] = deque()  # feeds of children and of following queries
        self.pulling: Feed | None = None

    @property
    def load(self) -> float:
        """How much it has to do, for what it can do at once."""
        return (self.taken - self.ended_count) / self.concurrency

    @property
    def ended_count(self) -> int:
        """Tasks that have their result."""
        stats = self.stats
        return self.success_count + stats.failure_count + stats.cancelled_count + stats.skipped_count

    def is_as_new(self, now: float) -> bool:
        """Say whether another lane in its place would do the same from here on."""
        return (
            not (self.callers or self.running or self.abandoned or self.active)
            and not (self.raw or self.fifo or self.heap)
            and self.taken == self.delivered == self.ended_count
            and self.resume_at == math.inf
            and not (self.calls and self.has_budget)
            and self.batch_started == 0
            and self.batch_at <= now
            and self.wake_at == math.inf
            and not (self.supply is not None and self.supply.has_rest)
            and not self.watching
            and self.gate.is_as_new(now)
        )

    @property
    def last_end(self) -> float:
        """When an attempt last ended, answered or given up."""
        return max(self.last_given_up, -math.inf if self.last_answer is None else self.last_answer)

    def rest(self) -> None:
        """Take no more inputs until about half of the lookahead is free again."""
        self.resume_at = self.taken - self.capacity + self.handful + self.handful // 2

    @property
    def room(self) -> int:
        """Inputs that may still be taken."""
        return self.capacity - self.taken + self.delivered

    @property
    def units(self) -> set[str]:
        """What is counted of its calls: by its limits, its allowances, its prices, and everywhere."""
        units: set[str] = self.gate.units | self.tariff.units | RECORDABLE
        for part in (self.purse, self.supply):
            units |= set() if part is None else part.units
        return units

    def check(self, amount: Amount, others: Set[str] = frozenset()) -> None:
        """Refuse an amount that could never be had, or of a unit that neither it nor others count."""
        self.gate.check(amount, self.units | others)
        for part in (self.purse, self.supply):
            if part is not None:
                part.check(amount)

    def head(self) -> Attempt | None:
        """Return the task to be admitted next."""
        if self.heap and (not self.fifo or self.heap[0][0] < (0, self.fifo[0].index)):
            return self.heap[0][1]
        return self.fifo[0] if self.fifo else None

    def waiting(self) -> list[Attempt]:
        """Return the tasks that wait to be admitted, but for bare payloads; retries and the like after the others."""
        return [*self.fifo, *(attempt for _, attempt in sorted(self.heap, key=lambda entry: entry[0]))]

    def take_out(self, attempt: Attempt) -> bool:
        """Take a task out of the queue; return whether it was there."""
        if attempt in self.fifo:
            self.fifo.remove(attempt)
            return True
        entries = [entry for entry in self.heap if entry[1] is attempt]
        if entries:
            self.heap.remove(entries[0])
            heapify(self.heap)
        return bool(entries)

    def pop(self, attempt: Attempt) -> None:
        """Take out the task that is to be admitted next."""
        if self.fifo and self.fifo[0] is attempt:
            self.fifo.popleft()
        else:
            heappop(self.heap)

    def takes_one(self, now: float) -> bool:
        """Take from the budget and the limits for a turn that is like most, if both have something."""
        budget, take_call = self.budget, self.take_call
        if (budget is not None and budget < 1) or (take_call is not None and not take_call(now, CATCH_UP)):
            return False
        if budget is not None:
            self.budget = budget - 1
        return True

    def account(self, attempt: Attempt, now: float) -> float:
        """Take from budget and batch for an attempt that starts; return its timeout."""
        if attempt.is_new:
            if attempt.trail is not None:
                attempt.trail.is_resumed = False
            if self.batch_size is not None:
                self.batch_started += 1
                self.batch_open += 1
            if self.retry.timeout is not None and attempt.remember().give_up_at == math.inf:
                attempt.remember().give_up_at = now + self.retry.timeout
        trail = attempt.trail
        if trail is not None and trail.has_budget:
            trail.has_budget = False
        elif self.budget is not None:
            self.budget -= 1
        timeout = self.timeout
        if attempt.task is not None and attempt.task.timeout is not None:
            timeout = attempt.task.timeout
        return timeout if trail is None else min(timeout, trail.give_up_at - now)

    def return_budget(self, attempt: Attempt) -> None:
        """Take back what was reserved for an attempt that will not be made."""
        trail = attempt.trail
        if trail is not None and trail.has_budget and self.budget is not None:
            trail.has_budget = False
            self.budget += 1

    @property
    def hangs(self) -> bool:
        """Whether as many of its calls hang as may."""
        return self.abandoned >= self.max_abandoned

    def is_shut(self, now: float) -> bool:
        """Say whether it starts nothing for a while; one whose breaker's probe is due merely waits for limits."""
        breaker = self.gate.breaker
        return self.hangs or (breaker is not None and breaker.ready_at(now) > now)

    def batch_takes_at(self) -> float:
        """Return when the batch takes another task: an instant, long past if it does now; infinity if it is full."""
        return math.inf if self.batch_started == self.batch_size else self.batch_at

    def used_by(self, amount: Amount, recorded: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return what a call uses, by unit: what it has recorded, else what its amount names, else what any costs."""
        return self.tariff.used_by(self._named(amount), recorded)

    def completed(self, amount: Amount, recorded: Mapping[str, float]) -> dict[str, float]:
        """Return what a call has recorded, with what that costs where it has a price."""
        return self.tariff.completed(self._named(amount), recorded)

    def _named(self, amount: Amount) -> Amount:
        return amount if self.purse is None else self.purse.named(amount)

    def took(self, seconds: float) -> None:
        """Note how long a call took, where no record says so."""
        if self.latencies is None:
            self.latencies = Latencies()
        self.latencies.add(seconds)

    def count_usage(self, amount: Amount, recorded: Mapping[str, float] | None, calls: int = 1) -> None:
        """Count what a call used that may differ from others; `calls` is -1 to take that back."""
        self.singled_out += calls
        _add(self.usage, self.used_by(amount, recorded), calls)

    @property
    def used(self) -> dict[str, float]:
        """What its calls used, by unit."""
        usage, calls = dict(self.usage), self.calls
        if calls > self.singled_out:
            _add(usage, {unit: used * (calls - self.singled_out) for unit, used in self.used_by(1).items()})
        return {**usage, "calls": float(calls)}

    def report(self, begun_at: float) -> SourceReport:
        """Return what it counted in a run that began at that instant."""
        stats = self.stats
        stats.calls, stats.success_count, stats.busy_seconds = self.calls, self.success_count, self.busy_seconds
        stats.first_at = None if self.first_answer is None else self.first_answer - begun_at
        stats.last_at = None if self.last_answer is None else self.last_answer - begun_at
        stats.usage = self.used
        stats.remaining = {} if self.purse is None else self.purse.remaining
        if self.budget is not None:
            stats.remaining["calls"] = min(self.budget, stats.remaining.get("calls", math.inf))
        stats.times = None if self.latencies is None else self.latencies.copy()
        return stats
