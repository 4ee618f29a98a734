"""Events: who is told what happens in a run.

Rules: listeners are told one event at a time and in order, by whichever thread happens to have nothing better to do,
never under the core's lock.  What a listener raises harms no run and is logged once in it; only a KeyboardInterrupt is
the user's own, wherever it comes up: it ends the run and is for the caller.  The log gets what is rare, and only at a
level that was enabled when the run began: stops, breakers that opened and probes that hold admission at INFO; retries,
throttling, timeouts, late answers, changes of source and of an adaptive concurrency at DEBUG.  No event carries a
payload, a value or an error's text, so the log does not either.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import RLock

from .model import Event

_log = logging.getLogger(__name__)

_RAISED = "%s raised; the run goes on, and this run reports it no more"

LEVELS = {
    "stop": logging.INFO,
    "breaker_opened": logging.INFO,
    "held": logging.INFO,
    "released": logging.INFO,
    "rerouted": logging.DEBUG,
    "concurrency": logging.DEBUG,
    "retry": logging.DEBUG,
    "throttled": logging.DEBUG,
    "timeout": logging.DEBUG,
    "late": logging.DEBUG,
}
"""What the log gets, and at which level.  Below WARNING, which Python prints where nobody has configured anything."""


def log_event(event: Event) -> None:
    """Write an event to the log, if it is of a kind that is written there and its level is enabled."""
    level = LEVELS.get(event.kind)
    if level is None or not _log.isEnabledFor(level):
        return
    if event.index is None:
        _log.log(level, "%s: %s" if event.detail else "%s%s", event.kind, event.detail)
    else:
        detail = f": {event.detail}" if event.detail else ""
        _log.log(level, "%s: %s, task %d, attempt %d%s", event.kind, event.source, event.index, event.number, detail)


class Teller:
    """Hands the events of one run on.

    Args:
        on_event: The user's listener; None for none.
        on_interrupt: Called with a KeyboardInterrupt that comes up in a listener.
        logs: Whether the log is told too; not of what never happened, in a prediction.
    """

    def __init__(
        self,
        on_event: Callable[[Event], object] | None,
        on_interrupt: Callable[[KeyboardInterrupt], object],
        *,
        logs: bool,
    ) -> None:
        self._on_interrupt = on_interrupt
        self._events: deque[Event] = deque()
        self.emit = None if on_event is None else self._events.append
        """Takes an event, under any lock; None where nobody listens, and none need be made."""
        self.note: Callable[[Event], object] | None = None
        """Likewise; None where nobody wants to know even what is rare."""
        self._listeners: list[tuple[str, Callable[[Event], object]]] = []
        if logs and _log.isEnabledFor(max(LEVELS.values())):
            self._listeners.append(("logging", log_event))
            self.note = self._events.append
        if on_event is not None:
            self._listeners.append(("on_event", on_event))
        self._lock = RLock()  # a signal handler may come back to it
        self._teller: object = None  # who tells at the moment
        self._have_failed: set[str] = set()

    @property
    def has_listeners(self) -> bool:
        """Whether there may ever be something to tell."""
        return bool(self._listeners)

    def tell(self) -> None:
        """Tell what there is to tell: if another thread is at it, that one tells this too."""
        while self._events and self._teller is None:
            me = object()
            try:  # from here: what a signal handler raises is to leave nobody's turn taken
                with self._lock:
                    if self._teller is None:
                        self._teller = me
                if self._teller is me:
                    self._tell_all()
            finally:
                if self._teller is me:
                    self._teller = None

    def _tell_all(self) -> None:
        """Tell until nothing is left.  Not in `tell` itself: a loop's jump back is in no `try`, since Python 3.12."""
        events = self._events
        while events:
            self._tell_one(events.popleft())

    def _tell_one(self, event: Event) -> None:
        for name, listener in self._listeners:
            try:
                listener(event)
            except KeyboardInterrupt as error:
                self._on_interrupt(error)
            except BaseException:  # whatever it is: a worker that dies of it would take its task with it
                self._failed(name)

    def _failed(self, name: str) -> None:
        if name not in self._have_failed:
            self._have_failed.add(name)
            try:
                _log.exception(_RAISED, name)
            except Exception:  # the log itself is what is broken: nowhere to say so
                return
