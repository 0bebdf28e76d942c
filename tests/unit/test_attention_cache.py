"""The KV cache's memory layout, on which handoffs rely."""

import torch

from engine.kv_cache import KvCache, KvSpec

SPEC = KvSpec(num_layers=3, num_kv_heads=2, head_dim=4, block_size=5, dtype=torch.float32)
CPU = torch.device("cpu")


def test_a_block_is_one_contiguous_region() -> None:
    cache = KvCache(SPEC, 4, CPU)
    assert SPEC.bytes_per_block == 3 * 2 * 5 * 2 * 4 * 4
    assert cache.num_bytes == cache.tensor.nbytes == 4 * SPEC.bytes_per_block
    for block in range(4):
        view = cache.tensor[block]
        assert view.is_contiguous()
        assert view.data_ptr() == cache.base_address + block * cache.bytes_per_block
        assert view[1:].is_contiguous()  # the heads that a rank holds
        assert view[1].data_ptr() == view.data_ptr() + cache.bytes_per_block // 2


def test_starts_at_zero() -> None:
    assert not KvCache(SPEC, 4, CPU).tensor.any()


def test_memory_decides_the_number_of_blocks() -> None:
    assert SPEC.blocks_in(3 * SPEC.bytes_per_block + 7) == 3
    assert SPEC.blocks_in(SPEC.bytes_per_block - 1) == 0


def test_writes_land_in_their_layer_and_slot_alone() -> None:
    cache = KvCache(SPEC, 4, CPU)
    key, value = torch.randn(2, 2, 2, 4)
    rows = torch.tensor([3 * cache.rows_per_block + 4, 1 * cache.rows_per_block + 0])
    cache.write(2, rows, key, value)
    expected = torch.zeros_like(cache.tensor)
    expected[3, :, 2, 0, 4], expected[3, :, 2, 1, 4] = key[0], value[0]
    expected[1, :, 2, 0, 0], expected[1, :, 2, 1, 0] = key[1], value[1]
    assert torch.equal(cache.tensor, expected)
    keys, values = cache.layer(2)
    assert keys.shape == (4, 2, 5, 4)
    assert torch.equal(keys[3, :, 4], key[0])
    assert torch.equal(values[1, :, 0], value[1])


def test_gather_returns_whole_blocks_in_order() -> None:
    cache = KvCache(SPEC, 4, CPU)
    cache.tensor.normal_()
    keys, values = cache.gather(1, torch.tensor([2, 0]) * cache.panels_per_block)
    blocks = cache.tensor[[2, 0], :, 1].permute(2, 0, 3, 1, 4)  # kv, block, token, head, dim
    assert torch.equal(keys, blocks[0].reshape(10, 2, 4))
    assert torch.equal(values, blocks[1].reshape(10, 2, 4))


def test_copies_happen_as_if_at_once() -> None:
    cache = KvCache(SPEC, 4, CPU)
    cache.tensor.normal_()
    before = cache.tensor.clone()
    cache.copy_blocks([(0, 1), (1, 3)])
    assert torch.equal(cache.tensor, before[[0, 0, 2, 1]])
    cache.copy_blocks([])
