"""JSON schemas: what no backend can promise is refused by name, the rest goes to one that can.

The first backend silently ignores many keywords, so it gets only what is known to be exact there
(tests try both). Neither output order nor white space is a promise of JSON Schema: both backends
write properties in the order of the schema.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from contracts.errors import InvalidRequest
from engine.grammar_regex import check_regex

MAX_SCHEMA = 1 << 20  # characters
MAX_DEPTH = 64
LARGEST_INT = 1 << 53
Schema = dict[str, Any]

ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$schema",
        "$id",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentMediaType",
        "contentEncoding",
        "contentSchema",
        "discriminator",
        "externalDocs",
        "xml",
        "nullable",
        "$anchor",
        "$vocabulary",
    ]
)
# Each with the types that it says something about.
TYPED = {
    "multipleOf": "number", "minimum": "number", "maximum": "number",
    "exclusiveMinimum": "number", "exclusiveMaximum": "number",
    "minLength": "string", "maxLength": "string", "pattern": "string", "format": "string",
    "items": "array", "prefixItems": "array", "minItems": "array", "maxItems": "array",
    "properties": "object", "required": "object", "additionalProperties": "object",
    "patternProperties": "object", "minProperties": "object", "maxProperties": "object",
}  # fmt: skip
GENERAL = frozenset(
    ["type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"]
)
TYPES = frozenset(["string", "number", "integer", "boolean", "null", "array", "object"])
FORMATS = frozenset(
    ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
)
ANNOTATION_FORMATS = frozenset(
    [
        "int32",
        "int64",
        "float",
        "double",
        "decimal",
        "password",
        "binary",
        "path",
        "file-path",
        "directory-path",
    ]
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema that some backend matches exactly. `reason`: why the first one does not."""

    text: str
    reason: str = ""


def check_nesting(text: str) -> None:
    """Refuse JSON that is too long or too deep to be read safely.

    Raises:
        InvalidRequest: more than MAX_SCHEMA characters, more than MAX_DEPTH levels.
    """
    if len(text) > MAX_SCHEMA:
        raise InvalidRequest(f"a schema may have {MAX_SCHEMA} characters at most")
    depth = 0
    for found in TOKEN.finditer(text):
        sign = found.group()
        if sign in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequest(f"the schema is nested more than {MAX_DEPTH} levels deep")
        elif sign in "]}":
            depth -= 1


def read_json(text: str) -> Any:
    """Parse JSON of bounded depth.

    Raises:
        InvalidRequest: too large, or no JSON.
    """
    check_nesting(text)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not valid JSON: {error}") from error


def prepare_schema(schema: object, *, closed: bool) -> PreparedSchema:
    """Check a schema and write it in the form both backends read.

    Args:
        schema: parsed JSON, not changed.
        closed: objects with `properties` that do not say more take no others.

    Raises:
        InvalidRequest: it names the keyword that cannot be enforced.
    """
    if schema is True:
        return PreparedSchema("{}")
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema must be a JSON object")
    preparer = _Preparer(schema, closed)
    prepared = preparer.schema(schema, "#", frozenset())
    return PreparedSchema(json.dumps(prepared), preparer.reason)


