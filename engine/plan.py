"""A step's plan is a value: the scheduler makes it, the runner computes it, commit applies it."""

from dataclasses import dataclass

from contracts.events import PromptLogprob, TokenLogprob
from contracts.sampling import SamplingParams
from engine.guide import Guide


@dataclass(frozen=True, slots=True)
class SampleSlot:
    """One draw from a chunk's last logit row: choice `choice`, output position `position`.

    `prompt_ids` and `output_ids` are there only if `params.looks_back`; `output_ids` then has
    `position` tokens. `guide` holds what was prepared for the request's grammar and processors.
    """

    choice: int
    position: int
    params: SamplingParams
    sequence: int = 0
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + len(token_ids)) of one sequence, computed in this step.

    `block_table` covers at least start + len(token_ids) tokens. KV of [0, start) is in it already.
    `slots` is empty while a prefill has more chunks to come; several slots draw the first
    tokens of n choices from the same row. With `scored` (k), the chunk's rows also tell the
    log-probabilities of `scored_ids`, the prompt tokens at start + 1 and after, and the k best.
    """

    sequence: int
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    slots: tuple[SampleSlot, ...] = ()
    scored: int | None = None
    scored_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `copies` (source block, target block) happen before the forward."""

    step: int
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the flattened batch."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token.

    `logprob` only if the slot's params ask for it; with beams its `top` holds the 2n best by the
    model's own log-probability. `ended`: the grammar is complete and this token closed it.
    `error`: nothing was drawn, and why; it fails the request.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    ended: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan's computation gave: a draw for each slot, entries for each scored chunk."""

    sampled: tuple[Sampled, ...] = ()
    scores: tuple[tuple[PromptLogprob, ...], ...] = ()  # each as long as its `scored_ids`
