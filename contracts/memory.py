"""What a worker's KV memory is, told by its engine and made known to its peers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvMemory:
    """One contiguous, block-major cache and its generation words, in this process.

    `words_address`: one unsigned 64-bit word a block. `device_index` None: host memory.
    """

    dtype: str
    block_size: int  # tokens
    base_address: int
    bytes_per_block: int
    num_blocks: int
    words_address: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    device_index: int | None
