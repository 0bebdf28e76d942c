"""The numeric check at load: our paged path against the model's own attention, same weights."""

import logging

import numpy as np
import torch

from contracts.sampling import SamplingParams
from engine import hook
from engine.architectures import refuse
from engine.differences import TOLERANCE, logit_difference
from engine.plan import Chunk, SampleSlot, StepPlan
from engine.runner import ModelRunner

log = logging.getLogger(__name__)

_SLOTS = (SampleSlot(choice=0, position=0, params=SamplingParams(max_tokens=1)),)


def probe(runner: ModelRunner) -> float:
    """Compare logits of two short prompts: eager attention in one go, and our path in chunks.

    Uses some blocks of the cache, which must be unused yet, and clears them. The ranks of a worker
    do this together: each with its own share of the heads, all with the same logits.

    Returns:
        The largest difference found, in units of the logits' spread.

    Raises:
        UnsupportedModel: the difference is beyond what rounding explains.
    """
    model, cache = runner.model, runner.cache
    size = cache.block_size
    budget = min(3 * size, model.max_model_len, (cache.num_blocks - 1) * size)
    random = np.random.default_rng(0)
    tokens = tuple(int(token) for token in random.integers(0, model.vocab_size, max(budget, 1)))
    short = tokens[: max(1, min(size // 2, budget // 2))][::-1] if cache.num_blocks > 1 else ()
    # The long prompt's blocks descend, so that an order taken for granted shows.
    table = tuple(range(cache.num_blocks - 1, max(0, cache.num_blocks - 5), -1)) or (0,)
    try:
        worst = max(
            logit_difference(_eager(runner, prompt), row)
            for prompt, row in _paged(runner, tokens, short, table)
        )
    finally:
        cache.tensor[[0, *table]] = 0
    limit = TOLERANCE[model.dtype]
    if not worst <= limit:  # NaN is a failure too
        raise refuse(
            str(model.config.model_type),
            f"its logits through {runner.backend.name} attention differ from its own by "
            f"{worst:.2g} of their spread (allowed: {limit:.2g})",
        )
    log.info("probe: largest difference %.2g of the logits' spread", worst)
    return worst


def _paged(
    runner: ModelRunner, tokens: tuple[int, ...], short: tuple[int, ...], table: tuple[int, ...]
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Prompts and our logits after them: two chunks, then a decode step beside the other prompt."""
    rows: list[tuple[tuple[int, ...], torch.Tensor]] = []
    last = len(tokens) - 1
    middle = min(runner.cache.block_size + 3, last)
    bounds = [(begin, end) for begin, end in ((0, middle), (middle, last)) if end > begin]
    for begin, end in bounds:
        chunk = Chunk(0, begin, tokens[begin:end], table, _SLOTS)
        rows.append((tokens[:end], runner.forward(StepPlan(0, (chunk,)))[0]))
    chunks = [Chunk(0, last, tokens[last:], table, _SLOTS)]
    if short:
        before = Chunk(1, 0, short[:-1], (0,))
        if before.token_ids:
            runner.forward(StepPlan(0, (before,)))
        chunks.append(Chunk(1, len(short) - 1, short[-1:], (0,), _SLOTS))
    logits = runner.forward(StepPlan(0, tuple(chunks)))
    rows.append((tokens, logits[0]))
    if short:
        rows.append((short, logits[1]))
    return rows


def _eager(runner: ModelRunner, prompt: tuple[int, ...]) -> torch.Tensor:
    """Last row of logits by the model's own eager attention, without any cache."""
    module = runner.model.module
    ids = torch.tensor([prompt], device=runner.model.device)
    positions = torch.arange(len(prompt), device=runner.model.device)[None]
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            result = module(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        module.set_attn_implementation(hook.SERVE)
    logits: torch.Tensor = result.logits[0, -1]
    return logits.float()
