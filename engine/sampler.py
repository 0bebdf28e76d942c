"""Draws tokens from logit rows, for the whole batch at once.

Order (API reference, section 3): log-probabilities of the model's own logits; greedy arg max, ties
to the lowest id; else temperature, top-k, top-p, draw.
"""

from collections.abc import Sequence

import torch

from contracts.events import TokenLogprob
from engine.noise import draw_key, gumbel
from engine.plan import Sampled, SampleSlot


def sample(logits: torch.Tensor, rows: Sequence[int], slots: Sequence[SampleSlot]) -> list[Sampled]:
    """Draw one token for each slot.

    Args:
        logits: float32 [num_rows, vocab]; not changed.
        rows: for each slot, the logit row it draws from.
        slots: what to draw and how.
    """
    tokens = [0] * len(slots)
    greedy = [i for i, slot in enumerate(slots) if slot.params.greedy]
    drawn = [i for i, slot in enumerate(slots) if not slot.params.greedy]
    if greedy:
        best = torch.argmax(_select(logits, [rows[i] for i in greedy]), dim=-1).tolist()
        for i, token in zip(greedy, best, strict=True):
            tokens[i] = token
    if drawn:
        picked = _draw(_select(logits, [rows[i] for i in drawn]), [slots[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[i] = token
    logprobs = _logprobs(logits, rows, slots, tokens)
    return [Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def _select(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if rows == list(range(logits.shape[0])):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


def _draw(logits: torch.Tensor, slots: list[SampleSlot]) -> list[int]:
    keys = [draw_key(slot.params.seed, slot.choice, slot.position) for slot in slots]
    temperature = [slot.params.temperature for slot in slots]
    scaled = logits / torch.tensor(temperature, device=logits.device)[:, None]
    vocab = logits.shape[-1]
    filtered = [0 < slot.params.top_k < vocab or slot.params.top_p < 1.0 for slot in slots]
    tokens = [0] * len(slots)
    plain = [i for i, yes in enumerate(filtered) if not yes]
    if plain:
        ids = torch.arange(vocab, device=logits.device)[None, :]
        noisy = _select(scaled, plain) + gumbel(ids, [keys[i] for i in plain])
        for i, token in zip(plain, torch.argmax(noisy, dim=-1).tolist(), strict=True):
            tokens[i] = token
    kept = [i for i, yes in enumerate(filtered) if yes]
    if kept:
        values, ids = _truncate(_select(scaled, kept), [slots[i] for i in kept])
        noisy = values + gumbel(ids, [keys[i] for i in kept])
        winner = torch.argmax(noisy, dim=-1, keepdim=True)
        for i, token in zip(kept, ids.gather(1, winner)[:, 0].tolist(), strict=True):
            tokens[i] = token
    return tokens


def _truncate(scaled: torch.Tensor, slots: list[SampleSlot]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the top-k and then the top-p tokens of each row.

    Returns:
        (values, token ids), both [rows, kept], best first; values dropped by a filter are -inf.
    """
    vocab = scaled.shape[-1]
    top_k = [slot.params.top_k if 0 < slot.params.top_k < vocab else vocab for slot in slots]
    top_p = torch.tensor([slot.params.top_p for slot in slots], device=scaled.device)[:, None]
    values, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)  # ties by id
    width = max(top_k)
    values, ids = values[:, :width], ids[:, :width]
    rank = torch.arange(width, device=scaled.device)[None, :]
    values = values.masked_fill(
        rank >= torch.tensor(top_k, device=scaled.device)[:, None], float("-inf")
    )
    probabilities = torch.softmax(values, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    # top_p = 1 keeps all, whatever the sum rounds to; the best token always stays.
    dropped = (before >= top_p) & (top_p < 1.0) & (rank > 0)
    return values.masked_fill(dropped, float("-inf")), ids


def _logprobs(
    logits: torch.Tensor, rows: Sequence[int], slots: Sequence[SampleSlot], tokens: list[int]
) -> list[TokenLogprob | None]:
    result: list[TokenLogprob | None] = [None] * len(slots)
    asked = [i for i, slot in enumerate(slots) if slot.params.logprobs is not None]
    if not asked:
        return result
    scores = torch.log_softmax(_select(logits, [rows[i] for i in asked]), dim=-1)
    own = scores.gather(1, torch.tensor([[tokens[i]] for i in asked], device=logits.device))
    width = max(slots[i].params.logprobs or 0 for i in asked)
    best, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    best_rows, id_rows = best[:, :width].tolist(), ids[:, :width].tolist()
    for row, i in enumerate(asked):
        count = slots[i].params.logprobs or 0
        top = tuple(zip(id_rows[row][:count], best_rows[row][:count], strict=True))
        result[i] = TokenLogprob(float(own[row, 0]), top)
    return result
