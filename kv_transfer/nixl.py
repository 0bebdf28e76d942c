"""The NIXL connector (UCX backend): RDMA, NVLink, shared memory or TCP, whichever UCX finds.

The only file that imports nixl. What it relies on, measured with NIXL 1.5.1:

- over shared memory a read is over when `transfer` returns, copied by the calling thread;
- after `remove_remote_agent` a posted TCP read still lands, even if its handle was released
  before or after, while NIXL answers NOT_FOUND for it: hence no removal with reads pending;
- once the agent is destroyed nothing lands any more: hence `close` as the last resort of Q2;
- a lost connection fails its reads, and all later ones until the peer is removed and added.
"""

import gc
import logging
import logging.config
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.errors import TransferFailed
from kv_transfer.connector import PeerHandle, ReadHandle, ReadState, RegionKind, check_bounds
from kv_transfer.layout import MemoryRegion, Region

_log = logging.getLogger(__name__)
_PROGRESS_PAUSE_US = 100


class NixlConnector:
    """See KvConnector.

    Args:
        name: the agent's name; unique per process start (worker id and incarnation).
        ucx: UCX settings without their UCX_ prefix, such as {"TLS": "tcp"}; values without
            commas. The process's own UCX_ variables win. Empty: UCX chooses.
        quiet: keep NIXL and UCX from writing to stdout and stderr; their errors arrive as
            FAILED reads and in this module's log. Acts on the first connector of a process;
            an operator's NIXL_LOG_LEVEL and UCX_LOG_LEVEL win.
    """

    def __init__(self, name: str, ucx: Mapping[str, str] | None = None, quiet: bool = True) -> None:
        api = _load_nixl(quiet)
        self.name = name
        config = api.nixl_agent_config(enable_prog_thread=True, backends=[])
        self._agent: Any = api.nixl_agent(name, config)
        options = ",".join(f"{key}={value}" for key, value in (ucx or {}).items())
        self._agent.create_backend("UCX", {"engine_config": options} if options else {})
        self._own: dict[RegionKind, MemoryRegion] = {}
        self._peers: dict[PeerHandle, _Peer] = {}
        self._reads: dict[ReadHandle, _Read] = {}

    def register(self, kv: MemoryRegion, words: MemoryRegion) -> None:
        """See KvConnector."""
        if self._own:
            raise ValueError("memory is registered already")
        for region in (kv, words):  # two registrations: kinds of memory do not mix (F6)
            descriptor = (region.address, region.num_bytes, region.device_id, "")
            self._agent.register_memory([descriptor], str(region.memory_type))
        self._own = {"kv": kv, "words": words}

    def agent_metadata(self) -> bytes:
        """See KvConnector."""
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> PeerHandle:
        """See KvConnector. Begins to connect, which halves the first read's extra time."""
        for handle, peer in self._peers.items():
            if peer.metadata == metadata:
                if not peer.lost or self._num_pending(handle):
                    return handle
                self.remove_peer(handle)
                break
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise TransferFailed("the peer's agent metadata is not readable") from error
        handle = PeerHandle(name.decode() if isinstance(name, bytes) else str(name))
        self._peers[handle] = _Peer(metadata)
        try:
            self._agent.make_connection(handle.name)
        except Exception as error:
            _log.warning("NIXL cannot connect to %s: %s", handle.name, error)
            self._peers[handle].lost = True
        return handle

    def remove_peer(self, peer: PeerHandle) -> None:
        """See KvConnector."""
        pending = self._num_pending(peer)
        if pending:
            raise TransferFailed(f"{pending} reads from the peer are pending")
        if self._peers.pop(peer, None) is not None:
            try:
                self._agent.remove_remote_agent(peer.name)
            except Exception as error:
                _log.warning("NIXL cannot remove %s: %s", peer.name, error)

    def post_read(
        self, peer: PeerHandle, kind: RegionKind, regions: Sequence[Region], remote: MemoryRegion
    ) -> ReadHandle:
        """See KvConnector."""
        if kind not in self._own:
            raise ValueError("no memory is registered")
        local = self._own[kind]
        handle = ReadHandle(peer, check_bounds(regions, local, remote), len(regions))
        read = _Read()
        self._reads[handle] = read
        if self._agent is None or peer not in self._peers:
            read.state = ReadState.FAILED
            return handle
        targets = [
            (local.address + region.dst_offset, region.length, local.device_id)
            for region in regions
        ]
        sources = [
            (remote.address + region.src_offset, region.length, remote.device_id)
            for region in regions
        ]
        try:
            read.request = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(targets, str(local.memory_type)),
                self._agent.get_xfer_descs(sources, str(remote.memory_type)),
                peer.name,
            )
            self._set(handle, read, self._agent.transfer(read.request))
        except Exception as error:
            self._lose(handle, read, error)
        return handle

    def poll(self, handle: ReadHandle) -> ReadState:
        """See KvConnector."""
        read = self._reads[handle]
        if not read.state.terminal:
            try:
                self._set(handle, read, self._agent.check_xfer_state(read.request))
            except Exception as error:
                self._lose(handle, read, error)
        return read.state

    def release(self, handle: ReadHandle) -> None:
        """See KvConnector."""
        read = self._reads.get(handle)
        if read is None:
            return
        if not read.state.terminal:
            raise RuntimeError("a pending read cannot be released (Q1)")
        del self._reads[handle]
        _free(read)

    def close(self) -> None:
        """See KvConnector."""
        if self._agent is None:
            return
        for read in self._reads.values():
            _free(read)
            if not read.state.terminal:
                read.state = ReadState.FAILED
        for peer in list(self._peers):
            self.remove_peer(peer)
        # The agent ends with its last reference; only then have posted reads stopped landing.
        self._agent.agent = None
        self._agent = None
        gc.collect()

    def _num_pending(self, peer: PeerHandle) -> int:
        return sum(handle.peer == peer and not self.poll(handle).terminal for handle in self._reads)

    def _set(self, handle: ReadHandle, read: "_Read", status: str) -> None:
        if status == "DONE":
            read.state = ReadState.DONE
        elif status != "PROC":
            self._lose(handle, read, status)

    def _lose(self, handle: ReadHandle, read: "_Read", cause: object) -> None:
        read.state = ReadState.FAILED
        peer = self._peers.get(handle.peer)
        if peer is not None and not peer.lost:
            peer.lost = True
            _log.warning("NIXL read from %s failed: %s", handle.peer.name, cause)


