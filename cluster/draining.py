"""Ending a worker well: what runs may end, but nobody waits for an engine that is dead."""

import asyncio
from typing import Protocol

_PULSE_S = 1.0


class Drainable(Protocol):
    """What draining needs of a worker."""

    def assert_pulse(self) -> None:
        """Raises EngineFailure if the engine is dead or stuck."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and let what runs end."""
        ...


async def drain_while_alive(worker: Drainable, timeout_s: float) -> None:
    """Drain for at most `timeout_s`. Cancelling it ends the wait; admission stays off.

    What is left then is handed over when the worker closes: its sessions end, and routers replay.

    Raises:
        EngineFailure: the engine has no pulse, so what runs would never end.
    """
    draining = asyncio.create_task(worker.drain(timeout_s), name="drain")
    try:
        while not draining.done():
            await asyncio.wait({draining}, timeout=_PULSE_S)
            if not draining.done():
                worker.assert_pulse()
        draining.result()
    finally:
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
