"""Matrix products at the model's own shapes, beside the roofline: by the engine and by torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.micro_clock import Effort, median_s
from benchmarks.micro_machine import Machine
from benchmarks.micro_weights import LinearShape

_MOST_BYTES = 2 << 30  # of plain matrices of one shape


@dataclass(frozen=True, slots=True)
class LinearFigures:
    """`tokens` rows times one matrix of the model's; all of its shape are gone through in turn.

    `us` is of the engine's own layers, None if it has none of that shape (they may be fused);
    `plain_us` is of plain torch. The roofline is the time that the bytes or the products take at
    best. `gflop_s` and `weights_gb_s` are the engine's, or else plain torch's.
    """

    outputs: int
    inputs: int
    count: int
    tokens: int
    us: float | None
    plain_us: float
    weights_gb_s: float
    gflop_s: float
    of_matmul_peak: float
    roofline: float | None
    plain_roofline: float


def linear_figures(
    shape: LinearShape,
    modules: Sequence[Any],
    tokens: int,
    machine: Machine,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
) -> LinearFigures:
    """Measure one shape.

    Args:
        shape: which one.
        modules: the engine's linear layers, of any shape.
        tokens: rows of the input.
        machine: its limits.
        device: where to compute.
        dtype: of inputs and weights.
        effort: of each of the two.
    """
    num_bytes = shape.outputs * shape.inputs * dtype.itemsize
    rows = torch.randn(tokens, shape.inputs, device=device).to(dtype)
    own = [one for one in modules if _size(one) == shape.size]

    def each_s(calls: Sequence[Callable[[torch.Tensor], object]]) -> float:
        def multiply() -> None:
            for call in calls:
                call(rows)

        with torch.inference_mode():
            return median_s(multiply, device, effort) / len(calls)

    seconds = each_s(own) if own else None
    plain_s = each_s(_plain(shape, num_bytes, device, dtype))
    best_s = machine.floor_s(num_bytes, 2.0 * tokens * shape.outputs * shape.inputs)
    gflop_s = 2e-9 * tokens * shape.outputs * shape.inputs / (seconds or plain_s)
    return LinearFigures(
        outputs=shape.outputs,
        inputs=shape.inputs,
        count=shape.count,
        tokens=tokens,
        us=None if seconds is None else seconds * 1e6,
        plain_us=plain_s * 1e6,
        weights_gb_s=num_bytes / (seconds or plain_s) / 1e9,
        gflop_s=gflop_s,
        of_matmul_peak=gflop_s / machine.matmul_gflop_s,
        roofline=None if seconds is None else best_s / seconds,
        plain_roofline=best_s / plain_s,
    )


def _size(module: Any) -> tuple[int | None, int | None]:
    return getattr(module, "out_features", None), getattr(module, "in_features", None)


def _plain(
    shape: LinearShape, num_bytes: int, device: torch.device, dtype: torch.dtype
) -> list[torch.nn.Linear]:
    """As many as the model has, as far as they fit into `_MOST_BYTES`."""
    count = max(1, min(shape.count, _MOST_BYTES // num_bytes))
    options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
    return [torch.nn.Linear(shape.inputs, shape.outputs, **options) for _ in range(count)]
