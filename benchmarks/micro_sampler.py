"""What a step's draws cost, by batch and by what the requests ask for."""

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.micro_clock import Effort, settle
from contracts.sampling import SamplingParams
from engine.plan import SampleSlot
from engine.sampler import sample
from engine.sampling_state import SamplingStates

_MOST = 1 << 30
_PROMPT = 256  # tokens, for penalties
KINDS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(_MOST, temperature=0.0),
    "seeded": SamplingParams(_MOST, temperature=0.8, seed=7),
    "seeded top-p top-k": SamplingParams(_MOST, temperature=0.8, top_p=0.9, top_k=50, seed=7),
    "penalties": SamplingParams(
        _MOST,
        temperature=0.0,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.2,
    ),
    "greedy, 5 logprobs": SamplingParams(_MOST, temperature=0.0, logprobs=5),
}


@dataclass(frozen=True, slots=True)
class SamplerFigures:
    """Drawing one token for each of `batch` sequences; what `kind` asks is in KINDS."""

    kind: str
    batch: int
    vocab_size: int
    us: float
    us_per_row: float


def sampler_figures(
    kind: str, batch: int, vocab_size: int, device: torch.device, effort: Effort, seed: int
) -> SamplerFigures:
    """Measure one kind; slots are made as the scheduler makes them, and that is not timed."""
    params = KINDS[kind]
    draw = random.Random(seed)
    prompt = tuple(draw.randrange(vocab_size) for _ in range(_PROMPT))
    logits = torch.randn(batch, vocab_size, device=device)
    states = SamplingStates()
    outputs: list[list[int]] = [[] for _ in range(batch)]
    rows = list(range(batch))

    def once() -> float:
        slots = []
        for index, output in enumerate(outputs):
            before = (prompt, tuple(output)) if params.looks_back else ((), ())
            slots.append(SampleSlot(0, len(output), params, index, *before))
        settle(device)
        began = time.perf_counter()
        drawn = sample(logits, rows, slots, states)
        settle(device)
        seconds = time.perf_counter() - began
        for output, one in zip(outputs, drawn, strict=True):
            output.append(one.token_id)
        return seconds

    with torch.inference_mode():
        once()
        found: list[float] = []
        began = time.perf_counter()
        while effort.goes_on(len(found), began):
            found.append(once())
    us = statistics.median(found) * 1e6
    return SamplerFigures(kind, batch, vocab_size, us, us / batch)
