"""response_format and structured_outputs: what comes out satisfies the constraint."""

import json
import re
from typing import Any

import pytest

from tests.support.conformance import Api, text_of

field = pytest.mark.field
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace"]},
        "age": {"enum": [36, 85]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DRAWN = {"temperature": 1.0, "max_tokens": 300}


def check_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert person["name"] in ("Ada", "Grace")
    assert person["age"] in (36, 85)
    assert len(person["tags"]) <= 2
    assert set(person["tags"]) <= {"a", "b"}


def only(api: Api, text: str) -> dict[str, Any]:
    """A bias towards the first token of a text."""
    return {"logit_bias": {str(api.encode(text)[0]): 100}}


@field("response_format", "response_format.type", "response_format.json_schema")
@field("response_format.json_schema.schema")
@pytest.mark.parametrize("seed", [1, 2])
def test_response_format_json_schema(api: Api, seed: int) -> None:
    chosen = {
        "type": "json_schema",
        "json_schema": {"name": "person", "schema": PERSON, "strict": True},
    }
    answer = api.chat(response_format=chosen, seed=seed, **DRAWN)
    check_person(text_of(answer))
    assert answer["choices"][0]["finish_reason"] == "stop"


@field(
    "response_format.json_schema.name",
    "response_format.json_schema.description",
    "response_format.json_schema.strict",
)
def test_what_only_describes_a_schema_changes_nothing(api: Api) -> None:
    texts = set()
    for extra in ({}, {"strict": False}, {"description": "Someone."}, {"name": "other"}):
        named = {"name": "person", "schema": PERSON, **extra}
        chosen = {"type": "json_schema", "json_schema": named}
        texts.add(text_of(api.chat(response_format=chosen, max_tokens=300)))
    assert len(texts) == 1
    check_person(texts.pop())


@field("response_format")
def test_response_format_json_object(api: Api) -> None:
    answer = api.chat(response_format={"type": "json_object"}, max_tokens=60, **only(api, "}"))
    assert isinstance(json.loads(text_of(answer)), dict)
    free = api.chat(response_format={"type": "text"})
    assert text_of(free) == text_of(api.chat())


TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}],
    "triggers": ["<f>"],
}


@field("response_format", "structured_outputs.structural_tag")
@pytest.mark.parametrize("where", ["response_format", "structured_outputs"])
def test_structural_tag(api: Api, where: str) -> None:
    """Once the trigger is written, its part follows the schema; before that text is free."""
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": "<f>",
            "content": {"type": "json_schema", "json_schema": PERSON},
            "end": "</f>",
        },
    }
    fields = (
        {"response_format": tag}
        if where == "response_format"
        else {"structured_outputs": {"structural_tag": json.dumps(tag)}}
    )
    text = text_of(api.chat(**fields, max_tokens=300))
    found = re.fullmatch(r"<f>(.*)</f>", text, flags=re.DOTALL)
    assert found, text
    check_person(found[1])


@field("response_format")
def test_structural_tag_in_its_older_form(api: Api) -> None:
    free = api.chat(response_format=TAG, max_tokens=12)
    assert text_of(free) == text_of(api.chat(max_tokens=12))


@field("structured_outputs", "structured_outputs.json")
@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)], ids=["object", "text"])
def test_json(api: Api, schema: object) -> None:
    text = text_of(api.chat(structured_outputs={"json": schema}, seed=3, **DRAWN))
    check_person(text)


@field("structured_outputs.json_object")
def test_json_object(api: Api) -> None:
    fields = {"structured_outputs": {"json_object": True}, "max_tokens": 60}
    assert isinstance(json.loads(text_of(api.chat(**fields, **only(api, "}")))), dict)
    assert api.refused(structured_outputs={"json_object": False}).status == 400


@field("structured_outputs.regex")
@pytest.mark.parametrize("pattern", [r"[a-f]{5}-\d{3}", r"(red|green) (cat|dog)s?", "é+ü🙂"])
def test_regex(api: Api, pattern: str) -> None:
    answer = api.chat(structured_outputs={"regex": pattern}, seed=1, **DRAWN)
    assert re.fullmatch(pattern, text_of(answer))
    assert answer["choices"][0]["finish_reason"] == "stop"


@field("structured_outputs.choice")
def test_choice(api: Api) -> None:
    choices = ["positive", "negative", "it is neither"]
    texts = {
        text_of(api.chat(structured_outputs={"choice": choices}, seed=seed, **DRAWN))
        for seed in range(6)
    }
    assert texts <= set(choices)
    assert len(texts) > 1


