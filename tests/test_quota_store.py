"""`Quota` with a store: counts that survive restarts, processes that share them, and processes that die."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time
from shared import PATIENCE, in_threads, until

from qengine import BudgetExceededError
from qengine.database import Database
from qengine.errors import StorageError
from qengine.quota import Quota, QuotaAlert, StoredAccount, StoredHold
from qengine.sqlite_quotas import KEPT_PERIODS, QUOTAS, QuotaCounts, QuotaSettlement, QuotaStore, QuotaTerms
from qengine.store import SqliteStore

UTC = dt.UTC
ROOT = Path(__file__).resolve().parent.parent
DAY = 86400
NOON = dt.datetime(2026, 5, 21, 12, tzinfo=UTC).timestamp()
MIDNIGHT = NOON + DAY / 2


class Shelf:
    """A file, the stores that are opened on it, and a clock that is set by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = NOON
        self.stores: list[SqliteStore] = []

    def store(self) -> SqliteStore:
        self.stores.append(SqliteStore(self.path))
        return self.stores[-1]

    def quota(self, limit: float = 10, store: QuotaStore | None = None, **given: object) -> Quota:
        """A quota on a store of its own, as in another process, unless one is given."""
        options: dict[str, object] = {"key": "gnews", "now_fn": lambda: self.now, **given}
        return Quota(limit, store=self.store() if store is None else store, **options)     # type: ignore[arg-type]

    def crash(self) -> None:
        """Have the process that opened the last store be dead for the others."""
        self.stores.pop().close()

    def rows(self, query: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(self.path)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(tmp_path / "quotas.db")
    yield made
    for store in made.stores:
        store.close()


def counts(quota: Quota) -> tuple[float, float, float]:
    return quota.used, quota.reserved, quota.remaining


def account_of(quota: Quota) -> StoredAccount:
    account = quota.as_account()
    assert isinstance(account, StoredAccount)
    return account


# -- the counts are in the file


def test_what_is_used_is_used_after_a_restart_and_for_others(shelf: Shelf) -> None:
    quota = shelf.quota()
    with quota.reserve(4) as reserved:
        assert reserved.commit(3)
    assert not reserved.commit() and not reserved.release() and not reserved.begin()
    account_of(quota).flush()                           # there is nothing to write
    held = quota.reserve(2)
    other = shelf.quota()
    assert counts(other) == counts(quota) == (3, 2, 5)
    assert other.try_reserve(6) is None
    with pytest.raises(BudgetExceededError) as caught:
        other.reserve(6)
    assert str(caught.value) == "6 calls asked for, 5 left of 10 per day until 2026-05-22T00:00:00+00:00"
    assert held.release()
    assert other.reserve(7).commit()
    assert repr(quota) == "<Quota of 10 calls per day: 0 remaining until 2026-05-22T00:00:00+00:00>"
    for store in shelf.stores:
        store.close()
    assert counts(shelf.quota()) == (10, 0, 0)


def test_each_key_is_a_quota_of_its_own(shelf: Shelf) -> None:
    store = shelf.store()
    one, other = shelf.quota(10, store), shelf.quota(5, store, key="newsdata", unit="tokens", per="hour")
    one.reserve(10).commit()
    other.reserve(1.5)
    assert (one.remaining, other.remaining) == (0, 3.5)
    with pytest.raises(ValueError, match="amount is 6, allowed is at most 5 tokens: more could never be had at once"):
        other.reserve(6)


def test_fractions_and_large_numbers_are_counted_as_without_a_store(shelf: Shelf) -> None:
    cents = shelf.quota(1, unit="cost")
    held = [cents.reserve(0.1) for _ in range(10)]
    assert cents.try_reserve(0.001) is None and cents.remaining == 0
    assert all(one.commit() for one in held)
    assert cents.used == pytest.approx(1) and cents.remaining == 0
    large = shelf.quota(10**20, key="large")
    large.reserve(10**19).commit(2**63)
    assert large.used == 2**63 and large.reserved == 0


def test_a_new_period_begins_for_all_and_what_was_reserved_before_it_is_settled_in_the_old_one(shelf: Shelf) -> None:
    mine, other = shelf.quota(), shelf.quota()
    committed, released, late = mine.reserve(3), mine.reserve(3), other.reserve(3)
    shelf.now = MIDNIGHT
    assert counts(mine) == counts(other) == (0, 0, 10)
    with other.reserve(4):
        committed.commit(5)
        released.release()
        shelf.now += DAY
        assert late.commit()
    assert counts(mine) == (0, 0, 10)
    assert shelf.rows("SELECT ends_at, used, reserved FROM quota_periods ORDER BY ends_at") == [
        (MIDNIGHT, 8, 0), (MIDNIGHT + DAY, 4, 0),
    ]
    assert shelf.rows("SELECT * FROM quota_holds") == []


def test_a_clock_that_steps_back_grants_nothing_again_also_after_a_restart(shelf: Shelf) -> None:
    shelf.now = MIDNIGHT - 1
    quota, slow = shelf.quota(), shelf.quota(now_fn=lambda: MIDNIGHT - 1)
    quota.reserve(10).commit()
    assert slow.try_reserve() is None
    shelf.now = MIDNIGHT + 1
    quota.reserve(7).commit()
    shelf.now = MIDNIGHT - 1
    for one in (quota, slow, shelf.quota()):
        assert (one.remaining, one.resets_at.day) == (3, 23)
    assert slow.try_reserve(4) is None
    slow.reserve(3).commit()
    shelf.now = MIDNIGHT + 1
    assert counts(quota) == (10, 0, 0)


def test_one_that_is_asked_for_over_two_midnights_is_of_the_period_in_which_it_was_reserved(shelf: Shelf) -> None:
    store = shelf.store()
    quota, other, reserve = shelf.quota(10, store), shelf.quota(), store.reserve_quota

    def slowly(*args: Any) -> Any:
        shelf.now += DAY
        other.reserve(4)
        shelf.now += DAY
        assert quota.as_account().current().remaining == 10
        return reserve(*args)

    store.reserve_quota = slowly            # type: ignore[method-assign, assignment]
    reserved = quota.reserve(3)
    store.reserve_quota = reserve           # type: ignore[method-assign]
    assert quota.as_account().current().remaining == 10
    assert reserved.commit()
    assert counts(quota) == (0, 0, 10)
    assert shelf.rows("SELECT ends_at, used, reserved FROM quota_periods") == [(MIDNIGHT + DAY, 3, 4)]


def test_a_day_is_a_local_one_and_frozen_time_is_the_time(tmp_path: Path) -> None:
    try:
        tz = zoneinfo.ZoneInfo("Asia/Kolkata")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("this system does not know Asia/Kolkata")
    with freeze_time("2026-05-21 18:29:59") as frozen:
        for day, left in ((22, 3), (22, 2), (23, 3)):
            store = SqliteStore(tmp_path / "quotas.db")
            quota = Quota(3, tz=tz, store=store, key="k")
            assert (quota.remaining, quota.resets_at) == (left, dt.datetime(2026, 5, day, tzinfo=tz))
            quota.reserve().commit()
            store.close()
            if left == 2:
                frozen.tick(1)


def test_the_file_keeps_a_record_of_a_year_and_no_more(shelf: Shelf) -> None:
    store = shelf.store()
    terms = QuotaTerms("k", "calls", "per day")
    for day in range(KEPT_PERIODS + 20):
        store.reserve_quota(terms, day + 1, day * DAY, 1, 9, True)
    kept = shelf.rows("SELECT min(ends_at), max(ends_at), count(*) FROM quota_periods")
    assert kept == [(20 * DAY, (KEPT_PERIODS + 19) * DAY, KEPT_PERIODS)]
    assert store.settle_quota(terms, [QuotaSettlement(1, 0, 1)]) == [(0, 1, 0, "calls", "per day")]
    assert shelf.rows("SELECT min(ends_at) FROM quota_periods") == [(20 * DAY,)]


@pytest.mark.parametrize("seed", range(4))
def test_two_processes_on_a_file_count_as_one_quota_without_it(shelf: Shelf, seed: int) -> None:
    """Whatever is done, by whichever of them, all say what a quota in memory says."""
    rng = random.Random(seed)
    model = Quota(20, now_fn=lambda: shelf.now)
    stored = [shelf.quota(20), shelf.quota(20)]
    held = []
    for _ in range(120):
        deed = rng.random()
        if deed < 0.5:
            amount = rng.choice([1, 2, 0.5, 7, 21])
            one, other = model.try_reserve(amount), rng.choice(stored).try_reserve(amount)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                held.append((one, other))
        elif deed < 0.9 and held:
            used = rng.choice([None, 0, 0.25, 9])
            for settled in zip(*((one.commit(used), one.commit()) for one in held.pop(rng.randrange(len(held)))),
                               strict=True):
                assert len(set(settled)) == 1
        else:
            shelf.now += rng.choice([3600, DAY / 2, -DAY])
        assert {counts(quota) for quota in stored} == {counts(model)}
        assert {quota.resets_at for quota in stored} == {model.resets_at}


def test_threads_and_processes_get_exactly_the_limit(shelf: Shelf) -> None:
    quotas = [shelf.quota(100), shelf.quota(100)]
    granted: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            reserved = quotas[number % 2].try_reserve()
            if reserved is not None:
                granted.append(1)
                reserved.commit()

    in_threads(4, work)
    assert len(granted) == 100
    assert counts(quotas[0]) == (100, 0, 0)


def test_threads_settle_one_reservation_once(shelf: Shelf) -> None:
    quota = shelf.quota(1000)
    reserved, settled = quota.reserve(10), list[bool]()
    in_threads(8, lambda number: settled.append(reserved.commit(number)))
    assert sum(settled) == 1 and quota.reserved == 0


# -- alerts


def test_each_process_tells_its_alerts_once_in_a_period(shelf: Shelf) -> None:
    told, others = list[QuotaAlert](), list[QuotaAlert]()
    quota = shelf.quota(alerts=[0.5, 1.0], on_alert=told.append)
    other = shelf.quota(alerts=[0.5], on_alert=others.append)
    late = quota.reserve(1)
    quota.reserve(4).commit()
    other.reserve(1).commit()
    assert (told, [alert.used for alert in others]) == ([], [5])
    shelf.now = MIDNIGHT
    late.commit(5)
    assert told == [(share, 10, 10, "calls", dt.datetime(2026, 5, 22, tzinfo=UTC)) for share in (0.5, 1.0)]
    quota.reserve(5).commit()
    quota.reserve(4).commit()
    assert [(alert.share, alert.used, alert.resets_at.day) for alert in told[2:]] == [(0.5, 5, 23)]


def test_an_alert_may_use_the_quota(shelf: Shelf) -> None:
    told: list[float] = []

    def on_alert(alert: QuotaAlert) -> None:
        told.append(alert.share)
        if alert.share == 0.5:
            quota.reserve(5).commit()

    quota = shelf.quota(alerts=[0.5, 1.0], on_alert=on_alert)
    quota.reserve(5).commit()
    assert told == [0.5, 1.0]


# -- processes that die


def test_what_a_dead_process_had_reserved_is_free_and_what_it_had_begun_is_used(shelf: Shelf) -> None:
    alive, dying = shelf.quota(), shelf.quota()
    kept = alive.reserve(1)
    dying.reserve(2)
    begun = dying.reserve(3)
    assert begun.begin() and begun.begin()
    dying.reserve(4).__enter__()
    assert alive.try_reserve() is None
    assert alive.as_account().current().period.reserved == 10
    shelf.crash()
    assert alive.as_account().current().period.reserved == 10           # nobody has looked
    assert alive.reserve(2).commit()
    assert counts(alive) == (9, 1, 0)
    assert kept.release()
    assert counts(alive) == (9, 0, 1)
    assert shelf.rows("SELECT * FROM quota_holds") == []


def test_it_is_used_in_its_own_period_and_whoever_looks_sees_it(shelf: Shelf) -> None:
    dying = shelf.quota()
    dying.reserve(4).__enter__()
    dying.reserve(2)
    shelf.now = MIDNIGHT
    dying.reserve(5).begin()
    dying.reserve(3)
    shelf.crash()
    assert counts(shelf.quota()) == (5, 0, 5)
    assert shelf.rows("SELECT ends_at, used, reserved FROM quota_periods ORDER BY ends_at") == [
        (MIDNIGHT, 4, 0), (MIDNIGHT + DAY, 5, 0),
    ]


def test_a_reservation_that_was_given_back_is_not_entered(shelf: Shelf) -> None:
    gone = shelf.quota()
    reserved = gone.reserve(10)
    shelf.crash()
    other = shelf.quota()
    assert other.remaining == 10
    assert not reserved.commit() and not reserved.begin()
    with pytest.raises(BudgetExceededError, match="<QuotaReservation of 10 calls: open> is given back: the process"):
        reserved.__enter__()
    assert counts(other) == (0, 0, 10)
    gone.as_account()._store.close()        # type: ignore[attr-defined]  # it had been opened anew


HOLDER = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from test_quota_store import NOON
from qengine.quota import Quota
from qengine.store import SqliteStore
quota = Quota(10, store=SqliteStore(sys.argv[3]), key="gnews", now_fn=lambda: NOON)
quota.reserve(2)
quota.reserve(3).begin()
with quota.reserve(4):
    print("ready", flush=True)
    sys.stdin.read()
"""


def started(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests"), *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_a_process_that_is_killed_is_dead(shelf: Shelf) -> None:
    quota = shelf.quota()
    process = started(HOLDER, shelf.path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert quota.try_reserve(2) is None
        assert counts(quota) == (0, 9, 1)
    finally:
        killed(process)
    assert quota.reserve(3).commit()
    assert counts(quota) == (10, 0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.not_under_coverage
def test_a_child_is_a_process_of_its_own(shelf: Shelf) -> None:
    quota = shelf.quota()
    mine, both = quota.reserve(1), quota.reserve(2)
    account_of(quota).settle(account_of(quota).note(), 0.5)         # the parent writes it
    child = os.fork()
    if child == 0:
        good = both.commit() and quota.try_reserve(8) is None and quota.reserve(3).begin() and quota.used == 2
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0) == (child, 0)
    assert counts(quota) == (5.5, 1, 3.5)
    assert not both.commit() and mine.commit()
    assert counts(quota) == (6.5, 0, 3.5)


# -- what the engine takes from


def test_an_engine_asks_in_memory_and_what_it_settles_is_written_with_the_next_transaction(shelf: Shelf) -> None:
    quota, other = shelf.quota(), shelf.quota()
    account = account_of(quota)
    holds = [account.fetch(2) for _ in range(4)]
    assert account.fetch(3) is None
    first, second, third, fourth = (hold for hold in holds if hold is not None)
    assert (account.remaining, account.unused, account.fits(3), account.might_fit(3)) == (2, 10, False, True)
    assert account.settle(first) and not account.settle(first)
    assert account.settle(second, 1)
    account.undo(third)
    assert (account.remaining, account.unused) == (5, 7)
    assert counts(other) == (0, 8, 2)                   # it is not told yet
    account.undo(second)
    hold = account.fetch(3)
    assert hold is not None
    assert counts(other) == (2, 5, 3) and (account.remaining, account.unused) == (3, 8)
    account.undo(first)
    noted = account.note()
    account.settle(noted, 0.5)
    account.settle(hold)
    account.settle(fourth)
    assert (account.remaining, account.unused) == (4.5, 4.5)
    account.flush()
    assert counts(other) == (5.5, 0, 4.5)
    account.settle(account.note(), 0)
    account.undo(account.note())
    assert not account._queue                           # there is nothing to write
    assert account.refresh().remaining == account.remaining == 4.5


def test_what_is_queued_while_a_transaction_is_on_its_way_is_not_forgotten(shelf: Shelf) -> None:
    store = shelf.store()
    account = account_of(shelf.quota(10, store))
    first, second = account.fetch(2), account.fetch(3)
    assert first is not None and second is not None
    reserve = store.reserve_quota

    def meanwhile(*args: object) -> object:
        answer = reserve(*args)         # type: ignore[arg-type]
        account.settle(second, 1)
        return answer

    account.settle(first)
    store.reserve_quota = meanwhile     # type: ignore[method-assign, assignment]
    assert account.fetch(1) is not None
    assert (account.remaining, account.unused) == (6, 7)
    account.flush()
    assert counts(shelf.quota()) == (3, 1, 6)


def test_an_engine_tells_alerts_when_they_are_written(shelf: Shelf) -> None:
    told = list[QuotaAlert]()
    account = account_of(shelf.quota(alerts=[0.5, 1.0], on_alert=told.append))
    first, second = account.fetch(5), account.fetch(5)
    assert first is not None and second is not None
    account.settle(first)
    assert told == []
    account.flush()
    assert [alert.share for alert in told] == [0.5]
    account.settle(second)
    assert account.fetch(1) is None
    assert [alert.share for alert in told] == [0.5, 1.0]


def test_an_engines_process_that_dies_has_used_what_it_had_in_flight_or_queued(shelf: Shelf) -> None:
    account = account_of(shelf.quota())
    holds = [account.fetch(2), account.fetch(2)]
    assert isinstance(holds[0], StoredHold)
    account.settle(holds[0], 1)
    shelf.crash()
    assert counts(shelf.quota()) == (4, 0, 6)


def test_a_simulation_goes_by_the_file_and_leaves_it_alone(shelf: Shelf) -> None:
    quota, other = shelf.quota(), shelf.quota()
    other.reserve(4).commit()
    twin = quota.as_account().twin(lambda: shelf.now)
    assert twin.remaining == 6
    hold = twin.reserve(6)
    assert hold is not None and twin.settle(hold)
    assert counts(quota) == (4, 0, 6)


# -- what goes wrong


@pytest.mark.parametrize("is_done", [False, True])
def test_who_is_interrupted_has_reserved_nothing(shelf: Shelf, is_done: bool) -> None:
    store = shelf.store()
    quota, reserve = shelf.quota(10, store), store.reserve_quota

    def interrupted(*args: Any) -> Any:
        if is_done:
            reserve(*args)
        raise KeyboardInterrupt

    store.reserve_quota = interrupted       # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        quota.reserve(4)
    store.reserve_quota = reserve           # type: ignore[method-assign]
    assert quota.reserve(10).commit()
    assert counts(quota) == (10, 0, 0)


class Faulty(SqliteStore):
    """A disk that is full now and then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.full = False
        transact = self.database.transact

        def failing(*args: Any, **options: Any) -> Any:
            if self.full:
                raise StorageError("the disk is full")
            return transact(*args, **options)

        self.database.transact = failing        # type: ignore[method-assign]


def test_a_full_disk_is_said_and_nothing_has_changed(shelf: Shelf) -> None:
    store = Faulty(shelf.path)
    shelf.stores.append(store)
    quota = shelf.quota(10, store)
    account = account_of(quota)
    reserved, hold, late, over = quota.reserve(3), account.fetch(2), account.fetch(1), quota.reserve(1)
    assert over.release()
    assert hold is not None and late is not None
    account.settle(hold, 1)
    account.settle(late)
    store.full = True
    for fails in (
        quota.reserve, quota.try_reserve, reserved.commit, reserved.release, reserved.begin, reserved.__enter__,
        account.flush, account.refresh, lambda: account.fetch(1), lambda: quota.used, lambda: quota.resets_at,
    ):
        with pytest.raises(StorageError, match="the disk is full"):
            fails()
        assert (account.remaining, account.unused) == (5, 8)
        assert "open" in repr(reserved)
    assert repr(quota) == "<Quota of 10 calls per day: 5 remaining until 2026-05-22T00:00:00+00:00>"
    with pytest.raises(StorageError, match="the disk is full"):
        shelf.quota(10, store)
    assert not over.commit() and not over.begin()       # there is nothing to write
    store.full = False
    assert reserved.commit(2)
    assert counts(shelf.quota()) == counts(quota) == (4, 0, 6)


def test_the_error_of_a_commit_at_the_end_does_not_hide_that_of_the_call(shelf: Shelf) -> None:
    store = Faulty(shelf.path)
    shelf.stores.append(store)
    quota = shelf.quota(10, store)
    reserved = quota.reserve(3)

    def call() -> None:
        with reserved:
            store.full = True
            raise KeyError("the call's")

    with pytest.raises(StorageError) as caught:
        call()
    assert isinstance(caught.value.__context__, KeyError)
    store.full = False
    assert counts(quota) == (0, 3, 7)
    shelf.crash()
    assert counts(shelf.quota()) == (3, 0, 7)


def test_a_file_that_cannot_be_used_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "quotas.db"
    store = SqliteStore(path)
    Quota(10, store=store, key="k").reserve(4).commit()
    store.close()
    read_only = SqliteStore(path)
    quota = Quota(10, store=read_only, key="k")
    read_only.close()
    read_only.database = Database(path, QUOTAS, read_only=True)
    assert quota.remaining == 6
    with pytest.raises(StorageError, match="it may not be written to"):
        quota.reserve()
    read_only.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StorageError, match="a later version of qengine has written it"):
        SqliteStore(path)
    assert path.read_bytes() == before
    (tmp_path / "foreign").write_text("not a database\n" * 100, encoding="ascii")
    with pytest.raises(StorageError, match="it is no file of qengine's"):
        SqliteStore(tmp_path / "foreign")
    assert (tmp_path / "foreign").read_text(encoding="ascii") == "not a database\n" * 100
    with pytest.raises(StorageError, match="it cannot be opened: is its folder there"):
        SqliteStore(tmp_path / "nowhere" / "quotas.db")


