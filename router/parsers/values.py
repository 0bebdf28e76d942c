"""Values that a model wrote as bare text, made JSON by the types of a schema."""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, from an escape
_MAX_LITERAL = 1 << 18  # characters; longer Python literals are left as text
_TYPE_OF = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def property_schema(schema: Mapping[str, Any] | None, key: str) -> Mapping[str, Any] | None:
    """The schema of a property, its reference followed; None: the schema does not tell."""
    properties = (schema or {}).get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = schema
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return target if isinstance(target, Mapping) else None
    return found


def types_of(schema: Mapping[str, Any] | None, depth: int = 4) -> frozenset[str]:
    """The JSON types that a schema lets through; empty: it does not tell."""
    return frozenset(_types(schema, depth)) if schema else frozenset()


def _types(schema: Mapping[str, Any], depth: int) -> Iterator[str]:
    stated = schema.get("type")
    if isinstance(stated, str):
        yield stated
    elif isinstance(stated, list):
        yield from (one for one in stated if isinstance(one, str))
    elif isinstance(values := schema.get("enum"), list):
        yield from (_TYPE_OF.get(type(value), "object") for value in values)
    elif "const" in schema:
        yield _TYPE_OF.get(type(schema["const"]), "object")
    elif depth:
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(options := schema.get(word), list):
                for option in options:
                    if isinstance(option, Mapping):
                        yield from _types(option, depth - 1)


def to_json(text: str, types: frozenset[str], *, guess: bool) -> str:
    """The JSON text of the value `text`.

    What does not fit any of `types` is a string. Without types it is a string too, or with
    `guess` whatever JSON value it looks like.
    """
    bare = text.strip()
    if "null" in types and bare in ("null", "None"):
        return "null"
    if types and types <= {"string", "null"}:
        return dump(text)
    if "boolean" in types and bare in ("true", "false", "True", "False"):
        return bare.lower()
    if "integer" in types and _INTEGER.fullmatch(bare):
        return bare
    if types or guess:
        found = _read(bare)
        if found and (not types or found[0] & types):
            return found[1]
        if bare in ("null", "None") and "string" not in types:
            return "null"
    return dump(text)


def dump(value: object) -> str:
    """A value's JSON text, which UTF-8 can hold.

    Raises:
        ValueError: JSON has no such value.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if _SURROGATE.search(text) else text


def _type_names(value: object) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    if isinstance(value, dict):
        return {"object"}
    return {"array"} if isinstance(value, list) else {_TYPE_OF.get(type(value), "object")}


def _read(text: str) -> tuple[set[str], str] | None:
    """Types and JSON text of the JSON or Python value that `text` is."""
    for parse in (json.loads, _literal):
        try:
            value = parse(text)
            return _type_names(value), dump(value)
        except (ValueError, RecursionError):
            continue
    return None


def _literal(text: str) -> Any:
    return python_literal(parse_expression(text))


def parse_expression(text: str) -> ast.expr:
    """Parse a Python expression, which is not run.

    Raises:
        ValueError: it is none, or too large.
    """
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("not an expression") from error


_JSON_NAMES = {"true": True, "false": False, "null": None}


def python_literal(node: ast.expr, depth: int = 64) -> Any:
    """The JSON value that a literal stands for; JSON's own constants are taken too.

    Raises:
        ValueError: it is no literal, or JSON has no such value.
    """
    if not depth:
        raise ValueError("too deep")
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=value)) if (
            isinstance(value, int | float) and not isinstance(value, bool)
        ):
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [python_literal(item, depth - 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                _key(key): python_literal(value, depth - 1)
                for key, value in zip(keys, values, strict=True)
            }
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("not a JSON key")
