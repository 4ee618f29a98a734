"""Many calls, a few at once: what a task costs, what it takes in memory, and what becomes of hangs, Ctrl-C and rates.

    python benchmarks/executor.py [--tasks N] [--rounds N] [--quick] [--check]

`bare` is the plain executor, `full` a scheduler of four lanes with a rate limit (one that never makes it wait), a
breaker, a budget, timeouts, retries and a stop condition.  The peers are in _ways.py, each as one would write it.

1  A trivial task.  Every candidate makes its threads, or its event loop, does all the tasks and gives back all the
   answers; all take turns, and the fastest turn of each counts.  `x bare` is of ours in the same world.
2  Lazy inputs, in a process of its own each: how far its peak of memory (resident, all of the process) rose while the
   answers were consumed one by one; how many inputs had been taken before the consumer had the first; and how many at
   most were taken beyond those it had.  A peer is given fewer inputs, and what it used is scaled to a million.  A kept
   record is what tracemalloc counts of `run` for each input, the payload and the value in it included.
3  One call of 20 hangs for some seconds, and none is given more than 0.5.  When each answer was known: under asyncio
   to the call's own wrapper, where it blocks a thread.  `gone` is the process, with all that Python does at its end.
4  Ctrl-C after 1.2 s of 100 sleeps of 1 s: seconds until the process is gone, when the sleeps are what one awaits and
   when they block threads.  Ours prints what is in the report that it finds on the exception.
5  Blocking tasks: the time that so many threads need at least, of the time that they took.  The floor is threads that
   loop over their share and do nothing else.  Idle: CPU time of the whole process while all threads wait: ours for a
   permit of the rate, the others for one call that sleeps.
6  2000/s with a burst of 1: the share of the allowed rate that was reached, and the most that any half-open window w
   had above burst + rate x w, of which 20 ms of the rate (40 permits) are promised.  Ours is by the instants of
   admission that `on_event` is told; a peer's, a quarter as long, by the instants at which its calls began.
7  100,000 tasks, full-featured, over 1,000 lanes and over 4; and a tree in simulation, which has one thread, by CPU
   time and the peak of memory of a process of its own.

With --check the exit code is 1 when a figure is beyond its bound.  What is not installed is not measured, and breaks
nothing.  With --quick the turns are short, and the figures rough.  For POSIX: memory and signals are asked for there.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from time import monotonic, process_time
from typing import Any

from _harness import Verdict, at_least, at_most, bounds_table, machine, minima, missing, reached, table
from _ways import (
    AIOMETER,
    EXECUTOR_MAP,
    GATHER,
    IMAP_UNORDERED,
    PEERS,
    WORKERS,
    Loop,
    Peer,
    aiometer_run_all,
    answered,
    asyncio_bare,
    asyncio_full,
    bare_policy,
    full_policy,
    lane_of,
    plain_loop,
    threads_bare,
    threads_full,
    work,
    work_async,
)

from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    RateLimit,
    RunReport,
    Source,
    TaskScheduler,
    TaskStatus,
    in_thread,
    simulate,
)

THREADS, ASYNCIO = "qengine, threads", "qengine, asyncio"
BARE, FULL = f"{THREADS}, bare", f"{THREADS}, full"
ASYNCIO_BARE, ASYNCIO_FULL = f"{ASYNCIO}, bare", f"{ASYNCIO}, full"
ASYNCIO_IN_THREAD = f"{ASYNCIO}, in_thread"
LOOP, FLOOR = "plain loop", "bare threads"

MIB = 2**20
MILLION = 1_000_000
CALLS = 20
HUNG = 10               # the one of them that hangs
TIMEOUT = 0.5
NAPS = [1.0] * 100
PEERS_AT_ONCE = 4       # processes in which nothing but time passes
CTRL_C_AFTER = 1.2
LOADS = ((8, 0.001), (128, 0.002))      # threads, and seconds that a task blocks
SETTLE = 0.5            # seconds until threads that have nothing to do are at rest
RATE = 2000
LATENESS = 0.020        # seconds of the rate that a bucket may make good

LOOP_BOUNDS = {BARE: 36.0, FULL: 60.0, ASYNCIO_BARE: 22.0, ASYNCIO_FULL: 50.0}      # x a plain loop
PEER_BOUNDS = (         # the one takes at least so many times what ours takes
    (EXECUTOR_MAP, 8.0, BARE),
    (EXECUTOR_MAP, 5.0, FULL),
    (IMAP_UNORDERED, 1.0, BARE),
    (GATHER, 8.0, ASYNCIO_BARE),
    (GATHER, 4.0, ASYNCIO_FULL),
    (AIOMETER, 10.0, ASYNCIO_BARE),
)
MEMORY_BOUND = 5.0              # MiB for a million inputs
AHEAD_BOUND = 72                # concurrency and lookahead
RECORD_BOUND = 250              # bytes
TIMEOUT_BOUND = 0.55            # seconds
GONE_BOUND = 0.8
CTRL_C_BOUND = 0.2
EFFICIENCY_BOUND = 0.8          # on 128 threads
IDLE_BOUND = 0.001              # of one CPU
RATE_BOUND = 0.995
LANES_BOUND = 2.0               # x the cost over 4
NODE_SECONDS_BOUND = 20.0       # us
NODE_BYTES_BOUND = 400


@dataclass(frozen=True)
class Size:
    """How long it all takes."""

    tasks: int
    rounds: int
    inputs: int                 # ours
    inputs_of_peers: int
    records: int
    hang: float                 # seconds
    patience: float             # seconds for a peer to be gone
    block: float                # seconds of blocking tasks in each turn
    turns: int                  # with those, and with the lanes
    idle: float                 # seconds
    rate: float                 # seconds
    lane_tasks: int
    nodes: int


FULL_SIZE = Size(
    tasks=20_000, rounds=7, inputs=MILLION, inputs_of_peers=100_000, records=100_000, hang=3.0, patience=20.0,
    block=0.6, turns=3, idle=10.0, rate=5.0, lane_tasks=100_000, nodes=MILLION,
)
QUICK_SIZE = Size(
    tasks=4_000, rounds=2, inputs=100_000, inputs_of_peers=10_000, records=50_000, hang=1.5, patience=2.5,
    block=0.2, turns=1, idle=2.0, rate=1.0, lane_tasks=100_000, nodes=50_000,
)


# ---- a process of its own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A process that is gone: what its scene returned (None: it was killed by what ended it), and after how long."""

    told: Any
    gone: float


