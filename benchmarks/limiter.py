"""What a permit costs, how a line is served and what a key weighs, beside the other rate limiters of Python.

    python benchmarks/limiter.py [--quick] [--check]

The floor is the least that a limiter with a lock and a clock can be, with the signature of `try_acquire`:

    class Floor:
        __slots__ = ("_lock",)

        def take(self, amount=1):
            with self._lock:
                monotonic()
            return True

Every candidate's call stands in a loop that is compiled for it alone, as one would write it.  A peer is called by the
shortest way of its documentation that does not wait, and keeps its state in memory; where it has several algorithms,
the quick ones are shown.  `granted` is at a rate that never refuses, `refused` at one permit a day.  On several
threads each takes permits behind a barrier for a second, three times in turn with the others, of which the best counts;
a refusal there is no permit.

Who blocks has the same limit: a rate, and a burst of 20 ms of it, which is also how late a bucket of qengine's may be
and still make it good.  A window of 20 ms stands for a peer that knows no bursts; throttled-py, which never sleeps
less than 0.2 s, is shown with a burst of a second as well.  Rate and shares of the threads (the smallest of the
largest) are of the permits after the burst; CPU time is the whole process's, and beside it stands what as many bare
sleeps cost.  With asyncio all have two turns.

The bytes of a key are what tracemalloc counts in a process of their own after one permit for each key, the keys
themselves not counted; `back` is the share of it that is free when an hour has passed on the clock, and some more
permits were asked for one of the keys.

With --check the exit code is 1 when a figure is beyond its bound, or a peer is ahead: by the time of a call, by the
bytes of a key, or by CPU time if it too keeps the rate, the shares and the order.  What is not installed is not
measured, and breaks nothing.  With --quick the turns are short, and the figures rough.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import count, repeat
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

from _harness import Verdict, at_least, at_most, bounds_table, machine, minima, missing, reached, table

from qengine import AsyncRateLimiter, KeyedRateLimiter, RateLimit, RateLimiter

OURS = "qengine"
FLOOR = "floor"
EMPTY = "an empty await"
PLENTY = 10**9
DAY = 86_400
THREADS = (1, 2, 4, 8)
BURST_SECONDS = 0.020

GRANTED_BOUND = 1.4 if sys.version_info < (3, 12) else 1.55     # x floor
REFUSED_BOUND = 0.65        # x floor
SCALING_BOUND = 0.9         # 8 threads, of one
RATE_BOUND = 0.995
SHARE_BOUND = 0.95
BLOCKING_CPU_BOUND = 0.08   # seconds for 3,000 waits
AWAIT_BOUND = 3.0           # x an empty await
WAITERS_CPU_BOUND = 0.1     # seconds for 2,000 waiters
KEY_BYTES_BOUND = 250
BACK_BOUND = 0.95


class Floor:
    """What no limiter that takes a lock and reads a clock can go below."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self, amount: float = 1) -> bool:
        """Take the lock and read the clock."""
        with self._lock:
            monotonic()
        return True


@dataclass(frozen=True)
class Candidate:
    """One who grants permits: `call` is an expression on `it`, true when granted, and `make` makes `it`.

    `make` is given how many permits, how many of them at once, and in how many seconds.
    """

    name: str
    needs: str      # the module that must be there
    call: str
    make: Callable[[int, int, float], Any]


def make_floor(limit: int, burst: int, seconds: float) -> Any:
    return Floor()


def make_qengine(limit: int, burst: int, seconds: float) -> Any:
    return RateLimiter(RateLimit(per_second=limit / seconds, burst=burst))


def make_token_bucket(limit: int, burst: int, seconds: float) -> Any:
    from token_bucket import Limiter, MemoryStorage

    return Limiter(limit / seconds, burst, MemoryStorage())


def make_ratelimit(limit: int, burst: int, seconds: float) -> Any:
    from ratelimit import limits

    return limits(calls=limit, period=seconds, raise_on_limit=False)(lambda: True)


