"""A step's plan is a value: the scheduler makes it, the runner computes it, commit applies it."""

from dataclasses import dataclass

from contracts.events import TokenLogprob
from contracts.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleSlot:
    """One draw from a chunk's last logit row: choice `choice`, output position `position`."""

    choice: int
    position: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + len(token_ids)) of one sequence, computed in this step.

    `block_table` covers at least start + len(token_ids) tokens. KV of [0, start) is in it already.
    `slots` is empty while a prefill has more chunks to come; several slots draw the first
    tokens of n choices from the same row.
    """

    sequence: int
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    slots: tuple[SampleSlot, ...] = ()


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
    """One drawn token; `logprob` only if the slot's params ask for it."""

    token_id: int
    logprob: TokenLogprob | None = None
