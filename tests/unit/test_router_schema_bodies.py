import json

import pytest

from router.body import check_media_type, parse_object
from router.http_errors import MalformedRequest


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"seed":' + b"9" * 5000 + b"}",
        b'{"model":"\\ud800"}',
        b'{"model":"\\uDC00x"}',
    ],
    ids=range(11),
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        parse_object(body)


def test_escaped_pairs_are_fine() -> None:
    assert parse_object(b'{"a":"\\ud83d\\ude42"}') == {"a": "🙂"}
    assert parse_object(json.dumps({"a": "🙂"}).encode()) == {"a": "🙂"}


@pytest.mark.parametrize("value", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_media_types(value: str) -> None:
    check_media_type(value)


@pytest.mark.parametrize("value", [None, "", "text/plain", "multipart/form-data; boundary=x"])
def test_other_media_types(value: str | None) -> None:
    with pytest.raises(MalformedRequest):
        check_media_type(value)
