"""What is told of a step's outcome, as events."""

from collections.abc import Iterator

from contracts.events import FinishReason, PromptLogprob, PromptScores, TokensOut
from contracts.request import GenerationRequest
from engine.plan import Sampled
from engine.sequence import Sequence

_PIECE_BYTES = 64 << 10  # of prompt scores in one event, so that tokens are not held up


def token_out(seq: Sequence, choice: int, draw: Sampled, finish: FinishReason | None) -> TokensOut:
    """The next token of a choice of `seq`, which does not have it yet."""
    return TokensOut(
        seq.request.request_id,
        seq.request.attempt,
        choice,
        seq.num_outputs,
        (draw.token_id,),
        (draw.logprob,) if draw.logprob is not None else (),
        finish,
    )


def prompt_scores(
    request: GenerationRequest, position: int, entries: tuple[PromptLogprob, ...]
) -> Iterator[PromptScores]:
    """Scores of prompt tokens, a few at a time."""
    most = max(1, _PIECE_BYTES // (12 + 8 * max(len(entry.top) for entry in entries)))
    for first in range(0, len(entries), most):
        yield PromptScores(
            request.request_id,
            request.attempt,
            position + first,
            entries[first : first + most],
        )
