"""Paged attention in plain torch: gather blocks, then scaled dot product attention.

It is the CPU's backend, and any other device's when nothing better is there. Prefill chunks run
one sequence at a time; single-token rows run in padded batches of similar length. Soft caps and
sinks, which torch's fused attention does not know, take an explicit float32 path.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from engine.attention.base import AttentionLayer, IntArray, StepBatch
from engine.kv_cache import KvCache

_MASK_ELEMENTS = 1 << 21  # largest mask of one call: queries x keys
_SCORE_ELEMENTS = 1 << 23  # largest score tensor of the explicit path: heads x queries x keys
_MIN_TILE, _MAX_TILE = 16, 256  # queries of one call, if it needs a mask
_MAX_PADDING = 1.15  # blocks gathered for a decode batch, per block needed,
_FREE_PADDING = 64  # and blocks beyond that, worth less than another call


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [first, last) of a chunk against keys [begin, end) of what was gathered."""

    first: int
    last: int
    begin: int
    end: int
    mask: torch.Tensor | None  # [queries, keys], True: visible; None: plainly causal


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence's chunk. Without `panels` its keys are all new: no need to gather."""

    first_row: int
    last_row: int
    panels: torch.Tensor | None
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _Decode:
    """Single-token rows of several sequences, gathered to one length.

    `hidden` numbers the gathered tokens (of the flattened batch) that no query sees. They may be
    another request's leftovers, NaN even, so they are cleared: 0 times NaN would be NaN.
    """

    rows: torch.Tensor  # [batch]
    panels: torch.Tensor  # [batch * blocks]
    begin: int  # keys [begin, end) of each sequence's gathered blocks are used
    end: int
    mask: torch.Tensor | None  # [batch, 1, 1, end - begin]
    hidden: torch.Tensor | None


