"""A journal of which any write goes wrong: the process dies there, the disk is full there; or the file is not right.

Of the writes of some runs each is the one, in turn; QENGINE_STRESS below 100 takes so many of them, evenly spread.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
from journal_support import DIED, SCENARIOS, Book, Lived, Nursery, rows_of, saved_at

from qengine import AsyncTaskScheduler, ExecutionPolicy, Journal, RateLimit, RunReport, TaskScheduler, database
from qengine.errors import StorageError

T = TypeVar("T")

FROM_THE_START = 1000.0     # an instant of virtual time
TREES = [name for name in SCENARIOS if name != "quick"]
WORLDS = ["threads", "asyncio"]
EVERY = 100
PAGE = 4096

pytestmark = pytest.mark.not_under_coverage("it asks nothing of the code that test_journal.py does not ask")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


class Rounds:
    """Runs on virtual time of which one life has a fault and the next none."""

    def __init__(self, nursery: Nursery, folder: Path, world: str) -> None:
        self._nursery, self._folder, self._world = nursery, folder, world
        self._count = 0
        self.lives = self.cut = self.repeated = self.ended = 0

    @cache      # noqa: B019 - it lives as long as a test
    def deaths(self, scenario: str, dies_at: int = 0) -> list[dict[str, Any]]:
        """A death before each step that writes, and after each commit: between other steps there is nothing of ours.

        Of the steps of a run that goes wrong nowhere, or of one that goes on with one that died at a step.
        """
        path = self._new()
        if dies_at:
            self._live(scenario, path, FROM_THE_START, {"at": dies_at, "how": "die_before"})
        lived = self._live(scenario, path, FROM_THE_START, {})
        assert lived.end is not None and lived.end["error"] is None, lived.end
        before = [{"at": at, "how": "die_before"} for at in range(1, lived.end["steps"] + 1)]
        return before + [{"at": at, "how": "die_after"} for at in lived.end["commits"]]

    def full_disks(self, scenario: str, dies_at: int = 0) -> list[dict[str, Any]]:
        """A disk that is full at each step that writes, and stays so or does not."""
        steps = {death["at"] for death in self.deaths(scenario, dies_at)}
        return [{"at": at, "how": "full" if at % 3 else "full_once"} for at in sorted(steps)]

    def go(self, scenario: str, *faults: dict[str, Any], streams: bool = True, virtual: bool = True) -> None:
        """One round: a life for each fault, and one without."""
        path, begins = self._new(), FROM_THE_START
        book = Book(SCENARIOS[scenario], path)
        for fault in (*faults, {}):
            lived = self._live(scenario, path, begins if virtual else None, fault, streams=streams)
            book.add(lived)
            begins = max([begins, saved_at(path), *(call.at for call in book.calls)])
            if lived.end is not None and lived.end["error"] is None:
                self.ended += bool(fault)
                book.close(lived)
                if virtual:
                    book.check_limits()
                break
        self.lives += book.lives
        self.cut += book.kills
        self.repeated += book.repeated

    def __str__(self) -> str:
        return f"{self.lives} lives, {self.cut} cut short, {self.repeated} calls made once more"

    def _new(self) -> Path:
        self._count += 1
        return self._folder / f"{self._count}.db"

    def _live(self, scenario: str, path: Path, begins: float | None, fault: Any, *, streams: bool = True) -> Lived:
        listens = self._count % 2 == 0
        return self._nursery.live(
            scenario=scenario, world=self._world, path=str(path), begins=begins, fault=fault, streams=streams,
            listens=listens, synchronous="NORMAL",
        )


Faults = Callable[..., list[dict[str, Any]]]


def spread(points: Sequence[T], count: int, seed: object) -> Sequence[T]:
    """All of them; or so many, drawn evenly."""
    if count >= min(EVERY, len(points)):
        return points
    rng, share = random.Random(str(seed)), len(points) / count
    return [points[int((number + rng.random()) * share)] for number in range(count)]


def chosen(names: Sequence[str], count: int, seed: object) -> Sequence[str]:
    """All scenarios; or one, where only few writes are tried."""
    return names if count >= EVERY else [random.Random(str(seed)).choice(names)]


@pytest.mark.stress
@pytest.mark.parametrize("faults", [Rounds.deaths, Rounds.full_disks])
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_of_which_any_write_goes_wrong_is_gone_on_with(
    world: str, faults: Faults, nursery: Nursery, tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    count, rounds = stress_count(2), Rounds(nursery, tmp_path, world)
    for scenario in chosen(TREES, count, (world, faults.__name__)):
        for number, fault in enumerate(spread(faults(rounds, scenario), count, scenario)):
            rounds.go(scenario, fault, streams=number % 3 > 0)
    assert not rounds.ended, "a write went wrong, and nobody said so"
    print(f"{world}, {faults.__name__}: {rounds}")


@pytest.mark.stress
@pytest.mark.parametrize("faults", [Rounds.deaths, Rounds.full_disks])
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_goes_on_of_which_any_write_goes_wrong_is_gone_on_with(
    world: str, faults: Faults, nursery: Nursery, tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    count, rounds = stress_count(1), Rounds(nursery, tmp_path, world)
    for scenario in chosen(TREES, count, (world, faults.__name__)):
        death = rounds.deaths(scenario)[len(rounds.deaths(scenario)) // 3]
        for number, fault in enumerate(spread(faults(rounds, scenario, death["at"]), count, scenario)):
            rounds.go(scenario, death, fault, streams=number % 3 > 0)
    assert not rounds.ended, "a write went wrong, and nobody said so"
    print(f"{world}, {faults.__name__}: {rounds}")


@pytest.mark.stress
@pytest.mark.parametrize("world", WORLDS)
def test_a_full_disk_in_real_time(
    world: str, nursery: Nursery, tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    count, rounds = stress_count(1), Rounds(nursery, tmp_path, world)
    for scenario in chosen([*SCENARIOS], count, world):
        for at in spread(range(16, 60), count, scenario):
            rounds.go(scenario, {"at": at, "how": "full"}, streams=at % 2 > 0, virtual=False)
    print(f"{world}: {rounds}")


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of files' sizes here")
@pytest.mark.parametrize("how", ["torn", "refused"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_file_that_cannot_grow_at_any_page(
    world: str, how: str, nursery: Nursery, tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    """The system's own fault, in the middle of a page: it ends the process there, or refuses to write."""
    count, rounds = stress_count(1), Rounds(nursery, tmp_path, world)
    for scenario in chosen(["kept", "tree"], count, (world, how)):
        sizes = range(PAGE // 2, 400_000, PAGE) if count >= EVERY else range(40_000, 160_000, PAGE)
        for size in spread(sizes, count, (scenario, world, how)):
            rounds.go(scenario, {"how": how, "file_size": size})
    print(f"{world}, {how}: {rounds}")


@pytest.mark.parametrize("world", WORLDS)
def test_a_file_that_may_have_no_more_pages(world: str, nursery: Nursery, tmp_path: Path) -> None:
    """SQLite's own word for a full disk."""
    rounds = Rounds(nursery, tmp_path, world)
    rounds.go("kept", {"pages": 7})
    assert not rounds.ended


# ---- files that are not right ----------------------------------------------------------------------------------------


def doubled(number: int) -> int:
    return 2 * number


def answered(path: Path, inputs: Sequence[int] = range(8)) -> RunReport[int, int]:
    policy = ExecutionPolicy(2, [RateLimit(per_second=1e4, burst=9)])
    with Journal(path) as journal:
        return TaskScheduler(doubled, policy, journal=journal).run(inputs)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The journal of a run that is over."""
    path = tmp_path / "run.db"
    assert answered(path).success_count == 8
    return path


def assert_refused(path: Path, *words: str) -> None:
    """The file is refused by its name, for that reason, and nothing in it or in its folder is changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    with pytest.raises(StorageError) as caught:
        Journal(path)
    assert all(word in str(caught.value) for word in (str(path), *words)), caught.value
    after = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    after.pop(f"{path.name}-lock", None)
    before.pop(f"{path.name}-lock", None)
    assert after == before


@pytest.mark.parametrize("content", [b"a,b,c\n1,2,3\n" * 300, bytes(range(256)) * 32, b"xy", b"SQLite format 3\0" * 99])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_database_of_somebody_else(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA journal_mode={mode}")
        other.execute("CREATE TABLE tasks (id)")
        other.execute("INSERT INTO tasks VALUES (1)")
        other.commit()
    assert_refused(path, "no file of qengine's")


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run.db").mkdir()
    assert_refused(tmp_path / "run.db")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is its folder there"):
        Journal(tmp_path / "none" / "run.db")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.34, 0.5, 0.75, 0.9, 0.999])
