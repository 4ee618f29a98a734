"""How a concurrency that adapts follows a source, beside fixed ones.

    python benchmarks/adaptive.py [--quick] [--check]

All in virtual time, by `simulate`, so that the figures are the same each time, and on each machine.

The first source answers 100 calls a second for a minute, then 20, then 60: a token bucket with a burst of 10, which
refuses the rest by a 429, 20 ms after the call.  What it answers takes the latency given, on the average (constant, or
lognormal with a sigma of 0.5).  A refusal pauses the source: for a random time up to RetryPolicy(backoff=...), which
doubles each time that the same task is refused, or for as long as a Retry-After of a second says.

    s to 90 %     until the answers of the last 5 s were 90 % of the capacity, for each step; the worst seed's
    then          from there to the end of the step, answers in shares of the capacity; the worst seed's
    refused       calls refused, of all calls; the worst seed's
    answered      of what the source could have answered in all; the mean
    in flight     the lowest and the highest number in the last 20 s of each step, 5 % left out at either end

Fixed ones are shown for the lognormal latency and one seed: all are tried that are right for a step, and a half and
one and a half times those; the best and the worst are those with the most and the fewest answers.

The second source has 10 servers and a queue before them, and refuses nobody: more than 10 calls at once bring no more
answers, only later ones.

With --check the exit code is 1 when a bound does not hold.  With --quick there is one seed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import count
from typing import Any

from _harness import Verdict, at_least, at_most, bounds_table, machine, table

from qengine import (
    Adaptive,
    ExecutionPolicy,
    RateLimitError,
    RetryPolicy,
    StopConditions,
    TaskScheduler,
    simulate,
)

STEPS = ((0.0, 100.0), (60.0, 20.0), (120.0, 60.0))
END = 180.0
BURST = 10.0
REFUSAL = 0.02
HOUR = 3600.0       # a timeout that nothing reaches: by it an attempt's deadline tells when it began

LATENCIES = (0.1, 0.3, 1.0)
SPREADS = (0.0, 0.5)
MAXIMUM = 200
SERVERS = 10


@dataclass(frozen=True)
class Pause:
    """What a refusal costs."""

    name: str
    backoff: float = 1.0
    retry_after: float | None = None


PAUSES = (Pause("backoff 1 s"), Pause("backoff 0.1 s", backoff=0.1), Pause("Retry-After 1 s", retry_after=1.0))


@dataclass
class Log:
    """What a source has seen."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    in_flight: list[tuple[float, int]] = field(default_factory=list)
    busy: float = 0.0

    def rate(self, since: float, until: float) -> float:
        return (bisect_right(self.answered, until) - bisect_right(self.answered, since)) / (until - since)

    def seconds_to(self, rate: float, since: float, until: float) -> float:
        moments = (since + tenth / 10 for tenth in range(50, int(10 * (until - since)) + 1))
        return next((now - since for now in moments if self.rate(now - 5.0, now) >= rate - 1e-9), math.inf)

    def share_refused(self) -> float:
        return len(self.refused) / max(1, len(self.refused) + len(self.answered))

    def range_in_flight(self, since: float, until: float) -> tuple[int, int]:
        seen = sorted(number for instant, number in self.in_flight if since < instant <= until) or [0]
        return seen[len(seen) // 20], seen[-1 - len(seen) // 20]


class Source:
    """What calls take and come to; decided when they begin, as a server does."""

    def __init__(self, latency: float, spread: float, seed: int) -> None:
        self.log = Log()
        self._mean, self._spread, self._rng = latency, spread, random.Random(seed)
        self._refused: dict[int, bool] = {}
        self._running = 0

    def seconds(self) -> float:
        spread = self._spread
        return self._mean * math.exp(self._rng.gauss(-spread * spread / 2, spread)) if spread else self._mean

    def begin(self, now: float) -> tuple[bool, float]:
        """Say whether a call is answered, and after how many seconds."""
        raise NotImplementedError

    def latency(self, attempt: Any) -> float:
        now = attempt.deadline - HOUR
        is_answered, seconds = self.begin(now)
        self._refused[attempt.task.payload] = not is_answered
        self._running += 1
        self.log.in_flight.append((now, self._running))
        (self.log.answered if is_answered else self.log.refused).append(now + seconds)
        self.log.busy += seconds if is_answered else 0.0
        return seconds

    def outcome(self, attempt: Any, retry_after: float | None) -> None:
        self._running -= 1
        if self._refused.pop(attempt.task.payload):
            raise RateLimitError("429", retry_after=retry_after)


class Bucket(Source):
    """Refuses what is above a rate that changes in steps."""

    _tokens, _filled_at = BURST, 0.0

    def begin(self, now: float) -> tuple[bool, float]:
        rate = next(rate for since, rate in reversed(STEPS) if since <= now)
        self._tokens, self._filled_at = min(BURST, self._tokens + (now - self._filled_at) * rate), now
        if self._tokens < 1.0 - 1e-9:
            return False, REFUSAL
        self._tokens -= 1.0
        return True, self.seconds()


class Servers(Source):
    """Has so many servers, and a queue before them."""

    def __init__(self, latency: float, spread: float, seed: int) -> None:
        super().__init__(latency, spread, seed)
        self._free_at = [0.0] * SERVERS
        heapify(self._free_at)

    def begin(self, now: float) -> tuple[bool, float]:
        ends_at = max(now, self._free_at[0]) + self.seconds()
        heapreplace(self._free_at, ends_at)
        return True, ends_at - now


def play(source: Source, concurrency: int | Adaptive, pause: Pause, seed: int) -> Log:
    """Give a source all the work that the concurrency lets through, for three minutes."""
    scheduler = TaskScheduler(print, ExecutionPolicy(
        concurrency=concurrency,
        timeout=HOUR,
        retry=RetryPolicy(backoff=pause.backoff),
        stop=StopConditions(timeout=END, in_flight="abandon"),
    ))
    simulate(
        scheduler, count(), latency=source.latency, seed=seed,
        outcome=lambda attempt: source.outcome(attempt, pause.retry_after),
    )
    log = source.log
    log.answered = sorted(instant for instant in log.answered if instant <= END)
    log.refused = sorted(instant for instant in log.refused if instant <= END)
    return log


@dataclass(frozen=True)
class Score:
    """How one concurrency did with the first source."""

    seconds: tuple[float, ...]
    then: tuple[float, ...]
    refused: float
    answered: float
    in_flight: tuple[tuple[int, int], ...]

    def cells(self, label: str) -> list[str]:
        def each(texts: Sequence[str]) -> str:
            return " / ".join(texts)

        return [
            label,
            each([f"{value:.0f}" if value < math.inf else "-" for value in self.seconds]),
            each([f"{value:.2f}" if value else "-" for value in self.then]),
            f"{100 * self.refused:.1f} %",
            f"{100 * self.answered:.0f} %",
            each([f"{low}-{high}" for low, high in self.in_flight]),
        ]


def score(logs: Sequence[Log]) -> Score:
    ends = [since for since, _ in STEPS[1:]] + [END]
    spans = [(since, until, rate) for (since, rate), until in zip(STEPS, ends, strict=True)]
    seconds, then, in_flight = [], [], []
    for since, until, rate in spans:
        each = [log.seconds_to(0.9 * rate, since, until) for log in logs]
        seconds.append(max(each))
        then.append(min(
            log.rate(since + one, until) / rate if one < until - since else 0.0
            for log, one in zip(logs, each, strict=True)
        ))
        ranges = [log.range_in_flight(until - 20.0, until) for log in logs]
        in_flight.append((min(low for low, _ in ranges), max(high for _, high in ranges)))
    could = sum((until - since) * rate for since, until, rate in spans)
    return Score(
        seconds=tuple(seconds),
        then=tuple(then),
        refused=max(log.share_refused() for log in logs),
        answered=sum(len(log.answered) for log in logs) / could / len(logs),
        in_flight=tuple(in_flight),
    )


def fixed_ones(latency: float) -> list[int]:
    """Those that are right for a step, and some around them."""
    right = [rate * latency for _, rate in STEPS]
    return sorted({max(1, round(one * factor)) for one in right for factor in (0.5, 1.0, 1.5)})


def steps_table(seeds: Sequence[int], verdicts: list[Verdict]) -> None:
    head = ["", "s to 90 %", "then", "refused", "answered", "in flight"]
    adaptive: list[Score] = []
    for pause in PAUSES:
        for latency in LATENCIES:
            rows = []
            for spread in SPREADS:
                logs = [
                    play(Bucket(latency, spread, seed), Adaptive(maximum=MAXIMUM), pause, seed) for seed in seeds
                ]
                adaptive.append(score(logs))
                rows.append(adaptive[-1].cells("adaptive, " + (f"lognormal {spread:g}" if spread else "constant")))
            fixed = {
                number: score([play(Bucket(latency, SPREADS[-1], seeds[0]), number, pause, seeds[0])])
                for number in fixed_ones(latency)
            }
            ranked = sorted(fixed, key=lambda number: fixed[number].answered)
            rows.append(fixed[ranked[-1]].cells(f"the best fixed, {ranked[-1]}"))
            polite = [number for number in ranked if fixed[number].refused <= 0.05]
            if polite and polite[-1] != ranked[-1]:
                rows.append(fixed[polite[-1]].cells(f"the best with 5 % refused, {polite[-1]}"))
            rows.append(fixed[ranked[0]].cells(f"the worst fixed, {ranked[0]}"))
            print(f"latency {latency:g} s, {pause.name}; fixed ones tried: {', '.join(map(str, sorted(fixed)))}")
            print(table(head, rows), end="\n\n")
            ahead = adaptive[-1].answered / (fixed[polite[-1]].answered if polite else math.inf)
            verdicts.append(at_least(f"{pause.name}, {latency:g} s: answers, of the best with 5 % refused", ahead, 1.0))
    verdicts.append(at_most("seconds to 90 % of the capacity, of all", max(max(s.seconds) for s in adaptive), 30, "s"))
    verdicts.append(at_most("calls refused, of all", 100 * max(s.refused for s in adaptive), 5, "%"))
    for pause, own in zip(PAUSES, (adaptive[at : at + 6] for at in range(0, len(adaptive), 6)), strict=True):
        mean = sum(sum(s.then) / 3 for s in own) / len(own)
        verdicts.append(at_least(f"{pause.name}: share of the capacity then, the mean", mean, 0.9))


def queue_table(seeds: Sequence[int], verdicts: list[Verdict]) -> None:
    rows, quiet = [], PAUSES[0]
    for latency in (0.1, 0.5):
        for concurrency in (5, SERVERS, 2 * SERVERS, 64, Adaptive(maximum=64)):
            logs = [play(Servers(latency, SPREADS[-1], seed), concurrency, quiet, seed) for seed in seeds]
            answers = sum(log.rate(60.0, END) for log in logs) / len(logs) * latency / SERVERS
            mean = sum(log.busy / len(log.in_flight) for log in logs) / len(logs) / latency
            is_fixed = isinstance(concurrency, int)
            low, high = logs[0].range_in_flight(60.0, END)
            label = f"latency {latency:g} s, " + (f"fixed {concurrency}" if is_fixed else "adaptive, up to 64")
            rows.append([label, f"{answers:.2f}", f"{mean:.2f}", f"{low}-{high}"])
            if not is_fixed:
                verdicts.append(at_least(f"10 servers, {latency:g} s: share of what they can", answers, 0.75))
                verdicts.append(at_most(f"10 servers, {latency:g} s: mean latency", mean, 2.0, "services"))
    print(table(["10 servers and a queue", "answers after 60 s", "latency/service", "in flight"], rows), end="\n\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Shows how an adaptive concurrency follows a source.")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound does not hold")
    args = parser.parse_args()
    seeds = range(1) if args.quick else range(3)
    print(f"{machine()}; {len(seeds)} seed(s)\n")
    verdicts: list[Verdict] = []
    steps_table(seeds, verdicts)
    queue_table(seeds, verdicts)
    print(bounds_table(verdicts))
    return 1 if args.check and not all(holds for *_, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
