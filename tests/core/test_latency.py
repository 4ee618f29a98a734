"""The sketch of latencies, against the exact quantiles of what was counted."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import pytest

from qengine.core.latency import LONGEST, SHORTEST, Latencies

SHARES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
MOST_BUCKETS = 2048


def sketch_of(values: Iterable[float]) -> Latencies:
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    return latencies


def quantiles(latencies: Latencies) -> list[float | None]:
    return [latencies.quantile(share) for share in SHARES]


def exact(values: list[float], share: float) -> float:
    """By the definition: the smallest value that at least that share of all does not exceed."""
    return next(value for at, value in enumerate(sorted(values), 1) if at / len(values) >= share)


def bimodal(rng: random.Random) -> float:
    return rng.gauss(0.01, 0.001) if rng.random() < 0.7 else rng.gauss(2.0, 0.1)


SHAPES: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda rng: rng.uniform(0.001, 2.0),
    "lognormal": lambda rng: rng.lognormvariate(-2.0, 1.0),
    "heavy tail": lambda rng: rng.paretovariate(0.5) * 1e-3,
    "bimodal": bimodal,
    "two values": lambda rng: rng.choice((0.1, 30.0)),
    "with zeros": lambda rng: max(0.0, rng.uniform(-0.3, 0.7)),
    "virtual hours": lambda rng: rng.expovariate(1 / 36_000),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 100, 3001])
def test_a_quantile_is_within_one_percent_of_the_nearest_rank(shape: str, count: int) -> None:
    rng = random.Random(f"{shape} {count}")
    values = [SHAPES[shape](rng) for _ in range(count)]
    latencies = sketch_of(values)
    assert latencies.count == count
    for share in SHARES:
        found = latencies.quantile(share)
        assert found == pytest.approx(exact(values, share), rel=0.01, abs=0.0), share
        assert found is not None and min(values) <= found <= max(values)
    assert (latencies.quantile(0), latencies.quantile(1)) == (min(values), max(values))


def test_no_size_between_the_bounds_is_off_by_more_than_one_percent() -> None:
    """Each in the middle of three, where it is neither the least nor the most."""
    rng = random.Random(7)
    for value in [math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) for _ in range(3000)]:
        assert sketch_of([0.0, value, LONGEST]).quantile(0.5) == pytest.approx(value, rel=0.01, abs=0.0)


def test_a_rank_is_not_one_too_high_for_the_rounding_of_a_product() -> None:
    assert 0.07 * 100 > 7
    latencies = sketch_of(1e-3 * 1.2 ** at for at in range(100))
    for rank in range(1, 101):
        assert latencies.quantile(rank / 100) == pytest.approx(1e-3 * 1.2 ** (rank - 1), rel=0.01, abs=0.0)


@pytest.mark.parametrize("value", [0.0, -0.5, 1e-300, 1e-12, SHORTEST, 0.1, 7 / 3, LONGEST, 1e12, 1e300])
def test_equal_values_are_exact(value: float) -> None:
    assert quantiles(sketch_of([value] * 5)) == [value] * len(SHARES)


def test_nothing_has_no_quantile() -> None:
    assert Latencies().count == 0
    assert quantiles(Latencies()) == [None] * len(SHARES)


def test_what_no_clock_resolves_counts_as_nothing_and_is_never_less_than_what_was_seen() -> None:
    assert sketch_of([0.0, 1e-12, 1e-11, 1.0]).quantile(0.5) == 0.0
    assert sketch_of([1e-12, 1e-11, 1e-10, 1.0]).quantile(0.5) == 1e-12
    assert sketch_of([-1.0, -0.5, 0.0, 1.0]).quantile(0.5) == 0.0       # a clock that was set back


def test_what_is_longer_than_the_longest_is_at_least_that() -> None:
    found = sketch_of([1.0, 1e11, 1e12, 1e13]).quantile(0.75)
    assert found is not None and 0.99 * LONGEST <= found <= 1e12


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_ones_are_the_sketch_of_all(shape: str) -> None:
    rng = random.Random(shape)
    parts = [[SHAPES[shape](rng) for _ in range(count)] for count in (1, 400, 0, 90)]
    merged = Latencies()
    for part in parts:
        merged.merge(sketch_of(part))
    whole = sketch_of(value for part in parts for value in part)
    assert merged.count == whole.count == 491
    assert quantiles(merged) == quantiles(whole)


def test_merging_leaves_the_other_one_alone() -> None:
    one, other = sketch_of([1.0, 2.0]), sketch_of([4.0])
    one.merge(other)
    one.add(8.0)
    assert (one.count, other.count, other.quantile(1)) == (4, 1, 4.0)
    one.merge(one)
    assert (one.count, one.quantile(0), one.quantile(1)) == (8, 1.0, 8.0)


def test_a_copy_goes_its_own_way() -> None:
    one = sketch_of([1.0, 2.0])
    copy = one.copy()
    one.add(1.0)
    copy.add(9.0)
    copy.add(10.0)
    assert (one.count, one.quantile(1)) == (3, 2.0)
    assert (copy.count, copy.quantile(1)) == (4, 10.0)


def test_those_that_have_counted_nothing_share_what_they_have() -> None:
    first, second = Latencies(), Latencies()
    third = first.copy()
    first.merge(second)
    assert sys.getsizeof(first) < 80 and not hasattr(first, "__dict__")
    assert first._buckets is second._buckets is third._buckets
    for latencies in (first, second, third):
        latencies.add(1.0)
    assert [latencies.count for latencies in (first, second, third, Latencies())] == [1, 1, 1, 0]


def test_the_buckets_are_bounded_whatever_comes() -> None:
    latencies = sketch_of(2.0 ** (power / 40) for power in range(-40 * 1070, 40 * 1023))
    assert 1900 < len(latencies._buckets) <= MOST_BUCKETS
    latencies.merge(sketch_of([0.0, 5e-324, 1.7e308]))
    assert len(latencies._buckets) <= MOST_BUCKETS


def test_a_million_values_of_one_kind_are_few_buckets() -> None:
    latencies = sketch_of(random.Random(1).lognormvariate(-2, 1) for _ in range(20_000))
    for _ in range(6):
        latencies.merge(latencies)
    assert latencies.count == 1_280_000
    assert len(latencies._buckets) < 500


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf, 95])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"q is .*, allowed is a number in \[0, 1\]"):
        Latencies().quantile(share)


@pytest.mark.parametrize("share", ["0.5", None, True])
def test_what_is_no_number_is_refused(share: object) -> None:
    with pytest.raises(TypeError, match=r"q is .*, allowed is a number in \[0, 1\]"):
        sketch_of([1.0]).quantile(share)        # type: ignore[arg-type]


class Racing(dict[int, int]):
    """Buckets to which another thread adds the longest value yet, just before they are copied.

    To copy is one step for it; to go through them is many, and they would change in between.
    """

    def __init__(self, owner: Latencies) -> None:
        super().__init__(owner._buckets)
        self.owner, self.seconds = owner, 100.0
        owner._buckets = self

    def copy(self) -> dict[int, int]:
        self.seconds += 1.0
        self.owner.add(self.seconds)
        return dict(super().items())

    def go_through(self) -> NoReturn:
        raise RuntimeError("dictionary changed size during iteration")

    __iter__ = items = keys = values = go_through


def test_whoever_reads_while_another_thread_adds_finds_what_belongs_together() -> None:
    sketch = sketch_of([1.0, 2.0])
    Racing(sketch)
    assert sketch.count == 3
    assert sketch.quantile(1) == 102.0
    assert sketch.quantile(0.6) == pytest.approx(101.0, rel=0.01)
    copy = sketch.copy()
    assert (copy.count, copy.quantile(1)) == (6, 104.0)
    merged = sketch_of([1.0])
    merged.merge(sketch)
    assert (merged.count, merged.quantile(1)) == (8, 105.0)
    assert copy.count == 6


def test_the_bounds_are_there_before_the_value_is_counted() -> None:
    sketch = sketch_of([1.0])
    seen = []

    class Watched(dict[int, int]):
        def __setitem__(self, bucket: int, count: int) -> None:
            seen.append((sketch._least, sketch._most))
            super().__setitem__(bucket, count)

    sketch._buckets = Watched(sketch._buckets)
    sketch.add(0.5)
    sketch.add(3.0)
    assert seen == [(0.5, 1.0), (0.5, 3.0)]
