"""Attention written out densely, and a check of paged backends against it."""

import numpy as np
import torch

from engine.attention.base import AttentionBackend, AttentionLayer, StepBatch
from engine.kv_cache import KvCache, KvSpec

BLOCK = 4  # tokens


def layer(
    *,
    heads: int = 4,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    head_dim: int = 8,
) -> AttentionLayer:
    """A layer of two KV heads."""
    return AttentionLayer(1, heads, 2, head_dim, 0.4, window, softcap, sinks)


def dense(
    kind: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query [queries, heads, dim] is the end of the sequence key, value [keys, kv_heads, dim]."""
    sharing = kind.num_heads // kind.num_kv_heads
    keys, values = (item.repeat_interleave(sharing, dim=1).double() for item in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * kind.scaling
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    for row in range(query.shape[0]):
        position = key.shape[0] - query.shape[0] + row
        scores[:, row, position + 1 :] = -torch.inf
        if kind.window is not None:
            scores[:, row, : max(0, position + 1 - kind.window)] = -torch.inf
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, query.shape[0], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1)[:, :, : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


def check(
    backend: AttentionBackend,
    kind: AttentionLayer,
    lengths: list[tuple[int, int]],  # (tokens before, new tokens) of each sequence
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    block_size: int = BLOCK,
    tolerance: float = 2e-5,
) -> None:
    """One step over sequences in shuffled blocks, whose unused slots hold NaN."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    needed = [-(-sum(length) // block_size) + 1 for length in lengths]  # a spare one each
    spec = KvSpec(3, kind.num_kv_heads, kind.head_dim, block_size, dtype)
    cache = KvCache(spec, sum(needed) + 2, torch.device(device))
    cache.tensor.fill_(torch.nan)
    order = torch.randperm(cache.num_blocks, generator=generator).numpy()
    ends = np.cumsum(needed)
    tables = [order[end - count : end] for end, count in zip(ends, needed, strict=True)]
    keys, values, rows = [], [], []
    for (before, new), table in zip(lengths, tables, strict=True):
        keys.append(draw(before + new, kind.num_kv_heads, kind.head_dim))
        values.append(draw(before + new, kind.num_kv_heads, kind.head_dim))
        position = np.arange(before + new)
        slot = table[position // block_size] * cache.rows_per_block + position % block_size
        at = torch.from_numpy(slot).to(device)
        cache.write(kind.index, at[:before], keys[-1][:before], values[-1][:before])
        rows.append(at[before:])
    new_lens = np.asarray([new for _, new in lengths])
    starts = np.concatenate([[0], np.cumsum(new_lens)])
    queries = draw(int(starts[-1]), kind.num_heads, kind.head_dim)
    sinks = draw(kind.num_heads) if kind.has_sinks else None
    batch = StepBatch(
        query_starts=starts,
        query_lens=new_lens,
        kv_lens=np.asarray([before + new for before, new in lengths]),
        tables=tables,
        write_rows=torch.cat(rows),
    )
    new_keys = torch.cat([key[before:] for (before, _), key in zip(lengths, keys, strict=True)])
    new_values = torch.cat(
        [value[before:] for (before, _), value in zip(lengths, values, strict=True)]
    )
    backend.prepare(batch, cache)
    found = backend.forward(kind, queries, new_keys, new_values, sinks)
    assert found.shape == queries.shape
    for index in range(len(lengths)):
        part = slice(starts[index], starts[index + 1])
        expected = dense(kind, queries[part], keys[index], values[index], sinks)
        torch.testing.assert_close(found[part], expected, rtol=tolerance, atol=tolerance)
