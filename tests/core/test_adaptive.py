"""Adaptive concurrency by feedback, against small sources in virtual time.

The sources do what real ones do: answer 429 above a rate that changes in steps, queue up, stop answering, become slow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import pytest

from qengine.core import adaptive
from qengine.core.adaptive import KNOWN_FOR, START, Feedback

Call = tuple[bool, float]      # whether it is answered, and after how many seconds
Step = tuple[float, float]      # from which instant on, and what

STEPS: list[Step] = [(0.0, 100.0), (60.0, 20.0), (120.0, 60.0)]
END = 180.0


def at(steps: list[Step], now: float) -> float:
    return next(value for since, value in reversed(steps) if since <= now)


class Bucket:
    """Answers a rate that changes in steps, with a small burst; refuses the rest after 20 ms."""

    def __init__(self, steps: list[Step], latency: Callable[[], float], burst: float = 10.0) -> None:
        self.steps, self.latency, self.burst = steps, latency, burst
        self.tokens, self.filled_at = burst, 0.0

    def __call__(self, now: float) -> Call:
        gained = (now - self.filled_at) * at(self.steps, now)
        self.tokens, self.filled_at = min(self.burst, self.tokens + gained), now
        if self.tokens < 1 - 1e-9:
            return False, 0.02
        self.tokens -= 1
        return True, self.latency()


class Servers:
    """A queue before so many servers; never refuses."""

    def __init__(self, count: int, service: Callable[[float], float]) -> None:
        self.free_at, self.service = [0.0] * count, service

    def __call__(self, now: float) -> Call:
        ends_at = max(now, heappop(self.free_at)) + self.service(now)
        heappush(self.free_at, ends_at)
        return True, ends_at - now


def lognormal(mean: float, spread: float, seed: int) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: mean * math.exp(rng.gauss(-spread * spread / 2, spread))


@dataclass
class Played:
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    limits: list[Step] = field(default_factory=list)

    def rate(self, since: float, until: float) -> float:
        return sum(since < instant <= until for instant in self.answered) / (until - since)

    def share_refused(self) -> float:
        return len(self.refused) / (len(self.answered) + len(self.refused))

    def limit_range(self, since: float, until: float) -> tuple[int, int]:
        during = [at(self.limits, since), *(limit for instant, limit in self.limits if since < instant <= until)]
        return int(min(during)), int(max(during))

    def mean_limit(self, since: float, until: float) -> float:
        moments = [since + (until - since) * part / 200 for part in range(200)]
        return sum(at(self.limits, moment) for moment in moments) / 200

    def reached(self, since: float, until: float, rate: float) -> float:
        """Seconds until a mean of 5 s is 90 % of that rate."""
        return next(
            (tenth / 10 for tenth in range(50, int((until - since) * 10))
             if self.rate(since + tenth / 10 - 5, since + tenth / 10) >= 0.9 * rate),
            math.inf,
        )


def play(
    source: Callable[[float], Call], feedback: Feedback, until: float, seed: int = 0, backoff: float = 1.0,
    demand: float = math.inf,
) -> Played:
    """As much work as the feedback lets through, or `demand` at once; a refusal pauses all, for a random time."""
    rng, played = random.Random(seed), Played()
    ends: list[tuple[float, int, bool, float]] = []
    now = paused_until = 0.0
    count = running = 0
    played.limits.append((0.0, feedback.limit))
    while now < until:
        wake_at = math.inf
        while running < min(feedback.limit, demand):
            wake_at = max(paused_until, feedback.ready_at(now))
            if wake_at > now:
                break
            feedback.started(now)
            is_answered, seconds = source(now)
            count += 1
            running += 1
            heappush(ends, (now + seconds, count, is_answered, now))
        if wake_at > now and (not ends or wake_at < ends[0][0]):
            now = wake_at
            continue
        now, _, is_answered, started_at = heappop(ends)
        before = feedback.limit
        if is_answered:
            played.answered.append(now)
            changed = feedback.succeeded(started_at, now, running)
        else:
            played.refused.append(now)
            paused_until = max(paused_until, now + rng.uniform(0, backoff))
            changed = feedback.congested(started_at, now)
        running -= 1
        assert changed == (feedback.limit != before)
        if changed:
            played.limits.append((now, feedback.limit))
    return played


def answer(feedback: Feedback, count: int, latency: float = 0.1, since: float = 0.0) -> float:
    """So many answers, one after the other, each while the limit holds calls back; the instant of the last."""
    for number in range(count):
        feedback.succeeded(since + number * latency, since + (number + 1) * latency, feedback.limit)
    return since + count * latency


# ---- the rules, one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minimum", "maximum", "first"), [(1, 10, 4), (1, 2, 2), (7, 9, 7), (1, 1, 1), (3, 3, 3)])
def test_it_starts_with_few_within_its_bounds(minimum: int, maximum: int, first: int) -> None:
    assert Feedback(minimum, maximum).limit == first


@pytest.mark.parametrize(("minimum", "maximum"), [(1, 1), (1, 10), (4, 5), (10, 10), (2, 300)])
def test_whatever_happens_the_limit_keeps_within_its_bounds(minimum: int, maximum: int) -> None:
    rng = random.Random(minimum * 1000 + maximum)
    feedback, now, seen = Feedback(minimum, maximum), 0.0, set()
    for _ in range(6000):
        now += rng.expovariate(20)
        started_at = now - rng.choice([0.0, 0.05, 0.1, 3.0])
        before = feedback.limit
        if feedback.ready_at(now) <= now:
            feedback.started(now)
        if rng.random() < (0.3 if now % 100 < 30 else 0.001):
            changed = feedback.congested(started_at, now)
        else:
            changed = feedback.succeeded(started_at, now, rng.randint(1, feedback.limit))
        assert changed == (feedback.limit != before)
        seen.add(feedback.limit)
    assert minimum <= min(seen) <= max(seen) <= maximum
    assert len(seen) > 1 or minimum == maximum


def test_it_grows_while_the_limit_holds_calls_back() -> None:
    feedback = Feedback(1, 100)
    answer(feedback, 200)
    assert feedback.limit == 100


def test_it_does_not_grow_while_something_else_holds_calls_back() -> None:
    feedback = Feedback(1, 100)
    for number in range(500):
        assert not feedback.succeeded(number * 0.1, number * 0.1 + 0.1, 3)
    assert feedback.limit == 4


def test_the_pace_holds_calls_back_too() -> None:
    played = play(Servers(1000, lambda now: 0.1), Feedback(1, 100), 20.0)
    assert played.limits[-1][1] == 100


def test_work_that_is_less_than_the_limit_lets_it_be() -> None:
    played = play(Servers(1000, lambda now: 0.1), Feedback(1, 100), 60.0, demand=3)
    assert played.limit_range(0, 60)[1] <= 10      # the first are paced, until they are apart
    assert len({limit for instant, limit in played.limits if instant > 2}) <= 1


def test_the_limit_leaves_room_for_as_much_as_the_number_in_flight_varies() -> None:
    feedback = Feedback(1, 1000)
    answer(feedback, 100)
    assert feedback.limit == math.ceil(feedback._window + math.sqrt(feedback._window)) < 1000


def test_growth_does_not_outrun_what_it_is_judged_by() -> None:
    feedback = Feedback(1, 100)
    answer(feedback, adaptive.GLANCE - 1)
    assert feedback._window <= adaptive.START * adaptive.STRIDE
    answer(feedback, adaptive.GLANCE, since=10.0)
    assert adaptive.START * adaptive.STRIDE < feedback._window <= adaptive.START * adaptive.STRIDE**2


def test_a_refusal_shrinks_it_and_those_of_the_same_burst_do_not_again() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    assert feedback.congested(now - 0.1, now)
    assert feedback._window == pytest.approx(100 * adaptive.SHRINK)
    after = feedback.limit
    for number in range(5):
        assert not feedback.congested(now - 0.1, now + number * 0.01)
    assert feedback.limit == after


def test_of_a_burst_with_many_refusals_so_many_were_too_many() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    for _ in range(70):
        feedback.congested(now - 0.1, now)
    assert feedback._window == pytest.approx(30)
    for _ in range(70):
        feedback.congested(now - 0.1, now)
    assert feedback._window == pytest.approx(100 * adaptive.LEAST)


def test_a_refusal_of_a_call_that_started_later_shrinks_it_again() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    feedback.congested(now, now + 0.1)
    assert feedback.congested(now + 0.1, now + 0.2)
    assert feedback._window == pytest.approx(100 * adaptive.SHRINK**2)


def test_answers_to_calls_from_before_a_decrease_do_not_undo_it() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    feedback.congested(now, now + 0.1)
    shrunk = feedback.limit
    for number in range(1000):
        assert not feedback.succeeded(now, now + 0.1 + number, 200)
    assert feedback.limit == shrunk


def test_a_source_that_only_refuses_shrinks_it_to_a_share_and_no_further() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    for number in range(3600):
        feedback.congested(now + number, now + number + 0.02)
    assert feedback._window == pytest.approx(100 * adaptive.LEAST)
    now = answer(feedback, 1, since=now + 4000)
    for number in range(3600):
        feedback.congested(now + number, now + number + 0.02)
    assert feedback._window == pytest.approx(100 * adaptive.LEAST**2)


def test_answers_that_come_after_the_next_refusal_say_too_that_a_source_is_not_down() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 200)
    for _ in range(20):
        feedback.congested(now, now + 0.02)
        feedback.succeeded(now - 0.9, now + 0.1, 5)
        now += 1.0
    assert feedback._window < 100 * adaptive.LEAST / 2


def test_the_minimum_is_kept_and_only_a_minimum_of_one_is_paced_below_it() -> None:
    for minimum, least in ((5, 5.0), (1, adaptive.FLOOR)):
        feedback, now = Feedback(minimum, 20), 0.0
        for _ in range(100):
            now = answer(feedback, 1, since=now)
            feedback.congested(now, now + 0.02)
            now += 0.02
        assert feedback.limit == minimum
        assert feedback._window == least


def test_after_a_decrease_it_rises_to_a_plateau_holds_and_then_probes() -> None:
    feedback = Feedback(1, 1000)
    now = answer(feedback, 300)
    feedback.congested(now, now)
    now = answer(feedback, 100, since=now)      # the first failure is no known ceiling: no hold
    failed = feedback._window
    feedback.congested(now, now)        # a probe's
    now = answer(feedback, 50, since=now)
    assert feedback._window == pytest.approx(failed * adaptive.SHRINK)
    failed = feedback._window
    feedback.congested(now, now)        # the plateau's
    shares = []
    for _ in range(22):
        now = answer(feedback, 10, since=now)
        shares.append(round(feedback._window / failed, 3))
    assert shares == sorted(shares)
    assert shares[3:11] == [adaptive.PLATEAU] * 8
    assert 1.0 < shares[15] < 1.5 < shares[-1]


def test_time_in_which_nothing_was_asked_is_no_time_of_growth() -> None:
    feedback = Feedback(1, 1000)
    now = answer(feedback, 300)
    feedback.congested(now, now)
    now = answer(feedback, 10, since=now)
    before = feedback._window
    feedback.succeeded(now + 3600, now + 3600.1, feedback.limit)
    assert before <= feedback._window < before * 1.05


def test_starts_are_a_share_of_the_latency_apart() -> None:
    feedback = Feedback(1, 100)
    assert feedback.ready_at(0.0) <= 0.0
    feedback.started(0.0)
    assert feedback.ready_at(0.0) <= 0.0       # nothing is known yet
    now = answer(feedback, 10, latency=0.6)
    feedback.started(now)
    assert feedback.ready_at(now) == pytest.approx(now - adaptive.CATCH_UP + 0.6 / feedback._window)
    for _ in range(50):
        now = max(now, feedback.ready_at(now)) + 0.004     # late wake-ups are made good
        feedback.started(now)
    assert feedback.ready_at(now) == pytest.approx(now - 0.004 + 0.6 / feedback._window)


def test_at_the_maximum_only_the_limit_counts() -> None:
    feedback = Feedback(1, 8)
    now = answer(feedback, 200, latency=1.0)
    feedback.started(now)
    assert feedback.limit == 8
    assert feedback.ready_at(now) <= now


def test_one_is_as_new_until_something_has_failed() -> None:
    feedback = Feedback(1, 8)
    feedback.started(0.0)
    assert feedback.is_as_new(0.0)
    feedback.succeeded(0.0, 0.1, 1)
    assert feedback.is_as_new(0.1)
    feedback.congested(0.1, 0.2)
    assert not feedback.is_as_new(0.2)


@pytest.mark.parametrize("latency", [0.1, KNOWN_FOR])
@pytest.mark.parametrize("refused", [False, True])
def test_what_was_heard_long_ago_counts_no_more(refused: bool, latency: float) -> None:
    feedback = Feedback(1, 40)
    now = answer(feedback, 200, latency)
    if refused:
        feedback.congested(now, now)
    known = feedback.limit
    assert known > START
    long = max(KNOWN_FOR, 10 * latency)     # for longer where answers take long
    assert not feedback.forgets(now + 0.99 * long)
    assert feedback.limit == known and feedback.is_as_new(now + 0.99 * long) is not refused
    assert feedback.is_as_new(now + 1.01 * long)
    assert feedback.forgets(now + 1.01 * long)
    assert feedback.limit == START and not feedback.forgets(now + 1.01 * long)


@pytest.mark.parametrize("length", [0, 3, 40, 300, 1500])
def test_a_twin_goes_on_as_the_original_on_another_clock(length: int) -> None:
    offset = 4096.0

    def go_on(feedback: Feedback, rng: random.Random, since: float, steps: int) -> list[tuple[int, float]]:
        now, seen = since, []
        for _ in range(steps):
            now += rng.randint(1, 8) / 64
            feedback.started(now)
            if rng.random() < 0.01:
                feedback.congested(now - 0.125, now)
            else:
                feedback.succeeded(now - rng.randint(4, 9) / 64, now, feedback.limit)
            seen.append((feedback.limit, feedback.ready_at(now) - since))
        return seen

    feedback, rng = Feedback(2, 60), random.Random(length)
    go_on(feedback, rng, 0.0, length)
    now = feedback._last_at if length else 0.0
    twin = feedback.twin(now, now + offset)
    assert twin.is_as_new(now + offset) == feedback.is_as_new(now)
    state = rng.getstate()
    ours = go_on(feedback, rng, now, 800)
    rng.setstate(state)
    theirs = go_on(twin, rng, now + offset, 800)
    assert [limit for limit, _ in theirs] == [limit for limit, _ in ours]
    assert [wait for _, wait in theirs] == pytest.approx([wait for _, wait in ours])


# ---- a source that refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latency", "spread"), [(0.03, 0.5), (0.12, 0.0), (0.3, 0.5), (1.0, 0.5)])
def test_it_follows_a_capacity_that_changes_in_steps(latency: float, spread: float) -> None:
    played = play(Bucket(STEPS, lognormal(latency, spread, 1)), Feedback(1, 200), END, backoff=0.3)
    assert played.share_refused() < 0.02
    for (since, rate), until in zip(STEPS, (60.0, 120.0, END), strict=True):
        seconds = played.reached(since, until, rate)
        assert seconds <= 30
        assert played.rate(since + seconds, until) >= 0.9 * rate
        if (right := rate * latency) >= 5:
            low, high = played.limit_range(until - 20, until)
            room = math.sqrt(right) + 1
            assert 0.7 * right <= low <= high <= 1.4 * right + room


def test_pauses_without_a_pace_would_refuse_all_that_they_free() -> None:
    class Unpaced(Feedback):
        def ready_at(self, now: float) -> float:
            return now

    source = [Bucket([(0.0, 100.0)], lognormal(1.0, 0.5, 1)) for _ in range(2)]
    unpaced, paced = (play(one, kind(1, 200), 60.0) for one, kind in zip(source, (Unpaced, Feedback), strict=True))
    assert paced.rate(30, 60) > 80 > 60 > unpaced.rate(30, 60)


def test_after_an_outage_it_is_back_soon() -> None:
    healthy = Servers(1000, lambda now: 0.1)

    def source(now: float) -> Call:
        return (False, 0.02) if 30 <= now < 630 else healthy(now)

    played = play(source, Feedback(1, 40), 700.0)
    assert played.rate(20, 30) == pytest.approx(400, rel=0.05)
    assert played.rate(660, 700) == pytest.approx(400, rel=0.05)


def test_a_source_that_hangs_is_left_alone_as_one_that_refuses() -> None:
    healthy = Servers(1000, lambda now: 0.1)

    def source(now: float) -> Call:
        return (False, 5.0) if 30 <= now < 60 else healthy(now)       # a timeout

    played = play(source, Feedback(1, 40), 120.0, backoff=0.0)
    assert played.limit_range(60, 65)[0] <= 13
    assert played.rate(100, 120) == pytest.approx(400, rel=0.05)


# ---- a source that slows down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "spread"), [(0.2, 0.0), (0.2, 0.3), (0.05, 1.0)])
def test_it_finds_the_knee_of_a_source_that_queues(mean: float, spread: float) -> None:
    service = lognormal(mean, spread, 3)
    played = play(Servers(10, lambda now: service()), Feedback(1, 200), 120.0)
    assert 8 <= played.mean_limit(60, 120) <= 20
    assert played.rate(60, 120) >= 0.78 * 10 / mean
    assert played.limit_range(90, 120)[1] <= 30


HEALTHY: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda rng: math.exp(rng.gauss(-0.5, 1.0)),
    "exponential": lambda rng: rng.expovariate(1),
    "heavy tail": lambda rng: min(50.0, rng.paretovariate(1.5)) / 3,
    "few slow": lambda rng: 0.1 if rng.random() < 0.9 else 9.1,
    "half slow": lambda rng: 0.1 if rng.random() < 0.5 else 1.9,
    "few quick": lambda rng: 0.1 if rng.random() < 0.1 else 1.1,
}


@pytest.mark.parametrize("shape", HEALTHY)
def test_latencies_that_differ_are_not_taken_for_a_rise(shape: str) -> None:
    rng = random.Random(9)
    played = play(Servers(1000, lambda now: 0.2 * HEALTHY[shape](rng)), Feedback(1, 20), 90.0)
    assert played.mean_limit(20, 90) >= 19


@pytest.mark.parametrize("factor", [1.4, 3.0])
def test_a_source_that_has_become_slower_for_good_gets_its_calls_back(factor: float) -> None:
    spread = lognormal(1.0, 0.3, 5)
    played = play(Servers(1000, lambda now: spread() * (0.1 if now < 60 else 0.1 * factor)), Feedback(1, 20), 150.0)
    assert played.limit_range(40, 60) == (20, 20)
    assert played.limit_range(60, 100)[0] < 20
    assert played.limit_range(120, 150) == (20, 20)


def test_a_source_that_has_become_quicker_is_judged_by_that() -> None:
    feedback = Feedback(1, 20)
    now = answer(feedback, 400, latency=1.0)
    now = answer(feedback, 40 * adaptive.LOOK, latency=0.1, since=now)
    assert feedback.limit == 20
    answer(feedback, 2 * adaptive.LOOK, latency=0.2, since=now)
    assert feedback.limit < 20


def test_the_pace_follows_a_latency_that_has_changed() -> None:
    feedback = Feedback(1, 10**9)
    now = answer(feedback, 800, latency=1.0)
    now = answer(feedback, 2 * adaptive.LOOK, latency=0.1, since=now)
    feedback.started(now)
    apart = feedback.ready_at(now) - (now - adaptive.CATCH_UP)
    assert apart * feedback._window == pytest.approx(0.1, rel=0.01)


def test_a_rise_of_latency_shrinks_it_as_far_as_the_delay_says() -> None:
    for latency, share in ((0.12, 1.0), (0.13, 1 / 1.3), (0.15, 1 / 1.5), (0.4, 0.5)):
        feedback = Feedback(1, 100)
        now = answer(feedback, 6 * adaptive.LOOK)
        for _ in range(adaptive.LOOK):
            now += 0.01
            if feedback.succeeded(now - latency, now, feedback.limit):
                break
        assert feedback._window == pytest.approx(100 * share)


def test_it_does_not_grow_until_it_is_seen_what_a_decrease_did() -> None:
    feedback = Feedback(1, 100)
    now = answer(feedback, 500)
    while not feedback.succeeded(now - 0.2, now, feedback.limit):
        now += 0.01
    shrunk, steady_at = feedback._window, now + 0.5
    for latency in (0.001, 0.6):        # those that end first are no fair measure; nor do a few high ones count
        for number in range(adaptive.LOOK - 1):
            since = now if latency < 0.1 else steady_at + number
            assert not feedback.succeeded(since, since + latency, feedback.limit)
    assert feedback._base is not None and feedback._base[0] == pytest.approx(0.1)
    feedback._recent[:] = [0.1] * len(feedback._recent)
    assert feedback._window == shrunk
    feedback.succeeded(steady_at + 99.9, steady_at + 100, feedback.limit)
    assert feedback._window > shrunk
