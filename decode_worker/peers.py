"""D's links to the prefill workers: opened on first use, shared, dropped when lost."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from contracts.errors import HandoffError, ServingError, TransferFailed
from contracts.handoff import (
    ChunkReady,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    PeerHello,
    Release,
    ReleaseAck,
    Revoked,
)
from contracts.ids import TransferId
from kv_transfer.layout import KvLayout, compatible
from kv_transfer.rank_transfers import RankPeer, RankTransfers
from rpc.peer_client import PeerLink

log = logging.getLogger(__name__)
TransferMessage = ClaimGranted | ClaimDenied | ChunkReady | FirstTokens | Revoked
_REMOVE_AFTER_S = 10.0  # a lost link may come back within a lease
_REMOVE_AGAIN_S = 1.0  # while reads from the peer are pending


@dataclass(slots=True, eq=False)
class Peer:
    """One P as this D sees it: the link, and its ranks' memory."""

    link: PeerLink
    ranks: RankPeer


@dataclass(frozen=True, slots=True)
class _Unacknowledged:
    address: str
    release: Release
    until: float  # then the lease is over anyway


class PeerTable:
    """All links of one D. On the event loop only.

    Messages of a transfer go to the listener that `listen` named for it; a lost link is told to
    all listeners of its transfers.
    """

    def __init__(self, hello: PeerHello, cluster_key: str, transfers: RankTransfers) -> None:
        self._hello = hello
        self._cluster_key = cluster_key
        self._transfers = transfers
        self._opening: dict[str, asyncio.Task[Peer]] = {}
        self._listeners: dict[TransferId, Callable[[TransferMessage | None], None]] = {}
        self._transfers_of: dict[PeerLink, set[TransferId]] = {}
        self._releases: dict[TransferId, _Unacknowledged] = {}
        self._of_link: dict[PeerLink, tuple[str, Peer]] = {}
        self._closed = False
        self._removals: dict[tuple[bytes, ...], asyncio.Task[None]] = {}  # by agent metadata

    @property
    def num_open(self) -> int:
        """Links that are open now."""
        return sum(1 for address in self._opening if self._open_peer(address) is not None)

    async def peer(self, address: str) -> Peer:
        """The peer at `address`, opened if need be. Concurrent calls share one handshake.

        Raises:
            HandoffError, Unavailable: it does not answer or does not fit.
        """
        return await asyncio.shield(self._task(address))

    def _task(self, address: str) -> "asyncio.Task[Peer]":
        task = self._opening.get(address)
        if task is not None and task.done() and self._open_peer(address) is None:
            task = None
        if task is None:
            task = asyncio.create_task(self._open(address), name=f"baton-peer-{address}")
            task.add_done_callback(_look)
            self._opening[address] = task
        return task

    def _open_peer(self, address: str) -> Peer | None:
        task = self._opening.get(address)
        if task is None or not task.done() or _failed(task) or task.result().link.lost:
            return None
        return task.result()

    async def _open(self, address: str) -> Peer:
        link = await PeerLink.open(
            address, hello=self._hello, cluster_key=self._cluster_key, listener=self
        )
        metadata = link.remote.agent_metadata
        removal = self._removals.pop(metadata, None)
        if removal is not None:  # what it has begun comes before `add_peer`
            removal.cancel()
        try:
            layout = KvLayout.decode(link.remote.layout)
            compatible(self._transfers.layout, layout)
            ranks = await self._transfers.add_peer(layout, metadata)
        except BaseException as error:
            await link.close()
            if isinstance(error, ServingError) or not isinstance(error, Exception):
                raise
            raise TransferFailed(f"the connector refuses the peer: {error}") from error
        for waiting in self._waiting_releases(address):
            link.send(waiting)
        peer = Peer(link, ranks)
        if link.lost:  # and `on_lost` came or comes too early
            self._remove_later(peer)
        else:
            self._of_link[link] = (address, peer)
        return peer

    def listen(
        self,
        peer: Peer,
        transfer_id: TransferId,
        listener: Callable[[TransferMessage | None], None],
    ) -> None:
        """Route a transfer's messages to `listener`; None means that the link is lost.

        Raises:
            TransferFailed: it is lost already.
        """
        if peer.link.lost:
            raise TransferFailed("the peer link is lost")
        self._listeners[transfer_id] = listener
        self._transfers_of.setdefault(peer.link, set()).add(transfer_id)

    def forget(self, peer: Peer, transfer_id: TransferId) -> None:
        """Stop routing. Idempotent, also without `listen`."""
        self._listeners.pop(transfer_id, None)
        of_link = self._transfers_of.get(peer.link)
        if of_link is not None:
            of_link.discard(transfer_id)

    def release(self, address: str, release: Release, keep_s: float) -> None:
        """Tell the P at `address`; again over each new link, until it answers or `keep_s` (L4)."""
        self._releases[release.transfer_id] = _Unacknowledged(
            address, release, time.monotonic() + keep_s
        )
        peer = self._open_peer(address)
        if peer is not None:
            peer.link.send(release)
        else:
            self._task(address)

    def _waiting_releases(self, address: str) -> list[Release]:
        now = time.monotonic()
        self._releases = {i: r for i, r in self._releases.items() if r.until > now}
        return [r.release for r in self._releases.values() if r.address == address]

    def on_message(self, link: PeerLink, message: TransferMessage | ReleaseAck) -> None:
        """See rpc.peer_client.PeerListener."""
        if isinstance(message, ReleaseAck):
            self._releases.pop(message.transfer_id, None)
            return
        listener = self._listeners.get(message.transfer_id)
        if listener is not None:
            listener(message)

    def on_lost(self, link: PeerLink, reason: str) -> None:
        """See rpc.peer_client.PeerListener."""
        lost = self._transfers_of.pop(link, set())
        if lost:
            log.warning("peer link lost with %d handoffs on it: %s", len(lost), reason)
        address, peer = self._of_link.pop(link, ("", None))
        if peer is not None:
            self._remove_later(peer)
            if self._waiting_releases(address) and not self._closed:
                self._task(address)
        for transfer_id in lost:
            listener = self._listeners.pop(transfer_id, None)
            if listener is not None:
                listener(None)

    def _remove_later(self, peer: Peer) -> None:
        """A P that does not come back is forgotten: each restarted one is another peer."""
        metadata = peer.link.remote.agent_metadata
        if metadata not in self._removals and not self._closed:
            task = asyncio.create_task(self._remove(peer.ranks, metadata), name="baton-remove")
            self._removals[metadata] = task

    async def _remove(self, ranks: RankPeer, metadata: tuple[bytes, ...]) -> None:
        await asyncio.sleep(_REMOVE_AFTER_S)
        while True:
            try:
                await self._transfers.remove_peer(ranks)
                break
            except HandoffError:  # reads are pending, or the connector is closed with this table
                await asyncio.sleep(_REMOVE_AGAIN_S)
        if self._removals.get(metadata) is asyncio.current_task():
            del self._removals[metadata]
        for address in [a for a in self._opening if self._is_over(a)]:
            del self._opening[address]

    def _is_over(self, address: str) -> bool:
        return self._opening[address].done() and self._open_peer(address) is None

    async def close(self) -> None:
        """Close all links."""
        self._closed = True
        tasks, self._opening = list(self._opening.values()), {}
        for task in tasks:
            if not task.done():
                task.cancel()
        for peer in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(peer, Peer):
                await peer.link.close()
        removals, self._removals = list(self._removals.values()), {}
        for removal in removals:
            removal.cancel()
        await asyncio.gather(*removals, return_exceptions=True)


def _failed(task: "asyncio.Task[Peer]") -> bool:
    return task.cancelled() or task.exception() is not None


def _look(task: "asyncio.Task[Peer]") -> None:
    """At the outcome, so that one which nobody awaits is no warning."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
