"""JSON schemas: what is generated satisfies them; what cannot be promised is refused by name."""

import json
from importlib import import_module
from typing import Any

import pytest

from cluster.demo_model import ensure_demo_model
from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from engine.grammar_schema import prepare_schema
from tests.support.grammar_walks import Walker

validator: Any = import_module("jsonschema")
XG, LL = "xgrammar", "llguidance"


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(ensure_demo_model(tmp_path_factory.mktemp("models") / "demo"))


def json_grammar(schema: object, **options: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), **options)


def obj(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties}


INT, STR = {"type": "integer"}, {"type": "string"}
NODE = {
    "$defs": {
        "node": obj(v=INT, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
        | {"required": ["v", "next"]}
    },
    "$ref": "#/$defs/node",
}
TAGGED = {
    "oneOf": [
        obj(k={"const": "a"}, x=INT) | {"required": ["k"]},
        obj(k={"const": "b"}, y=INT) | {"required": ["k"]},
    ]
}
MERGED = {"allOf": [obj(a=INT) | {"required": ["a"]}, obj(b=INT) | {"required": ["b"]}]}
ENFORCED: list[tuple[str, object]] = [
    (XG, {"type": "integer", "minimum": -3, "maximum": 12}),
    (XG, {"type": ["integer", "null"]}),
    (XG, {"type": "boolean"}),
    (XG, {"enum": [1, "a", None, {"x": [1]}]}),
    (XG, {"type": "string", "enum": ['a"b\u00e9\n', "c\\"]}),
    (XG, {"const": {"a": [True]}}),
    (XG, obj(a=INT, b={"type": "array", "items": {"type": "boolean"}}) | {"required": ["b"]}),
    (XG, {"type": "array", "items": INT, "minItems": 2, "maxItems": 3}),
    (XG, {"type": "array", "prefixItems": [INT, {"type": "null"}], "items": False}),
    (XG, {"type": "array", "items": [INT, {"type": "null"}], "additionalItems": False}),
    (XG, {"anyOf": [INT, {"type": "null"}]}),
    (XG, {"allOf": [{"type": "integer", "minimum": 3}]}),
    (XG, NODE),
    (XG, {"type": "object", "additionalProperties": INT}),
    (XG, {"type": "object"}),
    (XG, obj(a=INT, b=INT) | {"minProperties": 1, "maxProperties": 1}),
    (XG, obj(a=INT) | {"title": "x", "description": "y", "$schema": "z", "x-own": 1}),
    (XG, {"type": "array", "uniqueItems": False, "items": {"type": "integer", "format": "int32"}}),
    (LL, {"type": "integer", "minimum": 2.5, "maximum": 6}),
    (LL, {"type": "number", "minimum": 0.25, "maximum": 1.5}),
    (LL, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    (LL, {"minimum": 3}),
    (LL, {"type": "integer", "multipleOf": 7}),
    (LL, {"type": "string", "minLength": 2, "maxLength": 4}),
    (LL, {"type": "string", "pattern": "^[a-c]+$"}),
    (LL, {"type": "string", "pattern": '^"\\\\$'}),
    (LL, {"type": "string", "pattern": "b", "maxLength": 5}),
    (LL, {"type": "string", "format": "date"}),
    (LL, {"type": "string", "format": "date-time"}),
    (LL, {"type": "string", "format": "ipv4"}),
    (LL, {"type": "string", "format": "uuid"}),
    (LL, {"type": "string", "enum": ["ab", "c"], "maxLength": 1}),
    (LL, {"type": "integer", "enum": [1, "a"]}),
    (XG, obj(a=INT) | {"required": ["a", "b"]}),
    (XG, {"type": "object", "required": ["b"]}),
    (XG, obj(a=obj(b=INT) | {"additionalProperties": False}) | {"additionalProperties": False}),
    (LL, obj(a=INT) | {"required": ["b"], "additionalProperties": INT}),
    (LL, obj(a={"type": "boolean"}) | {"additionalProperties": INT}),
    (LL, {"type": "object", "patternProperties": {"^x": INT}, "additionalProperties": False}),
    (LL, {"type": "object", "propertyNames": {"enum": ["a.b", "c"]}, "additionalProperties": INT}),
    (LL, {"type": "object", "propertyNames": {"pattern": "^x[0-9]$"}}),
    (LL, MERGED),
    (LL, {"type": "integer", "maximum": 5, "allOf": [{"minimum": 3}]}),
    (LL, obj(a=INT) | {"anyOf": [{"required": ["a"]}]}),
    (LL, TAGGED),
    (LL, {"$ref": "#/$defs/i", "maximum": 3, "$defs": {"i": {"type": "integer", "minimum": 2}}}),
    (LL, {"$ref": "#/$defs/a~1b", "$defs": {"a/b": INT}}),
]


@pytest.mark.parametrize(("backend", "schema"), ENFORCED, ids=lambda x: json.dumps(x)[:60])
def test_everything_generated_satisfies_the_schema(
    walker: Walker, backend: str, schema: dict[str, Any]
) -> None:
    used, compiled = walker.compile(json_grammar(schema))
    assert used == backend
    texts = walker.texts(compiled, 12)
    assert texts
    kind = validator.Draft7Validator if "additionalItems" in schema else None
    check = (kind or validator.Draft202012Validator)(
        schema, format_checker=validator.FormatChecker()
    )
    for text in texts:
        check.validate(json.loads(text))


REFUSED: list[tuple[object, str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": INT}, "contains"),
    ({"type": "integer", "not": {"const": 5}}, "'not'"),
    (obj(a=INT) | {"if": {}, "then": {}}, "'if'"),
    (obj(a=INT, b=INT) | {"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    (obj(a=INT) | {"dependencies": {"a": ["b"]}}, "dependencies"),
    (obj(a=INT) | {"unevaluatedProperties": False}, "unevaluatedProperties"),
    (obj(a=INT) | {"propertyNames": {"pattern": "^x"}}, "propertyNames"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "string", "format": "idn-email"}, "idn-email"),
    ({"type": "string", "colour": "red"}, "colour"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"$ref": "http://example.com/schema"}, "$ref"),
    ({"$ref": "other.json"}, "$ref"),
    ({"$ref": "#/nowhere"}, "nowhere"),
    ({"type": "text"}, "type"),
    ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, "exclusiveMinimum"),
    ({"type": "string", "pattern": "(?=a)"}, "look"),
    ({"type": "string", "pattern": "("}, "regex"),
    ({"type": "string", "pattern": "\0"}, "NUL"),
    ({"enum": []}, "nsatisf"),
    (False, "object"),
    ([1], "object"),
    ({"properties": [1]}, "properties"),
    ({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, "nothing can satisfy"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=lambda x: json.dumps(x)[:60])
def test_what_cannot_be_promised_is_refused(walker: Walker, schema: object, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=r"(?s).") as caught:
        walker.compile(json_grammar(schema))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [obj(a=INT), obj(a=STR | {"maxLength": 3}), TAGGED])
def test_objects_are_closed_unless_opened(walker: Walker, schema: dict[str, Any]) -> None:
    known = {"k": "a"} if "oneOf" in schema else {}
    more = json.dumps(known | {"other": 1})
    _, closed = walker.compile(json_grammar(schema))
    _, opened = walker.compile(json_grammar(schema, closed_objects=False))
    assert walker.takes(closed, json.dumps(known))
    assert not walker.takes(closed, more)
    assert walker.takes(opened, more)


def test_parts_of_a_merged_object_stay_open(walker: Walker) -> None:
    _, compiled = walker.compile(json_grammar(MERGED))
    assert walker.takes(compiled, '{"a": 1, "b": 2}')
    part = {"$defs": {"p": obj(a=INT)}, "allOf": [{"$ref": "#/$defs/p"}, obj(b=INT)]}
    _, compiled = walker.compile(json_grammar(part))
    assert walker.takes(compiled, '{"a": 1, "b": 2}')


def test_a_known_name_cannot_come_in_disguise(walker: Walker) -> None:
    schema = obj(a={"type": "boolean"}) | {"additionalProperties": INT}
    _, compiled = walker.compile(json_grammar(schema))
    assert walker.takes(compiled, '{"a": true, "b": 5}')
    assert not walker.takes(compiled, '{"\\u0061": 5}')


@pytest.mark.parametrize("extra", [{}, {"minLength": 1}], ids=["first", "second"])
def test_white_space(walker: Walker, extra: dict[str, object]) -> None:
    schema = obj(a=STR | extra)
    _, loose = walker.compile(json_grammar(schema))
    assert walker.takes(loose, '{\n  "a" : "x"\n}')
    assert not walker.takes(loose, '{"a":' + " " * 40 + '"x"}'), "runs are capped"
    _, compact = walker.compile(json_grammar(schema, any_whitespace=False))
    assert walker.takes(compact, '{"a":"x"}')
    assert not walker.takes(compact, '{"a": "x"}')
    used, own = walker.compile(json_grammar(schema, whitespace_pattern="[ ]"))
    assert used == LL
    assert walker.takes(own, '{ "a":"x"}')
    assert not walker.takes(own, '{\n"a":"x"}')


def test_without_fallback_the_reason_is_told(walker: Walker) -> None:
    with pytest.raises(InvalidRequest, match=r"'pattern' .*disable_fallback"):
        walker.compile(json_grammar({"type": "string", "pattern": "a"}, fallback=False))
    used, _ = walker.compile(json_grammar(obj(a=STR), fallback=False))
    assert used == XG


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "JSON"), ("[" * 65 + "]" * 65, "nested"), ('{"x": NaN}', "JSON"), ("[}]", "JSON")],
)
def test_what_is_no_schema(walker: Walker, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        walker.compile(Grammar(GrammarKind.JSON_SCHEMA, text))


def test_a_schema_is_not_changed() -> None:
    schema = obj(a=INT) | {"uniqueItems": False, "propertyNames": {"type": "string"}}
    before = json.dumps(schema)
    prepare_schema(schema, closed=True)
    assert json.dumps(schema) == before


def test_any_json_object(walker: Walker) -> None:
    _, compiled = walker.compile(Grammar(GrammarKind.JSON_OBJECT))
    texts = walker.texts(compiled, 12)
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)
    assert walker.takes(compiled, '{"a": {"b": [1, "x"]}}')
    assert not walker.takes(compiled, "[1]")
    _, compact = walker.compile(Grammar(GrammarKind.JSON_OBJECT, any_whitespace=False))
    assert walker.takes(compact, '{"a":[1]}')
    assert not walker.takes(compact, '{"a": 1}')
