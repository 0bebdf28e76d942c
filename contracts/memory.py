"""What a worker's KV memory is, told by its engine and made known to its peers."""

import socket
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


@dataclass(frozen=True, slots=True)
class RankProcess:
    """Another rank of a worker, in a process of its own, and this end of a channel to it.

    At the other end that process serves its memory to this one (kv_transfer.rank_server).
    """

    rank: int
    pid: int
    channel: socket.socket
