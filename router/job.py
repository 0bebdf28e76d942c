"""What a generation is asked for, and what it is billed."""

from dataclasses import dataclass, field

from contracts.ids import RequestId
from contracts.sampling import SamplingParams
from router.rules import OutputRules
from router.two_step import Transfer


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: all that decides which tokens come out, and in whose turn.

    Prompts share cached KV only if their `cache_salt` is equal. Lower `priority` goes first.
    """

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    rules: OutputRules
    cache_salt: str = field(default="", repr=False)
    priority: int = 0  # signed 64 bit
    transfer: Transfer | None = None  # the request is one of the two steps


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of an answer; the prompt counts once for all choices.

    `reasoning_tokens` are among the completion's; None: nobody looks for thoughts.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None
