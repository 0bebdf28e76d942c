"""Layouts: what is refused, and that copied regions are exactly the wanted blocks."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ClaimRefused
from kv_transfer.layout import (
    GroupKind,
    GroupLayout,
    KvLayout,
    MemoryType,
    RankLayout,
    Region,
    Tier,
    coalesce,
    compatible,
    slices,
)

LAYOUT = KvLayout(
    dtype="bfloat16",
    block_size=16,
    tier=Tier.DEVICE,
    ranks=(
        RankLayout(
            base_address=0x7FFF_DEAD_BEEF_1000,
            bytes_per_block=65536,
            num_blocks=100,
            words_address=0x5555_0000_1000,
            heads=(0, 1, 2, 3),
            memory_type=MemoryType.VRAM,
            device_id=3,
        ),
    ),
    groups=(GroupLayout(GroupKind.FULL, (0, 1), (0, 1, 2, 3), 64, 16),),
)


def with_rank(**changes: Any) -> KvLayout:
    return replace(LAYOUT, ranks=(replace(LAYOUT.ranks[0], **changes),))


def with_group(**changes: Any) -> KvLayout:
    return replace(LAYOUT, groups=(replace(LAYOUT.groups[0], **changes),))


def test_what_is_encoded_is_decoded() -> None:
    assert KvLayout.decode(LAYOUT.encode()) == LAYOUT


def test_a_rank_that_names_no_heads_holds_all() -> None:
    """As before there were several."""
    data = json.loads(LAYOUT.encode())
    del data["ranks"][0]["heads"]
    assert KvLayout.decode(json.dumps(data)) == LAYOUT


def test_unknown_fields_are_ignored() -> None:
    data = json.loads(LAYOUT.encode())
    for part in (data, data["ranks"][0], data["groups"][0]):
        part["from_the_future"] = {"a": 1}
    assert KvLayout.decode(json.dumps(data)) == LAYOUT


def test_no_integer_in_the_json_exceeds_what_every_parser_keeps() -> None:
    def integers(value: object) -> list[int]:
        if isinstance(value, dict):
            return [n for item in value.values() for n in integers(item)]
        if isinstance(value, list):
            return [n for item in value for n in integers(item)]
        return [value] if isinstance(value, int) else []

    assert max(integers(json.loads(LAYOUT.encode()))) < 1 << 53


def test_another_version_is_refused_with_both_values() -> None:
    text = replace(LAYOUT, protocol_version=7).encode()
    with pytest.raises(ClaimRefused, match="here 1, peer has 7"):
        KvLayout.decode(text)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"ranks": []}, id="no-rank"),
        pytest.param({"groups": []}, id="no-group"),
        pytest.param({"ranks": [1]}, id="rank-is-no-object"),
        pytest.param({"ranks": None}, id="null-ranks"),
        pytest.param({"block_size": "16"}, id="text-for-number"),
        pytest.param({"block_size": True}, id="bool-for-number"),
        pytest.param({"block_size": 0}, id="zero"),
        pytest.param({"tier": "tape"}, id="unknown-tier"),
        pytest.param({"dtype": 4}, id="number-for-text"),
    ],
)
def test_a_broken_layout_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ClaimRefused):
        KvLayout.decode(json.dumps({**json.loads(LAYOUT.encode()), **change}))


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", "7", "[" * 100_000])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ClaimRefused):
        KvLayout.decode(text)


@pytest.mark.parametrize("address", ["zz", "-0x10", "0x0", "0x1" + "0" * 16])
def test_a_bad_address_is_refused_and_not_repeated(address: str) -> None:
    data = json.loads(LAYOUT.encode())
    data["ranks"][0]["base_address"] = address
    with pytest.raises(ClaimRefused) as refused:
        KvLayout.decode(json.dumps(data))
    assert address not in str(refused.value)


def test_other_addresses_sizes_and_devices_fit() -> None:
    other = with_rank(
        base_address=4096,
        words_address=64,
        num_blocks=7,
        device_id=0,
        memory_type=MemoryType.DRAM,
    )
    compatible(LAYOUT, replace(other, tier=Tier.HOST))


@pytest.mark.parametrize(
    ("other", "ours", "theirs"),
    [
        pytest.param(replace(LAYOUT, dtype="float32"), "bfloat16", "float32", id="dtype"),
        pytest.param(replace(LAYOUT, block_size=32), "16", "32", id="block-size"),
        pytest.param(replace(LAYOUT, protocol_version=2), "1", "2", id="version"),
        pytest.param(with_rank(bytes_per_block=4), "16384", "1", id="bytes"),
        pytest.param(with_group(layers=(0,)), r"\(0, 1\)", r"\(0,\)", id="layers"),
        pytest.param(
            replace(with_group(heads=(0, 1)), ranks=with_rank(heads=(0, 1)).ranks),
            r"\(0, 1, 2, 3\)",
            r"\(0, 1\)",
            id="heads",
        ),
        pytest.param(with_group(head_dim=128), "64", "128", id="head-dim"),
        pytest.param(with_group(axes="kv,dim"), "head,layer,kv,token,dim", "kv,dim", id="axes"),
    ],
)
def test_what_differs_is_refused_with_both_values(other: KvLayout, ours: str, theirs: str) -> None:
    with pytest.raises(ClaimRefused, match=f"here {ours}, peer has {theirs}"):
        compatible(LAYOUT, other)


def test_what_is_not_built_yet_is_refused() -> None:
    with pytest.raises(ClaimRefused, match="window"):
        compatible(LAYOUT, with_group(kind=GroupKind.WINDOW))


@st.composite
def block_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Distinct source and destination ids with runs in them, as allocators give them."""
    src: list[int] = []
    dst: list[int] = []
    for ids in (src, dst):
        starts = draw(st.lists(st.integers(0, 40), unique=True, max_size=8))
        for start in starts:
            length = draw(st.integers(1, 6))
            ids.extend(start * 10 + offset for offset in range(length))
    count = min(len(src), len(dst))
    return src[:count], dst[:count]


