"""What a request does to its logit rows before the draw: masks, biases, processors, penalties."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.penalties import penalize
from engine.plan import SampleSlot
from engine.sampling_state import DrawFailure, SamplingState

LARGEST = 1e30  # for +inf from a processor, which would turn to NaN further on
NEVER = float("-inf")

Ids = NDArray[np.int64]


def is_edited(slot: SampleSlot) -> bool:
    """Whether the slot's logits are changed before temperature and filters."""
    params = slot.params
    if params.beam:
        return False
    return (
        bool(params.logit_bias)
        or bool(params.allowed_token_ids)
        or slot.position < params.min_tokens
        or params.looks_back
    )


def mask_by_grammars(
    logits: torch.Tensor, states: Sequence[SamplingState], errors: dict[int, str]
) -> None:
    """Rule out, in place, what the grammars do not let follow.

    Args:
        logits: float32 [len(states), vocab].
        states: one a row.
        errors: gets the reason for each row that has no possible token.
    """
    guided = [row for row, state in enumerate(states) if state.guided and row not in errors]
    if not guided:
        return
    vocab = logits.shape[-1]
    masks = np.zeros((len(guided), -(-vocab // 32)), dtype=np.int32)
    for mask, row in zip(masks, guided, strict=True):
        try:
            states[row].fill(mask)
        except DrawFailure as failure:
            errors[row] = str(failure)
            mask[:] = -1
    words = torch.from_numpy(masks).to(logits.device)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> bits) & 1).flatten(1)[:, :vocab].bool()
    index = torch.tensor(guided, device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, NEVER)


def edit(
    logits: torch.Tensor,
    slots: Sequence[SampleSlot],
    states: Sequence[SamplingState],
    errors: dict[int, str],
) -> None:
    """Everything after the grammar, in place.

    Allowed tokens, bad words and min_tokens are each left out for a row in which they would leave
    nothing. `errors` gets the reason for each row that a processor fails on.

    Args:
        logits: float32 [len(slots), vocab].
        slots: one a row.
        states: one a row.
        errors: by row; those in it already are left as they are.
    """
    rows = [row for row in range(len(slots)) if row not in errors]
    _allow(logits, [(row, mask) for row in rows if (mask := states[row].allowed) is not None])
    _forbid(logits, [(row, states[row].banned()) for row in rows if slots[row].params.bad_words])
    _forbid(
        logits,
        [
            (row, states[row].min_tokens_ids)
            for row in rows
            if slots[row].position < slots[row].params.min_tokens
        ],
    )
    _add(logits, [(row, states[row]) for row in rows if len(states[row].bias_ids)])
    for row in rows:
        if states[row].processors:
            try:
                logits[row] = _processed(logits[row], states[row])
            except DrawFailure as failure:
                errors[row] = str(failure)
    punished = [row for row in rows if row not in errors and states[row].counts is not None]
    if punished:
        factors = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (slots[row].params for row in punished)
        ]
        seen = [counts for row in punished if (counts := states[row].counts) is not None]
        penalize(logits, punished, seen, np.asarray(factors, dtype=np.float32))


def _allow(logits: torch.Tensor, masks: list[tuple[int, torch.Tensor]]) -> None:
    if not masks:
        return
    index = torch.tensor([row for row, _ in masks], device=logits.device)
    before = logits[index]
    after = before.masked_fill(~torch.stack([mask for _, mask in masks]), NEVER)
    some = (after > NEVER).any(dim=-1, keepdim=True)
    logits[index] = torch.where(some, after, before)


def _forbid(logits: torch.Tensor, banned: list[tuple[int, Ids]]) -> None:
    banned = [(row, ids) for row, ids in banned if len(ids)]
    if not banned:
        return
    device = logits.device
    places = np.repeat(np.arange(len(banned)), [len(ids) for _, ids in banned])
    place = torch.from_numpy(places).to(device)
    index = torch.tensor([row for row, _ in banned], device=device)
    ids = torch.from_numpy(np.concatenate([ids for _, ids in banned])).to(device)
    before = logits[index]
    after = before.clone()
    after[place, ids] = NEVER
    some = (after > NEVER).any(dim=-1, keepdim=True)
    logits[index] = torch.where(some, after, before)


def _add(logits: torch.Tensor, biased: list[tuple[int, SamplingState]]) -> None:
    if not biased:
        return
    device = logits.device
    where = np.repeat([row for row, _ in biased], [len(state.bias_ids) for _, state in biased])
    ids = torch.from_numpy(np.concatenate([state.bias_ids for _, state in biased])).to(device)
    values = torch.from_numpy(np.concatenate([state.bias for _, state in biased])).to(device)
    logits.index_put_((torch.from_numpy(where).to(device), ids), values, accumulate=True)


def _processed(row: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Run the request's processors over one row, [vocab]; they may change their argument."""
    result = row
    for processor in state.processors:
        try:
            result = processor(list(state.prompt_ids), list(state.consumed), result.clone())
        except Exception as error:  # the operator's code
            raise DrawFailure(f"a logits processor failed: {type(error).__name__}") from error
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            raise DrawFailure("a logits processor did not return a tensor of floats")
        if result.shape != row.shape:
            raise DrawFailure(
                f"a logits processor returned the shape {list(result.shape)} instead of "
                f"{list(row.shape)}"
            )
        result = result.to(device=row.device, dtype=row.dtype).clamp(max=LARGEST)
    if bool(torch.isnan(result).any()):
        raise DrawFailure("a logits processor returned NaN")
    if not bool((result > NEVER).any()):
        raise DrawFailure("the logits processors leave no token")
    return result
