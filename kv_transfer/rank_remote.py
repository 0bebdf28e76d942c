"""The transfers of another rank of this worker, carried out in that rank's process.

    rank 0: RemoteTransfers ──frames over a socket pair──> rank r: rank_server, TransferThread

A read that was sent counts as posted. It is terminal when the other process says so, or when that
process has ended, and its memory with it; the end of the channel alone says nothing of reads.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from concurrent.futures import Future

from contracts.errors import EngineFailure, TransferFailed
from contracts.memory import RankProcess
from kv_transfer.connector import PeerHandle, Read
from kv_transfer.flight import ReadResult, failed, running_future
from kv_transfer.rank_frames import Frame, read_frame, receive

log = logging.getLogger(__name__)

_ANSWER_S = 30.0
_ENGINE_TELLS_S = 2.0  # if a rank's process ends, its engine knows better why


class RemoteTransfers:
    """See TransferThread, whose methods these are. On the event loop only."""

    def __init__(self, process: RankProcess) -> None:
        self.rank = process.rank
        self.metadata = b""
        self._process = process
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Frame]] = {}
        self._reads: dict[int, Future[ReadResult]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._pidfd = -1
        self._fault = ""
        self._told_at = 0.0  # when the fault is for `assert_pulse`
        self._closing = False

    async def open(self, name: str, timeout_s: float = 30.0) -> None:
        """Let the rank make its connector, called `name`, and register its memory.

        Raises:
            EngineFailure: it cannot, or does not answer.
        """
        channel = self._process.channel
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
            asyncio.get_running_loop().add_reader(self._pidfd, self._died)
            reader, self._writer = await asyncio.open_unix_connection(sock=channel)
            receiving = self._receive(reader)
            self._receiving = asyncio.create_task(receiving, name="baton-rank-transfers")
            async with asyncio.timeout(timeout_s):
                answer = await self._call("open", {"name": name})
        except (TransferFailed, OSError) as error:  # a TimeoutError is an OSError
            raise EngineFailure(f"rank {self.rank} cannot transfer KV: {error}") from error
        self.metadata = answer.body

    def assert_pulse(self) -> None:
        """Raise EngineFailure if that rank can transfer nothing any more."""
        if self._fault and not self._closing and time.monotonic() >= self._told_at:
            raise EngineFailure(f"the transfers of rank {self.rank} failed: {self._fault}")

    async def add_peer(self, metadata: bytes) -> PeerHandle:
        """See KvConnector."""
        return PeerHandle((await self._call("add", {}, metadata)).head["name"])

    async def remove_peer(self, peer: PeerHandle) -> None:
        """See KvConnector."""
        await self._call("remove", {"name": peer.name})

    def submit(self, read: Read) -> Future[ReadResult]:
        """See TransferThread.submit; callbacks run on the event loop."""
        future: Future[ReadResult] = running_future()
        if self._fault or self._closing:
            future.set_result(failed(self._fault or "the connector is closed"))
            return future
        number = next(self._numbers)
        self._reads[number] = future
        self._send(read_frame(number, read))
        return future

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Let the rank close its connector; whether nothing lands there any more. Idempotent.

        Reads still in flight resolve as failed before this returns true.
        """
        ended = not self._reads
        if not self._closing and self._receiving is not None:
            self._closing = True
            with contextlib.suppress(TransferFailed, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._call("close", {})
            ended = not self._reads
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        self._closing = True
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.transport.abort()  # closing it would wait for a rank that takes nothing
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._unwatch()
        return ended

    async def _call(self, ask: str, head: dict[str, object], body: bytes = b"") -> Frame:
        """One question and its answer."""
        if self._fault:
            raise TransferFailed(self._fault)
        number = next(self._numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Frame({"ask": ask, "number": number, **head}, body))
            async with asyncio.timeout(_ANSWER_S):
                answer = await self._calls[number]
        except TimeoutError:
            self._lose(f"it has not answered in {_ANSWER_S:g} s")
            raise TransferFailed(self._fault) from None
        finally:
            del self._calls[number]
        if "error" in answer.head:
            raise TransferFailed(answer.head["error"])
        return answer

    def _send(self, frame: Frame) -> None:
        if self._writer is not None:  # of a lost channel nothing is heard: `_lose` has seen to it
            self._writer.write(frame.encode())

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._take(await receive(reader))
        except (EOFError, OSError):
            self._lose("it has closed the channel", _ENGINE_TELLS_S)
        except Exception as error:
            log.exception("rank %d: an answer that is none", self.rank)
            self._lose(f"an answer that is none: {error!r}")

    def _take(self, frame: Frame) -> None:
        head = frame.head
        if "fault" in head:
            self._lose(head["fault"])
        elif (future := self._reads.pop(head["number"], None)) is not None:
            names = ("ok", "num_bytes", "num_descriptors", "seconds", "error")
            future.set_result(ReadResult(*(head["result"][name] for name in names)))
        elif (call := self._calls.get(head["number"])) is not None and not call.done():
            call.set_result(frame)

    def _lose(self, fault: str, patience_s: float = 0.0) -> None:
        """Nothing more can be asked; what was asked is not over by that."""
        if not self._fault:
            self._fault = fault
            self._told_at = time.monotonic() + patience_s
        for call in self._calls.values():
            if not call.done():
                call.set_exception(TransferFailed(self._fault))

    def _died(self) -> None:
        """The process has ended: its memory is gone, so nothing lands in it."""
        self._unwatch()
        self._lose("its process has ended", _ENGINE_TELLS_S)
        reads, self._reads = self._reads, {}
        for future in reads.values():
            future.set_result(failed(f"rank {self.rank} has ended"))

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
