"""Structural tags: free text in which tagged parts follow schemas; both known forms."""

import json
from typing import Any

from contracts.errors import InvalidRequest
from engine.grammar_regex import check_regex
from engine.grammar_schema import PreparedSchema, prepare_schema, read_json

TOKEN_KEYS = ("token", "exclude_tokens", "trigger_tokens")


class NotExact(InvalidRequest):
    """The first backend would not enforce a schema in a tag; the text says which part."""


def prepare_tags(text: str, *, closed: bool, special: dict[str, int]) -> str:
    """Write a structural tag in the newer form, with its schemas checked and closed.

    Args:
        text: JSON of {structures, triggers} or {format}.
        closed: as in `prepare_schema`.
        special: ids of special tokens by name, for formats that name them.

    Raises:
        NotExact: a schema in it needs another backend.
        InvalidRequest: not a structural tag, or a schema that cannot be enforced.
    """
    return json.dumps(
        {"type": "structural_tag", "format": _walk(_newer_form(text), closed, special)}
    )


def simple_tags(text: str, *, closed: bool) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The tags by trigger, each (begin, schema as JSON, end), if nothing else is asked for.

    Raises:
        InvalidRequest: not a structural tag, or one with more in it than triggered JSON.
    """
    tag = _newer_form(text)
    plain = {"type", "triggers", "tags", "at_least_one", "stop_after_first", "excludes"}
    if (
        tag.get("type") != "triggered_tags"
        or tag.keys() - plain
        or any(tag.get(key) for key in ("at_least_one", "stop_after_first", "excludes"))
    ):
        raise InvalidRequest("these schemas can be enforced only in simple triggered tags")
    groups: dict[str, list[tuple[str, str, str]]] = {one: [] for one in tag["triggers"]}
    for one in tag["tags"]:
        content, begin, end = one.get("content", {}), one.get("begin"), one.get("end")
        schema = content.get("json_schema")
        if not isinstance(begin, str) or not isinstance(end, str) or schema is None:
            raise InvalidRequest("these schemas can be enforced only in simple triggered tags")
        if content.get("style", "json") != "json":
            raise InvalidRequest("these schemas can be enforced only as JSON")
        trigger = next((t for t in groups if begin.startswith(t)), None)
        if trigger is None:
            raise InvalidRequest(f"no trigger is the start of the tag {json.dumps(begin)}")
        prepared = prepare_schema(schema, closed=closed)
        groups[trigger].append((begin, prepared.text, end))
    return list(groups.items())


def _newer_form(text: str) -> dict[str, Any]:
    tag = read_json(text)
    if not isinstance(tag, dict):
        raise InvalidRequest("a structural tag must be a JSON object")
    if "format" in tag:
        if not isinstance(tag["format"], dict):
            raise InvalidRequest("a structural tag's format must be an object")
        return tag["format"]
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not structures:
        raise InvalidRequest("a structural tag needs `format`, or `structures` and `triggers`")
    tags = []
    for one in structures:
        if not isinstance(one, dict) or not isinstance(one.get("begin"), str):
            raise InvalidRequest("each of a structural tag's structures needs `begin`")
        content = {"type": "json_schema", "json_schema": one.get("schema", {})}
        tags.append(
            {"type": "tag", "begin": one["begin"], "content": content, "end": one.get("end", "")}
        )
    if not all(isinstance(one, str) and one for one in triggers):
        raise InvalidRequest("a structural tag's triggers must be texts")
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _walk(node: Any, closed: bool, special: dict[str, int]) -> Any:
    if isinstance(node, list):
        return [_walk(one, closed, special) for one in node]
    if not isinstance(node, dict):
        return node
    new: dict[str, Any] = {}
    for key, value in node.items():
        if key == "json_schema":
            new[key] = _schema(value, closed)
        elif key in TOKEN_KEYS:
            new[key] = _token_ids(value, special)
        else:
            new[key] = _walk(value, closed, special)
    if node.get("type") == "regex" and isinstance(node.get("pattern"), str):
        check_regex(node["pattern"])
    if node.get("type") == "json_schema" and "max_whitespace_cnt" not in node:
        new["max_whitespace_cnt"] = 8
    return new


def _schema(schema: object, closed: bool) -> Any:
    prepared: PreparedSchema = prepare_schema(schema, closed=closed)
    if prepared.reason:
        raise NotExact(f"{prepared.reason} in a tag's schema needs another backend")
    return json.loads(prepared.text)


def _token_ids(value: Any, special: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_token_ids(one, special) for one in value]
    return special.get(value, value) if isinstance(value, str) else value