def make_limits(strategy: str, limit: int, burst: int, seconds: float) -> Any:
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage
    from limits.strategies import STRATEGIES

    return partial(STRATEGIES[strategy](MemoryStorage()).hit, RateLimitItemPerSecond(limit, int(seconds)), "key")


def make_pyrate_window(limit: int, burst: int, seconds: float) -> Any:
    from pyrate_limiter import InMemoryBucket, Limiter, Rate

    return Limiter(InMemoryBucket([Rate(limit, round(seconds * 1000))]), buffer_ms=0)


def make_pyrate_bucket(limit: int, burst: int, seconds: float) -> Any:
    from pyrate_limiter import Limiter, Rate, StateBucket, TokenBucket

    return Limiter(StateBucket([Rate(limit, round(seconds * 1000), burst)], TokenBucket()), buffer_ms=0)


def make_throttled(algorithm: str, limit: int, burst: int, seconds: float) -> Any:
    from throttled import MemoryStore, Throttled, per_duration

    quota = per_duration(timedelta(seconds=seconds), limit, burst)
    return Throttled("key", timeout=DAY, using=algorithm, quota=quota, store=MemoryStore())


CANDIDATES = (
    Candidate(FLOOR, "threading", "it.take()", make_floor),
    Candidate(OURS, "qengine", "it.try_acquire()", make_qengine),
    Candidate("token-bucket", "token_bucket", "it.consume('key')", make_token_bucket),
    Candidate("ratelimit", "ratelimit", "it()", make_ratelimit),
    Candidate("limits, fixed window", "limits", "it()", partial(make_limits, "fixed-window")),
    Candidate("limits, moving window", "limits", "it()", partial(make_limits, "moving-window")),
    Candidate("limits, sliding window", "limits", "it()", partial(make_limits, "sliding-window-counter")),
    Candidate("pyrate-limiter, window", "pyrate_limiter", "it.try_acquire('key', 1, False)", make_pyrate_window),
    Candidate("pyrate-limiter, bucket", "pyrate_limiter", "it.try_acquire('key', 1, False)", make_pyrate_bucket),
    *(
        Candidate(f"throttled-py, {algorithm.replace('_', ' ')}", "throttled", "not it.limit(None, 1, -1).limited",
                  partial(make_throttled, algorithm))
        for algorithm in ("token_bucket", "gcra", "fixed_window", "sliding_window")
    ),
)
ON_THREADS = (
    FLOOR, OURS, "token-bucket", "ratelimit", "limits, fixed window", "pyrate-limiter, bucket", "throttled-py, gcra",
)


def loop_of(body: str, header: str = "def") -> Callable[..., Any]:
    """Compile a loop for one candidate: none shares what the interpreter learns of it with another."""
    names: dict[str, Any] = {}
    exec(f"{header} loop(it, turns):\n    granted = 0\n    for _ in turns:\n        {body}\n    return granted", names)
    loop: Callable[..., Any] = names["loop"]
    return loop


def run_loop(loop: Callable[..., Any], it: Any, calls: int) -> None:
    loop(it, repeat(None, calls))


def close(it: Any) -> None:
    """End what a peer may have begun."""
    if hasattr(it, "close"):
        it.close()


def one_thread(is_granted: bool, calls: int, rounds: int) -> dict[str, float]:
    """Seconds a call of each candidate, by its fastest turn."""
    made: dict[str, Any] = {}
    turns: dict[str, Callable[[], object]] = {}
    for each in CANDIDATES:
        if find_spec(each.needs) is not None:
            it = made[each.name] = each.make(PLENTY, PLENTY, 1.0) if is_granted else each.make(1, 1, DAY)
            answers = [bool(eval(each.call, {"it": it})) for _ in range(2)]
            if answers != [True, is_granted or each.name == FLOOR]:
                raise AssertionError(f"{each.name}: the first two calls gave {answers}")
            turns[each.name] = partial(run_loop, loop_of(each.call), it, calls)
    best = minima(turns, rounds)
    for it in made.values():
        close(it)
    return {name: seconds / calls for name, seconds in best.items()}


