"""What clients may send to POST /tokenize and /detokenize."""

from collections.abc import Mapping

from contracts.errors import InvalidRequest
from router.schema import PromptFields
from router.schema_tools import Tools
from router.schema_types import (
    Fields,
    Flag,
    Integers,
    JsonObjects,
    TextOrObject,
    parse_fields,
)


class TokenizeRequest(PromptFields):
    """Either `prompt`, or `messages` with the fields of a chat that shape its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: JsonObjects | None = None
    tools: Tools | None = None
    tool_choice: TextOrObject | None = None
    return_token_strs: Flag | None = None


class DetokenizeRequest(Fields):
    """Token ids."""

    model: str | None = None
    tokens: Integers


def parse_tokenize_request(body: Mapping[str, object]) -> TokenizeRequest:
    """Check the types.

    Raises:
        MalformedRequest: a wrongly typed field.
        InvalidRequest: both kinds of input, or neither.
    """
    request = parse_fields(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    return request
