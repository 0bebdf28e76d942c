"""What the answers look like, for /openapi.json. Answers are written without these; tests compare.

Nothing but what is listed here comes out: a field that is missing here is an error in the tests.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Out(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetails(Out):
    """What went wrong; `code` is the HTTP status, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: int


class Error(Out):
    """The body of every answer from 400 on."""

    error: ErrorDetails


# Usage and log-probabilities


class PromptTokensDetails(Out):
    """`cached_tokens` were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(Out):
    """`reasoning_tokens` are among the completion's."""

    reasoning_tokens: int


class UsageInfo(Out):
    """Token counts; the prompt counts once for all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(Out):
    """An alternative; natural logarithms, at least -9999."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """An output token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Out):
    """One entry a token."""

    content: list[TokenLogprob]


class PromptLogprob(Out):
    """A prompt token or an alternative in its place."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls", "abort"]


# Chat


class CalledFunction(Out):
    """`arguments` is a JSON text."""

    name: str
    arguments: str


class ToolCall(Out):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Out):
    """The assistant's turn."""

    role: str
    content: str | None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None
    reasoning_content: str | None
    refusal: None
    annotations: None
    audio: None
    function_call: None


class ChatChoice(Out):
    """One sample."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatCompletion(Out):
    """The answer of a chat that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    service_tier: None
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None


class FunctionDelta(Out):
    """The name comes once, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Out):
    """More of a call; `id`, `type` and the name come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Out):
    """More of a message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Out):
    """More of a sample."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Out):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageInfo | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: dict[str, Any] | None = None


# Text completions


class CompletionLogprobs(Out):
    """By token; offsets are characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Out):
    """One sample; choices are numbered prompt by prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None


class Completion(Out):
    """The answer of a text completion that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo
    service_tier: None
    system_fingerprint: str
    kv_transfer_params: dict[str, Any] | None


class CompletionChunkChoice(Out):
    """More of a sample."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChunk(Out):
    """One event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: UsageInfo | None = None


# The others


class RenderedPrompt(Out):
    """A request as the engine would get it."""

    prompt_token_ids: list[int]
    sampling_params: dict[str, Any]


class RenderedChat(RenderedPrompt):
    """A chat as the engine would get it."""

    model: str


class RenderedCompletion(Out):
    """Each prompt of a completion as the engine would get it."""

    model: str
    prompts: list[RenderedPrompt]


class Tokenized(Out):
    """A text or conversation as token ids; `token_strs` as the vocabulary writes them."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Out):
    """The text of token ids, special tokens by name."""

    prompt: str


class ModelCard(Out):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    permission: list[Any]


class ModelList(Out):
    """All names."""

    object: Literal["list"]
    data: list[ModelCard]


class Version(Out):
    """Of the server."""

    version: str


class Load(Out):
    """Requests that this router is answering."""

    server_load: int


class Response(BaseModel):
    """A response, as in OpenAI's API; items of the output are messages, thoughts and calls."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None
    temperature: float
    top_p: float
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """One event of a streamed response."""

    type: str
    sequence_number: int


class Message(BaseModel):
    """One turn of a conversation."""

    role: str = Field(min_length=1)
    content: str | list[str | dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
