"""Which bytes each rank of a D reads from each rank of a P. Pure arithmetic.

A rank's block holds its KV heads one after the other, so what two ranks have in common is one run
of bytes in a block of either:

    P's rank 0   | head 0 | head 1 | head 2 | head 3 |       P has 2 ranks, D has 4
    D's rank 1                     | head 2 | head 3 |       reads the second half of rank 0's block
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from contracts.errors import TransferFailed
from kv_transfer.layout import (
    MAX_SLICE_BYTES,
    WORD_BYTES,
    KvLayout,
    RankLayout,
    Region,
    coalesce,
    slices,
)


@dataclass(frozen=True, slots=True)
class RankRead:
    """What D's rank `dst_rank` reads from P's rank `src_rank`, in slices (Q3)."""

    dst_rank: int
    src_rank: int
    slices: tuple[tuple[Region, ...], ...]


def overlaps(src: KvLayout, dst: KvLayout) -> Iterator[tuple[int, int, range]]:
    """(D's rank, P's rank, the KV heads that both hold) of all that have some in common."""
    for dst_rank, theirs in enumerate(dst.ranks):
        for src_rank, ours in enumerate(src.ranks):
            first = max(theirs.heads[0], ours.heads[0])
            end = min(theirs.heads[-1], ours.heads[-1]) + 1
            if first < end:
                yield dst_rank, src_rank, range(first, end)


def rank_reads(
    src: KvLayout,
    dst: KvLayout,
    src_ids: Sequence[int],
    dst_ids: Sequence[int],
    max_bytes: int = MAX_SLICE_BYTES,
) -> list[RankRead]:
    """All reads that bring the blocks `src_ids` of P into the blocks `dst_ids` of D.

    Both layouts are `compatible`. Every byte of each block of D is read exactly once.

    Raises:
        TransferFailed: P has no such block.
        ValueError: D has not, or one twice; or the lists differ in length.
    """
    _check(src, dst, src_ids, dst_ids)
    return [
        RankRead(
            dst_rank,
            src_rank,
            tuple(
                _slices(
                    src.ranks[src_rank], dst.ranks[dst_rank], heads, src_ids, dst_ids, max_bytes
                )
            ),
        )
        for dst_rank, src_rank, heads in overlaps(src, dst)
    ]


def word_reads(
    src: KvLayout, src_ids: Sequence[int], dst_ids: Sequence[int], num_slots: int
) -> list[tuple[Region, ...]]:
    """For each rank of P, the regions of the generation words of `src_ids` (F7).

    Those of rank r land from slot r * `num_slots` on, at the numbers `dst_ids`.
    """
    return [
        tuple(coalesce(src_ids, [rank * num_slots + slot for slot in dst_ids], WORD_BYTES))
        for rank in range(len(src.ranks))
    ]


def _slices(
    src: RankLayout,
    dst: RankLayout,
    heads: range,
    src_ids: Sequence[int],
    dst_ids: Sequence[int],
    max_bytes: int,
) -> Iterator[tuple[Region, ...]]:
    if src.heads == dst.heads:  # whole blocks: neighbours are one run
        unit = src.bytes_per_block
        return slices(coalesce(src_ids, dst_ids, unit), unit, max_bytes)
    unit = len(heads) * src.bytes_per_head
    src_start = (heads.start - src.heads[0]) * src.bytes_per_head
    dst_start = (heads.start - dst.heads[0]) * dst.bytes_per_head
    regions = [
        Region(
            src_offset=src_id * src.bytes_per_block + src_start,
            dst_offset=dst_id * dst.bytes_per_block + dst_start,
            length=unit,
        )
        for src_id, dst_id in zip(src_ids, dst_ids, strict=True)
    ]
    return slices(regions, unit, max_bytes)


def _check(src: KvLayout, dst: KvLayout, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
    if len(src_ids) != len(dst_ids):
        raise ValueError(f"{len(src_ids)} source blocks for {len(dst_ids)} destination blocks")
    if not all(0 <= block < src.num_blocks for block in src_ids):
        raise TransferFailed("P granted blocks that it does not have")
    if not all(0 <= block < dst.num_blocks for block in dst_ids):
        raise ValueError("a destination block lies outside the memory")
    if len(set(dst_ids)) != len(dst_ids):
        raise ValueError("a destination block is named twice")
