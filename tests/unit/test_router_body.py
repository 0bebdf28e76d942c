"""Bytes to a JSON object, whatever the bytes are."""

import json
from collections.abc import AsyncIterator

import pytest

from router.body import MAX_DEPTH, check_media_type, parse_object, read_body
from router.http_errors import BodyTooLarge, MalformedRequest


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return b'{"a":' + opening.encode() * depth + b"1" + closing.encode() * depth + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "\U0001f642 ü"}'.encode(),
        b'{"a": "\\ud83d\\ude42"}',  # a whole pair
        b'{"a": "\\\\ud83d"}',  # an escaped backslash, no character
        b'{"a": 1e300, "b": 12345678901234567890}',
        b'{"a": [' + b"[]," * 500 + b"[]]}",
        nested(MAX_DEPTH - 2),
    ],
)
def test_good_bodies(body: bytes) -> None:
    assert parse_object(body) == json.loads(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": [{"b": 1e999}]}', "too large"),
        (b'{"a": -' + b"9" * 400 + b".0}", "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too long"),
        (b'{"a": "\\ud800"}', "not valid Unicode"),
        (b'{"\\udc00": 1}', "not valid Unicode"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (nested(MAX_DEPTH), "nested deeper"),
        (nested(100_000), "nested deeper"),
        (nested(100_000, '{"a":', "}"), "nested deeper"),
    ],
    ids=range(17),
)
def test_bad_bodies(body: bytes, message: str) -> None:
    with pytest.raises(MalformedRequest, match=message) as caught:
        parse_object(body)
    assert caught.value.param == "body"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("given", [None, "", "text/plain", "application/jsonx", "multipart/form"])
def test_other_media_types(given: str | None) -> None:
    with pytest.raises(MalformedRequest):
        check_media_type(given)


@pytest.mark.parametrize(
    "given",
    ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"],
)
def test_json_media_types(given: str) -> None:
    check_media_type(given)


async def test_the_body_is_read_up_to_the_limit() -> None:
    taken = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(10):
            taken += 1
            yield b"x" * 10

    assert await read_body(stream(), "100", 100) == b"x" * 100
    taken = 0
    with pytest.raises(BodyTooLarge):
        await read_body(stream(), None, 35)
    assert taken == 4
    taken = 0
    with pytest.raises(BodyTooLarge):
        await read_body(stream(), "100", 99)
    assert taken == 0
