"""What may take long does not run on the event loop: sessions beat on it, and all requests wait.

A thread shares the interpreter with the loop, which gets its turn every few milliseconds. But one
call into C keeps it to its end, as `json.dumps` does, so these are kept short as well.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from contracts.errors import Overloaded

T = TypeVar("T")

LIGHT = 1 << 13  # a value of that weight is dealt with in a few milliseconds
_STEP = 128  # items of a list in one call into C
_TIMEOUT_S = 60.0  # for a turn in a thread, and the work itself: of the size of a request


def weight(value: Any, limit: int) -> int:
    """Characters of all texts inside a JSON value, and its parts; stops counting at `limit`."""
    total = 0
    stack = [value]
    while stack and total < limit:
        item = stack.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, Sequence):
            stack.extend(item)
    return total


def is_heavy(value: Any) -> bool:
    """Whether what has to look at all of a JSON value belongs into a thread."""
    return weight(value, LIGHT) >= LIGHT


async def apart(heavy: bool, work: Callable[[], T]) -> T:
    """Heavy work in a thread, other work at once. Raises as `in_thread`."""
    return await in_thread(work) if heavy else work()


async def in_thread(work: Callable[[], T]) -> T:
    """Do it in a thread.

    Raises:
        Overloaded: not within a minute. Work that has begun goes on, unheeded.
    """
    job = asyncio.create_task(asyncio.to_thread(work))
    try:
        done, _ = await asyncio.wait({job}, timeout=_TIMEOUT_S)
        if not done:
            raise Overloaded("the server is too busy for a request of that size")
        return job.result()
    finally:
        job.cancel()


def dumps(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def dumps_in_steps(value: Any) -> str:
    """The same text; to be called in a thread, for the loop gets its turn between the steps."""
    return "".join(_steps(value))


def _steps(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        before = "{"
        for key, inner in value.items():
            yield f"{before}{dumps(key)}:"
            yield from _steps(inner)
            before = ","
        yield "}"
    elif isinstance(value, list) and value:
        before = "["
        for start in range(0, len(value), _STEP):
            part = value[start : start + _STEP]
            # A short list may hold long ones; the entries of a long one are short.
            inner = dumps(part)[1:-1] if len(value) > _STEP else ",".join(map(dumps_in_steps, part))
            yield before + inner
            before = ","
        yield "]"
    else:
        yield dumps(value)