class SdpaBackend:
    """Implements AttentionBackend on any device."""

    name = "sdpa-paged"

    def __init__(
        self, *, mask_elements: int = _MASK_ELEMENTS, score_elements: int = _SCORE_ELEMENTS
    ) -> None:
        self._mask_elements = mask_elements
        self._score_elements = score_elements
        self._batch: StepBatch | None = None
        self._cache: KvCache | None = None
        self._prefills: dict[tuple[int | None, int, bool], list[_Prefill]] = {}
        self._decodes: dict[int | None, list[_Decode]] = {}

    def prepare(self, batch: StepBatch, cache: KvCache) -> None:
        """Take the step; index tensors are made when the first layer of a kind asks for them."""
        self._batch = batch
        self._cache = cache
        self._prefills = {}
        self._decodes = {}

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See AttentionBackend.forward."""
        self._write(layer, key, value)
        return self.attend(layer, query, key, value, sinks)

    def _write(self, layer: AttentionLayer, key: torch.Tensor, value: torch.Tensor) -> None:
        assert self._batch is not None
        assert self._cache is not None
        self._cache.write(layer.index, self._batch.write_rows, key, value)

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` without the write, for keys and values that are in the cache already."""
        assert self._cache is not None
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        working = query.to(self._cache.spec.dtype)
        self._attend_prefills(layer, working, key, value, sinks, out)
        self._attend_decodes(layer, working, sinks, out)
        return out

    def _attend_prefills(
        self,
        layer: AttentionLayer,
        working: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The chunks' rows of `out`; `working` is the query in the cache's dtype."""
        assert self._cache is not None
        cache = self._cache
        for prefill in self._prefills_for(layer):
            rows = slice(prefill.first_row, prefill.last_row)
            if prefill.panels is None:
                keys, values = key[rows].to(working.dtype), value[rows].to(working.dtype)
            else:
                keys, values = cache.gather(layer.index, prefill.panels)
            for tile in prefill.tiles:
                first, last = rows.start + tile.first, rows.start + tile.last
                out[first:last] = _attend_chunk(
                    layer,
                    working[first:last],
                    keys[tile.begin : tile.end],
                    values[tile.begin : tile.end],
                    tile.mask,
                    sinks,
                )

    def _attend_decodes(
        self,
        layer: AttentionLayer,
        working: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The single tokens' rows of `out`."""
        assert self._cache is not None
        cache = self._cache
        for decode in self._decodes_for(layer):
            keys, values = cache.gather(layer.index, decode.panels)
            if decode.hidden is not None:
                keys.index_fill_(0, decode.hidden, 0)
                values.index_fill_(0, decode.hidden, 0)
            batch = decode.rows.shape[0]
            keys = keys.view(batch, -1, *keys.shape[1:])[:, decode.begin : decode.end]
            values = values.view(batch, -1, *values.shape[1:])[:, decode.begin : decode.end]
            out[decode.rows] = _attend_rows(
                layer, working[decode.rows], keys, values, decode.mask, sinks
            ).to(out.dtype)

    def _prefills_for(self, layer: AttentionLayer) -> list[_Prefill]:
        explicit = is_explicit(layer)
        tile_elements = self._score_elements // layer.num_heads if explicit else self._mask_elements
        kind = (layer.window, tile_elements, explicit)
        found = self._prefills.get(kind)
        if found is None:
            batch, cache = self._batch, self._cache
            assert batch is not None
            assert cache is not None
            found = self._prefills[kind] = [
                _cut_prefill(batch, cache, int(index), layer.window, tile_elements, explicit)
                for index in np.flatnonzero(batch.query_lens > 1)
            ]
        return found

    def _decodes_for(self, layer: AttentionLayer) -> list[_Decode]:
        found = self._decodes.get(layer.window)
        if found is None:
            assert self._batch is not None
            assert self._cache is not None
            found = self._decodes[layer.window] = _cut_decodes(
                self._batch, self._cache, layer.window
            )
        return found


def is_explicit(layer: AttentionLayer) -> bool:
    """Whether torch's fused attention does not know what the layer needs."""
    return layer.softcap is not None or layer.has_sinks


def _cut_decodes(batch: StepBatch, cache: KvCache, window: int | None) -> list[_Decode]:
    """Cut a step's single tokens into calls of the attention function."""
    sequences = np.flatnonzero(batch.query_lens == 1)
    if not len(sequences):
        return []
    ends = batch.kv_lens[sequences]
    begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    block_size = cache.block_size
    first_blocks = begins // block_size
    counts = -(-ends // block_size) - first_blocks
    decodes = []
    for group in _groups(counts):
        tables = [
            batch.tables[sequences[i]][first_blocks[i] : first_blocks[i] + counts[i]] for i in group
        ]
        skipped = first_blocks[group] * block_size
        decodes.append(
            _pad(
                batch.query_starts[sequences[group]],
                tables,
                begins[group] - skipped,
                ends[group] - skipped,
                cache,
            )
        )
    return decodes


def _cut_prefill(
    batch: StepBatch,
    cache: KvCache,
    index: int,
    window: int | None,
    tile_elements: int,
    explicit: bool,
) -> _Prefill:
    first_row = int(batch.query_starts[index])
    length = int(batch.query_lens[index])
    kv_len = int(batch.kv_lens[index])
    start = kv_len - length
    within = window is None or kv_len <= window
    if start == 0 and within and not explicit:
        tile = _Tile(0, length, 0, length, None)
        return _Prefill(first_row, first_row + length, None, (tile,))
    oldest = 0 if window is None else max(0, start - window + 1)
    first_block = 0 if start == 0 else oldest // cache.block_size
    origin = first_block * cache.block_size  # position of the first gathered key
    span = kv_len if window is None else min(kv_len, 2 * window)
    longest = _MAX_TILE if window is None else min(_MAX_TILE, max(64, window))
    step = min(max(_MIN_TILE, tile_elements // span), longest)
    tiles = []
    for first in range(0, length, step):
        last = min(first + step, length)
        begin = origin if window is None else max(origin, start + first - window + 1)
        end = start + last
        queries = torch.arange(start + first, end, device=cache.device)[:, None]
        keys = torch.arange(begin, end, device=cache.device)[None, :]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        tiles.append(_Tile(first, last, begin - origin, end - origin, mask))
    panels = None
    if start > 0:
        blocks = batch.tables[index][first_block : -(-kv_len // cache.block_size)]
        panels = _to_device(blocks * cache.panels_per_block, cache.device)
    return _Prefill(first_row, first_row + length, panels, tuple(tiles))


def _groups(counts: IntArray) -> list[IntArray]:
    """Split decode rows so that padding to a group's longest wastes little."""
    if counts.max() * len(counts) <= _MAX_PADDING * counts.sum() + _FREE_PADDING:
        return [np.arange(len(counts))]
    groups: list[IntArray] = []
    order = np.argsort(-counts, kind="stable")
    begin, needed = 0, 0
    for place, row in enumerate(order):
        padded = counts[order[begin]] * (place - begin + 1)
        if padded > _MAX_PADDING * (needed + counts[row]) + _FREE_PADDING:
            groups.append(order[begin:place])
            begin, needed = place, 0
        needed += counts[row]
    groups.append(order[begin:])
    return groups


def _pad(
    rows: IntArray, tables: list[IntArray], begins: IntArray, ends: IntArray, cache: KvCache
) -> _Decode:
    """One group: tables padded with each sequence's own last block, what is not seen masked."""
    longest = max(len(table) for table in tables)
    panels = np.empty((len(tables), longest), dtype=np.int64)
    for i, table in enumerate(tables):
        panels[i, : len(table)] = table
        panels[i, len(table) :] = table[-1]
    panels *= cache.panels_per_block
    begin, end = int(begins.min()), int(ends.max())
    mask = hidden = None
    if int(begins.max()) != begin or int(ends.min()) != end:
        position = np.arange(longest * cache.block_size)
        seen = (position >= begins[:, None]) & (position < ends[:, None])
        hidden = _to_device(np.flatnonzero(~seen), cache.device)
        mask = torch.from_numpy(np.ascontiguousarray(seen[:, None, None, begin:end]))
        mask = mask.to(cache.device, non_blocking=True)
    return _Decode(
        _to_device(rows, cache.device),
        _to_device(panels.reshape(-1), cache.device),
        begin,
        end,
        mask,
        hidden,
    )


def _to_device(values: IntArray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _attend_chunk(
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence: query [queries, heads, dim], key and value [keys, kv_heads, dim]."""
    length = query.shape[0]
    grouped = query.view(length, layer.num_kv_heads, -1, layer.head_dim)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if is_explicit(layer):
        # [1, kv_heads, heads per kv head, queries, dim]
        result = _explicit(
            layer, grouped.permute(1, 2, 0, 3)[None], key[None], value[None], mask, sinks
        )
        return result[0].permute(2, 0, 1, 3).reshape(length, layer.num_heads, layer.head_dim)
    # The heads that share a KV head become the batch, so that keys are expanded, never copied.
    sharing = grouped.shape[2]
    result = functional.scaled_dot_product_attention(
        grouped.permute(2, 1, 0, 3),
        key.expand(sharing, -1, -1, -1),
        value.expand(sharing, -1, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=layer.scaling,
    )
    return result.permute(2, 1, 0, 3).reshape(length, layer.num_heads, layer.head_dim)


def _attend_rows(
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token of each sequence: query [batch, heads, dim], key [batch, keys, kv_heads, dim]."""
    batch = query.shape[0]
    # The heads that share a KV head become its queries: no causality among them is meant.
    grouped = query.view(batch, layer.num_kv_heads, -1, layer.head_dim)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if is_explicit(layer):
        wide = None if mask is None else mask[:, :, :, None]
        result = _explicit(layer, grouped[:, :, :, None], key, value, wide, sinks)
    else:
        result = functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=layer.scaling
        )
    return result.reshape(batch, layer.num_heads, layer.head_dim)


def _explicit(
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention written out in float32, with soft cap and sinks.

    Args:
        layer: its scaling, soft cap and head counts.
        query: [batch, kv_heads, heads per kv head, queries, dim].
        key: [batch, kv_heads, keys, dim].
        value: likewise.
        mask: True where visible; broadcasts to [batch, kv_heads, sharing, queries, keys].
        sinks: [heads] or None.
    """
    shape = query.shape
    flat = query.float().reshape(*shape[:2], -1, shape[-1])
    scores = torch.matmul(flat, key.float().transpose(-1, -2)).view(*shape[:4], -1)
    scores *= layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    sink = None
    if sinks is not None:
        sink = sinks.float().view(1, shape[1], shape[2], 1, 1)
        top = torch.maximum(top, sink)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    weights = weights.view(*shape[:2], -1, scores.shape[-1])
    mixed = torch.matmul(weights, value.float()).view(shape)
    return (mixed / total).to(query.dtype)
