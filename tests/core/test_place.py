"""Places in a tree: they compare as (level, root, child, ...) does, and cost little."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qengine.core.place import ROOTS, Place, level_of, place_below

NUMBERS = (1, 2, 246, 247, 248, 255, 256, 257, 65_535, 65_536, 2**24, 2**40)


def place_of(*path: int) -> Place:
    """The place of a node: root number, child number, and so on."""
    below, _ = ROOTS
    for child in path[:-1]:
        below, _ = place_below((below, child))
    return below, path[-1]


def test_the_places_below_a_node_begin_before_its_first_child() -> None:
    assert ROOTS < place_of(1) < place_below(place_of(1)) < place_of(1, 1)


def test_places_are_in_the_order_of_level_root_child() -> None:
    rng = random.Random(3)
    paths = {tuple(rng.choice(NUMBERS) for _ in range(rng.randint(1, 4))) for _ in range(400)}
    by_hand = sorted(paths, key=lambda path: (len(path), path))
    assert sorted(paths, key=lambda path: place_of(*path)) == by_hand
    assert all(place_of(*one) < place_of(*other) for one, other in pairwise(by_hand))


@pytest.mark.parametrize("level", [0, 1, 2, 246, 247, 248, 300, 1000])
def test_a_place_knows_its_level_however_deep(level: int) -> None:
    below, _ = place_of(*[1] * (level + 1))
    assert level_of(below) == level
    assert len(below) <= level + 3
