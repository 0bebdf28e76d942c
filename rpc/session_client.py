"""The router's end of a session: one stream to one worker, frames instead of calls."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from contracts.errors import InvalidRequest, Overloaded, Unavailable
from contracts.events import WorkerEvent, WorkerLoad
from contracts.ids import RequestId, WorkerId
from contracts.request import GenerationRequest
from contracts.worker import WorkerAddress, WorkerInfo
from rpc.backlog import Backlog, packed
from rpc.convert import event_from_pb, info_from_pb, load_from_pb, submit_to_pb
from rpc.dial import Dialled, dial
from rpc.duplex import Duplex
from rpc.frames import FRAME_PAYLOAD_BYTES, FrameReader, FrameWriter
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerStub
from rpc.wire import MAX_MESSAGE_BYTES, MISSED_BEATS, PROTOCOL_VERSION, SESSION_BEAT_S

_log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0  # the call and the connection end within their own, shorter ones

_Call = Dialled[pb.WorkerFrame, pb.RouterFrame]
_Message = pb.Submit | pb.Adopt | pb.Abort


class SessionListener(Protocol):
    """Who hears what a worker says. Called on the event-loop thread; must not block.

    An exception out of `on_events` or `on_load` is logged and ends the session: what it should
    have said to clients is lost, so its requests must be replayed.
    """

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        """The events of one frame, in order."""

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        """The worker's load: with each frame, after its events, and with each beat."""

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        """The session is over, by loss or by `close`. Exactly once, the last call; see S2."""


@dataclass(frozen=True, slots=True)
class _Outgoing:
    kind: str  # the field of RouterFrame that carries it
    message: _Message


