"""Limits in a store, from within one process: two stores of one file stand for two processes.

Time is a virtual clock's where that is possible.  What several real processes do is in `test_store_processes.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limiter_support import in_child, over_rate
from shared import PATIENCE, until
from test_limiter_signals import Interrupted, Storm, interrupt

from qengine import RateLimit, RateLimiter, Window
from qengine.aio_limiter import AsyncRateLimiter
from qengine.core.bucket import CATCH_UP
from qengine.errors import StorageError
from qengine.limit_store import ANY_TIME, LimitStore, Part
from qengine.store import SqliteStore
from qengine.stored_line import StoredLine
from qengine.testing import VirtualClock

ONE_A_SECOND = RateLimit(per_second=1)
Open = Callable[[], SqliteStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the file once more, as another process would."""
    stores: list[SqliteStore] = []

    def open_store() -> SqliteStore:
        stores.append(SqliteStore(tmp_path / "limits.db"))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


# ---- what a permit is ------------------------------------------------------------------------------------------------


def test_two_processes_share_what_there_is(opened: Open, clock: VirtualClock) -> None:
    mine, yours = (
        RateLimiter(RateLimit(per_second=1, burst=2), store=opened(), key="api", now_fn=clock.now) for _ in range(2)
    )
    assert [limiter.try_acquire() for limiter in (mine, yours, mine, yours)] == [True, True, False, False]
    assert mine.retry_after() == yours.retry_after() == 1.0
    assert mine.acquire() and clock.now() == 1.0
    assert not yours.try_acquire()


def test_keys_have_nothing_to_do_with_each_other(opened: Open, clock: VirtualClock) -> None:
    store = opened()
    a, b = (RateLimiter(ONE_A_SECOND, store=store, key=key, now_fn=clock.now) for key in "ab")
    assert a.try_acquire() and not a.try_acquire() and b.try_acquire()


def test_what_was_taken_stays_taken_for_who_comes_later(opened: Open, clock: VirtualClock) -> None:
    first = opened()
    assert RateLimiter(ONE_A_SECOND, store=first, key="api", now_fn=clock.now).try_acquire()
    first.close()
    later = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now, initial=1)
    assert not later.try_acquire()


@pytest.mark.parametrize("tokens", [0, 0.5, 3])
def test_initial_is_about_a_key_that_is_new(opened: Open, clock: VirtualClock, tokens: float) -> None:
    limiter = RateLimiter(
        RateLimit(per_second=1, burst=3), store=opened(), key="api", now_fn=clock.now, initial=tokens
    )
    assert limiter.available_tokens == tokens


@pytest.mark.parametrize("seed", range(4))
def test_one_process_has_what_it_would_have_without_a_store(opened: Open, seed: int) -> None:
    rng = random.Random(seed)
    now = [0.0]
    all_limits = RateLimit(per_second=2, burst=3), RateLimit(per_second=50, burst=60, unit="t"), Window(5, 4.0)
    limits: list[RateLimit | Window] = [*all_limits[: 1 + seed]]
    alone = RateLimiter(*limits, now_fn=lambda: now[0])
    stored = RateLimiter(*limits, now_fn=lambda: now[0], store=opened(), key="api")
    for _ in range(300):
        now[0] += rng.choice([0, 0, 0.125, 0.25, 1.0])
        amount: Any = rng.choice([1, 2, {"calls": 1}] + ([{"t": 7.0}, {"calls": 2, "t": 30}] if seed else []))
        what = rng.choice(["try", "try", "try", "in time", "refund", "charge", "pause", "limits", "look"])
        if what == "limits" and rng.random() < 0.2:
            changed = [RateLimit(per_second=rng.choice([1, 2, 4]), burst=rng.choice([2, 3, 5])), *limits[1:]]
            for limiter in (alone, stored):
                limiter.set_limits(*changed)
        else:
            said: list[Any] = []
            for limiter in (alone, stored):
                if what == "try":
                    said.append(limiter.try_acquire(amount))
                elif what == "in time":
                    said.append(limiter.acquire(amount, timeout=0))
                elif what == "refund":
                    limiter.refund(amount)
                elif what == "charge":
                    limiter.charge(amount)
                elif what == "pause" and now[0] % 8 == 0:
                    limiter.pause_for(0.5)
            assert said[:1] == said[1:], (what, amount, now)
        assert stored.available_tokens == pytest.approx(alone.available_tokens, abs=1e-6), (what, amount, now)
        assert stored.retry_after() == pytest.approx(alone.retry_after(), abs=1e-6), (what, amount, now)


