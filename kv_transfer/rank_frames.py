"""What rank 0 and another rank's process say to each other about transfers.

A frame: length of a JSON head and of a body, 4 bytes each, little-endian; then both. Rank 0 asks,
each question has a number, and its answer the same one:

    open    name of the agent                   agent metadata (body)
    add     a peer's agent metadata (body)      the peer's name
    remove  the peer's name                     -
    read    peer, kind, memory, regions (body)  how it ended, once it is terminal
    close   -                                   -, once nothing lands any more

An answer with `error` is one that could not be given. A frame with `fault` answers nothing:
that rank can transfer nothing any more.
"""

import asyncio
import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.connector import PeerHandle, Read
from kv_transfer.layout import MemoryRegion, MemoryType, Region

_HEAD = struct.Struct("<II")
_MAX_BYTES = 256 << 20  # of a frame: the regions of a slice are far less


@dataclass(frozen=True, slots=True)
class Frame:
    """One message either way."""

    head: dict[str, Any]
    body: bytes = field(default=b"", repr=False)  # may be agent metadata (C4)

    def encode(self) -> bytes:
        """As it travels."""
        text = json.dumps(self.head).encode()
        return b"".join((_HEAD.pack(len(text), len(self.body)), text, self.body))


async def receive(stream: asyncio.StreamReader) -> Frame:
    """The next frame.

    Raises:
        EOFError, OSError: the other side is gone.
        ValueError: this is no frame.
    """
    head_size, body_size = _HEAD.unpack(await stream.readexactly(_HEAD.size))
    if head_size + body_size > _MAX_BYTES:
        raise ValueError(f"a frame of {head_size + body_size} bytes")
    head = json.loads(await stream.readexactly(head_size))
    return Frame(head, await stream.readexactly(body_size))


def read_frame(number: int, read: Read) -> Frame:
    """A read to be posted there."""
    remote = read.remote
    head = {
        "ask": "read",
        "number": number,
        "peer": read.peer.name,
        "kind": read.kind,
        "memory": [remote.address, remote.num_bytes, remote.memory_type, remote.device_id],
    }
    return Frame(head, _pack(read.regions))


def read_of(frame: Frame) -> Read:
    """What `read_frame` wrote."""
    head = frame.head
    address, num_bytes, memory_type, device_id = head["memory"]
    remote = MemoryRegion(address, num_bytes, MemoryType(memory_type), device_id)
    return Read(PeerHandle(head["peer"]), head["kind"], _unpack(frame.body), remote)


def _pack(regions: Sequence[Region]) -> bytes:
    return array(
        "q", [n for r in regions for n in (r.src_offset, r.dst_offset, r.length)]
    ).tobytes()


def _unpack(data: bytes) -> list[Region]:
    flat = array("q", data)
    return [Region(*flat[at : at + 3]) for at in range(0, len(flat), 3)]