def throughput(each: Candidate, threads: int, seconds: float) -> float:
    """Permits a second that so many threads get of one limiter."""
    it = each.make(PLENTY, PLENTY, 1.0)
    loop = loop_of(f"if {each.call}: granted += 1")
    granted: list[int] = []
    barrier = threading.Barrier(threads + 1)
    over = threading.Event()

    def take() -> None:
        mine = 0
        barrier.wait()
        while not over.is_set():
            mine += loop(it, repeat(None, 100))
        granted.append(mine)

    crew = [threading.Thread(target=take) for _ in range(threads)]
    for thread in crew:
        thread.start()
    barrier.wait()
    begun = perf_counter()
    time.sleep(seconds)
    over.set()
    for thread in crew:
        thread.join()
    passed = perf_counter() - begun
    close(it)
    return sum(granted) / passed


def on_threads(seconds: float, rounds: int) -> dict[str, dict[int, float]]:
    """Permits a second of each candidate, by the number of threads; the best of its rounds."""
    there = [each for each in CANDIDATES if each.name in ON_THREADS and find_spec(each.needs) is not None]
    best = {each.name: dict.fromkeys(THREADS, 0.0) for each in there}
    for _ in range(rounds):
        for threads in THREADS:
            for each in there:
                gc.collect()
                best[each.name][threads] = max(best[each.name][threads], throughput(each, threads, seconds))
    return best


@dataclass(frozen=True)
class Served:
    """How permits were given to who waited: of the rate, the smallest share of the largest, CPU seconds, in order."""

    rate: float
    share: float
    cpu: float
    in_order: bool = True

    def best(self, other: Served) -> Served:
        return Served(
            max(self.rate, other.rate),
            max(self.share, other.share),
            min(self.cpu, other.cpu),
            self.in_order and other.in_order,
        )

    def keeps(self, share: float) -> bool:
        """Whether it keeps what is asked of whoever is compared by CPU time."""
        return self.rate >= RATE_BOUND and self.share >= share and self.in_order


def blocking_qengine(rate: int, burst: int) -> Callable[[], object]:
    return RateLimiter(RateLimit(per_second=rate, burst=burst)).acquire


def blocking_ratelimit(rate: int, burst: int) -> Callable[[], object]:
    from ratelimit import limits, sleep_and_retry

    wait: Callable[[], object] = sleep_and_retry(limits(calls=burst, period=burst / rate)(lambda: True))
    return wait


def blocking_pyrate(rate: int, burst: int) -> Callable[[], object]:
    return partial(make_pyrate_bucket(rate, burst, 1.0).try_acquire, "key")


def blocking_throttled(rate: int, burst: int) -> Callable[[], object]:
    limit: Callable[[], object] = make_throttled("gcra", rate, burst, 1.0).limit
    return limit


@dataclass(frozen=True)
class Blocker:
    """One who can block: `make` makes, of rate and burst, what blocks until it has a permit."""

    name: str
    needs: str
    make: Callable[[int, int], Callable[[], object]]
    burst: float = BURST_SECONDS    # seconds of the rate


BLOCKERS = (
    Blocker(OURS, "qengine", blocking_qengine),
    Blocker("ratelimit", "ratelimit", blocking_ratelimit),
    Blocker("pyrate-limiter, bucket", "pyrate_limiter", blocking_pyrate),
    Blocker("throttled-py, gcra", "throttled", blocking_throttled),
    Blocker("throttled-py, gcra, burst of 1 s", "throttled", blocking_throttled, burst=1.0),
)


def block(each: Blocker, rate: int, threads: int, waits: int) -> Served:
    """Have so many threads wait for so many permits after the burst, or for a quarter longer than that should take."""
    burst = round(each.burst * rate)
    wait = each.make(rate, burst)
    tickets = count()
    latest = [0.0]
    served: list[list[float]] = [[] for _ in range(threads)]
    barrier = threading.Barrier(threads + 1)

    def work(mine: list[float]) -> None:
        barrier.wait()
        while next(tickets) < burst + waits and monotonic() < latest[0]:
            wait()
            mine.append(monotonic())

    crew = [threading.Thread(target=work, args=(mine,)) for mine in served]
    for thread in crew:
        thread.start()
    gc.collect()
    latest[0] = monotonic() + 1.25 * waits / rate
    begun = process_time()
    barrier.wait()
    for thread in crew:
        thread.join()
    cpu = process_time() - begun
    close(getattr(wait, "__self__", None) or getattr(getattr(wait, "func", None), "__self__", None))
    instants = sorted((instant, who) for who, mine in enumerate(served) for instant in mine)
    shares = [0] * threads
    for _, who in instants[burst:]:
        shares[who] += 1
    return Served(reached([instant for instant, _ in instants], burst, rate), min(shares) / max(1, *shares), cpu)


