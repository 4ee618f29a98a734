"""What a limiter does beyond acquire: reservations, refunds, debts, pauses, other limits, decorators."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from freezegun import freeze_time
from shared import timely, undisturbed

from qengine import AsyncRateLimiter, RateLimit, RateLimiter, Reservation, Window
from qengine.testing import VirtualClock

PER_SECOND = RateLimit(per_second=1)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=[RateLimiter, AsyncRateLimiter])
def make(request: pytest.FixtureRequest, clock: VirtualClock) -> Callable[..., Any]:
    """Makes a limiter of one world or the other, on a virtual clock."""
    kind: Any = request.param
    return lambda *limits, **options: kind(*limits, now_fn=clock.now, **options)


# ---- reservations ----------------------------------------------------------------------------------------------------


def test_reservations_stand_in_line_and_move_up_when_one_is_cancelled(make: Any, clock: VirtualClock) -> None:
    limiter = make(PER_SECOND)
    places = [limiter.reserve() for _ in range(5)]
    assert [place.ready_at for place in places] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert places[2].cancel() and not places[2].cancel()
    assert [place.ready_at for place in places] == [0.0, 1.0, math.inf, 2.0, 3.0]
    assert not limiter.try_acquire()
    clock.sleep(10.0)
    assert [place.delay for place in places if place is not places[2]] == [0.0] * 4
    assert places[4].ready_at == 3.0, "it took its permits then, whoever looked"


def test_cancelling_gives_back_all_that_it_took_whatever_was_reserved_behind_it(make: Any, clock: VirtualClock) -> None:
    """golang/go 56924 and 69419: tokens were lost, or given back twice, where others had reserved since."""
    limiter = make(RateLimit(per_second=10, burst=20))
    assert limiter.try_acquire(15)
    clock.sleep(0.1)
    first = limiter.reserve(10)
    clock.sleep(0.1)
    second = limiter.reserve(2)
    assert (first.ready_at, second.ready_at) == (pytest.approx(0.5), pytest.approx(0.7))
    assert first.cancel()
    assert second.delay == 0.0
    assert limiter.available_tokens == pytest.approx(5 + 2 - 2)


def test_what_was_taken_is_given_back_but_nothing_is_minted(make: Any, clock: VirtualClock) -> None:
    limiter = make(PER_SECOND)
    first = limiter.reserve()
    clock.sleep(5.0)
    assert limiter.try_acquire(), "the bucket is full again, with or without it"
    assert first.cancel()
    assert not limiter.try_acquire(), "or two would go at once"
    second = limiter.reserve()
    clock.sleep(1.0)
    assert second.delay == 0.0 and second.cancel()
    assert limiter.try_acquire()


def test_a_reservation_of_a_window_gives_its_own_slot_back(make: Any, clock: VirtualClock) -> None:
    limiter = make(Window(2, 10))
    first = limiter.reserve()
    clock.sleep(5.0)
    assert limiter.try_acquire()
    assert first.cancel() and limiter.available_tokens == 1
    clock.sleep(5.0)
    assert limiter.available_tokens == 1, "that of the other one lasts"


def test_a_reservation_that_nobody_keeps_holds_up_nobody(make: Any, clock: VirtualClock) -> None:
    limiter = make(PER_SECOND)
    for _ in range(3):
        limiter.reserve()
    clock.sleep(2.5)
    assert limiter.available_tokens == pytest.approx(0.5)
    clock.sleep(0.5)
    assert limiter.try_acquire()
    assert limiter._limits.history is None, "nothing has to be remembered"


def test_one_that_waits_for_its_reservation_has_used_it(clock: VirtualClock) -> None:
    limiter = RateLimiter(PER_SECOND, now_fn=clock.now)
    first, second = limiter.reserve(), limiter.reserve()
    assert first.wait() and second.wait() and clock.now() == 1.0
    assert not second.cancel() and not limiter.try_acquire()
    assert isinstance(first, Reservation)


def test_tasks_wait_for_their_reservations(clock: VirtualClock) -> None:
    limiter = AsyncRateLimiter(PER_SECOND, now_fn=clock.now)

    async def main() -> list[Any]:
        places = [limiter.reserve() for _ in range(4)]
        waiting = [asyncio.create_task(place.wait()) for place in places]
        await asyncio.sleep(0)
        assert places[1].cancel()
        return [await asyncio.gather(*waiting), clock.now()]

    assert asyncio.run(main()) == [[True, False, True, True], 2.0]


def test_a_task_that_stops_waiting_keeps_its_reservation(clock: VirtualClock) -> None:
    limiter = AsyncRateLimiter(PER_SECOND, now_fn=clock.now)

    async def main() -> None:
        assert limiter.try_acquire()
        place = limiter.reserve()
        waiting = asyncio.create_task(place.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert place.ready_at == 1.0
        assert await place.wait() and clock.now() == 1.0

    asyncio.run(main())


# ---- refunds, debts, pauses, other limits ----------------------------------------------------------------------------


def test_a_refund_moves_the_line_up(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=1, burst=5))
    assert limiter.try_acquire(5)
    place, behind = limiter.reserve(2), limiter.reserve(2)
    assert (place.ready_at, behind.ready_at) == (2.0, 4.0)
    limiter.refund(3)
    assert (place.ready_at, behind.ready_at) == (0.0, 1.0)
    limiter.refund(100)
    assert limiter.available_tokens == 3, "never above the burst, of which the second took two"


def test_a_refund_names_units_and_is_no_call(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=1, burst=5), RateLimit(per_second=1, burst=100, unit="tokens"))
    assert limiter.try_acquire({"tokens": 80})
    limiter.refund({"tokens": 30})
    limiter.charge({"tokens": 49})
    assert limiter.available_tokens == 1.0
    limiter.refund({"tokens": 50})
    assert limiter.available_tokens == 4.0, "the call is used"


def test_a_debt_is_paid_off_before_anybody_is_served(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=1, burst=2))
    limiter.charge(5)
    assert limiter.available_tokens == -3.0 and not limiter.try_acquire({"calls": 0})
    assert limiter.retry_after() == 4.0
    clock.sleep(4.0)
    assert limiter.try_acquire() and not limiter.try_acquire()


def test_nothing_goes_in_a_pause_and_a_burst_after_it(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=1, burst=2))
    limiter.pause_for(10.0)
    limiter.pause_for(1.0)
    assert not limiter.try_acquire() and limiter.retry_after() == 10.0
    places = [limiter.reserve() for _ in range(3)]
    assert [place.ready_at for place in places] == [10.0, 10.0, 11.0]
    clock.sleep(20.0)
    assert limiter.try_acquire()


def test_who_cannot_be_served_in_time_any_more_is_refused_at_once(clock: VirtualClock) -> None:
    async def main(change: Callable[[AsyncRateLimiter], object]) -> float:
        limiter = AsyncRateLimiter(PER_SECOND, now_fn=clock.now)
        limiter.try_acquire()
        begun = clock.now()
        waiting = asyncio.create_task(limiter.acquire(timeout=5.0))
        await asyncio.sleep(0)
        change(limiter)
        assert not await waiting
        return clock.now() - begun

    assert asyncio.run(main(lambda limiter: limiter.pause_for(5.5))) == 0.0
    assert asyncio.run(main(lambda limiter: limiter.charge(5))) == 0.0
    assert asyncio.run(main(lambda limiter: limiter.set_limits(RateLimit(per_minute=1)))) == 0.0


def test_other_limits_hold_from_now_on_and_keep_what_was_taken(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=1, burst=10), Window(20, 100))
    assert limiter.try_acquire(8)
    place = limiter.reserve(5)
    assert place.ready_at == 3.0
    limiter.set_limits(RateLimit(per_second=10, burst=5), Window(20, 50))
    assert place.ready_at == pytest.approx(0.3)
    clock.sleep(10.0)
    assert limiter.available_tokens == 5.0
    limiter.set_limits(Window(15, 50))
    assert limiter.available_tokens == 2.0
    clock.sleep(40.0)
    assert limiter.available_tokens == 10.0, "what was taken at 0 has run out, by the new length"
    limiter.set_limits(PER_SECOND)
    assert [limiter.try_acquire() for _ in range(2)] == [True, False], "another kind of limit starts full"


def test_what_can_never_be_had_under_other_limits_is_an_error_to_wait_for(clock: VirtualClock) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_second=1, burst=5), now_fn=clock.now)

    async def main() -> None:
        assert limiter.try_acquire(5)
        waiting, small = asyncio.create_task(limiter.acquire(4)), asyncio.create_task(limiter.acquire())
        forgotten = limiter.reserve(3)
        await asyncio.sleep(0)
        limiter.set_limits(RateLimit(per_second=1, burst=2))
        with pytest.raises(ValueError, match="amount is 4, allowed is at most 2 calls"):
            await waiting
        assert await small and clock.now() == 1.0
        assert forgotten.ready_at == math.inf and not forgotten.cancel()
        assert await limiter.acquire() and clock.now() == 2.0

    asyncio.run(main())


def test_the_seconds_until_it_may_be_had(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_second=2, burst=4))
    assert limiter.retry_after(4) == 0.0
    assert limiter.try_acquire(3)
    assert limiter.retry_after() == 0.0 and limiter.retry_after(3) == 1.0
    limiter.reserve(2)
    assert limiter.retry_after() == 1.0, "behind the one that waits"
    with pytest.raises(ValueError, match="amount is 5, allowed is at most 4 calls"):
        limiter.retry_after(5)


# ---- with, decorators, words, copies ---------------------------------------------------------------------------------


def test_a_limiter_is_a_context_manager_and_a_decorator(clock: VirtualClock) -> None:
    limiter = RateLimiter(PER_SECOND, now_fn=clock.now)

    @limiter
    def double(number: int, *, plus: int = 0) -> float:
        """Twice."""
        return number * 2 + plus + clock.now() / 100

    with limiter as same:
        assert same is limiter
    assert [double(1), double(2, plus=1)] == [2.01, 5.02]
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    with pytest.raises(KeyError), limiter:
        raise KeyError
    assert clock.now() == 3.0


def test_an_async_limiter_is_an_async_context_manager_and_a_decorator(clock: VirtualClock) -> None:
    limiter = AsyncRateLimiter(PER_SECOND, now_fn=clock.now)

    @limiter
    async def double(number: int) -> float:
        """Twice."""
        return number * 2 + clock.now() / 100

    async def main() -> None:
        async with limiter as same:
            assert same is limiter
        assert [await double(1), await double(2)] == [2.01, 4.02]

    asyncio.run(main())
    assert double.__name__ == "double" and asyncio.iscoroutinefunction(double)


def test_each_world_decorates_its_own_functions() -> None:
    async def later() -> None: ...

    with pytest.raises(TypeError, match=r"fn is .*later.*allowed is a plain function.*AsyncRateLimiter"):
        RateLimiter(PER_SECOND)(later)
    with pytest.raises(TypeError, match=r"fn is .*allowed is a coroutine function.*RateLimiter"):
        AsyncRateLimiter(PER_SECOND)(len)       # type: ignore[arg-type]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_is_no_copy_of_a_limiter(make: Any, duplicate: Callable[[Any], Any]) -> None:
    limiter = make(PER_SECOND)
    for thing in (limiter, limiter.reserve()):
        with pytest.raises(TypeError, match=rf"{type(thing).__name__} cannot be copied or pickled, for a copy would"):
            duplicate(thing)


def test_its_words_tell_how_it_stands(make: Any, clock: VirtualClock) -> None:
    limiter = make(RateLimit(per_minute=30, burst=2), Window(9, 60, "tokens"))
    limiter.try_acquire()
    places = [limiter.reserve(), limiter.reserve()]
    words = "of 0.5 calls/s (burst 2), 9 tokens in any 60 s: 0 available, 1 waiting>"
    assert repr(limiter) == f"<{type(limiter).__name__} {words}"
    assert repr(places[1]) == f"<{type(places[1]).__name__} of 1: ready in 2 s>"
    assert places[1].cancel() and repr(places[1]).endswith("of 1: cancelled>")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [-1, 0, math.nan, math.inf, "2", None, True, {"calls": -1}, {"calls": math.nan}])
@pytest.mark.parametrize("verb", ["try_acquire", "reserve", "retry_after", "refund", "charge"])
def test_a_bad_amount_is_refused_by_name_and_takes_nothing(make: Any, verb: str, amount: Any) -> None:
    limiter = make(RateLimit(per_second=1, burst=3))
    with pytest.raises((ValueError, TypeError), match="amount"):
        getattr(limiter, verb)(amount)
    assert limiter.available_tokens == 3 and limiter._line.count() == 0


@pytest.mark.parametrize("verb", ["try_acquire", "reserve", "retry_after", "refund", "charge"])
def test_an_unknown_unit_is_refused_by_name(make: Any, verb: str) -> None:
    with pytest.raises(ValueError, match=r"amount is \{'token': 1\}, allowed is a mapping from calls or tokens"):
        getattr(make(RateLimit(per_second=1, unit="tokens")), verb)({"token": 1})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda limiter: limiter.pause_for(-1), "seconds is -1"),
        (lambda limiter: limiter.pause_for(math.inf), "seconds is inf"),
        (lambda limiter: limiter.set_limits(), "limits is"),
        (lambda limiter: limiter.set_limits(5), "limits is 5"),
        (lambda limiter: limiter.set_limits(RateLimiter(PER_SECOND)), "limits is"),
        (lambda limiter: limiter.reserve(2), "amount is 2, allowed is at most 1 calls"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(make: Any, call: Callable[[Any], object], message: str) -> None:
    limiter = make(PER_SECOND)
    with pytest.raises((ValueError, TypeError), match=message):
        call(limiter)
    assert limiter.try_acquire()


# ---- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0.0, 1e5, 1.8e9])
@pytest.mark.parametrize("rate", [3.0, 7000.0, 1e6])
def test_a_fast_rate_far_from_the_clock_s_origin_is_not_off_by_roundings(epoch: float, rate: float) -> None:
    now = [epoch]
    limiter = RateLimiter(RateLimit(per_second=rate, burst=rate), now_fn=lambda: now[0])
    granted = limiter.try_acquire(rate) * rate
    for step in range(1, 1001):
        now[0] = epoch + step / 4       # exact, and 250 s in all
        for amount in (rate / 10, rate / 100, 1):
            for _ in range(20):
                granted += limiter.try_acquire(amount) * amount
    allowed = rate + rate * 250
    assert abs(granted + limiter.available_tokens - allowed) <= allowed * 1e-9


def test_one_call_after_the_other_at_a_fast_rate_is_exact_over_hours() -> None:
    now = [1.8e9]
    limiter = RateLimiter(RateLimit(per_second=1000), now_fn=lambda: now[0], sleep_fn=lambda s: None)
    late = 0
    for _ in range(2000):
        now[0] += 0.25
        assert limiter.try_acquire()
        late += limiter.try_acquire()
    assert late == 0, "a bucket of one holds one, however long it rests"


def test_a_limiter_made_under_freezegun_goes_by_it() -> None:
    with freeze_time("2026-03-01") as frozen:
        limiter = RateLimiter(RateLimit(per_minute=1), Window(2, 3600))
        assert [limiter.try_acquire(), limiter.try_acquire()] == [True, False]
        frozen.tick(30)
        assert limiter.retry_after() == pytest.approx(30)
        frozen.tick(30)
        assert [limiter.try_acquire(), limiter.try_acquire()] == [True, False]
        frozen.move_to("2026-03-01 00:59:59")
        assert not limiter.try_acquire()
        frozen.move_to("2026-03-01 01:00:00")
        assert [limiter.try_acquire(), limiter.try_acquire()] == [True, False]
        frozen.move_to("2026-02-28")
        assert not limiter.try_acquire(), "a step back mints nothing"


@undisturbed
def test_time_that_ticks_under_freezegun_is_waited_for() -> None:
    with freeze_time("2026-03-01", tick=True):
        limiter = RateLimiter(RateLimit(per_second=50))
        begun = time.perf_counter()
        assert limiter.acquire() and limiter.acquire() and limiter.acquire()
        with timely():
            assert time.perf_counter() - begun < 2.0
