"""The ways of making many calls, a few at once: ours, and those of Python and of its libraries.

Rules: each peer is written as its documentation has it, does the same work as ours and gives back every answer.  It is
given the function, the inputs and how many calls may run at once, and gives the answers as its caller gets them: one
by one, or all at the end.  Nothing that must be installed is imported before it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from typing import Any

from _harness import ROOT as ROOT  # qengine is found from here on

from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    ConcurrentExecutor,
    ExecutionPolicy,
    RateLimit,
    RetryPolicy,
    StopConditions,
    TaskScheduler,
)

WORKERS = 8
LANES = 4

Call = Callable[[Any], Any]


def work(x: int) -> int:
    return x * 2


async def work_async(x: int) -> int:
    return x * 2


def lane_of(x: int) -> int:
    return x % LANES


def bare_policy() -> ExecutionPolicy:
    return ExecutionPolicy(concurrency=WORKERS)


def full_policy(tasks: int, at_once: int = WORKERS) -> ExecutionPolicy:
    return ExecutionPolicy(
        concurrency=at_once // LANES,       # of each lane
        limits=(RateLimit(per_second=1e9, burst=1e9),),
        breaker=BreakerPolicy(),
        budget=10 * tasks,
        timeout=30.0,
        retry=RetryPolicy(max_attempts=3),
        stop=StopConditions(max_failures=tasks),
    )


def plain_loop(tasks: int) -> int:
    return len([work(x) for x in range(tasks)])


def threads_bare(tasks: int) -> int:
    return ConcurrentExecutor(work, bare_policy()).run(range(tasks)).success_count


def threads_full(tasks: int, lane_by: Call = lane_of) -> int:
    return TaskScheduler(work, full_policy(tasks), lane_by=lane_by).run(range(tasks)).success_count


def asyncio_bare(tasks: int) -> int:
    return asyncio.run(AsyncConcurrentExecutor(work_async, bare_policy()).run(range(tasks))).success_count


def asyncio_full(tasks: int, lane_by: Call = lane_of) -> int:
    scheduler = AsyncTaskScheduler(work_async, full_policy(tasks), lane_by=lane_by)
    return asyncio.run(scheduler.run(range(tasks))).success_count


def answered(run: Callable[[int], int], tasks: int) -> Callable[[], None]:
    """What runs so many tasks, and sees to it that all were answered."""
    def once() -> None:
        answers = run(tasks)
        if answers != tasks:
            raise AssertionError(f"{run}: {answers} answers to {tasks} tasks")

    return once


def executor_map(call: Call, inputs: Iterable[Any], at_once: int, timeout: float | None = None) -> Iterator[Any]:
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(call, inputs, timeout=timeout)


def executor_submit(call: Call, inputs: Iterable[Any], at_once: int, timeout: float | None = None) -> Iterator[Any]:
    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(call, x) for x in inputs], timeout):
            yield future.result()


def imap_unordered(call: Call, inputs: Iterable[Any], at_once: int, timeout: float | None = None) -> Iterator[Any]:
    with ThreadPool(at_once) as pool:
        answers = pool.imap_unordered(call, inputs)
        yield from answers if timeout is None else each_within(timeout, answers)


def each_within(timeout: float, answers: Any) -> Iterator[Any]:
    while True:
        try:
            answer = answers.next(timeout)
        except StopIteration:
            return
        yield answer


def joblib_threading(call: Call, inputs: Iterable[Any], at_once: int, timeout: float | None = None) -> Iterator[Any]:
    from joblib import Parallel, delayed

    parallel = Parallel(at_once, backend="threading", return_as="generator_unordered", timeout=timeout)
    yield from parallel(delayed(call)(x) for x in inputs)


def gather(call: Call, inputs: Iterable[Any], at_once: int) -> list[Any]:
    async def main() -> list[Any]:
        places = asyncio.Semaphore(at_once)

        async def one(x: Any) -> Any:
            async with places:
                return await call(x)

        return await asyncio.gather(*[one(x) for x in inputs])

    return asyncio.run(main())


def task_group(call: Call, inputs: Iterable[Any], at_once: int) -> list[Any]:
    async def main() -> list[Any]:
        places = asyncio.Semaphore(at_once)

        async def one(x: Any) -> Any:
            async with places:
                return await call(x)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(x)) for x in inputs]
        return [task.result() for task in running]

    return asyncio.run(main())


def aiometer_run_all(call: Call, inputs: Iterable[Any], at_once: int, per_second: float | None = None) -> list[Any]:
    import aiometer

    async def main() -> list[Any]:
        calls = [partial(call, x) for x in inputs]
        return await aiometer.run_all(calls, max_at_once=at_once, max_per_second=per_second)

    return asyncio.run(main())


def anyio_group(call: Call, inputs: Iterable[Any], at_once: int) -> list[Any]:
    import anyio

    async def main() -> list[Any]:
        places, answers = anyio.CapacityLimiter(at_once), []

        async def one(x: Any) -> None:
            async with places:
                answers.append(await call(x))

        async with anyio.create_task_group() as group:
            for x in inputs:
                group.start_soon(one, x)
        return answers

    return anyio.run(main)


def trio_nursery(call: Call, inputs: Iterable[Any], at_once: int) -> list[Any]:
    import trio

    async def main() -> list[Any]:
        places, answers = trio.CapacityLimiter(at_once), []

        async def one(x: Any) -> None:
            async with places:
                answers.append(await call(x))

        async with trio.open_nursery() as nursery:
            for x in inputs:
                nursery.start_soon(one, x)
        return answers

    return trio.run(main)


async def sleep_trio(seconds: float) -> None:
    import trio

    await trio.sleep(seconds)


async def in_asyncio_thread(call: Call, timeout: float | None, x: Any) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(call, x), timeout)


async def in_anyio_thread(call: Call, timeout: float | None, x: Any) -> Any:
    import anyio.to_thread

    with anyio.fail_after(timeout):
        return await anyio.to_thread.run_sync(call, x, abandon_on_cancel=True)


async def in_trio_thread(call: Call, timeout: float | None, x: Any) -> Any:
    import trio

    try:
        with trio.fail_after(float("inf") if timeout is None else timeout):
            return await trio.to_thread.run_sync(call, x, abandon_on_cancel=True)
    except trio.TooSlowError:
        raise TimeoutError from None


@dataclass(frozen=True)
class Loop:
    """What a library for coroutines has: a sleep, and a thread for (call, timeout, input)."""

    sleep: Callable[[float], Any]
    in_thread: Callable[[Call, float | None, Any], Any]


ASYNCIO = Loop(asyncio.sleep, in_asyncio_thread)
ANYIO = Loop(asyncio.sleep, in_anyio_thread)        # on asyncio, as it is unless told otherwise
TRIO = Loop(sleep_trio, in_trio_thread)


@dataclass(frozen=True)
class Peer:
    """Another way: its name, the module that must be there, how it goes, and in which loop; None: on threads.

    On threads it takes a timeout as well; in a loop it is the call that is given one.
    """

    name: str
    needs: str
    run: Callable[..., Iterable[Any]]
    loop: Loop | None = None

    @property
    def is_there(self) -> bool:
        return find_spec(self.needs) is not None

    @property
    def work(self) -> Call:
        return work if self.loop is None else work_async

    def trivial(self, tasks: int) -> int:
        return len(list(self.run(self.work, range(tasks), WORKERS)))


EXECUTOR_MAP = "ThreadPoolExecutor.map"
IMAP_UNORDERED = "ThreadPool.imap_unordered"
GATHER = "gather + Semaphore"
AIOMETER = "aiometer"

PEERS = {
    peer.name: peer
    for peer in (
        Peer(EXECUTOR_MAP, "concurrent", executor_map),
        Peer("submit + as_completed", "concurrent", executor_submit),
        Peer(IMAP_UNORDERED, "multiprocessing", imap_unordered),
        Peer("joblib, threading", "joblib", joblib_threading),
        Peer(GATHER, "asyncio", gather, ASYNCIO),
        Peer("TaskGroup + Semaphore", "asyncio", task_group, ASYNCIO),
        Peer(AIOMETER, "aiometer", aiometer_run_all, ASYNCIO),
        Peer("anyio group + CapacityLimiter", "anyio", anyio_group, ANYIO),
        Peer("trio nursery + CapacityLimiter", "trio", trio_nursery, TRIO),
    )
}