async def nothing() -> None:
    return None


@dataclass(frozen=True)
class AsyncCandidate:
    """One who grants permits to tasks: `call` is what is awaited, and `make` as a Candidate's."""

    name: str
    needs: str
    call: str
    make: Callable[[int, int, float], Any]
    waits_in_line: bool = False


def make_nothing(limit: int, burst: int, seconds: float) -> Any:
    return nothing


def make_async_qengine(limit: int, burst: int, seconds: float) -> Any:
    return AsyncRateLimiter(RateLimit(per_second=limit / seconds, burst=burst))


def make_aiolimiter(limit: int, burst: int, seconds: float) -> Any:
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(burst, burst * seconds / limit)


def make_asyncio_throttle(limit: int, burst: int, seconds: float) -> Any:
    from asyncio_throttle import Throttler

    return Throttler(burst, burst * seconds / limit)


def make_async_throttled(limit: int, burst: int, seconds: float) -> Any:
    from throttled.asyncio import MemoryStore, Throttled, per_duration

    quota = per_duration(timedelta(seconds=seconds), limit, burst)
    return Throttled("key", using="gcra", quota=quota, store=MemoryStore())


ASYNC_CANDIDATES = (
    AsyncCandidate(EMPTY, "asyncio", "it()", make_nothing),
    AsyncCandidate(OURS, "qengine", "it.acquire()", make_async_qengine, waits_in_line=True),
    AsyncCandidate("aiolimiter", "aiolimiter", "it.acquire()", make_aiolimiter, waits_in_line=True),
    AsyncCandidate("asyncio-throttle", "asyncio_throttle", "it.acquire()", make_asyncio_throttle, waits_in_line=True),
    AsyncCandidate("pyrate-limiter, bucket", "pyrate_limiter", "it.try_acquire_async('key')", make_pyrate_bucket),
    AsyncCandidate("throttled-py, gcra", "throttled", "it.limit()", make_async_throttled),
)


def run_through(loop: Callable[..., Any], it: Any, calls: int) -> None:
    """Await so many calls, none of which has to wait, within the loop that runs already."""
    try:
        loop(it, repeat(None, calls)).send(None)
    except StopIteration:
        return
    raise AssertionError(f"{it!r} waited")


async def never_waiting(calls: int, rounds: int) -> dict[str, float]:
    """Seconds of a call of each candidate, by its fastest turn."""
    made: dict[str, Any] = {}
    turns: dict[str, Callable[[], object]] = {}
    for each in ASYNC_CANDIDATES:
        if find_spec(each.needs) is not None:
            made[each.name] = each.make(PLENTY, PLENTY, 1.0)
            turns[each.name] = partial(run_through, loop_of(f"await {each.call}", "async def"), made[each.name], calls)
    best = minima(turns, rounds)
    for it in made.values():
        close(it)
    return {name: seconds / calls for name, seconds in best.items()}


async def stand_in_line(each: AsyncCandidate, rate: int, waiters: int) -> Served:
    """Have so many tasks come at once, and wait for them for twice as long as that should take."""
    burst = round(BURST_SECONDS * rate)
    it = each.make(rate, burst, 1.0)
    served: list[tuple[int, float]] = []

    async def one(number: int) -> None:
        await it.acquire()
        served.append((number, monotonic()))

    gc.collect()
    begun = process_time()
    tasks = [asyncio.create_task(one(number)) for number in range(waiters)]
    _, pending = await asyncio.wait(tasks, timeout=2 * waiters / rate)
    cpu = process_time() - begun
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    instants = [instant for _, instant in served]
    return Served(reached(instants, burst, rate), 1.0, cpu, [number for number, _ in served] == list(range(waiters)))


