"""D's end of a peer link: claims and releases up, grants, readiness and first tokens down."""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from contracts.errors import InvalidRequest, Unavailable
from contracts.handoff import (
    Beat,
    ChunkReady,
    Claim,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    PeerHello,
    Reading,
    Release,
    ReleaseAck,
    Revoked,
)
from rpc.backlog import Backlog
from rpc.convert_peer import decode_frame, from_prefill_frame
from rpc.dial import Dialled, dial
from rpc.duplex import Duplex
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import PeerStub
from rpc.wire import MISSED_BEATS, PEER_BEAT_S

_log = logging.getLogger(__name__)

_Call = Dialled[pb.PrefillFrame, pb.DecodeFrame]
_Message = ClaimGranted | ClaimDenied | ChunkReady | FirstTokens | Revoked | ReleaseAck


class PeerListener(Protocol):
    """Who hears what a P says. Called on the event-loop thread; must not block.

    An exception out of `on_message` is logged and ends the link.
    """

    def on_message(self, link: "PeerLink", message: _Message) -> None:
        """One message, in the order in which P sent them."""

    def on_lost(self, link: "PeerLink", reason: str) -> None:
        """The link is over, by loss or by `close`. Exactly once, the last call (L3)."""


class PeerLink:
    """An open link to one P. Made by `open` only.

    `acknowledged_at` is the time.monotonic() at which the last beat that P has echoed was sent
    (at first: the hello). P renewed this link's claims at that time or later (L1, L2).
    """

    def __init__(
        self,
        address: str,
        call: _Call,
        remote: PeerHello,
        listener: PeerListener,
        hello_sent_at: float,
        beat_s: float,
        missed: int,
    ) -> None:
        self.remote = remote
        self.acknowledged_at = hello_sent_at
        self._address = address
        self._call = call
        self._listener = listener
        self._backlog = Backlog[Claim | Reading | Release]()
        self._beats = 0
        self._sent_at: dict[int, float] = {}  # of beats that P has not echoed yet
        self._duplex = Duplex[pb.PrefillFrame, pb.DecodeFrame](
            f"peer link to {address}",
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
        address: str,
        *,
        hello: PeerHello,
        cluster_key: str,
        listener: PeerListener,
        beat_s: float = PEER_BEAT_S,
        timeout_s: float = 5.0,
        missed: int = MISSED_BEATS,
    ) -> "PeerLink":
        """Open a link; returns after both hellos.

        Args:
            address: host:port of P's gRPC server.
            hello: D's; P refuses another protocol version, and what its service refuses.
            cluster_key: the same as P's.
            listener: hears what P says.
            beat_s: seconds between beats.
            timeout_s: for the hellos.
            missed: silent beats after which P counts as lost.

        Raises:
            ClaimRefused: P does not want this D (semantic hash or layout).
            Unavailable: no answer within `timeout_s`, or any other refusal.
        """
        sent_at = time.monotonic()
        call, first = await dial(
            "prefill worker",
            address,
            lambda channel: PeerStub(channel).Link,
            decode_frame(hello),
            cluster_key=cluster_key,
            timeout_s=timeout_s,
        )
        try:
            remote = _checked_hello(first, hello)
            link = cls(address, call, remote, listener, sent_at, beat_s, missed)
        except InvalidRequest as error:
            await call.hang_up()
            raise Unavailable(f"prefill worker at {address}: {error}") from None
        except BaseException:
            await call.hang_up()
            raise
        link._task = asyncio.create_task(link._run(), name=f"peer link {address}")
        return link

    @property
    def lost(self) -> bool:
        """Whether the link is over."""
        return self._duplex.ended

    def send(self, message: Claim | Reading | Release) -> None:
        """Send in order. Never raises: after the loss, messages are dropped."""
        if self._duplex.ended:
            return
        try:
            self._backlog.add(message, 256)
        except Unavailable as error:
            self._duplex.end(str(error))
        self._duplex.wake()

    async def close(self) -> None:
        """End the link; P's leases run out unless released before. Idempotent, bounded."""
        self._duplex.end("closed by this decode worker")
        if self._task is not None:
            await asyncio.wait([self._task])

    def _frames(self, beat: bool) -> Iterator[pb.DecodeFrame]:
        if beat:
            self._beats += 1
            # Taken before the write, so never later than P's renewal: the lease counts from here.
            self._sent_at[self._beats] = time.monotonic()
            yield decode_frame(Beat(self._beats))
        messages, _ = self._backlog.take()
        for message in messages:
            yield decode_frame(message)

    def _receive(self, frame: pb.PrefillFrame) -> None:
        message = from_prefill_frame(frame)
        match message:
            case None:
                return
            case PeerHello():
                raise InvalidRequest("a second hello")
            case Beat():
                self._acknowledge(message.sequence)
            case _:
                self._listener.on_message(self, message)

    def _acknowledge(self, sequence: int) -> None:
        sent_at = self._sent_at.get(sequence)
        if sent_at is None:
            raise InvalidRequest(f"beat {sequence} was echoed but not sent, or twice")
        self.acknowledged_at = sent_at
        # Echoes come in order, so the older ones are over too.
        for older in [known for known in self._sent_at if known <= sequence]:
            del self._sent_at[older]

    async def _run(self) -> None:
        reason = "cancelled"
        try:
            reason = await self._call.explain(await self._duplex.run())
        finally:
            _log.info("peer link to %s is over: %s", self._address, reason)
            try:
                self._listener.on_lost(self, reason)
            except Exception:
                _log.exception("on_lost for the peer link to %s", self._address)
            await self._call.hang_up()


def _checked_hello(first: pb.PrefillFrame, hello: PeerHello) -> PeerHello:
    remote = from_prefill_frame(first)
    if not isinstance(remote, PeerHello):
        raise InvalidRequest("its first message is no hello")
    if remote.protocol_version != hello.protocol_version:
        raise InvalidRequest(
            f"it speaks protocol version {remote.protocol_version}, "
            f"this worker {hello.protocol_version}"
        )
    return remote
