"""The layout of this process's own KV memory."""

from contracts.memory import KvMemory
from kv_transfer.layout import GroupKind, GroupLayout, KvLayout, MemoryType, RankLayout, Tier


def local_layout(memory: KvMemory) -> KvLayout:
    """Layout of one rank with one full-attention group."""
    on_gpu = memory.device_index is not None
    rank = RankLayout(
        base_address=memory.base_address,
        bytes_per_block=memory.bytes_per_block,
        num_blocks=memory.num_blocks,
        words_address=memory.words_address,
        memory_type=MemoryType.VRAM if on_gpu else MemoryType.DRAM,
        device_id=memory.device_index or 0,
    )
    group = GroupLayout(
        kind=GroupKind.FULL,
        layers=tuple(range(memory.num_layers)),
        heads=tuple(range(memory.num_kv_heads)),
        head_dim=memory.head_dim,
        block_size=memory.block_size,
    )
    tier = Tier.DEVICE if on_gpu else Tier.HOST
    return KvLayout(memory.dtype, memory.block_size, (rank,), (group,), tier)
