"""The JSON schemas of forced calls: what the model may write when it has to call."""

from collections.abc import Iterable, Mapping
from typing import Any

from router.parsers.specs import ToolSpec

_DATA = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Schema of one tool's arguments: always an object; without parameters an empty one."""
    schema = dict(parameters or {})
    if "type" not in schema:
        schema = {"type": "object", **schema}
    return schema if len(schema) > 1 else {**schema, "properties": {}}


def calls_schema(tools: Iterable[ToolSpec], *, parallel: bool) -> dict[str, Any]:
    """Schema of a list of one call or more, each `{"name": …, "parameters": …}`.

    A tool's schema that refers to parts of itself is moved to the root's `$defs`, and its
    references with it.
    """
    forms: list[dict[str, Any]] = []
    moved: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        schema = arguments_schema(tool.parameters)
        if _has_reference(schema):
            place = f"tool_{index}"
            moved[place] = _rebase(schema, f"#/$defs/{place}")
            schema = {"$ref": f"#/$defs/{place}"}
        forms.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    result: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": forms}}
    if not parallel:
        result["maxItems"] = 1
    return {**result, "$defs": moved} if moved else result


def _has_reference(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return isinstance(schema.get("$ref"), str) or any(map(_has_reference, schema.values()))
    return isinstance(schema, list) and any(map(_has_reference, schema))


def _rebase(schema: Any, root: str) -> Any:
    """The same schema with references into itself counted from `root`."""
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[key] = root + value[1:]
        elif key in _DATA:
            result[key] = value
        elif key in _MAPS and isinstance(value, Mapping):  # names, not keywords
            result[key] = {name: _rebase(inner, root) for name, inner in value.items()}
        else:
            result[key] = _rebase(value, root)
    return result