def keyed_qengine(keys: int) -> Callable[[str], object]:
    return KeyedRateLimiter(RateLimit(per_hour=60, burst=10)).try_acquire


def keyed_token_bucket(keys: int) -> Callable[[str], object]:
    take: Callable[[str], object] = make_token_bucket(20, 10, 3600.0).consume
    return take


def keyed_limits(strategy: str, keys: int) -> Callable[[str], object]:
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import STRATEGIES

    return partial(STRATEGIES[strategy](MemoryStorage()).hit, RateLimitItemPerMinute(10, 30))


def keyed_throttled(algorithm: str, keys: int) -> Callable[[str], object]:
    from throttled import MemoryStore, Throttled, per_duration

    quota = per_duration(timedelta(minutes=30), 10)
    take: Callable[[str], object] = Throttled(
        using=algorithm, quota=quota, store=MemoryStore(options={"MAX_SIZE": 2 * keys})
    ).limit
    return take


KEYED: dict[str, tuple[str, Callable[[int], Callable[[str], object]]]] = {
    OURS: ("qengine", keyed_qengine),
    "token-bucket": ("token_bucket", keyed_token_bucket),
    "limits, fixed window": ("limits", partial(keyed_limits, "fixed-window")),
    "limits, moving window": ("limits", partial(keyed_limits, "moving-window")),
    "throttled-py, gcra": ("throttled", partial(keyed_throttled, "gcra")),
    "throttled-py, token bucket": ("throttled", partial(keyed_throttled, "token_bucket")),
}


def weigh(name: str, keys: int) -> tuple[float, float]:
    """Bytes a key, and the share of them that is free after an hour; for a process that does nothing else."""
    ahead = 0.0
    wall, steady = time.time, time.monotonic
    time.time = lambda: wall() + ahead
    time.monotonic = lambda: steady() + ahead
    names = [f"user-{number}" for number in range(keys)]
    take = KEYED[name][1](keys)
    take("somebody else")
    gc.collect()
    tracemalloc.start()
    for key in names:
        take(key)
    gc.collect()
    weight = tracemalloc.get_traced_memory()[0]
    ahead = 3600.0
    latest = perf_counter() + 1 + keys / 100_000
    free = 0.0
    while free < BACK_BOUND and perf_counter() < latest:
        for _ in range(1000):
            take("somebody else")
        time.sleep(0.01)        # who forgets in the background does it now
        free = max(0.0, 1 - tracemalloc.get_traced_memory()[0] / weight)
    return weight / keys, free


def weigh_apart(name: str, keys: int) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--weigh", name, str(keys)],
        stdout=subprocess.PIPE, text=True, check=True,
    )
    weight, free = json.loads(done.stdout)
    return weight, free


@dataclass(frozen=True)
class Size:
    """How long it all takes."""

    calls: int
    rounds: int
    thread_seconds: float
    thread_rounds: int
    blocking: float     # of the permits of each scene
    waiters: int
    keys: int
    keys_of_peers: int      # some take a minute for a million


FULL = Size(1000, 50, 1.0, 3, 1.0, 2000, 1_000_000, 100_000)
QUICK = Size(1000, 20, 0.2, 1, 0.2, 500, 100_000, 20_000)
SCENES = ((100, 4, 200), (1000, 4, 3000), (1000, 100, 5000))    # a rate, the threads that block, the permits they get


def ahead(what: str, unit: str, costs: Mapping[str, float]) -> Verdict:
    """Whether ours costs less than any peer's; the ratio is that of the nearest."""
    peers = {name: cost for name, cost in costs.items() if name not in (OURS, FLOOR, EMPTY)}
    if not peers:
        return f"{what}: no peer", None, True
    nearest = min(peers, key=peers.__getitem__)
    ratio = peers[nearest] / costs[OURS]
    return f"{what}: {nearest} takes more {unit}", ratio, ratio > 1


