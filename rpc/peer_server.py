"""P's end of peer links: one stream per D. Grants are answers, the rest is announced."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any, Protocol

from grpc import aio

from contracts.errors import (
    ConfigurationError,
    EngineFailure,
    InvalidRequest,
    ServingError,
    Unavailable,
)
from contracts.handoff import (
    Beat,
    Claim,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    FromPrefill,
    PeerHello,
    Reading,
    Release,
    ReleaseAck,
)
from contracts.ids import TransferId
from rpc.backlog import Backlog
from rpc.convert_peer import from_decode_frame, prefill_frame
from rpc.duplex import Duplex
from rpc.errors import abort_with, kind_of
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import PeerServicer as GeneratedPeerServicer
from rpc.served import Served
from rpc.wire import MISSED_BEATS, PEER_BEAT_S

_log = logging.getLogger(__name__)

_Context = aio.ServicerContext[pb.DecodeFrame, pb.PrefillFrame]


class PeerSink(Protocol):
    """Where a P puts what one D must know."""

    def send(self, message: FromPrefill) -> None:
        """Send in order. Event-loop thread only. Silently drops after the loss of the link."""


class PeerService(Protocol):
    """What a P does for Ds. Called on the event-loop thread; must not block."""

    @property
    def hello(self) -> PeerHello:
        """P's hello: with its agent metadata, so only for authenticated peers (C4)."""

    def peer_opened(self, remote: PeerHello, link: PeerSink) -> None:
        """A D said hello. Raise ClaimRefused to refuse it."""

    def claim(self, claim: Claim, link: PeerSink) -> ClaimGranted:
        """Answer a claim. A ServingError becomes ClaimDenied with its class's name."""

    def reading(self, transfer_id: TransferId, link: PeerSink) -> None:
        """D has begun to read that transfer; unknown ones are ignored."""

    def release(self, release: Release, link: PeerSink) -> None:
        """Free that transfer's blocks; unknown ones too. ReleaseAck is sent when this returns."""

    def beat(self, link: PeerSink) -> None:
        """Renew that link's claims (L2)."""

    def peer_lost(self, link: PeerSink) -> None:
        """The link is over. Exactly once per link that `peer_opened` took, the last call."""


class DecodePeer:
    """One link of one D; also its PeerSink."""

    def __init__(
        self, service: PeerService, remote: PeerHello, context: _Context, beat_s: float, missed: int
    ) -> None:
        self.remote = remote
        self._service = service
        self._backlog = Backlog[FromPrefill]()
        self.duplex = Duplex[pb.DecodeFrame, pb.PrefillFrame](
            f"peer link of {remote.incarnation}",
            read=context.read,
            write=context.write,
            receive=self._receive,
            frames=self._frames,
            beat_s=beat_s,
            missed=missed,
        )

    def send(self, message: FromPrefill) -> None:
        """See PeerSink."""
        if self.duplex.ended:
            return
        try:
            self._backlog.add(message, _message_bytes(message))
        except Unavailable as error:
            self.duplex.end(str(error))
        self.duplex.wake()

    def _frames(self, _beat: bool) -> Iterator[pb.PrefillFrame]:
        messages, _ = self._backlog.take()
        return map(prefill_frame, messages)  # P beats only by echo: D measures its lease by it

    def _receive(self, frame: pb.DecodeFrame) -> None:
        message = from_decode_frame(frame)
        match message:
            case None:
                return
            case PeerHello():
                raise InvalidRequest("a second hello")
            case Beat():
                try:
                    self._service.beat(self)
                except Exception:
                    _log.exception("renewing the leases of a link")
                    return  # no echo: D must not count on what did not happen
                self.send(message)
            case Claim():
                self.send(self._claim(message))
            case Reading():
                self._service.reading(message.transfer_id, self)
            case Release():
                try:
                    self._service.release(message, self)
                except Exception:
                    _log.exception("release of transfer %s", message.transfer_id)
                    return  # D repeats it
                self.send(ReleaseAck(message.transfer_id))

    def _claim(self, claim: Claim) -> ClaimGranted | ClaimDenied:
        try:
            return self._service.claim(claim, self)
        except ServingError as error:
            return ClaimDenied(claim.transfer_id, kind_of(error), str(error))
        except Exception as error:
            _log.exception("claim of transfer %s", claim.transfer_id)
            return ClaimDenied(
                claim.transfer_id, EngineFailure.__name__, f"{type(error).__name__} in the claim"
            )


class PeerServicer(GeneratedPeerServicer):
    """The Peer service: decode, one call, encode."""

    def __init__(
        self,
        service: PeerService,
        *,
        beat_s: float = PEER_BEAT_S,
        missed: int = MISSED_BEATS,
        hello_timeout_s: float = 5.0,
    ) -> None:
        self._service = service
        self._beat_s = beat_s
        self._missed = missed
        self._hello_timeout_s = hello_timeout_s
        self._served = Served[DecodePeer]()

    async def Link(  # type: ignore[override]  # the reader-writer API
        self, request_iterator: Any, context: _Context
    ) -> None:
        """Serve one link until its end."""
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first: Any = await context.read()
            peer = self._admit(first, context)
            self._service.peer_opened(peer.remote, peer)
        except TimeoutError:
            await abort_with(context, Unavailable("no hello came"))
        except ServingError as error:
            await abort_with(context, error)
        reason = "the decode worker is gone"
        with self._served.serving(peer):
            try:
                async with asyncio.timeout(self._hello_timeout_s):
                    await context.write(prefill_frame(self._service.hello))
                reason = await peer.duplex.run()
            except TimeoutError:
                reason = "the hello was not taken in time"
            except (ServingError, aio.BaseError) as error:
                reason = str(error)
            finally:
                self._leave(peer, reason)
        if not self._served.closing:
            await abort_with(context, Unavailable(reason))

    async def close(self, grace_s: float) -> None:
        """End all links, once what they have gathered is written or `grace_s` has passed."""
        await self._served.close(grace_s, "the worker stops")

    def _admit(self, first: Any, context: _Context) -> DecodePeer:
        if self._served.closing:
            raise Unavailable("the worker stops")
        remote = None if first is aio.EOF else from_decode_frame(first)
        if not isinstance(remote, PeerHello):
            raise InvalidRequest("the first message is no hello")
        version = self._service.hello.protocol_version
        if remote.protocol_version != version:
            raise ConfigurationError(
                f"this worker speaks protocol version {version}, "
                f"the decode worker {remote.protocol_version}"
            )
        return DecodePeer(self._service, remote, context, self._beat_s, self._missed)

    def _leave(self, peer: DecodePeer, reason: str) -> None:
        peer.duplex.end(reason)
        _log.info("peer link of %s is over: %s", peer.remote.incarnation, reason)
        try:
            self._service.peer_lost(peer)
        except Exception:
            _log.exception("peer_lost of %s", peer.remote.incarnation)


def _message_bytes(message: FromPrefill) -> int:
    """About the message's length on the wire."""
    if isinstance(message, ClaimGranted):
        return 256 + 12 * len(message.block_ids)
    if isinstance(message, FirstTokens):
        return 256 + 256 * len(message.tokens)
    return 256
