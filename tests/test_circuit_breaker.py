"""The circuit breaker on its own: its table of states, one probe, interruptions; in threads and in asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import os
import pickle
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any

import pytest
from freezegun import freeze_time
from shared import PATIENCE, in_threads, until

from qengine import BreakerOpenError, BreakerPolicy, RateLimitError
from qengine.breaker import BreakerAttempt, BreakerState, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def breaker(self, policy: BreakerPolicy | None = None, **options: Any) -> CircuitBreaker:
        return CircuitBreaker(policy or BreakerPolicy(failures=1, reset_after=10), now_fn=self, **options)

    def due(self, policy: BreakerPolicy | None = None, **options: Any) -> CircuitBreaker:
        """Return a breaker that has opened and whose probe is due."""
        breaker = self.breaker(policy, **options)
        breaker.trip()
        self.now += breaker.policy.reset_after
        assert breaker.state is HALF_OPEN
        return breaker


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Boom(Exception):
    """What a source fails with."""


class Interrupt(BaseException):
    """What a signal handler raises."""


def fail(breaker: CircuitBreaker, error: BaseException | None = None) -> None:
    error = error or Boom()
    with pytest.raises(type(error)), breaker:
        raise error


def lets_through(breaker: CircuitBreaker) -> bool:
    """Say whether a call would be let through, leaving things as they are."""
    attempt = breaker.try_attempt()
    if attempt is not None:
        attempt.dropped()
    return attempt is not None


# ---- states ----------------------------------------------------------------------------------------------------------


def test_failures_in_a_row_open_it_and_a_probe_closes_it(clock: Clock) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=2, reset_after=10))
    fail(breaker)
    with breaker:
        pass
    fail(breaker)
    assert breaker.state is CLOSED and breaker.retry_after() == 0.0
    fail(breaker)
    clock.now = 4.0
    assert breaker.state is OPEN and breaker.retry_after() == 6.0
    with pytest.raises(BreakerOpenError), breaker:
        pytest.fail("it is open")
    clock.now = 10.0
    assert breaker.state is HALF_OPEN and breaker.retry_after() == 0.0
    with breaker:
        assert breaker.state is HALF_OPEN
    assert breaker.state is CLOSED


def test_each_failed_probe_doubles_the_wait_up_to_the_most(clock: Clock) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=1, reset_after=10, max_reset_after=35))
    waits = []
    for _ in range(4):
        fail(breaker)
        waits.append(breaker.retry_after())
        clock.now += waits[-1]
    assert waits == [10, 20, 35, 35]


def test_as_many_probes_must_succeed_as_the_policy_says_one_after_the_other(clock: Clock) -> None:
    breaker = clock.due(BreakerPolicy(failures=1, successes=3))
    for _ in range(2):
        with breaker:
            pass
        assert breaker.state is HALF_OPEN
    with breaker:
        pass
    assert breaker.state is CLOSED


def test_a_share_of_failures_opens_it(clock: Clock) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4))
    for failed in (True, False, False):
        if failed:
            fail(breaker)
        else:
            with breaker:
                pass
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_whoever_is_refused_learns_by_whom_and_until_when(clock: Clock) -> None:
    breaker = clock.breaker(name="search")
    breaker.trip()
    clock.now = 7.5
    with pytest.raises(BreakerOpenError, match=r"^the circuit breaker 'search' is open: next try in 2\.5 s$") as caught:
        breaker.attempt()
    assert vars(caught.value)["retry_after"] == 2.5
    clock.now = 10.0
    with breaker, pytest.raises(BreakerOpenError, match="half open: a probe is out, ask again in 10 s") as caught:
        contextvars.Context().run(breaker.attempt)
    assert vars(caught.value)["retry_after"] == 10.0


def test_it_is_tripped_and_reset_by_hand(clock: Clock) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=3, reset_after=10))
    breaker.trip()
    assert breaker.state is OPEN and breaker.retry_after() == 10.0
    breaker.reset()
    assert breaker.state is CLOSED and lets_through(breaker)
    fail(breaker)
    fail(breaker)
    breaker.reset()
    fail(breaker)
    assert breaker.state is CLOSED, "the failures before the reset are forgotten"


def test_a_probe_that_was_out_at_a_reset_or_a_trip_decides_nothing(clock: Clock) -> None:
    breaker = clock.due(BreakerPolicy(failures=2, reset_after=10))
    for act, expected in ((breaker.reset, CLOSED), (breaker.trip, OPEN)):
        breaker.trip()
        clock.now += 10.0
        probe = breaker.attempt()
        act()
        (probe.failed if expected is CLOSED else probe.succeeded)()
        assert breaker.state is expected


def test_what_was_in_flight_when_it_opened_decides_nothing(clock: Clock) -> None:
    breaker = clock.breaker()
    early = [breaker.attempt() for _ in range(3)]
    early[0].failed()
    early[1].succeeded()
    assert breaker.state is OPEN
    clock.now = 10.0
    probe = breaker.attempt()
    early[2].succeeded()
    assert breaker.state is HALF_OPEN and not lets_through(breaker)
    probe.succeeded()
    assert breaker.state is CLOSED


@pytest.mark.parametrize("on_open", ["wait", "skip"])
def test_alone_it_neither_waits_nor_gives_up(clock: Clock, on_open: Any) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=1, reset_after=1, max_reset_after=1, on_open=on_open, max_reopens=0))
    for _ in range(5):
        fail(breaker)
        assert not lets_through(breaker)
        clock.now += 1.0


def test_a_step_back_of_the_clock_locks_out_for_no_longer_than_the_step(clock: Clock) -> None:
    clock.now = 1000.0
    breaker = clock.breaker()
    breaker.trip()
    clock.now -= 100.0
    assert breaker.retry_after() == 110.0
    clock.now += 110.0
    assert breaker.attempt()


def test_a_breaker_made_under_frozen_time_obeys_it() -> None:
    with freeze_time("2026-05-21") as frozen:
        breaker = CircuitBreaker(BreakerPolicy(failures=1, reset_after=60))
        fail(breaker)
        frozen.tick(59)
        assert breaker.state is OPEN and breaker.retry_after() == pytest.approx(1.0)
        frozen.move_to("2026-05-21 00:01:01")
        with breaker:
            pass
        assert breaker.state is CLOSED


# ---- what is a failure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [RateLimitError(), BreakerOpenError("another's"), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_about_the_source_neither_opens_nor_closes_it(clock: Clock, error: BaseException) -> None:
    breaker = clock.breaker()
    fail(breaker, error)
    assert breaker.state is CLOSED
    with pytest.raises(type(error)):
        breaker(functools.partial(_raise, error))()
    assert breaker.state is CLOSED
    breaker.trip()
    clock.now = 10.0
    for _ in range(3):
        fail(breaker, error)
        assert breaker.state is HALF_OPEN and lets_through(breaker)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("failure_on", [OSError, (OSError, Boom), lambda error: isinstance(error, OSError)])
def test_the_user_says_what_a_failure_is_and_other_errors_are_answers(clock: Clock, failure_on: Any) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=2, reset_after=10), failure_on=failure_on)
    for error in (OSError(), KeyError(), OSError()):
        fail(breaker, error)
    assert breaker.state is CLOSED
    fail(breaker, TimeoutError())
    assert breaker.state is OPEN
    clock.now = 10.0
    fail(breaker, KeyError())
    assert breaker.state is CLOSED, "the source answered"


def test_a_predicate_may_have_nothing_to_say(clock: Clock) -> None:
    breaker = clock.due(failure_on=lambda error: None)
    fail(breaker)
    assert breaker.state is HALF_OPEN and lets_through(breaker)


@pytest.mark.parametrize("enter", [lambda breaker: breaker, CircuitBreaker.attempt], ids=["with", "attempt"])
def test_a_predicate_that_raises_is_heard_and_frees_the_probe(clock: Clock, enter: Callable[[Any], Any]) -> None:
    def broken(error: Exception) -> bool:
        raise LookupError("in the predicate")

    breaker = clock.due(failure_on=broken)
    with pytest.raises(LookupError) as caught, enter(breaker):
        raise Boom
    assert isinstance(caught.value.__context__, Boom)
    assert breaker.state is HALF_OPEN and lets_through(breaker)


def test_a_verdict_is_said_by_hand_and_the_first_counts(clock: Clock) -> None:
    breaker = clock.breaker()
    with breaker.attempt() as attempt:
        attempt.failed()        # an answer of status 503
        attempt.succeeded()
    assert breaker.state is OPEN
    clock.now = 10.0
    with breaker.attempt() as attempt:
        attempt.succeeded()
        assert breaker.state is CLOSED
        attempt.failed()
    assert breaker.state is CLOSED
    assert breaker.try_attempt() is not None
    breaker.trip()
    assert breaker.try_attempt() is None


# ---- decorated -------------------------------------------------------------------------------------------------------


def test_a_decorated_function_keeps_its_face(clock: Clock) -> None:
    breaker = clock.breaker()

    @breaker
    def ask(what: str, *, loudly: bool = False) -> str:
        """Ask."""
        if what == "boom":
            raise Boom
        return what.upper() if loudly else what

    assert ask("a", loudly=True) == "A" and ask.__name__ == "ask" and ask.__doc__ == "Ask."
    with pytest.raises(Boom):
        ask("boom")
    with pytest.raises(BreakerOpenError):
        ask("a")
    clock.now = 10.0
    with pytest.raises(Boom):
        ask("boom")
    clock.now = 30.0
    assert ask("a") == "a" and breaker.state is CLOSED


def test_methods_are_decorated_too(clock: Clock) -> None:
    breaker = clock.breaker()

    class Client:
        @breaker
        def ask(self) -> Client:
            return self

        @breaker
        @staticmethod
        def answer() -> int:
            return 42

    client = Client()
    assert client.ask() is client and Client.answer() == 42


def test_a_decorated_coroutine_function_stays_one(clock: Clock) -> None:
    breaker = clock.breaker(BreakerPolicy(failures=2, reset_after=10))

    @breaker
    async def ask(error: BaseException | None = None) -> str:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return "answer"

    class Callable_:
        async def __call__(self) -> str:
            return await ask()

    async def main() -> None:
        assert asyncio.iscoroutinefunction(ask)
        assert await breaker(Callable_())() == await breaker(functools.partial(ask, None))() == "answer"
        for _ in range(2):
            with pytest.raises(Boom):
                await ask(Boom())
        with pytest.raises(BreakerOpenError):
            await ask()
        clock.now = 10.0
        with pytest.raises(asyncio.CancelledError):
            await ask(asyncio.CancelledError())
        assert breaker.state is HALF_OPEN
        assert await ask() == "answer" and breaker.state is CLOSED

    asyncio.run(main())


def test_generators_are_not_decorated_for_their_call_says_nothing(clock: Clock) -> None:
    breaker = clock.breaker()

    def numbers() -> Iterator[int]:
        yield 1

    async def later() -> AsyncIterator[int]:
        yield 1

    class Endless:
        def __call__(self) -> Iterator[int]:
            yield 1

    for fn in (numbers, later, functools.partial(numbers), Endless()):
        with pytest.raises(TypeError, match=r"fn is .*, allowed is .*inside a generator"):
            breaker(fn)
    with pytest.raises(TypeError, match="fn is 3"):
        breaker(3)      # type: ignore[arg-type]


def test_an_awaitable_from_a_plain_function_is_refused_when_it_comes(clock: Clock) -> None:
    breaker = clock.breaker()

    async def ask() -> None:
        raise Boom

    @breaker
    def wrapped() -> Any:
        return ask()

    for expected in (CLOSED, HALF_OPEN):
        with pytest.raises(TypeError, match=r"returned coroutine, an awaitable.*decorate an async function"):
            wrapped()
        assert breaker.state is expected
        breaker.trip()
        clock.now += 10.0
    assert lets_through(breaker)


# ---- one inside the other --------------------------------------------------------------------------------------------


def test_what_a_probe_calls_by_the_same_breaker_is_part_of_it(clock: Clock) -> None:
    breaker = clock.due()
    inner = breaker(lambda: breaker.state)

    @breaker
    def outer() -> BreakerState:
        with breaker, breaker.attempt():
            inner()
        assert breaker.state is HALF_OPEN, "what is inside decides nothing"
        with pytest.raises(BreakerOpenError):
            contextvars.Context().run(inner)
        return inner()

    assert outer() is HALF_OPEN
    assert breaker.state is CLOSED
    breaker.trip()
    clock.now += 10
    with breaker:
        fail(breaker)
        with breaker, breaker:
            assert outer.__wrapped__() is HALF_OPEN     # type: ignore[attr-defined]
        assert breaker.state is HALF_OPEN
    assert breaker.state is CLOSED


def test_what_goes_on_inside_after_the_verdict_is_not_part_of_the_probe(clock: Clock) -> None:
    breaker = clock.due()
    with breaker.attempt() as attempt:
        attempt.failed()
        assert not lets_through(breaker)


def test_an_older_block_around_the_probe_decides_nothing(clock: Clock) -> None:
    breaker = clock.breaker()
    with suppress(Boom), breaker:
        breaker.trip()
        clock.now += 10
        with breaker:
            pass
        assert breaker.state is CLOSED
        breaker.trip()
        clock.now += 10
        raise Boom
    assert breaker.state is HALF_OPEN and lets_through(breaker)


def test_a_probe_in_a_generator_may_end_in_another_context(clock: Clock) -> None:
    breaker = clock.due()

    def stream() -> Generator[int, None, None]:
        with breaker:
            yield 1
            yield 2

    items = stream()
    assert contextvars.copy_context().run(next, items) == 1
    assert not lets_through(breaker)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, items).result() == 2
        assert pool.submit(next, items, None).result() is None
    assert breaker.state is CLOSED
    breaker.trip()
    clock.now += 10.0
    items = stream()
    next(items)
    items.close()
    assert breaker.state is HALF_OPEN and lets_through(breaker)


def test_an_exit_stack_ends_what_it_began(clock: Clock) -> None:
    breaker, other = clock.due(), clock.due(name="other")
    clock.now += 10
    with ExitStack() as stack:
        assert stack.enter_context(breaker) is breaker
        stack.enter_context(other)
        with other, breaker:
            pass
        assert breaker.state is other.state is HALF_OPEN
    assert breaker.state is other.state is CLOSED

    async def main() -> None:
        async with AsyncExitStack() as stack:
            assert await stack.enter_async_context(breaker) is breaker
            attempt = await stack.enter_async_context(other.attempt())
            assert isinstance(attempt, BreakerAttempt)
            attempt.failed()

    breaker.trip()
    other.trip()
    clock.now += 10
    asyncio.run(main())
    assert breaker.state is CLOSED and other.state is OPEN


def test_an_attempt_may_end_in_another_thread(clock: Clock) -> None:
    breaker = clock.due()
    probe = breaker.attempt()
    in_threads(1, lambda _: probe.succeeded())
    assert breaker.state is CLOSED


# ---- one probe -------------------------------------------------------------------------------------------------------


def test_one_of_64_threads_is_the_probe_and_the_others_are_refused(clock: Clock) -> None:
    breaker = clock.due(BreakerPolicy(failures=1, reset_after=10, successes=3))
    rounds, count = 10, 64
    barrier, inside, most, passed, refused = threading.Barrier(count), [0], [0], list[int](), list[int]()
    all_asked = threading.Barrier(count)
    guarded = breaker(lambda: call())

    def call() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        all_asked.wait(PATIENCE)
        inside[0] -= 1

    def hammer(number: int) -> None:
        for turn in range(rounds):
            if barrier.wait(PATIENCE) == 0:
                breaker.trip()
                clock.now += 600.0
            barrier.wait(PATIENCE)
            try:
                if turn % 2:
                    guarded()
                else:
                    with breaker:
                        call()
                passed.append(number)
            except BreakerOpenError:
                refused.append(number)
                all_asked.wait(PATIENCE)

    in_threads(count, hammer)
    assert (len(passed), len(refused), most[0]) == (rounds, rounds * (count - 1), 1)


def test_one_of_1000_tasks_is_the_probe_and_the_next_one_when_it_is_cancelled(clock: Clock) -> None:
    breaker = clock.due()
    refused, passed = list[int](), list[int]()

    @breaker
    async def decorated(free: asyncio.Event) -> None:
        await free.wait()

    async def ask(number: int, free: asyncio.Event) -> None:
        try:
            if number % 2:
                async with breaker:
                    await free.wait()
            else:
                await decorated(free)
            passed.append(number)
        except BreakerOpenError:
            refused.append(number)

    async def main() -> None:
        free = asyncio.Event()
        for turn in range(4):
            tasks = [asyncio.create_task(ask(number + turn, free)) for number in range(1000)]
            await asyncio.sleep(0.0)
            await asyncio.sleep(0.0)
            assert breaker.state is HALF_OPEN and len(refused) == 999 * (turn + 1)
            if turn < 2:
                tasks[0].cancel()
            else:
                free.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert breaker.state is (HALF_OPEN if turn < 2 else CLOSED)
            if turn == 2:
                breaker.trip()
                clock.now += 10.0
                free.clear()
                asyncio.get_running_loop().call_later(0.01, free.set)

    asyncio.run(main())
    assert passed == [2, 3]


def test_tasks_that_a_probe_starts_and_awaits_are_part_of_it(clock: Clock) -> None:
    breaker = clock.due()

    async def part() -> None:
        async with breaker:
            await asyncio.sleep(0)

    async def main() -> None:
        async with breaker:
            await asyncio.gather(*(part() for _ in range(10)))
            assert breaker.state is HALF_OPEN
            with pytest.raises(BreakerOpenError):
                await asyncio.create_task(part(), context=contextvars.Context())

    asyncio.run(main())
    assert breaker.state is CLOSED


def test_a_loop_that_is_closed_under_a_probe_frees_its_place(clock: Clock) -> None:
    breaker = clock.due()

    async def hang() -> None:
        async with breaker:
            await asyncio.Event().wait()

    coroutine = hang()
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    task._log_destroy_pending = False       # type: ignore[attr-defined]
    loop.run_until_complete(asyncio.sleep(0))
    assert not lets_through(breaker)
    loop.close()
    del task, coroutine
    gc.collect()
    assert breaker.state is HALF_OPEN and lets_through(breaker)


def test_a_probe_that_nobody_holds_any_more_frees_its_place(clock: Clock) -> None:
    breaker = clock.due()
    probe = breaker.attempt()
    assert not lets_through(breaker)
    del probe
    gc.collect()
    assert lets_through(breaker)


def test_a_probe_that_does_not_come_back_is_lost_after_the_longest_wait_between_two(clock: Clock) -> None:
    breaker = clock.due(BreakerPolicy(failures=1, reset_after=10, max_reset_after=60))
    hung = breaker.attempt()
    clock.now += 55.0
    assert breaker.retry_after() == 5.0 and not lets_through(breaker)
    clock.now += 5.0
    assert breaker.retry_after() == 0.0
    second = breaker.attempt()
    hung.failed()
    assert breaker.state is HALF_OPEN, "it comes too late to decide anything"
    second.succeeded()
    assert breaker.state is CLOSED


# ---- against a model -------------------------------------------------------------------------------------------------


class Model:
    """The same, written down plainly: the whole list of verdicts, and the one probe by its number."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self.era = 0            # counts whenever it opens, closes or is reset: older attempts say nothing
        self.streak: list[bool] = []
        self.opened_at: float | None = None
        self.wait = 0.0
        self.reopened = self.passed = 0
        self.probe: int | None = None
        self.probe_at = 0.0

    def asks(self, number: int, now: float) -> bool:
        if self.opened_at is None:
            return True
        if self.probe is not None and now < self.probe_at + self.policy.max_reset_after:
            return False
        if self.probe is None and now < self.opened_at + self.wait:
            return False
        self.probe, self.probe_at = number, now
        return True

    def ends(self, number: int, verdict: bool | None, now: float) -> None:
        if self.probe == number:
            self.probe = None
            if verdict is False:
                self.reopened += 1
                self.open(now)
            elif verdict:
                self.passed += 1
                if self.passed == self.policy.successes:
                    self.close()
        elif self.opened_at is None and verdict is not None:
            self.streak.append(verdict)
            failures = self.policy.failures
            if failures is not None and self.streak[-failures:] == [False] * failures:
                self.open(now)
            last = self.streak[-self.policy.min_calls:]
            rate = self.policy.failure_rate
            if rate is not None and not verdict and len(last) == self.policy.min_calls:
                if last.count(False) / len(last) >= rate:
                    self.open(now)

    def open(self, now: float) -> None:
        self.opened_at, self.probe, self.passed = now, None, 0
        self.wait = min(self.policy.reset_after * 2 ** self.reopened, self.policy.max_reset_after)

    def close(self) -> None:
        self.__init__(self.policy)      # type: ignore[misc]

    def state(self, now: float) -> BreakerState:
        if self.opened_at is None:
            return CLOSED
        if self.probe is not None or self.passed or now >= self.opened_at + self.wait:
            return HALF_OPEN
        return OPEN


