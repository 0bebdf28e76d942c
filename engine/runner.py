"""Computes a plan: a flattened batch in, the logit rows that are drawn from or scored."""

import inspect
from itertools import chain

import numpy as np
import torch

from engine.attention.base import AttentionBackend, IntArray, StepBatch
from engine.kv_cache import KvCache
from engine.model import LoadedModel
from engine.native_decoder import MAX_BATCH, NativeDecoder
from engine.plan import Chunk, StepPlan


def rows_of(chunk: Chunk) -> list[int]:
    """Which of a chunk's tokens have their logits kept, by offset: the scored ones, the last."""
    rows = list(range(len(chunk.scored_ids)))
    if chunk.slots:
        rows.append(len(chunk.token_ids) - 1)
    return rows


class BlockTables:
    """Block tables as arrays. Keeps those of the last step, for most sequences have them again."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[tuple[int, ...], IntArray]] = {}

    def of(self, plan: StepPlan) -> list[IntArray]:
        """One array of block ids for each sequence, in the plan's order."""
        kept: dict[int, tuple[tuple[int, ...], IntArray]] = {}
        tables = []
        sequences = [stream.sequence for stream in plan.decodes.streams]
        streams = zip(sequences, plan.decodes.block_tables, strict=True)
        others = [(chunk.sequence, chunk.block_table) for chunk in plan.others]
        for sequence, blocks in chain(streams, others):
            entry = self._last.get(sequence)
            if entry is None or entry[0] is not blocks:  # the same object while nothing changes
                entry = (blocks, np.asarray(blocks, dtype=np.int64))
            kept[sequence] = entry
            tables.append(entry[1])
        self._last = kept
        return tables


class ModelRunner:
    """Runs a model over the paged cache. The only user of both; used by one thread.

    With a `decoder`, that computes the steps instead of the model's modules.
    """

    def __init__(self, model: LoadedModel, cache: KvCache, backend: AttentionBackend) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.decoder: NativeDecoder | None = None
        self._tables = BlockTables()
        parameters = inspect.signature(model.module.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        model.slot.backend = backend

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Compute a step: copies first, then all chunks in one forward pass.

        Returns:
            [rows, vocab_size] float32 on the model's device: the logits of each chunk's
            `rows_of`, in plan order. The device may still be computing them.
        """
        with torch.inference_mode():
            self.cache.copy_blocks(plan.copies)
            if not plan.decodes and not plan.others:
                return torch.empty((0, self.model.vocab_size), device=self.model.device)
            return self._forward(plan)

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        device, decodes, others = self.model.device, plan.decodes, plan.others
        count = len(decodes)
        lens = np.ones(count + len(others), dtype=np.int64)
        lens[count:] = [len(chunk.token_ids) for chunk in others]
        starts = np.empty(len(lens), dtype=np.int64)
        starts[:count] = decodes.starts
        starts[count:] = [chunk.start for chunk in others]
        query_starts = np.zeros(len(lens) + 1, dtype=np.int64)
        np.cumsum(lens, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        tables = self._tables.of(plan)

        # One array, so one copy to the device: token ids, positions, cache rows, rows to keep.
        kept = list(range(count))
        for begin, chunk in zip(query_starts[count:].tolist(), others, strict=False):
            kept += [begin + offset for offset in rows_of(chunk)]
        packed = np.empty(3 * num_tokens + len(kept), dtype=np.int64)
        tokens, positions, rows = (
            packed[part * num_tokens : (part + 1) * num_tokens] for part in range(3)
        )
        tokens[:] = np.fromiter(
            chain(decodes.token_ids, *(chunk.token_ids for chunk in others)), np.int64, num_tokens
        )
        positions[:] = np.arange(num_tokens) + np.repeat(starts - query_starts[:-1], lens)
        self._cache_rows(positions, lens, query_starts, tables, rows)
        packed[3 * num_tokens :] = kept
        if self.decoder is not None and len(kept) == num_tokens == len(lens) <= MAX_BATCH:
            return self.decoder.step(tokens, positions, rows, tables, starts + lens)
        on_device = torch.from_numpy(packed).to(device, non_blocking=True)
        keep = on_device[3 * num_tokens :]

        self.backend.prepare(
            StepBatch(
                query_starts=query_starts,
                query_lens=lens,
                kv_lens=starts + lens,
                tables=tables,
                write_rows=on_device[2 * num_tokens : 3 * num_tokens],
            ),
            self.cache,
        )
        if self.decoder is not None:
            return self.decoder.forward(
                on_device[: 3 * num_tokens].view(3, num_tokens), keep, self.backend
            )
        self.model.slot.backend = self.backend
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        logits: torch.Tensor = self.model.module(
            input_ids=on_device[None, :num_tokens],
            position_ids=on_device[None, num_tokens : 2 * num_tokens],
            use_cache=False,
            **options,
        ).logits[0]
        if not self._keeps_logits:
            logits = logits.index_select(0, keep)
        return logits.float()

    def _cache_rows(
        self,
        positions: IntArray,
        lens: IntArray,
        query_starts: IntArray,
        tables: list[IntArray],
        rows: IntArray,
    ) -> None:
        """Fill `rows` with each token's row in the cache (see KvCache.write)."""
        slot, offset = np.divmod(positions, self.cache.block_size)
        if len(lens) == len(positions):  # decode only: one block number of each table
            blocks = [table[index] for table, index in zip(tables, slot.tolist(), strict=True)]
            rows[:] = blocks
        else:
            for index, table in enumerate(tables):
                part = slice(query_starts[index], query_starts[index + 1])
                rows[part] = table[slot[part]]
        rows *= self.cache.rows_per_block
        rows += offset
