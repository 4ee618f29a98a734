"""The asyncio twins: `AsyncConcurrentExecutor`, `AsyncTaskScheduler`, `AsyncQueryExecutor` and `AsyncStream`.

Rules: as of the faces with threads, whose policies, limits, plans and reports these share.  They run in the loop of
whoever calls them and start no thread, except for functions made by `in_thread`.  A caller that is cancelled gets its
CancelledError within 0.1 s, when all tasks of the run have been cancelled, with the partial report as its `report`
attribute and, on the executor, as `last_report`.
"""

from __future__ import annotations

import asyncio
from _thread import _count  # of the threads that were started and run
from collections.abc import AsyncIterable, Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload
from weakref import WeakKeyDictionary

from .core.lane import Attempt, Lane
from .core.run import Record
from .drivers.asyncio import Inbox, TaskCrew
from .drivers.calls import is_async, run_in
from .drivers.clock import SYSTEM_CLOCK
from .drivers.handover import in_thread
from .drivers.virtual import VirtualClock
from .errors import optional, refuse_type, require_kind
from .executor import Call, Calls, Exit, FunctionFace, LaneBook, refuse_limits, unnamed
from .manifest import RunManifest
from .model import CancellationToken, CollectionReport, Event, Query, RunReport, Task, TaskResult
from .policy import ExecutionPolicy, StopConditions
from .probe import HoldWhile
from .query import HierarchyFace, items_of
from .routing import RouteBy, Sources
from .session import (
    INTERRUPT_SECONDS,
    Recording,
    Reporting,
    Results,
    Session,
    Stage,
    attach_report,
    check_run,
    check_token,
)
from .source import Source

if TYPE_CHECKING:  # loaded with the first journal: a program without one is not to pay for it
    from .journal import Journal

P = TypeVar("P")
V = TypeVar("V")

Inputs = Iterable[P | Task[P]] | AsyncIterable[P | Task[P]]

_KINDS = (Iterable, AsyncIterable)


def asyncio_stage(clock: VirtualClock | None) -> Stage:
    """Return the stage of an executor under asyncio; None for real time."""
    optional(require_kind, "clock", clock, VirtualClock)
    return Stage(SYSTEM_CLOCK if clock is None else clock, TaskCrew, in_thread)


def require_async(name: str, fn: object, *, generators: bool = True) -> None:
    """Refuse what is not an async function, though it may return an awaitable: nobody could know before."""
    if not is_async(fn, generators=generators):
        refuse_type(name, fn, "an async function: make one of a plain function by in_thread(fn)")


async def _abort(session: Session, reason: str) -> asyncio.CancelledError | None:
    """Stop a run at once, and wait for its tasks to end, but not for those that do not.

    Returns:
        What cancelled whoever waits here; this goes on until it is done.
    """
    session.cancel_now(reason)
    loop = asyncio.get_running_loop()
    until = loop.time() + INTERRUPT_SECONDS
    cancelled = None
    while True:
        try:
            await session.crew.join(until - loop.time())
            break
        except asyncio.CancelledError as error:
            cancelled = error
    session.leave()
    return cancelled