def test_several_limits_are_taken_all_or_none(opened: Open, clock: VirtualClock) -> None:
    limits = RateLimit(per_second=1, burst=2), RateLimit(per_second=10, burst=10, unit="tokens"), Window(3, 100, "big")
    limiter = RateLimiter(*limits, store=opened(), key="api", now_fn=clock.now)
    assert limiter.try_acquire({"tokens": 10, "big": 1})
    for refused in ({"tokens": 1}, {"calls": 2}, {"calls": 0, "big": 3}):
        assert not limiter.try_acquire(refused)
    clock.sleep(1.0)
    assert limiter.try_acquire({"calls": 2, "tokens": 10, "big": 2})


def test_what_can_never_be_had_is_refused(opened: Open) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api")
    assert not limiter.try_acquire(2)
    for ask in (limiter.acquire, limiter.reserve, limiter.retry_after):
        with pytest.raises(ValueError, match="at most 1 calls"):
            ask(2)
    with pytest.raises(ValueError, match="nothing here counts pages"):
        limiter.acquire({"pages": 1})


def test_a_window_is_exact_for_both(opened: Open, clock: VirtualClock) -> None:
    limiters = [RateLimiter(Window(3, 10), store=opened(), key="api", now_fn=clock.now) for _ in range(2)]
    admitted = []
    for number in range(12):
        assert limiters[number % 2].acquire()
        admitted.append(clock.now())
        clock.sleep(0.5 * (number % 3))
    for first, fourth in zip(admitted, admitted[3:], strict=False):
        assert fourth - first >= 10
    assert admitted[-1] < 35


def test_a_window_runs_from_when_it_was_begun(opened: Open, clock: VirtualClock) -> None:
    """Who was promised an instant and comes late has the next one wait for it."""
    mine, yours = (RateLimiter(Window(1, 1.0), store=opened(), key="api", now_fn=clock.now) for _ in range(2))
    assert mine.acquire()
    promised = yours.reserve()
    assert promised.ready_at == 1.0
    clock.sleep(1.25)
    assert promised.wait()                                      # begins only now
    assert mine.retry_after() == 1.0


def test_what_is_charged_to_a_window_is_paid_off_before_a_promise_is_kept(opened: Open, clock: VirtualClock) -> None:
    mine, yours = (RateLimiter(Window(1, 1.0), store=opened(), key="api", now_fn=clock.now) for _ in range(2))
    assert mine.acquire()
    promised = mine.reserve()
    clock.sleep(0.5)
    yours.charge(1)
    assert promised.ready_at == 1.0
    assert promised.wait() and clock.now() == 1.5


def test_it_is_a_context_manager_and_a_decorator(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now)

    @limiter
    def now() -> float:
        return clock.now()

    with limiter:
        assert clock.now() == 0.0
    assert (now(), now()) == (1.0, 2.0)


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_a_timeout_that_cannot_be_met_takes_nothing(opened: Open, clock: VirtualClock) -> None:
    mine, yours = (RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now) for _ in range(2))
    assert mine.acquire(timeout=0)
    assert not mine.acquire(timeout=0.75) and clock.now() == 0.0
    assert yours.acquire(timeout=1.0) and clock.now() == 1.0


def test_processes_take_turns_however_many_wait_in_each(opened: Open) -> None:
    """Three threads of one and one of the other: each process gets every other permit."""
    limiters = [RateLimiter(RateLimit(per_second=50), store=opened(), key="api") for _ in range(2)]
    got: list[int] = []
    end = threading.Event()

    def work(number: int) -> None:
        while not end.is_set():
            limiters[number].acquire()
            got.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 0, 0, 1)]
    for thread in threads:
        thread.start()
    until(lambda: len(got) >= 24)
    end.set()
    for thread in threads:
        thread.join()
    assert 8 <= got[:24].count(1) <= 15


