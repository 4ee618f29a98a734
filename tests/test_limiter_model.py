"""The limiter against a slow, obviously right model, on random schedules, in both worlds; and the model by hand.

A `Schedule` is a value made from a seed: limits, and what is done at which instant.  A world runs it on a limiter in
virtual time and writes down what it was told (the log); `check` goes through the log beside the model of
`limiter_model.py` and asserts that the model would have said the same, that who waited went on at his instant (neither
before nor after it), and, of the admissions alone, that every window of promise 2 holds.

Four worlds: threads that take turns; asyncio; asyncio where plain calls go to a `RateLimiter` and tasks wait at two
asyncio limiters that share it; and one caller whose sleeps last longer than he asked for.  A limiter's clock is stepped
in tests of their own: a waiter sleeps through a step, so there less is promised.

QENGINE_STRESS=10000 runs 10,000 schedules in each world.  A failure names its seed and world and shows the schedule
with all left out that can be left out; it runs again by `fault(world, schedule)`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import pytest
from limiter_model import EPS, Amount, Impossible, Limits, Model, Place, part_of

from qengine import RateLimit, RateLimiter, Window
from qengine.aio_limiter import AsyncRateLimiter
from qengine.testing import VirtualClock

Count = Callable[[int], int]

TOLERANCE = 1e-6        # seconds, or units, that two ways to add up the same may differ by
HORIZON = 10_000.0      # seconds after which everybody has had his turn
CATCH_UP = 0.020        # seconds of lateness that promise 2 declares
BEGUN = "begun"         # what a call that may wait says first
GAVE_UP = "gave up"


@dataclass(frozen=True)
class Op:
    """Something done at an instant.

    `of` is the number of the operation whose reservation, or whose waiting, it is about; `value` is the timeout of
    `acquire`, the seconds of `pause_for` and `step`, the limits of `set_limits`, or by how much a sleep is overslept.
    """

    number: int
    at: float
    kind: str
    amount: Amount = 1
    value: Any = None
    of: int = -1

    def __repr__(self) -> str:
        parts = [f"{self.number}, {self.at:g}, {self.kind!r}"]
        parts += [f"amount={self.amount!r}"] if self.amount != 1 else []
        parts += [f"value={self.value!r}"] if self.value is not None else []
        parts += [f"of={self.of}"] if self.of >= 0 else []
        return f"Op({', '.join(parts)})"


@dataclass(frozen=True)
class Schedule:
    """Limits, what is done in order, and how late each sleep ends where sleeps end late."""

    limits: Limits
    ops: Sequence[Op]
    late: Sequence[float] = (0.0,)

    @property
    def begin(self) -> float:
        """The first instant.  A clock that is stepped begins where floats are coarser than on the clock that waits."""
        return 2.0**17 if any(op.kind == "step" for op in self.ops) else 0.0

    def __repr__(self) -> str:
        lines = "".join(f"    {op!r},\n" for op in self.ops)
        return f"Schedule({self.limits!r}, [\n{lines}], late={self.late!r})"


class Said(NamedTuple):
    """A line of the log: at that instant of the limiter's clock an operation had that answer."""

    now: float
    op: Op
    answer: Any


# ---- schedules -------------------------------------------------------------------------------------------------------

RATES = (0.25, 0.5, 1, 1, 2, 4, 3, 10, 0.7)
GAPS = (0, 0, 0, 0, 0.125, 0.25, 0.25, 0.5, 0.5, 1, 1, 2, 3.5)
WAITING = ("acquire", "wait")
LATENESS = (0.0, 0.0, 0.005, 0.02, 0.021, 0.5, 4.0)
ABOUT = {"give_up": "acquire", "read": "reserve", "wait": "reserve", "cancel": "reserve"}
AMOUNTS = ("try_acquire", "acquire", "reserve", "refund", "charge", "retry_after")
VALUES: dict[str, tuple[float | None, ...]] = {
    "acquire": (None, None, None, 0, 0.5, 1, 4, 20), "pause_for": (0.125, 1, 5),
    "step": (-5, -1, -0.25, -0.25, 0.25, 1, 5),
}
WEIGHTS = {
    "try_acquire": 5, "acquire": 6, "reserve": 6, "read": 3, "wait": 3, "cancel": 4, "give_up": 1, "refund": 2,
    "charge": 1, "pause_for": 1, "set_limits": 1, "retry_after": 2, "available_tokens": 2,
}
STEPS = {"try_acquire": 5, "acquire": 6, "charge": 1, "pause_for": 1, "step": 4}


