"""Several limits as one: all of them say yes, or nothing is taken.

A `LimitSet` pairs rules (buckets and windows) with their states, in one tuple.

Rules: a new state is worked out first, without the lock, and committed by one assignment if the old one is still
there; else all is worked out again.  Nothing is called between taking the lock and letting it go.  So no thread is
switched there, an exception that a signal handler raises takes nothing by halves and leaves no lock held, and a
handler that uses the same limits finds the lock free.

A bucket's instants count from `base`, which follows the clock: an instant far from its origin is a coarse float, and a
fast rate would be off by what each take is rounded by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import refuse
from ..model import Amount
from ..policy import RateLimit, Window
from .bucket import TokenBucket, epsilon
from .window import RollingWindow

Rule = TokenBucket | RollingWindow
States = tuple[Any, ...]
"""A state for each rule, and at the end the rules: so nobody reads the one without the other."""

OPEN: States = ((),)
"""In place of the states, while a single bucket's is `next_at`."""

_GRAIN = 64.0
"""Seconds; to add or subtract a multiple of them rounds nothing."""

_AGE = 2 * _GRAIN
"""Seconds after which the base follows the clock."""


def make_rule(limit: RateLimit | Window) -> Rule:
    """Return the rule of a limit."""
    return TokenBucket(limit) if isinstance(limit, RateLimit) else RollingWindow(limit)


def part_of(amount: Amount, unit: str) -> float:
    """Return how much of `unit` an amount is: a number counts in every unit, a call of {...} is one call."""
    if isinstance(amount, Mapping):
        return amount.get(unit, 1.0 if unit == "calls" else 0.0)
    return amount


def stated_part(amount: Amount, unit: str) -> float:
    """Return how much of `unit` is named: as `part_of`, but what is charged or given back is no call."""
    return amount.get(unit, 0.0) if isinstance(amount, Mapping) else amount


def check_units(amount: Amount, units: set[str]) -> None:
    """Refuse an amount that names a unit which nothing counts; every amount may count calls."""
    if isinstance(amount, Mapping) and not units.issuperset(amount.keys() - {"calls"}):
        known, strange = (" or ".join(sorted(some)) for some in (units | {"calls"}, amount.keys() - units - {"calls"}))
        refuse("amount", dict(amount), f"a mapping from {known} to a number: nothing here counts {strange}")


class Lock(Protocol):
    """What makes a state safe between threads; the core has none of its own, so it is handed in."""

    def __enter__(self) -> object: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> object: ...


Change = Callable[[States], States]
"""What an event made of the states before it."""

History = tuple[States, tuple[tuple[object, Change], ...]]
"""States, and all that has happened since: each with its owner, who may take it back, or None."""

_TURNS = 4
"""How often it is asked when something may be had, each time at the instant that was named: two would do."""

_REMEMBERED = 256
"""Events that are remembered at the most while something may be taken back."""


