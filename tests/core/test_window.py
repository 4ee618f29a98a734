"""The rolling window: exact, and held until the outcome is known."""

from __future__ import annotations

import math
import random

import pytest

from qengine import Window
from qengine.core.window import EMPTY, RollingWindow, Slots, live_slots

THREE = RollingWindow(Window(3, 10))


def filled(*instants: float) -> Slots:
    """The state after one unit was taken at each of these instants."""
    slots = THREE.initial(0.0)
    for now in instants:
        ready_at, slots = THREE.ask(slots, 1, now)
        assert ready_at == now
    return slots


def test_a_full_window_says_when_the_oldest_slot_runs_out() -> None:
    slots = filled(0.0, 1.0, 2.0)
    assert THREE.ask(slots, 1, 5.0)[0] == 10.0
    assert THREE.ask(slots, 2, 5.0)[0] == 11.0
    assert THREE.ask(slots, 3, 5.0)[0] == 12.0


def test_at_the_instant_it_named_there_is_room() -> None:
    slots = filled(0.0, 1.0, 2.0)
    assert THREE.ask(slots, 1, 10.0)[0] == 10.0
    assert THREE.ask(slots, 1, math.nextafter(10.0, 0.0))[0] == 10.0


def test_a_slot_that_is_held_runs_out_only_after_its_outcome() -> None:
    slots = THREE.initial(0.0)
    for now in (0.0, 0.0, 0.0):
        _, slots = THREE.ask(slots, 1, now, held=True)
    assert THREE.ask(slots, 1, 99.0, held=True)[0] == math.inf
    slots = THREE.settle(slots, 1, 99.0, 1)
    assert THREE.ask(slots, 1, 100.0, held=True)[0] == 109.0
    assert THREE.available(slots, 109.0) == 1


def test_an_outcome_settles_a_slot_of_its_own_size() -> None:
    slots = THREE.initial(0.0)
    _, slots = THREE.ask(slots, 1, 0.0, held=True)
    _, slots = THREE.ask(slots, 2, 0.0, held=True)
    slots = THREE.settle(slots, 1, 5.0, 1)
    assert THREE.ask(slots, 1, 5.0)[0] == 15.0
    assert THREE.ask(slots, 2, 5.0)[0] == math.inf
    slots = THREE.settle(slots, 2, 6.0, 0.5)
    assert THREE.available(slots, 6.0) == 1.5, "less was used than was taken"
    assert THREE.available(THREE.settle(slots, 0, 6.0, 4), 6.0) == -2.5, "an overrun is a debt"


def test_a_slot_given_back_is_free_at_once() -> None:
    slots = THREE.undo(filled(0.0, 1.0, 2.0), 1)
    assert THREE.available(slots, 2.0) == 1
    assert THREE.ask(slots, 2, 2.0)[0] == 10.0, "the last one was given back, not the oldest"


def test_no_more_is_given_back_than_was_taken() -> None:
    assert THREE.available(THREE.undo(filled(0.0), 2), 0.0) == 3


def test_what_was_taken_last_is_given_back_first_and_only_what_has_not_run_out() -> None:
    slots = filled(0.0, 4.0, 5.0)
    assert list(live_slots(THREE.refund(slots, 1.5, 6.0))) == [(10.0, 1), (14.0, 0.5)]
    assert list(live_slots(THREE.refund(slots, 5, 12.0))) == []


def test_what_is_charged_counts_beyond_the_limit() -> None:
    slots = THREE.charge(filled(0.0), 4, 1.0)
    assert THREE.available(slots, 1.0) == -2
    assert THREE.ask(slots, 1, 10.0)[0] == 11.0
    assert THREE.ask(slots, 0, 10.0)[0] == 11.0, "a debt is paid off first"


def test_another_window_takes_over_what_was_taken_and_has_not_run_out() -> None:
    short = RollingWindow(Window(2, 3))
    slots = short.taken_over(THREE, filled(0.0, 6.0), 8.0)
    assert list(live_slots(slots)) == [(9.0, 1)]
    long = RollingWindow(Window(2, 100))
    assert list(live_slots(long.taken_over(THREE, filled(0.0, 6.0), 10.0))) == [(106.0, 1)]


def test_slots_that_ran_out_are_forgotten() -> None:
    slots = THREE.initial(0.0)
    for number in range(100):
        ready_at, slots = THREE.ask(slots, 1, 10.0 * number)
        assert ready_at == 10.0 * number
    assert len(list(live_slots(slots))) <= 3


