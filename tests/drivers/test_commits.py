"""What is committed before it is told: in order, in batches, by whoever comes by."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from core.support import make_lane
from shared import PATIENCE, in_threads, until

from qengine.core.lane import Attempt
from qengine.drivers.calls import GivenUp
from qengine.drivers.commits import FULL, Commits


class Disk:
    """A writer that keeps its batches, can be made to wait, and to fail."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[Any], list[Attempt], str | None]] = []
        self.begun: set[Attempt] = set()
        self.error: BaseException | None = None
        self.on_write: Callable[[], object] = lambda: None

    def write(self, outcomes: list[Any], starts: list[Attempt], ended: str | None) -> None:
        self.on_write()
        if self.error is not None:
            raise self.error
        self.batches.append((outcomes, starts, ended))
        self.begun.update(starts)

    def has(self, item: Any) -> bool:
        return item == "recalled"

    @property
    def written(self) -> list[Any]:
        return [item for outcomes, _, _ in self.batches for item in outcomes]


class Scene:
    """Commits with a disk, a clock set by hand, and what was handed out, of which all had to be written before."""

    def __init__(self, pause: float = 1.0) -> None:
        self.disk = Disk()
        self.now = 0.0
        self.told: list[Any] = []
        self.failures: list[BaseException] = []
        self.commits = Commits(self.disk, self._hand_out, self.failures.append, pause)

    def _hand_out(self, item: Any) -> None:
        assert item in self.disk.batches[-1][0]
        self.told.append(item)

    def clock(self) -> float:
        return self.now

    def commit(self) -> None:
        self.commits.commit(self.clock)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def attempt(payload: Any = None) -> Attempt:
    return Attempt(payload, None, make_lane())


def test_all_that_is_there_is_one_batch_told_in_order_after_it_is_written(scene: Scene) -> None:
    scene.commits.pending.extend("abc")
    scene.commit()
    scene.commits.pending.extend("de")
    scene.commit()
    assert [outcomes for outcomes, _, _ in scene.disk.batches] == [["a", "b", "c"], ["d", "e"]]
    assert scene.told == [*"abcde"]


def test_the_next_commit_is_due_after_a_pause(scene: Scene) -> None:
    commits = scene.commits
    assert commits.due_at == -math.inf
    scene.now = 5.0
    commits.pending.append("a")
    scene.commit()
    assert (commits.due_at, commits.asks_at, commits.is_watched) == (6.0, -math.inf, False)
    commits.watch()
    assert (commits.asks_at, commits.is_watched) == (6.0, True)
    scene.commit()
    assert not commits.is_watched


def test_nobody_else_need_come_by_while_one_is_at_it(scene: Scene) -> None:
    seen: list[tuple[float, float]] = []
    scene.disk.on_write = lambda: seen.append((scene.commits.due_at, scene.commits.asks_at))
    scene.commits.pending.append("a")
    scene.commit()
    assert seen == [(math.inf, math.inf)]


def test_who_comes_by_meanwhile_goes_on_and_what_it_left_is_in_the_next_batch(scene: Scene) -> None:
    commits = scene.commits

    def meanwhile() -> None:
        scene.disk.on_write = lambda: None
        commits.pending.append("b")
        scene.commit()      # does not wait, nor writes
        assert scene.disk.batches == []

    scene.disk.on_write = meanwhile
    commits.pending.append("a")
    scene.commit()
    assert scene.told == ["a"]
    scene.commit()
    assert scene.told == ["a", "b"]


def test_a_start_is_written_before_who_is_about_to_make_it_goes_on(scene: Scene) -> None:
    first = attempt()
    scene.commits.pending.append("earlier")
    scene.commits.begin(first, scene.clock)
    assert scene.disk.batches == [(["earlier"], [first], None)]
    assert scene.told == ["earlier"]
    assert not scene.commits.starts


