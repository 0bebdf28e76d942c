"""What a generation is asked for, and what it is billed."""

from dataclasses import dataclass

from contracts.ids import RequestId
from contracts.sampling import SamplingParams
from router.choice import EndRules


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: all that decides which tokens come out."""

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    rules: EndRules


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of an answer; the prompt counts once for all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
