"""Logits processors for tests: importable by name, as an operator's would be."""

import threading

import torch

NAMES = r"tests\.support\.logit_tricks\..*"


def prefer_even(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A plain function: even tokens, but for every third output."""
    if len(output_ids) % 3 != 2:
        logits[1::2] -= 2.0
    return logits


class Descend:
    """With a state: each token must be lower than the one before it, from `start`; then again."""

    def __init__(self, start: int = 300, width: int = 60) -> None:
        self.start, self.width = start, width
        self.calls: list[int] = []

    def __call__(
        self, prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append(len(output_ids))
        last = output_ids[-1] if output_ids else self.start
        if last < self.width:
            last = self.start
        kept = torch.full_like(logits, -torch.inf)
        kept[last - self.width : last] = logits[last - self.width : last]
        return kept


class FailAfter:
    """Raises once so many tokens are out."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output_ids) >= self.count:
            raise RuntimeError("as asked")
        return logits


ENTERED = threading.Event()
GO_ON = threading.Event()


class Slow:
    """Its making says `ENTERED` and waits for `GO_ON`."""

    def __init__(self) -> None:
        ENTERED.set()
        GO_ON.wait(30.0)

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits
