"""Paged attention on the CPU that reads the cache in place: native.cpp, called without copies.

Single tokens of float32 and bfloat16, and prefill chunks of bfloat16 where the CPU multiplies it,
are computed there; everything else by `SdpaBackend`, layer by layer.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.base import AttentionLayer, IntArray, StepBatch
from engine.attention.cpu import SdpaBackend, is_explicit
from engine.kv_cache import KvCache

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class _Singles:
    """The step's single tokens: their rows, and the keys [begins, ends) of their tables."""

    rows: IntArray
    tables: IntArray  # [sequences, longest]
    begins: IntArray
    ends: IntArray


class NativeBackend(SdpaBackend):
    """Implements AttentionBackend on the CPU."""

    name = "native-paged"

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self._library = library
        self._singles: dict[int | None, _Singles | None] = {}

    def prepare(self, batch: StepBatch, cache: KvCache) -> None:
        """See AttentionBackend.prepare."""
        super().prepare(batch, cache)
        self._singles = {}

    def _write(self, layer: AttentionLayer, key: torch.Tensor, value: torch.Tensor) -> None:
        cache, batch = self._cache, self._batch
        assert cache is not None
        assert batch is not None
        size = key.element_size()
        same = key.dtype == value.dtype == cache.spec.dtype
        if not same or key.stride(2) != 1 or value.stride(2) != 1:
            super()._write(layer, key, value)
            return
        keys, values = cache.layer_addresses(layer.index)
        self._library.baton_write(
            key.data_ptr(),
            value.data_ptr(),
            keys,
            values,
            batch.write_rows.data_ptr(),
            len(key),
            layer.num_kv_heads,
            layer.head_dim * size,
            key.stride(0) * size,
            key.stride(1) * size,
            value.stride(0) * size,
            value.stride(1) * size,
            cache.elements_per_head * size,
        )

    def _attend_decodes(
        self,
        layer: AttentionLayer,
        working: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        cache = self._cache
        assert cache is not None
        kind = _KINDS.get(cache.spec.dtype)
        if kind is None or is_explicit(layer) or out.dtype != working.dtype:
            super()._attend_decodes(layer, working, sinks, out)
            return
        singles = self._singles_for(layer.window)
        if singles is None:
            return
        query = _rows_of_heads(working)
        keys, values = cache.layer_addresses(layer.index)
        self._library.baton_decode(
            kind,
            query.data_ptr(),
            out.data_ptr(),
            keys,
            values,
            len(singles.rows),
            singles.rows.ctypes.data,
            singles.tables.ctypes.data,
            singles.tables.shape[1],
            singles.begins.ctypes.data,
            singles.ends.ctypes.data,
            *_shape(layer, cache, query, out),
        )

    def _attend_prefills(
        self,
        layer: AttentionLayer,
        working: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        cache, batch = self._cache, self._batch
        assert cache is not None
        assert batch is not None
        served = cache.spec.dtype == torch.bfloat16 and out.dtype == working.dtype
        if not served or is_explicit(layer) or not self._library.baton_can_prefill(layer.head_dim):
            super()._attend_prefills(layer, working, key, value, sinks, out)
            return
        query = _rows_of_heads(working)
        keys, values = cache.layer_addresses(layer.index)
        for index in np.flatnonzero(batch.query_lens > 1).tolist():
            first = int(batch.query_starts[index])
            self._library.baton_prefill(
                query[first:].data_ptr(),
                out[first:].data_ptr(),
                keys,
                values,
                int(batch.query_lens[index]),
                batch.tables[index].ctypes.data,
                int(batch.kv_lens[index]),
                layer.window or 0,
                *_shape(layer, cache, query, out),
            )

    def _singles_for(self, window: int | None) -> _Singles | None:
        if window not in self._singles:
            assert self._batch is not None
            self._singles[window] = _singles(self._batch, window)
        return self._singles[window]


def _shape(
    layer: AttentionLayer, cache: KvCache, query: torch.Tensor, out: torch.Tensor
) -> tuple[int | float, ...]:
    """The last arguments of both kernels."""
    return (
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        cache.block_size,
        cache.elements_per_block,
        cache.elements_per_head,
        query.stride(0),
        out.stride(0),
        layer.scaling,
        torch.get_num_threads(),
    )


def padded(tables: Sequence[IntArray]) -> IntArray:
    """Block tables as one array, [sequences, longest]."""
    array = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(array, tables, strict=True):
        row[: len(table)] = table
    return array


def _singles(batch: StepBatch, window: int | None) -> _Singles | None:
    sequences = np.flatnonzero(batch.query_lens == 1)
    if not len(sequences):
        return None
    ends = np.ascontiguousarray(batch.kv_lens[sequences])
    begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    chosen = [batch.tables[index] for index in sequences.tolist()]
    tables = padded(chosen)
    rows = np.ascontiguousarray(batch.query_starts[sequences])
    return _Singles(rows, tables, begins, ends)


def _rows_of_heads(query: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] with the heads of a token side by side."""
    _, _, dim = query.shape
    return query if query.stride()[1:] == (dim, 1) else query.contiguous()
