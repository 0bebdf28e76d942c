"""The layout and identity of this process's own KV memory."""

from collections.abc import Mapping

from kv_transfer.digest import semantic_hash
from kv_transfer.layout import GroupKind, GroupLayout, KvLayout, MemoryType, RankLayout, Tier


def local_layout(
    *,
    dtype: str,
    block_size: int,
    base_address: int,
    bytes_per_block: int,
    num_blocks: int,
    words_address: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    device_index: int | None,
) -> KvLayout:
    """Layout of one rank with one full-attention group; `device_index` None: host memory."""
    on_gpu = device_index is not None
    rank = RankLayout(
        base_address=base_address,
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        words_address=words_address,
        memory_type=MemoryType.VRAM if on_gpu else MemoryType.DRAM,
        device_id=device_index or 0,
    )
    group = GroupLayout(
        kind=GroupKind.FULL,
        layers=tuple(range(num_layers)),
        heads=tuple(range(num_kv_heads)),
        head_dim=head_dim,
        block_size=block_size,
    )
    tier = Tier.DEVICE if on_gpu else Tier.HOST
    return KvLayout(dtype, block_size, (rank,), (group,), tier)


def model_hash(digest: Mapping[str, str]) -> str:
    """The semantic hash of a loaded model, from what its engine says must be equal."""
    return semantic_hash(digest)
