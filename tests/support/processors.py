"""Logits processors that the suite allows: with them the noise model writes what it must."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Script:
    """The output is `token_ids`, then whatever the model draws."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = tuple(token_ids)

    def __call__(
        self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: "torch.Tensor"
    ) -> "torch.Tensor":
        """Leave one token to draw. `logits`: [vocab]."""
        if len(output_ids) >= len(self._token_ids):
            return logits
        token = self._token_ids[len(output_ids)]
        forced = logits.new_full(logits.shape, float("-inf"))
        forced[token] = 0.0
        return forced


def never_300(
    prompt_ids: Sequence[int], output_ids: Sequence[int], logits: "torch.Tensor"
) -> "torch.Tensor":
    """A plain function as processor."""
    changed = logits.clone()
    changed[300] = float("-inf")
    return changed


class FromExtraArgs:
    """Draws the token that the request's own `vllm_xargs` name."""

    def __init__(self, vllm_xargs: dict[str, int]) -> None:
        self._token = vllm_xargs["token"]

    def __call__(self, output_ids: Sequence[int], logits: "torch.Tensor") -> "torch.Tensor":
        """Leave one token to draw. `logits`: [vocab]."""
        forced = logits.new_full(logits.shape, float("-inf"))
        forced[self._token] = 0.0
        return forced
