"""What a step computes of one sequence, if it is more than the next token of a stream."""

from engine.plan import Chunk, SampleSlot
from engine.sequence import Sequence


def chunk_of(seq: Sequence, count: int) -> Chunk:
    """The next `count` tokens of a running sequence, with its draws if they are the last."""
    start = seq.num_computed
    end = start + count
    slots = _slots(seq) if end == len(seq.token_ids) else ()
    token_ids, table = tuple(seq.token_ids[start:end]), seq.block_ids
    scored_ids = seq.request.prompt_ids[start + 1 : end + 1] if seq.scored else ()
    if not scored_ids:
        return Chunk(seq.key, start, token_ids, table, slots)
    scored = seq.request.params.prompt_logprobs
    return Chunk(seq.key, start, token_ids, table, slots, scored, scored_ids)


def _slots(seq: Sequence) -> tuple[SampleSlot, ...]:
    request = seq.request
    before: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if seq.looks_back:
        before = (request.prompt_ids, tuple(seq.token_ids[seq.num_prompt :]))
    position = seq.num_outputs
    return tuple(
        [
            SampleSlot(choice, position, request.params, seq.key, *before, seq.guide)
            for choice in seq.choices
        ]
    )
