"""Puts the native decoder to use where it is seen to compute what the model's modules compute."""

import logging

import numpy as np
import torch

from contracts.sampling import SamplingParams
from engine.differences import logit_difference
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
        difference = _difference(runner, decoder)
    except NotThisKind as error:
        log.info("steps run through the model's modules: %s", error)
        return
    except Exception:  # a model that only looks like one of the kind is served without it
        log.warning("steps run through the model's modules", exc_info=True)
        return
    limit = _TOLERANCE[runner.model.dtype]
    if difference <= limit:  # not if NaN
        runner.decoder = decoder
        log.info("steps run natively, difference %.2g of the logits' spread", difference)
        return
    decoder.close()
    log.warning(
        "steps run through the model's modules: natively their logits would differ by %.2g "
        "of their spread (allowed: %.2g)",
        difference,
        limit,
    )


def _difference(runner: ModelRunner, decoder: NativeDecoder) -> float:
    """The largest of several steps, between the modules and `decoder`."""
    cache = runner.cache
    try:
        expected = _logits(runner)
        cache.tensor[: 2 * _BATCH] = 0
        runner.decoder = decoder
        found = _logits(runner)
    finally:
        runner.decoder = None
        cache.tensor[: 2 * _BATCH] = 0
    rows = zip(expected, found, strict=True)
    return float(torch.tensor([logit_difference(*pair) for pair in rows]).max())  # NaN stays NaN


def _logits(runner: ModelRunner) -> torch.Tensor:
    """Of prompts, each a step; then of one more token, of all in one step and of one alone.

    Each has two blocks, the second before the first, if the cache has as many.
    """
    model, cache = runner.model, runner.cache
    batch = min(_BATCH, cache.num_blocks // 2)
    if not batch:
        raise NotThisKind("the cache has one block")
    length = min(2 * cache.block_size, model.max_model_len) - 1
    random = np.random.default_rng(1)
    tokens = random.integers(0, model.vocab_size, (batch, length + 1)).tolist()
    before = [1 + (3 * row) % length for row in range(batch)]
    tables = [(2 * row + 1, 2 * row) for row in range(batch)]
    steps: list[tuple[Chunk, ...]] = [
        (Chunk(row, 0, tuple(tokens[row][:count]), tables[row], _SLOTS),)
        for row, count in enumerate(before)
    ]
    last = [
        Chunk(row, count, (tokens[row][count],), tables[row], _SLOTS)
        for row, count in enumerate(before)
    ]
    steps += [tuple(last), (last[batch // 2],)]
    return torch.cat([runner.forward(StepPlan(0, step)) for step in steps])