def apart(
    scene: Callable[..., Any], *args: Any, interrupt_after: float | None = None, patience: float = 120.0
) -> Ended:
    """Play a scene in a process of its own; `gone` is from the scene's start, or from the Ctrl-C."""
    command = [sys.executable, str(Path(__file__).resolve()), "--scene", json.dumps([scene.__name__, *args])]
    with Popen(command, stdout=PIPE, stderr=None if interrupt_after is None else DEVNULL, text=True) as process:
        assert process.stdout is not None
        killer = threading.Timer(patience, process.kill)
        killer.start()
        try:
            start = process.stdout.readline()
            begun = float(start) if start else monotonic()
            if start and interrupt_after is not None:
                time.sleep(max(0.0, begun + interrupt_after - monotonic()))
                begun = monotonic()
                process.send_signal(signal.SIGINT)
            told = process.stdout.read()
            process.wait()
            gone = monotonic() - begun
        finally:
            killer.cancel()
    if not start or (process.returncode and interrupt_after is None):
        raise SystemExit(f"{scene.__name__}{args}: exit code {process.returncode}")
    if process.returncode == -signal.SIGKILL:
        return Ended(None, float("inf"))
    return Ended(json.loads(told) if told else None, gone)


def play(name: str, *args: Any) -> None:
    """Be that process, once all is imported that the scene needs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scene: Callable[..., Any] = globals()[name]
    for warm_up in [PEERS[args[0]].trivial] if args[0] in PEERS else [threads_bare, asyncio_bare]:
        warm_up(WORKERS)
    print(monotonic(), flush=True)
    print(json.dumps(scene(*args)), flush=True)


def each_apart(
    scene: Callable[..., Any], names: Collection[str], *args: Any, at_once: int, **how: Any
) -> dict[str, Ended]:
    """Play a scene for each of several names."""
    executor: ConcurrentExecutor[str, Ended] = ConcurrentExecutor(
        lambda name: apart(scene, name, *args, **how), ExecutionPolicy(concurrency=at_once)
    )
    return dict(zip(names, executor.run(names).raise_for_failures().values(), strict=True))


def is_there(name: str) -> bool:
    return name not in PEERS or PEERS[name].is_there


def installed() -> list[str]:
    return [name for name in PEERS if is_there(name)]


# ---- 1: a trivial task -----------------------------------------------------------------------------------------------

TRIVIAL: dict[str, Callable[[int], int]] = {
    LOOP: plain_loop,
    BARE: threads_bare,
    FULL: threads_full,
    ASYNCIO_BARE: asyncio_bare,
    ASYNCIO_FULL: asyncio_full,
    **{name: peer.trivial for name, peer in PEERS.items()},
}


def ours_beside(name: str) -> str:
    """Our bare executor in the world of a candidate."""
    in_a_loop = name in (ASYNCIO_BARE, ASYNCIO_FULL) or (name in PEERS and PEERS[name].loop is not None)
    return ASYNCIO_BARE if in_a_loop else BARE


def show_tasks(size: Size) -> list[Verdict]:
    names = [name for name in TRIVIAL if is_there(name)]
    best = minima({name: answered(TRIVIAL[name], size.tasks) for name in names}, size.rounds)

    def row(name: str) -> list[str]:
        if name not in best:
            return missing(name, 3)
        seconds = best[name]
        ratios = (seconds / best[LOOP], seconds / best[ours_beside(name)])
        return [name, f"{seconds / size.tasks * 1e6:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]

    head = [f"1  {size.tasks:,} trivial tasks", "us a task", "x plain loop", "x bare"]
    print(table(head, [row(name) for name in TRIVIAL]), end="\n\n", flush=True)
    return [
        *(at_most(name, best[name] / best[LOOP], bound, "x a plain loop") for name, bound in LOOP_BOUNDS.items()),
        *(
            at_least(peer, best[peer] / best[name], bound, f"x {name}")
            for peer, bound, name in PEER_BOUNDS if peer in best
        ),
    ]


# ---- 2: lazy inputs --------------------------------------------------------------------------------------------------


class Intake:
    """Inputs that know how many of them were taken, and how many answers the consumer has.

    What was taken beyond the answers is looked at while the consumer holds one, not while one is handed to it: only
    then is it known how many it has.  Now and then it pauses before, for the intake to go on as far as it ever would.
    """

    PAUSE = 0.001

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0
        self._delivered = 0
        self.before_first = 0
        self.ahead = 0

    def __iter__(self) -> Iterator[int]:
        for x in range(self._count):
            self._taken += 1
            yield x

    def deliver(self, answer: object) -> bool:
        """Count an answer; return whether it is time for a pause, and then for a look."""
        if not self._delivered:
            self.before_first = self._taken
        self._delivered += 1
        return self._delivered % 10_000 == 1

    def look(self) -> None:
        self.ahead = max(self.ahead, self._taken - self._delivered)

    def check(self) -> None:
        if self._delivered != self._count:
            raise AssertionError(f"{self._delivered} answers to {self._count} inputs")


def consume(answers: Iterable[object], inputs: Intake) -> None:
    for answer in answers:
        if inputs.deliver(answer):
            time.sleep(Intake.PAUSE)
        inputs.look()


def stream_threads(inputs: Intake) -> None:
    with ConcurrentExecutor(work, bare_policy()).stream(inputs) as results:
        consume(results, inputs)


def stream_asyncio(inputs: Intake) -> None:
    async def main() -> None:
        async with AsyncConcurrentExecutor(work_async, bare_policy()).stream(inputs) as results:
            async for result in results:
                if inputs.deliver(result):
                    await asyncio.sleep(Intake.PAUSE)
                inputs.look()

    asyncio.run(main())


def stream_peer(peer: Peer, inputs: Intake) -> None:
    consume(peer.run(peer.work, inputs, WORKERS), inputs)


STREAMS: dict[str, Callable[[Intake], None]] = {
    THREADS: stream_threads,
    ASYNCIO: stream_asyncio,
    **{name: partial(stream_peer, peer) for name, peer in PEERS.items()},
}


def peak_bytes() -> int:
    """The most that this process has had in memory; `ru_maxrss` would count what it was forked from."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # in bytes where there is no /proc
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def lazy(name: str, count: int) -> tuple[float, int, int]:
    """Bytes that so many inputs need, those taken before the first answer, and at most beyond the answers."""
    inputs = Intake(count)
    before = peak_bytes()
    STREAMS[name](inputs)
    inputs.check()
    return peak_bytes() - before, inputs.before_first, inputs.ahead


