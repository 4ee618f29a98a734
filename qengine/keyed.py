"""A rate limiter for each key, for millions of keys: what is remembered of one is a float.

Rules: a key that nobody waits for is an index into a list of states; one bucket's state is the float `zero_at`, that of
several limits a tuple.  All else (waiting, reservations, pauses, debts that last) is a whole line of `line.py`, made on
demand.  It takes the state over, stands in its place in the list, and gives it back when it has come to rest and nobody
holds its lease.  That is a weak reference, and a dead one stays dead: so who gets the lease from it knows that the line
is the truth for as long as he holds it, and an exception at any instant gives it back.

Keys are forgotten by epochs.  A state is committed to an epoch only before its end, `until`; so one refill later all of
them are as new again.  The next epoch takes over what is used again, and all the rest goes at once when that one ends.
Lines are carried over.  Why no grant is minted:

- A commit is made under the lock, and only if the epoch is still the one in which the key was looked up.  So a state is
  never changed after its epoch, and who holds an index of it, for however long, has to look it up anew.
- Within an epoch no key is taken out, and by `setdefault` the first who enters one wins.  What is entered (the last
  epoch's state, else a new one) is the same for all who enter it.  Who enters one into an epoch that is over harms
  nobody: what the next one has of the key goes before it, and if it has nothing the key was never used since.
- A new state is as new as of the beginning of its epoch, not of the asking.  So it is no better than one that was
  forgotten, even if the clock steps back behind that; and no worse while the clock goes on: nobody can tell whether he
  was forgotten.

Nothing is called between taking the lock and letting it go (see `core/limits.py`), least of all a key's `__hash__` or
`__eq__`.  For a key with one bucket nothing is kept that the garbage collector has to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import ref

from .core.bucket import TokenBucket
from .core.limits import LimitSet, States, _shifted, paired
from .errors import Single, optional, refuse_type, require_at_least
from .forks import restart_after_fork
from .limiter import INF, ONE, LimiterBase, RateLimiter, Reservation, _in_words
from .line import Line
from .model import Amount
from .policy import RateLimit, Window

LimiterT = TypeVar("LimiterT", bound=LimiterBase)

_MARGIN = 1.0
"""Seconds for which a key is remembered at the least, and by which longer than it needs."""


class _Lease:
    """Held by all who use a line; while there is one, the line is not given up."""

    __slots__ = ("__weakref__",)


class _Live(float):
    """In place of a state: the line that has it.  As a float it is infinity, which grants nothing."""

    __slots__ = ("lease", "line")
    line: Line
    lease: ref[_Lease]


class _Epoch:
    """What is remembered of the keys, from one forgetting to the next.  Only `Keys` changes it.

    Args:
        limits: As of its beginning; only its rules and its base are used.
        fresh: The state of a key that is not remembered.
        now: Its beginning.
        span: Seconds in which any state is as new again.
        before: The epoch before it, if anything of that is still worth knowing.
    """

    __slots__ = (
        "count", "fresh", "horizon", "index", "limits", "lines", "moved", "old_index", "old_states", "origin", "reach",
        "shift", "stamp", "states", "until",
    )  # fmt: skip

    def __init__(self, limits: LimitSet, fresh: Any, now: float, span: float, before: _Epoch | None = None) -> None:
        self.limits = limits
        self.fresh = fresh
        self.until = now + span + _MARGIN
        self.origin = limits.base - limits.early  # these three for the short path: see RateLimiter.try_acquire
        self.horizon = self.until - self.origin
        self.reach = span + limits.early
        self.index: dict[Hashable, int] = {}
        self.states: list[Any] = []
        self.count = 0  # of the states, the few included that were entered at once by two
        self.lines: dict[int, Hashable] = {}  # which of the states are a line's, and of what key
        self.stamp: object = None  # another one each time that a line comes or goes
        self.old_index: dict[Hashable, int] = {} if before is None else before.index
        self.old_states: list[Any] = [] if before is None else before.states
        self.shift = 0.0 if before is None else limits.base - before.limits.base
        self.moved = 0  # how many keys were taken over from the old ones


class Keys:
    """What is remembered of all keys; shared by limiters for threads and for asyncio.

    Args:
        limits: What holds for each key.
        now_fn: Gives seconds as float.
        initial: Tokens in each bucket at the start.
    """

    def __init__(
        self, limits: Sequence[RateLimit | Window], now_fn: Callable[[], float], initial: float | None
    ) -> None:
        self.declared = tuple(limits)
        self.now_fn = now_fn
        self._initial = initial
        self.start_afresh()
        rules = self.epoch.limits.rules
        only = rules[0] if len(rules) == 1 else None
        self.bucket = only if isinstance(only, TokenBucket) else None
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Be as new, with a new lock."""
        self.lock = Lock()
        now = self.now_fn()
        limits = LimitSet(self.declared, now, self.lock, self._initial)
        self._span = max([rule.span if isinstance(rule, TokenBucket) else rule.seconds for rule in limits.rules])
        self.epoch = _Epoch(limits, _packed(limits.states), now, self._span)

    def __len__(self) -> int:
        epoch = self.epoch
        return len(epoch.index) + len(epoch.old_index) - epoch.moved

    # ---- states ------------------------------------------------------------------------------------------------------

    def read(self, key: Hashable) -> tuple[_Epoch, Any, float]:
        """Return the epoch, the state of a key, and the instant after which both were so; enter nothing."""
        while True:
            epoch = self.epoch
            index = _look_up(epoch.index, key)
            state = self._state_before(epoch, _look_up(epoch.old_index, key)) if index is None else epoch.states[index]
            now = self.now_fn()
            if now < epoch.until:
                return epoch, state, now
            self._end(epoch, now)

    def enter(self, key: Hashable) -> tuple[_Epoch, int, Any, float]:
        """Return the epoch, where in it the state of a key is, the state, and the instant after which all was so."""
        while True:
            epoch = self.epoch
            index = self._enter(epoch, key)
            state = epoch.states[index]
            now = self.now_fn()
            if now < epoch.until:
                return epoch, index, state, now
            self._end(epoch, now)

    def try_take(self, key: Hashable, amount: Amount) -> bool | None:
        """Take if that may be now; None where the key has a line, which is to be asked."""
        while True:
            epoch, index, state, now = self.enter(key)
            limits, states = epoch.limits, epoch.states
            if type(state) is _Live:
                if self._give_up(epoch, index, now):
                    continue
                return None
            if not limits.fits(amount):
                return False
            ready_at, after = limits.ask(_unpacked(state, limits), amount, now)
            if ready_at > now:
                if states[index] is state:
                    return False
                continue
            taken = _packed(after)
            with self.lock:
                if states[index] is state and self.epoch is epoch:
                    states[index] = taken
                    return True

    def _enter(self, epoch: _Epoch, key: Hashable) -> int:
        index = _look_up(epoch.index, key)
        if index is not None:
            return index
        old = epoch.old_index.get(key)
        more = (self._state_before(epoch, old),)
        while True:
            number = epoch.count
            after = number + 1
            with self.lock:
                if epoch.count is number:
                    epoch.states += more
                    epoch.count = after
                    break
        index = epoch.index.setdefault(key, number)
        if index == number and old is not None:
            with self.lock:
                epoch.moved += 1
        return index

    def _state_before(self, epoch: _Epoch, old: int | None) -> Any:
        """Return the state of a key that was not used in this epoch, but was at `old` in the one before."""
        if old is None:
            return epoch.fresh
        state = epoch.old_states[old]
        return _packed(_shifted(_unpacked(state, epoch.limits), epoch.shift)) if epoch.shift else state

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def _end(self, epoch: _Epoch, now: float) -> None:
        """Begin the next epoch: forget all that is as new again, and carry over what has a line."""
        self._give_up_lines(epoch, now)
        stamp = epoch.stamp
        lines = epoch.lines.copy()
        limits = LimitSet(self.declared, now, self.lock)
        before = None if self._as_new_at(epoch) <= now else epoch
        new = _Epoch(limits, _packed(_as_of(now, limits)), now, self._span, before)
        for index, key in lines.items():
            new.index[key] = new.count
            new.lines[new.count] = key
            new.states.append(epoch.states[index])
            new.count += 1
        with self.lock:
            if self.epoch is epoch and epoch.stamp is stamp:
                self.epoch = new
        self._give_up_lines(new, now)  # a debt that was too long for the epoch before

    def _as_new_at(self, epoch: _Epoch) -> float:
        """Return when all states of an epoch are as new again, at the latest."""
        return epoch.until + self._span + _MARGIN

    # ---- lines -------------------------------------------------------------------------------------------------------

    def limiter_of(self, key: Hashable, on: Callable[[Line], LimiterT]) -> LimiterT:
        """Return a limiter `on` the line of a key, which has its state for as long as somebody holds the limiter."""
        while True:
            epoch, index, state, now = self.enter(key)
            states, lease = epoch.states, _Lease()
            held = ref(lease)
            if type(state) is _Live:
                live, before = state, state.lease
                current = before()
                if current is not None:
                    return _with_lease(on(live.line), current)
                with self.lock:
                    if live.lease is before and states[index] is live and self.epoch is epoch:
                        live.lease = held
                if live.lease is held:
                    return _with_lease(on(live.line), lease)
                continue
            live = _Live(INF)
            live.line = self._line_from(state, epoch, now)
            live.lease = held
            lines = epoch.lines
            with self.lock:
                if states[index] is state and self.epoch is epoch:
                    lines[index] = key
                    states[index] = live
                    epoch.stamp = live
            if states[index] is live:
                return _with_lease(on(live.line), lease)

    def tidy(self, key: Hashable) -> None:
        """Give up the line of a key if it has come to rest."""
        epoch = self.epoch
        index = epoch.index.get(key)
        if index is not None:
            self._give_up(epoch, index, self.now_fn())

    def _line_from(self, state: Any, epoch: _Epoch, now: float) -> Line:
        limits = LimitSet(self.declared, now, self.lock)
        limits.states = _shifted(_unpacked(state, limits), limits.base - epoch.limits.base)
        return Line(limits, self.now_fn)

    def _give_up_lines(self, epoch: _Epoch, now: float) -> None:
        for index in epoch.lines.copy():
            self._give_up(epoch, index, now)

    def _give_up(self, epoch: _Epoch, index: int, now: float) -> bool:
        """Put the state of a line in its place, if nobody can tell the difference; return whether it is there."""
        states, lines, live = epoch.states, epoch.lines, epoch.states[index]
        if type(live) is not _Live:
            return True
        lease, line = live.lease, live.line
        if lease() is not None or not line._is_idle(now):
            return False
        limits = line.limits
        inner = limits.read()
        if _as_new_at(inner, limits.base) > self._as_new_at(epoch):
            return False
        state = _packed(_shifted(inner, epoch.limits.base - limits.base))
        stamp = object()
        with self.lock:
            if states[index] is live and live.lease is lease and self.epoch is epoch:
                states[index] = state
                del lines[index]
                epoch.stamp = stamp
                return True
        return False


