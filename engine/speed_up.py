"""Puts the native decoder to use where it is seen to compute what the model's modules compute."""

import logging

import numpy as np
import torch

from contracts.sampling import SamplingParams
from engine.native_decoder import NativeDecoder, NotThisKind
from engine.plan import Chunk, SampleSlot, StepPlan
from engine.runner import ModelRunner

log = logging.getLogger(__name__)

_SLOTS = (SampleSlot(choice=0, position=0, params=SamplingParams(max_tokens=1)),)
_BATCH = 11  # tiles of 8, 2 and 1 rows
# Largest root-mean-square difference of logits, in units of their own spread: both round alike,
# and differ by the order of their sums.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def use_native_decoder(runner: ModelRunner) -> None:
    """Give `runner` a decoder if its model has one that computes the same.

    Uses some blocks of the cache, which must be unused yet, and clears them.
    """
    if runner.model.device.type != "cpu":
        return
    try:
        decoder = NativeDecoder(runner.model, runner.cache, torch.get_num_threads())
    except (NotThisKind, AttributeError, RuntimeError) as error:
        log.info("decode steps run through the model's modules: %s", error)
        return
    difference = _difference(runner, decoder)
    limit = _TOLERANCE[runner.model.dtype]
    if difference <= limit:  # not if NaN
        runner.decoder = decoder
        log.info("decode steps run natively, difference %.2g of the logits' spread", difference)
        return
    decoder.close()
    log.warning(
        "decode steps run through the model's modules: natively their logits would differ by %.2g "
        "of their spread (allowed: %.2g)",
        difference,
        limit,
    )


def _difference(runner: ModelRunner, decoder: NativeDecoder) -> float:
    """The largest of several steps, between the modules and `decoder`."""
    model, cache = runner.model, runner.cache
    batch = min(_BATCH, cache.num_blocks)
    length = min(cache.block_size, model.max_model_len) - 1
    random = np.random.default_rng(1)
    tokens = random.integers(0, model.vocab_size, (batch, length + 1)).tolist()
    before = [1 + (3 * row) % length for row in range(batch)]
    try:
        for row, count in enumerate(before):
            runner.forward(StepPlan(0, (Chunk(row, 0, tuple(tokens[row][:count]), (row,)),)))
        worst = 0.0
        for rows in (range(batch), range(batch // 2, batch // 2 + 1)):
            step = StepPlan(
                0,
                tuple(
                    Chunk(row, before[row], (tokens[row][before[row]],), (row,), _SLOTS)
                    for row in rows
                ),
            )
            expected = runner.forward(step)
            runner.decoder = decoder
            found = runner.forward(step)
            runner.decoder = None
            error = (found - expected).square().mean(dim=1).sqrt()
            worst = max(worst, float((error / expected.std(dim=1).clamp_min(1e-6)).max()))
    finally:
        runner.decoder = None
        cache.tensor[:batch] = 0
    return worst