def show_calls(size: Size) -> list[Verdict]:
    granted = one_thread(True, size.calls, size.rounds)
    refused = one_thread(False, size.calls, size.rounds)
    threads = on_threads(size.thread_seconds, size.thread_rounds)
    floors = granted[FLOOR], refused[FLOOR]

    def row(name: str) -> list[str]:
        if name not in granted:
            return missing(name, 9)
        cells = [name]
        for best, floor in zip((granted, refused), floors, strict=True):
            cells += [f"{best[name] * 1e9:.0f}", f"{best[name] / floor:.2f}"]
        if name not in threads:
            return [*cells, *["-"] * 5]
        speeds = threads[name]
        return [*cells, *(f"{speeds[n] / 1e6:.2f}" for n in THREADS), f"{speeds[8] / speeds[1]:.2f}"]

    head = ["", "granted, ns", "x floor", "refused, ns", "x floor",
            *(f"{n} thr., M/s" for n in THREADS), "8 of 1"]
    print(table(head, [row(each.name) for each in CANDIDATES]), end="\n\n", flush=True)
    return [
        at_most("granted", granted[OURS] / floors[0], GRANTED_BOUND, "x the floor"),
        at_most("refused", refused[OURS] / floors[1], REFUSED_BOUND, "x the floor"),
        ahead("granted", "time", granted),
        ahead("refused", "time", refused),
        at_least("8 threads, of 1", threads[OURS][8] / threads[OURS][1], SCALING_BOUND),
        *(
            ahead(f"threads: {n}", "time", {name: 1 / speeds[n] for name, speeds in threads.items()})
            for n in THREADS
        ),
    ]