class KeyedBase(Single, Generic[LimiterT]):
    """What keyed limiters for threads and for asyncio have in common: all but how they wait."""

    def __init__(self, keys: Keys, like: LimiterBase, on: Callable[[Line], LimiterT]) -> None:
        self._keys = keys
        self._like = like  # its checks are used, never its permits
        self._on = on  # makes a limiter on a line

    def try_acquire(self, key: Hashable, amount: Amount = 1) -> bool:
        """Take `amount` for a key if it is there now; never waits, and never goes before one who does.

        False as well for what could never be had.
        """
        keys = self._keys
        bucket, now_fn = keys.bucket, keys.now_fn
        while amount is ONE and bucket is not None:
            epoch = keys.epoch
            try:
                index = epoch.index.get(key)
            except TypeError:
                _check_key(key)
                raise
            if index is None:
                break
            states = epoch.states
            zero_at = states[index]  # before the clock, as in RateLimiter.try_acquire
            now = now_fn() - epoch.origin
            taken = zero_at + bucket.interval
            if now >= epoch.horizon:
                break
            if taken > now:
                if zero_at < INF and states[index] is zero_at:
                    return False
                break
            oldest = now - epoch.reach
            if zero_at < oldest:
                taken += oldest - zero_at
            with keys.lock:
                if states[index] is zero_at and keys.epoch is epoch:
                    states[index] = taken
                    return True
        amount = self._like._checked_units(amount)
        granted = keys.try_take(key, amount)
        return self._limiter_of(key).try_acquire(amount) if granted is None else granted

    def available_tokens(self, key: Hashable) -> float:
        """Return what every limit of a key would grant now to one who need not wait; below 0 where there is a debt."""
        epoch, state, now = self._keys.read(key)
        if type(state) is _Live:
            return self._limiter_of(key).available_tokens
        inner = now - epoch.limits.base
        pairs = paired(_unpacked(state, epoch.limits))
        return min([float(rule.available(s, inner if type(rule) is TokenBucket else now)) for rule, s in pairs])

    def retry_after(self, key: Hashable, amount: Amount = 1) -> float:
        """Return the seconds after which `amount` could be had for a key, behind all who wait; 0.0 if it could be now.

        Raises:
            ValueError: It could never be had.
        """
        amount = self._like._checked(amount)
        epoch, state, now = self._keys.read(key)
        if type(state) is _Live:
            return self._limiter_of(key).retry_after(amount)
        ready_at, _ = epoch.limits.ask_in_turn(_unpacked(state, epoch.limits), amount, now)
        return ready_at - now if ready_at > now + epoch.limits.early else 0.0

    def refund(self, key: Hashable, amount: Amount) -> None:
        """Give back `amount` of what was taken last for a key; of a mapping, the units that it names."""
        amount = self._like._checked_units(amount)
        self._limiter_of(key).refund(amount)
        self._keys.tidy(key)

    def charge(self, key: Hashable, amount: Amount) -> None:
        """Take `amount` for a key at once, be it there or not; of a mapping, the units that it names.

        What was not there is a debt, paid off before anybody else is served.
        """
        amount = self._like._checked_units(amount)
        self._limiter_of(key).charge(amount)
        self._keys.tidy(key)

    def pause_for(self, key: Hashable, seconds: float) -> None:
        """Let nothing through for a key for so many seconds, as after a 429; a pause under way is never cut short."""
        require_at_least("seconds", seconds, 0.0)
        self._limiter_of(key).pause_for(seconds)
        self._keys.tidy(key)

    def _limiter_of(self, key: Hashable) -> LimiterT:
        return self._keys.limiter_of(key, self._on)

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._keys)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        number = len(self)
        each = ", ".join(map(_in_words, self._keys.declared))
        return f"<{type(self).__name__} of {each}: {number} key{'' if number == 1 else 's'} remembered>"


