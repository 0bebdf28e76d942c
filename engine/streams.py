"""Running decodes, all in one go: they are most of a step, so each may cost but little."""

from collections.abc import Iterable
from collections.abc import Sequence as Column

from contracts.events import FinishReason, TokenLogprob, TokensOut
from engine.plan import Decodes, Stream
from engine.roster import Roster
from engine.sequence import Sequence


def stream_of(seq: Sequence) -> Stream:
    """The stream of a sequence that has drawn and goes on."""
    params = seq.request.params
    edited = params.logit_bias or params.allowed_token_ids or params.min_tokens or seq.looks_back
    return Stream(
        sequence=seq.key,
        choice=seq.choices[0],
        num_prompt=seq.num_prompt,
        params=params,
        prompt_ids=seq.request.prompt_ids if seq.looks_back else (),
        guide=seq.guide,
        bare=params.greedy and params.logprobs is None and not edited,
    )


def decodes_of(sequences: list[Sequence]) -> Decodes:
    """The next step of sequences that are streams."""
    return Decodes(
        streams=[s.stream for s in sequences if s.stream is not None],
        starts=[s.num_computed for s in sequences],
        token_ids=[s.token_ids[-1] for s in sequences],
        block_tables=[s.block_ids for s in sequences],
        outputs=[tuple(s.token_ids[s.num_prompt :]) if s.looks_back else () for s in sequences],
    )


def advance(
    decodes: Decodes,
    tokens: Column[int],
    logprobs: Iterable[tuple[TokenLogprob, ...]],
    roster: Roster,
) -> list[TokensOut]:
    """Move the sequences on by their draws, end those that are over, and tell of all.

    What Scheduler does for a chunk with a draw, without what cannot be the case here. Sequences
    that are gone are left out.
    """
    assert len(tokens) == len(decodes)
    events: list[TokensOut] = []
    tell, by_key, size = events.append, roster.by_key, roster.block_size
    columns = zip(decodes.streams, decodes.starts, tokens, logprobs, strict=False)
    for stream, start, token, entries in columns:
        seq = by_key.get(stream.sequence)
        if seq is None:
            continue
        seq.num_computed = computed = start + 1
        if not computed % size:
            roster.remember(seq)
        finish = None
        if token in seq.ends:
            finish = FinishReason.STOP
        elif computed + 1 >= seq.max_length:
            finish = FinishReason.LENGTH
        request = seq.request
        tell(
            TokensOut(
                request.request_id,
                request.attempt,
                stream.choice,
                computed - stream.num_prompt,
                (token,),
                entries,
                finish,
            )
        )
        if finish is None:
            seq.token_ids.append(token)
        else:
            roster.end(seq)
    return events