def test_a_file_that_was_cut_off(share: float, written: Path) -> None:
    os.truncate(written, max(1, int(written.stat().st_size * share)))
    assert_refused(written)


def test_a_file_with_a_damaged_page(written: Path) -> None:
    with open(written, "r+b") as file:
        file.seek(2 * PAGE)
        file.write(os.urandom(3 * PAGE))
    assert_refused(written, "damaged")


def test_a_file_of_a_later_version(written: Path) -> None:
    with closing(sqlite3.connect(written)) as other:
        other.execute(f"PRAGMA user_version={database.VERSION + 1}")
    assert_refused(written, "later version", str(database.VERSION + 1))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_may_not_be_written_to(is_there: bool, written: Path) -> None:
    if is_there:
        written.chmod(0o444)
    else:
        written.unlink()
    written.parent.chmod(0o555)
    try:
        assert_refused(written)
    finally:
        written.parent.chmod(0o755)


def test_a_file_that_another_program_has_locked(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.02)
    with closing(sqlite3.connect(written, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert_refused(written, "locked")
        other.execute("ROLLBACK")
    assert answered(written).by_source["default"].recalled == 8


@pytest.mark.parametrize("world", WORLDS)
def test_a_file_that_is_locked_in_the_middle_of_a_run(
    world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.02)
    path = tmp_path / "run.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:

        def plain(number: int) -> int:
            if number == 5:
                other.execute("BEGIN IMMEDIATE")
            return number

        async def awaited(number: int) -> int:
            return plain(number)

        with Journal(path) as journal:
            policy = ExecutionPolicy(1)
            in_threads = TaskScheduler(plain, policy, journal=journal)
            in_a_loop = AsyncTaskScheduler(awaited, policy, journal=journal)
            with pytest.raises(StorageError, match="locked") as caught:
                in_threads.run(range(9)) if world == "threads" else asyncio.run(in_a_loop.run(range(9)))
        other.execute("ROLLBACK")
    report: RunReport[int, int] = caught.value.report      # type: ignore[attr-defined]
    stored = rows_of(path)
    assert str(path) in str(caught.value)
    assert {result.task.payload for result in report.results if result.ok} == stored.keys()
    again = answered(path, range(9))
    assert again.success_count == 9
    assert again.by_source["default"].recalled == len(stored)


def test_a_second_process_is_refused_and_the_first_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    ends: list[Any] = []

    def fn(number: int) -> int:
        if number == 3:
            ends.append(nursery.live(scenario="kept", world="threads", path=str(path)).end)
        return number

    with Journal(path) as journal:
        report = TaskScheduler(fn, ExecutionPolicy(1, [RateLimit(per_second=1e4)]), journal=journal).run(range(8))
    assert report.values() == [*range(8)]
    assert {row.status for row in rows_of(path).values()} == {"succeeded"} and len(rows_of(path)) == 8
    kind, text = ends[0]["error"]
    assert (kind, ends[0]["at_the_door"]) == ("StorageError", True)
    assert str(path) in text and f"process {os.getpid()}" in text


def test_the_file_of_a_process_that_died_is_free(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    lived = nursery.live(scenario="kept", world="threads", path=str(path), fault={"at": 60, "how": "die_before"})
    assert (lived.exit, lived.end) == (DIED, None)
    with Journal(path):
        assert rows_of(path)
