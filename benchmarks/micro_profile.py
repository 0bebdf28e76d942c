"""Where a step's time goes, by torch's profiler: operations by group, and Python between them.

Ranges are put around attention and sampler, so that what belongs to them is told from the rest.
The profiler slows a step down; `plain_ms` says what it takes without.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.micro_clock import Effort, median_s, settle
from benchmarks.micro_engine import MicroEngine
from benchmarks.micro_parts import users_of_samplers

_RANGES = ("attention", "sampling")
_GROUPS = ("attention", "matmul", "sampling", "small")
_PREFIX = "baton::"
_MATMULS = ("mm", "linear", "gemm", "matmul", "xmma", "cutlass", "splitk", "gemv", "nvjet")
_ATTENTION = ("attention", "flash", "fmha", "batchdecode", "batchprefill", "pagedkv", "sdpa")
_SAMPLING = ("argmax", "gumbel", "sort", "topk", "softmax_warp")
_STEPS = 10
_TOP = 12  # operations told by name


@dataclass(frozen=True, slots=True)
class OperationTime:
    """One kind of operation, per step. `group` is where it is counted."""

    name: str
    group: str
    calls: float
    ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Milliseconds per step, under the profiler but for `plain_ms`.

    `groups` are CPU times: of attention and sampling all that is spent there (torch's operations,
    native code and Python: an entry of `top` named like the range), of matmul and small ops their
    own, and Python: what is left of the wall time. On a GPU they are the time to launch, with the
    CUDA driver's own; `device_groups` have the kernels' time, and what is idle between them.
    """

    kind: str  # decode or prefill
    batch: int
    context: int  # decode: tokens before the step; prefill: tokens computed
    plain_ms: float
    wall_ms: float
    operations: float  # a step
    groups: dict[str, float]
    device_groups: dict[str, float]
    top: tuple[OperationTime, ...]


def decode_profile(engine: MicroEngine, batch: int, context: int, effort: Effort) -> Profile:
    """Profile decode steps. Raises DoesNotFit."""
    with engine.decoding(batch, context, effort.repeats + 2 * _STEPS):
        return _profile(engine, "decode", batch, context, engine.step, effort)


def prefill_profile(engine: MicroEngine, length: int, effort: Effort) -> Profile:
    """Profile the prefill of one prompt. Raises DoesNotFit."""

    def compute() -> None:
        engine.add_prefill(length)
        engine.step()
        while engine.finishing:
            engine.step()

    return _profile(engine, "prefill", 1, length, compute, effort)


def _profile(
    engine: MicroEngine,
    kind: str,
    batch: int,
    context: int,
    step: Callable[[], None],
    effort: Effort,
) -> Profile:
    device = engine.device
    plain_s = median_s(step, device, effort)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = max(1, min(_STEPS, effort.repeats, int(effort.budget_s / plain_s)))
    with _ranges(engine), profile(activities=activities):  # its first step is slower
        step()
    with _ranges(engine), profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        settle(device)
        wall_ms = (time.perf_counter() - began) * 1e3 / steps
    groups = dict.fromkeys((*_GROUPS, "driver") if device.type == "cuda" else _GROUPS, 0.0)
    on_device: dict[str, float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in profiler.events() or ():
        if event.device_type.name != "CPU":
            if not event.name.startswith(_PREFIX):  # a range has a shadow on the device
                on_device[group_of(event.name, None)] += event.self_device_time_total / 1e3 / steps
            continue
        if event.name.startswith(_PREFIX):  # what no operation in the range accounts for
            group = event.name.removeprefix(_PREFIX)
        elif _is_operation(event.name):
            group = group_of(event.name, _range_of(event))
        elif event.name.startswith("cu"):
            group = "driver"
        else:
            continue  # the profiler's own
        ms = event.self_cpu_time_total / 1e3 / steps
        groups[group] += ms
        calls[event.name, group] += 1
        spent[event.name, group] += ms
    groups["python"] = max(0.0, wall_ms - sum(groups.values()))
    if on_device:
        on_device["idle"] = max(0.0, wall_ms - sum(on_device.values()))
    largest = sorted(spent.items(), key=lambda item: item[1], reverse=True)[:_TOP]
    return Profile(
        kind=kind,
        batch=batch,
        context=context,
        plain_ms=plain_s * 1e3,
        wall_ms=wall_ms,
        operations=sum(calls[key] for key in calls if _is_operation(key[0])) / steps,
        groups=groups,
        device_groups=dict(on_device),
        top=tuple(
            OperationTime(name, group, calls[name, group] / steps, ms)
            for (name, group), ms in largest
        ),
    )


def _is_operation(name: str) -> bool:
    return "::" in name and not name.startswith(_PREFIX)


def group_of(name: str, inside: str | None) -> str:
    """The group of an operation or a kernel; `inside`: the range it was called in, if any."""
    if inside is not None:
        return inside
    low = name.lower()
    if any(part in low for part in _ATTENTION):
        return "attention"
    if any(part in low for part in _MATMULS):
        return "matmul"
    if any(part in low for part in _SAMPLING):
        return "sampling"
    return "small"


def _range_of(event: Any) -> str | None:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_PREFIX):
            return str(parent.name.removeprefix(_PREFIX))
        parent = parent.cpu_parent
    return None


@contextmanager
def _ranges(engine: MicroEngine) -> Iterator[None]:
    def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_PREFIX + name):
                return function(*args, **kwargs)

        return call

    attention, sampling = _RANGES
    backend = engine.backend
    with ExitStack() as stack:
        # The profiler sees what torch calls: steps go through the model's modules here.
        stack.enter_context(patch.object(engine.runner, "decoder", None))
        stack.enter_context(patch.object(backend, "forward", ranged(attention, backend.forward)))
        for owner, name, function in users_of_samplers():
            stack.enter_context(patch.object(owner, name, ranged(sampling, function)))
        yield