EBNF = 'root ::= "SELECT " column " FROM t"\ncolumn ::= "a" | "b"'
LARK = 'start: "SELECT " column " FROM t"\ncolumn: "a" | "b"'


@field("structured_outputs.grammar")
@pytest.mark.parametrize("grammar", [EBNF, LARK], ids=["ebnf", "lark"])
def test_grammar(api: Api, grammar: str) -> None:
    text = text_of(api.chat(structured_outputs={"grammar": grammar}, seed=1, **DRAWN))
    assert text in ("SELECT a FROM t", "SELECT b FROM t")


@field("structured_outputs")
def test_a_complete_grammar_ends_even_with_ignore_eos(api: Api) -> None:
    answer = api.chat(structured_outputs={"choice": ["done"]}, ignore_eos=True, max_tokens=50)
    assert text_of(answer) == "done"
    assert answer["choices"][0]["finish_reason"] == "stop"


@field("structured_outputs")
def test_the_limit_may_cut_it(api: Api) -> None:
    answer = api.chat(structured_outputs={"regex": "(ab){50}"}, max_tokens=5)
    assert text_of(answer) != "ab" * 50
    assert ("ab" * 50).startswith(text_of(answer))
    assert answer["choices"][0]["finish_reason"] == "length"


@field("structured_outputs")
def test_the_grammar_wins_over_the_other_masks(api: Api) -> None:
    """Masks that would leave nothing are skipped, and the grammar is not."""
    fields: dict[str, Any] = {
        "structured_outputs": {"choice": ["yes", "no"]},
        "allowed_token_ids": [900],
        "bad_words": ["yes", "no"],
        "min_tokens": 20,
    }
    assert text_of(api.chat(max_tokens=30, **fields)) in ("yes", "no")


# Switches


@field("structured_outputs.disable_any_whitespace")
def test_disable_any_whitespace(api: Api) -> None:
    fields: dict[str, Any] = {"max_tokens": 300, **only(api, " ")}
    loose = text_of(api.chat(structured_outputs={"json": PERSON}, **fields))
    assert " " in loose
    compact = {"json": PERSON, "disable_any_whitespace": True}
    tight = text_of(api.chat(structured_outputs=compact, **fields))
    assert not re.search(r"\s", tight)
    check_person(tight)


@field("structured_outputs.whitespace_pattern")
def test_whitespace_pattern(api: Api) -> None:
    fields: dict[str, Any] = {"max_tokens": 300, **only(api, " ")}
    chosen = {"json": PERSON, "whitespace_pattern": r"\n?"}
    text = text_of(api.chat(structured_outputs=chosen, **fields))
    assert " " not in text
    check_person(text)


@field("structured_outputs.disable_additional_properties")
def test_disable_additional_properties(api: Api) -> None:
    silent = {"type": "object", "properties": {"a": {"enum": [1]}}}
    fields: dict[str, Any] = {"max_tokens": 60, "logit_bias": {str(api.encode("}")[0]): -100}}

    def keys(**switch: bool) -> str:
        return text_of(api.chat(structured_outputs={"json": silent, **switch}, **fields))

    closed = json.loads(keys(disable_additional_properties=True))
    assert set(closed) <= {"a"}
    assert keys() == keys(disable_additional_properties=True)
    opened = keys(disable_additional_properties=False)
    assert opened != keys()
    assert re.search(r'"(?!a")', opened)


@field("structured_outputs.disable_fallback")
def test_disable_fallback(api: Api) -> None:
    """What the first backend cannot express goes to the second, or is refused."""
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 99}},
        "required": ["count"],
        "additionalProperties": False,
    }
    text = text_of(api.chat(structured_outputs={"json": schema}, seed=1, **DRAWN))
    assert json.loads(text)["count"] in range(7, 99, 7)
    refusal = api.refused(structured_outputs={"json": schema, "disable_fallback": True})
    assert refusal.status == 400


@field("structured_outputs._backend", "structured_outputs._backend_was_auto")
def test_internal_switches_are_ignored(api: Api, only_baton: None) -> None:
    chosen = {"choice": ["yes", "no"], "_backend": "outlines", "_backend_was_auto": True}
    assert text_of(api.chat(structured_outputs=chosen)) in ("yes", "no")
