"""Stateless sampling noise: a counter-based function of (seed, position, token id).

Rules of protocol notes, section 10: E = -log1p(-v) with v = (x + 0.5) * 2**-32 from a 32-bit
hash x, in float32; a draw is the arg max of `logit - log(E)`. Nothing depends on worker, batch
or replay. On CPUs attention/draw.cpp computes the same.
"""

import torch

LEAST = -4.0  # the noise of 2**32 - 1 is -3.1, but in float32 E is infinite there: no token
# could win with it, not even the only one left.
_MASK64 = (1 << 64) - 1
_MASK32 = 0xFFFFFFFF


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def draw_key(seed: int, choice: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys of one draw; choice i uses seed + i modulo 2**64."""
    mixed = _splitmix64(_splitmix64((seed + choice) & _MASK64) ^ _splitmix64(position + 1))
    return mixed & _MASK32, mixed >> 32


def _mix32(x: torch.Tensor) -> torch.Tensor:
    # A 32-bit permutation of full avalanche in int64 arithmetic (products stay below 2**63).
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def gumbel(token_ids: torch.Tensor, keys: list[tuple[int, int]]) -> torch.Tensor:
    """-log(E) for each token of each draw.

    Args:
        token_ids: [rows, k] or [1, k], int64.
        keys: one pair of `draw_key` a row.

    Returns:
        float32 [rows, k], none below LEAST.
    """
    pairs = torch.tensor(keys, dtype=torch.int64, device=token_ids.device)
    first, second = pairs[:, :1], pairs[:, 1:]
    x = _mix32((token_ids * 0x9E3779B1 + first) & _MASK32)
    x = _mix32((x + second) & _MASK32)
    v = (x.to(torch.float32) + 0.5) * 2.0**-32
    return (-torch.log(-torch.log1p(-v))).clamp(min=LEAST)
