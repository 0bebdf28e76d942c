"""One bidirectional stream after its hellos: a reader, a writer, and a watch on the other side.

Both ends of sessions and of peer links run on this. At most one write is in flight; whoever has
something to say gathers it and calls `wake` (S4). The other side is lost after `missed` silent
beats (S3). Whatever happens first ends the stream, and its reason is kept.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

from grpc import aio

from contracts.errors import ServingError
from rpc.errors import error_of_call

_log = logging.getLogger(__name__)

_STUCK_BEATS = 40  # one write: it beats, so it is not lost, but it does not read

In = TypeVar("In")
Out = TypeVar("Out")


class Duplex(Generic[In, Out]):
    """Runs one stream from its hellos to its end. Never started twice.

    Args:
        name: for the log.
        read: the next frame, or grpc.aio.EOF.
        write: returns when gRPC's window has taken the frame.
        receive: called with each frame; what it raises ends the stream.
        frames: what is to be written now. Its argument says whether a beat is due.
        beat_s: seconds between beats, ours and the other side's.
        missed: silent beats after which the other side is lost.
    """

    def __init__(
        self,
        name: str,
        *,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[Out], Awaitable[None]],
        receive: Callable[[In], None],
        frames: Callable[[bool], Iterable[Out]],
        beat_s: float,
        missed: int,
    ) -> None:
        self._name = name
        self._do_read = read
        self._do_write = write
        self._receive = receive
        self._frames = frames
        self._beat_s = beat_s
        self._missed = missed
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._wake = asyncio.Event()
        self._beat_due = True  # the first frame after the hello tells the load
        self._finishing: str | None = None
        self._silent_beats = 0
        self._writing_beats: int | None = None  # for how many beats a write has been in flight

    @property
    def ended(self) -> bool:
        """Whether the stream is over (its tasks may still be on their way out)."""
        return self._ended.done()

    def wake(self) -> None:
        """There is something to write. Event-loop thread only."""
        assert asyncio.get_running_loop() is self._loop
        self._wake.set()

    def end(self, reason: str) -> None:
        """End the stream now; what is not written is dropped. The first reason stays."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def finish(self, reason: str) -> None:
        """End the stream once all that is gathered is written."""
        self._finishing = reason
        self._wake.set()

    async def run(self) -> str:
        """Until the end of the stream; returns the reason. All its tasks are over then."""
        tasks = [
            asyncio.create_task(self._guarded(work), name=f"{self._name} {work.__name__}")
            for work in (self._read, self._write, self._watch)
        ]
        try:
            return await self._ended
        finally:
            self.end("cancelled")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del self._do_read, self._do_write  # grpc keeps the connection for whoever has them

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except aio.AioRpcError as error:
            self.end(str(error_of_call(error)))
        except ServingError as error:
            self.end(str(error))
        except (aio.BaseError, asyncio.InvalidStateError):
            self.end("the stream broke")
        except Exception as error:
            _log.exception("%s: closing the stream", self._name)
            self.end(f"internal error: {type(error).__name__}: {error}")

    async def _read(self) -> None:
        while True:
            frame = await self._do_read()
            if frame is aio.EOF:
                self.end("the other side closed the stream")
                return
            self._silent_beats = 0
            if self._ended.done():
                return
            self._receive(frame)

    async def _write(self) -> None:
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            beat, self._beat_due = self._beat_due, False
            for frame in self._frames(beat):
                self._writing_beats = 0
                await self._do_write(frame)
            self._writing_beats = None
            if self._finishing is not None and not self._wake.is_set():
                self.end(self._finishing)
                return

    async def _watch(self) -> None:
        # Counts beats instead of comparing clocks: if this very process stands still for a while,
        # one beat passes for it, and what arrived meanwhile is read before the next.
        while self._silent_beats <= self._missed:
            await asyncio.sleep(self._beat_s)
            self._silent_beats += 1
            self._beat_due = True
            self._wake.set()
            if self._writing_beats is not None:
                self._writing_beats += 1
                if self._writing_beats > _STUCK_BEATS:
                    self.end("the other side does not read")
                    return
        self.end(f"silent for {self._missed} beats of {self._beat_s * 1000:.0f} ms")
