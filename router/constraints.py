"""`response_format` and `structured_outputs` as the one grammar that the output must satisfy."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from router.json_text import MAX_CHARS, dump_json, parse_json
from router.regex_syntax import regex_error
from router.schema import SharedFields
from router.schema_tools import ResponseFormat, StructuredOutputs

_FORMAT = "response_format"
_OUTPUTS = "structured_outputs"
_LARK_START = re.compile(r"^[^\S\n]*[?!]*start\b[^:\n]*:(?!:)", re.MULTILINE)
_EBNF_ROOT = re.compile(r"^[^\S\n]*root\s*::=", re.MULTILINE)
_WITH_JSON = (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT, GrammarKind.STRUCTURAL_TAG)


def constraint(request: SharedFields) -> Grammar | None:
    """What a request asks its output to be; it binds from the first token, and ends nowhere yet.

    Raises:
        InvalidRequest: none or several in one place, or one that cannot be compiled.
    """
    outputs = request.structured_outputs
    found = _of_format(request.response_format) if request.response_format else []
    if outputs is not None:
        found += _of_outputs(outputs)
        if not found:
            raise InvalidRequest(
                "structured_outputs needs one of json, regex, choice, grammar, json_object and "
                "structural_tag"
            )
    if len(found) > 1:
        raise InvalidRequest(
            "there may be one constraint only, counted over response_format and structured_outputs"
        )
    if not found:
        return None
    kind, text = found[0]
    return _with_switches(Grammar(kind, text), outputs)


def _of_format(chosen: ResponseFormat) -> list[tuple[GrammarKind, str]]:
    """The constraint of `response_format`: one, or none for plain text."""
    if chosen.type == "text":
        return []
    if chosen.type == "json_object":
        return [(GrammarKind.JSON_OBJECT, "")]
    if chosen.type == "json_schema":
        if chosen.json_schema is None or chosen.json_schema.schema_ is None:
            raise InvalidRequest(
                "response_format of type json_schema needs json_schema.schema", _FORMAT
            )
        return [(GrammarKind.JSON_SCHEMA, dump_json(chosen.json_schema.schema_, _FORMAT))]
    if chosen.type == "structural_tag":
        value = {
            name: getattr(chosen, name)
            for name in ("structures", "triggers", "format")
            if getattr(chosen, name) is not None
        }
        return [(GrammarKind.STRUCTURAL_TAG, _structural_tag(value, _FORMAT))]
    raise InvalidRequest(
        "response_format.type must be text, json_object, json_schema or structural_tag", _FORMAT
    )


def _of_outputs(outputs: StructuredOutputs) -> list[tuple[GrammarKind, str]]:
    """The constraints of `structured_outputs`; more than one is for the caller to refuse."""
    given = (
        outputs.json_,
        outputs.regex,
        outputs.choice,
        outputs.grammar,
        outputs.json_object,
        outputs.structural_tag,
    )
    if sum(value is not None for value in given) > 1:
        raise InvalidRequest("structured_outputs may hold one constraint only")
    if outputs.json_ is not None:
        schema = outputs.json_
        if isinstance(schema, str):
            schema = parse_json(schema, _OUTPUTS)
        if not isinstance(schema, dict):
            raise InvalidRequest("structured_outputs.json must be a JSON schema", _OUTPUTS)
        return [(GrammarKind.JSON_SCHEMA, dump_json(schema, _OUTPUTS))]
    if outputs.regex is not None:
        _check_regex(outputs.regex, "structured_outputs.regex")
        return [(GrammarKind.REGEX, outputs.regex)]
    if outputs.choice is not None:
        if not outputs.choice or "" in outputs.choice:
            raise InvalidRequest(
                "structured_outputs.choice must be a list of texts, none of them empty", _OUTPUTS
            )
        return [(GrammarKind.CHOICE, dump_json(list(dict.fromkeys(outputs.choice)), _OUTPUTS))]
    if outputs.grammar is not None:
        return [(_grammar_kind(outputs.grammar), outputs.grammar)]
    if outputs.json_object is not None:
        if not outputs.json_object:
            raise InvalidRequest("structured_outputs.json_object can only be true", _OUTPUTS)
        return [(GrammarKind.JSON_OBJECT, "")]
    if outputs.structural_tag is not None:
        value = outputs.structural_tag
        if isinstance(value, str):
            value = parse_json(value, _OUTPUTS)
        return [(GrammarKind.STRUCTURAL_TAG, _structural_tag(value, _OUTPUTS))]
    return []


def _with_switches(grammar: Grammar, outputs: StructuredOutputs | None) -> Grammar:
    if outputs is None:
        return grammar
    pattern = outputs.whitespace_pattern or ""
    if pattern:
        _check_regex(pattern, "structured_outputs.whitespace_pattern")
        if outputs.disable_any_whitespace:
            raise InvalidRequest(
                "structured_outputs: whitespace_pattern contradicts disable_any_whitespace",
                _OUTPUTS,
            )
    fallback = not outputs.disable_fallback
    if grammar.kind not in _WITH_JSON:
        return Grammar(grammar.kind, grammar.text, fallback=fallback)
    return Grammar(
        grammar.kind,
        grammar.text,
        any_whitespace=not outputs.disable_any_whitespace,
        closed_objects=outputs.disable_additional_properties is not False,
        whitespace_pattern=pattern,
        fallback=fallback,
    )


def _check_regex(pattern: str, where: str) -> None:
    if not pattern:
        raise InvalidRequest(f"{where} must not be empty", _OUTPUTS)
    if len(pattern) > MAX_CHARS:
        raise InvalidRequest(f"{where} is longer than {MAX_CHARS} characters", _OUTPUTS)
    reason = regex_error(pattern)
    if reason is not None:
        raise InvalidRequest(f"{where} is not a regular expression: {reason}", _OUTPUTS)


def _grammar_kind(text: str) -> GrammarKind:
    if len(text) > MAX_CHARS or "\0" in text:
        raise InvalidRequest(
            f"structured_outputs.grammar may have {MAX_CHARS} characters, none of them NUL",
            _OUTPUTS,
        )
    if _EBNF_ROOT.search(text):
        return GrammarKind.EBNF
    if _LARK_START.search(text):
        return GrammarKind.LARK
    raise InvalidRequest(
        "structured_outputs.grammar needs a rule `root ::=` (EBNF) or `start:` (Lark)", _OUTPUTS
    )


def _structural_tag(value: Any, param: str) -> str:
    """Either form of it, as JSON.

    The older one is structures, each with begin, schema and end, and triggers; the newer one is a
    format.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param}: a structural tag must be a JSON object", param)
    shape: dict[str, Any] = {"type": "structural_tag"}
    if value.get("format") is not None:
        if not isinstance(value["format"], Mapping):
            raise InvalidRequest(f"{param}: a structural tag's format must be an object", param)
        return dump_json({**shape, "format": value["format"]}, param)
    structures, triggers = value.get("structures"), value.get("triggers")
    if not _texts(triggers) or not isinstance(structures, list) or not structures:
        raise InvalidRequest(
            f"{param}: a structural tag needs a format, or structures and triggers", param
        )
    for structure in structures:
        _check_structure(structure, triggers, param)
    return dump_json({**shape, "structures": structures, "triggers": triggers}, param)


def _check_structure(structure: Any, triggers: list[str], param: str) -> None:
    if not (
        isinstance(structure, Mapping)
        and isinstance(structure.get("begin"), str)
        and isinstance(structure.get("end"), str)
        and isinstance(structure.get("schema"), Mapping)
    ):
        raise InvalidRequest(
            f"{param}: each of the structures needs begin, schema (an object) and end", param
        )
    if not structure["begin"].startswith(tuple(triggers)):
        raise InvalidRequest(f"{param}: each begin must start with one of the triggers", param)


def _texts(value: Any) -> TypeGuard[list[str]]:
    """Whether it is a list of texts, none of them empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)
