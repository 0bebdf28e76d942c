"""Who reserves next at a D: priority, then arrival; leaving from any place lets the rest go on."""

import asyncio

from decode_worker.turns import Line


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_line_is_by_priority_then_arrival() -> None:
    line = Line()
    served: list[str] = []
    gate = asyncio.Event()

    async def stand(name: str, priority: int) -> None:
        with line.turn(priority) as turn:
            await turn.come()
            served.append(name)
            await gate.wait()

    tasks = []
    for name, priority in [("a", 5), ("b", 5), ("c", -1), ("d", 7), ("e", 0)]:
        tasks.append(asyncio.create_task(stand(name, priority)))
        await settle()
    assert served == ["a", "c"], "c came later and overtook a, which must ask again"
    gate.set()
    await asyncio.gather(*tasks)
    assert served == ["a", "c", "e", "b", "d"]


async def test_the_first_is_overtaken_until_it_leaves() -> None:
    line = Line()
    log: list[str] = []
    retry = asyncio.Event()

    async def retrying() -> None:
        with line.turn(1) as turn:
            await turn.come()
            log.append("first try")
            await retry.wait()
            await turn.come()
            log.append("second try")

    task = asyncio.create_task(retrying())
    await settle()
    with line.turn(0) as urgent:
        await urgent.come()
        retry.set()
        await settle()
        assert log == ["first try"]
    await task
    assert log == ["first try", "second try"]


async def test_leaving_wakes_the_next() -> None:
    line = Line()

    async def stand(priority: int) -> int:
        with line.turn(priority) as turn:
            await turn.come()
            return priority

    first = line.turn(0)
    with first:
        waiting = [asyncio.create_task(stand(number)) for number in (1, 2, 3)]
        await settle()
        waiting[0].cancel()
        await settle()
        assert not waiting[1].done()
    assert await asyncio.gather(*waiting[1:]) == [2, 3]
