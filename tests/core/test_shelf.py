"""The shelf of a stream: each result leaves it once, in the order asked for, and nobody is woken in vain."""

from __future__ import annotations

import random

import pytest
from core.support import make_attempt, make_lane

from qengine.core.lane import Attempt
from qengine.core.shelf import Shelf


class Consumer:
    """Takes from a shelf as a stream does, up to where it would have to wait."""

    def __init__(self, ordered: bool) -> None:
        self.rings = 0
        self.shelf = Shelf(ordered, self._ring)

    def _ring(self) -> None:
        self.rings += 1

    def take(self) -> list[int]:
        taken = []
        while True:
            attempt = self.shelf.take()
            if attempt is not None:
                taken.append(attempt.index)
            elif self.shelf.is_watched:
                return taken
            else:
                self.shelf.is_watched = True


LANE = make_lane()


def result(index: int) -> Attempt:
    attempt = make_attempt(index, LANE)
    attempt.index = index
    return attempt


def test_results_are_taken_as_they_came_and_one_ring_serves_for_all_of_them() -> None:
    consumer = Consumer(ordered=False)
    consumer.shelf.put(result(2))
    assert consumer.rings == 0, "nobody waits"
    assert consumer.take() == [2]
    for index in (1, 0, 3):
        consumer.shelf.put(result(index))
    assert consumer.rings == 1
    assert consumer.take() == [1, 0, 3]


def test_in_order_only_the_result_whose_turn_it_is_rings() -> None:
    consumer = Consumer(ordered=True)
    assert consumer.take() == []
    for index in (1, 3):
        consumer.shelf.put(result(index))
    assert consumer.rings == 0
    consumer.shelf.put(result(0))
    assert consumer.rings == 1
    assert consumer.take() == [0, 1]
    consumer.shelf.put(result(2))
    assert consumer.rings == 2
    assert consumer.take() == [2, 3]


@pytest.mark.parametrize("ordered", [False, True])
def test_the_end_is_seen_and_rings(ordered: bool) -> None:
    consumer = Consumer(ordered)
    assert consumer.take() == [] and not consumer.shelf.is_complete
    consumer.shelf.put(None)
    assert consumer.rings == 1 and consumer.shelf.is_complete


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_left_leaves_it_once_and_who_waits_is_rung_for(ordered: bool) -> None:
    consumer = Consumer(ordered)
    for index in (0, 1, 3):
        consumer.shelf.put(result(index))
    assert consumer.shelf.take() is not None
    left: list[Attempt] = []
    consumer.shelf.empty_into(left)
    assert sorted(attempt.index for attempt in left) == [1, 3]
    assert consumer.rings == 1 and consumer.shelf.is_complete
    assert consumer.take() == []
    consumer.shelf.empty_into(left)
    assert len(left) == 2


@pytest.mark.parametrize("ordered", [False, True])
def test_whatever_the_order_of_coming_all_are_taken_once(ordered: bool) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        indices = list(range(30))
        rng.shuffle(indices)
        consumer, taken = Consumer(ordered), list[int]()
        for index in indices:
            rings = consumer.rings
            waits = consumer.shelf.is_watched
            consumer.shelf.put(result(index))
            if consumer.rings > rings or (not waits and rng.random() < 0.5):
                taken += consumer.take()
        taken += consumer.take()
        assert taken == (list(range(30)) if ordered else indices)


@pytest.mark.parametrize("ordered", [False, True])
def test_what_an_interrupted_consumer_was_taking_is_saved_once(ordered: bool) -> None:
    shelf, left = Consumer(ordered).shelf, list[Attempt]()
    shelf.saved(left)
    assert left == [], "he was taking nothing"
    first, second = result(0), result(1)
    shelf.put(first)
    shelf.handing = first       # noted, but not taken out: who empties the shelf finds it
    shelf.saved(left)
    assert left == []
    assert shelf.take() is first
    shelf.saved(left)
    shelf.saved(left)
    assert left == [first]
    shelf.put(second)
    assert shelf.take() is second
    shelf.saved(left)
    assert left == [first, second]
