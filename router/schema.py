"""What clients may send to POST /v1/chat/completions, and what it shares with /v1/completions.

Types are checked here, ranges in `router.ranges`; `router.sampling` resolves the defaults.
"""

import logging
from collections.abc import Mapping
from typing import Literal

from router.schema_tools import Processors, ResponseFormat, StructuredOutputs, Tools
from router.schema_types import (
    Bias,
    Documents,
    Extras,
    Fields,
    Flag,
    Integer,
    Integers,
    JsonObject,
    JsonObjects,
    Real,
    RequestIdText,
    TextOrObject,
    Texts,
    WordList,
    parse_fields,
)

logger = logging.getLogger(__name__)

_GONE = (  # how older clients asked for constraints; they have had no effect for long
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
)
_warned: set[str] = set()


class StreamOptions(Fields):
    """What a stream carries besides text."""

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class SharedFields(Fields):
    """The fields that chat and text completions share; None everywhere means not given."""

    model: str | None = None
    # How many, and when they end
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    n: Integer | None = None
    stop: Texts | None = None
    stop_token_ids: Integers | None = None
    ignore_eos: Flag | None = None
    include_stop_str_in_output: Flag | None = None
    # How tokens are drawn
    temperature: Real | None = None
    top_p: Real | None = None
    top_k: Integer | None = None
    min_p: Real | None = None
    seed: Integer | None = None
    frequency_penalty: Real | None = None
    presence_penalty: Real | None = None
    repetition_penalty: Real | None = None
    logit_bias: Bias | None = None
    allowed_token_ids: Integers | None = None
    bad_words: WordList | None = None
    logits_processors: Processors | None = None
    vllm_xargs: Extras | None = None
    use_beam_search: Flag | None = None
    length_penalty: Real | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What is shown of it
    prompt_logprobs: Integer | None = None
    echo: Flag | None = None
    return_token_ids: Flag | None = None
    return_tokens_as_token_ids: Flag | None = None
    skip_special_tokens: Flag | None = None
    spaces_between_special_tokens: Flag | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    # The prompt
    add_special_tokens: Flag | None = None
    truncate_prompt_tokens: Integer | None = None
    # Scheduling, cache, transfer
    user: str | None = None
    request_id: RequestIdText | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    kv_transfer_params: JsonObject | None = None

    @property
    def limits(self) -> tuple[tuple[str, int | None], ...]:
        """Output limits by name, the one that wins first."""
        return (("max_tokens", self.max_tokens),)

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives for each output token; -1: the whole vocabulary; None: none at all."""
        return None

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same for each prompt token; `echo` implies them."""
        return self.prompt_logprobs


class PromptFields(Fields):
    """What shapes the prompt of a conversation besides its messages and tools."""

    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    add_special_tokens: Flag | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: Documents | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class ChatRequest(SharedFields, PromptFields):
    """All fields of the chat API."""

    messages: JsonObjects
    max_completion_tokens: Integer | None = None
    logprobs: Flag | None = None
    top_logprobs: Integer | None = None
    tools: Tools | None = None
    tool_choice: TextOrObject | None = None
    parallel_tool_calls: Flag | None = None
    include_reasoning: Flag | None = None
    mm_processor_kwargs: JsonObject | None = None

    @property
    def limits(self) -> tuple[tuple[str, int | None], ...]:
        """Output limits by name, the one that wins first."""
        return (
            ("max_completion_tokens", self.max_completion_tokens),
            ("max_tokens", self.max_tokens),
        )

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives for each output token; -1: the whole vocabulary; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same for each prompt token; `echo` implies them."""
        if self.echo and self.prompt_logprobs is None:
            return self.top_logprobs or 0
        return self.prompt_logprobs


def parse_chat_request(body: Mapping[str, object]) -> ChatRequest:
    """Check the fields' types.

    Raises:
        MalformedRequest: a missing or wrongly typed field; `param` reads like `body.temperature`.
    """
    warn_of_gone_fields(body)
    return parse_fields(ChatRequest, body)


def warn_of_gone_fields(body: Mapping[str, object]) -> None:
    """Say once for each such field that it constrains nothing."""
    for name in _GONE:
        if body.get(name) is not None and name not in _warned:
            _warned.add(name)
            logger.warning(
                "a request holds %s, which has no effect; structured_outputs replaces it", name
            )
