"""From HTTP bytes to a JSON object: media type, size limit, syntax."""

import json
from collections.abc import AsyncIterator

from router.http_errors import BodyTooLarge, MalformedRequest


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
    stream: AsyncIterator[bytes], content_length: str | None, limit_bytes: int
) -> bytes:
    """Collect the body, reading no more than the limit.

    Raises:
        BodyTooLarge: announced or real length beyond `limit_bytes`.
    """
    too_large = BodyTooLarge(f"the request body is larger than {limit_bytes} bytes")
    if content_length and content_length.isdecimal() and int(content_length) > limit_bytes:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > limit_bytes:
            raise too_large
        pieces.append(piece)
    return b"".join(pieces)


def parse_object(body: bytes) -> dict[str, object]:
    """Parse a JSON object.

    Raises:
        MalformedRequest: not JSON, not an object, nested too deeply, or text that is not Unicode.
    """
    try:
        value = json.loads(body)
    except RecursionError:
        raise MalformedRequest("the JSON is nested too deeply", "body") from None
    except json.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not valid JSON: {error.msg} at character {error.pos}", "body"
        ) from None
    except ValueError:
        raise MalformedRequest("the body is not valid JSON", "body") from None
    if not isinstance(value, dict):
        raise MalformedRequest("the body must be a JSON object", "body")
    if b"\\ud" in body or b"\\uD" in body:  # only escapes can spell half a surrogate pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedRequest("a text in the body is not valid Unicode", "body") from None
        except RecursionError:
            raise MalformedRequest("the JSON is nested too deeply", "body") from None
    return value
