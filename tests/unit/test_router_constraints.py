import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from router.constraints import constraint
from router.http_errors import MalformedRequest
from router.json_text import MAX_DEPTH, depth_beyond
from router.regex_syntax import regex_error
from router.schema import parse_chat_request

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}
COMPACT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":"é"}}}'
EBNF = 'root ::= "a" b\nb ::= "b"'
LARK = 'start: "a" b\nb: "b"'
OLD_TAG = {
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
NEW_TAG = {"format": {"type": "any_text"}}


def grammar(**fields: Any) -> Grammar | None:
    return constraint(parse_chat_request({"messages": [], **fields}))


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text", "json_schema": None}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": False},
                }
            },
            Grammar(GrammarKind.JSON_SCHEMA, COMPACT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, COMPACT)),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            Grammar(GrammarKind.JSON_SCHEMA, COMPACT),
        ),
        ({"structured_outputs": {"json": {}}}, Grammar(GrammarKind.JSON_SCHEMA, "{}")),
        ({"structured_outputs": {"regex": r"\d+|x"}}, Grammar(GrammarKind.REGEX, r"\d+|x")),
        (
            {"structured_outputs": {"choice": ["a", "é", "a"]}},
            Grammar(GrammarKind.CHOICE, '["a","é"]'),
        ),
        ({"structured_outputs": {"grammar": EBNF}}, Grammar(GrammarKind.EBNF, EBNF)),
        ({"structured_outputs": {"grammar": LARK}}, Grammar(GrammarKind.LARK, LARK)),
        (
            {"structured_outputs": {"grammar": f"# start: not this\n{EBNF}"}},
            Grammar(GrammarKind.EBNF, f"# start: not this\n{EBNF}"),
        ),
        (
            {"structured_outputs": {"grammar": '?start: "a"'}},
            Grammar(GrammarKind.LARK, '?start: "a"'),
        ),
        ({"structured_outputs": {"json_object": True}}, Grammar(GrammarKind.JSON_OBJECT)),
        (
            {"structured_outputs": {"regex": "a", "json": None}, "response_format": None},
            Grammar(GrammarKind.REGEX, "a"),
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            Grammar(GrammarKind.REGEX, "a"),
        ),
        (
            {"structured_outputs": {"regex": "a", "_backend": "x", "_backend_was_auto": True}},
            Grammar(GrammarKind.REGEX, "a"),
        ),
    ],
)
def test_constraints(fields: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar(**fields) == expected


@pytest.mark.parametrize("tag", [OLD_TAG, NEW_TAG], ids=["older", "newer"])
def test_structural_tags_in_all_forms(tag: dict[str, Any]) -> None:
    tag = {"type": "structural_tag", **tag}
    for fields in (
        {"response_format": tag},
        {"structured_outputs": {"structural_tag": tag}},
        {"structured_outputs": {"structural_tag": json.dumps(tag)}},
    ):
        got = grammar(**fields)
        assert got is not None
        assert got.kind is GrammarKind.STRUCTURAL_TAG
        assert json.loads(got.text) == tag


def test_switches() -> None:
    def switched(**switches: Any) -> Grammar:
        got = grammar(structured_outputs={"json_object": True, **switches})
        assert got is not None
        return got

    usual = Grammar(GrammarKind.JSON_OBJECT)
    assert switched(disable_fallback=False, disable_any_whitespace=False) == usual
    assert switched(disable_additional_properties=True, whitespace_pattern="") == usual
    assert not switched(disable_fallback=True).fallback
    assert not switched(disable_any_whitespace=True).any_whitespace
    assert not switched(disable_additional_properties=False).closed_objects
    assert switched(whitespace_pattern=" ?").whitespace_pattern == " ?"


def test_switches_go_with_response_format() -> None:
    got = grammar(
        response_format={"type": "json_object"},
        structured_outputs={"disable_any_whitespace": True},
    )
    assert got == Grammar(GrammarKind.JSON_OBJECT, any_whitespace=False)


def test_white_space_is_of_no_matter_outside_json() -> None:
    got = grammar(structured_outputs={"regex": "a", "disable_any_whitespace": True})
    assert got == Grammar(GrammarKind.REGEX, "a")


TYPES = "response_format"
OUTPUTS = "structured_outputs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({OUTPUTS: {}}, None),
        ({OUTPUTS: {"json": None, "disable_fallback": True}}, None),
        ({OUTPUTS: {"disable_fallback": True}, TYPES: {"type": "text"}}, None),
        ({OUTPUTS: {"json": {}, "regex": "a"}}, None),
        ({OUTPUTS: {"json_object": False, "regex": "a"}}, None),
        ({OUTPUTS: {"regex": "a"}, TYPES: {"type": "json_object"}}, None),
        ({TYPES: {"type": "yaml"}}, TYPES),
        ({TYPES: {"type": "json_schema"}}, TYPES),
        ({TYPES: {"type": "json_schema", "json_schema": {"name": "x"}}}, TYPES),
        ({TYPES: {"type": "json_schema", "json_schema": {"schema": nested(65)}}}, TYPES),
        ({TYPES: {"type": "structural_tag"}}, TYPES),
        ({TYPES: {"type": "structural_tag", **OLD_TAG, "triggers": []}}, TYPES),
        ({TYPES: {"type": "structural_tag", **OLD_TAG, "triggers": ["<g"]}}, TYPES),
        ({OUTPUTS: {"json": "{"}}, OUTPUTS),
        ({OUTPUTS: {"json": "[]"}}, OUTPUTS),
        ({OUTPUTS: {"json": "3"}}, OUTPUTS),
        ({OUTPUTS: {"json": '{"const": NaN}'}}, OUTPUTS),
        ({OUTPUTS: {"json": '{"const": "\\ud800"}'}}, OUTPUTS),
        ({OUTPUTS: {"json": "[" * 100_000}}, OUTPUTS),
        ({OUTPUTS: {"json": json.dumps(nested(65))}}, OUTPUTS),
        ({OUTPUTS: {"json": {"const": "x" * (1 << 20)}}}, OUTPUTS),
        ({OUTPUTS: {"regex": ""}}, OUTPUTS),
        ({OUTPUTS: {"regex": "a\0"}}, OUTPUTS),
        ({OUTPUTS: {"regex": "("}}, OUTPUTS),
        ({OUTPUTS: {"regex": "x" * (1 << 21)}}, OUTPUTS),
        ({OUTPUTS: {"choice": []}}, OUTPUTS),
        ({OUTPUTS: {"choice": ["a", ""]}}, OUTPUTS),
        ({OUTPUTS: {"grammar": ""}}, OUTPUTS),
        ({OUTPUTS: {"grammar": 'a ::= "b"'}}, OUTPUTS),
        ({OUTPUTS: {"grammar": "restart: x"}}, OUTPUTS),
        ({OUTPUTS: {"grammar": EBNF + "\0"}}, OUTPUTS),
        ({OUTPUTS: {"json_object": False}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": "{"}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": "[]"}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": {"format": 3}}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": {"structures": [], "triggers": ["a"]}}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": {"structures": [3], "triggers": ["a"]}}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": {**OLD_TAG, "triggers": [3]}}}, OUTPUTS),
        ({OUTPUTS: {"structural_tag": {**OLD_TAG, "triggers": [""]}}}, OUTPUTS),
        ({OUTPUTS: {"json": {}, "whitespace_pattern": "["}}, OUTPUTS),
        (
            {OUTPUTS: {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            OUTPUTS,
        ),
    ],
    ids=lambda value: str(value)[:70],
)
def test_constraints_that_cannot_be(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar(**fields)
    assert not isinstance(caught.value, MalformedRequest)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


def test_nesting_up_to_the_limit_is_fine() -> None:
    assert grammar(structured_outputs={"json": nested(MAX_DEPTH)}) is not None
    assert not depth_beyond(nested(MAX_DEPTH), MAX_DEPTH)
    assert depth_beyond([nested(MAX_DEPTH)], MAX_DEPTH)


# Regular expressions


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        r"(a|b)*c{2,3}?",
        r"[]a]+",
        r"[^]]",
        r"[\]]",
        r"\(\[",
        r"(?:x)(?=y)(?<n>z)",
        r"\p{L}+",
        "^a$",
        "a||b",
        "()",
        "{",
        "(" * 64 + ")" * 64,
    ],
)
def test_regular_expressions(pattern: str) -> None:
    assert regex_error(pattern) is None


