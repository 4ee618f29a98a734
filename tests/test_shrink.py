"""What fails is made small: on engines that are broken on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from shrink import attempt_with, is_endless, keeps_every_promise, shrink, smaller_than, way_of
from workloads import DRIVERS, HANG, Call, Job, Workload, make_workload

from qengine import ExecutionPolicy
from qengine.core import run as core_run
from qengine.core.breaker import Breaker
from qengine.core.gate import Gate
from qengine.core.lane import Lane
from qengine.core.stops import StopRule

SIMULATED = DRIVERS["simulation"]


def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_run, "backoff_delay", lambda *_: 0.0)


def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "admit", lambda self, attempt, amount, now: now)


def no_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRule, "after", lambda self, status: None)


def a_breaker_that_closes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaker, "ready_at", lambda self, now: now)


def no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "batch_takes_at", lambda self: float("-inf"))


@pytest.mark.parametrize("fault", [no_backoff, no_limits, no_stops, a_breaker_that_closes_by_itself, no_batches])
def test_what_fails_is_shown_with_three_tasks_at_most(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    attempt = attempt_with(SIMULATED)
    seeds = (SIMULATED.fit(make_workload(seed)) for seed in itertools.count())
    workload, way = next((workload, way) for workload in seeds if (way := attempt(workload)) is not None)
    small = shrink(workload, attempt, way, seconds=10.0)
    assert attempt(small) == way
    assert len(small.jobs) <= 3, str(small)
    assert len(small.lanes) == 1, str(small)
    assert all(len(job.calls) <= 3 for job in small.jobs), str(small)


def test_the_seed_and_what_is_left_of_it_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    attempt = attempt_with(SIMULATED)
    seed = next(seed for seed in itertools.count() if attempt(SIMULATED.fit(make_workload(seed))) is not None)
    with pytest.raises(AssertionError) as caught:
        keeps_every_promise(SIMULATED, SIMULATED.fit(make_workload(seed)))
    words = str(caught.value)
    assert f"seed {seed};" in words
    assert "Workload(" in words
    assert words.count("Job(") <= 3


def fails_with(is_bad: Callable[[Workload], bool]) -> Callable[[Workload], str | None]:
    return lambda workload: "badly" if is_bad(workload) else None


@pytest.mark.parametrize(
    "is_bad",
    [
        lambda workload: len(workload.jobs) >= 2,
        lambda workload: any(call.outcome == "bug" for job in workload.jobs for call in job.calls),
        lambda workload: any(policy.breaker is not None for policy in workload.lanes.values()),
        lambda workload: workload.is_tree,
    ],
)
def test_nothing_is_left_but_what_matters(is_bad: Callable[[Workload], bool]) -> None:
    workload = next(found for seed in itertools.count(7) if is_bad(found := make_workload(seed)))
    small = shrink(workload, fails_with(is_bad), "badly")
    assert is_bad(small)
    assert not any(is_bad(smaller) for smaller in smaller_than(small))
    assert len(small.jobs) <= 2
    assert (small.stop, small.width, small.shared, small.again) == (Workload(0, {}, ()).stop, None, (), 0)


def test_it_fails_in_the_same_way_or_not_at_all() -> None:
    workload = make_workload(11)
    other = lambda workload: "otherwise"
    assert shrink(workload, other, "badly") == workload


def test_it_ends_when_its_tries_or_its_time_are_used_up() -> None:
    workload = next(found for seed in itertools.count() if len((found := make_workload(seed)).jobs) > 8)
    tried: list[Workload] = []

    def attempt(smaller: Workload) -> str:
        tried.append(smaller)
        return "badly"

    shrink(workload, attempt, "badly", tries=5)
    assert len(tried) == 5
    ticks = itertools.count()
    shrink(workload, attempt, "badly", seconds=3, now=lambda: float(next(ticks)))
    assert len(tried) == 8


def test_what_is_smaller_is_another_and_fits_together() -> None:
    for seed in range(20):
        workload = make_workload(seed)
        for smaller in itertools.islice(smaller_than(workload), 200):
            assert smaller != workload
            names = [job.name for job in smaller.jobs]
            assert smaller.is_tree or names == list(range(len(names)))
            assert {job.lane for job in smaller.jobs} <= smaller.lanes.keys()


def test_what_would_never_end_is_not_tried() -> None:
    workload = Workload(0, {"default": ExecutionPolicy(timeout=0.05)}, (Job(0, "default", (Call(HANG),)),))
    assert not is_endless(workload)
    assert is_endless(replace(workload, lanes={"default": ExecutionPolicy()}))
    tried: list[Any] = []
    shrink(workload, lambda smaller: tried.append(smaller), "badly")
    assert tried
    assert not any(map(is_endless, tried))


def test_ways_are_told_without_names_and_numbers() -> None:
    assert way_of(AssertionError("3 of lane 7")) == way_of(AssertionError("14 of lane 0"))
    assert way_of(AssertionError("3 of them")) != way_of(ValueError("3 of them"))