@pytest.mark.parametrize(("given", "kind", "words"), [
    ({"store": None}, ValueError, "key is 'gnews', allowed is None without a store"),
    ({"key": None}, ValueError, "key is None, allowed is a word that is not empty"),
    ({"key": ""}, ValueError, "key is '', allowed is a word that is not empty"),
    ({"key": 3}, TypeError, "key is 3 (int), allowed is a str"),
    ({"store": "quotas.db"}, TypeError, "store is 'quotas.db' (str), allowed is a QuotaStore"),
    ({"limit": 0}, ValueError, "limit is 0, allowed is a finite number > 0"),
])
def test_what_makes_no_quota_with_a_store_is_refused(
    shelf: Shelf, given: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        Quota(**{"limit": 10, "store": shelf.store(), "key": "gnews"} | given)      # type: ignore[arg-type]
    assert words in str(caught.value)
    assert shelf.rows("SELECT * FROM quota_periods") == []


@pytest.mark.parametrize(("given", "words"), [
    ({"unit": "tokens"}, "the store counts tokens per day: under this it counts calls per day"),
    ({"per": "hour"}, "the store counts calls per hour: under this it counts calls per day"),
    ({"tz": dt.timezone(dt.timedelta(hours=2))}, "under this it counts calls per day of another tz or starts"),
    ({"tz": dt.timezone(dt.timedelta(hours=-2))}, "under this it counts calls per day of another tz or starts"),
])
def test_a_key_under_which_something_else_is_counted_is_refused_as_long_as_that_is(
    shelf: Shelf, given: dict[str, Any], words: str
) -> None:
    shelf.quota().reserve(4).commit()
    with pytest.raises(ValueError, match="key is 'gnews', allowed is one under which") as caught:
        shelf.quota(**given)
    assert words in str(caught.value)
    shelf.now = MIDNIGHT
    changed = shelf.quota(**given)
    changed.reserve(4).commit()
    assert changed.remaining == 6


def test_who_comes_to_count_something_else_at_the_same_time_reserves_nothing(shelf: Shelf) -> None:
    calls, tokens = shelf.quota(), shelf.quota(unit="tokens")
    calls.reserve(4).commit()
    for asks in (tokens.try_reserve, lambda: tokens.remaining):
        with pytest.raises(ValueError, match="under this it counts calls per day"):
            asks()
        assert counts(calls) == (4, 0, 6)


def test_a_store_of_ones_own_is_one(shelf: Shelf) -> None:
    class Answering:
        def look_at_quota(self, terms: QuotaTerms, ends_at: float) -> QuotaCounts:
            return QuotaCounts(max(ends_at, MIDNIGHT), 1, 2, terms.unit, terms.per)

        reserve_quota = begin_quota = settle_quota = look_at_quota

    answering: Any = Answering()
    assert isinstance(answering, QuotaStore)
    assert counts(Quota(10, store=answering, key="k", now_fn=lambda: NOON)) == (1, 2, 7)


# -- three processes, a midnight, two crashes

WORKER = """
import os, random, sys, time
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from qengine import BudgetExceededError, Quota
from qengine.store import SqliteStore
folder = Path(sys.argv[3])
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
now_fn = lambda: float((folder / "now").read_text())
quota = Quota(100, per="day", store=SqliteStore(folder / "quotas.db"), key="k", now_fn=now_fn)
late, wants_more = None, True

def log_call(reserved):
    os.write(log, f"{reserved._hold.period.ends_at} {os.getpid()}\\n".encode())

while True:
    if late is None and (late := quota.try_reserve()) is not None:
        late.begin()
        log_call(late)
    spare = quota.try_reserve(5) if wants_more else None
    try:
        with quota.reserve() as reserved:
            log_call(reserved)
            time.sleep(random.random() / 1000)
    except BudgetExceededError:
        if spare is None:
            print("used up", flush=True)
            sys.stdin.readline()
            if late is not None:
                assert late.commit()
                late = None
        wants_more = spare is None
    if spare is not None:
        spare.release()
"""


class Office:
    """Three processes on a file, what they log before each call, and a frozen clock."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.log = folder / "log"
        self.log.touch()
        self.crashes = Counter[float]()
        self.set_clock(NOON)
        self.processes = [self.hire() for _ in range(3)]

    def hire(self) -> subprocess.Popen[str]:
        return started(WORKER, self.folder)

    def set_clock(self, now: float) -> None:
        (self.folder / "new").write_text(str(now), encoding="ascii")
        (self.folder / "new").replace(self.folder / "now")

    def calls(self) -> Counter[float]:
        """How many calls have been begun in each period."""
        return Counter(float(line.split()[0]) for line in self.log.read_text(encoding="ascii").splitlines())

    def crash(self, ends_at: float, after: int) -> None:
        """Kill a process when so many calls have been made in a period; the first that is killed is started again."""
        victim = self.rng.randrange(3)
        until(lambda: self.calls()[ends_at] >= after)
        time.sleep(self.rng.random() / 300)     # somewhere in a call, or between two of its transactions
        killed(self.processes.pop(victim))
        if not self.crashes:
            self.processes.append(self.hire())
        self.crashes[ends_at] += 1

    def see_used_up(self) -> None:
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "used up\n"

    def go_on(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def close(self) -> None:
        for process in self.processes:
            killed(process)


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.not_under_coverage
def test_a_hundred_a_day_by_three_processes_across_midnight_and_two_crashes(
    tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    """Each process begins one call at a time: a crash costs at most one, and no day ever has one too many.

    Each also has one that it begins on the first day and settles on the second.
    """
    for seed in range(stress_count(1)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rng = random.Random(seed)
        office = Office(folder, rng)
        days = [MIDNIGHT, MIDNIGHT + DAY]
        planned = sorted((day, rng.randint(1, 60)) for day in (days if seed % 2 == 0 else rng.choices(days) * 2))
        try:
            for day in days:
                for ends_at, after in planned:
                    if ends_at == day:
                        office.crash(ends_at, after)
                office.see_used_up()
                if day == MIDNIGHT:
                    office.set_clock(MIDNIGHT)
                    office.go_on()
        finally:
            office.close()
        store = SqliteStore(folder / "quotas.db")
        seen = counts(Quota(100, store=store, key="k", now_fn=lambda: NOON + DAY)) == (100, 0, 0)
        store.close()
        calls = office.calls()
        for day in days:
            assert 100 - office.crashes[day] <= calls[day] <= 100, (seed, calls, office.crashes)
        record = sqlite3.connect(folder / "quotas.db")
        recorded = record.execute("SELECT used, reserved FROM quota_periods").fetchall()
        record.close()
        assert seen and recorded == [(100, 0)] * 2