@pytest.mark.stress
def test_random_schedules_do_as_the_model_says(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(150)):
        rng, clock = random.Random(seed), Clock()
        policy = BreakerPolicy(
            failures=rng.choice([None, 1, 2, 3]), failure_rate=rng.choice([0.25, 0.5, 1.0]), reset_after=2.0,
            min_calls=rng.randint(1, 6), max_reset_after=rng.choice([2.0, 8.0]), successes=rng.randint(1, 3),
        )
        breaker, model = clock.breaker(policy), Model(policy)
        out: list[tuple[int, BreakerAttempt]] = []
        for number in range(120):
            clock.now += rng.choice([0.0, 0.25, 0.5, 3.0])
            where = f"seed {seed}, step {number}"
            match rng.randrange(12):
                case 0 if number % 7 == 0:
                    breaker.reset()
                    model.close()
                case 1 if number % 7 == 0:
                    breaker.trip()
                    model.open(clock.now)
                case 2 | 3 | 4 if out:
                    which, attempt = out.pop(rng.randrange(len(out)))
                    verdict = rng.choice([True, False, False, None])
                    _say(attempt, verdict)
                    model.ends(which, verdict, clock.now)
                case 5 | 6 | 7:
                    verdict = rng.choice([True, False, False, None])
                    error = {True: None, False: Boom(), None: Interrupt()}[verdict]
                    let_in = _called(breaker, error, rng.randrange(4))
                    assert let_in is model.asks(number, clock.now), where
                    if let_in:
                        model.ends(number, verdict, clock.now)
                case _:
                    one = breaker.try_attempt()
                    assert (one is not None) is model.asks(number, clock.now), where
                    if one is not None:
                        out.append((number, one))
            assert breaker.state is model.state(clock.now), where
            expected = model.asks(-number, clock.now)
            if expected:
                model.ends(-number, None, clock.now)
            assert (breaker.retry_after() == 0.0) is lets_through(breaker) is expected, where


