"""Sampling parameters as the engine gets them: every default resolved, nothing to check twice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and when they end.

    `seed` is always set (the router draws one if the client gave none); choice i uses
    `seed + i` modulo 2**64. `temperature` 0 means greedy.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0  # unsigned 64 bit
    n: int = 1
    eos_token_ids: tuple[int, ...] = ()  # empty with ignore_eos
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the drawn token's and the k best

    @property
    def greedy(self) -> bool:
        """Whether the draw is a plain arg max."""
        return self.temperature == 0.0

    def ends(self, token_id: int) -> bool:
        """Whether `token_id` ends a choice."""
        return token_id in self.eos_token_ids or token_id in self.stop_token_ids
