"""Plain functions under asyncio: `in_thread` runs them on daemon threads of the engine.

Rules: whoever awaits such a call can leave at any time, for the thread is then left to itself: it ends when the
function returns, and as a daemon it keeps no program alive.  Threads that do not hang are used again by the same
worker, and end with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any, ParamSpec, TypeVar

from ..errors import require_callable
from .calls import HasWork, current_worker, refuse_async, set_current_worker
from .clock import SYSTEM_CLOCK, Clock, DriverThread, Queue

P = ParamSpec("P")
V = TypeVar("V")


def in_thread(fn: Callable[P, V]) -> Callable[P, Coroutine[Any, Any, V]]:
    """Make an async function of a plain one: each call runs on a daemon thread of the engine.

    For the asyncio executors, whose functions may not block.  A call that hangs costs its timeout and nothing else:
    the thread is left behind, the run goes on and the program can end.  The function sees the context variables of
    its caller, and `current_attempt()`; what it raises is raised where the call is awaited.

    Raises:
        TypeError: `fn` is async already.

    >>> import asyncio
    >>> asyncio.run(in_thread(str.upper)("a"))
    'A'
    """
    require_callable("fn", fn)
    refuse_async("fn", fn, "a plain function: an async one needs no thread")

    async def call(*args: P.args, **kwargs: P.kwargs) -> V:
        found = current_worker()
        worker, clock = found or (None, SYSTEM_CLOCK)
        lender = getattr(worker, "lender", None)
        ends_now = lender is None
        if lender is None:
            lender = Lender(clock, "qengine-in-thread")
        try:
            value: V = await lender.run(functools.partial(fn, *args, **kwargs), worker)
            return value
        finally:
            if ends_now:
                for thread in lender.end():
                    thread.join()

    try:
        return functools.wraps(fn)(call)
    except (AttributeError, TypeError):  # a callable without a name
        return call


_Thread = tuple[Queue, DriverThread]
"""A thread, and where it finds what it is to do."""


class Lender:
    """The threads of one worker: as many as calls at the same time, nearly always one."""

    __slots__ = ("_clock", "_idle", "_name", "busy", "on_return")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock = clock
        self._name = name
        self.busy = 0  # threads that have not returned
        self.on_return: Callable[[Any, BaseException | None], object] | None = None
        """Called with what the last of them came to, though nobody waits for it."""
        self._idle: list[_Thread] = []

    async def run(self, fn: Callable[[], Any], worker: HasWork | None) -> Any:
        """Run a function on a thread, and wait for it."""
        from asyncio import get_running_loop

        loop = get_running_loop()
        future = loop.create_future()

        def answer(value: Any, error: BaseException | None) -> None:
            self.busy -= 1
            if future.done():  # nobody waits any more
                if self.busy == 0 and self.on_return is not None:
                    self.on_return(value, error)
            elif error is None:
                future.set_result(value)
            else:
                future.set_result(_Error(error))  # tagged: a future takes no StopIteration, and logs what nobody takes

        def reply(value: Any, error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(answer, value, error)
            except RuntimeError:  # the loop is closed
                return

        self.busy += 1
        if worker is not None:
            fn = functools.partial(_as_worker, worker, self._clock, fn)
        jobs, thread = self._send(fn, reply)
        try:
            outcome = await future
        except BaseException:
            jobs.put(None)  # it ends when the function returns
            self._clock.interrupt(thread)
            raise
        self._idle.append((jobs, thread))
        if type(outcome) is _Error:
            raise outcome.error
        return outcome

    async def finish(self, fn: Callable[[], object]) -> None:
        """Run a function on a thread to its end, which is waited for whoever is cancelled; it raises nothing."""
        from asyncio import CancelledError, get_running_loop, shield

        loop = get_running_loop()
        future = loop.create_future()

        def reply(value: Any, error: BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(future.set_result, None)

        job = self._send(fn, reply)
        while not future.done():
            try:
                await shield(future)
            except CancelledError:
                continue
        self._idle.append(job)

    def end(self) -> list[DriverThread]:
        """Let the threads that have nothing to do end, and return them."""
        idle, self._idle = self._idle, []
        for jobs, _ in idle:
            jobs.put(None)
        return [thread for _, thread in idle]

    def _send(self, fn: Callable[[], Any], reply: Callable[[Any, BaseException | None], object]) -> _Thread:
        jobs, thread = self._idle.pop() if self._idle else self._start()
        self._clock.hand(jobs, (copy_context(), fn, reply))
        return jobs, thread

    def _start(self) -> _Thread:
        jobs = self._clock.queue()
        thread = self._clock.thread(_serve, (jobs,), self._name)
        self._clock.begin(thread)
        return jobs, thread


class _Error:
    """What a function raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _serve(jobs: Queue) -> None:
    while (job := jobs.get()) is not None:
        context, fn, reply = job
        _do(context, fn, reply)
        del job, context, fn, reply  # an idle thread keeps nothing alive


def _do(context: Context, fn: Callable[[], Any], reply: Callable[[Any, BaseException | None], object]) -> None:
    try:
        value = context.run(fn)
    except BaseException as error:
        reply(None, error)
    else:
        reply(value, None)


def _as_worker(worker: HasWork, clock: Clock, fn: Callable[[], Any]) -> Any:
    set_current_worker(worker, clock)
    return fn()