def run_threads(count: int) -> RunReport[Any, Any]:
    return ConcurrentExecutor(work, bare_policy()).run(range(count))


def run_asyncio(count: int) -> RunReport[Any, Any]:
    return asyncio.run(AsyncConcurrentExecutor(work_async, bare_policy()).run(range(count)))


RUNS = {THREADS: run_threads, ASYNCIO: run_asyncio}


def kept(name: str, count: int) -> float:
    """Bytes of a record of a trivial task."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    report = RUNS[name](count)
    gc.collect()
    weight = tracemalloc.get_traced_memory()[0] - before
    if report.success_count != count:
        raise AssertionError(f"{report.success_count} answers to {count} inputs")
    return weight / count


def show_memory(size: Size) -> list[Verdict]:
    ours = each_apart(lazy, RUNS, size.inputs, at_once=1)
    lines = {**ours, **each_apart(lazy, installed(), size.inputs_of_peers, at_once=2)}
    records = each_apart(kept, RUNS, size.records, at_once=1)

    def row(name: str) -> list[str]:
        if name not in lines:
            return missing(name, 5)
        count = size.inputs if name in ours else size.inputs_of_peers
        weight, before_first, ahead = lines[name].told
        return [
            name, f"{count:,}", f"{weight * MILLION / count / MIB if name in PEERS else weight / MIB:.1f}",
            f"{before_first:,}", f"{ahead:,}", f"{records[name].told:.0f}" if name in records else "-",
        ]

    head = ["2  lazy inputs", "inputs", "MiB a million", "before the first", "ahead at most", "bytes a record"]
    print(table(head, [row(name) for name in STREAMS]), end="\n\n", flush=True)
    return [
        verdict
        for name in RUNS
        for verdict in (
            at_most(f"{name}, {size.inputs:,} inputs", lines[name].told[0] / MIB, MEMORY_BOUND, "MiB"),
            at_most(f"{name}, inputs ahead", lines[name].told[2], AHEAD_BOUND, "inputs"),
            at_most(f"{name}, a record", records[name].told, RECORD_BOUND, "bytes"),
        )
    ]


# ---- 3: a call that hangs --------------------------------------------------------------------------------------------

TIMED_OUT = "TIMEOUT"
Note = Callable[[object], None]


def hang_one(seconds: float, x: int) -> int:
    if x == HUNG:
        time.sleep(seconds)
    return x


def hang_in_threads(call: Callable[[int], int], note: Note) -> None:
    policy = ExecutionPolicy(concurrency=WORKERS, timeout=TIMEOUT)
    note_all(ConcurrentExecutor(call, policy).run(range(CALLS)), note)


def hang_in_asyncio(call: Callable[[int], int], note: Note) -> None:
    policy = ExecutionPolicy(concurrency=WORKERS, timeout=TIMEOUT)
    note_all(asyncio.run(AsyncConcurrentExecutor(in_thread(call), policy).run(range(CALLS))), note)


def note_all(report: RunReport[int, int], note: Note) -> None:
    for result in report.results:
        note(TIMED_OUT if result.status is TaskStatus.TIMEOUT else result.unwrap())


def hang_in_peer(peer: Peer, call: Callable[[int], int], note: Note) -> None:
    if peer.loop is None:
        try:
            for answer in peer.run(call, range(CALLS), WORKERS, TIMEOUT):
                note(answer)
        except (TimeoutError, multiprocessing.TimeoutError):
            note(TIMED_OUT)
        return
    in_a_thread = peer.loop.in_thread

    async def one(x: int) -> None:
        try:
            note(await in_a_thread(call, TIMEOUT, x))
        except TimeoutError:
            note(TIMED_OUT)

    list(peer.run(one, range(CALLS), WORKERS))


HANGS: dict[str, Callable[[Callable[[int], int], Note], None]] = {
    THREADS: hang_in_threads,
    ASYNCIO_IN_THREAD: hang_in_asyncio,
    **{name: partial(hang_in_peer, peer) for name, peer in PEERS.items()},
}


def hung(name: str, seconds: float) -> tuple[int, float | None, float | None]:
    """The answers, when the last of them was known, and when the timeout was."""
    begun = monotonic()
    answers: list[float] = []
    timeouts: list[float] = []

    def note(answer: object) -> None:
        (timeouts if answer == TIMED_OUT else answers).append(monotonic() - begun)

    HANGS[name](partial(hang_one, seconds), note)
    return len(answers), max(answers, default=None), max(timeouts, default=None)


def show_hang(size: Size) -> list[Verdict]:
    ours = each_apart(hung, [THREADS, ASYNCIO_IN_THREAD], size.hang, at_once=1)
    ends = {**ours, **each_apart(hung, installed(), size.hang, at_once=PEERS_AT_ONCE)}

    def row(name: str) -> list[str]:
        if name not in ends:
            return missing(name, 4)
        answers, last_at, timed_out_at = ends[name].told
        return [name, str(answers), *map(at_second, (last_at, timed_out_at, ends[name].gone))]

    head = [f"3  one of {CALLS} hangs for {size.hang:g} s", "answers", "last at, s", "TIMEOUT at, s", "gone at, s"]
    print(table(head, [row(name) for name in HANGS]), end="\n\n", flush=True)
    verdicts: list[Verdict] = []
    for name, end in ours.items():
        answers, last_at, timed_out_at = end.told
        verdicts += [
            at_least(f"{name}, a call hangs", answers, CALLS - 1, "answers"),
            at_most(f"{name}, answers and TIMEOUT", latest(last_at, timed_out_at), TIMEOUT_BOUND, "s"),
            at_most(f"{name}, gone although a call hangs", end.gone, GONE_BOUND, "s"),
        ]
    return verdicts


def latest(*instants: float | None) -> float:
    """The last of them; None never came."""
    return max(float("inf") if instant is None else instant for instant in instants)


def at_second(instant: float | None) -> str:
    return "never" if instant is None else f"{instant:.2f}"


# ---- 4: Ctrl-C -------------------------------------------------------------------------------------------------------


def sleep_in_threads() -> None:
    ConcurrentExecutor(time.sleep, bare_policy()).run(NAPS)


def sleep_in_asyncio() -> None:
    asyncio.run(AsyncConcurrentExecutor(asyncio.sleep, bare_policy()).run(NAPS))


def block_in_asyncio() -> None:
    asyncio.run(AsyncConcurrentExecutor(in_thread(time.sleep), bare_policy()).run(NAPS))


def sleep_in_peer(peer: Peer, loop: Loop) -> None:
    list(peer.run(loop.sleep, NAPS, WORKERS))


def block_in_peer(peer: Peer) -> None:
    call = time.sleep if peer.loop is None else partial(peer.loop.in_thread, time.sleep, None)
    list(peer.run(call, NAPS, WORKERS))


AWAITING, BLOCKING = "awaiting", "blocking"
NAPPING: dict[str, dict[str, Callable[[], None]]] = {
    AWAITING: {
        ASYNCIO: sleep_in_asyncio,
        **{name: partial(sleep_in_peer, peer, peer.loop) for name, peer in PEERS.items() if peer.loop is not None},
    },
    BLOCKING: {
        THREADS: sleep_in_threads,
        ASYNCIO: block_in_asyncio,
        **{name: partial(block_in_peer, peer) for name, peer in PEERS.items()},
    },
}


def interrupted(name: str, kind: str) -> dict[str, int] | None:
    """How many tasks ended how, by the report that the interrupt brought along; asyncio raises it from its own."""
    try:
        NAPPING[kind][name]()
    except KeyboardInterrupt as error:
        report = getattr(error, "report", None) or getattr(error.__context__, "report", None)
        if report is None:
            raise
        return {"succeeded": report.success_count, "cancelled": report.cancelled_count}
    raise AssertionError("nobody interrupted it")


def interrupt_each(kind: str, patience: float) -> dict[str, Ended]:
    interrupt = partial(
        each_apart, interrupted, interrupt_after=CTRL_C_AFTER, patience=CTRL_C_AFTER + patience + 1.0
    )
    ours = [name for name in NAPPING[kind] if name not in PEERS]
    peers = [name for name in installed() if name in NAPPING[kind]]
    return {**interrupt(ours, kind, at_once=1), **interrupt(peers, kind, at_once=PEERS_AT_ONCE)}


def show_interrupt(size: Size) -> list[Verdict]:
    ends = {kind: interrupt_each(kind, size.patience) for kind in NAPPING}

    def gone(kind: str, name: str) -> str:
        if name not in ends[kind]:
            return "-"
        seconds = ends[kind][name].gone
        return f"{seconds:.2f}" if seconds < float("inf") else f"> {size.patience:g}"

    def row(name: str) -> list[str]:
        if not is_there(name):
            return missing(name, 3)
        told = ends[BLOCKING][name].told
        report = "none" if told is None else ", ".join(f"{count} {status}" for status, count in told.items())
        return [name, gone(AWAITING, name), gone(BLOCKING, name), report]

    head = [f"4  Ctrl-C during {len(NAPS)} x 1 s", "awaiting: gone, s", "blocking: gone, s", "the partial report"]
    print(table(head, [row(name) for name in NAPPING[BLOCKING]]), end="\n\n", flush=True)
    verdicts: list[Verdict] = []
    for kind, ended in ends.items():
        for name in (name for name in ended if name not in PEERS):
            successes = (ended[name].told or {}).get("succeeded", 0)
            verdicts += [
                at_most(f"{name}, {kind}: gone after Ctrl-C", ended[name].gone, CTRL_C_BOUND, "s"),
                at_least(f"{name}, {kind}: on its report", successes, WORKERS, "successes"),
            ]
    return verdicts


# ---- 5: tasks that block ---------------------------------------------------------------------------------------------


def threads_alone(call: Callable[[int], object], count: int, at_once: int) -> None:
    def share(first: int) -> None:
        for x in range(first, count, at_once):
            call(x)

    crew = [threading.Thread(target=share, args=(first,)) for first in range(at_once)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()


def block_bare(call: Callable[[int], object], count: int, at_once: int) -> None:
    ConcurrentExecutor(call, ExecutionPolicy(concurrency=at_once)).run(range(count)).raise_for_failures()


def block_full(call: Callable[[int], object], count: int, at_once: int) -> None:
    policy = full_policy(count, at_once)
    TaskScheduler(call, policy, lane_by=lane_of).run(range(count)).raise_for_failures()


def block_in_thread(call: Callable[[int], object], count: int, at_once: int) -> None:
    executor = AsyncConcurrentExecutor(in_thread(call), ExecutionPolicy(concurrency=at_once))
    asyncio.run(executor.run(range(count))).raise_for_failures()


def block_peer(peer: Peer, call: Callable[[int], object], count: int, at_once: int) -> None:
    for _ in peer.run(call, range(count), at_once):
        pass


THREAD_PEERS = {name: peer for name, peer in PEERS.items() if peer.loop is None}
BLOCKERS: dict[str, Callable[[Callable[[int], object], int, int], None]] = {
    FLOOR: threads_alone,
    BARE: block_bare,
    FULL: block_full,
    ASYNCIO_IN_THREAD: block_in_thread,
    **{name: partial(block_peer, peer) for name, peer in THREAD_PEERS.items()},
}


def efficiency(at_once: int, seconds: float, size: Size) -> dict[str, float]:
    """Of each, the time that the tasks need at least, of the time that they took."""
    count = at_once * round(size.block / seconds)
    turns = {
        name: partial(block, lambda _: time.sleep(seconds), count, at_once)
        for name, block in BLOCKERS.items() if is_there(name)
    }
    return {name: size.block / took for name, took in minima(turns, size.turns).items()}


def meet(barrier: threading.Barrier, hold: float, x: int) -> None:
    """Be one of so many threads that are all there; who comes after them stays."""
    if x < barrier.parties:
        barrier.wait()
    else:
        time.sleep(hold)


def starve_policy(at_once: int, seconds: float) -> ExecutionPolicy:
    """Lets the first go at once, and one more after some seconds."""
    return ExecutionPolicy(concurrency=at_once, limits=[RateLimit(per_second=1 / seconds, burst=at_once)])


def starve_threads(barrier: threading.Barrier, seconds: float) -> None:
    policy = starve_policy(barrier.parties, seconds)
    TaskScheduler(partial(meet, barrier, 0.0), policy).run(range(barrier.parties + 1)).raise_for_failures()


def starve_in_thread(barrier: threading.Barrier, seconds: float) -> None:
    scheduler = AsyncTaskScheduler(in_thread(partial(meet, barrier, 0.0)), starve_policy(barrier.parties, seconds))
    asyncio.run(scheduler.run(range(barrier.parties + 1))).raise_for_failures()


def hold_peer(peer: Peer, barrier: threading.Barrier, seconds: float) -> None:
    list(peer.run(partial(meet, barrier, seconds), range(barrier.parties + 1), barrier.parties))


IDLERS: dict[str, Callable[[threading.Barrier, float], None]] = {
    BARE: starve_threads,
    ASYNCIO_IN_THREAD: starve_in_thread,
    **{name: partial(hold_peer, peer) for name, peer in THREAD_PEERS.items()},
}


def idle(name: str, at_once: int, seconds: float) -> float:
    """CPU seconds of this process while so many threads wait for so long, once they had all met and settled."""
    samples: list[float] = []

    def watch() -> None:
        for instant in (SETTLE, SETTLE + seconds):
            threading.Timer(instant, lambda: samples.append(process_time())).start()

    IDLERS[name](threading.Barrier(at_once, watch), seconds + 3 * SETTLE)
    before, after = samples
    return after - before


def show_blocking(size: Size) -> list[Verdict]:
    shares = [efficiency(at_once, seconds, size) for at_once, seconds in LOADS]
    threads = LOADS[-1][0]
    names = [name for name in IDLERS if is_there(name)]
    idlers = each_apart(idle, names, threads, size.idle, at_once=len(names))

    def row(name: str) -> list[str]:
        if name not in shares[0]:
            return missing(name, len(LOADS) + 1)
        cells = [f"{share[name]:.1%}" for share in shares]
        return [name, *cells, f"{idlers[name].told * 1e3:.1f}" if name in idlers else "-"]

    loads = [f"{at_once} thr., {seconds * 1e3:g} ms" for at_once, seconds in LOADS]
    head = ["5  tasks that block", *loads, f"{threads} idle for {size.idle:g} s, CPU ms"]
    print(table(head, [row(name) for name in BLOCKERS]), end="\n\n", flush=True)
    return [
        *(
            at_least(f"{name}, {loads[-1]}", shares[-1][name], EFFICIENCY_BOUND, "of the ideal")
            for name in (BARE, FULL)
        ),
        *(
            at_most(f"{name}, idle", idlers[name].told / size.idle, IDLE_BOUND, "of a CPU")
            for name in (BARE, ASYNCIO_IN_THREAD)
        ),
    ]


# ---- 6: a rate -------------------------------------------------------------------------------------------------------


def rate_policy() -> ExecutionPolicy:
    return ExecutionPolicy(concurrency=WORKERS, limits=[RateLimit(per_second=RATE)])


def rate_in_threads(count: int) -> list[float]:
    events: list[Event] = []
    TaskScheduler(work, rate_policy(), on_event=events.append).run(range(count))
    return admissions(events)


def rate_in_asyncio(count: int) -> list[float]:
    events: list[Event] = []
    asyncio.run(AsyncTaskScheduler(work_async, rate_policy(), on_event=events.append).run(range(count)))
    return admissions(events)


def admissions(events: Iterable[Event]) -> list[float]:
    return [event.at for event in events if event.kind == "start"]


def rate_in_aiometer(count: int) -> list[float]:
    instants: list[float] = []

    async def call(x: int) -> None:
        instants.append(monotonic())

    aiometer_run_all(call, range(count), WORKERS, RATE)
    return instants


RATES: dict[str, Callable[[int], list[float]]] = {
    THREADS: rate_in_threads,
    ASYNCIO: rate_in_asyncio,
    AIOMETER: rate_in_aiometer,
}


def most_above(instants: Sequence[float], rate: float) -> float:
    """The most that were admitted in any half-open window w above 1 + rate * w."""
    most, least = float("-inf"), float("inf")
    for number, instant in enumerate(instants):
        least = min(least, number - rate * instant)
        most = max(most, number - rate * instant - least)
    return most


def show_rate(size: Size) -> list[Verdict]:
    rows, verdicts = [], []
    for name, run in RATES.items():
        if not is_there(name):
            rows.append(missing(name, 2))
            continue
        instants = run(round(RATE * size.rate / (4 if name in PEERS else 1)))
        start = instants[0]
        share, above = reached(instants, 1, RATE), most_above([instant - start for instant in instants], RATE)
        rows.append([name, f"{share:.2%}", f"{above:.1f}"])
        if name not in PEERS:
            verdicts += [
                at_least(f"{name}, {RATE}/s", share, RATE_BOUND, "of the rate"),
                at_most(f"{name}, any window", above, RATE * LATENESS, "permits above burst + rate x w"),
            ]
    head = [f"6  {RATE}/s for {size.rate:g} s", "reached", "most above in a window"]
    print(table(head, rows), end="\n\n", flush=True)
    return verdicts


# ---- 7: many lanes, and a large tree ---------------------------------------------------------------------------------

MANY_LANES, FEW_LANES = 1000, 4
IN_LANES: dict[str, Callable[..., int]] = {THREADS: threads_full, ASYNCIO: asyncio_full}


class Numbered:
    """A tree of so many nodes, of ten children each: node n has 10 n + 1 to 10 n + 10."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def queries(self, node: int, source: Source) -> Iterable[int]:
        return (node,)

    def children(self, node: int, result: object) -> Iterable[int]:
        return range(min(10 * node + 1, self._nodes), min(10 * node + 11, self._nodes))