def test_who_comes_too_late_takes_another_slot(opened: Open) -> None:
    """A process that was stopped does not use what has gone by: else several would, at once."""
    now, late = [0.0], [CATCH_UP / 2]
    promised: list[Any] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds + late[0]
        if late[0] > CATCH_UP:
            promised.append(yours.reserve())
            late[0] = 0.0

    mine, yours = (
        RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=lambda: now[0], sleep_fn=sleep) for _ in range(2)
    )
    assert mine.acquire() and mine.acquire()
    assert now[0] == pytest.approx(1.0 + CATCH_UP / 2)          # late, but not too late
    late[0] = 0.5
    assert mine.acquire()
    assert promised[0].ready_at == pytest.approx(3.0)           # what the first had at 2.0 is not to be had at 2.5
    assert now[0] == pytest.approx(4.0)


def test_a_slot_that_nobody_came_after_is_not_lost_by_who_comes_too_late(opened: Open) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds + 0.25

    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=lambda: now[0], sleep_fn=sleep)
    assert limiter.acquire() and limiter.acquire()
    assert now[0] == 1.25


def test_a_store_that_is_slow_to_answer_is_asked_for_a_later_slot(opened: Open, clock: VirtualClock) -> None:
    """What is due at once would always be too late when it is told."""

    class Slow(SqliteStore):
        def take(self, *args: Any, **named: Any) -> Any:
            try:
                return super().take(*args, **named)
            finally:
                clock.sleep(0.05)

    store = Slow(opened().database.path)
    limiter = RateLimiter(RateLimit(per_second=100), store=store, key="api", now_fn=clock.now)
    admitted = [(clock.now(), 1.0) for _ in range(20) if limiter.acquire()]
    assert over_rate(admitted, 100, 1) is None and len(admitted) == 20
    assert not limiter.try_acquire() and limiter.acquire(timeout=1) and limiter.reserve().wait()
    store.close()


def test_a_pause_is_for_all(opened: Open, clock: VirtualClock) -> None:
    mine, yours = (RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now) for _ in range(2))
    mine.acquire()
    promised = yours.reserve()
    assert promised.ready_at == 1.0
    mine.pause_for(5.0)
    mine.pause_for(1.0)                                         # no pause is cut short
    assert promised.ready_at == 5.0
    assert not yours.try_acquire() and yours.retry_after() == 5.0
    assert promised.wait() and clock.now() >= 5.0


def test_a_slot_of_who_slept_when_the_pause_came_is_not_used_in_it(opened: Open) -> None:
    now = [0.0]
    mine = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=lambda: now[0])

    def sleep(seconds: float) -> None:
        if now[0] < 1.0:
            mine.pause_for(3.0)
        now[0] += seconds

    yours = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=lambda: now[0], sleep_fn=sleep)
    assert mine.acquire() and yours.acquire()
    assert now[0] == 3.0


def test_who_cannot_be_served_in_time_for_a_pause_does_not_sleep_it_out(opened: Open) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        mine.pause_for(60.0)
        now[0] += seconds

    mine = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=lambda: now[0], sleep_fn=sleep)
    assert mine.acquire() and not mine.acquire(timeout=2.0)
    assert now[0] == 1.0