def _say(attempt: BreakerAttempt, verdict: bool | None) -> None:
    if verdict is None:
        attempt.dropped()
    elif verdict:
        attempt.succeeded()
    else:
        attempt.failed()


def _called(breaker: CircuitBreaker, error: BaseException | None, way: int) -> bool:
    """Call through the breaker in one of four ways; return whether it was let through."""
    let_in = False

    def call() -> None:
        nonlocal let_in
        let_in = True
        if error is not None:
            raise error

    async def acall() -> None:
        call()

    async def entered() -> None:
        async with breaker:
            call()

    try:
        if way == 0:
            with breaker:
                call()
        elif way == 1:
            breaker(call)()
        else:
            coroutine = entered() if way == 2 else breaker(acall)()
            with suppress(StopIteration):
                coroutine.send(None)
    except (BreakerOpenError, Boom, Interrupt):
        pass
    return let_in


# ---- signals, forks, copies ------------------------------------------------------------------------------------------


def is_locked(breaker: CircuitBreaker) -> bool:
    """Say whether another thread than this one would wait for the lock."""
    free: list[bool] = []

    def try_it(_: int) -> None:
        free.append(breaker._lock.acquire(timeout=PATIENCE))
        if free[0]:
            breaker._lock.release()

    in_threads(1, try_it)
    return not free[0]