class LimitSet:
    """Rules, and their states in one tuple.

    Args:
        lock: Makes it safe between threads.
        tokens: In each bucket at the start; None for full ones.
        others: Gives the number of other threads; where there is none, one call is taken without the lock.

    As long as there is something that may be taken back, what happens is remembered; to take it back is to play the
    rest again without it.

    A single bucket may be opened: its state is then the float `next_at`, the instant since `origin` at which it has one
    token, on which a limiter takes by itself (see `RateLimiter.try_acquire`).  Everything else shuts it first.
    """

    __slots__ = (
        "__weakref__",
        "_lone",
        "_others",
        "_tokens",
        "_watchers",
        "base",
        "declared",
        "early",
        "has_windows",
        "history",
        "horizon",
        "is_bucket",
        "interval",
        "lock",
        "next_at",
        "origin",
        "reach",
        "rules",
        "states",
    )

    def __init__(
        self,
        limits: Iterable[RateLimit | Window],
        now: float,
        lock: Lock,
        tokens: float | None = None,
        others: Callable[[], int] | None = None,
    ) -> None:
        self._tokens = tokens
        self._others = others
        self.interval = self.origin = self.reach = 0.0
        self._declare(limits)
        self.renew(now, lock)

    def _declare(self, limits: Iterable[RateLimit | Window]) -> None:
        self.declared = tuple(limits)
        self.rules: tuple[Rule, ...] = tuple([make_rule(limit) for limit in self.declared])
        self.has_windows = any(isinstance(rule, RollingWindow) for rule in self.rules)
        only = self.rules[0] if len(self.rules) == 1 else None
        self.is_bucket = type(only) is TokenBucket
        # With which rules a take is as short as can be, and what it needs of them.
        self._lone = (self.rules, only.span, only.interval) if type(only) is TokenBucket else (None, 0.0, 0.0)

    def renew(self, now: float, lock: Lock) -> None:
        """Be as new, with a new lock."""
        self.lock = lock
        self.next_at, self.horizon = math.inf, -math.inf
        self.history: History | None = None
        self._watchers: deque[Callable[[], object]] = deque()
        self.base, self.early = _base(now), epsilon(now)
        states = [rule.initial(self._time(rule, now), self._tokens) for rule in self.rules]
        self.states: States = (*states, self.rules)

    def twin(self, now: float, to: float, lock: Lock) -> LimitSet:
        """Return another of the same limits and state, on a clock that shows `to` where this one shows `now`."""
        other = LimitSet(self.declared, to, lock, self._tokens)
        states = [rule.moved(s, self._time(rule, now), other._time(rule, to)) for rule, s in paired(self.read())]
        other.states = (*states, other.rules)
        return other

    def declare(self, limits: Iterable[RateLimit | Window], now: float) -> None:
        """Have other limits from now on: a bucket keeps the tokens, a window the slots, of its predecessor.

        That is the next one of its kind and unit; where there is none, it starts as new.  What was taken stays taken.
        """
        other = LimitSet(limits, self.base, self.lock)

        def change(states: States) -> States:
            old, after = paired(states), []
            for rule in other.rules:
                instant = self._time(rule, now)
                match = next((pair for pair in old if type(pair[0]) is type(rule) and pair[0].unit == rule.unit), None)
                if match is None:
                    after.append(rule.initial(instant))
                else:
                    old.remove(match)
                    after.append(rule.taken_over(*match, instant))
            return (*after, other.rules)

        while True:
            states = self.read()
            after, history = change(states), self.noted(change)
            with self.lock:
                if self.states is states:
                    self.states = after
                    self.history = history
                    self.rules = other.rules
                    self.declared = other.declared
                    self.has_windows = other.has_windows
                    self.is_bucket = other.is_bucket
                    self._lone = other._lone
                    return

    @property
    def key(self) -> object:
        """What state it is, also where others show it in their own way."""
        return self

    @property
    def units(self) -> set[str]:
        """What its limits count."""
        return {rule.unit for rule in self.rules}

    def fits(self, amount: Amount) -> bool:
        """Say whether an amount can be had at all; one of each always can."""
        return amount == 1 or all(part_of(amount, rule.unit) <= rule.most for rule in self.rules)

    def check(self, amount: Amount) -> None:
        """Refuse an amount that could never be had."""
        if amount == 1:
            return
        for rule in self.rules:
            if part_of(amount, rule.unit) > rule.most:
                refuse("amount", amount, f"at most {rule.most:g} {rule.unit}: more could never be had at once")

    # ---- the short path of a single bucket ---------------------------------------------------------------------------

    def open(self, states: States) -> None:
        """Have takes go by `next_at`, if the states are still those of one bucket."""
        if len(states) != 2 or type(states[1][0]) is not TokenBucket:
            return
        zero_at, (bucket,) = states
        interval = bucket.interval
        next_at = zero_at + interval
        origin = self.base - self.early
        reach = bucket.span - interval + self.early
        horizon = _AGE + self.early
        with self.lock:
            if self.states is states:
                self.interval = interval
                self.origin = origin
                self.reach = reach
                self.horizon = horizon
                self.states = OPEN
                self.next_at = next_at

    def shut(self) -> None:
        """Have no take go by `next_at`."""
        next_at = self.next_at
        states = (next_at - self.interval, self.rules)
        with self.lock:
            if self.next_at is next_at and self.states is OPEN:
                self.next_at = math.inf
                self.horizon = -math.inf
                self.states = states

    def read(self) -> States:
        """Return the states, for who works out what comes after them."""
        while (states := self.states) is OPEN:
            self.shut()
        return states

    def swap(self, states: States, after: States, history: History | None) -> bool:
        """Commit new states if the old ones are still there."""
        with self.lock:
            if self.states is states:
                self.states = after
                self.history = history
                return True
        return False

    def keep_up(self, now: float) -> None:
        """Have the base follow the clock."""
        if now - self.base > _AGE:
            states, history = self.read(), self.history
            base, early = _base(now), epsilon(now)
            after = _shifted(states, base - self.base)
            history = None if history is None else (_shifted(history[0], base - self.base), history[1])
            with self.lock:
                if self.states is states:
                    self.states = after
                    self.history = history
                    self.base = base
                    self.early = early

    # ---- taking ------------------------------------------------------------------------------------------------------

    def ask(
        self, states: States, amount: Amount, now: float, slack: float = 0.0, held: bool = False
    ) -> tuple[float, States]:
        """Return when all would say yes (`now` if they do now), and the states once it is taken."""
        inner = now - self.base
        rules = states[-1]
        if len(rules) == 1 and type(rules[0]) is TokenBucket:  # the common case: as `TokenBucket.ask`, without the call
            rule = rules[0]
            zero_at = states[0]
            oldest = inner - rule.span - slack
            part = amount if type(amount) is int else part_of(amount, rule.unit)
            zero_at = (zero_at if zero_at > oldest else oldest) + part * rule.interval
            return (now if zero_at <= inner + self.early else zero_at + self.base), (zero_at, rules)
        latest = now
        after: list[Any] = []
        taken: Any
        for rule, state in zip(rules, states):  # noqa: B905 - the rules are one fewer than what is in the states
            part = amount if type(amount) is int else part_of(amount, rule.unit)
            if type(rule) is TokenBucket:
                ready_at, taken = rule.ask(state, part, inner, slack, held, self.early)
                if ready_at > inner:
                    latest = max(latest, ready_at + self.base)
            else:
                ready_at, taken = rule.ask(state, part, now, slack, held)
                latest = max(latest, ready_at)
            after.append(taken)
        after.append(rules)
        return latest, tuple(after)

    def ask_in_turn(self, states: States, amount: Amount, now: float) -> tuple[float, States]:
        """Return when all will say yes, and the states once it is taken then; infinity after an outcome, or never."""
        for _ in range(_TURNS):
            ready_at, after = self.ask(states, amount, now)
            if ready_at <= now or ready_at == math.inf:
                return ready_at, after
            if len(states) == 2 and type(states[1][0]) is TokenBucket:  # gives the same, whenever it is asked
                return ready_at, after
            now = ready_at
        return math.inf, states

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        """Take from all, or from none; return `now` if taken, else when to ask again (infinity: after an outcome)."""
        while True:
            states = self.states
            if states is OPEN:
                self.shut()
                continue
            ready_at, after = self.ask(states, amount, now, slack, held)
            if ready_at > now:
                if self.states is states:
                    self.keep_up(now)
                    return ready_at
                continue
            history = None if self.history is None else self.noted(self.taking(amount, now, slack, held))
            with self.lock:
                if self.states is states:
                    self.states = after
                    self.history = history
                    return now

    def take_call(self, now: float, slack: float) -> bool:
        """Take one call, held, if it is there now: as `try_take`, and in short where there is one bucket."""
        others = self._others
        while True:
            states = self.states
            rules, span, interval = self._lone
            if states[-1] is not rules or self.history is not None:
                return self.try_take(1, now, slack, True) <= now
            inner = now - self.base
            zero_at, oldest = states[0], inner - span - slack
            taken = (zero_at if zero_at > oldest else oldest) + interval
            if taken > inner + self.early:
                return self.try_take(1, now, slack, True) <= now
            after = (taken, rules)
            if others is not None and not others() and self.states is states:
                # There is no other thread, nor will there be before this is done: the lock would cost more than all.
                self.states = after
                return True
            with self.lock:
                if self.states is states:
                    self.states = after
                    return True

    def settle(self, amount: Amount, now: float, used: Mapping[str, float] | None = None) -> None:
        """Say that a call has its outcome: from here the slots it held run out.

        `used` says, by unit, what the call really used: too much is given back, an overrun is a debt.
        """

        def settled(rule: Any, state: Any) -> Any:
            part = part_of(amount, rule.unit)
            return rule.settle(state, part, self._time(rule, now), part if used is None else used.get(rule.unit, part))

        if used is not None or self.has_windows:
            self._change(settled)
        self.tell()

    def tell(self) -> None:
        """Wake those who watch: something may be had earlier than they were told."""
        for _ in range(len(self._watchers)):
            try:
                wake = self._watchers.popleft()
            except IndexError:  # another thread is at it, too
                return
            wake()

    def undo(self, amount: Amount) -> None:
        """Give back what a call took that was never made."""
        self._change(lambda rule, state: rule.undo(state, part_of(amount, rule.unit)))

    def refund(self, amount: Amount, now: float) -> None:
        """Give back so much of what was taken last."""
        self._change(lambda rule, state: rule.refund(state, stated_part(amount, rule.unit), self._time(rule, now)))

    def charge(self, amount: Amount, now: float) -> None:
        """Take without asking: what is not there is a debt."""
        self._change(lambda rule, state: rule.charge(state, stated_part(amount, rule.unit), self._time(rule, now)))

    def _change(self, of_each: Callable[[Any, Any], Any]) -> None:
        """Commit what a function makes of each rule and its state."""

        def change(states: States) -> States:
            return (*[of_each(rule, state) for rule, state in paired(states)], states[-1])

        while True:
            states = self.read()
            if self.swap(states, change(states), self.noted(change)):
                return

    def watch(self, wake: Callable[[], object]) -> None:
        """Have `wake` called, once, after the next outcome, or when something is given back."""
        self._watchers.append(wake)

    def unwatch(self, wake: Callable[[], object]) -> None:
        """Have `wake` called no more, if it has not been."""
        try:
            self._watchers.remove(wake)
        except ValueError:
            return

    def available(self, now: float) -> float:
        """Return what every limit would grant now."""
        while True:
            states = self.read()
            least = min([float(rule.available(state, self._time(rule, now))) for rule, state in paired(states)])
            if self.states is states:  # and so the base is theirs
                return least

    def dump(self, now: float) -> list[list[Any]]:
        """Return the state as plain values: of each limit its kind and unit, its terms, and what was taken of it."""
        while True:
            states = self.read()
            dumped = [[*_words(rule), rule.dump(state, self._time(rule, now))] for rule, state in paired(states)]
            if self.states is states:  # and so the base is theirs
                return dumped

    def load(self, dumped: Iterable[Sequence[Any]], now: float, elapsed: float, longest: float) -> None:
        """Take as well what was dumped so many seconds ago: of each limit that of its like, or the next of its kind.

        `longest`: seconds that a call took at the most which had no outcome then.
        """
        left = list(dumped)
        parts: dict[int, Any] = {}
        for terms in (3, 2):  # those that have not changed first
            for position, rule in enumerate(self.rules):
                found = next((one for one in left if [*one[:terms]] == _words(rule)[:terms]), None)
                if found is not None and position not in parts:
                    left.remove(found)
                    parts[position] = found[3]

        def change(states: States) -> States:
            after = [
                rule.load(state, parts[at], self._time(rule, now), elapsed, longest) if at in parts else state
                for at, (rule, state) in enumerate(paired(states))
            ]
            return (*after, states[-1])

        while True:
            states = self.read()
            if self.swap(states, change(states), self.noted(change)):
                return

    def is_as_new(self, now: float) -> bool:
        """Say whether others in its place would grant the same from here on."""
        states = self.read()
        return self.history is None and all(
            rule.available(state, self._time(rule, now)) >= rule.most for rule, state in paired(states)
        )

    # ---- taking back -------------------------------------------------------------------------------------------------

    def taking(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> Change:
        """Return what a take at that instant makes of the states."""

        def change(states: States) -> States:
            pairs = [(rule, state, part_of(amount, rule.unit)) for rule, state in paired(states)]
            return (*[r.charge(s, part, self._time(r, now), slack, held) for r, s, part in pairs], states[-1])

        return change

    def noted(self, change: Change, owner: object = None, states: States = ()) -> History | None:
        """Return the history once a change is made; None where nothing has to be remembered.

        `owner` may take it back: what happens is remembered from here, from those `states` on, if it is not already.
        """
        if self.history is None:
            return None if owner is None else (states, ((owner, change),))
        before, events = self.history
        if len(events) == _REMEMBERED:
            before, events = events[0][1](before), events[1:]
        return before, (*events, (owner, change))

    def take_back(self, owner: object) -> bool:
        """Be as if what `owner` took had never been taken; return whether that is still remembered."""
        while True:
            states, history = self.read(), self.history
            if history is None or all(other is not owner for other, _ in history[1]):
                return False
            before, events = history
            events = tuple([event for event in events if event[0] is not owner])
            after = before
            for _, change in events:
                after = change(after)
            if self.swap(states, (*after[:-1], after[-1]), (before, events)):
                return True

    def forget(self, is_wanted: Callable[[object], bool]) -> None:
        """Remember no more than is needed for the owners that are still wanted."""
        states, history = self.read(), self.history
        if history is None:
            return
        before, events = history
        count = 0
        for owner, change in events:
            if owner is not None and is_wanted(owner):
                break
            before = change(before)
            count += 1
        self.swap(states, states, (before, events[count:]) if count < len(events) else None)

    def _time(self, rule: Rule, now: float) -> float:
        return now - self.base if type(rule) is TokenBucket else now


def _shifted(states: States, seconds: float) -> States:
    """Return the states where the buckets' instants count from so many seconds later."""
    shifted = [rule.shifted(s, seconds) if type(rule) is TokenBucket else s for rule, s in paired(states)]
    return (*shifted, states[-1])


def _words(rule: Rule) -> list[Any]:
    """Return what tells a limit from others: its kind, what it counts, and in what time."""
    if isinstance(rule, TokenBucket):
        return ["rate", rule.unit, rule.interval]
    return ["window", rule.unit, rule.seconds]


def paired(states: States) -> list[tuple[Any, Any]]:
    """Return each rule with its state."""
    return list(zip(states[-1], states))  # noqa: B905 - the rules are one fewer than what is in the states


def _base(now: float) -> float:
    return math.floor(now / _GRAIN) * _GRAIN if math.isfinite(now) else 0.0