def test_changed_limits_are_for_who_waits_as_well(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(RateLimit(per_second=1, burst=2), store=opened(), key="api", now_fn=clock.now, initial=0)
    refused: list[str] = []

    def wait() -> None:
        try:
            limiter.acquire(2)
        except ValueError as error:
            refused.append(str(error))

    thread = clock.thread(wait, (), "waits")
    clock.begin(thread)
    clock.sleep(0.5)
    limiter.set_limits(ONE_A_SECOND)
    thread.join()
    assert "at most 1 calls" in refused[0]
    assert limiter.retry_after() == 0.5                         # and it has left nothing behind


def test_who_is_told_the_same_key_with_other_limits_goes_by_its_own(opened: Open, clock: VirtualClock) -> None:
    slow = RateLimiter(RateLimit(per_second=1, burst=4), store=opened(), key="api", now_fn=clock.now)
    quick = RateLimiter(RateLimit(per_second=4, burst=4), store=opened(), key="api", now_fn=clock.now)
    assert slow.try_acquire(3)
    assert (slow.available_tokens, quick.available_tokens) == (1.0, 1.0)
    clock.sleep(0.5)
    assert quick.try_acquire(1) and quick.available_tokens == 0.5   # until now by the rate of who came last
    clock.sleep(0.25)
    assert slow.available_tokens == quick.available_tokens == 1.5


# ---- reservations ----------------------------------------------------------------------------------------------------


def test_a_reservation_has_its_instant_at_once(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now)
    first, second, third = (limiter.reserve() for _ in range(3))
    assert [some.delay for some in (first, second, third)] == [0.0, 1.0, 2.0]
    assert third.wait() and clock.now() == 2.0
    assert second.wait() and clock.now() == 2.0                 # taken at its instant, though nobody waited for it
    assert not third.cancel()
    assert "ready in 0 s" in repr(first)


def test_the_last_reservation_can_be_given_back_and_another_is_lost(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now)
    limiter.acquire()
    second, third = limiter.reserve(), limiter.reserve()
    assert second.cancel() is False and third.delay == 2.0
    assert third.cancel() is True and third.ready_at == float("inf")
    assert third.cancel() is False and third.wait() is False
    assert limiter.reserve().delay == 2.0


def test_a_slot_of_a_window_can_always_be_given_back(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(Window(3, 10), store=opened(), key="api", now_fn=clock.now)
    first, second, third = (limiter.reserve() for _ in range(3))
    assert limiter.retry_after() == 10.0
    assert first.cancel() and limiter.retry_after() == 0.0
    assert limiter.try_acquire() and not limiter.try_acquire()
    assert second.cancel() and third.cancel() and limiter.available_tokens == 2.0


def test_a_refund_never_has_two_go_at_the_instant_of_one(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now)
    limiter.acquire()
    promised = [limiter.reserve() for _ in range(3)]
    limiter.refund(1)
    instants = [some.ready_at for some in [*promised, limiter.reserve()]]
    assert over_rate([(0.0, 1), *[(at, 1) for at in instants]], 1, 1, 0) is None


# ---- the store -------------------------------------------------------------------------------------------------------


def at_boot(monkeypatch: pytest.MonkeyPatch, store: SqliteStore, token: str | None, up: float, wall: float) -> None:
    monkeypatch.setattr(store, "_boot", token or "")
    monkeypatch.setattr(store, "_monotonic_ns", lambda: round(up * 1e9))
    monkeypatch.setattr(store, "_time_ns", lambda: round(wall * 1e9))
    monkeypatch.setattr(store, "now", lambda: up)


@pytest.mark.parametrize("token", ["another", None])
def test_after_a_reboot_the_wall_clock_tells_what_has_passed(
    opened: Open, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    limits = RateLimit(per_second=1, burst=10), Window(10, 100)
    store = opened()
    at_boot(monkeypatch, store, token and "one", 5000.0, 1e9)
    assert RateLimiter(*limits, store=store, key="api").try_acquire(10)
    at_boot(monkeypatch, store, token, 2.0, 1e9 + 4)
    limiter = RateLimiter(*limits, store=store, key="api")
    assert limiter.retry_after() == pytest.approx(96.0)
    rate = RateLimiter(limits[0], store=store, key="api")
    assert rate.available_tokens == pytest.approx(4.0)
    assert rate.try_acquire(4) and not rate.try_acquire()
    assert limiter.available_tokens == pytest.approx(0.0, abs=1e-6)
    assert not limiter.try_acquire()
    limiter.pause_for(0.0)                                      # which writes it down, once and for all
    at_boot(monkeypatch, store, token, 97.9, 1e9 + 99.9)
    assert RateLimiter(*limits, store=store, key="api").retry_after(10) == pytest.approx(0.1)
    at_boot(monkeypatch, store, token, 98.1, 1e9 + 100.1)
    assert RateLimiter(*limits, store=store, key="api").try_acquire(10)


@pytest.mark.parametrize("back", [0.0, 1.0, 1e6])
def test_a_wall_clock_that_was_set_back_mints_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch, back: float
) -> None:
    store = opened()
    at_boot(monkeypatch, store, "one", 9.0, 1e9)
    limiter = RateLimiter(RateLimit(per_second=1, burst=5), store=store, key="api")
    assert limiter.try_acquire(5)
    limiter.pause_for(3.0)
    at_boot(monkeypatch, store, "another", 50.0, 1e9 - back)
    limiter = RateLimiter(RateLimit(per_second=1, burst=5), store=store, key="api")
    assert limiter.available_tokens == pytest.approx(0.0, abs=1e-6)
    assert limiter.retry_after() == pytest.approx(3.0)
    assert not limiter.try_acquire()


def test_a_clock_that_is_set_back_mints_nothing(opened: Open) -> None:
    now = [100.0]
    limiter = RateLimiter(RateLimit(per_second=1, burst=2), store=opened(), key="api", now_fn=lambda: now[0])
    assert limiter.try_acquire(2)
    now[0] = 90.0
    assert not limiter.try_acquire() and limiter.retry_after() <= 11.0
    now[0] = 101.0
    assert limiter.try_acquire() and not limiter.try_acquire()


def test_a_store_that_lacks_a_method_is_refused_by_name() -> None:
    class Half:
        def take(self) -> None: ...

        def look(self) -> None: ...

    with pytest.raises(TypeError, match=r"store is .*lacks now, begin, give_back, change, pause"):
        RateLimiter(ONE_A_SECOND, store=Half(), key="api")      # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a class"):
        RateLimiter(ONE_A_SECOND, store=SqliteStore, key="api")     # type: ignore[arg-type]


def test_a_store_wants_a_key_and_a_key_a_store(opened: Open) -> None:
    store = opened()
    assert isinstance(store, LimitStore)
    for key in (None, "", 3):
        with pytest.raises(TypeError, match="key is "):
            RateLimiter(ONE_A_SECOND, store=store, key=key)     # type: ignore[arg-type]
    for kind in (RateLimiter, AsyncRateLimiter):
        with pytest.raises(ValueError, match=r"key is 'api'.*no store"):
            kind(ONE_A_SECOND, key="api")
    limiter = RateLimiter(ONE_A_SECOND, store=store, key="api")
    with pytest.raises(ValueError, match=r"store is .*beside a RateLimiter"):
        AsyncRateLimiter(limiter, store=store)


def test_its_state_is_not_what_an_engine_takes_from_under_a_lock(opened: Open) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api")
    with pytest.raises(TypeError, match="in a store"):
        limiter.as_limit_set()


def test_who_cannot_stand_in_line_fetches_a_slot(opened: Open, clock: VirtualClock) -> None:
    line = RateLimiter(ONE_A_SECOND, store=opened(), key="api", now_fn=clock.now).stored_line
    assert line is not None
    now, later = line.fetch(1), line.fetch(1)
    assert now is not None and now.is_begun and line.begin(now, 1) == 0.0
    assert later is not None and (later.due_at, later.is_begun) == (10**9, False)
    assert line.fetch(1, latest=1.5) is None
    clock.sleep(1.0)
    assert line.begin(later, 1) == 0.0 and line.is_good(later)
    clock.sleep(0.5)
    assert line.begin(later, 1) is None
    instead = line.fetch(1, instead_of=later)
    assert instead is not None and instead.is_begun             # nobody came after the one that was too late
    assert line.give_back(instead.ticket) and not line.give_back(later.ticket)
    line.pause(2.0)
    again = line.fetch(1)
    assert again is not None and again.due_at == round(3.5e9)


def test_a_slot_of_a_window_runs_from_when_what_it_was_for_has_ended(opened: Open, clock: VirtualClock) -> None:
    limiter = RateLimiter(Window(1, 1.0), store=opened(), key="api", now_fn=clock.now)
    line = limiter.stored_line
    assert line is not None
    slot = line.fetch(1)
    assert slot is not None
    clock.sleep(0.5)
    limiter.pause_for(0.25)
    line.settle(slot, 1)
    assert limiter.retry_after() == 1.0
    clock.sleep(2.0)
    line.settle(slot, 1)                                        # it has run out meanwhile
    assert limiter.try_acquire()


def fingerprint(path: Path) -> bytes:
    return path.read_bytes()


def test_a_foreign_or_later_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    foreign = tmp_path / "foreign.db"
    later = tmp_path / "later.db"
    for path, statement in ((foreign, "CREATE TABLE mine (a)"), (later, "PRAGMA user_version = 99")):
        if path is later:
            SqliteStore(path).close()
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()
    for path, says in ((text, "no file of qengine's"), (foreign, "no file of qengine's"), (later, "a later version")):
        before = fingerprint(path)
        with pytest.raises(StorageError, match=says):
            SqliteStore(path)
        assert fingerprint(path) == before


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        SqliteStore(tmp_path / "none" / "limits.db")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError):
            SqliteStore(tmp_path / "limits.db")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_goes_bad_is_a_storage_error_and_lets_the_next_one_go_on(opened: Open, tmp_path: Path) -> None:
    limiter = RateLimiter(ONE_A_SECOND, store=opened(), key="api")
    other = sqlite3.connect(tmp_path / "limits.db")
    other.execute("ALTER TABLE limits RENAME TO elsewhere")
    for _ in range(2):
        with pytest.raises(StorageError, match="no such table"):
            limiter.acquire()
    assert "0 waiting" in f"{limiter._line.count()} waiting"
    other.execute("ALTER TABLE elsewhere RENAME TO limits")
    other.close()
    assert limiter.acquire()


def test_a_slot_for_later_may_be_used_as_late_as_any(opened: Open) -> None:
    slot = opened().take("api", [Part("rate calls", False, 1, 1.0, 1.0, None)], 7, ANY_TIME, 10**7, 0, 10**9, 0)
    assert slot is not None and (slot.due_at, slot.is_begun) == (10**9, False)
    assert slot.good_until == 10**9 + round(CATCH_UP * 1e9)


def test_a_slot_is_given_back_once_and_only_by_its_ticket(opened: Open) -> None:
    store = opened()
    part = [Part("rate calls", False, 1, 1.0, 1.0, None)]
    assert store.take("api", part, 7, ANY_TIME, now=0) is not None
    assert not store.give_back("api", 8) and not store.give_back("other", 7)
    assert store.give_back("api", 7) and not store.give_back("api", 7)
    assert store.look("api", part, 0).available == 1.0


# ---- interrupted -----------------------------------------------------------------------------------------------------


def interrupt_at(number: int, action: Callable[[], object]) -> bool:
    """Do something, with an exception at the n-th call in the store or its line; return whether there was one.

    When a function of ours begins, or one of Python's has returned: there, and at a jump back, signals are handled.
    """
    left = [number]

    def profile(frame: Any, event: str, argument: object) -> None:
        names = "stored_line.py", "sqlite_limits.py", "database.py"
        code = frame.f_code
        closes = event == "call" and code.co_name == "steps"    # or goes on: a generator that is closed does nothing
        if event in ("call", "c_return") and not closes and Path(code.co_filename).name in names:
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted

    sys.setprofile(profile)
    try:
        action()
    except Interrupted:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("limit", [RateLimit(per_second=1, burst=10**6), Window(10**6, 1e9)], ids=["rate", "window"])
def test_who_is_interrupted_has_taken_nothing_and_locked_nothing(opened: Open, limit: RateLimit | Window) -> None:
    """Wherever it may be; what was granted by then is taken."""
    limiter, other = (RateLimiter(limit, store=opened(), key="api", now_fn=lambda: 0.0) for _ in range(2))
    taken = lost = number = 0
    was_interrupted = True
    while was_interrupted:
        number += 1
        was_interrupted = interrupt_at(number, limiter.acquire)
        assert limiter._line.count() == 0
        assert other.try_acquire()                              # nobody is locked out, here or elsewhere
        left = 10**6 - taken - 1 - other.available_tokens
        assert left in (0, 1)
        taken += 1 + round(left)
        lost += was_interrupted and left == 1
    assert number > 50 and lost <= 5                            # in the last steps of all, when it was granted


@pytest.mark.stress
@pytest.mark.not_under_coverage("a process of its own is not measured")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_signals_at_any_instant_take_nothing_and_lock_nobody_out(
    opened: Open, stress_count: Callable[[int], int]
) -> None:
    """100,000 of them, `QENGINE_STRESS=100000`, take two minutes."""
    path, count = opened().database.path, stress_count(300)

    def storm() -> tuple[int, int]:
        now = [0.0]
        rate = RateLimit(per_second=1, burst=10**9)
        limiter, other = (
            RateLimiter(rate, store=SqliteStore(path), key="api", now_fn=lambda: now[0]) for _ in range(2)
        )
        struck = Storm(interrupt, seed=1, longest=4e-4)
        granted = lost = 0

        def work() -> None:
            nonlocal granted
            limiter.acquire()
            granted += 1

        for _ in range(count):
            struck.over(work)
            assert limiter._line.count() == 0
            assert other.try_acquire()
            granted += 1
            taken = round(10**9 - other.available_tokens)
            assert taken - granted in (0, 1)
            lost += taken - granted
            granted = taken
        return lost, limiter._line.count()

    lost, waiting = in_child(storm, PATIENCE + count / 100)
    assert lost <= max(10, count / 5) and waiting == 0          # it was granted, and nobody had heard of it yet


# ---- asyncio ---------------------------------------------------------------------------------------------------------


def test_tasks_and_threads_stand_in_one_line(opened: Open) -> None:
    shared = RateLimiter(RateLimit(per_second=100), store=opened(), key="api")
    tasks = AsyncRateLimiter(shared)

    async def main() -> None:
        await asyncio.gather(*(tasks.acquire() for _ in range(5)), asyncio.to_thread(shared.acquire))

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began >= 0.05 - CATCH_UP


def test_the_loop_goes_on_while_another_process_is_at_the_file(opened: Open, tmp_path: Path) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_second=1000), store=opened(), key="api")
    other = sqlite3.connect(tmp_path / "limits.db", isolation_level=None)

    async def main() -> None:
        other.execute("BEGIN IMMEDIATE")
        asked = asyncio.create_task(limiter.acquire())
        done, _ = await asyncio.wait([asked], timeout=0.05)
        assert not done                                         # and the loop was not held up, or it would be
        other.execute("ROLLBACK")
        assert await asyncio.wait_for(asked, PATIENCE)

    asyncio.run(main())
    other.close()