DEEP = "(" * 65 + ")" * 65


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "(()", "[", "[a", "[\\]", "a\\", "*a", "+", "?", "(*a)", "a|+", "[\0]", "\0", DEEP],
)
def test_no_regular_expressions(pattern: str) -> None:
    assert regex_error(pattern)


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["begin", "end", "schema", "format", "x"]), inner)
    ),
    max_leaves=6,
)
KEYS: tuple[str, ...] = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "structural_tag",
    "structures",
)
KEYS += ("triggers", "format", "json_schema", "disable_fallback", "whitespace_pattern")


@given(
    field=st.sampled_from([TYPES, OUTPUTS]),
    kind=st.sampled_from(["text", "json_object", "json_schema", "structural_tag", "x"]),
    value=st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["start:", "root ::="])),
)
def test_anything_is_a_grammar_or_refused(field: str, kind: str, value: dict[str, Any]) -> None:
    try:
        got = grammar(**{field: {"type": kind, **value}})
    except InvalidRequest:
        return
    if got is not None and got.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG):
        assert isinstance(json.loads(got.text), dict)


@pytest.mark.parametrize("text", ["\n" * 200_000, " " * 200_000, "root\n" * 40_000])
def test_a_long_text_that_is_no_grammar_is_soon_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):  # a search that starts anew at each line would take hours
        grammar(structured_outputs={"grammar": text})


def test_rules_may_be_indented() -> None:
    for text, kind in (
        ('\n\n \troot ::= "a"', GrammarKind.EBNF),
        ('\n\n \t?start: "a"', GrammarKind.LARK),
    ):
        found = grammar(structured_outputs={"grammar": text})
        assert found is not None
        assert found.kind is kind


def test_a_long_expression_is_soon_looked_through() -> None:
    assert regex_error("[][]" * 250_000) is None