@pytest.mark.stress
@pytest.mark.not_under_coverage
@pytest.mark.parametrize("way", ["with", "decorated", "attempt", "async"])
def test_interrupted_at_any_point_it_still_serves(way: str, stress_count: Callable[[int], int]) -> None:
    rng = random.Random(7)
    breaker = CircuitBreaker(BreakerPolicy(failures=2, reset_after=1e-6, max_reset_after=0.02))
    nothing = breaker(lambda: None)
    used_in_handler, came = 0, False

    def use() -> None:
        breaker.trip()
        if way == "with":
            with breaker:
                pass
        elif way == "attempt":
            with breaker.attempt():
                pass
        elif way == "async":
            with suppress(StopIteration):
                entered().send(None)
        else:
            nothing()

    async def entered() -> None:
        async with breaker:
            pass

    def interrupt(*_: object) -> None:
        nonlocal used_in_handler, came
        if came:
            return
        came = True     # what is raised while garbage is collected is lost
        with suppress(BreakerOpenError), breaker:
            used_in_handler += 1
        breaker.retry_after()
        raise Interrupt

    def use_until_interrupted() -> None:
        """In a frame of its own: what a handler raises at the head of a loop, Python 3.13 takes past a `try`."""
        nonlocal came
        came = False
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-4), 0.01)
        while not came:
            with suppress(BreakerOpenError):
                use()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(stress_count(400)):
            try:
                use_until_interrupted()
            except Interrupt:
                pass
            until(functools.partial(lets_through, breaker))
            assert not is_locked(breaker), "no lock is left held"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert used_in_handler


