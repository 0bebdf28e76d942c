"""How far two computations of the same logits may be apart."""

import torch

# Largest root-mean-square difference of logits, in units of their own spread.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}


def logit_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Root mean square of the difference over the expected logits' standard deviation."""
    spread = expected.std()
    return float((found - expected).square().mean().sqrt() / spread.clamp_min(1e-6))
