"""What an attention backend is given and what it must do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.kv_cache import KvCache

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer's attention is, learned from the model itself when it was loaded.

    `window` counts the visible tokens, the query's own included; None: all before it.
    `softcap` c turns each scaled score s into `c * tanh(s / c)`. With `has_sinks` every head has
    one more logit in its softmax that takes weight and gives no value.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's sequences, flattened; sequence i has rows [query_starts[i], query_starts[i + 1]).

    Its queries are its last tokens: query_lens[i] of kv_lens[i]. Its KV is in the blocks
    `tables[i]`, the new tokens' included once they are written to `write_rows` (see KvCache).
    """

    query_starts: IntArray  # [sequences + 1]
    query_lens: IntArray  # [sequences]
    kv_lens: IntArray  # [sequences], in tokens, new ones included
    tables: Sequence[IntArray]  # block ids, at least enough for kv_lens[i] tokens
    write_rows: torch.Tensor  # [tokens] int64, on the cache's device


class AttentionBackend(Protocol):
    """Paged attention on one device. Used by one thread."""

    @property
    def name(self) -> str:
        """What /health says."""

    def prepare(self, batch: StepBatch, cache: KvCache) -> None:
        """Get ready for a step; what is common to all its layers is done here or kept."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the new keys and values into the cache, then attend.

        Args:
            layer: whose attention it is.
            query: [tokens, num_heads, head_dim].
            key: [tokens, num_kv_heads, head_dim].
            value: likewise.
            sinks: [num_heads] if the layer has them.

        Returns:
            [tokens, num_heads, head_dim], in the query's dtype.
        """

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` without the write, for keys and values that are in the cache already."""
