"""A computer that keeps tokens where a model keeps KV, and refuses to compute from wrong blocks.

Its "model" draws the next token as a digest of all tokens before it. Each physical slot remembers
(position, token); a chunk whose earlier slots do not hold its own sequence's tokens is a bug in
scheduler or pool, found at once.
"""

import hashlib
from array import array
from collections.abc import Sequence

from contracts.events import PromptLogprob, TokenLogprob
from engine.plan import Sampled, SampleSlot, StepPlan, StepResult


def next_token(token_ids: Sequence[int], choice: int = 0, vocab: int = 1000) -> int:
    """What the oracle draws after `token_ids`."""
    data = array("I", [choice, *token_ids]).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % vocab


def continuation(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    """`count` tokens the oracle draws after `prompt` for `choice`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, choice))
    return tokens[len(prompt) :]


def candidates(token_ids: Sequence[int], width: int, vocab: int = 12) -> TokenLogprob:
    """The oracle's `2 * width` best tokens after `token_ids`, with a made-up log-probability."""
    scored = []
    for token in range(vocab):
        data = array("I", [*token_ids, token]).tobytes()
        noise = int.from_bytes(hashlib.blake2b(data, digest_size=2).digest(), "little")
        scored.append((-noise / 1024, token))
    scored.sort(reverse=True)
    top = tuple((token, logprob) for logprob, token in scored[: 2 * width])
    return TokenLogprob(top[0][1], top)


def prompt_score(token_ids: Sequence[int]) -> PromptLogprob:
    """What the oracle says of the last token after those before it."""
    return PromptLogprob(-float(next_token(token_ids)), len(token_ids))


class PagedOracle:
    """Implements engine.loop.StepComputer over token-holding slots.

    `as_tokens`: draws of a step's streams are told as tokens, if none of them has more to tell.
    `host` is what was moved to host memory, by slot.
    """

    def __init__(self, num_blocks: int, block_size: int, *, as_tokens: bool = False) -> None:
        self.as_tokens = as_tokens
        self.block_size = block_size
        self.slots: list[list[tuple[int, int] | None]] = [
            [None] * block_size for _ in range(num_blocks)
        ]
        self.host: dict[int, list[tuple[int, int] | None]] = {}
        self.computed_tokens = 0

    def forget(self, sequences: Sequence[int]) -> None:
        pass

    def compute(self, plan: StepPlan) -> StepResult:
        for block, slot in plan.offloads:
            self.host[slot] = list(self.slots[block])
        for slot, block in plan.loads:
            self.slots[block] = list(self.host[slot])
        for source, target in plan.copies:
            self.slots[target] = list(self.slots[source])
        drawn: list[Sampled] = []
        scores: list[tuple[PromptLogprob, ...]] = []
        for chunk in plan.chunks:
            for offset, token in enumerate(chunk.token_ids):
                position = chunk.start + offset
                block = chunk.block_table[position // self.block_size]
                self.slots[block][position % self.block_size] = (position, token)
                self.computed_tokens += 1
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            tokens: list[int] = []
            for position in range(end):
                held = self.slots[chunk.block_table[position // self.block_size]][
                    position % self.block_size
                ]
                assert held is not None, f"slot of position {position} was never written"
                assert held[0] == position, f"slot holds position {held[0]}, wanted {position}"
                tokens.append(held[1])
            assert tuple(tokens[chunk.start :]) == chunk.token_ids
            drawn += [self._draw(tokens, slot) for slot in chunk.slots]
            if chunk.scored is not None:
                scores.append(
                    tuple(
                        prompt_score([*tokens[: chunk.start + index + 1], token])
                        for index, token in enumerate(chunk.scored_ids)
                    )
                )
        if self.as_tokens and all(draw.logprob is None for draw in drawn[: len(plan.decodes)]):
            tokens = [draw.token_id for draw in drawn[: len(plan.decodes)]]
            return StepResult(tuple(drawn[len(tokens) :]), tuple(scores), tokens)
        return StepResult(tuple(drawn), tuple(scores))

    def _draw(self, tokens: list[int], slot: SampleSlot) -> Sampled:
        params = slot.params
        outputs = tuple(tokens[len(tokens) - slot.position :])
        assert slot.output_ids == (outputs if params.looks_back else ())
        if params.beam:
            found = candidates(tokens, params.n)
            return Sampled(found.top[0][0], found)
        return Sampled(next_token(tokens, slot.choice))

    def copy_block_from(self, other: "PagedOracle", source: int, target: int) -> None:
        """What a handoff does."""
        self.slots[target] = list(other.slots[source])
