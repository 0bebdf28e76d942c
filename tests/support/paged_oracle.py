"""A computer that keeps tokens where a model keeps KV, and refuses to compute from wrong blocks.

Its "model" draws the next token as a digest of all tokens before it. Each physical slot remembers
(position, token); a chunk whose earlier slots do not hold its own sequence's tokens is a bug in
scheduler or pool, found at once.
"""

import hashlib
from array import array
from collections.abc import Sequence

from engine.plan import Sampled, StepPlan


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


class PagedOracle:
    """Implements engine.loop.StepComputer over token-holding slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[list[tuple[int, int] | None]] = [
            [None] * block_size for _ in range(num_blocks)
        ]
        self.computed_tokens = 0

    def compute(self, plan: StepPlan) -> list[Sampled]:
        for source, target in plan.copies:
            self.slots[target] = list(self.slots[source])
        drawn: list[Sampled] = []
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
            drawn += [Sampled(next_token(tokens, slot.choice)) for slot in chunk.slots]
        return drawn

    def copy_block_from(self, other: "PagedOracle", source: int, target: int) -> None:
        """What a handoff does."""
        self.slots[target] = list(other.slots[source])