@dataclass(slots=True)
class _Peer:
    """`lost`: a read failed; NIXL reconnects only after a removal."""

    metadata: bytes
    lost: bool = False


@dataclass(slots=True)
class _Read:
    """`request` is NIXL's handle; None when none could be made."""

    state: ReadState = ReadState.PENDING
    request: Any = None


def _free(read: _Read) -> None:
    request, read.request = read.request, None
    if request is not None:
        try:
            request.release()
        except Exception as error:
            _log.warning("NIXL cannot release a request: %s", error)


def _load_nixl(quiet: bool) -> Any:
    """Import nixl, which reads its log levels and sets up its logger when it is loaded."""
    if quiet:
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
        os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    # It configures logging for the whole process: it switches raiseExceptions off, and its
    # dictConfig closes every handler there is, Ray Serve's too (which then kills the replica when
    # its controller restarts). Its records go to the root logger's handlers instead.
    raise_exceptions, dict_config = logging.raiseExceptions, logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        import nixl._api as api
    finally:
        logging.raiseExceptions, logging.config.dictConfig = raise_exceptions, dict_config
    _let_progress_rest(api)
    return api


def _let_progress_rest(api: Any) -> None:
    """Make the agents' progress threads pause between two looks.

    NIXL's Python package sets the pause to 0 and offers no argument for it, so each agent would
    take the better part of a core for itself, whether anything moves or not.
    """
    make_agent = api.nixlBind.nixlAgent
    if getattr(make_agent, "rests", False):
        return

    def make_resting(name: str, config: Any) -> Any:
        config.pthrDelay = _PROGRESS_PAUSE_US
        return make_agent(name, config)

    make_resting.rests = True  # type: ignore[attr-defined]
    api.nixlBind.nixlAgent = make_resting
