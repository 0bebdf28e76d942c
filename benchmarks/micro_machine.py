"""What the machine can do at best, measured: the lines of the roofline."""

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.micro_clock import Effort, timings_s

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # larger than caches
_SQUARE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Machine:
    """The best of some repeats, with the threads that the engine has.

    `copy_gb_s` counts what a copy reads and what it writes; `read_gb_s` is that of a plain sum.
    `matmul_gflop_s` is of the fastest way to multiply that torch has here.
    """

    device: str
    dtype: str
    threads: int
    torch: str
    copy_bytes: int
    copy_gb_s: float
    read_gb_s: float
    matmul_size: int  # rows and columns of the square matrices
    matmul_gflop_s: float

    def floor_s(self, num_bytes: float, flops: float) -> float:
        """No sooner can something be done that reads so many bytes and multiplies so much."""
        return max(num_bytes / self.copy_gb_s, flops / self.matmul_gflop_s) * 1e-9


def measure_machine(
    device: torch.device, dtype: torch.dtype, effort: Effort, *, quick: bool
) -> Machine:
    """Measure memory and multiplication."""
    copy_bytes = _COPY_BYTES.get(device.type, 1 << 28) >> (2 if quick else 0)
    size = _SQUARE.get(device.type, 1024) >> (2 if quick else 0)
    copy_s, read_s = _memory_s(copy_bytes, device, effort)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    with torch.inference_mode():
        matmul_s = min(min(timings_s(way, device, effort)) for way in _products(left, right))
    return Machine(
        device=_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        copy_bytes=copy_bytes,
        copy_gb_s=2 * copy_bytes / copy_s / 1e9,
        read_gb_s=copy_bytes / read_s / 1e9,
        matmul_size=size,
        matmul_gflop_s=2 * size**3 / matmul_s / 1e9,
    )


def _memory_s(num_bytes: int, device: torch.device, effort: Effort) -> tuple[float, float]:
    """Seconds of a copy and of a sum; the tensors are gone afterwards."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    copy_s = min(timings_s(lambda: target.copy_(source), device, effort))
    return copy_s, min(timings_s(source.sum, device, effort))


def _products(left: torch.Tensor, right: torch.Tensor) -> list[Callable[[], object]]:
    """Ways to multiply: plain, and on a CPU with the right side laid out for oneDNN before."""
    ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(left, right)]
    if left.device.type == "cpu":
        ops = torch.ops.mkldnn
        try:
            packed = ops._reorder_linear_weight(right, left.shape[0])
            ops._linear_pointwise(left, packed, None, "none", [], "")
        except (AttributeError, RuntimeError, NotImplementedError):  # not in this build
            return ways
        ways.append(lambda: ops._linear_pointwise(left, packed, None, "none", [], ""))
    return ways


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
