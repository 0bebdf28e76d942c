"""Computes a plan: a flattened batch in, the logit rows that are drawn from or scored."""

import inspect
from typing import Protocol

import torch

from engine.arrays import BlockTables, Moves, StepArrays, step_arrays
from engine.attention.base import AttentionBackend, StepBatch
from engine.kv_cache import KvCache
from engine.model import LoadedModel
from engine.native_decoder import MAX_BATCH, NativeDecoder
from engine.offload import OffloadMemory
from engine.plan import StepPlan


class StepFollowers(Protocol):
    """The other ranks, which compute the same steps with their shares of the model."""

    def send(self, moves: Moves, arrays: StepArrays | None) -> None:
        """Have them move blocks, then compute; with no arrays: move, and return once all have."""
        ...


class ModelRunner:
    """Runs a model over the paged cache. The only user of both; used by one thread.

    With a `decoder`, that computes the steps instead of the model's modules. `followers`: of rank
    0 of several, which alone makes plans.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: KvCache,
        backend: AttentionBackend,
        followers: StepFollowers | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.followers = followers
        self.decoder: NativeDecoder | None = None
        self.offload: OffloadMemory | None = None
        self._tables = BlockTables()
        parameters = inspect.signature(model.module.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        model.slot.backend = backend

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Compute a step: moves first, then all chunks in one forward pass.

        Returns:
            [rows, vocab_size] float32 on the model's device: the logits of each chunk's
            `rows_of`, in plan order. The device may still be computing them.
        """
        with torch.inference_mode():
            moves = Moves(plan.offloads, plan.loads, plan.copies)
            if not plan.decodes and not plan.others:
                self.move(moves)
                if self.followers is not None and moves:
                    self.followers.send(moves, None)
                return torch.empty((0, self.model.vocab_size), device=self.model.device)
            arrays = step_arrays(plan, self._tables, self.cache)
            if self.followers is not None:
                self.followers.send(moves, arrays)
            self.move(moves)
            return self.compute(arrays)

    def move(self, moves: Moves) -> None:
        """Move blocks."""
        if self.offload is not None:
            self.offload.move(moves.offloads, moves.loads)
        self.cache.copy_blocks(moves.copies)

    def compute(self, arrays: StepArrays) -> torch.Tensor:
        """One forward pass; as `forward`. Within `torch.inference_mode`."""
        num_tokens = arrays.num_tokens
        num_kept = len(arrays.packed) - 3 * num_tokens
        if (
            self.decoder is not None
            and num_kept == num_tokens == len(arrays.query_lens) <= MAX_BATCH
        ):
            tokens, positions, rows = arrays.packed[: 3 * num_tokens].reshape(3, num_tokens)
            return self.decoder.step(tokens, positions, rows, arrays.tables, arrays.kv_lens)
        on_device = torch.from_numpy(arrays.packed).to(self.model.device, non_blocking=True)
        keep = on_device[3 * num_tokens :]
        self.backend.prepare(
            StepBatch(
                query_starts=arrays.query_starts,
                query_lens=arrays.query_lens,
                kv_lens=arrays.kv_lens,
                tables=arrays.tables,
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
