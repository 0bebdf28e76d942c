"""Generation words: one 64-bit word a block, bumped before a new owner may write it (rule F1)."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_COUNTER_BITS = 40
_COUNTER_MASK = (1 << _COUNTER_BITS) - 1


class GenerationWords:
    """24 random bits of the incarnation, then a 40-bit counter, for each block.

    The array is contiguous, 64-bit aligned and never moved: a connector registers it, and peers
    read it after their data (F5, F6). Only the engine thread writes.

    With several ranks each has such a table. Rank 0 counts and keeps a list of what it has bumped,
    which the others get with the next step, and take over before they compute it (`mirror`).
    """

    def __init__(self, num_blocks: int, incarnation: int) -> None:
        tag = (incarnation & 0xFFFFFF) << _COUNTER_BITS
        self._words: npt.NDArray[np.uint64] = np.full(num_blocks, tag, dtype=np.uint64)
        self._view = self._words.data  # plain integers, quicker one by one
        self._tag = tag
        self._bumped: dict[int, int] | None = None

    @property
    def address(self) -> int:
        """Address of word 0."""
        return int(self._words.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Size of the whole table."""
        return int(self._words.nbytes)

    def bump(self, block_ids: Iterable[int]) -> None:
        """Give each of `block_ids` a generation that it never had."""
        view, tag, bumped = self._view, self._tag, self._bumped
        for block_id in block_ids:
            word = tag | (view[block_id] + 1 & _COUNTER_MASK)
            view[block_id] = word
            if bumped is not None:
                bumped[block_id] = word

    def record(self) -> None:
        """From now on keep what is bumped, for `take_bumped`."""
        self._bumped = {}

    def take_bumped(self) -> tuple[tuple[int, int], ...]:
        """(block, word) of all that were bumped since this was last asked."""
        bumped, self._bumped = self._bumped or {}, {}
        return tuple(bumped.items())

    def mirror(self, bumped: Iterable[tuple[int, int]]) -> None:
        """Take over words of rank 0."""
        for block_id, word in bumped:
            self._view[block_id] = word

    def read(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """The words of `block_ids` now."""
        return tuple([self._view[block_id] for block_id in block_ids])
