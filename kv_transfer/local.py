"""The layout of a worker's own KV memory."""

from collections.abc import Sequence

from contracts.memory import KvMemory
from kv_transfer.layout import (
    GroupKind,
    GroupLayout,
    KvLayout,
    MemoryRegion,
    MemoryType,
    RankLayout,
    Tier,
)


def local_layout(memories: Sequence[KvMemory]) -> KvLayout:
    """Layout of a worker's ranks, in their order, with one full-attention group.

    Each rank holds the KV heads that follow those of the rank before it.
    """
    first = memories[0]
    ranks: list[RankLayout] = []
    num_heads = 0
    for index, memory in enumerate(memories):
        on_gpu = memory.device_index is not None
        ranks.append(
            RankLayout(
                base_address=memory.base_address,
                bytes_per_block=memory.bytes_per_block,
                num_blocks=memory.num_blocks,
                words_address=memory.words_address,
                heads=tuple(range(num_heads, num_heads + memory.num_kv_heads)),
                memory_type=MemoryType.VRAM if on_gpu else MemoryType.DRAM,
                device_id=memory.device_index or 0,
                agent=index,
                tp_rank=index,
            )
        )
        num_heads += memory.num_kv_heads
    group = GroupLayout(
        kind=GroupKind.FULL,
        layers=tuple(range(first.num_layers)),
        heads=tuple(range(num_heads)),
        head_dim=first.head_dim,
        block_size=first.block_size,
    )
    tier = Tier.HOST if first.device_index is None else Tier.DEVICE
    return KvLayout(first.dtype, first.block_size, tuple(ranks), (group,), tier)


def registered(memory: KvMemory) -> tuple[MemoryRegion, MemoryRegion]:
    """The regions of one rank that a connector of its process registers: KV and words."""
    rank = local_layout([memory]).ranks[0]
    return rank.kv_region, rank.words_region
