"""D's links to the prefill workers: opened on first use, shared, dropped when lost."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from contracts.errors import ServingError, TransferFailed
from contracts.handoff import (
    ChunkReady,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    PeerHello,
    ReleaseAck,
    Revoked,
)
from contracts.ids import TransferId
from kv_transfer.connector import PeerHandle
from kv_transfer.layout import KvLayout, compatible
from kv_transfer.transfer_thread import TransferThread
from rpc.peer_client import PeerLink

log = logging.getLogger(__name__)
TransferMessage = ClaimGranted | ClaimDenied | ChunkReady | FirstTokens | Revoked


@dataclass(slots=True, eq=False)
class Peer:
    """One P as this D sees it: the link, its memory, the connector's handle for it."""

    link: PeerLink
    layout: KvLayout
    handle: PeerHandle


class PeerTable:
    """All links of one D. On the event loop only.

    Messages of a transfer go to the listener that `listen` named for it; a lost link is told to
    all listeners of its transfers.
    """

    def __init__(self, hello: PeerHello, cluster_key: str, transfers: TransferThread) -> None:
        self._hello = hello
        self._layout = KvLayout.decode(hello.layout)
        self._cluster_key = cluster_key
        self._transfers = transfers
        self._opening: dict[str, asyncio.Task[Peer]] = {}
        self._listeners: dict[TransferId, Callable[[TransferMessage | None], None]] = {}
        self._transfers_of: dict[PeerLink, set[TransferId]] = {}

    async def peer(self, address: str) -> Peer:
        """The peer at `address`, opened if need be. Concurrent calls share one handshake.

        Raises:
            HandoffError, Unavailable: it does not answer or does not fit.
        """
        task = self._opening.get(address)
        if task is not None and task.done() and (_failed(task) or task.result().link.lost):
            del self._opening[address]
            task = None
        if task is None:
            task = asyncio.create_task(self._open(address), name=f"baton-peer-{address}")
            self._opening[address] = task
        return await asyncio.shield(task)

    async def _open(self, address: str) -> Peer:
        link = await PeerLink.open(
            address, hello=self._hello, cluster_key=self._cluster_key, listener=self
        )
        try:
            layout = KvLayout.decode(link.remote.layout)
            compatible(self._layout, layout)
            handle = await self._transfers.add_peer(link.remote.agent_metadata)
        except BaseException as error:
            await link.close()
            if isinstance(error, ServingError) or not isinstance(error, Exception):
                raise
            raise TransferFailed(f"the connector refuses the peer: {error}") from error
        return Peer(link, layout, handle)

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

    def on_message(self, link: PeerLink, message: TransferMessage | ReleaseAck) -> None:
        """See rpc.peer_client.PeerListener."""
        if isinstance(message, ReleaseAck):
            return
        listener = self._listeners.get(message.transfer_id)
        if listener is not None:
            listener(message)

    def on_lost(self, link: PeerLink, reason: str) -> None:
        """See rpc.peer_client.PeerListener."""
        lost = self._transfers_of.pop(link, set())
        if lost:
            log.warning("peer link lost with %d handoffs on it: %s", len(lost), reason)
        for transfer_id in lost:
            listener = self._listeners.pop(transfer_id, None)
            if listener is not None:
                listener(None)

    async def close(self) -> None:
        """Close all links."""
        tasks, self._opening = list(self._opening.values()), {}
        for task in tasks:
            if not task.done():
                task.cancel()
        for peer in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(peer, Peer):
                await peer.link.close()


def _failed(task: "asyncio.Task[Peer]") -> bool:
    return task.cancelled() or task.exception() is not None
