"""The plain torch backend against attention written out densely."""

import numpy as np
import pytest
import torch

from engine.attention.base import AttentionLayer, StepBatch
from engine.attention.cpu import SdpaBackend
from engine.attention.cuda import flashinfer_fits
from engine.kv_cache import KvCache, KvSpec
from tests.support.dense_attention import BLOCK, check, dense, layer

FULL = layer()

KINDS = [
    pytest.param(layer(), id="full"),
    pytest.param(layer(heads=2), id="no-sharing"),
    pytest.param(layer(window=5), id="window"),
    pytest.param(layer(window=1), id="window-of-itself"),
    pytest.param(layer(softcap=1.5), id="softcap"),
    pytest.param(layer(sinks=True), id="sinks"),
    pytest.param(layer(window=6, softcap=2.0, sinks=True), id="everything"),
]
BATCHES = [
    pytest.param([(0, 1)], id="one-token"),
    pytest.param([(0, 9)], id="fresh-prefill"),
    pytest.param([(4, 9)], id="later-chunk"),
    pytest.param([(7, 1), (8, 1), (6, 1)], id="decode-of-like-lengths"),
    pytest.param([(3, 1), (60, 1), (0, 1), (61, 1), (20, 1)], id="decode-of-unlike-lengths"),
    pytest.param([(9, 1), (900, 1), (40, 1), (890, 1)], id="decode-in-two-groups"),
    pytest.param([(11, 1), (11, 1)], id="decode-of-equal-lengths"),
    pytest.param([(30, 1), (0, 13), (5, 3), (2, 1), (17, 20)], id="mixed"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_dense_attention(kind: AttentionLayer, lengths: list[tuple[int, int]]) -> None:
    check(SdpaBackend(), kind, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_long_chunks_are_cut_into_tiles(kind: AttentionLayer) -> None:
    check(SdpaBackend(mask_elements=64, score_elements=64), kind, [(25, 70), (0, 50), (40, 1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: AttentionLayer, dtype: torch.dtype) -> None:
    check(SdpaBackend(), kind, [(30, 1), (0, 13), (5, 3), (2, 1)], dtype=dtype, tolerance=2e-2)


def test_queries_need_not_be_contiguous_or_of_the_cache_dtype() -> None:
    cache = KvCache(KvSpec(2, 2, 8, BLOCK, torch.bfloat16), 4, torch.device("cpu"))
    heads_first = torch.randn(3, 4, 6, 8)  # query, key and value as the models give them
    query, key, value = (item.transpose(0, 1) for item in heads_first)
    key, value = key[:, :2], value[:, :2]
    backend = SdpaBackend()
    batch = StepBatch(
        query_starts=np.asarray([0, 6]),
        query_lens=np.asarray([6]),
        kv_lens=np.asarray([6]),
        tables=[np.asarray([2, 0])],
        write_rows=torch.from_numpy(
            np.asarray([2] * 4 + [0] * 2) * cache.rows_per_block + np.asarray([0, 1, 2, 3, 0, 1])
        ),
    )
    backend.prepare(batch, cache)
    found = backend.forward(FULL, query, key, value, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense(FULL, query, key, value, None), rtol=0.05, atol=0.05)
    stored, _ = cache.layer(1)
    torch.testing.assert_close(stored[2], key[:4].transpose(0, 1).bfloat16())
    torch.testing.assert_close(stored[0, :, :2], key[4:].transpose(0, 1).bfloat16())


def test_flashinfer_is_not_chosen_where_it_has_no_kernels() -> None:
    assert not flashinfer_fits(torch.float32, 128)
    assert not flashinfer_fits(torch.bfloat16, 80)
