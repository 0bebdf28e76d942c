"""Draws with a temperature on the CPU, in one native call (attention/draw.cpp).

The rule is that of engine/sampler.py: min-p, top-k, top-p, then the noise of engine/noise.py. torch
would wake its threads for many small passes over the vocabulary, and sort all of it for top-p.
"""

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch

from engine.plan import SampleSlot

_MASK64 = (1 << 64) - 1
_DRAW = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.int64),
        ("row", np.int64),
        ("top_k", np.int64),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
        ("top_p", np.float32),
        ("unused", np.float32),
    ]
)


def draw(
    library: ctypes.CDLL, logits: torch.Tensor, rows: Sequence[int], slots: Sequence[SampleSlot]
) -> list[int]:
    """A token for each slot, none of them greedy.

    Args:
        library: of `native_library`.
        logits: float32 [num_rows, vocab] on the CPU; may hold -inf, but no row only that.
        rows: for each slot, its row.
        slots: how to draw.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    wanted = np.array(
        [
            (
                slot.params.seed + slot.choice & _MASK64,
                slot.position,
                row,
                max(0, slot.params.top_k),
                slot.params.temperature,
                math.log(slot.params.min_p) if slot.params.min_p > 0.0 else -math.inf,
                slot.params.top_p,
                0.0,
            )
            for row, slot in zip(rows, slots, strict=True)
        ],
        dtype=_DRAW,
    )
    tokens = np.zeros(len(slots), dtype=np.int64)
    library.baton_draw(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        wanted.ctypes.data,
        len(slots),
        tokens.ctypes.data,
        torch.get_num_threads(),
    )
    found: list[int] = tokens.tolist()
    return found
