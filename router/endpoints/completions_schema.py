"""What clients may send to POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from contracts.errors import InvalidRequest
from router.schema import SharedFields, warn_of_gone_fields
from router.schema_types import INT64_MAX, Integer, parse_fields

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]
"""Text, or token ids (not yet checked against the vocabulary)."""


def _prompts(value: object) -> list[Prompt]:
    """Each of the four forms as a list of prompts; stops at the first wrong item."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _wrong()
    if not isinstance(value[0], str | list):
        return [_ids(value)]
    return [item if isinstance(item, str) else _ids(item) for item in value]


def _ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise _wrong()
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= INT64_MAX:
            raise _wrong()
    return value


def _wrong() -> PydanticCustomError:
    return PydanticCustomError(
        "prompt",
        "Input should be a string, a list of strings, a list of token ids, or a list of such lists",
    )


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_ONE = {"anyOf": [{"type": "string"}, _IDS]}
_PROMPT_SCHEMA = {
    "anyOf": [{"type": "string"}, _IDS, {"type": "array", "minItems": 1, "items": _ONE}]
}
Prompts = Annotated[list[Any], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionRequest(SharedFields):
    """All fields of the completions API."""

    prompt: Prompts
    logprobs: Integer | None = None
    suffix: str | None = None
    best_of: Integer | None = None

    @property
    def limits(self) -> tuple[tuple[str, int | None], ...]:
        """The output limit; scoring a prompt alone (0) still takes one step."""
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return (("max_tokens", 1 if self.scores_only else limit),)

    @property
    def scores_only(self) -> bool:
        """Whether nothing is to be generated."""
        return self.max_tokens == 0 and bool(self.echo)

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives for each output token; None: none at all."""
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same for each prompt token; `echo` shows the prompt with its log-probabilities."""
        if self.echo and self.prompt_logprobs is None:
            return self.logprobs
        return self.prompt_logprobs


def parse_completion_request(body: Mapping[str, object], max_batch: int) -> CompletionRequest:
    """Check the fields' types, and the ranges of those that only this API has.

    Raises:
        MalformedRequest: a missing or wrongly typed field.
        InvalidRequest: a field that is not offered, or more than `max_batch` prompts.
    """
    warn_of_gone_fields(body)
    request = parse_fields(CompletionRequest, body)
    if request.suffix:
        raise InvalidRequest("suffix is not supported", "suffix")
    if body.get("prompt_embeds") is not None:
        raise InvalidRequest("prompt_embeds is not supported", "prompt_embeds")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("best_of must equal n: all that is generated is returned", "best_of")
    if len(request.prompt) > max_batch:
        raise InvalidRequest(f"prompt takes at most {max_batch} prompts at once", "prompt")
    return request