def copied(regions: list[Region], bytes_per_block: int) -> list[tuple[int, int]]:
    """(source block, destination block) of every block the regions copy, in order."""
    pairs = []
    for region in regions:
        assert region.length > 0
        for offset in range(0, region.length, bytes_per_block):
            src, src_rest = divmod(region.src_offset + offset, bytes_per_block)
            dst, dst_rest = divmod(region.dst_offset + offset, bytes_per_block)
            assert src_rest == dst_rest == 0
            pairs.append((src, dst))
    return pairs


@given(block_pairs(), st.integers(1, 64), st.integers(1, 400))
def test_regions_copy_each_wanted_block_once(
    pairs: tuple[list[int], list[int]], bytes_per_block: int, max_bytes: int
) -> None:
    src, dst = pairs
    regions = coalesce(src, dst, bytes_per_block, max_bytes)
    assert copied(regions, bytes_per_block) == list(zip(src, dst, strict=True))
    assert all(region.length <= max(max_bytes, bytes_per_block) for region in regions)


@given(block_pairs(), st.integers(1, 64))
def test_neighbours_are_always_merged(
    pairs: tuple[list[int], list[int]], bytes_per_block: int
) -> None:
    regions = coalesce(*pairs, bytes_per_block)
    for first, second in itertools.pairwise(regions):
        assert (
            second.src_offset != first.src_offset + first.length
            or second.dst_offset != first.dst_offset + first.length
        )


@given(block_pairs(), st.integers(1, 64), st.integers(1, 400))
def test_slices_cover_the_regions_and_none_is_too_big(
    pairs: tuple[list[int], list[int]], bytes_per_block: int, max_bytes: int
) -> None:
    src, dst = pairs
    groups = list(slices(coalesce(src, dst, bytes_per_block), bytes_per_block, max_bytes))
    assert all(groups)
    flat = [region for group in groups for region in group]
    assert copied(flat, bytes_per_block) == list(zip(src, dst, strict=True))
    for group in groups:
        assert sum(region.length for region in group) <= max(max_bytes, bytes_per_block)


def test_a_fresh_prompt_moves_in_one_descriptor() -> None:
    regions = coalesce(range(100, 164), range(7, 71), 1000)
    assert regions == [Region(100_000, 7000, 64_000)]
    assert [len(group) for group in slices(regions, 1000, 30_000)] == [1, 1, 1]


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        coalesce([1, 2], [1], 8)
