"""docs/api.md names every field, and for each a test."""

from typing import get_args

from pydantic import BaseModel

from router.schema import ChatRequest
from router.schema_tools import ResponseFormat, StructuredOutputs
from tests.support.api_table import DOCUMENT, REQUEST, RESPONSE, generated, proofs

# In the request models beyond the users' document: forms of one of its fields.
FORMS = {
    "response_format.format",
    "response_format.structures",
    "response_format.triggers",
}
DEEP = {"stream_options", "response_format", "response_format.json_schema", "structured_outputs"}


def names(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every field a client can send, with those of the objects that the table opens up."""
    found = set()
    for key, info in model.model_fields.items():
        name = prefix + (info.alias or key)
        found.add(name)
        if name in DEEP:
            (inner,) = (t for t in get_args(info.annotation) if t is not type(None))
            found |= names(inner, f"{name}.")
    return found


def test_the_table_has_every_request_field() -> None:
    internal = {name for name in REQUEST if "._backend" in name}
    assert names(ChatRequest) - FORMS == set(REQUEST) - internal
    assert names(StructuredOutputs) | names(ResponseFormat)


def test_every_field_has_a_test_and_every_test_a_field() -> None:
    known = set(REQUEST) | {f"response.{name}" for name in RESPONSE}
    assert set(proofs()) == known


def test_the_committed_table_is_current() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert generated(text) == text, "run: python -m tests.support.api_table"
