"""Host memory for cold KV blocks, and the moves between it and the device's cache.

    device cache   [ block 0 | block 1 | ... ]     engine/kv_cache.py
                       | save      ^ load
    host memory    [ slot 0 | slot 1 | ... ]       one block each, as many bytes as in the cache

Which block is where is engine/host_pool.py's business.
"""

from collections.abc import Iterator, Sequence

import torch

from contracts.errors import ConfigurationError
from engine.kv_cache import KvCache


def slots_in(memory_bytes: int, bytes_per_block: int) -> int:
    """How many blocks host memory of this size holds; 0: there is to be none.

    Raises:
        ConfigurationError: some is to be there, but too little for one block.
    """
    slots = memory_bytes // bytes_per_block
    if memory_bytes and not slots:
        raise ConfigurationError(
            f"--kv-offload-memory {memory_bytes} holds no KV block of {bytes_per_block} bytes"
        )
    return slots


class OffloadMemory:
    """Owns the host's copies of blocks of one cache.

    On CUDA it is pinned, and moves are queued on the current stream: behind what was computed
    before them and ahead of what is computed next.
    """

    def __init__(self, cache: KvCache, num_slots: int) -> None:
        self.num_slots = num_slots
        self._blocks = cache.tensor.view(cache.num_blocks, -1)
        on_gpu = cache.device.type == "cuda"
        try:
            self._slots = torch.empty(
                (num_slots, self._blocks.shape[1]), dtype=self._blocks.dtype, pin_memory=on_gpu
            )
        except RuntimeError as error:
            raise ConfigurationError(
                f"this machine cannot give {num_slots * cache.bytes_per_block >> 20} MiB of host"
                " memory; lower --kv-offload-memory"
            ) from error

    def move(self, saves: Sequence[tuple[int, int]], loads: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks: (block, slot) to the host, then (slot, block) to the device.

        No target is there twice among `saves`, or among `loads`.
        """
        for block, slot, count in _runs(saves):
            target = self._slots[slot : slot + count]
            target.copy_(self._blocks[block : block + count], non_blocking=True)
        for slot, block, count in _runs(loads):
            target = self._blocks[block : block + count]
            target.copy_(self._slots[slot : slot + count], non_blocking=True)


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours that move to neighbours, as (source, target, count)."""
    first: tuple[int, int] | None = None
    count = 0
    for source, target in sorted(pairs):
        if first is not None and (source, target) == (first[0] + count, first[1] + count):
            count += 1
            continue
        if first is not None:
            yield *first, count
        first, count = (source, target), 1
    if first is not None:
        yield *first, count