def draw_limits(rng: random.Random, units: Sequence[str]) -> Limits:
    def bucket(unit: str) -> RateLimit:
        return RateLimit(per_second=rng.choice(RATES), burst=rng.choice((1, 2, 2, 3, 5)), unit=unit)

    def window(unit: str) -> Window:
        return Window(limit=rng.choice((1, 2, 2, 3, 5)), seconds=rng.choice((0.5, 1, 3, 10, 0.3)), unit=unit)

    limits: list[RateLimit | Window] = [rng.choice((bucket, bucket, window))(unit) for unit in units]
    limits += [rng.choice((bucket, window))(rng.choice(units)) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    return tuple(limits)


def draw(seed: int, weights: Mapping[str, int] = WEIGHTS) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    gaps = rng.choice((GAPS, GAPS[:-4], (*GAPS, 9, 30)))
    kinds = [kind for kind in weights if rng.random() < 0.75] or list(weights)      # so that the others meet
    units = ("calls", "tokens") if rng.random() < 0.3 else ("calls",)
    limits = draw_limits(rng, units)
    ops: list[Op] = []
    at = 0.0
    for number in range(rng.randint(3, 20)):
        at += rng.choice(gaps)
        kind = rng.choices(kinds, [weights[kind] for kind in kinds])[0]
        amount: Amount = rng.choice((1, 1, 1, 1, 1, 1, 2, 0.5, 1.25, 3))
        if len(units) > 1 and rng.random() < 0.6:
            amount = {unit: rng.choice((1, 2, 0.5)) for unit in rng.sample(units, rng.choice((1, 2)))}
        op = Op(number, at, kind)
        if kind in ABOUT:
            earlier = [other.number for other in ops if other.kind == ABOUT[kind]]
            waited_for = [other.of for other in ops if other.kind == "wait"]
            if not earlier:
                continue
            op = replace(op, of=rng.choice(earlier[-4:]))
            if kind == "wait" and op.of in waited_for:
                continue
        elif kind == "set_limits":
            op = replace(op, value=draw_limits(rng, units))
        elif kind in VALUES:
            op = replace(op, value=rng.choice(VALUES[kind]))
        if kind in AMOUNTS:
            op = replace(op, amount=amount)
        ops.append(op)
    ops = ops or [Op(0, 0.0, "available_tokens")]
    return Schedule(limits, ops, [rng.choice(LATENESS) for _ in range(12)])


# ---- worlds ----------------------------------------------------------------------------------------------------------


class Time:
    """The time of a limiter: a virtual clock's, but for steps."""

    def __init__(self, schedule: Schedule) -> None:
        self.clock = VirtualClock()
        self.begin = schedule.begin
        self.offset = 0.0
        self.fns: dict[str, Any] = {"now_fn": self.clock.now}
        if self.begin:
            self.fns = {"now_fn": self.now, "sleep_fn": self.clock.sleep}

    def now(self) -> float:
        return self.begin + self.clock.now() + self.offset

    def step(self, seconds: float) -> float:
        self.offset += seconds
        return self.offset


class Log(list[Said]):
    """What a limiter says to the operations of a schedule, line by line."""

    def __init__(self, time: Any, limiter: Any, *waiting: Any) -> None:
        self.time = time
        self.limiter = limiter
        self.limiters = waiting or (limiter,)       # where to wait, in turn
        self.reservations: dict[int, Any] = {}

    def note(self, op: Op, answer: Any) -> None:
        if isinstance(answer, Exception):
            answer = ValueError if isinstance(answer, ValueError) else repr(answer)
        self.append(Said(self.time.now(), op, answer))

    def do(self, op: Op) -> None:
        """Do what does not wait."""
        if op.of >= 0 and op.of not in self.reservations:
            return
        try:
            self.note(op, self._answer(op))
        except Exception as error:
            self.note(op, error)

    def _answer(self, op: Op) -> Any:
        limiter: Any = self.limiter
        reservation: Any = self.reservations.get(op.of)
        match op.kind:
            case "try_acquire" | "retry_after" | "refund" | "charge":
                return getattr(limiter, op.kind)(op.amount)
            case "pause_for":
                return limiter.pause_for(op.value)
            case "step":
                return self.time.step(op.value)
            case "set_limits":
                return limiter.set_limits(*op.value)
            case "reserve":
                self.reservations[op.number] = self.one_of(op).reserve(op.amount)
                return self.reservations[op.number].ready_at
            case "read":
                return reservation.ready_at, reservation.delay
            case "cancel":
                return reservation.cancel()
        assert op.kind == "available_tokens"
        return limiter.available_tokens

    def one_of(self, op: Op) -> Any:
        return self.limiters[op.number % len(self.limiters)]

    def waiting(self, op: Op) -> Callable[[], Any] | None:
        """What waits, to be called; None if that is for a reservation that was refused."""
        if op.kind == "wait":
            reservation = self.reservations.get(op.of)
            return None if reservation is None else reservation.wait
        return partial(self.one_of(op).acquire, op.amount, op.value)

    def do_waiting(self, op: Op) -> None:
        if call := self.waiting(op):
            self.note(op, BEGUN)
            try:
                self.note(op, call())
            except Exception as error:
                self.note(op, error)

    async def await_waiting(self, op: Op) -> None:
        if call := self.waiting(op):
            self.note(op, BEGUN)
            try:
                self.note(op, await call())
            except Exception as error:
                self.note(op, error)
            except asyncio.CancelledError:
                self.note(op, GAVE_UP)

    def finish(self, schedule: Schedule) -> Log:
        """Ask each reservation once more."""
        for number in self.reservations:
            self.do(Op(len(schedule.ops) + number, self.time.now(), "read", of=number))
        return self


def threads(schedule: Schedule) -> Log:
    """Threads that take turns."""
    time = Time(schedule)
    clock = time.clock
    log = Log(time, RateLimiter(*schedule.limits, **time.fns))
    waiters = []
    for op in schedule.ops:
        clock.sleep(max(0.0, op.at - clock.now()))
        if op.kind in WAITING:
            waiters.append(clock.thread(log.do_waiting, (op,), f"waiter {op.number}"))
            clock.begin(waiters[-1])
        elif op.kind != "give_up":      # a thread cannot be made to
            log.do(op)
    clock.sleep(HORIZON)
    log.finish(schedule)
    end = len(log)
    for waiter in waiters:
        clock.interrupt(waiter)
        waiter.join()
    del log[end:]
    return log


async def tasks(schedule: Schedule, log: Log) -> Log:
    clock = log.time.clock
    waiters: dict[int, asyncio.Task[None]] = {}
    for op in schedule.ops:
        await clock.sleep(max(0.0, op.at - clock.now()))
        if op.kind in WAITING:
            waiters[op.number] = asyncio.create_task(log.await_waiting(op))
            await asyncio.sleep(0)
        elif op.kind != "give_up":
            log.do(op)
        elif op.of in waiters:
            waiters[op.of].cancel()
    await clock.sleep(HORIZON)
    log.finish(schedule)
    end = len(log)
    for waiter in waiters.values():
        waiter.cancel()
    await asyncio.gather(*waiters.values())
    del log[end:]
    return log


def in_asyncio(schedule: Schedule) -> Log:
    """Tasks of one loop."""
    time = Time(schedule)
    return asyncio.run(tasks(schedule, Log(time, AsyncRateLimiter(*schedule.limits, **time.fns))))


def shared(schedule: Schedule) -> Log:
    """Tasks that wait at two asyncio limiters, which share the one that is asked for all the rest."""
    time = Time(schedule)
    limiter = RateLimiter(*schedule.limits, **time.fns)
    waiting = [AsyncRateLimiter(limiter, sleep_fn=time.clock.sleep) for _ in range(2)]
    return asyncio.run(tasks(schedule, Log(time, limiter, *waiting)))


def late(schedule: Schedule) -> Log:
    """One caller, whose sleeps last longer than he asked for."""
    time = Time(schedule)
    lateness = cycle(schedule.late)

    def sleep(seconds: float) -> None:
        time.step(seconds + next(lateness))
        log.note(op, BEGUN)     # he who waits; that is to say, he woke

    log = Log(time, RateLimiter(*schedule.limits, now_fn=time.now, sleep_fn=sleep))
    for op in schedule.ops:
        time.step(max(0.0, op.at - time.now()))
        if op.kind in WAITING:
            log.do_waiting(op)
        elif op.kind != "give_up":
            log.do(op)
    time.step(HORIZON)
    return log.finish(schedule)


WORLDS = {"threads": threads, "asyncio": in_asyncio, "shared": shared, "late": late}


# ---- what must hold --------------------------------------------------------------------------------------------------


class Witness:
    """Goes through a log beside the model."""

    def __init__(self, schedule: Schedule, punctual: bool = True) -> None:
        self.model = Model(schedule.limits, schedule.begin)
        self.punctual = punctual
        self.places: dict[int, Place] = {}      # of reservations
        self.waiters: dict[int, Place] = {}
        self.due: tuple[int, Any] | None = None     # what the next line has to say
        self.steps = any(op.kind == "step" for op in schedule.ops)
        self.offset = 0.0                       # of all steps of the clock
        self.since = schedule.begin             # when the line before was written

    def hear(self, said: Said) -> None:
        """Assert that the model says the same."""
        now, op, answer = said
        number = op.number
        if self.punctual:
            self.nobody_is_overdue(now)
        self.model.pass_until(now)
        due, self.due = self.due, None
        assert due in (None, (number, answer)), f"{said}: expected {due} at once"
        if number in self.waiters:
            self.hear_waiter(said, self.waiters[number])
        elif due is None:
            expected = self.expected(op)
            if answer is not BEGUN:
                assert same(answer, expected), f"{said}: expected {expected}"
            elif isinstance(expected, Place):
                self.waiters[number] = expected
            elif expected is False and op.kind == "acquire" and self.steps:
                self.waiters[number] = self.model.stand(op.amount, op.value)
            else:
                self.due = number, expected

    def expected(self, op: Op) -> Any:
        model, place = self.model, self.places.get(op.of)
        try:
            model.check(op.amount)
            match op.kind:
                case "reserve":
                    self.places[op.number] = model.reserve(op.amount)
                    return model.ready_at(self.places[op.number])
                case "read":
                    assert place is not None
                    ready_at = model.ready_at(place)
                    return ready_at, max(0.0, ready_at - float(model.now))
                case "wait" | "cancel":
                    assert place is not None
                    return getattr(model, op.kind)(place)
                case "acquire":
                    return model.join(op.amount, op.value)
                case "step":
                    self.offset += op.value
                    return self.offset
                case "pause_for" | "set_limits":
                    return getattr(model, op.kind)(op.value)
                case "available_tokens":
                    return model.available_tokens()
            return getattr(model, op.kind)(op.amount)
        except Impossible:
            return ValueError

    def hear_waiter(self, said: Said, place: Place) -> None:
        """Assert that a waiter may go on as he does."""
        now, op, answer = said
        may_go = not place.over and self.model.may_go(place)
        if answer is BEGUN:         # he woke
            self.due = (op.number, True) if may_go and now <= place.latest else self.due
            return
        if answer is True:
            assert may_go, f"{said}: not before {place.over or self.model.earliest(place)}"
            self.model.go(place)
        elif answer is False:
            in_time = not place.over and now < place.latest and self.model.earliest(place) <= place.latest + EPS
            assert place.over == "cancelled" or not in_time, f"{said}: he could still have it in time"
        elif answer is ValueError:
            assert place.over == "impossible", f"{said}: possible"
        else:
            assert answer == GAVE_UP, f"{said}: an error"
        if answer is not True and place.over != "cancelled":
            self.model.leave(place)
        del self.waiters[op.number]

    def nobody_is_overdue(self, now: float) -> None:
        """Assert that who waits has had no reason to go on before now."""
        self.model.pass_until(max(float(self.model.now), now - TOLERANCE))
        for number, place in self.waiters.items():
            at = place.latest
            if place.over:
                at = self.since
            elif self.model.line[0] is place:
                at = min(at, self.model.earliest(place))
            assert at >= now - TOLERANCE, f"operation {number} was due at {at}, and still waits at {now}"
        self.since = now


def same(answer: Any, expected: Any) -> bool:
    if isinstance(answer, bool) or isinstance(expected, bool) or not isinstance(expected, (float, tuple)):
        return answer is expected
    if type(answer) is not type(expected) and not isinstance(answer, (int, float)):
        return False
    return bool(answer == pytest.approx(expected, abs=TOLERANCE, rel=1e-9))


def hear_out(schedule: Schedule, log: Sequence[Said], punctual: bool = True) -> None:
    """Assert that the model would have said all that a log says."""
    witness = Witness(schedule, punctual)
    for said in log:
        witness.hear(said)
    assert not witness.waiters, f"still waiting at the end: {sorted(witness.waiters)}"


def check(schedule: Schedule, log: Sequence[Said], punctual: bool = True) -> None:
    hear_out(schedule, log, punctual)
    windows_hold(schedule.limits, log)


# ---- promise 2, of the admissions alone ------------------------------------------------------------------------------


def admissions(log: Sequence[Said]) -> Iterator[tuple[float, Amount]]:
    """What was admitted, and when, of what was not given back by `cancel`."""
    amounts = {said.op.number: said.op.amount for said in log if said.op.kind == "reserve"}
    cancelled = {said.op.of for said in log if said.op.kind == "cancel" and said.answer is True}
    last = {said.op.of: said for said in log if said.op.kind == "read"}
    for now, op, answer in log:
        if op.kind in ("try_acquire", "acquire") and answer is True:
            yield now, op.amount
    for number, said in last.items():
        if number not in cancelled and said.answer[0] <= said.now:
            yield said.answer[0], amounts[number]


def windows_hold(limits: Limits, lines: Iterable[Said]) -> None:
    """Assert promise 2 of every window between two admissions; what was given back in it may be had once more.

    A limit that is changed goes on: it never admits what the burst at the beginning of a window, and all the rates
    since, do not; a slot counts while no window has forgotten it.
    """
    log = list(lines)
    changes = [(-math.inf, limits)]
    changes += [(said.now, said.op.value) for said in log if said.op.kind == "set_limits"]
    refunds = [(said.now, said.op.amount) for said in log if said.op.kind == "refund" and said.answer is None]
    admitted = sorted(admissions(log), key=lambda one: one[0])
    for life in lives(changes):
        unit = life[0][1].unit
        taken = [(at, float(part_of(amount, unit))) for at, amount in admitted if at > life[0][0] + TOLERANCE]
        given = [(at, float(part_of(amount, unit, implied=0))) for at, amount in refunds]
        for first, (begin, _) in enumerate(taken):
            total = 0.0
            for end, size in taken[first:]:
                total += size
                most = allowed(life, begin, end)
                back = sum(size for at, size in given if begin - TOLERANCE <= at <= end + TOLERANCE)
                assert total <= most + back + TOLERANCE, f"{total:g} {unit} in [{begin}, {end}], where {most:g} may be"


Life = list[tuple[float, Any]]      # since when, what; None: it is no more


def lives(changes: Sequence[tuple[float, Limits]]) -> list[Life]:
    """Each limit with what became of it: from which instant it was what."""
    ended: list[Life] = []
    alive: list[Life] = []
    for at, limits in changes:
        olds, alive = alive, []
        for limit in limits:
            heirs = [life for life in olds if type(life[0][1]) is type(limit) and life[0][1].unit == limit.unit]
            if heirs:
                olds.remove(heirs[0])
                heirs[0].append((at, limit))
            alive.append(heirs[0] if heirs else [(at, limit)])
        for life in olds:
            life.append((at, None))
        ended += olds
    return ended + alive


def allowed(life: Life, begin: float, end: float) -> float:
    """How much a limit admits from one instant to the other, both included."""
    spans = [
        (max(begin, since), min(end, until), limit)
        for (since, limit), (until, _) in zip(life, [*life[1:], (math.inf, None)], strict=True)
        if until >= begin - TOLERANCE and since <= end + TOLERANCE
    ]
    if any(limit is None for *_, limit in spans):
        return math.inf
    if isinstance(spans[0][2], RateLimit):
        rates = [limit.rate for *_, limit in spans]
        refilled = sum(limit.rate * (until - since) for since, until, limit in spans)
        return float(max(limit.burst for *_, limit in spans[:2]) + refilled + max(rates) * CATCH_UP)
    if any(begin + limit.seconds <= until + TOLERANCE for _, until, limit in spans):
        return math.inf
    return float(max(limit.limit for *_, limit in spans))


# ---- what is found ---------------------------------------------------------------------------------------------------


def fault(world: str, schedule: Schedule) -> str:
    """What is wrong with a schedule in a world; nothing if all is well."""
    try:
        check(schedule, WORLDS[world](schedule), punctual=world != "late")
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def shrunk(schedule: Schedule, fails: Callable[[Schedule], object]) -> Schedule:
    """The schedule without all that can be left out while it fails."""
    for part in ("ops", "limits"):
        position = 0
        while position < len(getattr(schedule, part)):
            items = getattr(schedule, part)
            smaller = replace(schedule, **{part: [*items[:position], *items[position + 1 :]]})
            if smaller.limits and smaller.ops and fails(smaller):
                schedule = smaller
            else:
                position += 1
    return schedule


def find_fault(world: str, count: int, weights: Mapping[str, int], fault: Callable[[str, Schedule], str]) -> None:
    """Fail with the first schedule of so many that has a fault, and with its seed."""
    for seed in range(count):
        schedule = draw(seed, weights)
        if fault(world, schedule):
            smallest = shrunk(schedule, partial(fault, world))
            pytest.fail(f"seed {seed} in {world}: {fault(world, smallest)}\n{smallest}", pytrace=False)


@pytest.mark.stress
@pytest.mark.parametrize("world", WORLDS)
def test_random_schedules_go_as_the_model_says(world: str, stress_count: Count) -> None:
    find_fault(world, stress_count(50), WEIGHTS, fault)


# ---- steps of the clock ----------------------------------------------------------------------------------------------


def step_fault(world: str, schedule: Schedule) -> str:
    """What is wrong where the clock is stepped: who takes what is not there, or waits for ever.

    On the limiter's own clock all is as the model says, but for when a waiter looks at it, who sleeps through a step;
    and how long those before him will sleep, nobody behind them foresees.  Windows hold on that clock; where it only
    goes back, for the time that really passes as well.
    """
    log = WORLDS[world](schedule)
    steps = [op.value for op in schedule.ops if op.kind == "step"]
    try:
        hear_out(schedule, log, punctual=False)
        if all(step < 0 for step in steps):
            windows_hold(schedule.limits, in_elapsed_time(log))
        windows_hold(schedule.limits, log)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def in_elapsed_time(log: Sequence[Said]) -> Iterator[Said]:
    """A log on a clock that was never stepped."""
    offset = 0.0
    for said in log:
        if said.op.kind == "step":
            offset = said.answer
        yield said._replace(now=said.now - offset)


def went_at(log: Sequence[Said]) -> dict[int, float]:
    """When each was admitted who would have it, on a clock that was never stepped."""
    return {said.op.number: said.now for said in in_elapsed_time(log) if said.answer is True}


def refused(log: Sequence[Said]) -> set[int]:
    return {said.op.number for said in log if said.answer is ValueError}


def lockout_fault(world: str, schedule: Schedule) -> str:
    """Who waits longer, because the clock was stepped back, than by the sum of the steps."""
    ops = [replace(op, value=None if op.kind == "acquire" else -abs(op.value)) for op in schedule.ops]
    stepped = WORLDS[world](replace(schedule, ops=ops))
    calm = went_at(WORLDS[world](replace(schedule, ops=[replace(op, value=op.value and 0.0) for op in ops])))
    most = CATCH_UP * len(ops) - sum(op.value for op in ops if op.kind == "step")
    waited = {number: at - calm[number] for number, at in went_at(stepped).items()}
    lost = {op.number for op in ops if op.kind == "acquire"} - waited.keys() - refused(stepped)
    if lost:
        return f"waiting for ever: {sorted(lost)}"
    return "".join(f"{number} went {late:g} s later; " for number, late in waited.items() if late > most)


@pytest.mark.stress
@pytest.mark.parametrize("world", ["threads", "asyncio"])
def test_where_the_clock_is_stepped_nothing_is_minted(world: str, stress_count: Count) -> None:
    find_fault(world, stress_count(40), STEPS, step_fault)


@pytest.mark.stress
@pytest.mark.parametrize("world", ["threads", "asyncio"])
def test_a_backward_step_locks_nobody_out_for_longer_than_it_is(world: str, stress_count: Count) -> None:
    find_fault(world, stress_count(20), {"acquire": 3, "step": 1}, lockout_fault)


# ---- by hand ---------------------------------------------------------------------------------------------------------

TEN = RateLimit(per_second=1, burst=10)
TWENTY = RateLimit(per_second=10, burst=20)
TWO = RateLimit(per_second=1, burst=2)

BY_HAND: dict[str, tuple[Limits, list[tuple[Op, Any]]]] = {
    # What x/time/rate of Go gets wrong: golang/go issues 69419 and 56924.
    "a place in the middle": ((TEN,), [
        (Op(0, 0, "reserve", 5), 0.0),
        (Op(1, 0, "reserve", 10), 5.0),
        (Op(2, 0, "reserve", 2), 7.0),
        (Op(3, 0, "cancel", of=1), True),
        (Op(4, 0, "read", of=2), (0.0, 0.0)),
        (Op(5, 0, "available_tokens"), 3.0),
        (Op(6, 0, "reserve", 8), 5.0),
        (Op(7, 7, "available_tokens"), 2.0),
    ]),
    "a place before its instant": ((TWENTY,), [
        (Op(0, 0, "try_acquire", 15), True),
        (Op(1, 0.125, "reserve", 10), 0.5),
        (Op(2, 0.25, "reserve", 2), 0.7),
        (Op(3, 0.375, "cancel", of=1), True),
        (Op(4, 0.375, "read", of=2), (0.375, 0.0)),
        (Op(5, 0.375, "available_tokens"), 6.75),
    ]),
    "a place after its instant": ((TWENTY,), [
        (Op(0, 0, "try_acquire", 15), True),
        (Op(1, 0.125, "reserve", 10), 0.5),
        (Op(2, 0.25, "reserve", 2), 0.7),
        (Op(3, 0.625, "cancel", of=1), True),
        (Op(4, 0.625, "read", of=2), (0.625, 0.0)),
        (Op(5, 0.625, "available_tokens"), 9.25),
        (Op(6, 0.625, "cancel", of=1), False),
        (Op(7, 0.625, "read", of=1), (math.inf, math.inf)),
    ]),
    "nothing is minted where it was full since": ((TWO,), [
        (Op(0, 0, "reserve", 2), 0.0),
        (Op(1, 1, "available_tokens"), 1.0),
        (Op(2, 3, "try_acquire", 2), True),
        (Op(3, 3, "cancel", of=0), True),
        (Op(4, 3, "available_tokens"), 0.0),
    ]),
    "part of it, where it was full without it": ((TWO,), [
        (Op(0, 0, "reserve", 2), 0.0),
        (Op(1, 1.5, "try_acquire"), True),
        (Op(2, 1.5, "available_tokens"), 0.5),
        (Op(3, 1.5, "cancel", of=0), True),
        (Op(4, 1.5, "available_tokens"), 1.0),
    ]),
    "a slot, and who waits for it": ((Window(2, 10),), [
        (Op(0, 0, "reserve"), 0.0),
        (Op(1, 1, "try_acquire"), True),
        (Op(2, 2, "reserve", 2), 11.0),
        (Op(3, 2, "retry_after"), 19.0),
        (Op(4, 3, "cancel", of=0), True),
        (Op(5, 3, "read", of=2), (11.0, 8.0)),
        (Op(6, 3, "refund"), None),
        (Op(7, 3, "read", of=2), (3.0, 0.0)),
    ]),
    "a pause, a debt and other limits": ((TWO,), [
        (Op(0, 0, "charge", 5), None),
        (Op(1, 0, "reserve"), 4.0),
        (Op(2, 1, "pause_for", value=9), None),
        (Op(3, 1, "read", of=1), (10.0, 9.0)),
        (Op(4, 2, "set_limits", value=(RateLimit(per_second=0.125),)), None),
        (Op(5, 2, "read", of=1), (18.0, 16.0)),
        (Op(6, 2, "reserve", 2), ValueError),
        (Op(7, 2, "available_tokens"), -1.0),
    ]),
}


@pytest.mark.parametrize("world", ["threads", "asyncio"])
@pytest.mark.parametrize("name", BY_HAND)
def test_what_was_computed_by_hand(name: str, world: str) -> None:
    limits, expected = BY_HAND[name]
    schedule = Schedule(limits, [op for op, _ in expected])
    log = WORLDS[world](schedule)
    for said, (op, answer) in zip(log, expected, strict=False):
        assert same(said.answer, answer), f"{said}: by hand it is {answer}"
        assert said.op is op
    check(schedule, log)


# ---- the oracle itself -----------------------------------------------------------------------------------------------


def test_a_lie_is_noticed() -> None:
    """Each answer of a log is believed by nobody once it is another one."""
    for seed in range(30):
        schedule = draw(seed)
        log = threads(schedule)
        for position, said in enumerate(log):
            if isinstance(said.answer, bool) and said.op.kind in ("try_acquire", "cancel"):
                with pytest.raises(AssertionError):
                    check(schedule, [*log[:position], said._replace(answer=not said.answer), *log[position + 1 :]])
            elif isinstance(said.answer, float):
                with pytest.raises(AssertionError):
                    check(schedule, [*log[:position], said._replace(answer=said.answer + 0.01), *log[position + 1 :]])


def test_what_breaks_no_rule_but_promise_2_is_noticed() -> None:
    limits = RateLimit(per_second=1, burst=2), Window(3, 10)
    tries = [Said(at, Op(number, at, "try_acquire"), True) for number, at in enumerate((0.0, 0.0, 1.0))]
    windows_hold(limits, tries)
    for at, words in ((1.5, "4 calls in .* where 3.52"), (9.0, "4 calls in .* where 3 ")):
        with pytest.raises(AssertionError, match=words):
            windows_hold(limits, [*tries, Said(at, Op(3, at, "try_acquire"), True)])


def test_a_failing_schedule_is_shrunk_to_what_fails() -> None:
    schedule = draw(3)
    guilty = schedule.ops[len(schedule.ops) // 2]
    smallest = shrunk(schedule, lambda smaller: guilty in smaller.ops)
    assert smallest.ops == [guilty]
    assert len(smallest.limits) == 1
