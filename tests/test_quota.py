"""`Quota`: periods by the local calendar, alerts, threads, and what is refused."""

from __future__ import annotations

import copy
import datetime as dt
import itertools
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import zoneinfo
from collections.abc import Callable
from pathlib import Path

import pytest
from freezegun import freeze_time
from shared import PATIENCE, in_threads

from qengine import BudgetExceededError
from qengine.quota import Quota, QuotaAlert

UTC = dt.UTC
ROOT = Path(__file__).resolve().parent.parent


def zone(name: str) -> dt.tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip(f"this system does not know {name}")


class Clock:
    """Wall time that is set by hand."""

    def __init__(self, *when: int) -> None:
        self.now = dt.datetime(*(when or (2026, 5, 21)), tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


# -- reserve, commit, release


def test_a_reservation_counts_until_it_is_settled_and_then_what_was_used_does() -> None:
    quota = Quota(10, now_fn=Clock())
    reserved = quota.reserve(4)
    assert (quota.used, quota.reserved, quota.remaining) == (0, 4, 6)
    assert reserved.amount == 4
    assert reserved.commit(3)
    assert (quota.used, quota.reserved, quota.remaining) == (3, 0, 7)
    assert not reserved.commit(9) and not reserved.release()
    assert quota.reserve(7).release()
    assert (quota.used, quota.reserved, quota.remaining) == (3, 0, 7)


def test_what_is_not_there_is_refused_with_all_one_needs_to_know_and_takes_nothing() -> None:
    quota = Quota(10, unit="tokens", now_fn=Clock())
    quota.reserve(7).commit()
    assert quota.try_reserve(4) is None
    with pytest.raises(BudgetExceededError) as caught:
        quota.reserve(4)
    assert str(caught.value) == "4 tokens asked for, 3 left of 10 per day until 2026-05-22T00:00:00+00:00"
    assert quota.remaining == 3
    assert quota.try_reserve(3) is not None


def test_more_than_the_limit_is_refused_as_what_could_never_be_had() -> None:
    quota = Quota(10, now_fn=Clock())
    assert quota.try_reserve(10.5) is None
    with pytest.raises(ValueError, match=r"amount is 11, allowed is at most 10 calls"):
        quota.reserve(11)


def test_an_overrun_counts_and_less_gives_back() -> None:
    quota = Quota(1000, unit="tokens", now_fn=Clock())
    quota.reserve(600).commit(100)
    quota.reserve(900).commit(1100)
    assert quota.remaining == -200
    assert quota.try_reserve(0.001) is None


def test_leaving_a_reservation_commits_it_also_after_an_exception() -> None:
    quota = Quota(10, now_fn=Clock())
    with quota.reserve(2):
        assert quota.reserved == 2
    with pytest.raises(KeyError), quota.reserve(3):
        raise KeyError
    with quota.reserve(4) as reserved:
        reserved.release()
    with quota.reserve(4) as reserved:
        reserved.commit(1)
    assert (quota.used, quota.reserved) == (6, 0)


def test_to_begin_one_changes_nothing_without_a_store() -> None:
    quota = Quota(10, now_fn=Clock())
    reserved = quota.reserve(2)
    assert reserved.begin() and reserved.begin()
    assert (quota.used, quota.reserved) == (0, 2)
    assert reserved.commit() and not reserved.begin()


def test_one_that_is_forgotten_counts_until_the_end_of_its_period() -> None:
    clock = Clock()
    quota = Quota(1, now_fn=clock)
    quota.reserve()
    assert quota.try_reserve() is None
    clock.now += 86400
    assert quota.try_reserve() is not None


def test_it_says_what_it_is() -> None:
    quota = Quota(1_000_000, "month", "tokens", now_fn=Clock())
    reserved = quota.reserve(1.5)
    assert repr(reserved) == "<QuotaReservation of 1.5 tokens: open>"
    reserved.commit(2)
    assert repr(reserved) == "<QuotaReservation of 1.5 tokens: 2 used>"
    assert repr(quota) == "<Quota of 1000000 tokens per month: 999998 remaining until 2026-06-01T00:00:00+00:00>"
    assert "per 90 s" in repr(Quota(1, 90))


# -- periods


def ends(quota: Quota, clock: Clock, until: float) -> list[dt.datetime]:
    """The ends of its periods, one after the other; in each, all of the limit is there once."""
    found = []
    while clock.now < until:
        quota.reserve(quota.limit).commit()
        found.append(quota.resets_at)
        assert quota.try_reserve() is None
        clock.now = found[-1].timestamp() - 0.001
        assert quota.try_reserve() is None
        clock.now += 0.001
    return found


def lengths(found: list[dt.datetime], unit: float) -> list[float]:
    instants = [one.timestamp() for one in found]
    return [(after - before) / unit for before, after in itertools.pairwise(instants)]


def test_under_freezegun_a_day_ends_at_midnight() -> None:
    with freeze_time("2026-05-21 23:59:59") as frozen:
        quota = Quota(2)
        quota.reserve(2).commit()
        assert quota.try_reserve() is None
        assert quota.resets_at == dt.datetime(2026, 5, 22, tzinfo=UTC)
        frozen.tick(1)
        assert quota.remaining == 2
        assert quota.resets_at == dt.datetime(2026, 5, 23, tzinfo=UTC)
        frozen.move_to("2027-01-01")
        assert quota.resets_at == dt.datetime(2027, 1, 2, tzinfo=UTC)
    assert time.time() - Quota(1).resets_at.timestamp() < 86400


def test_months_have_28_to_31_days_and_years_end() -> None:
    clock = Clock(2027, 1, 31)
    found = ends(Quota(5, per="month", now_fn=clock), clock, dt.datetime(2028, 5, 1, tzinfo=UTC).timestamp())
    assert lengths(found, 86400) == [28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29, 31, 30]
    assert {one.day for one in found} == {1}
    with freeze_time("2028-02-29 12:00"):
        assert Quota(1, per="month").resets_at == dt.datetime(2028, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(("name", "short", "long"), [
    ("Europe/Berlin", (2026, 3, 29), (2026, 10, 25)),
    ("America/New_York", (2026, 3, 8), (2026, 11, 1)),
    ("America/Santiago", (2026, 9, 6), (2026, 4, 4)),           # its clocks change at midnight: one of them is skipped
    ("America/Havana", (2026, 3, 8), (2026, 11, 1)),
])
def test_a_day_of_23_hours_and_one_of_25(name: str, short: tuple[int, ...], long: tuple[int, ...]) -> None:
    tz = zone(name)
    for day, hours in ((short, 23), (long, 25)):
        noon = dt.datetime(*day, 12, tzinfo=tz)
        clock = Clock()
        clock.now = noon.timestamp() - 86400
        found = ends(Quota(5, tz=tz, now_fn=clock), clock, noon.timestamp() + 2 * 86400)
        assert lengths(found, 3600)[:2] == [hours, 24]
        assert found[1].date() == noon.date() + dt.timedelta(days=1)
        assert (found[1].hour, found[1].tzinfo) == (0, tz)


def test_midnight_that_comes_twice_is_the_first_of_them() -> None:
    tz = zone("America/Havana")
    clock = Clock(2026, 11, 1, 4)                               # 00:00 there, and again an hour later
    quota = Quota(5, tz=tz, now_fn=clock)
    clock.now += 3600
    assert quota.resets_at == dt.datetime(2026, 11, 2, tzinfo=tz)
    clock.now -= 3601
    assert Quota(5, tz=tz, now_fn=clock).resets_at.timestamp() == clock.now + 1


def test_a_clock_set_back_into_the_day_before_does_not_begin_it_again() -> None:
    tz = zone("America/Goose_Bay")                              # until 2010 its clocks went back at 00:01, to 23:01
    clock = Clock(2010, 11, 7, 2, 30)
    found = ends(Quota(5, tz=tz, now_fn=clock), clock, dt.datetime(2010, 11, 9, tzinfo=UTC).timestamp())
    assert lengths(found, 3600)[0] == 25
    clock = Clock(2010, 11, 7, 3, 30)                           # 23:30 of the day before, for the second time
    assert Quota(5, tz=tz, now_fn=clock).resets_at == found[1]


def test_a_day_that_was_left_out() -> None:
    tz = zone("Pacific/Apia")                                   # no 30 December in 2011
    clock = Clock(2011, 12, 29, 12)
    found = ends(Quota(5, tz=tz, now_fn=clock), clock, dt.datetime(2012, 1, 1, tzinfo=UTC).timestamp())
    assert [one.day for one in found] == [31, 1, 2]
    assert lengths(found, 3600) == [24, 24]


@pytest.mark.parametrize(("name", "minute"), [
    ("Asia/Kolkata", 30), ("Asia/Kathmandu", 15), ("Europe/Berlin", 0), ("Australia/Adelaide", 30),
])
def test_an_hour_begins_with_the_local_one(name: str, minute: int) -> None:
    tz = zone(name)
    clock = Clock(2026, 5, 21, 10, 50)
    found = ends(Quota(5, per="hour", tz=tz, now_fn=clock), clock, clock.now + 5 * 3600)
    assert {one.minute for one in found} == {0}
    assert {one.astimezone(UTC).minute for one in found} == {minute}
    assert set(lengths(found, 1)) == {3600}


def test_an_hour_is_an_hour_also_when_clocks_change() -> None:
    tz = zone("Europe/Berlin")
    for day in ((2026, 3, 28, 20), (2026, 10, 24, 20)):
        clock = Clock(*day)
        found = ends(Quota(5, per="hour", tz=tz, now_fn=clock), clock, clock.now + 12 * 3600)
        assert set(lengths(found, 1)) == {3600}
    tz = zone("Australia/Lord_Howe")                            # its clocks change by half an hour
    for day in ((2026, 4, 4, 10), (2026, 10, 3, 10)):
        clock = Clock(*day)
        found = ends(Quota(5, per="hour", tz=tz, now_fn=clock), clock, clock.now + 12 * 3600)
        assert sorted(set(lengths(found, 1))) == [1800, 3600] and lengths(found, 1).count(1800) == 1
        assert [one.minute for one in found].count(0) >= len(found) - 1


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/Sao_Paulo", "Africa/Casablanca", "Asia/Gaza"])
def test_days_and_months_follow_each_other_over_the_years(name: str) -> None:
    tz = zone(name)
    for per, step, most in (("day", 86400, 26), ("month", 20 * 86400, 31 * 24 + 1)):
        clock = Clock(2016, 1, 1)
        quota = Quota(1, per=per, tz=tz, now_fn=clock)
        last = quota.resets_at
        while clock.now < dt.datetime(2019, 1, 1, tzinfo=UTC).timestamp():
            clock.now += step / 2
            resets_at = quota.resets_at
            if resets_at != last:
                assert 22 <= (resets_at.timestamp() - last.timestamp()) / 3600 <= most
                assert resets_at.hour in (0, 1) and (per == "day" or resets_at.day == 1)
                local_before = dt.datetime.fromtimestamp(resets_at.timestamp() - 1, tz)
                assert local_before.date() != resets_at.date()
                last = resets_at


class Crooked(dt.tzinfo):
    """As pytz is: right about instants, and wrong about a local time that was put together by hand."""

    def fromutc(self, when: dt.datetime) -> dt.datetime:
        return (when + dt.timedelta(hours=2)).replace(tzinfo=dt.timezone(dt.timedelta(hours=2)))

    def utcoffset(self, when: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(minutes=53)


def test_a_zone_is_only_asked_about_instants() -> None:
    clock = Clock(2026, 5, 21, 21)
    quota = Quota(1, tz=Crooked(), now_fn=clock)
    assert quota.resets_at == dt.datetime(2026, 5, 21, 22, tzinfo=UTC)


@pytest.mark.parametrize("per", [900, 900.0, dt.timedelta(minutes=15)])
def test_a_period_of_ones_own(per: float | dt.timedelta) -> None:
    clock = Clock(2026, 5, 21, 12, 7)
    assert Quota(1, per, now_fn=clock).resets_at == dt.datetime(2026, 5, 21, 12, 15, tzinfo=UTC)
    tz = dt.timezone(dt.timedelta(hours=5.5))
    starts = dt.datetime(2026, 5, 21, 17, 35, tzinfo=tz)                # 12:05 UTC
    quota = Quota(1, per, tz=tz, starts=starts, now_fn=clock)
    assert quota.resets_at == dt.datetime(2026, 5, 21, 12, 20, tzinfo=UTC)
    assert quota.resets_at.tzinfo is tz
    clock.now = starts.timestamp() - 1                                  # it also has been before it began
    assert Quota(1, per, starts=starts, now_fn=clock).resets_at == starts


def test_a_period_of_ones_own_always_ends_later() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        clock = Clock()
        per = rng.choice([1.1, math.pi, 86400 / 7, 1e6 / 3])
        clock.now = rng.randint(0, 10**6) * per + rng.choice([0, 1e-7, -1e-7])
        left = Quota(1, per, now_fn=clock).as_account().current().period.ends_at - clock.now
        assert 0 < left <= per * (1 + 1e-6)


# -- clocks


def test_what_was_reserved_before_midnight_counts_in_the_day_that_is_over() -> None:
    clock = Clock(2026, 5, 21, 23, 59, 59)
    quota = Quota(10, now_fn=clock)
    committed, overrun, released = quota.reserve(3), quota.reserve(3), quota.reserve(3)
    clock.now += 1
    assert (quota.used, quota.reserved, quota.remaining) == (0, 0, 10)
    today = quota.reserve(4)
    committed.commit()
    overrun.commit(100)
    released.release()
    assert (quota.used, quota.reserved, quota.remaining) == (0, 4, 6)
    today.commit()
    assert (quota.used, quota.reserved, quota.remaining) == (4, 0, 6)


def test_a_clock_that_steps_back_over_midnight_grants_nothing_again() -> None:
    clock = Clock(2026, 5, 21, 23, 59, 59)
    quota = Quota(10, now_fn=clock)
    quota.reserve(10).commit()
    clock.now += 2
    quota.reserve(7).commit()
    clock.now -= 2
    assert quota.remaining == 3
    assert quota.resets_at == dt.datetime(2026, 5, 23, tzinfo=UTC)
    quota.reserve(3).commit()
    clock.now += 2
    assert quota.try_reserve() is None


@pytest.mark.parametrize(("now", "words"), [
    (dt.datetime(2026, 5, 21), "what now_fn returned"), ("2026", "what now_fn returned"),
    (math.nan, "what now_fn returned is nan, allowed is seconds since the epoch"), (math.inf, "what now_fn returned"),
    (None, "what now_fn returned"),
])
def test_a_clock_that_is_none_is_refused_when_the_quota_is_made(now: object, words: str) -> None:
    for per in ("hour", "day", "month", 60):
        with pytest.raises((TypeError, ValueError), match=words):
            Quota(1, per, now_fn=lambda: now)       # type: ignore[arg-type, return-value]


# -- alerts


def test_each_alert_is_told_once_in_a_period_and_in_order() -> None:
    clock, told = Clock(), list[QuotaAlert]()
    quota = Quota(10, unit="tokens", alerts=[1.0, 0.5, 0.8, 0.5], on_alert=told.append, now_fn=clock)
    reserved = quota.reserve(10)
    assert told == []
    reserved.commit(4)
    assert told == []
    quota.reserve(1).commit()
    midnight = dt.datetime(2026, 5, 22, tzinfo=UTC)
    assert told == [(0.5, 5, 10, "tokens", midnight)]
    quota.reserve(5).commit(7)
    assert told[1:] == [(0.8, 12, 10, "tokens", midnight), (1.0, 12, 10, "tokens", midnight)]
    clock.now += 86400
    quota.reserve(5).commit()
    assert [alert.share for alert in told] == [0.5, 0.8, 1.0, 0.5]
    assert told[-1].resets_at == midnight + dt.timedelta(days=1)


def test_an_alert_of_the_day_that_is_over_says_so() -> None:
    clock, told = Clock(2026, 5, 21, 23, 59), list[QuotaAlert]()
    quota = Quota(10, on_alert=told.append, now_fn=clock)
    late = quota.reserve(9)
    clock.now += 60
    quota.reserve(8).commit()
    late.commit()
    assert [(alert.share, alert.used, alert.resets_at.day) for alert in told] == [(0.8, 8, 23), (0.8, 9, 22)]


def test_an_alert_may_use_the_quota_and_what_it_brings_about_is_told_after_it() -> None:
    told: list[object] = []

    def on_alert(alert: QuotaAlert) -> None:
        told.append(alert.share)
        if alert.share == 0.5:
            quota.reserve(5).commit()
            told.append("done")

    quota = Quota(10, alerts=[0.5, 1.0], on_alert=on_alert, now_fn=Clock())
    quota.reserve(5).commit()
    assert told == [0.5, "done", 1.0]


def test_what_on_alert_raises_is_logged_and_what_interrupts_it_is_not_swallowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = []

    def on_alert(alert: QuotaAlert) -> None:
        told.append(alert.share)
        if alert.share == 0.5:
            raise ValueError("broken")
        if alert.share == 0.6:
            raise KeyboardInterrupt

    quota = Quota(10, alerts=[0.5, 0.6, 0.7, 1.0], on_alert=on_alert, now_fn=Clock())
    with caplog.at_level(logging.ERROR, "qengine.quota"):
        assert quota.reserve(5).commit()
    assert "on_alert raised" in caplog.text and "broken" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        quota.reserve(2).commit()
    assert quota.used == 7
    quota.reserve(3).commit()
    assert told == [0.5, 0.6, 0.7, 1.0]


@pytest.mark.parametrize("seed", range(2))
def test_each_alert_comes_once_and_in_order_from_64_threads(seed: int) -> None:
    shares = [number / 50 for number in range(1, 51)]
    told: list[float] = []
    inside = threading.Lock()

    def on_alert(alert: QuotaAlert) -> None:
        assert inside.acquire(False)        # one at a time
        told.append(alert.share)
        assert quota.used >= alert.used     # the quota can be asked: its lock is free
        inside.release()

    quota = Quota(6400, alerts=shares, on_alert=on_alert, now_fn=Clock())
    with switching_often():
        in_threads(64, lambda number: [quota.reserve().commit() for _ in range(100)])
    assert told == shares
    assert (quota.used, quota.reserved, quota.remaining) == (6400, 0, 0)


# -- threads, signals, forks


class switching_often:
    def __enter__(self) -> None:
        self.interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

    def __exit__(self, *exc: object) -> None:
        sys.setswitchinterval(self.interval)


@pytest.mark.parametrize("seed", range(3))
def test_64_threads_at_random_against_what_they_noted(seed: int) -> None:
    """What was granted never exceeds the limit of its day, and in the end the counts are what the threads noted."""
    clock = Clock(2026, 5, 21)
    days = 5
    quota = Quota(500, now_fn=clock)
    noted: list[list[tuple[float, float, float]]] = [[] for _ in range(64)]     # the day's end, reserved, used

    def work(number: int) -> None:
        rng = random.Random(seed * 64 + number)
        held = []
        for step in range(100):
            if number == 0 and step % 20 == 19:
                clock.now += 86400
            amount = rng.randint(1, 9)
            reserved = quota.try_reserve(amount)
            if reserved is not None:
                held.append(reserved)
            if held and rng.random() < 0.7:
                one = held.pop(rng.randrange(len(held)))
                used = rng.choice([0, one.amount, rng.randint(0, int(one.amount))])
                assert one.commit(used)
                assert not one.release()
                noted[number].append((one._hold.period.ends_at, one.amount, used))
        for one in held:
            assert one.release() if rng.random() < 0.5 else one.commit()
            noted[number].append((one._hold.period.ends_at, one.amount, one._hold.used or 0))

    with switching_often():
        in_threads(64, work)
    by_day: dict[float, float] = {}
    for entries in noted:
        for ends_at, _, used in entries:
            by_day[ends_at] = by_day.get(ends_at, 0) + used
    assert len(by_day) >= days - 1
    assert max(by_day.values()) <= 500
    assert max(by_day.values()) > 250       # it was worth counting
    assert quota.used == by_day.get(quota.resets_at.timestamp(), 0)
    assert quota.reserved == 0


def test_64_threads_get_exactly_the_limit() -> None:
    quota = Quota(1000, now_fn=Clock())
    granted: list[int] = []
    with switching_often():
        in_threads(64, lambda number: granted.extend(1 for _ in range(50) if quota.try_reserve() is not None))
    assert len(granted) == 1000 and quota.remaining == 0


def test_64_threads_settle_one_reservation_once() -> None:
    quota = Quota(1000, now_fn=Clock())
    for _ in range(20):
        reserved, settled = quota.reserve(10), list[bool]()
        in_threads(16, lambda number, one=reserved, to=settled: to.append(one.commit(number)))
        assert sum(settled) == 1
    assert quota.reserved == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
@pytest.mark.not_under_coverage
def test_a_signal_handler_may_use_the_quota_that_it_interrupts() -> None:
    quota = Quota(10**9, now_fn=Clock())
    count = 0

    def handler(*args: object) -> None:
        nonlocal count
        count += 1
        quota.reserve(1000).commit()

    before = signal.signal(signal.SIGALRM, handler)
    own = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        until = time.monotonic() + 0.2
        while time.monotonic() < until or count <= 10:
            quota.reserve().commit()
            own += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (quota.used, quota.reserved) == (own + 1000 * count, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_goes_on_from_its_parents_counts_with_locks_of_its_own() -> None:
    quota = Quota(10, now_fn=Clock())
    quota.reserve(4).commit()
    reserved = quota.reserve(2)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with quota.as_account()._lock:
            holding.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        reserved.commit(1)
        os._exit(0 if (quota.remaining, quota.try_reserve(6)) == (5, None) and quota.try_reserve(5) else 1)
    until = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.001)
    done.set()
    thread.join()
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    assert quota.remaining == 4


def test_what_a_parent_was_about_to_tell_its_child_does_not() -> None:
    told = list[QuotaAlert]()
    quota = Quota(10, alerts=[0.5, 1.0], on_alert=told.append, now_fn=Clock())
    account = quota.as_account()
    hold = account.reserve(5)
    assert hold is not None and account.settle(hold)
    account.start_afresh()                                  # as in a child
    quota.reserve(5).commit()
    assert [alert.share for alert in told] == [1.0]


# -- what is refused


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_quota_is_not_copied(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="Quota cannot be copied or pickled, for a copy would"):
        copied(Quota(1))


@pytest.mark.parametrize(("make", "kind", "words"), [
    (lambda: Quota(0), ValueError, "limit is 0, allowed is a finite number > 0"),
    (lambda: Quota(-1), ValueError, "limit is -1"),
    (lambda: Quota(math.nan), ValueError, "limit is nan"),
    (lambda: Quota(math.inf), ValueError, "limit is inf"),
    (lambda: Quota("200"), TypeError, "limit is '200'"),
    (lambda: Quota(True), TypeError, "limit is True"),
    (lambda: Quota(1, "week"), ValueError, "per is 'week', allowed is 'hour', 'day', 'month', a number of seconds"),
    (lambda: Quota(1, 0), ValueError, "per is 0"),
    (lambda: Quota(1, 0.5), ValueError, "per is 0.5, allowed is a finite number >= 1"),
    (lambda: Quota(1, math.inf), ValueError, "per is inf"),
    (lambda: Quota(1, math.nan), ValueError, "per is nan"),
    (lambda: Quota(1, dt.timedelta(0)), ValueError, "per is 0.0"),
    (lambda: Quota(1, None), TypeError, "per is None"),
    (lambda: Quota(1, True), TypeError, "per is True"),
    (lambda: Quota(1, unit=3), TypeError, "unit is 3"),
    (lambda: Quota(1, unit=""), ValueError, "unit is ''"),
    (lambda: Quota(1, tz="Europe/Berlin"), TypeError, "tz is 'Europe/Berlin' (str), allowed is a tzinfo, such as"),
    (lambda: Quota(1, tz=3600), TypeError, "tz is 3600"),
    (lambda: Quota(1, 60, starts=dt.datetime(2026, 1, 1)), ValueError, "allowed is an aware datetime"),
    (lambda: Quota(1, 60, starts=dt.date(2026, 1, 1)), TypeError, "starts is datetime.date(2026, 1, 1)"),
    (lambda: Quota(1, 60, starts=0), TypeError, "starts is 0 (int), allowed is an aware datetime"),
    (lambda: Quota(1, "day", starts=dt.datetime(2026, 1, 1, tzinfo=UTC)), ValueError, "None where per is 'day'"),
    (lambda: Quota(1, alerts=0.8), TypeError, "alerts is 0.8"),
    (lambda: Quota(1, alerts="1"), TypeError, "alerts is '1'"),
    (lambda: Quota(1, alerts=[0]), ValueError, "an item of alerts is 0, allowed is a number in (0, 1]"),
    (lambda: Quota(1, alerts=[80]), ValueError, "an item of alerts is 80"),
    (lambda: Quota(1, alerts=[None]), TypeError, "an item of alerts is None"),
    (lambda: Quota(1, on_alert=3), TypeError, "on_alert is 3"),
    (lambda: Quota(1, on_alert=async_listener), TypeError, "allowed is a plain function"),
    (lambda: Quota(1, now_fn=0), TypeError, "now_fn is 0"),
])
def test_what_makes_no_quota_is_refused(make: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)
    assert "allowed is" in str(caught.value)


async def async_listener(alert: QuotaAlert) -> None:
    return None


class Lost(dt.tzinfo):
    """A zone that does not say where it is."""

    def fromutc(self, when: dt.datetime) -> dt.datetime:
        return when

    def utcoffset(self, when: dt.datetime | None) -> dt.timedelta | None:
        return None


def test_a_zone_that_does_not_say_where_it_is_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed is a tzinfo that says how far it is from UTC"):
        Quota(1, tz=Lost())


@pytest.mark.parametrize("amount", [0, -1, math.nan, math.inf, "1", None, True, {"calls": 1}])
def test_an_amount_that_is_none_is_refused_and_takes_nothing(amount: object) -> None:
    quota = Quota(10, now_fn=Clock())
    for method in (quota.reserve, quota.try_reserve):
        with pytest.raises((TypeError, ValueError), match=r"amount is .*allowed is a finite number > 0"):
            method(amount)      # type: ignore[arg-type]
    reserved = quota.reserve(1)
    if amount not in (0, None):
        with pytest.raises((TypeError, ValueError), match=r"used is .*allowed is a finite number >= 0"):
            reserved.commit(amount)     # type: ignore[arg-type]
    assert quota.remaining == 9


def test_a_program_without_a_quota_does_not_pay_for_the_calendar() -> None:
    asked = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import qengine.quota; "
        "sys.exit(any(name in sys.modules for name in ('datetime', 'zoneinfo')))"
    )
    assert subprocess.run([sys.executable, "-S", "-I", "-c", asked], timeout=60, check=False).returncode == 0
