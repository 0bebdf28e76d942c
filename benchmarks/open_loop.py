"""Sends each request at its own deadline, whatever became of those before it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.client import Recording
from benchmarks.metrics import Phase, RequestRecord
from benchmarks.schedule import PlannedRequest

Send = Callable[[Recording, float], Awaitable[None]]  # (recording, origin); must not raise


@dataclass(slots=True, eq=False)
class OpenLoop:
    """One run. Deadlines are absolute, so a late request never delays the next one.

    Args:
        send: sends one request and returns when its stream is over.
        clock: seconds, monotonic.
        sleep: waits about that long; may overshoot or undershoot.
        max_in_flight: requests beyond wait for a place; the wait counts, since latencies start
            at the intended arrival.
    """

    send: Send
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    max_in_flight: int | None = None
    recordings: list[Recording] = field(default_factory=list[Recording])
    in_flight: int = 0
    _window_sent: bool = False
    _window_unfinished: int = 0

    async def run(self, plan: Iterable[PlannedRequest], origin: float, stop: asyncio.Event) -> bool:
        """Send the plan until all requests of its window are over, or until `stop`.

        Requests that are then still under way are cancelled. The plan must go on past its window.

        Returns:
            Whether the window was completed.
        """
        places = asyncio.Semaphore(self.max_in_flight) if self.max_in_flight else None
        window_over = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._dispatch(plan, origin, places, window_over))
                waits = [group.create_task(event.wait()) for event in (stop, window_over)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in (sending, *waits):
                    task.cancel()
        finally:
            for recording in self.recordings:
                if recording.end_s is None:  # cancelled while it waited for a place
                    recording.end_s = self.clock() - origin
        return window_over.is_set()

    def records(self) -> list[RequestRecord]:
        """The raw records so far, in order of arrival."""
        return [recording.record() for recording in self.recordings]

    async def _dispatch(
        self,
        plan: Iterable[PlannedRequest],
        origin: float,
        places: asyncio.Semaphore | None,
        window_over: asyncio.Event,
    ) -> None:
        async with asyncio.TaskGroup() as group:
            for planned in plan:  # built here, ahead of its deadline
                if planned.phase is Phase.TAIL:
                    self._window_sent = True
                    self._check_window(window_over)
                while (wait_s := origin + planned.intended_s - self.clock()) > 0:
                    await self.sleep(wait_s)
                self._window_unfinished += planned.phase is Phase.WINDOW
                recording = Recording(planned)
                self.recordings.append(recording)
                group.create_task(self._one(recording, origin, places, window_over))
                await asyncio.sleep(0)  # in a burst, too, a request is sent before the next one

    async def _one(
        self,
        recording: Recording,
        origin: float,
        places: asyncio.Semaphore | None,
        window_over: asyncio.Event,
    ) -> None:
        self.in_flight += 1
        try:
            if places is None:
                await self.send(recording, origin)
            else:
                async with places:
                    await self.send(recording, origin)
        finally:
            self.in_flight -= 1
            if recording.planned.phase is Phase.WINDOW:
                self._window_unfinished -= 1
                self._check_window(window_over)

    def _check_window(self, window_over: asyncio.Event) -> None:
        if self._window_sent and self._window_unfinished == 0:
            window_over.set()