class KeyedRateLimiter(KeyedBase[RateLimiter]):
    """A `RateLimiter` for each key: of each customer, host or address, however many there are.

    Args:
        limits: One or more `RateLimit` and `Window`; for each key every one of them holds.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: Sleeps so many seconds; see `RateLimiter`.
        initial: Tokens in each bucket of each key when this is made; None for full ones.

    A key is anything hashable.  To each it is as if its limiter had been there since this was made, and were there for
    ever: what is forgotten is what is as new again, and `initial` is about the first moments after the start, not about
    keys that come later.  A key is forgotten when it was not used for once to twice the time in which its limits are as
    new again, at least 1 s, by the next use of any key; one with a reservation that somebody holds, with a pause or a
    debt is not.  If the clock steps back, what is new or was forgotten may have to wait for as long as the step.

    Thread-safe, and safe to use in a signal handler; a key's own `__hash__` and `__eq__` are called under no lock.
    `try_acquire` is O(number of limits); once in a while it has the memory freed of all that is forgotten.  A key with
    one RateLimit takes 95 to 120 bytes besides itself, and twice that while it is used in one epoch and the next.

    >>> clock = [0.0]
    >>> limiter = KeyedRateLimiter(RateLimit(per_second=1, burst=2), now_fn=lambda: clock[0])
    >>> [limiter.try_acquire(name) for name in ("ann", "ann", "ann", "bob")]
    [True, True, False, True]
    >>> limiter.retry_after("ann"), limiter.available_tokens("bob"), limiter
    (1.0, 1.0, <KeyedRateLimiter of 1 calls/s (burst 2): 2 keys remembered>)
    >>> clock[0] = 60.0
    >>> limiter.try_acquire("bob"), len(limiter)
    (True, 1)
    """

    _like: RateLimiter

    def __init__(
        self,
        *limits: RateLimit | Window,
        now_fn: Callable[[], float] | None = None,
        sleep_fn: Callable[[float], object] | None = None,
        initial: float | None = None,
    ) -> None:
        like = RateLimiter(*limits, now_fn=now_fn, sleep_fn=sleep_fn, initial=initial)
        super().__init__(Keys(limits, like._now_fn, initial), like, partial(limiter_on, like))

    def acquire(self, key: Hashable, amount: Amount = 1, timeout: float | None = None) -> bool:
        """Take `amount` for a key, waiting for it if need be.

        Args:
            key: Whose.
            amount: A number of every limit's unit, or a mapping by unit.
            timeout: Seconds to wait at most; None to wait as long as it takes.

        Returns:
            True when it is taken; False, at once and with nothing taken, if the timeout cannot be met.

        Raises:
            ValueError: It could never be had.
        """
        optional(require_at_least, "timeout", timeout, 0.0)
        if self.try_acquire(key, amount):
            return True
        amount = self._like._checked(amount)
        limiter = self._limiter_of(key)
        try:
            return limiter.acquire(amount, timeout)
        finally:
            del limiter
            self._keys.tidy(key)

    def reserve(self, key: Hashable, amount: Amount = 1) -> Reservation:
        """Take a place in the line of a key, without waiting there: see `RateLimiter.reserve`.

        Raises:
            ValueError: It could never be had.
        """
        amount = self._like._checked(amount)
        return self._limiter_of(key).reserve(amount)


