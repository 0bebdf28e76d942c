"""JSON types of request fields, as the reference reads them, and how violations are reported.

Long lists and maps fail at their first wrong item: a bad body costs no more than a good one.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from router.http_errors import MalformedRequest

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_REQUEST_ID_CHARS = 1024
_PARAM_CHARS = 120
_MESSAGE_CHARS = 300

_ModelT = TypeVar("_ModelT", bound=BaseModel)


def _number(value: object) -> object:
    """A JSON true or false is not a number, although Python thinks so."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number, not a boolean")
    return value


def _texts(value: object) -> object:
    """One text or a list of texts, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise PydanticCustomError("texts", "Input should be a string or a list of strings")


def _extras(value: object) -> object:
    """By name, a text or a number that fits 64 bits, or a list of them."""
    if not isinstance(value, dict):
        raise PydanticCustomError("extra", "Input should be an object")
    for entry in value.values():
        for item in entry if isinstance(entry, list) else [entry]:
            _check_extra(item)
    return value


def _check_extra(item: object) -> None:
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise PydanticCustomError(
            "extra", "Input should hold strings, numbers, or lists of them, and nothing else"
        )
    if isinstance(item, int) and not INT64_MIN <= item <= INT64_MAX:
        raise PydanticCustomError("extra", "Input should hold integers of 64 bits only")
    if isinstance(item, float) and not math.isfinite(item):
        raise PydanticCustomError("extra", "Input should hold finite numbers only")


def _bias(value: object) -> object:
    """Number by token id; stops at the first that is none."""
    if not isinstance(value, dict):
        raise PydanticCustomError("bias", "Input should be an object")
    result = {}
    for key, number in value.items():
        try:
            if not isinstance(number, bool) and isinstance(number, int | float | str):
                result[key] = float(number)
                continue
        except (ValueError, OverflowError):
            pass
        raise PydanticCustomError("bias", "Input should be an object of numbers")
    return result


def _document(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise PydanticCustomError("document", "Input should be an object of strings")


def _text_or_object(value: object) -> object:
    if not isinstance(value, str | dict):
        raise PydanticCustomError("text_or_object", "Input should be a string or an object")
    return value


Flag = StrictBool
Integer = Annotated[int, BeforeValidator(_number), Field(ge=INT64_MIN, le=INT64_MAX)]
Real = Annotated[float, BeforeValidator(_number)]
"""May still be NaN or infinite: ranges are checked in `router.ranges`, under the field's name."""
Texts = Annotated[list[str], BeforeValidator(_texts)]
WordList = Annotated[list[str], Field(fail_fast=True)]
RequestIdText = Annotated[str, Field(max_length=_REQUEST_ID_CHARS)]
Integers = Annotated[list[Integer], Field(fail_fast=True)]
Bias = Annotated[dict[str, float], BeforeValidator(_bias)]
Extras = Annotated[dict[str, Any], BeforeValidator(_extras)]
Documents = Annotated[
    list[Annotated[dict[str, str], BeforeValidator(_document)]], Field(fail_fast=True)
]
TextOrObject = Annotated[Any, BeforeValidator(_text_or_object)]
JsonObject = dict[str, Any]
JsonObjects = Annotated[list[JsonObject], Field(fail_fast=True)]


class Fields(BaseModel):
    """Base of everything a client sends: unknown keys are ignored, null is the same as absent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=False)


def parse_fields(model: type[_ModelT], body: Mapping[str, object]) -> _ModelT:
    """Check the fields' types.

    Raises:
        MalformedRequest: a missing or wrongly typed field; `param` reads like `body.temperature`.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(["body", *(str(part) for part in first["loc"])])
        if len(param) > _PARAM_CHARS:
            param = param[: _PARAM_CHARS - 1] + "…"
        raise MalformedRequest(f"{param}: {first['msg']}"[:_MESSAGE_CHARS], param) from None