@pytest.mark.parametrize("when", ["asleep", "at the file", "in line"])
def test_a_task_that_is_cancelled_gives_back_what_it_had(opened: Open, tmp_path: Path, when: str) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_hour=1), store=opened(), key="api")
    other = sqlite3.connect(tmp_path / "limits.db", isolation_level=None)

    async def main() -> None:
        assert await limiter.acquire()
        if when == "at the file":
            other.execute("BEGIN IMMEDIATE")
        first = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0.03)
        asked = asyncio.create_task(limiter.acquire()) if when == "in line" else first
        await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        if when == "at the file":
            other.execute("ROLLBACK")
        elif when == "in line":
            assert limiter._line.count() == 1
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first

    asyncio.run(main())
    until(lambda: threading.active_count() == 1)
    assert limiter.retry_after() <= 3600.0
    other.close()


def test_a_reservation_is_awaited_and_a_timeout_kept(opened: Open) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_second=50), store=opened(), key="api")

    @limiter
    async def call() -> str:
        return "done"

    async def main() -> None:
        async with limiter:
            reserved = limiter.reserve()
        assert not await limiter.acquire(timeout=0.001)
        assert await reserved.wait() and await call() == "done"
        behind = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        assert not await limiter.acquire({"calls": 1}, timeout=0.001)
        assert await behind

    asyncio.run(main())


def test_on_a_virtual_clock_tasks_wait_in_no_time(opened: Open, clock: VirtualClock) -> None:
    limiter = AsyncRateLimiter(RateLimit(per_hour=1), store=opened(), key="api", now_fn=clock.now)

    async def main() -> float:
        await limiter.acquire()
        await limiter.acquire()
        return clock.now()

    assert asyncio.run(main()) == 3600.0


# ---- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.not_under_coverage("a process of its own is not measured")
def test_a_forked_child_opens_the_file_anew_and_has_none_of_its_parents_reservations(opened: Open) -> None:
    limiter = RateLimiter(RateLimit(per_hour=1, burst=3), store=opened(), key="api")
    reserved = limiter.reserve()

    def child() -> tuple[bool, bool, float]:
        return limiter.try_acquire(), reserved.cancel(), reserved.ready_at

    assert in_child(child, PATIENCE) == (True, False, float("inf"))
    assert isinstance(limiter._line, StoredLine)
    assert limiter.try_acquire() and not limiter.try_acquire()
    assert reserved.ready_at < float("inf")