def test_a_clock_step_locks_nobody_out_for_longer_than_the_step() -> None:
    slots = filled(100.0, 100.0, 100.0)
    assert THREE.ask(slots, 1, 50.0)[0] == 110.0
    assert THREE.available(slots, 50.0) == 0, "a backward step mints nothing"
    assert THREE.available(slots, 1e9) == 3, "a forward step releases one full window"


def test_slots_stay_in_order_of_expiry_when_the_clock_steps_back() -> None:
    slots = filled(100.0, 50.0)
    assert [ends_at for ends_at, _ in live_slots(slots)] == [60.0, 110.0]
    assert THREE.ask(slots, 2, 50.0)[0] == 60.0


def test_no_period_ever_sees_more_than_the_limit() -> None:
    rng = random.Random(5)
    for _ in range(40):
        limit, seconds = rng.choice([1, 2, 6, 300]), rng.uniform(0.5, 20)
        window, slots, now = RollingWindow(Window(limit, seconds)), EMPTY, 1e4
        taken: list[tuple[float, int]] = []
        for _ in range(200):
            now += rng.expovariate(limit / seconds)
            amount = rng.randint(1, max(1, limit // 50))
            ready_at, after = window.ask(slots, amount, now)
            room = limit - sum(size for at, size in taken if at + seconds > now)
            assert (ready_at == now) == (amount <= room)
            if ready_at == now:
                slots = after
                taken.append((now, amount))
            else:
                assert window.ask(slots, amount, ready_at)[0] == ready_at


def test_what_is_forgotten_stays_so_when_the_clock_steps_back() -> None:
    slots = filled(100.0)
    slots = THREE.charge(slots, 0, 115.0)       # and so the slot that ran out at 110 is forgotten
    slots = THREE.charge(slots, 3, 50.0)
    assert THREE.ask(slots, 1, 61.0)[0] == 110.0, "at 61 the one of 100 would count"


def test_a_slot_given_back_whole_leaves_nothing_behind() -> None:
    assert list(live_slots(THREE.refund(filled(0.0, 4.0), 1, 5.0))) == [(10.0, 1)]


def test_an_empty_window_is_as_new_whatever_the_sums_of_fractions_say() -> None:
    slots = EMPTY
    for now, amount in enumerate([0.1, 0.2, 0.3]):
        _, slots = THREE.ask(slots, amount, float(now))
    chunks, gone, total, held, _ = THREE.charge(slots, 0, 99.0)
    assert (chunks, gone, total, held) == EMPTY[:4]


def test_slots_lie_in_full_chunks_so_that_one_more_copies_few_of_them() -> None:
    window, slots = RollingWindow(Window(200, 1000)), EMPTY
    for now in range(200):
        _, slots = window.ask(slots, 1, float(now))
    assert [len(chunk) for chunk in slots[0]] == [64, 64, 64, 8]


@pytest.mark.parametrize(("used", "left"), [(1, 2.5), (3, 0.5), (2, 1.5)])
def test_a_call_older_than_the_window_counts_by_what_it_used_otherwise(used: float, left: float) -> None:
    slots = THREE.charge(EMPTY, 1.5, 0.0)       # as the limit that was there before had counted it: nothing is held
    assert THREE.available(THREE.settle(slots, 2, 5.0, used), 5.0) == left


def test_on_another_clock_what_has_not_run_out_lasts_as_long() -> None:
    slots = THREE.moved(filled(0.0, 4.0, 5.0), 10.0, 1000.0)
    assert list(live_slots(slots)) == [(1004.0, 1), (1005.0, 1)], "the first has run out just now"
    assert THREE.ask(slots, 1, 1000.0)[0] == 1000.0
    assert THREE.ask(slots, 2, 1000.0)[0] == 1004.0


def test_on_another_clock_what_is_held_runs_out_as_if_it_ended_now() -> None:
    _, slots = THREE.ask(filled(4.0), 2, 5.0, held=True)
    slots = THREE.moved(slots, 8.0, 1000.0)
    assert list(live_slots(slots)) == [(1006.0, 1), (1010.0, 2)]


def test_another_window_forgets_what_is_older_than_it_lasts() -> None:
    slots = RollingWindow(Window(2, 3)).taken_over(THREE, filled(5.0, 6.0), 8.0)
    assert list(live_slots(slots)) == [(9.0, 1)], "the one of 5 would have run out just now"
    assert RollingWindow(Window(2, 3)).ask(slots, 1, 8.0)[0] == 8.0
