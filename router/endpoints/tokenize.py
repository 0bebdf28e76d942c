"""POST /tokenize and POST /detokenize."""

from collections.abc import Sequence
from typing import Any

from router.chat import ChatService
from router.endpoints.calls import Body
from router.endpoints.tokenize_schema import (
    DetokenizeRequest,
    TokenizeRequest,
    parse_tokenize_request,
)
from router.offload import apart, is_heavy
from router.prompt_fields import prompt_request
from router.schema_types import parse_fields

_INLINE_IDS = 2048


async def tokenize(service: ChatService, body: Body) -> dict[str, Any]:
    """Token ids of a text, or of a conversation as the same chat would have them.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """
    request = await apart(is_heavy(body), lambda: parse_tokenize_request(body))
    service.check_model(request.model)
    ids = await _ids(service, request)
    named = bool(request.return_token_strs)
    return {
        "count": len(ids),
        "max_model_len": service.known_max_model_len(),
        "tokens": list(ids),
        "token_strs": await _names(service, ids) if named else None,
    }


async def _names(service: ChatService, ids: Sequence[int]) -> list[str]:
    return await apart(len(ids) > _INLINE_IDS, lambda: service.prompts.token_strs(ids))


async def _ids(service: ChatService, request: TokenizeRequest) -> tuple[int, ...]:
    if request.prompt is not None:
        return await service.prompts.encode_text(
            request.prompt,
            add_special_tokens=request.add_special_tokens is not False,
            max_model_len=None,
        )
    hidden = request.tool_choice == "none" and service.config.exclude_tools_when_tool_choice_none
    tools = None if hidden else request.tools
    wanted = prompt_request(
        request,
        request.messages or (),
        service.config,
        tools=None if tools is None else [tool.for_template for tool in tools],
    )
    return (await service.prompts.encode(wanted, max_model_len=None)).ids


async def detokenize(service: ChatService, body: Body) -> dict[str, Any]:
    """The text of token ids.

    Raises:
        ServingError: what is wrong with it, naming the field.
    """
    request = await apart(is_heavy(body), lambda: parse_fields(DetokenizeRequest, body))
    service.check_model(request.model)
    return {"prompt": await decode(service, request.tokens, param="tokens")}


async def decode(service: ChatService, ids: Sequence[int], *, param: str) -> str:
    """Text of ids; many are decoded in a thread.

    Raises:
        InvalidRequest: ids that the model does not have, or far too many.
    """
    return await apart(len(ids) > _INLINE_IDS, lambda: service.prompts.decode(ids, param=param))
