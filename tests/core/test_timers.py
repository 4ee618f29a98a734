"""The alarms of a run."""

from __future__ import annotations

import math

from qengine.core.timers import Timer, Timers


def rung(timers: Timers) -> list[tuple[Timer, object]]:
    """All that are left, in the order in which they ring."""
    out = []
    while timers.next_at < math.inf:
        out.append(timers.pop())
    return out


def test_alarms_ring_in_order_and_those_of_one_instant_as_they_were_set() -> None:
    timers = Timers()
    for at, what in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        timers.set(at, Timer.RETRY, what)
    assert timers.next_at == 1.0
    assert [what for _, what in rung(timers)] == ["a", "b", "c", "d"]


def test_an_alarm_is_removed_by_its_kind_and_what_it_is_for() -> None:
    timers, mine, other = Timers(), object(), object()
    for at, kind, what in [(3.0, Timer.RETRY, other), (1.0, Timer.RETRY, mine), (2.0, Timer.GIVE_UP, mine)]:
        timers.set(at, kind, what)
    timers.remove(Timer.RETRY, mine)
    assert rung(timers) == [(Timer.GIVE_UP, mine), (Timer.RETRY, other)]


def test_all_of_a_kind_are_taken_out_in_order_and_no_others() -> None:
    timers = Timers()
    for at, kind, what in [(4.0, Timer.LANE, "d"), (2.0, Timer.RETRY, "b"), (3.0, Timer.LANE, "c"),
                           (2.0, Timer.RETRY, "also b"), (1.0, Timer.RETRY, "a")]:
        timers.set(at, kind, what)
    assert timers.take_out(Timer.RETRY) == ["a", "b", "also b"]
    assert rung(timers) == [(Timer.LANE, "c"), (Timer.LANE, "d")]
