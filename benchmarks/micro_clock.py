"""How things are timed on a device: warm up, repeat within a budget, wait for the device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_LEAST = 3  # repeats, however long they take


@dataclass(frozen=True, slots=True)
class Effort:
    """How often something is repeated: `repeats` times, or until `budget_s` is over."""

    repeats: int
    budget_s: float

    def goes_on(self, done: int, began_s: float) -> bool:
        """Whether to repeat once more; `began_s` is a time of `time.perf_counter`."""
        spent_s = time.perf_counter() - began_s
        return done < min(_LEAST, self.repeats) or (done < self.repeats and spent_s < self.budget_s)


def settle(device: torch.device) -> None:
    """Return when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings_s(function: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """Seconds of each repeat, after one call that does not count."""
    function()
    settle(device)
    found: list[float] = []
    began = time.perf_counter()
    while effort.goes_on(len(found), began):
        start = time.perf_counter()
        function()
        settle(device)
        found.append(time.perf_counter() - start)
    return found


def median_s(function: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """Median seconds of one call."""
    return statistics.median(timings_s(function, device, effort))


def middle_half(values: list[float]) -> list[int]:
    """Indices of the values between the quartiles: their means add up, and shun outliers."""
    order = sorted(range(len(values)), key=values.__getitem__)
    cut = len(order) // 4
    return order[cut : len(order) - cut]
