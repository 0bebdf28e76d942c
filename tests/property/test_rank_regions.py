"""Handoff between tensor-parallel sizes: each rank of D gets its heads, each byte once."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from contracts.errors import ClaimRefused, TransferFailed
from kv_transfer.layout import (
    WORD_BYTES,
    GroupKind,
    GroupLayout,
    KvLayout,
    RankLayout,
    Region,
    compatible,
)
from kv_transfer.rank_regions import RankRead, overlaps, rank_reads, word_reads


def layout(cuts: Sequence[int], bytes_per_head: int = 6, num_blocks: int = 20) -> KvLayout:
    """Ranks that hold the heads between two neighbouring cuts, such as (0, 2, 4)."""
    ranks = tuple(
        RankLayout(
            base_address=4096 * (rank + 1),
            bytes_per_block=(end - first) * bytes_per_head,
            num_blocks=num_blocks,
            words_address=64 * (rank + 1),
            heads=tuple(range(first, end)),
            agent=rank,
            tp_rank=rank,
        )
        for rank, (first, end) in enumerate(itertools.pairwise(cuts))
    )
    group = GroupLayout(GroupKind.FULL, (0, 1), tuple(range(cuts[-1])), 8, 16)
    return KvLayout("float32", 16, ranks, (group,))


def with_ranks(of: KvLayout, *changes: dict[str, object]) -> KvLayout:
    ranks = tuple(
        replace(rank, **change)  # type: ignore[arg-type]
        for rank, change in zip(of.ranks, changes, strict=True)
    )
    return replace(of, ranks=ranks)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    """A P and a D, each with the heads cut as it likes, which includes all equal sizes."""
    num_heads = draw(st.integers(1, 8))
    bytes_per_head = draw(st.integers(1, 9))

    def cuts() -> list[int]:
        if draw(st.booleans()):
            count = draw(st.sampled_from([n for n in range(1, 9) if not num_heads % n]))
            return list(range(0, num_heads + 1, num_heads // count))
        inner = draw(st.sets(st.integers(1, max(1, num_heads - 1)), max_size=num_heads - 1))
        return sorted({0, num_heads} | (inner if num_heads > 1 else set()))

    src = layout(cuts(), bytes_per_head, draw(st.integers(8, 30)))
    return src, layout(cuts(), bytes_per_head, draw(st.integers(8, 30)))


@st.composite
def block_ids(draw: st.DrawFn, num_blocks: int, count: int) -> list[int]:
    """Distinct ones, often with runs in them."""
    if draw(st.booleans()):
        first = draw(st.integers(0, num_blocks - count))
        return list(range(first, first + count))
    return draw(st.permutations(range(num_blocks)))[:count]


def memory(of: KvLayout, content: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    """Each rank's own memory, flat, from the content by block, head, byte."""
    return [content[:, rank.heads].reshape(-1).copy() for rank in of.ranks]


def carry_out(
    reads: Sequence[RankRead], src: Sequence[NDArray[np.uint32]], dst: Sequence[NDArray[np.uint32]]
) -> list[NDArray[np.uint32]]:
    """Copy, as a connector would; how often each byte was written."""
    written = [np.zeros_like(rank) for rank in dst]
    for read in reads:
        for region in (region for piece in read.slices for region in piece):
            assert 0 <= region.src_offset <= len(src[read.src_rank]) - region.length
            assert 0 <= region.dst_offset <= len(dst[read.dst_rank]) - region.length
            there = slice(region.src_offset, region.src_offset + region.length)
            here = slice(region.dst_offset, region.dst_offset + region.length)
            dst[read.dst_rank][here] = src[read.src_rank][there]
            written[read.dst_rank][here] += 1
    return written


