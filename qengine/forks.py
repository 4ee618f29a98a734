"""After a fork, limits start afresh in the child.

The child has a copy of the parent's state, and of locks that another thread of the parent may have held in that
instant and that nobody in the child would ever release.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Restartable(Protocol):
    """A limit, or something that has limits."""

    def start_afresh(self) -> None:
        """Take a new lock, and be as new."""


_known: WeakSet[Restartable] = WeakSet()


def restart_after_fork(thing: Restartable) -> None:
    """Have a thing start afresh in every child, as long as it lives."""
    _known.add(thing)


def _restart_all() -> None:
    for thing in tuple(_known):
        thing.start_afresh()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_restart_all)