@pytest.mark.not_under_coverage
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_forked_child_it_is_as_new(clock: Clock) -> None:
    breaker = clock.breaker()
    breaker.trip()
    with breaker._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if breaker.state is CLOSED and lets_through(breaker) and not is_locked(breaker) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert breaker.state is OPEN


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_pickled_and_says_why(clock: Clock, act: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="CircuitBreaker cannot be copied or pickled"):
        act(clock.breaker())


def test_its_repr_says_how_it_is(clock: Clock) -> None:
    breaker = clock.breaker(name="search")
    assert repr(breaker) == "<CircuitBreaker 'search': closed>"
    breaker.trip()
    clock.now += 7.5
    assert repr(breaker) == "<CircuitBreaker 'search': open, next try in 2.5 s>"
    clock.now += 2.5
    assert repr(breaker) == "<CircuitBreaker 'search': half open>"
    assert repr(CircuitBreaker()) == "<CircuitBreaker: closed>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": 5}, "policy is 5 (int), allowed is a BreakerPolicy"),
        ({"failure_on": 5}, "failure_on is 5 (int), allowed is an exception class"),
        ({"failure_on": BaseException}, "allowed is a subclass of Exception"),
        ({"failure_on": (OSError, "Boom")}, "an item of failure_on is 'Boom' (str)"),
        ({"failure_on": asyncio.sleep}, "a predicate that is not async"),
        ({"name": 5}, "name is 5 (int), allowed is a str"),
        ({"now_fn": 5}, "now_fn is 5 (int), allowed is a callable"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        CircuitBreaker(**arguments)
    assert words in str(caught.value)
