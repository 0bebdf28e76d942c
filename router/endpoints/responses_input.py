"""The items of a Responses conversation as chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.errors import InvalidRequest

_ROLES = ("user", "assistant", "system", "developer")
_NOT_STORED = "responses are not stored here; send the item itself"


def chat_messages(
    items: str | Sequence[Mapping[str, Any]], instructions: str | None
) -> list[dict[str, Any]]:
    """The conversation as the chat API has it.

    Thoughts, text and calls of one turn, which are items of their own here, become one message.

    Raises:
        InvalidRequest: an item of an unknown kind, or without what its kind needs.
    """
    builder = _Builder()
    if instructions is not None:
        builder.messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        builder.messages.append({"role": "user", "content": items})
        return builder.messages
    if not items:
        raise InvalidRequest("input must not be empty", "input")
    for index, item in enumerate(items):
        builder.add(item, f"input[{index}]")
    return builder.messages


class _Builder:
    """Gathers items; `_turn` is the assistant's message that further items may still join."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None

    def add(self, item: Mapping[str, Any], where: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item, where)
        elif kind == "function_call":
            call = {
                "id": _text(item, "call_id", where),
                "type": "function",
                "function": {
                    "name": _text(item, "name", where),
                    "arguments": _text(item, "arguments", where),
                },
            }
            self._assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            self._turn = None
            call_id = _text(item, "call_id", where)
            content = _content(item.get("output"), f"{where}.output")
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif kind == "reasoning":
            self._reasoning(item, where)
        else:
            shown = repr(kind[:40]) if isinstance(kind, str) else "that"
            reason = _NOT_STORED if kind == "item_reference" else "unknown here"
            raise InvalidRequest(f"{where} is of type {shown}: {reason}", "input")

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", "input")
        content = _content(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._turn = None
            self.messages.append({"role": role, "content": content})
            return
        if self._turn is not None and ("content" in self._turn or "tool_calls" in self._turn):
            self._turn = None
        self._assistant()["content"] = content

    def _reasoning(self, item: Mapping[str, Any], where: str) -> None:
        if self._turn is not None and set(self._turn) - {"role", "reasoning"}:
            self._turn = None
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list):
            raise InvalidRequest(f"{where}.content must be a list of parts", "input")
        texts = [
            part["text"]
            for part in parts
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if texts:  # else it is encrypted, and nobody here could read it
            turn = self._assistant()
            turn["reasoning"] = turn.get("reasoning", "") + "\n".join(texts)

    def _assistant(self) -> dict[str, Any]:
        if self._turn is None:
            self._turn = {"role": "assistant"}
            self.messages.append(self._turn)
        return self._turn


def _content(value: Any, where: str) -> Any:
    """Text, or parts that the chat API knows under the same names."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return value
    raise InvalidRequest(f"{where} must be text or a list of parts", "input")


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{key} must be a text", "input")
    return value
