"""The FlashInfer backend: the real library on a GPU; elsewhere what we hand to it.

The stand-in computes densely from what FlashInfer documents of its page tables, so wrong indices,
lengths, windows or view strides show without a GPU. It says nothing about FlashInfer itself.
"""

from typing import Any

import pytest
import torch

from engine.attention.base import AttentionLayer
from engine.attention.cuda import FlashInferBackend
from tests.support.dense_attention import check, dense, layer

KINDS = [
    pytest.param(layer(head_dim=64), id="full"),
    pytest.param(layer(head_dim=64, heads=6), id="three-to-one"),
    pytest.param(layer(head_dim=64, window=9), id="window"),
    pytest.param(layer(head_dim=64, softcap=1.5), id="softcap"),
    pytest.param(layer(head_dim=64, sinks=True), id="sinks"),
]
BATCHES = [
    pytest.param([(0, 40)], id="prefill"),
    pytest.param([(16, 16)], id="later-chunk"),
    pytest.param([(3, 1), (60, 1), (0, 1), (15, 1), (16, 1)], id="decode"),
    pytest.param([(30, 1), (0, 13), (5, 3), (17, 20)], id="mixed"),
]


class StandInWrapper:
    """Both wrappers in one: `plan` takes the documented arguments, `run` computes densely."""

    def __init__(self, prefill: bool) -> None:
        self._prefill = prefill

    def plan(self, *tables: Any, **options: Any) -> None:
        if self._prefill:
            assert options.pop("causal")
            query_indptr, *tables_left = tables
        else:
            tables_left = list(tables)
            query_indptr = torch.arange(len(tables_left[2]) + 1, dtype=torch.int32)
        indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size = tables_left
        assert {item.dtype for item in (query_indptr, indptr, indices, last_page_len)} == {
            torch.int32
        }
        self._query_indptr, self._indptr = query_indptr.tolist(), indptr.tolist()
        self._indices, self._last = indices.long(), last_page_len.tolist()
        self._page_size = page_size
        window = options["window_left"] + 1 or None  # FlashInfer leaves the query itself out
        assert options["q_data_type"] == options["kv_data_type"]
        scale, softcap = options["sm_scale"], options["logits_soft_cap"]
        self._layer = AttentionLayer(0, heads, kv_heads, head_dim, scale, window, softcap)

    def run(self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        parts = []
        for index, last in enumerate(self._last):
            table = self._indices[self._indptr[index] : self._indptr[index + 1]]
            length = (len(table) - 1) * self._page_size + last
            # HND: [pages, heads, tokens, dim]
            key, value = (page[table].transpose(1, 2).flatten(0, 1)[:length] for page in pages)
            first, end = self._query_indptr[index : index + 2]
            parts.append(dense(self._layer, query[first:end], key, value, None))
        return torch.cat(parts)


class StandIn:
    """In place of the flashinfer module."""

    def BatchDecodeWithPagedKVCacheWrapper(
        self, workspace: torch.Tensor, kv_layout: str, **_: Any
    ) -> StandInWrapper:
        assert kv_layout == "HND"
        return StandInWrapper(prefill=False)

    def BatchPrefillWithPagedKVCacheWrapper(
        self, workspace: torch.Tensor, kv_layout: str, **_: Any
    ) -> StandInWrapper:
        assert kv_layout == "HND"
        return StandInWrapper(prefill=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", BATCHES)
def test_what_is_handed_over_describes_the_step(
    kind: AttentionLayer, lengths: list[tuple[int, int]]
) -> None:
    backend = FlashInferBackend(torch.device("cpu"), StandIn())
    check(backend, kind, lengths, block_size=16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_dense_attention(kind: AttentionLayer, lengths: list[tuple[int, int]]) -> None:
    pytest.importorskip("flashinfer")
    backend = FlashInferBackend(torch.device("cuda"))
    check(
        backend,
        kind,
        lengths,
        dtype=torch.bfloat16,
        device="cuda",
        block_size=16,
        tolerance=2e-2,
    )
