import asyncio
import json
import threading
from typing import Any

import pytest

from router.offload import LIGHT, apart, dumps, dumps_in_steps, is_heavy, weight
from tests.support.fake_worker import until


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.5,
        "text é",
        {},
        [],
        {"a": {}, "b": []},
        {"a": {"b": [1, [2, {"c": "é"}]]}, "d": None},
        list(range(1000)),
        {"entries": [{"token": str(i), "top": [i] * 3} for i in range(300)]},
        [list(range(300)), {"x": list(range(129))}, "y"],
    ],
    ids=range(10),
)
def test_steps_add_up_to_the_same_text(value: Any) -> None:
    assert dumps_in_steps(value) == dumps(value)
    assert json.loads(dumps(value)) == value


def test_weight_stops_at_its_limit() -> None:
    assert weight({"ab": ["cde", 1]}, 100) == 5 + 5  # parts, the key among them, and characters
    assert weight("x" * 500, 100) >= 100
    assert not is_heavy({"messages": [{"role": "user", "content": "hi"}]})
    assert is_heavy(["x"] * LIGHT)


async def test_heavy_work_is_done_in_a_thread() -> None:
    here = threading.get_ident()
    assert await apart(False, threading.get_ident) == here
    assert await apart(True, threading.get_ident) != here
    with pytest.raises(KeyError):
        await apart(True, lambda: {"a": 1}["x"])


async def test_the_loop_goes_on_meanwhile() -> None:
    inside, may_end = threading.Event(), threading.Event()

    def work() -> bool:
        inside.set()
        return may_end.wait(20)

    task = asyncio.create_task(apart(True, work))
    await until(inside.is_set)
    may_end.set()
    assert await task
