"""JSON that is handed on as text: bounded in depth, and JSON in the strict sense."""

import json
from collections.abc import Mapping
from typing import Any

from contracts.errors import InvalidRequest

MAX_DEPTH = 64
MAX_CHARS = 1 << 20


def parse_json(text: str, param: str) -> Any:
    """What a text says.

    Raises:
        InvalidRequest: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be read"
        raise InvalidRequest(f"{param} holds a text that is not JSON: {reason}", param) from None


def dump_json(value: Any, param: str) -> str:
    """Compact JSON, object keys in their order.

    Raises:
        InvalidRequest: nested too deeply, too long, or with a number that JSON cannot write.
    """
    if depth_beyond(value, MAX_DEPTH):
        raise InvalidRequest(f"{param} is nested more than {MAX_DEPTH} levels deep", param)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds a text that is not valid Unicode", param) from None
    except ValueError:
        raise InvalidRequest(f"{param} holds a number that is not finite", param) from None
    if len(text) > MAX_CHARS:
        raise InvalidRequest(f"{param} is longer than {MAX_CHARS} characters", param)
    return text


def depth_beyond(value: Any, limit: int) -> bool:
    """Whether lists and objects lie in one another more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, Mapping | list) for item in level)
