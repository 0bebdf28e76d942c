"""Where a worker's KV blocks are and what they are made of. A layout is data.

    base address                                                words address
    |  block 0  |  block 1  |  block 2  | ...                   | word 0 | word 1 | word 2 | ...
    <bytes_per_block>                                           <8 bytes>

A rank is one process of a tensor-parallel worker: it holds some of the KV heads, of all layers and
tokens. A block has the same id on all ranks, and on each it is one contiguous run of bytes, in
which the heads come one after the other. Today a layout has one group, of kind "full".
The tables are there so that other layouts need no new wire format.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from contracts.errors import ClaimRefused

PROTOCOL_VERSION = 1
WORD_BYTES = 8
MAX_SLICE_BYTES = 32 << 20  # Q3: an abort takes effect after one slice


class MemoryType(StrEnum):
    """NIXL's names for kinds of memory."""

    DRAM = "DRAM"
    VRAM = "VRAM"


class Tier(StrEnum):
    """Where a layout's blocks live."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class GroupKind(StrEnum):
    """What a block group holds."""

    FULL = "full"
    WINDOW = "window"
    MLA = "mla"
    RECURRENT = "recurrent"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """Contiguous memory of one process: `num_bytes` from `address`."""

    address: int
    num_bytes: int
    memory_type: MemoryType = MemoryType.DRAM
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class RankLayout:
    """One rank's pool. `agent` indexes the agent metadata of the peer's Hello."""

    base_address: int
    bytes_per_block: int
    num_blocks: int
    words_address: int  # one unsigned 64-bit generation word a block, always host memory
    heads: tuple[int, ...]  # of the KV heads, those held here
    memory_type: MemoryType = MemoryType.DRAM
    device_id: int = 0
    agent: int = 0
    tp_rank: int = 0
    pp_rank: int = 0
    cp_rank: int = 0

    @property
    def kv_region(self) -> MemoryRegion:
        """All blocks."""
        return MemoryRegion(
            self.base_address,
            self.bytes_per_block * self.num_blocks,
            self.memory_type,
            self.device_id,
        )

    @property
    def bytes_per_head(self) -> int:
        """Of one KV head in one block."""
        return self.bytes_per_block // len(self.heads)

    @property
    def words_region(self) -> MemoryRegion:
        """All generation words."""
        return MemoryRegion(self.words_address, WORD_BYTES * self.num_blocks)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Layers that share block tables. `axes` names a block's axes, outermost first."""

    kind: GroupKind
    layers: tuple[int, ...]
    heads: tuple[int, ...]  # all KV heads
    head_dim: int
    block_size: int  # tokens
    axes: str = "head,layer,kv,token,dim"


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A worker's KV memory, as told to its peers on the authenticated link only (C4)."""

    dtype: str
    block_size: int  # tokens
    ranks: tuple[RankLayout, ...]
    groups: tuple[GroupLayout, ...]
    tier: Tier = Tier.HOST
    protocol_version: int = PROTOCOL_VERSION

    @property
    def num_blocks(self) -> int:
        """The same on all ranks."""
        return self.ranks[0].num_blocks

    @property
    def bytes_per_block(self) -> int:
        """Of all ranks together."""
        return sum(rank.bytes_per_block for rank in self.ranks)

    def encode(self) -> str:
        """JSON. Addresses are hex text: many parsers lose integer bits above 2**53 (C1)."""
        return json.dumps(
            {
                "protocol_version": self.protocol_version,
                "dtype": self.dtype,
                "block_size": self.block_size,
                "tier": self.tier,
                "ranks": [_encode_rank(rank) for rank in self.ranks],
                "groups": [_encode_group(group) for group in self.groups],
            },
            separators=(",", ":"),
        )

    @classmethod
    def decode(cls, text: str) -> "KvLayout":
        """Read a peer's layout; unknown fields are ignored.

        Raises:
            ClaimRefused: another protocol version (both named), or no layout at all.
        """
        try:
            data = json.loads(text)
            version = _int(data, "protocol_version")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ClaimRefused("the peer's KV layout is not readable") from None
        if version != PROTOCOL_VERSION:
            raise ClaimRefused(f"KV protocol version: here {PROTOCOL_VERSION}, peer has {version}")
        try:
            groups = tuple(_decode_group(group) for group in data["groups"])
            every_head = groups[0].heads  # of a rank that names none: it is alone
            layout = cls(
                protocol_version=version,
                dtype=_text(data, "dtype"),
                block_size=_int(data, "block_size", at_least=1),
                tier=Tier(_text(data, "tier")),
                ranks=tuple(_decode_rank(rank, every_head) for rank in data["ranks"]),
                groups=groups,
            )
        except (ValueError, LookupError, TypeError) as error:
            # Of the values only the names of fields: addresses stay out of logs.
            raise ClaimRefused(f"the peer's KV layout is not readable: {error}") from None
        _check_supported("peer", layout)
        return layout