@given(sizes(), st.integers(1, 60), st.data())
def test_every_byte_of_every_block_comes_once_from_its_place(
    pair: tuple[KvLayout, KvLayout], max_bytes: int, data: st.DataObject
) -> None:
    src, dst = pair
    compatible(dst, src)
    count = data.draw(st.integers(1, 8))
    src_ids = data.draw(block_ids(src.num_blocks, count))
    dst_ids = data.draw(block_ids(dst.num_blocks, count))
    num_heads, size = len(src.groups[0].heads), src.ranks[0].bytes_per_head
    shape = (src.num_blocks, num_heads, size)
    theirs = np.arange(1, np.prod(shape) + 1, dtype=np.uint32).reshape(shape)
    ours = np.zeros((dst.num_blocks, num_heads, size), dtype=np.uint32)
    landed = memory(dst, ours)
    reads = rank_reads(src, dst, src_ids, dst_ids, max_bytes)
    written = carry_out(reads, memory(src, theirs), landed)

    ours[dst_ids] = theirs[src_ids]
    times = np.zeros_like(ours)
    times[dst_ids] = 1
    for found, expected in zip(landed, memory(dst, ours), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(written, memory(dst, times), strict=True):
        np.testing.assert_array_equal(found, expected)
    for read in reads:
        assert all(read.slices)
        shared = size * len(
            set(src.ranks[read.src_rank].heads) & set(dst.ranks[read.dst_rank].heads)
        )
        for piece in read.slices:
            assert sum(region.length for region in piece) <= max(max_bytes, shared)
    pairs = [(read.dst_rank, read.src_rank) for read in reads]
    assert pairs == [(reader, source) for reader, source, _ in overlaps(src, dst)]
    assert len(set(pairs)) == len(pairs)


@given(sizes(), st.data())
def test_the_words_of_each_rank_land_in_a_row_of_their_own(
    pair: tuple[KvLayout, KvLayout], data: st.DataObject
) -> None:
    src, dst = pair
    count = data.draw(st.integers(1, 8))
    src_ids = data.draw(block_ids(src.num_blocks, count))
    dst_ids = data.draw(block_ids(dst.num_blocks, count))
    theirs = np.arange(1, len(src.ranks) * src.num_blocks + 1).reshape(len(src.ranks), -1)
    table = np.zeros((len(src.ranks), dst.num_blocks), dtype=theirs.dtype)
    flat = table.reshape(-1)
    for rank, regions in enumerate(word_reads(src, src_ids, dst_ids, dst.num_blocks)):
        for region in regions:
            numbers = (region.src_offset, region.dst_offset, region.length)
            there, here, many = (number // WORD_BYTES for number in numbers)
            flat[here : here + many] = theirs[rank, there : there + many]
    expected = np.zeros_like(table)
    expected[:, dst_ids] = theirs[:, src_ids]
    np.testing.assert_array_equal(table, expected)


def test_ranks_of_the_same_heads_move_runs_in_one_region() -> None:
    pair = layout((0, 2, 4)), layout((0, 2, 4))
    reads = rank_reads(*pair, [3, 4, 5, 9], [10, 11, 12, 13])
    assert [(read.dst_rank, read.src_rank) for read in reads] == [(0, 0), (1, 1)]
    assert [read.slices for read in reads] == [((Region(36, 120, 36), Region(108, 156, 12)),)] * 2


def test_half_of_each_block_for_each_of_two_ranks() -> None:
    reads = rank_reads(layout((0, 4)), layout((0, 2, 4)), [3, 4], [7, 8])
    assert [(read.dst_rank, read.src_rank) for read in reads] == [(0, 0), (1, 0)]
    assert reads[0].slices == ((Region(72, 84, 12), Region(96, 96, 12)),)
    assert reads[1].slices == ((Region(84, 84, 12), Region(108, 96, 12)),)


def test_blocks_that_are_not_there() -> None:
    pair = layout((0, 4)), layout((0, 2, 4))
    for src_ids in ([20], [-1]):
        with pytest.raises(TransferFailed, match="P granted"):
            rank_reads(*pair, src_ids, [0])
    for dst_ids, complaint in (([20], "outside"), ([-1], "outside"), ([3, 3], "twice")):
        with pytest.raises(ValueError, match=complaint):
            rank_reads(*pair, list(range(len(dst_ids))), dst_ids)
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        rank_reads(*pair, [1, 2], [1])


TWO = layout((0, 2, 4))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        pytest.param(
            with_ranks(TWO, {}, {"heads": (1, 2)}),
            r"replicated KV heads.*\(1, 2\)",
            id="replicated",
        ),
        pytest.param(
            with_ranks(TWO, {}, {"heads": (0, 1)}), "replicated KV heads", id="the-same-twice"
        ),
        pytest.param(with_ranks(TWO, {}, {"heads": (3,)}), "no rank holds KV head 2", id="gap"),
        pytest.param(
            with_ranks(TWO, {}, {"heads": (2,), "bytes_per_block": 6}), "3 of 4 KV heads", id="last"
        ),
        pytest.param(with_ranks(TWO, {}, {"heads": ()}), "no range", id="none"),
        pytest.param(with_ranks(TWO, {}, {"heads": (3, 2)}), "no range", id="order"),
        pytest.param(with_ranks(TWO, {}, {"bytes_per_block": 13}), "13 bytes", id="bytes"),
        pytest.param(with_ranks(TWO, {}, {"bytes_per_block": 24}), "24 bytes", id="other-bytes"),
        pytest.param(with_ranks(TWO, {}, {"num_blocks": 19}), "19 blocks", id="blocks"),
        pytest.param(with_ranks(TWO, {}, {"tp_rank": 0}), "in their order", id="rank-order"),
        pytest.param(with_ranks(TWO, {}, {"pp_rank": 1}), "only tensor-parallel", id="pipeline"),
        pytest.param(replace(TWO, ranks=()), "no ranks", id="no-ranks"),
    ],
)
def test_ranks_that_do_not_share_out_the_heads_are_refused(
    broken: KvLayout, complaint: str
) -> None:
    with pytest.raises(ClaimRefused, match=complaint):
        compatible(layout((0, 4)), broken)
    with pytest.raises(ClaimRefused, match=complaint):
        KvLayout.decode(broken.encode())


def test_several_ranks_are_told_and_understood() -> None:
    assert KvLayout.decode(TWO.encode()) == TWO
    compatible(layout((0, 4)), KvLayout.decode(TWO.encode()))


def test_heads_that_are_not_one_run_of_bytes_fit_equal_ranks_only() -> None:
    def inner(of: KvLayout) -> KvLayout:
        return replace(of, groups=(replace(of.groups[0], axes="layer,kv,token,head,dim"),))

    compatible(inner(TWO), inner(TWO))
    with pytest.raises(ClaimRefused, match="2 ranks here, peer has 1, and the heads"):
        compatible(inner(TWO), inner(layout((0, 4))))
