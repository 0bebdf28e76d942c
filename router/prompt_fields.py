"""The fields that shape a chat's prompt, checked and put together (section 2.5 of the API)."""

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.errors import InvalidRequest
from router.config import RouterConfig
from router.json_text import MAX_DEPTH, depth_beyond
from router.prompt_request import PromptRequest
from router.schema import PromptFields

_NOT_VARIABLES = frozenset(  # what has a field of its own, or belongs to the server
    {
        "chat_template",
        "tokenize",
        "messages",
        "conversation",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "truncation",
        "padding",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def prompt_request(
    fields: PromptFields,
    messages: Sequence[Mapping[str, Any]],
    config: RouterConfig,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    truncate: int | None = None,
) -> PromptRequest:
    """Check the fields and put them together; `tools` are those that the template is to see.

    Raises:
        InvalidRequest: no messages, fields that contradict each other, or a template or variable
            that requests may not bring.
    """
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    add_generation_prompt = fields.add_generation_prompt is not False
    if fields.continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt: false (its default is true)"
        )
    if fields.chat_template is not None and not config.trust_request_chat_template:
        raise InvalidRequest("this server takes no chat_template from requests")
    return PromptRequest(
        messages=messages,
        tools=tools,
        documents=fields.documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(fields.continue_final_message),
        add_special_tokens=bool(fields.add_special_tokens),
        chat_template=fields.chat_template,
        template_kwargs={
            **config.default_chat_template_kwargs,
            **template_kwargs(fields.chat_template_kwargs, fields.reasoning_effort),
        },
        truncate_prompt_tokens=truncate,
    )


def template_kwargs(given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Variables for the template; the request's own win over what `reasoning_effort` implies.

    Raises:
        InvalidRequest: a variable that requests may not set.
    """
    given = given or {}
    for name in given:
        if name in _NOT_VARIABLES:
            raise InvalidRequest(
                f"chat_template_kwargs must not hold {name}", "chat_template_kwargs"
            )
    if depth_beyond(given, MAX_DEPTH):
        raise InvalidRequest(
            f"chat_template_kwargs is nested more than {MAX_DEPTH} levels deep",
            "chat_template_kwargs",
        )
    if effort is None:
        return dict(given)
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}