def test_those_who_begin_at_once_share_a_commit(scene: Scene) -> None:
    commits, attempts = scene.commits, [attempt(number) for number in range(9)]
    go_on, at_it = threading.Event(), threading.Event()

    def first_waits() -> None:
        scene.disk.on_write = lambda: None
        at_it.set()
        assert go_on.wait(PATIENCE)

    scene.disk.on_write = first_waits
    first = threading.Thread(target=commits.begin, args=(attempts[0], scene.clock))
    first.start()
    assert at_it.wait(PATIENCE)
    others = [threading.Thread(target=commits.begin, args=(one, scene.clock)) for one in attempts[1:]]
    for other in others:
        other.start()
    until(lambda: len(commits.starts) == 9)
    go_on.set()
    for thread in (first, *others):
        thread.join()
    assert [len(starts) for _, starts, _ in scene.disk.batches] == [1, 8]
    assert {*scene.disk.batches[1][1]} == {*attempts[1:]}


def test_the_last_of_it_says_why_it_is_over(scene: Scene) -> None:
    scene.commits.pending.append("a")
    scene.commits.finish(scene.clock, "deadline")
    assert scene.disk.batches == [(["a"], [], "deadline")]


def test_what_cannot_be_written_is_not_told_and_said_once(scene: Scene) -> None:
    commits = scene.commits
    commits.pending.append("a")
    scene.commit()
    scene.disk.error = OSError("full")
    commits.pending.extend("bc")
    scene.commit()
    scene.disk.error = None
    commits.pending.append("d")
    scene.commit()
    with pytest.raises(GivenUp):
        commits.begin(attempt(), scene.clock)
    commits.finish(scene.clock, "journal")
    assert scene.told == ["a"]
    assert commits.unsaved == [*"bcd"]
    assert scene.failures == [commits.error]
    assert scene.disk.written == ["a"], "what comes after it is not written either: the order would be another"
    assert not commits.starts


def test_what_an_earlier_run_has_committed_is_told_all_the_same(scene: Scene) -> None:
    scene.disk.error = OSError("full")
    scene.commits.hand_out = scene.told.append
    scene.commits.pending.extend(["a", "recalled", "b"])
    scene.commit()
    assert scene.told == ["recalled"]
    assert scene.commits.unsaved == ["a", "b"]


def test_whatever_is_raised_in_a_commit_ends_it_and_no_lock_stays(scene: Scene) -> None:
    scene.disk.error = KeyboardInterrupt()
    scene.commits.pending.append("a")
    scene.commit()
    assert scene.commits.error is scene.disk.error
    scene.commits.finish(scene.clock, "interrupted")
    assert scene.commits.unsaved == ["a"]


def test_after_a_fork_the_child_writes_and_tells_nothing(scene: Scene) -> None:
    commits = scene.commits

    def fork() -> None:
        commits.leave()     # while the parent is at it: its lock is held in the child for ever

    commits.pending.append("a")
    fork()
    commits.pending.append("b")
    commits.finish(scene.clock, "forked")
    assert scene.disk.batches == []
    assert scene.told == []
    assert commits.unsaved == ["a", "b"]


def test_who_is_ahead_of_the_disk_waits_for_it(scene: Scene) -> None:
    commits = scene.commits
    commits.hand_out = scene.told.append
    commits.pending.extend(range(FULL - 1))
    assert not commits.is_full
    commits.catch_up(scene.clock)
    assert scene.disk.batches == []
    commits.pending.append("last")
    assert commits.is_full
    commits.catch_up(scene.clock)
    assert len(scene.told) == FULL
    assert not commits.is_full


@pytest.mark.stress
def test_many_at_once_lose_nothing_and_keep_each_ones_order(stress_count: Callable[[int], int]) -> None:
    scene, count = Scene(pause=0.0), stress_count(200)
    commits = scene.commits

    def one(number: int) -> None:
        for turn in range(count):
            commits.pending.append((number, turn))
            if turn % 3 == 0:
                before = attempt((number, turn))
                commits.begin(before, scene.clock)
                assert before in scene.disk.begun
            else:
                scene.commit()

    in_threads(4, one)
    commits.finish(scene.clock, "done")
    assert scene.told == scene.disk.written
    for number in range(4):
        assert [turn for who, turn in scene.told if who == number] == [*range(count)]
    assert not commits.starts
    assert not commits.pending