def limiter_on(like: RateLimiter, line: Line) -> RateLimiter:
    """Return a limiter that waits as another does, on another line."""
    limiter = object.__new__(RateLimiter)
    limiter.__dict__.update(like.__dict__)
    LimiterBase.__init__(limiter, line)
    return limiter


def _with_lease(limiter: LimiterT, lease: _Lease) -> LimiterT:
    """Have who holds a limiter, or a reservation of it, hold a lease."""
    vars(limiter)["lease"] = lease
    return limiter


def _packed(states: States) -> Any:
    """Return the states as they are remembered: without the rules, and one bucket's as its float."""
    only = states[0]
    return only if len(states) == 2 and type(only) is float else states[:-1]


def _unpacked(state: Any, limits: LimitSet) -> States:
    return (*state, limits.rules) if type(state) is tuple else (state, limits.rules)


def _as_of(now: float, limits: LimitSet) -> States:
    """Return states that are as new from an instant on, and grant no more before it than old ones that were so then."""
    states = [s if type(r) is TokenBucket else r._with(s, now, r.most) for r, s in paired(limits.states)]
    return (*states, limits.rules)


def _as_new_at(states: States, base: float) -> float:
    """Return the instant from which states are as new."""
    instants = [-INF]
    for rule, state in paired(states):
        if type(rule) is TokenBucket:
            instants.append(base + state + rule.span)
        elif state[0]:
            instants.append(state[0][-1][-1][0])
    return max(instants)


def _look_up(index: dict[Hashable, int], key: Hashable) -> int | None:
    try:
        return index.get(key)
    except TypeError:
        _check_key(key)
        raise


def _check_key(key: object) -> None:
    """Refuse a key that has no hash."""
    try:
        hash(key)
    except TypeError:
        refuse_type("key", key, "something hashable")
