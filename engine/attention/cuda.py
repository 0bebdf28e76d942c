"""Paged attention on NVIDIA GPUs through FlashInfer. Written against its documentation; not yet
run on a device.

FlashInfer takes page tables as compressed rows (`indptr`, `indices`, `last_page_len`) and cache
views of any page stride, so the block-major cache is read in place. A plan is made once per step
for each kind of layer (window, soft cap, scaling) and shared by all layers of that kind.
"""

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from engine.attention.base import AttentionLayer, StepBatch
from engine.attention.cpu import SdpaBackend
from engine.kv_cache import KvCache

_WORKSPACE_BYTES = 256 << 20
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)

_Kind = tuple[int | None, float | None, float, int]


def flashinfer_fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashInfer is installed and has kernels for this dtype and head dimension."""
    if dtype not in _DTYPES or head_dim not in _HEAD_DIMS:
        return False
    return importlib.util.find_spec("flashinfer") is not None


class FlashInferBackend:
    """Implements AttentionBackend on CUDA. Layers with sinks use the plain torch path.

    `library` is the flashinfer module, or what stands in for it.
    """

    name = "flashinfer"

    def __init__(self, device: torch.device, library: Any = None) -> None:
        self._flashinfer = library or importlib.import_module("flashinfer")
        self._device = device
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._plain = SdpaBackend()
        self._decoders: dict[_Kind, Any] = {}  # wrappers, kept over steps
        self._prefillers: dict[_Kind, Any] = {}
        self._planned: dict[_Kind, Any] = {}  # wrappers planned for this step
        self._batch: StepBatch | None = None
        self._cache: KvCache | None = None
        self._decode_only = False
        self._pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._query_indptr: torch.Tensor | None = None

    def prepare(self, batch: StepBatch, cache: KvCache) -> None:
        """Build the page table; the wrappers are planned when the first layer of a kind asks."""
        self._plain.prepare(batch, cache)
        self._batch = batch
        self._cache = cache
        self._planned = {}
        self._decode_only = bool((batch.query_lens == 1).all())
        counts = -(-batch.kv_lens // cache.block_size)
        indptr = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=indptr[1:])
        indices = np.concatenate(
            [table[:count] for table, count in zip(batch.tables, counts, strict=True)]
        ).astype(np.int32)
        last_page_len = (batch.kv_lens - (counts - 1) * cache.block_size).astype(np.int32)
        self._pages = (
            torch.from_numpy(indptr),
            torch.from_numpy(indices).to(self._device, non_blocking=True),
            torch.from_numpy(last_page_len),
        )
        self._query_indptr = torch.from_numpy(batch.query_starts.astype(np.int32))

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See AttentionBackend.forward."""
        assert self._batch is not None
        assert self._cache is not None
        self._cache.write(layer.index, self._batch.write_rows, key, value)
        return self.attend(layer, query, key, value, sinks)

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        assert self._cache is not None
        if layer.has_sinks:
            return self._plain.attend(layer, query, key, value, sinks)
        kind = (layer.window, layer.softcap, layer.scaling, layer.num_heads)
        wrapper = self._planned.get(kind)
        if wrapper is None:
            wrapper = self._plan(kind, layer)
            self._planned[kind] = wrapper
        result: torch.Tensor = wrapper.run(
            query.to(self._cache.spec.dtype).contiguous(), self._cache.layer(layer.index)
        )
        return result.to(query.dtype)

    def _plan(self, kind: _Kind, layer: AttentionLayer) -> Any:
        assert self._cache is not None
        assert self._pages is not None
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, self._cache.block_size)
        options = {
            "window_left": -1 if layer.window is None else layer.window - 1,
            "logits_soft_cap": layer.softcap,
            "sm_scale": layer.scaling,
            "q_data_type": self._cache.spec.dtype,
            "kv_data_type": self._cache.spec.dtype,
        }
        if self._decode_only:
            wrapper = self._decoders.get(kind)
            if wrapper is None:
                # CUDA-core decode kernels exist for few group sizes; tensor cores take any.
                sharing = layer.num_heads // layer.num_kv_heads
                wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "HND", use_tensor_cores=sharing > 2, backend="fa2"
                )
                self._decoders[kind] = wrapper
            wrapper.plan(*self._pages, *shape, **options)
            return wrapper
        wrapper = self._prefillers.get(kind)
        if wrapper is None:
            wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "HND", backend="fa2"
            )
            self._prefillers[kind] = wrapper
        wrapper.plan(self._query_indptr, *self._pages, *shape, causal=True, **options)
        return wrapper
