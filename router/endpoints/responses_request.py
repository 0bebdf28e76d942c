"""POST /v1/responses: what clients may send, and the chat request that means the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from contracts.errors import InvalidRequest
from router.endpoints.responses_input import chat_messages
from router.schema_types import (
    Fields,
    Flag,
    Integer,
    JsonObject,
    Real,
    TextOrObject,
    WordList,
    parse_fields,
)

LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (LOGPROBS, "reasoning.encrypted_content")  # thoughts are readable, not encrypted
_MAX_METADATA = 16

SHARED = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "user",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logits_processors",
    "vllm_xargs",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "structured_outputs",
    "include_reasoning",
    "truncate_prompt_tokens",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "priority",
    "request_id",
    "cache_salt",
)
"""Fields with the same name and meaning in both APIs; beyond OpenAI's they are extensions."""

_THEIR_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}


class FunctionTool(Fields):
    """One of `tools`, in this API's flat form."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: JsonObject | None = None
    strict: Flag | None = None


class NamedTool(Fields):
    """One of the tools that `allowed_tools` leaves."""

    type: Literal["function"]
    name: str


class ToolChoice(Fields):
    """The object forms of `tool_choice`."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Field(fail_fast=True)] | None = None


class TextFormat(Fields):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: Flag | None = None


class TextOptions(Fields):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Fields):
    """`reasoning`. There are no summaries: the thoughts themselves are in the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


def _input(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise PydanticCustomError("input", "Input should be a string or a list of objects")


def _choice(value: object) -> object:
    if value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        return ToolChoice.model_validate(value)
    raise PydanticCustomError("choice", "Input should be none, auto, required or an object")


def _metadata(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise PydanticCustomError("metadata", "Input should be an object of strings")


_OBJECT = {"type": "object"}
_TEXT = {"type": "string"}
Input = Annotated[
    Any,
    BeforeValidator(_input),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _OBJECT}]}),
]
Choice = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]}),
]


Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]


class ResponsesRequest(Fields):
    """The fields of this API alone; those of `SHARED` are checked as the chat API's."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Integer | None = None
    include: WordList | None = None
    stream: Flag | None = None
    stream_options: JsonObject | None = None
    metadata: Metadata | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Integer | None = None  # of built-in tools, which there are none of
    store: Flag | None = None
    background: Flag | None = None
    previous_response_id: str | None = None
    conversation: TextOrObject | None = None
    prompt: JsonObject | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    parallel_tool_calls: Flag | None = None
    model: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """A request, as it was meant for the chat API, and what its answer repeats of it."""

    chat_body: dict[str, object]
    echoed: dict[str, Any]
    stream: bool
    want_logprobs: bool


def parse_responses_request(body: Mapping[str, object]) -> ResponsesCall:
    """Check what only this API has, and translate.

    Raises:
        MalformedRequest: a wrongly typed field.
        InvalidRequest: something that is not offered here; says what.
    """
    request = parse_fields(ResponsesRequest, body)
    _refuse_what_is_not_offered(request)
    want_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    chat: dict[str, object] = {
        name: body[name] for name in SHARED if body.get(name) is not None
    } | dict(_translated(request))
    chat["messages"] = chat_messages(request.input, request.instructions)
    if want_logprobs:
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return ResponsesCall(chat, _echoed(request, body), bool(request.stream), want_logprobs)


def their_param(param: str | None) -> str | None:
    """The name that a field of the chat request has in this API."""
    if param is None:
        return None
    prefix, name = ("body.", param[5:]) if param.startswith("body.") else ("", param)
    first, dot, rest = name.partition(".")
    return f"{prefix}{_THEIR_NAMES.get(first, first)}{dot}{rest}"


def _translated(request: ResponsesRequest) -> Iterator[tuple[str, object]]:
    if request.max_output_tokens is not None:
        yield "max_completion_tokens", request.max_output_tokens
    if request.stream:
        yield "stream", True
    if request.reasoning is not None and request.reasoning.effort is not None:
        yield "reasoning_effort", request.reasoning.effort
    form = request.text.format if request.text is not None else None
    if form is not None and form.type != "text":
        yield "response_format", _response_format(form)
    tools = request.tools or []
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        tools, choice = _chosen(tools, choice)
    if tools:
        yield "tools", [_chat_tool(tool) for tool in tools]
    if choice is not None and (tools or choice not in ("auto", "none")):
        yield "tool_choice", choice


def _response_format(form: TextFormat) -> dict[str, object]:
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema_ is None:
        raise InvalidRequest("text.format of type json_schema needs a schema", "text.format.schema")
    schema = {
        "name": form.name,
        "description": form.description,
        "schema": form.schema_,
        "strict": form.strict,
    }
    return {"type": "json_schema", "json_schema": schema}


def _chat_tool(tool: FunctionTool) -> dict[str, object]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _chosen(
    tools: list[FunctionTool], choice: ToolChoice
) -> tuple[list[FunctionTool], str | dict[str, object]]:
    """The tools that may be used, and the choice among them."""
    if choice.type == "function":
        if not choice.name:
            raise InvalidRequest("tool_choice of type function needs a name", "tool_choice.name")
        return tools, {"type": "function", "function": {"name": choice.name}}
    names = {tool.name for tool in choice.tools or ()}
    unknown = names - {tool.name for tool in tools}
    if unknown or not names:
        raise InvalidRequest("tool_choice.tools must name some of tools", "tool_choice.tools")
    return [tool for tool in tools if tool.name in names], choice.mode or "auto"


def _refuse_what_is_not_offered(request: ResponsesRequest) -> None:
    stateless = "responses are not stored here; send the whole conversation as input"
    verbosity = request.text.verbosity if request.text is not None else None
    includes = [name for name in request.include or () if name not in _INCLUDES]
    refusals = {
        "store": bool(request.store) and "responses are not stored here; leave store out",
        "previous_response_id": request.previous_response_id is not None and stateless,
        "conversation": request.conversation is not None and stateless,
        "prompt": request.prompt is not None and "there are no stored prompts here",
        "background": bool(request.background) and "there is no background mode; use stream",
        "truncation": request.truncation == "auto"
        and "truncation must be disabled; truncate_prompt_tokens keeps the prompt's end",
        "text.verbosity": verbosity in ("low", "high") and "text.verbosity has no effect here",
        "include": bool(includes) and f"include takes {' and '.join(_INCLUDES)}",
        "metadata": len(request.metadata or ()) > _MAX_METADATA
        and f"metadata takes at most {_MAX_METADATA} pairs",
        "max_output_tokens": request.max_output_tokens is not None
        and request.max_output_tokens < 1
        and "max_output_tokens must be at least 1",
    }
    for name, reason in refusals.items():
        if reason:
            raise InvalidRequest(str(reason), name)


def _echoed(request: ResponsesRequest, body: Mapping[str, object]) -> dict[str, Any]:
    """The fields of a response that repeat the request."""
    choice = request.tool_choice
    reasoning = request.reasoning or ReasoningOptions()
    form = request.text.format if request.text is not None and request.text.format else None
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "text": {
            "format": {"type": "text"}
            if form is None
            else form.model_dump(by_alias=True, exclude_none=True),
        },
        "tool_choice": choice.model_dump(exclude_none=True)
        if isinstance(choice, ToolChoice)
        else choice or "auto",
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": "disabled",
        "user": request.user,
    }
