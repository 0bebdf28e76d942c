"""Counts of the tokens seen so far, and the penalties computed from them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Counts = NDArray[np.float32]


class TokenCounts:
    """How often each token occurs in the output; tokens of the prompt are there with count 0.

    Only tokens that occur take memory. `ids` and `counts` are parallel; a token is in them once.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        outputs, times = np.unique(np.asarray(output_ids, dtype=np.int64), return_counts=True)
        rest = np.setdiff1d(prompt, outputs, assume_unique=True)
        self._size = len(outputs) + len(rest)
        self._ids: Ids = np.concatenate([outputs, rest])
        self._counts: Counts = np.zeros(self._size, dtype=np.float32)
        self._counts[: len(outputs)] = times
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}

    def add(self, token_id: int) -> None:
        """Count one more output."""
        place = self._places.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self._size + 16)
                self._counts = np.resize(self._counts, 2 * self._size + 16)
            self._ids[place] = token_id
            self._counts[place] = 0.0
            self._size += 1
        self._counts[place] += 1.0

    @property
    def ids(self) -> Ids:
        """Tokens of prompt and output."""
        return self._ids[: self._size]

    @property
    def counts(self) -> Counts:
        """For each of `ids`, how often it was generated."""
        return self._counts[: self._size]


def penalize(
    logits: torch.Tensor, rows: Sequence[int], seen: Sequence[TokenCounts], factors: Counts
) -> None:
    """Apply repetition, then frequency and presence penalties, in place.

    Args:
        logits: float32 [num_rows, vocab].
        rows: the rows to change.
        seen: for each of `rows`, its tokens; ids outside the vocabulary do not count.
        factors: float32 [len(rows), 3]: repetition, frequency, presence.
    """
    lengths = [len(one.ids) for one in seen]
    ids = np.concatenate([one.ids for one in seen])
    counts = np.concatenate([one.counts for one in seen])
    where = np.repeat(np.asarray(rows, dtype=np.int64), lengths)
    each = np.repeat(factors, lengths, axis=0)
    inside = ids < logits.shape[-1]
    device = logits.device
    table = np.concatenate([counts[:, None], each], axis=1)[inside]
    index = torch.from_numpy(np.stack([where, ids])[:, inside]).to(device)
    count, repetition, frequency, presence = torch.from_numpy(table).to(device).unbind(1)
    values = logits[index[0], index[1]]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count
    values = values - presence * (count > 0)
    logits[index[0], index[1]] = values
