"""Deadlines of requests, and the chores that nothing may end."""

import asyncio

from engine.overdue import Overdue, start_housekeeping


def test_each_key_is_told_once_and_in_its_time() -> None:
    now = [10.0]
    overdue = Overdue[str](lambda: now[0], grace_s=1.0)
    told: list[str] = []
    overdue.add("late", 5.0)
    overdue.add("soon", 1.0)
    overdue.add("never", None)
    overdue.tell(told.append)
    assert told == []
    now[0] = 12.0
    overdue.tell(told.append)
    assert told == ["soon"]
    now[0] = 100.0
    overdue.tell(told.append)
    overdue.tell(told.append)
    assert told == ["soon", "late"]


def test_keys_that_are_over_are_not_kept_until_their_deadline() -> None:
    now = [0.0]
    overdue = Overdue[int](lambda: now[0], grace_s=0.0)
    told: list[int] = []
    live = {7, 8}
    for key in range(1000):
        overdue.add(key, 3600.0)
        overdue.tell(told.append, live)
    assert len(overdue) < 100
    now[0] = 3600.0
    overdue.tell(told.append, live)
    assert set(told) >= live


async def test_a_chore_that_raises_ends_neither_itself_nor_the_others() -> None:
    calls = {"bad": 0, "good": 0}

    def bad() -> None:
        calls["bad"] += 1
        raise RuntimeError("out of order")

    def good() -> None:
        calls["good"] += 1

    task = start_housekeeping(bad, good)
    try:
        async with asyncio.timeout(10):
            while calls["good"] < 2:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert calls["bad"] >= 2
