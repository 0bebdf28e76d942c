"""A step's batch as arrays: made of a plan once, computed from by every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from engine.attention.base import IntArray
from engine.kv_cache import KvCache
from engine.plan import Chunk, StepPlan


def rows_of(chunk: Chunk) -> list[int]:
    """Which of a chunk's tokens have their logits kept, by offset: the scored ones, the last."""
    rows = list(range(len(chunk.scored_ids)))
    if chunk.slots:
        rows.append(len(chunk.token_ids) - 1)
    return rows


@dataclass(frozen=True, slots=True)
class Moves:
    """Whole blocks that a step moves before it computes; every rank moves its own share of them.

    In this order: `offloads` (block, host slot), `loads` (host slot, block), `copies` (source,
    target).
    """

    offloads: tuple[tuple[int, int], ...] = ()
    loads: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.offloads or self.loads or self.copies)


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """Sequences, flattened, in plan order; see StepBatch for what the first three mean.

    `packed` is one array, so one copy to the device: token ids, positions and cache rows of
    `num_tokens` tokens each, then the rows of logits to keep.
    """

    query_starts: IntArray  # [sequences + 1]
    query_lens: IntArray  # [sequences]
    kv_lens: IntArray  # [sequences]
    sequences: Sequence[int]  # Chunk.sequence
    tables: Sequence[IntArray]  # block ids
    packed: IntArray
    num_tokens: int


class BlockTables:
    """Block tables as arrays. Keeps those of the last step, for most sequences have them again."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[tuple[int, ...], IntArray]] = {}

    def of(self, plan: StepPlan) -> tuple[list[int], list[IntArray]]:
        """Each sequence and its array of block ids, in the plan's order.

        A table that has not changed since the last step is the same object.
        """
        kept: dict[int, tuple[tuple[int, ...], IntArray]] = {}
        sequences = [stream.sequence for stream in plan.decodes.streams]
        sequences += [chunk.sequence for chunk in plan.others]
        blocks_of = chain(plan.decodes.block_tables, (chunk.block_table for chunk in plan.others))
        tables = []
        for sequence, blocks in zip(sequences, blocks_of, strict=True):
            entry = self._last.get(sequence)
            if entry is None or entry[0] is not blocks:  # the same object while nothing changes
                entry = (blocks, np.asarray(blocks, dtype=np.int64))
            kept[sequence] = entry
            tables.append(entry[1])
        self._last = kept
        return sequences, tables


def step_arrays(plan: StepPlan, block_tables: BlockTables, cache: KvCache) -> StepArrays:
    """The arrays of a plan that computes something."""
    decodes, others = plan.decodes, plan.others
    count = len(decodes)
    lens = np.ones(count + len(others), dtype=np.int64)
    lens[count:] = [len(chunk.token_ids) for chunk in others]
    starts = np.empty(len(lens), dtype=np.int64)
    starts[:count] = decodes.starts
    starts[count:] = [chunk.start for chunk in others]
    query_starts = np.zeros(len(lens) + 1, dtype=np.int64)
    np.cumsum(lens, out=query_starts[1:])
    num_tokens = int(query_starts[-1])
    sequences, tables = block_tables.of(plan)

    kept = list(range(count))
    for begin, chunk in zip(query_starts[count:].tolist(), others, strict=False):
        kept += [begin + offset for offset in rows_of(chunk)]
    packed = np.empty(3 * num_tokens + len(kept), dtype=np.int64)
    tokens, positions, rows = (
        packed[part * num_tokens : (part + 1) * num_tokens] for part in range(3)
    )
    tokens[:] = np.fromiter(
        chain(decodes.token_ids, *(chunk.token_ids for chunk in others)), np.int64, num_tokens
    )
    positions[:] = np.arange(num_tokens) + np.repeat(starts - query_starts[:-1], lens)
    _cache_rows(cache, positions, lens, query_starts, tables, rows)
    packed[3 * num_tokens :] = kept
    return StepArrays(query_starts, lens, starts + lens, sequences, tables, packed, num_tokens)


def _cache_rows(
    cache: KvCache,
    positions: IntArray,
    lens: IntArray,
    query_starts: IntArray,
    tables: list[IntArray],
    rows: IntArray,
) -> None:
    """Fill `rows` with each token's row in the cache (see KvCache.write)."""
    slot, offset = np.divmod(positions, cache.block_size)
    if len(lens) == len(positions):  # decode only: one block number of each table
        blocks = [table[index] for table, index in zip(tables, slot.tolist(), strict=True)]
        rows[:] = blocks
    else:
        for index, table in enumerate(tables):
            part = slice(query_starts[index], query_starts[index + 1])
            rows[part] = table[slot[part]]
    rows *= cache.rows_per_block
    rows += offset