def compatible(local: KvLayout, remote: KvLayout) -> None:
    """Check that blocks can be copied one for one, head by head.

    Raises:
        ClaimRefused: they cannot; the message names the field and both values.
    """
    _check_supported("here", local)
    _check_supported("peer", remote)
    _same("protocol version", local.protocol_version, remote.protocol_version)
    _same("dtype", local.dtype, remote.dtype)
    _same("block size in tokens", local.block_size, remote.block_size)
    ours, theirs = local.groups[0], remote.groups[0]
    _same("layers", ours.layers, theirs.layers)
    _same("KV heads", ours.heads, theirs.heads)
    _same("head_dim", ours.head_dim, theirs.head_dim)
    _same("block size of the group", ours.block_size, theirs.block_size)
    _same("axes of a block", ours.axes, theirs.axes)
    _same(
        "bytes of a head in a block", local.ranks[0].bytes_per_head, remote.ranks[0].bytes_per_head
    )
    held, there = ([rank.heads for rank in layout.ranks] for layout in (local, remote))
    if held != there and not ours.axes.startswith("head,"):
        raise ClaimRefused(
            f"KV layouts do not fit: {len(held)} ranks here, peer has {len(there)}, and the heads "
            f"of a block are not its outermost axis ({ours.axes})"
        )


@dataclass(frozen=True, slots=True)
class Region:
    """`length` bytes at `src_offset` of the remote memory, for `dst_offset` of the own."""

    src_offset: int
    dst_offset: int
    length: int


