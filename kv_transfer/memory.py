"""A connector inside one process: memory copies between registered regions.

It keeps the contract of kv_transfer.connector, and lets a test hold reads back: a held read
is posted and PENDING, and its bytes land when the test says so, however late, as with NIXL.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from contracts.errors import TransferFailed
from kv_transfer.connector import PeerHandle, ReadHandle, ReadState, RegionKind, check_bounds
from kv_transfer.layout import MemoryRegion, Region


class MemoryHub:
    """What connects the connectors of one process: who is reachable, what is held back.

    Thread-safe. Tests drive `hold`, `land`, `fail` and `disconnect`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[str, MemoryConnector] = {}
        self._posted: list[_Read] = []
        self._hold = False

    def hold(self) -> None:
        """Keep every read posted from now on PENDING until `land`, `fail` or `disconnect`."""
        with self._lock:
            self._hold = True

    def land(self, *, hold: bool = False) -> None:
        """Let all held reads copy and be DONE; `hold` those that come after, or no more."""
        with self._lock:
            self._hold = hold
            self._settle(self._posted, ReadState.DONE)

    def fail(self) -> None:
        """Let all held reads be FAILED without a copy, and hold no more."""
        with self._lock:
            self._hold = False
            self._settle(self._posted, ReadState.FAILED)

    def disconnect(self, name: str) -> None:
        """The connector `name` is dead: pending and later reads from it are FAILED."""
        with self._lock:
            self._members.pop(name, None)
            held = [read for read in self._posted if read.handle.peer.name == name]
            self._settle(held, ReadState.FAILED)

    @property
    def num_held(self) -> int:
        """Reads that are posted and not over."""
        with self._lock:
            return len(self._posted)

    def join(self, connector: "MemoryConnector") -> None:
        """Make a connector reachable."""
        with self._lock:
            if connector.name in self._members:
                raise ValueError(f"connector name {connector.name} is taken")
            self._members[connector.name] = connector

    def leave(self, connector: "MemoryConnector") -> None:
        """Forget a connector; its own pending reads are FAILED and will never land."""
        with self._lock:
            if self._members.get(connector.name) is connector:
                del self._members[connector.name]
            mine = [read for read in self._posted if read.reader is connector]
            self._settle(mine, ReadState.FAILED)

    def post(self, read: "_Read") -> None:
        """Copy at once, or keep the read if reads are held."""
        with self._lock:
            source = self._members.get(read.handle.peer.name)
            if source is None or not source.exports(read.remote):
                read.state = ReadState.FAILED
                return
            self._posted.append(read)
            if not self._hold:
                self._settle([read], ReadState.DONE)

    def _settle(self, reads: Sequence["_Read"], state: ReadState) -> None:
        for read in list(reads):
            if state is ReadState.DONE:
                for region in read.regions:
                    ctypes.memmove(
                        read.local.address + region.dst_offset,
                        read.remote.address + region.src_offset,
                        region.length,
                    )
            read.state = state
            self._posted.remove(read)


class MemoryConnector:
    """See KvConnector. `name` must be unique on the hub."""

    def __init__(self, name: str, hub: MemoryHub) -> None:
        self.name = name
        self._hub = hub
        self._own: dict[RegionKind, MemoryRegion] = {}
        self._peers: set[PeerHandle] = set()
        self._reads: dict[ReadHandle, _Read] = {}
        self._closed = False
        hub.join(self)

    def register(self, kv: MemoryRegion, words: MemoryRegion) -> None:
        """See KvConnector."""
        if self._own:
            raise ValueError("memory is registered already")
        self._own = {"kv": kv, "words": words}

    def exports(self, region: MemoryRegion) -> bool:
        """Whether `region` lies within registered memory."""
        return any(
            own.address <= region.address
            and region.address + region.num_bytes <= own.address + own.num_bytes
            for own in self._own.values()
        )

    def agent_metadata(self) -> bytes:
        """See KvConnector."""
        return b"memory:" + self.name.encode()

    def add_peer(self, metadata: bytes) -> PeerHandle:
        """See KvConnector."""
        prefix, _, name = metadata.partition(b":")
        if prefix != b"memory" or not name:
            raise TransferFailed("the peer's agent metadata is not readable")
        peer = PeerHandle(name.decode())
        self._peers.add(peer)
        return peer

    def remove_peer(self, peer: PeerHandle) -> None:
        """See KvConnector."""
        pending = sum(
            read.handle.peer == peer and not read.state.terminal for read in self._reads.values()
        )
        if pending:
            raise TransferFailed(f"{pending} reads from the peer are pending")
        self._peers.discard(peer)

    def post_read(
        self, peer: PeerHandle, kind: RegionKind, regions: Sequence[Region], remote: MemoryRegion
    ) -> ReadHandle:
        """See KvConnector."""
        if kind not in self._own:
            raise ValueError("no memory is registered")
        local = self._own[kind]
        num_bytes = check_bounds(regions, local, remote)
        handle = ReadHandle(peer, num_bytes, len(regions))
        read = _Read(handle, self, tuple(regions), local, remote)
        self._reads[handle] = read
        if peer in self._peers and not self._closed:
            self._hub.post(read)
        else:
            read.state = ReadState.FAILED
        return handle

    def poll(self, handle: ReadHandle) -> ReadState:
        """See KvConnector."""
        return self._reads[handle].state

    def release(self, handle: ReadHandle) -> None:
        """See KvConnector."""
        read = self._reads.get(handle)
        if read is None:
            return
        if not read.state.terminal:
            raise RuntimeError("a pending read cannot be released (Q1)")
        del self._reads[handle]

    def close(self) -> None:
        """See KvConnector."""
        self._closed = True
        self._hub.leave(self)


@dataclass(slots=True, eq=False)
class _Read:
    """`state` leaves PENDING once, under the hub's lock, after the bytes are copied."""

    handle: ReadHandle
    reader: MemoryConnector
    regions: tuple[Region, ...]
    local: MemoryRegion
    remote: MemoryRegion
    state: ReadState = field(default=ReadState.PENDING)