class _Preparer:
    """One walk over a schema; `reason` is the first thing the first backend cannot do."""

    def __init__(self, root: Schema, closed: bool) -> None:
        self._root = root
        self._closed = closed
        self._open = _composite_targets(root)
        self.reason = ""

    def _note(self, reason: str) -> None:
        self.reason = self.reason or reason

    def schema(self, node: object, place: str, flags: frozenset[str]) -> Any:
        """Rewrite one (sub)schema. Flag `part`: its properties are only some of an object's."""
        if isinstance(node, bool):
            if not node:
                self._note("false")
            return node
        if not isinstance(node, dict):
            raise InvalidRequest(f"{place} is not a schema")
        self._check(node, place)
        new = {key: value for key, value in node.items() if key not in ANNOTATIONS}
        new = {key: value for key, value in new.items() if not key.startswith("x-")}
        if "$id" in node and place != "#":
            raise InvalidRequest("the schema has $id inside, which is not supported")
        if "uniqueItems" in new:
            del new["uniqueItems"]
        self._names(new, place)
        self._arrays(new)
        composite = any(key in new for key in ("anyOf", "oneOf", "allOf", "$ref"))
        part = flags | {"part"} if composite and _says_more(new) else flags
        if len(new.get("allOf", ())) > 1:
            part = flags | {"part"}
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if key in new:
                inner = frozenset[str]() if key == "prefixItems" else part
                new[key] = [
                    self.schema(one, f"{place}/{key}/{i}", inner) for i, one in enumerate(new[key])
                ]
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            if key in new:
                new[key] = {
                    name: self.schema(one, f"{place}/{key}/{_escape(name)}", frozenset())
                    for name, one in new[key].items()
                }
        for key in ("items", "additionalProperties"):
            if not isinstance(new.get(key, True), bool):
                new[key] = self.schema(new[key], f"{place}/{key}", frozenset())
        is_part = "part" in part or place in self._open
        silent = not {"additionalProperties", "patternProperties"} & new.keys()
        if silent and not is_part:
            self._close(new)
        self._limit_properties(new, place)
        self._compare(new)
        return new

    def _close(self, new: Schema) -> None:
        """Name what is required, and let nothing follow that is not named."""
        named = new.get("properties", {})
        for name in new.get("required", ()):
            new["properties"] = named = {**named, name: named.get(name, {})}
        if self._closed and "properties" in new:
            new["additionalProperties"] = False

    def _check(self, node: Schema, place: str) -> None:
        for key, value in node.items():
            known = key in ANNOTATIONS or key in GENERAL or key in TYPED or key.startswith("x-")
            harmless = (
                (key == "uniqueItems" and (value is False or node.get("maxItems") in (0, 1)))
                or (key == "propertyNames" and isinstance(value, dict))
                or (key == "additionalItems" and isinstance(node.get("items"), list))
                or (key == "unevaluatedProperties" and value is True)
            )
            if not known and not harmless:
                raise InvalidRequest(f"the schema keyword '{key}' is not supported (at {place})")
        types = node.get("type", [])
        for one in types if isinstance(types, list) else [types]:
            if not isinstance(one, str) or one not in TYPES:
                raise InvalidRequest(f"{place}/type is {json.dumps(one)}, which is no JSON type")
        for key in ("anyOf", "oneOf", "allOf", "prefixItems", "enum", "required"):
            if key in node and not isinstance(node[key], list):
                raise InvalidRequest(f"{place}/{key} must be a list")
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            if key in node and not isinstance(node[key], dict):
                raise InvalidRequest(f"{place}/{key} must be an object")
        if not all(isinstance(name, str) for name in node.get("required", ())):
            raise InvalidRequest(f"{place}/required must hold texts")
        if not isinstance(node.get("format", ""), str):
            raise InvalidRequest(f"{place}/format must be a text")
        for key in TYPED:
            number = key.startswith(("min", "max", "exclusive")) or key == "multipleOf"
            if number and key in node and type(node[key]) not in (int, float):
                raise InvalidRequest(f"{place}/{key} must be a number")
        self._check_texts(node, place)

    def _check_texts(self, node: Schema, place: str) -> None:
        reference = node.get("$ref", "#")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise InvalidRequest(f"{place}/$ref leads outside the schema, which is not supported")
        if "pattern" in node:
            if not isinstance(node["pattern"], str):
                raise InvalidRequest(f"{place}/pattern must be a text")
            check_regex(node["pattern"])
        for pattern in node.get("patternProperties", {}):
            check_regex(pattern)
        kind = node.get("format")
        if kind is not None and kind not in FORMATS | ANNOTATION_FORMATS:
            raise InvalidRequest(f"the format {json.dumps(kind)} is not supported (at {place})")

    def _names(self, new: Schema, place: str) -> None:
        """Turn `propertyNames` into the pattern of the only properties."""
        if new.get("format") in ANNOTATION_FORMATS:
            del new["format"]
        new.pop("unevaluatedProperties", None)
        names = new.pop("propertyNames", None)
        if names is None:
            return
        rest = {key: value for key, value in names.items() if key not in ANNOTATIONS}
        if rest.pop("type", "string") != "string" or len(rest) > 1:
            raise InvalidRequest(f"the schema keyword 'propertyNames' is not supported at {place}")
        if not rest:
            return
        if {"properties", "patternProperties", "required"} & new.keys():
            raise InvalidRequest("'propertyNames' beside 'properties' is not supported")
        (key, value) = rest.popitem()
        if key == "enum" and all(isinstance(one, str) for one in value):
            pattern = f"^({'|'.join(re.escape(one) for one in value)})$"
        elif key == "const" and isinstance(value, str):
            pattern = f"^{re.escape(value)}$"
        elif key == "pattern" and isinstance(value, str):
            check_regex(value)
            pattern = value
        else:
            raise InvalidRequest(f"'{key}' in 'propertyNames' is not supported")
        new["patternProperties"] = {pattern: new.pop("additionalProperties", True)}
        new["additionalProperties"] = False

    @staticmethod
    def _arrays(new: Schema) -> None:
        """Write the older form of tuples in the newer one."""
        if isinstance(new.get("items"), list):
            new["prefixItems"] = new.pop("items")
            if "additionalItems" in new:
                new["items"] = new.pop("additionalItems")

    def _limit_properties(self, new: Schema, place: str) -> None:
        least = new.get("minProperties", 0)
        if least <= len(set(new.get("required", ()))):
            new.pop("minProperties", None)
        elif least > 1 and new.get("additionalProperties", True) is not False:
            # A repeated name would count as two there, and as one for whoever reads it.
            raise InvalidRequest(
                f"'minProperties' above 1 with free property names is not supported (at {place})"
            )

    def _compare(self, new: Schema) -> None:
        """Note what the first backend would not enforce here."""
        keys = new.keys() - {"$defs", "definitions"}
        types = new.get("type", [])
        types = types if isinstance(types, list) else [types]
        for key in keys & {"anyOf", "allOf", "$ref"}:
            if keys != {key} or (key == "allOf" and len(new["allOf"]) != 1):
                self._note(f"'{key}' beside other keywords")
        if not re.fullmatch(r"#(/[\w$-]+)*", new.get("$ref", "#")):
            self._note("'$ref' by name")
        for key in (
            "oneOf", "multipleOf", "minLength", "maxLength", "pattern", "format",
            "patternProperties",
        ):  # fmt: skip
            if key in keys:
                self._note(f"'{key}'")
        if keys & {"enum", "const"} and len(keys) > 1:
            values = [*new.get("enum", []), *([new["const"]] if "const" in new else [])]
            if keys - {"enum", "type"} and keys - {"const", "type"}:
                self._note("'enum' or 'const' beside other keywords")
            elif not all(_is_of(value, types) for value in values):
                self._note("'enum' with values of other types")
        bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & keys
        if bounds and (
            types != ["integer"]
            or not all(type(new[b]) is int and abs(new[b]) < LARGEST_INT for b in bounds)
        ):
            self._note(f"'{min(bounds)}' of other than integers")
        said = {TYPED[key] for key in keys if key in TYPED and key != "format"}
        if not types and said:
            self._note("a missing 'type'")
        if set(new.get("required", ())) - new.get("properties", {}).keys():
            self._note("'required' without 'properties'")
        if new.get("properties") and new.get("additionalProperties", True) is not False:
            self._note("further properties")  # a known name, written with escapes, would be one


def _says_more(node: Schema) -> bool:
    return any(key in node for key in ("properties", "required", "additionalProperties")) or (
        sum(key in node for key in ("anyOf", "oneOf", "allOf", "$ref")) > 1
    )


def _is_of(value: object, types: list[str]) -> bool:
    names = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number" in types or ("integer" in types and isinstance(value, int))
    return names[type(value)] in types


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _composite_targets(root: Schema) -> set[str]:
    """Places that a `$ref` names where the target is only a part of an object's schema."""
    targets: set[str] = set()

    def visit(node: object, part: bool) -> None:
        if isinstance(node, list):
            for one in node:
                visit(one, part)
        if not isinstance(node, dict):
            return
        composite = any(key in node for key in ("anyOf", "oneOf", "allOf", "$ref"))
        inside = part or (composite and _says_more(node)) or len(node.get("allOf") or ()) > 1
        if isinstance(node.get("$ref"), str) and inside:
            targets.add(node["$ref"])
        for key, value in node.items():
            visit(value, inside if key in ("anyOf", "oneOf", "allOf") else False)

    visit(root, False)
    return targets
