"""From HTTP bytes to a JSON object: media type, size limit, syntax."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from router.http_errors import BodyTooLarge, BodyTooSlow, MalformedRequest

MAX_DEPTH = 128  # of objects and lists in one another
MAX_MARKS = 1 << 20  # of JSON: each value takes memory and a moment, however short its text
_SLOWEST = 16 << 10  # bytes a second, on average
_MARKS = ",:[{"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # only escapes can spell a lone surrogate


def check_media_type(content_type: str | None) -> None:
    """Refuse anything but JSON; parameters such as `charset` are fine.

    Raises:
        MalformedRequest: another media type, or none.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json:
        raise MalformedRequest("Unsupported media type: only 'application/json' is allowed")


async def read_body(
    stream: AsyncIterator[bytes],
    content_length: str | None,
    limit_bytes: int,
    timeout_s: float = math.inf,
) -> bytes:
    """Collect the body, reading no more than the limit.

    The client may be silent for `timeout_s`, and a body that takes longer than that must have
    come at 16 KiB a second at least: a request whose body trickles in holds a place as well.

    Raises:
        BodyTooLarge: announced or real length beyond `limit_bytes`.
        BodyTooSlow: not in time.
    """
    too_large = BodyTooLarge(f"the request body is larger than {limit_bytes} bytes")
    if content_length and content_length.isdecimal() and int(content_length) > limit_bytes:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        async with asyncio.timeout(None) as deadline:
            while True:
                latest = begun + timeout_s + size / _SLOWEST
                deadline.reschedule(min(loop.time() + timeout_s, latest))
                piece = await anext(stream, None)
                if piece is None:
                    return b"".join(pieces)
                size += len(piece)
                if size > limit_bytes:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not come in time: {size} bytes of it did") from None


def parse_object(body: bytes) -> dict[str, object]:
    """Parse a JSON object.

    Raises:
        MalformedRequest: not JSON in UTF-8 (NaN and Infinity are not), not an object, nested
            beyond MAX_DEPTH, a number beyond a double's range, or text that is not Unicode.
        BodyTooLarge: more than MAX_MARKS commas, colons and brackets, those in texts included.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MalformedRequest("the body is not UTF-8", "body") from None
    if len(text) > MAX_MARKS and sum(map(text.count, _MARKS)) > MAX_MARKS:
        raise BodyTooLarge(f"the request body holds more than {MAX_MARKS} values")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not valid JSON: {error.msg} at character {error.pos}", "body"
        ) from None
    except ValueError:  # a whole number with thousands of digits
        raise MalformedRequest("the body is not valid JSON: a number is too long", "body") from None
    if not isinstance(value, dict):
        raise MalformedRequest("the body must be a JSON object", "body")
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(value)
    if _HALF_CHARACTER.search(text):
        _check_unicode(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"the body is not valid JSON: {name} is no number there", "body")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise MalformedRequest("a number in the body is too large", "body")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        level = inner
    if level:
        raise _too_deep()


def _check_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedRequest("a text in the body is not valid Unicode", "body") from None
    except RecursionError:
        raise _too_deep() from None


def _too_deep() -> MalformedRequest:
    return MalformedRequest(f"the JSON is nested deeper than {MAX_DEPTH} levels", "body")