class AsyncStream(Results[P, V]):
    """The results of a run, one by one: an async iterator and an async context manager.

    The run begins with the first `__anext__` or with `async with`.  The intake waits for the consumer: inputs taken
    and not yet handed out are at most concurrency + lookahead.  For one task at a time; `cancel` may be called from
    any thread.  A consumer that is cancelled while it waits here ends the run.  Leave it by `async with`: else the run
    goes on, as far as the intake may, until nobody holds the stream any more.
    """

    def __init__(self, owner: Reporting, make_session: Callable[..., Session], ordered: bool) -> None:
        self._bell: Inbox[None] = Inbox()
        super().__init__(owner, ordered, partial(self._bell.put, None))
        self._make_session = make_session
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_awaited = False
        self._cancelled: str | None = None  # for what, perhaps before it began

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskResult[P, V]:
        if self._over:
            raise StopAsyncIteration
        if self._is_awaited:
            raise RuntimeError("two tasks at once wait for the next result: a stream is for one at a time")
        session = self._begun()
        try:
            attempt = self._shelf.take() or await self._wait()
            if attempt is None:
                await session.crew.join()
                session.conclude()
        except BaseException as error:
            await _abort(session, "interrupted")
            attach_report(error, self._close_books(session))
            raise
        if attempt is None:
            session.raise_if_ended_by_error(self._close_books(session))
            raise StopAsyncIteration
        return self._hand_out(attempt, session)

    async def __aenter__(self) -> Self:
        self._begun()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self.aclose()
        self._attach_to(error)

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not self._over:
            if self._loop is not None and self._loop.is_closed():  # nobody is left who would do it
                session.run.cancel("closed", session.clock.now(), "abandon")
            else:
                session.cancel("closed", "abandon")
            session.leave()

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop the run; what was taken is still handed out, CANCELLED where it was not finished."""
        require_kind("reason", reason, str)
        self._cancelled = reason  # first, for it may be beginning in another thread
        if self._session is not None:
            self._session.cancel(reason)

    async def aclose(self) -> None:
        """Stop the run at once and give up what runs; what was not handed out is in `report.results`."""
        if self._over:
            return
        session = self._session
        if session is None:  # it has not begun, and is not to
            session = self._make_session()
            session.run.cancel("closed", session.clock.now())
            session.leave()
            self._close_books(session)
        else:
            cancelled = await _abort(session, "closed")
            report = self._close_books(session)
            if cancelled is not None:
                attach_report(cancelled, report)
                raise cancelled

    def _begun(self) -> Session:
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            self._session = self._make_session(deliver=self._deliver())
            if self._cancelled is not None:
                self._session.cancel(self._cancelled)
            self._session.start()
        return self._session

    async def _wait(self) -> Attempt | None:
        """Return the next attempt to hand out, waiting for it; None after the last."""
        shelf = self._shelf
        while True:
            was_complete = shelf.is_complete  # asked first, as with threads
            attempt = shelf.take()
            if attempt is not None or was_complete:
                return attempt
            if shelf.is_watched:
                self._is_awaited = True
                try:
                    await self._bell.get()
                finally:
                    self._is_awaited = False
            else:
                shelf.is_watched = True

    def _make_room(self, lane: Lane, session: Session) -> None:
        if isinstance(session.clock, VirtualClock):  # in its turn, as with threads
            super()._make_room(lane, session)
        else:
            session.crew.tell(session.run.delivered, lane)


class _AsyncFace(Reporting):
    """What the executors of asyncio share: `run` and `stream` over a session."""

    input_kinds = _KINDS
    awaits = True
    others = staticmethod(_count)

    async def _run(self, inputs: Any, cancel: CancellationToken | None) -> Any:
        records: list[Record] = []
        session = self.make_session(self.stage, inputs, cancel, records=records)
        try:
            session.start()
            await session.crew.wait()
            await session.crew.join()
            session.conclude()
        except BaseException as error:
            await _abort(session, "interrupted")
            self.last_report = session.report(session.results(self.in_order(session.kept(records))))
            attach_report(error, self.last_report)
            raise
        report = self.last_report = session.report(session.results(self.in_order(session.kept(records))))
        session.raise_if_ended_by_error(report)
        return report

    def _stream(self, inputs: Any, ordered: bool, cancel: CancellationToken | None) -> AsyncStream[Any, Any]:
        check_token(cancel, self.stage.clock)  # now: the run begins later
        return AsyncStream(self, lambda **fields: self.make_session(self.stage, inputs, cancel, **fields), ordered)


class _AsyncFunctionFace(_AsyncFace, FunctionFace[P, V], Generic[P, V]):
    """An executor of one async function."""

    def __init__(
        self,
        fn: Callable[[P], Awaitable[V]] | Sources,
        clock: VirtualClock | None,
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
        hold_while: HoldWhile | None,
        route_by: RouteBy = "order",
        journal: Recording | None = None,
    ) -> None:
        super().__init__(fn, asyncio_stage(clock), policy, lane_by, key, on_event, hold_while, route_by, journal)
        if self._router is None:
            require_async("fn", fn, generators=False)
        for source in () if self._router is None else self._router.sources.values():
            require_async(f"fetch of {source.name!r}", source.fetch, generators=False)
        self._calls: WeakKeyDictionary[Any, _AsyncCalls] = WeakKeyDictionary()
        self._books: WeakKeyDictionary[Any, LaneBook] = WeakKeyDictionary()

    async def run(self, inputs: Inputs[P], cancel: CancellationToken | None = None) -> RunReport[P, V]:
        """Call the function for every input and return the report, results in input order.

        Args:
            inputs: Payloads or Tasks, also from an async iterable; taken lazily, at most `lookahead` ahead.
            cancel: Stops the run when it is cancelled.

        Raises:
            What the inputs' iterator raised, once all that was taken is done; CancelledError, within 0.1 s.  Both with
            the report as their `report` attribute.
        """
        check_run("inputs", inputs, cancel, _KINDS)
        report: RunReport[P, V] = await self._run(inputs, cancel)
        return report

    def stream(
        self,
        inputs: Inputs[P],
        ordered: bool = False,
        cancel: CancellationToken | None = None,
    ) -> AsyncStream[P, V]:
        """Call the function for every input; return an async iterator over the results, as they come or in order."""
        check_run("inputs", inputs, cancel, _KINDS)
        return self._stream(inputs, ordered, cancel)

    async def call(self, payload: P | Task[P]) -> V:
        """Call the function for one payload, under the same limits, and return its value.

        From many tasks of a loop at once: all calls share the executor's concurrency, and for as long as it lives one
        budget; a cap for each day is a `Quota`.  Stop conditions and keys are those of a run and do not apply.  A
        caller that is cancelled takes its call with it, and no other.

        Raises:
            The task's error; BudgetExceededError, BreakerOpenError if it was not tried.
        """
        loop = asyncio.get_running_loop()
        task = unnamed(payload)
        book = self._books.get(loop)
        if book is None:
            book = self._books[loop] = LaneBook(self, self.stage, lambda fn: partial(self._call_in_context, fn))
        calls = self._calls.get(loop)
        if calls is None:
            book.forget_idle()
        lane = book.lane(self.lane_key(task.payload))
        if calls is None:
            calls = self._calls[loop] = _AsyncCalls(self.stage, book, self._on_event, self.probe, self.quotas)
        calls.pending += 1
        try:
            return await calls.call(task, lane, self)  # type: ignore[no-any-return]
        finally:
            calls.pending -= 1
            if calls.pending == 0:
                del self._calls[loop]
                await calls.close()

    @staticmethod
    async def _call_in_context(fn: Callable[[Any], Awaitable[Any]], call: Call) -> Any:
        context = call.context.copy()
        coroutine = run_in(context, partial(_in_task, fn), call.payload, call.tokens)
        return await asyncio.get_running_loop().create_task(coroutine, context=context)


async def _in_task(fn: Callable[[Any], Awaitable[Any]], payload: Any) -> Any:
    try:
        return await fn(payload)
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop if the task raised it
        raise Exit from error


class _AsyncCalls(Calls):
    """The run behind `call` of one loop."""

    async def call(self, task: Task[Any], lane: Lane, owner: FunctionFace[Any, Any]) -> Any:
        """Submit a task and wait for its value."""
        session = self.session
        reply: asyncio.Future[Attempt | None] = asyncio.get_running_loop().create_future()
        call = Call(task.payload, partial(_settle, reply), session.clock)
        attempt = Attempt(call, task, lane)
        sent = owner.send(attempt, self.book)
        if sent is not attempt:
            await sent  # type: ignore[misc]  # an awaitable
        self.waiting.add(call)
        session.crew.tell(session.run.submitted, attempt)
        leave = self.withdraw_with(call.outer, attempt)
        try:
            return self.value(None if session.crew.over else await reply)
        except asyncio.CancelledError:
            if call in self.waiting:
                session.crew.tell(session.run.withdrawn, attempt, call.reason or "cancelled")
            raise
        finally:
            leave()

    async def close(self) -> None:
        """End the run."""
        self.session.crew.tell(self.session.run.closed, self.feed)
        try:
            await self.session.crew.join()
        finally:
            self.session.conclude()


def _settle(reply: asyncio.Future[Attempt | None], attempt: Attempt | None) -> None:
    if not reply.done():  # else nobody waits any more
        reply.set_result(attempt)


class AsyncConcurrentExecutor(_AsyncFunctionFace[P, V]):
    """Runs an async function over many inputs, a fixed number at once.

    Args:
        fn: An async function, called with each payload; one that blocks goes in as `in_thread(fn)`.
        policy: Concurrency, timeout, retries, stops, budget; limits and batches need an AsyncTaskScheduler.
        clock: A VirtualClock to run in virtual time; None for real time.
        key: Names a payload: a second one of the same name in a run is skipped.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Says whether nothing is to be started for now, plain or async; see TaskScheduler.

    Several runs may go on at once.  Not tied to a loop: it may be used in several, one after the other or in threads.

    >>> async def double(x):
    ...     return x * 2
    >>> asyncio.run(AsyncConcurrentExecutor(double).run([1, 2, 3])).values()
    [2, 4, 6]
    """

    def __init__(
        self,
        fn: Callable[[P], Awaitable[V]],
        policy: ExecutionPolicy = ExecutionPolicy(),
        *,
        clock: VirtualClock | None = None,
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
    ) -> None:
        refuse_limits(policy, "AsyncTaskScheduler")
        super().__init__(fn, clock, policy, None, key, on_event, hold_while)


class AsyncTaskScheduler(_AsyncFunctionFace[P, V]):
    """Runs an async function over many inputs under limits, in batches, with retries, breakers, budgets and stops.

    Args:
        fn_or_sources: An async function, called with each payload; one that blocks goes in as `in_thread(fn)`.  Or
            sources, whose `fetch` is such a function.
        policy: See ExecutionPolicy, and TaskScheduler for what of it holds where there are sources.
        lane_by: Gives the lane of a payload: each has limits, concurrency, a budget and a breaker of its own.
        route_by: Which source does a task: "order" or "cost"; see TaskScheduler.
        clock: A VirtualClock to run in virtual time; None for real time.
        key: Names a payload: a second one of the same name in a run is skipped.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Says whether nothing is to be started for now, plain or async; see TaskScheduler.
        journal: Records each run, one at a time, off the loop; see Journal.

    Several runs may go on at once; they share the limits.  Not tied to a loop.

    >>> from qengine import RateLimit
    >>> clock = VirtualClock()
    >>> async def fetch(x):
    ...     await clock.sleep(0.5)
    ...     return x
    >>> scheduler = AsyncTaskScheduler(fetch, ExecutionPolicy(limits=[RateLimit(per_second=1)]), clock=clock)
    >>> asyncio.run(scheduler.run(range(60))).makespan
    59.5
    """

    @overload
    def __init__(
        self,
        fn_or_sources: Callable[[P], Awaitable[V]],
        policy: ExecutionPolicy = ...,
        *,
        lane_by: Callable[[P], Any] | None = ...,
        route_by: RouteBy = ...,
        clock: VirtualClock | None = ...,
        key: Callable[[P], Any] | None = ...,
        on_event: Callable[[Event], object] | None = ...,
        hold_while: HoldWhile | None = ...,
        journal: Journal | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: AsyncTaskScheduler[Any, Any],
        fn_or_sources: Sources,
        policy: ExecutionPolicy = ...,
        *,
        route_by: RouteBy = ...,
        clock: VirtualClock | None = ...,
        key: Callable[[Any], Any] | None = ...,
        on_event: Callable[[Event], object] | None = ...,
        hold_while: HoldWhile | None = ...,
        journal: Journal | None = ...,
    ) -> None: ...

    def __init__(
        self,
        fn_or_sources: Callable[[P], Awaitable[V]] | Sources,
        policy: ExecutionPolicy = ExecutionPolicy(),
        *,
        lane_by: Callable[[P], Any] | None = None,
        route_by: RouteBy = "order",
        clock: VirtualClock | None = None,
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(fn_or_sources, clock, policy, lane_by, key, on_event, hold_while, route_by, journal)

    @classmethod
    def from_manifest(
        cls, fn: Callable[[P], Awaitable[V]], manifest: RunManifest, **options: Any
    ) -> Self:
        """Make one with the policy of a manifest; `options` are those of the class."""
        return cls(fn, require_kind("manifest", manifest, RunManifest).policy, **options)


class AsyncQueryExecutor(_AsyncFace, HierarchyFace):
    """Asks several sources about a hierarchy of nodes, parents first, children only where something was found.

    Args:
        sources: Their names must differ, and each `fetch` is an async function or an async generator function; one
            that blocks goes in as `in_thread(fetch)`.
        plan: See Plan; each of its methods may be plain or async.
        concurrency: Calls at once over all sources; None for the sum of theirs.
        stop: When to stop.
        lookahead: Queries made ready beyond those that run, for each source.
        clock: A VirtualClock to run in virtual time; None for real time.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Says whether nothing is to be started for now, plain or async; see TaskScheduler.
        journal: Records each run, one at a time, off the loop; see Journal.

    Several runs may go on at once; they share the sources' limits.  Not tied to a loop.

    >>> class Two:
    ...     def queries(self, node, source):
    ...         return [f"{node}?"]
    ...     async def children(self, node, result):
    ...         return [node + "1", node + "2"] if len(node) < 2 else []
    >>> async def echo(query):
    ...     return [query.payload.upper()]
    >>> asyncio.run(AsyncQueryExecutor([Source("echo", echo)], Two()).run(["a"])).items
    ['A?', 'A1?', 'A2?']
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Any,
        *,
        concurrency: int | None = None,
        stop: StopConditions = StopConditions(),
        lookahead: int = 64,
        clock: VirtualClock | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
        journal: Journal | None = None,
    ) -> None:
        stage = asyncio_stage(clock)
        super().__init__(sources, plan, stage, concurrency, stop, lookahead, on_event, hold_while, journal)
        for source in self.sources:
            require_async(f"fetch of {source.name!r}", source.fetch)

    async def run(
        self, roots: Iterable[Hashable] | AsyncIterable[Hashable], cancel: CancellationToken | None = None
    ) -> CollectionReport[Any]:
        """Ask all that there is to ask, and return the report: results by level, then root, then child.

        Args:
            roots: The nodes of level 0, also from an async iterable; taken lazily.
            cancel: Stops the run when it is cancelled.

        Raises:
            What the roots' iterator raised, once all that was taken is done; CancelledError, within 0.1 s.  Both with
            the report as their `report` attribute.
        """
        check_run("roots", roots, cancel, _KINDS)
        report: CollectionReport[Any] = await self._run(roots, cancel)
        return report

    def stream(
        self,
        roots: Iterable[Hashable] | AsyncIterable[Hashable],
        ordered: bool = False,
        cancel: CancellationToken | None = None,
    ) -> AsyncStream[Any, Any]:
        """Ask all that there is to ask; return an async iterator over the results, as they come or in order."""
        check_run("roots", roots, cancel, _KINDS)
        return self._stream(roots, ordered, cancel)

    def fetcher(self, source: Source) -> Callable[[Query[Any]], Any]:
        """Return what fetches the items of a query, as this world's workers call it."""

        async def fetch(query: Query[Any]) -> list[Any]:
            found: Any = source.fetch(query)
            if hasattr(type(found), "__aiter__"):
                return [item async for item in found]
            return items_of("fetch", await found)

        return fetch

    def opened(self, name: str, value: Any) -> Any:
        """Return what a method of the plan gave, to be iterated over as it is needed."""
        return _opened(name, value)


async def _opened(name: str, value: Iterable[Any] | AsyncIterable[Any] | Awaitable[Any] | None) -> Any:
    given: Any = value
    if hasattr(type(given), "__await__"):
        given = await given
    if given is None:
        return ()
    if isinstance(given, (str, bytes)) or not isinstance(given, _KINDS):
        raise TypeError(f"{name} returned {given!r}, allowed is None or an iterable that is not a string")
    return given