def tree(nodes: int) -> tuple[float, float]:
    """Microseconds of CPU and bytes of a node in simulation, on one thread; the report has all results."""
    def collect(nodes: int) -> int:
        source = Source("numbers", lambda query: [], concurrency=WORKERS)
        return simulate(QueryExecutor([source], Numbered(nodes)), [0], latency=0.1).success_count

    before, begun = peak_bytes(), process_time()
    answers = collect(nodes)
    seconds = process_time() - begun
    if answers != nodes:
        raise AssertionError(f"{answers} answers from {nodes} nodes")
    return seconds / nodes * 1e6, (peak_bytes() - before) / nodes


def show_scale(size: Size) -> list[Verdict]:
    turns = {
        f"{name} {lanes}": answered(partial(run, lane_by=lambda x, lanes=lanes: x % lanes), size.lane_tasks)
        for name, run in IN_LANES.items() for lanes in (FEW_LANES, MANY_LANES)
    }
    costs = {name: seconds / size.lane_tasks * 1e6 for name, seconds in minima(turns, size.turns).items()}
    rows, verdicts = [], []
    for name in IN_LANES:
        few, many = costs[f"{name} {FEW_LANES}"], costs[f"{name} {MANY_LANES}"]
        rows.append([name, f"{few:.3f}", f"{many:.3f}", f"{many / few:.2f}"])
        verdicts.append(at_most(f"{name}, {MANY_LANES:,} lanes", many / few, LANES_BOUND, f"x {FEW_LANES}"))
    head = [f"7  {size.lane_tasks:,} tasks", f"{FEW_LANES} lanes, us", f"{MANY_LANES:,} lanes, us", "x"]
    print(table(head, rows), end="\n\n", flush=True)
    microseconds, weight = apart(tree, size.nodes, patience=600.0).told
    row = [f"{size.nodes:,} nodes in simulation", f"{microseconds:.1f}", f"{weight:.0f}"]
    print(table(["   a tree", "us a node", "bytes a node"], [row]), end="\n\n", flush=True)
    return [
        *verdicts,
        at_most("a node", microseconds, NODE_SECONDS_BOUND, "us"),
        at_most("a node", weight, NODE_BYTES_BOUND, "bytes"),
    ]


SECTIONS = (show_tasks, show_memory, show_hang, show_interrupt, show_blocking, show_rate, show_scale)


def main() -> int:
    parser = argparse.ArgumentParser(description="Many calls, a few at once, beside the other ways of Python.")
    parser.add_argument("--tasks", type=int, help="trivial tasks in each run (20000, or 4000 if quick)")
    parser.add_argument("--rounds", type=int, help="turns with them; the fastest counts (7, or 2 if quick)")
    parser.add_argument("--quick", action="store_true", help="short turns, rough figures")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is beyond its bound")
    parser.add_argument("--scene", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scene:
        play(*json.loads(args.scene))
        return 0

    size = QUICK_SIZE if args.quick else FULL_SIZE
    given = {name: getattr(args, name) for name in ("tasks", "rounds") if getattr(args, name) is not None}
    if min(given.values(), default=1) < 1:
        parser.error("--tasks and --rounds must be at least 1")
    size = replace(size, **given)
    print(f"{machine()}; {WORKERS} at once\n", flush=True)
    verdicts = [verdict for show in SECTIONS for verdict in show(size)]
    print(bounds_table(verdicts))
    return 1 if args.check and not all(holds for _, _, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
