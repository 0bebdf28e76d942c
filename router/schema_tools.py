"""Tools and output constraints as clients send them: types only."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from router.schema_types import Fields, Flag, JsonObject, JsonObjects, TextOrObject, WordList


class Function(Fields):
    """What a tool is; `strict` binds the arguments to `parameters` also when the model may choose.

    `parameters` is a JSON schema; None: no arguments.
    """

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: JsonObject | None = None
    strict: Flag | None = None


class Tool(Fields):
    """One entry of `tools`."""

    type: Literal["function"] | None = None
    function: Function
    _sent: JsonObject = PrivateAttr(default_factory=dict[str, Any])

    @model_validator(mode="wrap")
    @classmethod
    def _keep_sent(cls, value: Any, handler: Callable[[Any], "Tool"]) -> "Tool":
        tool = handler(value)
        if isinstance(value, dict):
            tool._sent = value
        return tool

    @property
    def for_template(self) -> JsonObject:
        """The tool as it was sent, unknown keys and their order included."""
        if self.type is not None:
            return self._sent
        return {"type": "function", **{k: v for k, v in self._sent.items() if k != "type"}}


Tools = Annotated[list[Tool], Field(fail_fast=True)]


class NamedSchema(Fields):
    """`response_format.json_schema`; everything but the schema has no effect on decoding."""

    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Fields):
    """OpenAI's way to name a constraint."""

    type: str
    json_schema: NamedSchema | None = None
    format: JsonObject | None = None  # structural_tag, newer form
    structures: JsonObjects | None = None  # structural_tag, older form
    triggers: WordList | None = None


class StructuredOutputs(Fields):
    """The reference's way: one constraint, and switches for how it is compiled."""

    json_: TextOrObject | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: WordList | None = None
    grammar: str | None = None
    json_object: Flag | None = None
    structural_tag: TextOrObject | None = None
    disable_fallback: Flag | None = None
    disable_any_whitespace: Flag | None = None
    disable_additional_properties: Flag | None = None
    whitespace_pattern: str | None = None


class Processor(Fields):
    """A logits processor: a plain name is used as it is, an object is called to make one.

    `args` and `kwargs` are None for a plain name and only then.
    """

    qualname: str = Field(max_length=512)
    args: list[Any] | None = None
    kwargs: JsonObject | None = None

    @model_validator(mode="before")
    @classmethod
    def _either_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"qualname": value}
        if not isinstance(value, dict):
            return value
        defaults: JsonObject = {"args": [], "kwargs": {}}
        return defaults | {key: item for key, item in value.items() if item is not None}


Processors = Annotated[list[Processor], Field(fail_fast=True)]