class WorkerSession:
    """An open session. Made by `open` only; never resumed (S2): open another, with a new epoch."""

    def __init__(
        self, call: _Call, info: WorkerInfo, listener: SessionListener, beat_s: float, missed: int
    ) -> None:
        self.info = info
        self._call = call
        self._listener = listener
        self._backlog = Backlog[_Outgoing]()
        self._writer = FrameWriter()
        self._reader = FrameReader()
        self._duplex = Duplex[pb.WorkerFrame, pb.RouterFrame](
            f"session with {info.worker_id}",
            read=call.call.read,
            write=call.call.write,
            receive=self._receive,
            frames=self._frames,
            beat_s=beat_s,
            missed=missed,
        )
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        address: WorkerAddress,
        *,
        router_id: str,
        incarnation: int,
        epoch: int,
        cluster_key: str,
        listener: SessionListener,
        timeout_s: float = 5.0,
        beat_s: float = SESSION_BEAT_S,
        missed: int = MISSED_BEATS,
    ) -> "WorkerSession":
        """Open the session; returns after both hellos.

        A session with the same `router_id` and a higher epoch (or another incarnation) ends the
        older one at the worker. `address.worker_id` and `.incarnation` are checked against what
        the worker says, unless empty and 0.

        Raises:
            Unavailable: no answer within `timeout_s`, or a refusal; the message says why.
        """
        hello = pb.RouterHello(
            router_id=router_id,
            incarnation=incarnation,
            epoch=epoch,
            protocol_version=PROTOCOL_VERSION,
        )
        call, first = await dial(
            f"worker {address.worker_id}",
            address.address,
            lambda channel: WorkerStub(channel).Session,
            pb.RouterFrame(hello=hello),
            cluster_key=cluster_key,
            timeout_s=timeout_s,
        )
        try:
            info = _checked_info(first, address, epoch)
            session = cls(call, info, listener, beat_s, missed)
            # The hellos were number 0 of each direction.
            session._reader.accept(first)
            list(session._writer.numbered(pb.RouterFrame()))
        except InvalidRequest as error:
            await call.hang_up()
            raise Unavailable(f"worker {address.worker_id} at {address.address}: {error}") from None
        except BaseException:
            await call.hang_up()
            raise
        session._task = asyncio.create_task(session._run(), name=f"session {info.worker_id}")
        return session

    @property
    def lost(self) -> bool:
        """Whether the session is over."""
        return self._duplex.ended

    def submit(self, request: GenerationRequest, *, handoff: bool) -> None:
        """Give the worker a request; its answers come as events.

        Args:
            request: all of it.
            handoff: P exports the KV and answers with `kv_transfer_params`.

        Raises:
            Unavailable: the session is lost.
            Overloaded: too much waits to be written. The other half of the room is for aborts.
            InvalidRequest: the request is longer than a session carries (32 MiB).
        """
        self._give("submits", submit_to_pb(request, handoff=handoff))

    def adopt(self, request: GenerationRequest, kv_transfer_params: str) -> None:
        """Give D a request whose KV a P computes. Raises as `submit`."""
        submit = submit_to_pb(request, handoff=False)
        self._give("adopts", pb.Adopt(submit=submit, kv_transfer_params=kv_transfer_params))

    def abort(self, request_id: RequestId, attempt: int) -> None:
        """Ask the worker to stop that attempt. Never raises: a lost session aborts anyway."""
        try:
            message = pb.Abort(request_id=request_id, attempt=attempt)
            self._send("aborts", message, message.ByteSize() + 8)
        except Unavailable:
            _log.debug("abort of %s after the session's end", request_id)

    async def close(self) -> None:
        """End the session; the worker aborts its requests. Idempotent, bounded."""
        self._duplex.end("closed by this router")
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)
            if late:
                _log.error("the session with worker %s does not end", self.info.worker_id)

    def _give(self, kind: str, message: pb.Submit | pb.Adopt) -> None:
        """Send a request, if there is room for it."""
        num_bytes = message.ByteSize() + 8  # its tag and length
        if num_bytes > MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"a request of {num_bytes} bytes is too long for a session")
        if len(self._backlog) and self._backlog.is_half_full(num_bytes):
            raise Overloaded(f"worker {self.info.worker_id} does not keep up with what it is sent")
        self._send(kind, message, num_bytes)

    def _send(self, kind: str, message: _Message, num_bytes: int) -> None:
        if self._duplex.ended:
            raise Unavailable(f"the session with worker {self.info.worker_id} is lost")
        try:
            self._backlog.add(_Outgoing(kind, message), num_bytes)
        except Unavailable as error:
            self._duplex.end(str(error))
            raise
        self._duplex.wake()

    def _frames(self, beat: bool) -> Iterator[pb.RouterFrame]:
        items, sizes = self._backlog.take()
        for run in packed(items, sizes, FRAME_PAYLOAD_BYTES):
            frame = pb.RouterFrame()
            for item in run:
                getattr(frame, item.kind).append(item.message)
            yield from self._writer.numbered(frame)
        if beat and not items:
            yield from self._writer.numbered(pb.RouterFrame())

    def _receive(self, frame: pb.WorkerFrame) -> None:
        whole = self._reader.accept(frame)
        if whole is None:
            return
        events = [event for event in map(event_from_pb, whole.events) if event is not None]
        if events:
            self._listener.on_events(self.info.worker_id, events)
        if whole.HasField("load"):
            self._listener.on_load(self.info.worker_id, load_from_pb(whole.load))

    async def _run(self) -> None:
        reason = "cancelled"
        try:
            reason = await self._call.explain(await self._duplex.run())
        finally:
            _log.info("session with worker %s is over: %s", self.info.worker_id, reason)
            try:
                self._listener.on_lost(self.info.worker_id, reason)
            except Exception:
                _log.exception("on_lost for worker %s", self.info.worker_id)
            await self._call.hang_up()


def _checked_info(first: pb.WorkerFrame, address: WorkerAddress, epoch: int) -> WorkerInfo:
    """What the worker's hello says, if it is the worker that was meant.

    Raises:
        InvalidRequest: it is not, or it speaks another version of the protocol.
    """
    if not first.HasField("hello"):
        raise InvalidRequest("its first message is no hello")
    hello = first.hello
    if hello.protocol_version != PROTOCOL_VERSION:
        raise InvalidRequest(
            f"it speaks protocol version {hello.protocol_version}, this router {PROTOCOL_VERSION}"
        )
    info = info_from_pb(hello)
    if hello.epoch != epoch:
        raise InvalidRequest(f"it answers for epoch {hello.epoch}, this is {epoch}")
    if address.worker_id and info.worker_id != address.worker_id:
        raise InvalidRequest(f"worker {info.worker_id} answers there")
    if address.incarnation and info.incarnation != address.incarnation:
        raise InvalidRequest(
            f"incarnation {info.incarnation} answers, {address.incarnation} was meant: it restarted"
        )
    return info