def sleep_alone(rate: int, threads: int, waits: int) -> float:
    """CPU seconds of as many threads that sleep as often and as long, and do nothing else."""
    def sleep() -> None:
        for _ in range(waits // threads):
            time.sleep(threads / rate)

    begun = time.process_time()
    sleepers = [threading.Thread(target=sleep) for _ in range(threads)]
    for sleeper in sleepers:
        sleeper.start()
    for sleeper in sleepers:
        sleeper.join()
    return time.process_time() - begun


async def sleep_in_line(rate: int, count: int) -> float:
    """CPU seconds of as many tasks, each of which sleeps until its turn, and does nothing else."""
    begun = time.process_time()
    await asyncio.gather(*[asyncio.sleep(number / rate) for number in range(count)])
    return time.process_time() - begun


def show_blocking(size: Size) -> list[Verdict]:
    rows, verdicts = [], []
    there = [each for each in BLOCKERS if find_spec(each.needs) is not None]
    results: dict[str, list[Served]] = {each.name: [] for each in there}
    sleeping: list[float] = []
    for rate, threads, permits in SCENES:
        waits = round(size.blocking * permits)
        all_served = {each.name: block(each, rate, threads, waits) for each in there}
        for name, served in all_served.items():
            results[name].append(served)
        sleeping.append(sleep_alone(rate, threads, waits))
        ours, where = all_served[OURS], f"{threads} threads at {rate}/s"
        verdicts += [
            at_least(f"{where}, of the rate", ours.rate, RATE_BOUND),
            at_least(f"{where}, smallest share of the largest", ours.share, SHARE_BOUND),
            ahead(f"{where}, who keeps both", "CPU", {
                name: served.cpu for name, served in all_served.items() if name == OURS or served.keeps(SHARE_BOUND)
            }),
        ]
        if (rate, threads) == (1000, 4):
            verdicts.append(
                at_most(f"{where}, 3,000 waits", ours.cpu * 3000 / waits, BLOCKING_CPU_BOUND, "s of CPU")
            )
    for blocker in BLOCKERS:
        cells = [
            cell
            for served in results.get(blocker.name, [])
            for cell in (f"{served.rate:.1%}", f"{served.share:.2f}", f"{served.cpu:.3f}")
        ]
        rows.append([blocker.name, *cells] if cells else missing(blocker.name, 9))
    for name in ("token-bucket", "limits"):
        rows.append([f"{name} (cannot block)", *["-"] * 9])
    rows.append(["time.sleep alone", *[cell for cpu in sleeping for cell in ("-", "-", f"{cpu:.3f}")]])
    head = [cell for rate, threads, _ in SCENES for cell in (f"{threads} thr., {rate}/s", "shares", "CPU s")]
    print(table(["blocking", *head], rows), end="\n\n", flush=True)
    return verdicts


def show_asyncio(size: Size) -> list[Verdict]:
    never = asyncio.run(never_waiting(size.calls, size.rounds))
    lines: dict[str, Served] = {}
    rate = 1000
    for _ in range(2):
        for each in ASYNC_CANDIDATES:
            if each.waits_in_line and each.name in never:
                served = asyncio.run(stand_in_line(each, rate, size.waiters))
                lines[each.name] = served.best(lines.get(each.name, served))

    def row(name: str) -> list[str]:
        if name not in never:
            return missing(name, 5)
        cells = [name, f"{never[name] * 1e9:.0f}", f"{never[name] / never[EMPTY]:.2f}"]
        if name not in lines:
            return [*cells, "-", "-", "-"]
        served = lines[name]
        return [*cells, f"{served.rate:.1%}", "yes" if served.in_order else "NO", f"{served.cpu:.3f}"]

    head = ["asyncio", "await, ns", "x empty", f"{size.waiters} tasks, {rate}/s", "in order", "CPU s"]
    floor = ["asyncio.sleep alone", "-", "-", "-", "-", f"{asyncio.run(sleep_in_line(rate, size.waiters)):.3f}"]
    print(table(head, [*[row(each.name) for each in ASYNC_CANDIDATES], floor]), end="\n\n", flush=True)
    ours = lines[OURS]
    where = f"{size.waiters} tasks at {rate}/s"
    return [
        at_most("await acquire", never[OURS] / never[EMPTY], AWAIT_BOUND, "x an empty await"),
        ahead("await acquire", "time", never),
        (f"{where}: in order", None, ours.in_order),
        at_least(f"{where}, of the rate", ours.rate, RATE_BOUND),
        at_most("2,000 tasks", ours.cpu * 2000 / size.waiters, WAITERS_CPU_BOUND, "s of CPU"),
        ahead(f"{where}, who keeps rate and order", "CPU", {
            name: served.cpu for name, served in lines.items() if name == OURS or served.keeps(SHARE_BOUND)
        }),
    ]


def show_keys(size: Size) -> list[Verdict]:
    there = [name for name, (needs, _) in KEYED.items() if find_spec(needs) is not None]
    weights = {name: weigh_apart(name, size.keys_of_peers) for name in there}
    rows = [
        [name, f"{size.keys_of_peers:,}", f"{weights[name][0]:.0f}", f"{weights[name][1]:.0%}"]
        if name in weights else missing(name, 3)
        for name in KEYED
    ]
    weight, free = weigh_apart(OURS, size.keys)
    rows.insert(0, [OURS, f"{size.keys:,}", f"{weight:.0f}", f"{free:.0%}"])
    print(table(["keys", "how many", "bytes a key", "back"], rows), end="\n\n", flush=True)
    return [
        at_most("a key", max(weight, weights[OURS][0]), KEY_BYTES_BOUND, "bytes"),
        at_least("back after an hour", min(free, weights[OURS][1]), BACK_BOUND),
        ahead("a key", "memory", {name: weight for name, (weight, _) in weights.items()}),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="What a permit costs, beside the other rate limiters of Python.")
    parser.add_argument("--quick", action="store_true", help="short turns, rough figures")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is beyond its bound")
    parser.add_argument("--weigh", nargs=2, metavar=("NAME", "KEYS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weigh:
        print(json.dumps(weigh(args.weigh[0], int(args.weigh[1]))))
        return 0

    size = QUICK if args.quick else FULL
    print(f"{machine()}\n", flush=True)
    gc.freeze()
    verdicts = [*show_calls(size), *show_blocking(size), *show_asyncio(size), *show_keys(size)]
    print(bounds_table(verdicts))
    return 1 if args.check and not all(holds for _, _, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
