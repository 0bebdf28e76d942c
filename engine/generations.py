"""Generation words: one 64-bit word a block, bumped before a new owner may write it (rule F1)."""

import numpy as np
import numpy.typing as npt

_COUNTER_BITS = 40
_COUNTER_MASK = (1 << _COUNTER_BITS) - 1


class GenerationWords:
    """24 random bits of the incarnation, then a 40-bit counter, for each block.

    The array is contiguous, 64-bit aligned and never moved: a connector registers it, and peers
    read it after their data (F5, F6). Only the engine thread writes.
    """

    def __init__(self, num_blocks: int, incarnation: int) -> None:
        tag = (incarnation & 0xFFFFFF) << _COUNTER_BITS
        self._words: npt.NDArray[np.uint64] = np.full(num_blocks, tag, dtype=np.uint64)
        self._counters = [0] * num_blocks
        self._tag = tag

    @property
    def address(self) -> int:
        """Address of word 0."""
        return int(self._words.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Size of the whole table."""
        return int(self._words.nbytes)

    def bump(self, block_id: int) -> None:
        """Give `block_id` a generation it never had."""
        counter = (self._counters[block_id] + 1) & _COUNTER_MASK
        self._counters[block_id] = counter
        self._words[block_id] = self._tag | counter

    def read(self, block_ids: tuple[int, ...] | list[int]) -> tuple[int, ...]:
        """The words of `block_ids` now."""
        return tuple(int(self._words[b]) for b in block_ids)
