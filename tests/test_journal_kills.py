"""Runs that are killed at any instant, again and again, until one ends: what they did together is what one would."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from journal_support import SCENARIOS, Book, Nursery
from shared import timely, undisturbed

pytestmark = pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")

LATE = 0.050            # seconds from the admission of a call to its begin: a commit, and other threads
MOST_KILLS = 6


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def survive(nursery: Nursery, folder: Path, world: str, number: int) -> Book:
    """One round: a run that is killed at instants drawn at random, and gone on with until it ends by itself."""
    rng = random.Random(f"{world} {number}")
    name = [*SCENARIOS][(number + 4 * (world == "asyncio")) % len(SCENARIOS)]
    scenario = SCENARIOS[name]
    streams, listens = rng.random() < 0.7, rng.random() < 0.5
    book = Book(scenario, folder / f"{number}.db")
    for _ in range(MOST_KILLS + 1):
        is_spared = book.kills == MOST_KILLS or (book.kills and rng.random() < 0.3)
        kill_after = None if is_spared else rng.uniform(0.0, 1.1 * scenario.seconds)
        lived = nursery.live(
            kill_after, scenario=name, world=world, path=str(book.path), streams=streams, listens=listens,
            synchronous=rng.choice(("FULL", "NORMAL")),
        )
        book.add(lived)
        if lived.end is not None:
            book.close(lived)
            with timely():
                book.check_limits(LATE)
            return book
    raise AssertionError("the last life was spared, and did not end")


@pytest.mark.stress
@pytest.mark.parametrize("world", ["threads", "asyncio"])
def test_a_run_that_is_killed_goes_on(
    world: str, nursery: Nursery, tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    rounds, kills, lives, calls, repeated = stress_count(3), 0, 0, 0, 0
    for number in range(rounds):
        folder = tmp_path / str(number)
        book = undisturbed(survive_in_a_new_folder)(nursery, folder, world, number)
        kills, lives = kills + book.kills, lives + book.lives
        calls, repeated = calls + len(book.calls), repeated + book.repeated
    print(f"{world}: {rounds} runs, {kills} kills, {lives} lives, {calls} calls, {repeated} of them made once more")
    assert kills


def survive_in_a_new_folder(nursery: Nursery, folder: Path, world: str, number: int) -> Book:
    folder = folder / str(len([*folder.glob("*")]))
    folder.mkdir(parents=True)
    return survive(nursery, folder, world, number)
