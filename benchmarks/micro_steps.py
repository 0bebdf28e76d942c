"""Step time of decodes by batch and context, and of prefills by length, beside the roofline."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from benchmarks.micro_clock import Effort, middle_half, settle
from benchmarks.micro_engine import MicroEngine
from benchmarks.micro_machine import Machine
from benchmarks.micro_parts import StepParts, Stopwatch, watched, watched_step

_WARM_UP = 2  # steps

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One kind of step. `parts` were measured apart from `step_ms`, with stopwatches about.

    Fractions are of what the machine was seen to do at best; above 1 means that caches helped.
    `roofline` is the time in which weights and KV can be read, or the products be computed, as a
    share of the step; `linear_roofline` the same of the linear layers alone.
    """

    batch: int
    context: int  # tokens before the step
    tokens: int  # that it computes
    step_ms: float  # median, as in all figures made of it
    best_ms: float
    tokens_per_s: float
    parts: StepParts
    kv_gb_s: float | None  # KV that attention reads, by the time of attention
    kv_of_copy: float | None
    weights_gb_s: float  # weights, by the time of the step
    weights_of_copy: float
    gflop_s: float
    of_matmul_peak: float
    linear_roofline: float | None
    roofline: float


def decode_steps(repeats: int) -> int:
    """By how many tokens at most the sequences of `decode_figures` grow."""
    return 2 * (repeats + _WARM_UP)


def decode_figures(
    engine: MicroEngine, machine: Machine, batch: int, context: int, effort: Effort
) -> StepFigures:
    """Measure decode steps of `batch` sequences after `context` tokens.

    Raises:
        DoesNotFit: no room for them.
    """
    steps = decode_steps(effort.repeats)
    with engine.decoding(batch, context, steps):
        times_ms, parts = _measure(engine, effort, lambda: None)
    seen = batch * engine.seen_tokens(context + steps // 2)  # contexts grow by one a step
    work = _Work(batch, context, tokens=batch, rows=batch, pairs=seen, keys=seen)
    return _figures(engine, machine, work, times_ms, parts)


def prefill_figures(
    engine: MicroEngine, machine: Machine, length: int, effort: Effort
) -> StepFigures:
    """Measure the prefill of one prompt, in as many steps as it takes.

    Raises:
        DoesNotFit: it is too long.
    """
    times_ms, parts = _measure(engine, effort, lambda: engine.add_prefill(length))
    pairs = sum(engine.seen_tokens(position + 1) for position in range(length))
    # No keys are read but those just made: what counts here is the product.
    work = _Work(1, 0, tokens=length, rows=1, pairs=pairs, keys=0.0)
    return _figures(engine, machine, work, times_ms, parts)


def _measure(
    engine: MicroEngine, effort: Effort, begin: Callable[[], object]
) -> tuple[list[float], StepParts]:
    """Milliseconds of plain steps, and the parts of the middle half of watched ones.

    What `begin` adds is computed to its end within one repeat.
    """
    watch = Stopwatch(engine.device)

    def plain() -> float:
        begin()
        settle(engine.device)
        began = time.perf_counter()
        engine.step()
        while engine.finishing:
            engine.step()
        settle(engine.device)
        return (time.perf_counter() - began) * 1e3

    def apart() -> StepParts:
        begin()
        found = [watched_step(engine, watch)]
        while engine.finishing:
            found.append(watched_step(engine, watch))
        return _join(found, sum)

    for _ in range(_WARM_UP):
        plain()
    whole = _repeat(plain, effort)
    with watched(engine, watch):
        for _ in range(_WARM_UP):
            apart()
        each = _repeat(apart, effort)
    middle = middle_half([parts.whole for parts in each])
    return whole, _join([each[index] for index in middle], statistics.fmean)


def _repeat(function: Callable[[], _T], effort: Effort) -> list[_T]:
    found: list[_T] = []
    began = time.perf_counter()
    while effort.goes_on(len(found), began):
        found.append(function())
    return found


def _join(each: list[StepParts], how: Callable[[list[float]], float]) -> StepParts:
    """One for all, part by part."""
    joined: dict[str, float | None] = {}
    for part in fields(StepParts):
        values = [getattr(parts, part.name) for parts in each]
        joined[part.name] = None if None in values else how(values)
    return StepParts(**joined)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a step has to do. `pairs` of query and key, `keys` read, in the mean over layers."""

    batch: int
    context: int
    tokens: int
    rows: int
    pairs: float
    keys: float


def _figures(
    engine: MicroEngine, machine: Machine, work: _Work, times_ms: list[float], parts: StepParts
) -> StepFigures:
    weights = engine.weights
    step_ms = statistics.median(times_ms)
    step_s = step_ms / 1e3
    weight_bytes = weights.elements * engine.parts.model.dtype.itemsize
    linear_flops = weights.flops(work.tokens, work.rows)
    flops = linear_flops + engine.attention_flops(work.pairs)
    kv_bytes = work.keys * engine.kv_bytes_per_token
    kv_gb_s = kv_bytes / parts.attention / 1e6 if kv_bytes and parts.attention else None
    linear_s = machine.floor_s(weight_bytes, linear_flops)
    return StepFigures(
        batch=work.batch,
        context=work.context,
        tokens=work.tokens,
        step_ms=step_ms,
        best_ms=min(times_ms),
        tokens_per_s=work.tokens / step_s,
        parts=parts,
        kv_gb_s=kv_gb_s,
        kv_of_copy=None if kv_gb_s is None else kv_gb_s / machine.copy_gb_s,
        weights_gb_s=weight_bytes / step_s / 1e9,
        weights_of_copy=weight_bytes / step_s / 1e9 / machine.copy_gb_s,
        gflop_s=flops / step_s / 1e9,
        of_matmul_peak=flops / step_s / 1e9 / machine.matmul_gflop_s,
        linear_roofline=linear_s * 1e3 / parts.linear if parts.linear else None,
        roofline=machine.floor_s(weight_bytes + kv_bytes, flops) / step_s,
    )
