"""The connector: what moves KV bytes between two workers' registered memory.

One thread owns a connector (kv_transfer.transfer_thread); none of its methods is thread-safe.
The two implementations, kv_transfer.nixl and kv_transfer.memory, pass the same contract tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from kv_transfer.layout import MemoryRegion, Region

RegionKind = Literal["kv", "words"]


@dataclass(frozen=True, slots=True)
class PeerHandle:
    """One added peer. `name` is the peer connector's own name, unique per process start."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class ReadHandle:
    """One posted read. Compared by identity."""

    peer: PeerHandle
    num_bytes: int
    num_descriptors: int


@dataclass(frozen=True, slots=True)
class Read:
    """One read to be posted; see `KvConnector.post_read`."""

    peer: PeerHandle
    kind: RegionKind
    regions: Sequence[Region]
    remote: MemoryRegion


class ReadState(Enum):
    """DONE and FAILED are terminal: nothing of that read writes local memory any more."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        """Whether the read is over."""
        return self is not ReadState.PENDING


class KvConnector(Protocol):
    """Reads blocks out of peers' registered memory into its own.

    A posted read cannot be cancelled (protocol notes, section 3). Its target bytes belong to
    it until `poll` says DONE or FAILED, or until `close` returns: whoever reuses them earlier
    gets them overwritten.
    """

    def register(self, kv: MemoryRegion, words: MemoryRegion) -> None:
        """Make `kv` and `words` readable by peers and writable by own reads; call it once.

        They are separate registrations, and never mixed in one request (F6). The memory must
        stay where it is until `close`. `words`: on a P its generation words; on a D the table
        in which remote words land (slot = local block id, so reads never share a slot).
        """
        ...

    def agent_metadata(self) -> bytes:
        """What a peer needs for `add_peer`; gives read access to all registered memory (C4)."""
        ...

    def add_peer(self, metadata: bytes) -> PeerHandle:
        """Make a peer readable. The same metadata again gives an equal handle and reconnects
        a peer whose reads failed.

        Raises:
            TransferFailed: the metadata is no good.
        """
        ...

    def remove_peer(self, peer: PeerHandle) -> None:
        """Forget a peer; unknown ones are ignored.

        Raises:
            TransferFailed: reads from it are pending. Removing it would not stop their bytes
                from landing, but would make their end invisible.
        """
        ...

    def post_read(
        self, peer: PeerHandle, kind: RegionKind, regions: Sequence[Region], remote: MemoryRegion
    ) -> ReadHandle:
        """Start to copy `regions` from `remote` into the own memory registered as `kind`.

        `src_offset` counts from `remote.address`, `dst_offset` from the own region's address.
        May copy in the calling thread before it returns (shared memory). A read that cannot
        be started at all is a handle that polls FAILED.

        Raises:
            ValueError: no regions, or one lies outside `remote` or the own memory; nothing
                was posted.
        """
        ...

    def poll(self, handle: ReadHandle) -> ReadState:
        """The state now. DONE: the bytes are in host-visible memory (for a GPU see F8)."""
        ...

    def release(self, handle: ReadHandle) -> None:
        """Free what a terminal read holds; released ones are ignored.

        Raises:
            RuntimeError: the read is pending (Q1); nothing was done.
        """
        ...

    def close(self) -> None:
        """End everything. After it returns, nothing posted here writes local memory any more.

        Idempotent. Call it with reads pending only as the last resort of Q2: over TCP, UCX
        may abort a frozen peer's process when that wakes up and finds the reader gone.
        """
        ...


def check_bounds(regions: Sequence[Region], local: MemoryRegion, remote: MemoryRegion) -> int:
    """Sum of the regions' bytes.

    Raises:
        ValueError: there are none, or one is empty or outside `local` or `remote`.
    """
    if not regions:
        raise ValueError("a read needs at least one region")
    for region in regions:
        if region.length <= 0 or region.src_offset < 0 or region.dst_offset < 0:
            raise ValueError(f"{region} is no region")
        if region.src_offset + region.length > remote.num_bytes:
            raise ValueError(f"{region} ends outside the remote memory of {remote.num_bytes} bytes")
        if region.dst_offset + region.length > local.num_bytes:
            raise ValueError(f"{region} ends outside the local memory of {local.num_bytes} bytes")
    return sum(region.length for region in regions)
