"""The README's worked example: what it says it shows is checked by the events of its very run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from readme import BLOCKS, README, Block

import qengine
from qengine import Event, RunReport, Task, TaskScheduler

LONGEST = 800
CATCH_UP = 0.020        # the slack of promise 2
ROUNDING = 1e-9
ENDS = ("answer", "timeout", "abandoned", "revoked")


@dataclass
class Example:
    """One run of it."""

    names: dict[str, Any]
    events: list[Event]

    @property
    def report(self) -> RunReport[str, str]:
        report: RunReport[str, str] = self.names["report"]
        return report

    def of(self, source: str, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.source == source and event.kind in kinds]

    def estimate(self, event: Event) -> float:
        assert event.index is not None
        amount = self.report.results[event.index].task.amount
        assert isinstance(amount, dict)
        tokens: float = amount["tokens"]
        return tokens


def the_block() -> Block:
    return next(block for block in BLOCKS if block.heading == "300 prompts, three sources")


def run_it(make_task: Callable[..., Task[str]] = Task) -> Example:
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qengine, "TaskScheduler", partial(TaskScheduler, on_event=events.append))
        patched.setattr(qengine, "Task", make_task)
        return Example(the_block().run(), events)


@pytest.fixture(scope="module")
def example() -> Example:
    return run_it()


def test_every_prompt_is_answered_once(example: Example) -> None:
    assert example.report.values() == [prompt.upper() for prompt in example.names["prompts"]]
    assert len(example.of("paid", "start") + example.of("included", "start") + example.of("free", "start")) == 300


def test_the_free_quota_is_used_up_first(example: Example) -> None:
    free, others = example.of("free", "start"), example.of("included", "start") + example.of("paid", "start")
    assert len(free) == 100
    assert free[-1].at <= min(event.at for event in others)
    assert example.report.by_source["free"].remaining == {"calls": 0}


def test_the_paid_source_does_only_what_the_others_cannot(example: Example) -> None:
    last_free = example.of("free", "start")[-1].at
    paid = example.of("paid", "start")
    assert paid
    assert all(example.estimate(event) > LONGEST and event.at >= last_free for event in paid)
    assert all(example.estimate(event) <= LONGEST for event in example.of("included", "start"))
    trails = Counter(tuple((hop.source, hop.reason) for hop in result.trail) for result in example.report.results)
    gone = ("free", "budget_exhausted")
    for trail in trails:        # some were waiting for a free call when the last was made
        assert trail[-1][1] == "succeeded" and trail[:-1] in ((), (gone,)), trails


def shares(taken: Sequence[tuple[float, float, bool]], rate: float, burst: float) -> Iterator[float]:
    """What was taken in each window from one admission to another, as a share of what may be.

    Args:
        taken: Instant, amount (below 0 what was given back) and whether it was an admission, in the order of events.
    """
    for first, (begin, _, is_admission) in enumerate(taken):
        if is_admission:
            total = 0.0
            for at, amount, is_too in taken[first:]:
                total += amount
                if is_too:
                    yield total / (burst + rate * (at - begin + CATCH_UP))


def test_both_limits_of_the_included_source_hold_in_every_window_and_are_used(example: Example) -> None:
    starts = example.of("included", "start")
    requests = list(shares([(event.at, 1.0, True) for event in starts], 1.0, 1.0))
    assert 0.99 < max(requests) <= 1.0 + ROUNDING

    tokens: list[tuple[float, float, bool]] = []
    for event in example.of("included", "start", *ENDS):
        if event.kind == "start":
            tokens.append((event.at, example.estimate(event), True))
        else:       # what it used beyond its estimate is taken then; what it did not use is given back
            assert event.usage is not None
            tokens.append((event.at, event.usage["tokens"] - example.estimate(event), False))
    by_estimates = list(shares(tokens, 500.0, LONGEST))
    assert 0.95 < max(by_estimates) <= 1.0 + ROUNDING


def test_what_was_really_used_is_within_the_token_limit_but_for_the_debt_of_calls_in_flight(example: Example) -> None:
    used = {event.index: event.usage["tokens"] for event in example.of("included", *ENDS) if event.usage is not None}
    starts = example.of("included", "start")
    off = [abs(used[event.index] - example.estimate(event)) for event in starts]
    assert 0 < max(off) <= 24
    debt = 2 * 4 * max(off)     # of four calls in flight where a window begins, and four where it ends
    settled = [(event.at, used[event.index], True) for event in starts]
    assert max(shares(settled, 500.0, LONGEST + debt)) <= 1.0
    assert max(shares(settled, 400.0, LONGEST + debt)) > 1.0        # so this can fail


def test_the_cost_is_that_of_the_tokens_that_were_recorded(example: Example) -> None:
    prompts = [result.task.payload for result in example.report.results if result.source == "paid"]
    tokens = sum(20 + len(prompt) * 24 // 100 for prompt in prompts)
    assert len(prompts) == len(example.of("paid", "start"))
    assert example.report.by_source["paid"].tokens == tokens
    assert example.report.total_cost == pytest.approx(tokens * 15e-6, abs=1e-9)
    assert f"{tokens * 15 / 1e6:.2f}" == f"{example.report.total_cost:.2f}"


def test_the_report_is_the_sum_of_the_events(example: Example) -> None:
    for name, source in example.report.by_source.items():
        usage: Counter[str] = Counter()
        for event in example.of(name, *ENDS):
            usage.update(event.usage)
        assert source.usage == pytest.approx(dict(usage), abs=1e-9)
        assert source.calls == len(example.of(name, "start")) == usage["calls"]
        assert source.rerouted == len(example.of(name, "rerouted"))
        times = [end.at - begin.at for begin in example.of(name, "start") for end in example.of(name, "answer")
                 if end.index == begin.index]
        assert source.busy_seconds == pytest.approx(sum(times))
        assert source.p50 == pytest.approx(sorted(times)[(len(times) - 1) // 2], rel=0.01)
    starts, ends = ([event.at for event in example.events if event.kind == kind] for kind in ("start", "answer"))
    assert example.report.makespan == pytest.approx(max(ends) - min(starts))


def test_what_a_preference_saves_is_as_the_readme_says() -> None:
    def preferring(prompt: str, amount: dict[str, float]) -> Task[str]:
        return Task(prompt, amount=amount, prefer="included" if amount["tokens"] <= LONGEST else None)

    cheaper = run_it(preferring)
    assert len(cheaper.of("free", "start")) == 100
    assert all(cheaper.estimate(event) > LONGEST for event in cheaper.of("free", "start"))
    report = cheaper.report
    words = f"{report.success_count} answers for {report.total_cost:.2f}, in {report.makespan:.0f} s"
    assert words in " ".join(README.read_text(encoding="utf-8").split()).partition("`prefer=\"included\"`")[2]
