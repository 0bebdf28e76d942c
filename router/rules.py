"""How a choice's tokens become its answer; the same for all choices of a request."""

from collections.abc import Callable
from dataclasses import dataclass

from contracts.sampling import SamplingParams
from router.deltas import OutputParser


@dataclass(frozen=True, slots=True)
class OutputRules:
    """Everything between token ids and what is shown, resolved.

    `make_parser` makes one for each choice; None: all text is content. `calls_finish` is the
    finish reason of a choice that ended with `stop` after a call (a named call keeps `stop`).
    """

    stop: tuple[str, ...] = ()
    primary_eos: int | None = None
    include_stop: bool = False  # keep the stop string, or the stop token's text
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    tokens_as_ids: bool = False  # log-probabilities name tokens `token_id:<id>`
    make_parser: Callable[[], OutputParser] | None = None
    thinks: bool = False  # the parser looks for thoughts; their tokens are counted
    include_reasoning: bool = True  # False: thoughts leave no text, ids or log-probabilities
    calls_finish: str = "tool_calls"

    def stop_reason(self, token_id: int, params: SamplingParams) -> int | None:
        """What to report for an end token: nothing for the tokenizer's own eos, else its id."""
        listed = token_id in params.stop_token_ids and token_id not in params.eos_token_ids
        return None if token_id == self.primary_eos and not listed else token_id
