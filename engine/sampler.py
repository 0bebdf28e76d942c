"""Draws tokens from logit rows, for the whole batch at once.

Order (API reference, section 3): grammar mask; log-probabilities of what is then there, the
model's own; allowed tokens, bad words, min_tokens, bias, processors, penalties; greedy arg max,
ties to the lowest id; else temperature, min-p, top-k, top-p, draw.
"""

import math
from collections.abc import Sequence

import torch

from contracts.events import PromptLogprob, TokenLogprob
from engine import native_draws
from engine.attention.native_build import native_library
from engine.logit_edits import edit, is_edited, mask_by_grammars
from engine.noise import draw_key, gumbel
from engine.plan import Sampled, SampleSlot
from engine.ranking import best
from engine.sampling_state import DrawFailure, SamplingState, SamplingStates

PIECE = 1 << 24  # prompt scores held at once: 64 MiB of float32


def sample(
    logits: torch.Tensor,
    rows: Sequence[int],
    slots: Sequence[SampleSlot],
    states: SamplingStates,
) -> list[Sampled]:
    """Draw one token for each slot.

    A beam slot gets the best token and, as `logprob.top`, at least the 2n best. A draw that fails
    has token 0 and its `error`; the others do not notice.

    Args:
        logits: float32 [num_rows, vocab]; not changed.
        rows: for each slot, the logit row it draws from.
        slots: what to draw and how.
        states: what the choices' draws remember; brought to after these draws.
    """
    edited = [i for i, slot in enumerate(slots) if is_edited(slot)]
    if not edited:
        return _sample_plain(logits, rows, slots)
    result: list[Sampled] = [Sampled(0)] * len(slots)
    kept = set(edited)
    plain = [i for i in range(len(slots)) if i not in kept]
    if plain:
        drawn = _sample_plain(logits, [rows[i] for i in plain], [slots[i] for i in plain])
        for i, one in zip(plain, drawn, strict=True):
            result[i] = one
    drawn = _sample_edited(
        logits[torch.tensor([rows[i] for i in edited], device=logits.device)],
        [slots[i] for i in edited],
        states,
    )
    for i, one in zip(edited, drawn, strict=True):
        result[i] = one
    states.trim()
    return result


def arg_max(logits: torch.Tensor) -> list[int]:
    """The draws of greedy rows that nothing edits and of which nothing more is told, one a row."""
    found: list[int]
    if logits.device.type == "cpu":
        # Not torch: it would wake its threads for a few microseconds' work, and those then spin
        # for a while on the cores that the next step needs.
        found = logits.numpy().argmax(axis=1).tolist()
    else:
        found = torch.argmax(logits, dim=-1).tolist()
    return found


