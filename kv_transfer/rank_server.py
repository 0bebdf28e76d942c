"""The other end of kv_transfer.rank_remote: a TransferThread in a rank's own process, served."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict

from contracts.errors import EngineFailure
from contracts.memory import KvMemory
from kv_transfer.connector import KvConnector, PeerHandle
from kv_transfer.flight import ReadResult
from kv_transfer.local import registered
from kv_transfer.nixl import NixlConnector
from kv_transfer.rank_frames import Frame, read_of, receive
from kv_transfer.transfer_thread import TransferThread

log = logging.getLogger(__name__)

RANK_SERVICE = "kv_transfer.rank_server:run"  # what each further rank's process is to run


def run(channel: socket.socket, memory: KvMemory, rank: int) -> None:
    """Serve `memory` of this process, which is that rank's, until rank 0 closes the channel.

    Blocks: it is to run in a thread beside the rank's own work.
    """
    try:
        asyncio.run(serve(channel, memory))
    except Exception:  # rank 0 sees the channel close
        log.exception("rank %d can transfer no KV any more", rank)


async def serve(
    channel: socket.socket,
    memory: KvMemory,
    make_connector: Callable[[str], KvConnector] = NixlConnector,
) -> None:
    """What the thread does. Returns when rank 0 has asked for it, or is gone."""
    reader, writer = await asyncio.open_unix_connection(sock=channel)
    server = _Server(memory, make_connector, writer)
    try:
        while await server.answer(await receive(reader)):
            pass
    except (EOFError, OSError):
        log.info("rank 0 has closed the channel")
    finally:
        await server.close()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class _Server:
    def __init__(
        self,
        memory: KvMemory,
        make_connector: Callable[[str], KvConnector],
        writer: asyncio.StreamWriter,
    ) -> None:
        self._memory = memory
        self._make_connector = make_connector
        self._writer = writer
        self._thread: TransferThread | None = None
        self._loop = asyncio.get_running_loop()

    async def answer(self, frame: Frame) -> bool:
        """Do what is asked; whether to go on."""
        head, ask = frame.head, str(frame.head["ask"])
        if ask == "read":
            self._read(frame)
            return True
        try:
            fields, body = await self._do(ask, head, frame.body)
        except Exception as error:
            self._send({"number": head["number"], "error": str(error) or repr(error)})
            return True
        self._send({"number": head["number"], **fields}, body)
        return ask != "close"

    async def _do(
        self, ask: str, head: dict[str, str], body: bytes
    ) -> tuple[dict[str, str], bytes]:
        if ask == "open":
            name = head["name"]
            self._thread = await TransferThread(lambda: self._make_connector(name)).start()
            await self._thread.register(*registered(self._memory))
            return {}, await self._thread.agent_metadata()
        assert self._thread is not None
        if ask == "add":
            return {"name": (await self._thread.add_peer(body)).name}, b""
        if ask == "remove":
            await self._thread.remove_peer(PeerHandle(head["name"]))
        elif ask == "close":
            await self.close()
        else:
            raise ValueError(f"nobody knows what {ask} is")
        return {}, b""

    def _read(self, frame: Frame) -> None:
        assert self._thread is not None
        number = frame.head["number"]

        def ended(future: Future[ReadResult]) -> None:
            self._loop.call_soon_threadsafe(self._ended, number, future.result())

        self._thread.submit(read_of(frame)).add_done_callback(ended)

    def _ended(self, number: int, result: ReadResult) -> None:
        self._send({"number": number, "result": asdict(result)})
        if not result.ok and self._thread is not None:
            try:
                self._thread.assert_pulse()
            except EngineFailure as error:
                self._send({"fault": str(error)})

    async def close(self) -> None:
        """End the connector; then nothing lands here any more, and all reads have answers."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            if not await thread.close():
                raise RuntimeError("the connector does not close in time")
            await asyncio.sleep(0)  # what the thread has told the loop before it ended

    def _send(self, head: dict[str, object], body: bytes = b"") -> None:
        if not self._writer.is_closing():
            self._writer.write(Frame(head, body).encode())
