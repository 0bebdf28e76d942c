"""The conversation as clients send it, turned into what chat templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from contracts.errors import InvalidRequest

TemplateMessage = dict[str, Any]

_TEXT_KEY = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}

_TEXT_ROLES = ("tool", "function")  # templates want one text of them whatever their format
_REASONING = ("reasoning", "reasoning_content", "thinking")  # the same under three names


def template_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    as_parts: bool,
    knows_developer: bool,
    keeps_text: bool = False,
) -> list[TemplateMessage]:
    """Normalise messages for a template.

    `refusal`, `audio`, `function_call` and keys nobody knows are tolerated and left out.

    Args:
        messages: as sent; each at least `role`.
        as_parts: whether the template wants `content` as a list of parts (else one text).
        keeps_text: whether, of a template that wants parts, content sent as text stays text.
        knows_developer: whether the template mentions the role `developer`.

    Raises:
        InvalidRequest: no messages, one without a role, or content that is not text.
    """
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    result: list[TemplateMessage] = []
    converted = False
    for index, message in enumerate(messages):
        in_parts = as_parts and (isinstance(message.get("content"), list) or not keeps_text)
        one = _template_message(message, f"messages[{index}]", in_parts)
        if one["role"] == "developer" and not knows_developer:
            one["role"] = "system"
            converted = True
        result.append(one)
    return _merge_systems(result) if converted else result


def _template_message(message: Mapping[str, Any], where: str, as_parts: bool) -> TemplateMessage:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} needs a role", "messages")
    texts = _texts(message.get("content"), where)
    content: Any = "\n".join(texts)
    if as_parts and role not in _TEXT_ROLES:
        content = [{"type": "text", "text": text} for text in texts]
    result: TemplateMessage = {"role": role, "content": content}
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    if role == "assistant":
        thoughts = (message.get(key) for key in _REASONING)
        reasoning = next((text for text in thoughts if text and isinstance(text, str)), None)
        if reasoning is not None:
            result.update(dict.fromkeys(_REASONING, reasoning))
        calls = message.get("tool_calls")
        if calls:
            result["tool_calls"] = _tool_calls(calls, where)
    return result


def text_of(message: Mapping[str, Any]) -> str:
    """A message's text, its parts joined as for a template that wants one text.

    Raises:
        InvalidRequest: content that is not text.
    """
    return "\n".join(_texts(message.get("content"), "the last message"))


def _texts(content: Any, where: str) -> list[str]:
    """The text parts of a content value."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content must be text or a list of parts", "messages")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        key = _TEXT_KEY.get(kind) if isinstance(kind, str) else None
        if key is None:
            name = repr(kind[:40]) if isinstance(kind, str) else "without a type"
            raise InvalidRequest(
                f"{where}.content has a part {name}; this model takes text parts only", "messages"
            )
        text = part.get(key)
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{where}.content has a {kind} part without a text in {key!r}", "messages"
            )
        texts.append(text)
    return texts


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Earlier calls, with `arguments` as an object; what cannot be parsed becomes `{}`."""
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list", "messages")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type") not in (None, "function"):
            raise InvalidRequest(f"{where}.tool_calls takes functions only", "messages")
        if not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{where}.tool_calls has a function without a name", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {}
        if not isinstance(arguments, dict):
            arguments = {}
        result.append(
            {**call, "type": "function", "function": {**function, "arguments": arguments}}
        )
    return result


def _merge_systems(messages: list[TemplateMessage]) -> list[TemplateMessage]:
    """All system messages as one, in front; in parts if one of them is."""
    systems = [m["content"] for m in messages if m["role"] == "system"]
    merged: str | list[dict[str, str]]
    if all(isinstance(content, str) for content in systems):
        merged = "\n\n".join(systems)
    else:
        merged = []
        for content in systems:
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            merged.extend(parts)
    others = [m for m in messages if m["role"] != "system"]
    return [{"role": "system", "content": merged}, *others]
