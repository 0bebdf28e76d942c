"""A step's plan is a value: the scheduler makes it, the runner computes it, commit applies it.

Nothing in here changes once it is made. What is made by the hundred in each step is not frozen for
all that: that makes it four times as dear to make. Running decodes, most of what a step computes,
are planned as columns (`Decodes`); whoever wants each of them as a `Chunk` has them made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from contracts.events import PromptLogprob, TokenLogprob
from contracts.sampling import SamplingParams
from engine.guide import Guide


@dataclass(slots=True, unsafe_hash=True)
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


@dataclass(slots=True, unsafe_hash=True)
class Chunk:
    """Tokens [start, start + len(token_ids)) of one sequence, computed in this step.

    `block_table` covers at least start + len(token_ids) tokens. KV of [0, start) is in it already.
    It is the same object in each step until the sequence gets or loses a block.
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


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A choice that goes on token by token: all that is the same in each of its steps.

    It is the same object in all of them, too: what is derived from it may be kept. `bare`: each
    draw is the arg max of its logit row and nothing more is told of it.
    """

    sequence: int
    choice: int
    num_prompt: int
    params: SamplingParams
    prompt_ids: tuple[int, ...] = ()  # only if it looks back
    guide: Guide | None = None
    bare: bool = False

    def slot(self, start: int, output_ids: tuple[int, ...]) -> SampleSlot:
        """The draw from the row of its token at `start`."""
        return SampleSlot(
            self.choice,
            start + 1 - self.num_prompt,
            self.params,
            self.sequence,
            self.prompt_ids,
            output_ids,
            self.guide,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """Streams that compute one token and draw one: columns, equally long.

    Entry i of the columns is a Chunk of sequence `streams[i].sequence` with the one token
    `token_ids[i]` at `starts[i]`, the block table `block_tables[i]` and one slot. `outputs[i]` is
    empty unless the stream looks back.
    """

    streams: Sequence[Stream] = ()
    starts: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    block_tables: Sequence[tuple[int, ...]] = ()
    outputs: Sequence[tuple[int, ...]] = ()

    def __len__(self) -> int:
        return len(self.streams)

    def slots(self) -> list[SampleSlot]:
        """The draws, one by one."""
        columns = zip(self.streams, self.starts, self.outputs, strict=True)
        return [one.slot(start, outputs) for one, start, outputs in columns]

    def chunk(self, index: int) -> Chunk:
        """One entry."""
        one, start = self.streams[index], self.starts[index]
        slot = one.slot(start, self.outputs[index])
        tokens = (self.token_ids[index],)
        return Chunk(one.sequence, start, tokens, self.block_tables[index], (slot,))

    def chunks(self) -> list[Chunk]:
        """The entries, one by one."""
        return [self.chunk(index) for index in range(len(self))]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What one step computes: `decodes`, then `others`, in this order.

    Before the forward happen, in this order, `offloads` (block, host slot) and `loads` (host slot,
    block), see engine/host_pool.py, and `copies` (source block, target block).
    """

    step: int
    others: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    decodes: Decodes = Decodes()
    offloads: tuple[tuple[int, int], ...] = ()
    loads: tuple[tuple[int, int], ...] = ()

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All of it as chunks, in order; made when first asked for."""
        return (*self.decodes.chunks(), *self.others)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute and nothing to copy."""
        return not (self.decodes or self.others or self.copies or self.offloads or self.loads)

    @property
    def num_tokens(self) -> int:
        """Tokens in the flattened batch."""
        return len(self.decodes) + sum(len(chunk.token_ids) for chunk in self.others)


@dataclass(slots=True, unsafe_hash=True)
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
    """What a plan's computation gave: a draw for each slot, entries for each scored chunk.

    With `tokens`, those are the draws of all the plan's decodes, of which nothing more is to be
    told, and `sampled` has the draws of the others only.
    """

    sampled: Sequence[Sampled] = ()
    scores: tuple[tuple[PromptLogprob, ...], ...] = ()  # each as long as its `scored_ids`
    tokens: Sequence[int] | None = None