def coalesce(
    src_ids: Sequence[int],
    dst_ids: Sequence[int],
    bytes_per_block: int,
    max_bytes: int = MAX_SLICE_BYTES,
) -> list[Region]:
    """One region for each run in which both the source and the destination ids go up by one.

    A region longer than `max_bytes` is split at block borders; one block is never split. With
    `bytes_per_block` = WORD_BYTES it gives the regions of generation words.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(src_ids) != len(dst_ids):
        raise ValueError(f"{len(src_ids)} source blocks for {len(dst_ids)} destination blocks")
    max_blocks = max(1, max_bytes // bytes_per_block)
    regions: list[Region] = []
    start = 0
    for end in range(1, len(src_ids) + 1):
        if (
            end < len(src_ids)
            and end - start < max_blocks
            and src_ids[end] == src_ids[end - 1] + 1
            and dst_ids[end] == dst_ids[end - 1] + 1
        ):
            continue
        regions.append(
            Region(
                src_offset=src_ids[start] * bytes_per_block,
                dst_offset=dst_ids[start] * bytes_per_block,
                length=(end - start) * bytes_per_block,
            )
        )
        start = end
    return regions


def slices(
    regions: Sequence[Region], bytes_per_block: int, max_bytes: int = MAX_SLICE_BYTES
) -> Iterator[tuple[Region, ...]]:
    """Group regions, in order, into slices of at most `max_bytes` (Q3), each posted as one read.

    A region that does not fit is split at a block border; a slice holds at least one block.
    """
    limit = max(1, max_bytes // bytes_per_block) * bytes_per_block
    current: list[Region] = []
    room = limit
    for region in regions:
        done = 0
        while done < region.length:
            if room < bytes_per_block:
                yield tuple(current)
                current, room = [], limit
            take = min(region.length - done, room // bytes_per_block * bytes_per_block)
            current.append(Region(region.src_offset + done, region.dst_offset + done, take))
            done += take
            room -= take
    if current:
        yield tuple(current)


def _same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ClaimRefused(f"KV layouts do not fit: {what}: here {ours}, peer has {theirs}")


def _check_supported(whose: str, layout: KvLayout) -> None:
    def refuse(what: str) -> ClaimRefused:
        return ClaimRefused(f"KV layout ({whose}): {what}")

    kinds = [str(group.kind) for group in layout.groups]
    if kinds != [GroupKind.FULL]:
        raise refuse(f"1 group of kind full is supported, not {kinds}")
    if not layout.ranks:
        raise refuse("no ranks")
    heads, first = layout.groups[0].heads, layout.ranks[0]
    if heads != tuple(range(len(heads))) or not heads:
        raise refuse(f"KV heads are numbered from 0, not {heads}")
    next_head = 0
    for index, rank in enumerate(layout.ranks):
        if (rank.tp_rank, rank.pp_rank, rank.cp_rank) != (index, 0, 0):
            raise refuse("only tensor-parallel ranks, in their order, are supported")
        if not rank.heads or rank.heads != tuple(range(rank.heads[0], rank.heads[-1] + 1)):
            raise refuse(f"rank {index} holds the KV heads {rank.heads}: no range")
        if rank.heads[0] < next_head:
            raise refuse(f"replicated KV heads are not supported: rank {index} has {rank.heads}")
        if rank.heads[0] != next_head:
            raise refuse(f"no rank holds KV head {next_head}")
        next_head = rank.heads[-1] + 1
        if rank.bytes_per_block % len(rank.heads) or rank.bytes_per_head != first.bytes_per_head:
            raise refuse(f"rank {index}: {rank.bytes_per_block} bytes a block of {rank.heads}")
        if rank.num_blocks != first.num_blocks:
            raise refuse(f"rank {index} has {rank.num_blocks} blocks, rank 0 {first.num_blocks}")
    if next_head != len(heads):
        raise refuse(f"the ranks hold {next_head} of {len(heads)} KV heads")


def _encode_rank(rank: RankLayout) -> dict[str, object]:
    return {
        "base_address": hex(rank.base_address),
        "bytes_per_block": rank.bytes_per_block,
        "num_blocks": rank.num_blocks,
        "words_address": hex(rank.words_address),
        "heads": rank.heads,
        "memory_type": rank.memory_type,
        "device_id": rank.device_id,
        "agent": rank.agent,
        "tp_rank": rank.tp_rank,
        "pp_rank": rank.pp_rank,
        "cp_rank": rank.cp_rank,
    }


def _decode_rank(data: Mapping[str, Any], every_head: tuple[int, ...]) -> RankLayout:
    return RankLayout(
        base_address=_address(data, "base_address"),
        bytes_per_block=_int(data, "bytes_per_block", at_least=1),
        num_blocks=_int(data, "num_blocks", at_least=1),
        words_address=_address(data, "words_address"),
        heads=_ints(data, "heads") if "heads" in data else every_head,
        memory_type=MemoryType(_text(data, "memory_type")),
        device_id=_int(data, "device_id"),
        agent=_int(data, "agent"),
        tp_rank=_int(data, "tp_rank"),
        pp_rank=_int(data, "pp_rank"),
        cp_rank=_int(data, "cp_rank"),
    )


def _encode_group(group: GroupLayout) -> dict[str, object]:
    return {
        "kind": group.kind,
        "layers": group.layers,
        "heads": group.heads,
        "head_dim": group.head_dim,
        "block_size": group.block_size,
        "axes": group.axes,
    }


def _decode_group(data: Mapping[str, Any]) -> GroupLayout:
    return GroupLayout(
        kind=GroupKind(_text(data, "kind")),
        layers=_ints(data, "layers"),
        heads=_ints(data, "heads"),
        head_dim=_int(data, "head_dim", at_least=1),
        block_size=_int(data, "block_size", at_least=1),
        axes=_text(data, "axes"),
    )


def _int(data: Mapping[str, Any], name: str, at_least: int = 0) -> int:
    value = data[name]
    if type(value) is not int or value < at_least:
        raise ValueError(f"{name} is not an integer of at least {at_least}")
    return value


def _ints(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = data[name]
    if type(values) is not list or any(type(value) is not int for value in values):
        raise ValueError(f"{name} is not a list of integers")
    return tuple(values)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if type(value) is not str:
        raise ValueError(f"{name} is not text")
    return value


def _address(data: Mapping[str, Any], name: str) -> int:
    text = _text(data, name)
    try:
        address = int(text, 16)
    except ValueError:
        raise ValueError(f"{name} is not a hexadecimal address") from None
    if not 0 < address < 1 << 64:
        raise ValueError(f"{name} is not a 64-bit address")
    return address
