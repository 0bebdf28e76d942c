"""What clients may send to POST /v1/chat/completions: types here, ranges in `router.sampling`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError
from pydantic_core import PydanticCustomError

from contracts.errors import InvalidRequest
from router.http_errors import MalformedRequest

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_REQUEST_ID_CHARS = 1024


def _number(value: object) -> object:
    """A JSON true or false is not a number, although Python thinks so."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number, not a boolean")
    return value


def _stop(value: object) -> object:
    """One text or a list of texts, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise PydanticCustomError("stop", "Input should be a string or a list of strings")


Integer = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Seed = Annotated[Integer, Field(ge=_INT64_MIN, le=_INT64_MAX)]
Stops = Annotated[list[str], BeforeValidator(_stop)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class ChatRequest(BaseModel):
    """The supported fields; null is the same as absent, unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    top_k: Integer | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: StrictBool | None = None
    n: Integer | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Integer | None = None
    return_token_ids: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    request_id: Annotated[str, Field(max_length=_REQUEST_ID_CHARS)] | None = None


NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "echo": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "response_format": (),
    "structured_outputs": (),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": ({},),
}
"""Fields of the API document that are not supported yet, with the values that change nothing."""


def parse_chat_request(body: Mapping[str, object]) -> ChatRequest:
    """Check the fields' types.

    Raises:
        MalformedRequest: a missing or wrongly typed field; `param` reads like `body.temperature`.
        InvalidRequest: a field of the document that is not supported yet.
    """
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(["body", *(str(part) for part in first["loc"])])
        raise MalformedRequest(f"{param}: {first['msg']}", param) from None
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not _is_neutral(name, value, neutral):
            raise InvalidRequest(f"{name} is not supported yet", name)
    return request


def _is_neutral(name: str, value: object, neutral: tuple[object, ...]) -> bool:
    if name == "response_format":
        return isinstance(value, dict) and value.get("type") == "text"
    return any(
        isinstance(value, bool) == isinstance(candidate, bool) and value == candidate
        for candidate in neutral
    )