def _sample_plain(
    logits: torch.Tensor, rows: Sequence[int], slots: Sequence[SampleSlot]
) -> list[Sampled]:
    tokens = _choose(logits, rows, slots)
    logprobs = _logprobs(logits, rows, slots, tokens)
    return [Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def _sample_edited(
    logits: torch.Tensor, slots: list[SampleSlot], states: SamplingStates
) -> list[Sampled]:
    """Draw from rows that are ours to change: [len(slots), vocab], one a slot."""
    result: list[Sampled] = [Sampled(0)] * len(slots)
    found: list[SamplingState] = []
    live: list[int] = []
    for i, slot in enumerate(slots):
        try:
            found.append(states.at(slot, logits.shape[-1], logits.device))
            live.append(i)
        except DrawFailure as failure:
            result[i] = Sampled(0, error=str(failure))
    if not live:
        return result
    kept = [slots[i] for i in live]
    work = _select(logits, live)
    errors: dict[int, str] = {}  # by index into `live`
    mask_by_grammars(work, found, errors)
    asked = [j for j, slot in enumerate(kept) if slot.params.logprobs is not None]
    reported = work[torch.tensor(asked, device=work.device)] if asked else work
    edit(work, kept, found, errors)
    good = [j for j in range(len(kept)) if j not in errors]
    tokens = [0] * len(kept)
    drawn = _choose(work, good, [kept[j] for j in good])
    for j, token in zip(good, drawn, strict=True):
        tokens[j] = token
    logprobs: list[TokenLogprob | None] = [None] * len(kept)
    told = _logprobs(
        reported, range(len(asked)), [kept[j] for j in asked], [tokens[j] for j in asked]
    )
    for j, logprob in zip(asked, told, strict=True):
        logprobs[j] = logprob
    for j, i in enumerate(live):
        ended = False
        if j not in errors and kept[j].params.looks_back:
            try:
                ended = found[j].feed((tokens[j],))
            except DrawFailure as failure:
                errors[j] = str(failure)
        if j in errors:
            states.forget(kept[j].sequence, kept[j].choice)
            result[i] = Sampled(0, error=errors[j])
        else:
            result[i] = Sampled(tokens[j], logprobs[j], ended)
    return result


def _choose(logits: torch.Tensor, rows: Sequence[int], slots: Sequence[SampleSlot]) -> list[int]:
    """A token for each slot. Rows may hold -inf, but never only that."""
    tokens = [0] * len(slots)
    greedy = [i for i, slot in enumerate(slots) if slot.params.greedy or slot.params.beam]
    drawn = [i for i, slot in enumerate(slots) if not (slot.params.greedy or slot.params.beam)]
    if greedy:
        found = arg_max(_select(logits, [rows[i] for i in greedy]))
        for i, token in zip(greedy, found, strict=True):
            tokens[i] = token
    if drawn:
        picked = _draw(logits, [rows[i] for i in drawn], [slots[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[i] = token
    return tokens


def _select(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if rows == list(range(logits.shape[0])):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


def _draw(logits: torch.Tensor, rows: list[int], slots: list[SampleSlot]) -> list[int]:
    library = native_library() if logits.device.type == "cpu" else None
    if library is not None and logits.dtype == torch.float32:
        return native_draws.draw(library, logits, rows, slots)
    return draw(_select(logits, rows), slots)


def draw(logits: torch.Tensor, slots: list[SampleSlot]) -> list[int]:
    """A token for each row, [len(slots), vocab], of slots that are not greedy: with torch alone."""
    keys = [draw_key(slot.params.seed, slot.choice, slot.position) for slot in slots]
    temperature = [slot.params.temperature for slot in slots]
    scaled = logits / torch.tensor(temperature, device=logits.device)[:, None]
    vocab = logits.shape[-1]
    if any(slot.params.min_p > 0.0 for slot in slots):
        scaled = _drop_unlikely(scaled, slots)
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


def _drop_unlikely(scaled: torch.Tensor, slots: list[SampleSlot]) -> torch.Tensor:
    """-inf for the tokens whose probability is below min_p times the best one's."""
    floors = [math.log(s.params.min_p) if s.params.min_p > 0.0 else -math.inf for s in slots]
    floor = torch.tensor(floors, device=scaled.device)[:, None]
    least = scaled.amax(dim=-1, keepdim=True) + floor
    return scaled.masked_fill(scaled < least, -math.inf)


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
    vocab = logits.shape[-1]
    counts = [min(_num_best(slot), vocab) for slot in slots]
    asked = [i for i, count in enumerate(counts) if count >= 0]
    if not asked:
        return result
    scores = torch.log_softmax(_select(logits, [rows[i] for i in asked]), dim=-1)
    own = scores.gather(1, torch.tensor([[tokens[i]] for i in asked], device=logits.device))
    values, ids = best(scores, max(counts[i] for i in asked))
    value_rows, id_rows, own_values = values.tolist(), ids.tolist(), own[:, 0].tolist()
    for row, i in enumerate(asked):
        top = zip(id_rows[row][: counts[i]], value_rows[row][: counts[i]], strict=True)
        result[i] = TokenLogprob(own_values[row], tuple(top))
    return result


def _num_best(slot: SampleSlot) -> int:
    """How many alternatives to tell; -1: not even the drawn token's log-probability."""
    wanted = -1 if slot.params.logprobs is None else slot.params.logprobs
    return max(2 * slot.params.n, wanted) if slot.params.beam else wanted


def prompt_scores(logits: torch.Tensor, ids: tuple[int, ...], k: int) -> tuple[PromptLogprob, ...]:
    """Log-probability and rank of the token that follows at each row, and the k best.

    Args:
        logits: float32 [rows, vocab], the model's own; not changed.
        ids: for each row, the token that follows in the prompt.
        k: entries of `top`; more than the vocabulary is the whole vocabulary.
    """
    vocab = logits.shape[-1]
    count = min(k, vocab)
    step = max(1, PIECE // vocab)
    entries: list[PromptLogprob] = []
    for start in range(0, len(ids), step):
        piece = ids[start : start + step]
        scores = torch.log_softmax(logits[start : start + len(piece)].float(), dim=-1)
        own = scores.gather(1, torch.tensor(piece, device=logits.device)[:, None])
        ranks = (1 + (scores > own).sum(dim=-1)).tolist()
        values, top_ids = best(scores, count)
        rows = zip(own[:, 0].tolist(), ranks, top_ids.tolist(), values.tolist(), strict=True)
        entries += [
            PromptLogprob(logprob, rank, tuple(zip(found, value, strict=True)))
            for logprob, rank, found, value in rows
        ]
    return tuple(entries)
