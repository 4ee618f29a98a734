"""`undisturbed`: what was late is measured again, and nothing else is."""

from __future__ import annotations

import asyncio
import threading

import pytest
from shared import TRIES, Late, alone_in_loop, timely, undisturbed, undisturbed_as_a_whole, until


def test_what_was_late_is_tried_again_until_it_is_in_time() -> None:
    took = [9.0, 9.0, 0.1, 9.0]

    @undisturbed
    def measured(most: float) -> str:
        seconds = took.pop(0)
        with timely():
            assert seconds < most
        return "in time"

    assert measured(most=1.0) == "in time"
    assert took == [9.0]


@pytest.mark.parametrize(("tried", "is_late", "times"), [
    (undisturbed, True, TRIES), (undisturbed, False, 1),
    (undisturbed_as_a_whole, True, TRIES), (undisturbed_as_a_whole, False, TRIES),
])
def test_a_fault_fails_and_what_is_no_matter_of_time_does_so_at_once(tried: object, is_late: bool, times: int) -> None:
    tries: list[int] = []

    @tried      # type: ignore[operator,misc,untyped-decorator,unused-ignore]
    def faulty() -> None:
        tries.append(1)
        if is_late:
            with timely():
                assert len(tries) > TRIES, "late"
        assert len(tries) > TRIES, "wrong"

    with pytest.raises(Late if is_late else AssertionError, match="late" if is_late else "wrong"):
        faulty()
    assert len(tries) == times


def test_what_comes_by_itself_is_waited_for_and_what_does_not_is_told() -> None:
    came = threading.Event()
    threading.Timer(0.01, came.set).start()
    until(came.is_set)
    with pytest.raises(AssertionError, match="does not come about"):
        until(lambda: False, 0.01)

    async def main() -> set[object]:
        other = asyncio.create_task(asyncio.sleep(0.01))
        await alone_in_loop()
        assert other.done()
        return {*asyncio.all_tasks()} - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
