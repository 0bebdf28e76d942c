import json
import math
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidRequest
from contracts.sampling import GrammarKind
from router.parsers.specs import ToolSpec
from router.schema import parse_chat_request
from router.tool_choice import ToolPlan, plan_tools
from router.tool_schema import arguments_schema, calls_schema

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "tells the time"}}
STRICT = {
    "type": "function",
    "function": {"name": "weather", "parameters": PARAMETERS, "strict": True},
}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "leaf": {"$ref": "#/$defs/leaf"},
        "inner": {"$ref": "#"},
        "$ref": {"type": "integer"},
    },
    "$defs": {"leaf": {"enum": [{"$ref": "#"}, 1]}},
    "additionalProperties": False,
}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def plan(parser: str | None = "hermes", *, exclude: bool = False, **fields: Any) -> ToolPlan:
    request = parse_chat_request({"messages": [], **fields})
    return plan_tools(request, parser=parser, exclude_when_none=exclude)


def schema_of(got: ToolPlan) -> Any:
    assert got.grammar is not None
    assert got.grammar.kind is GrammarKind.JSON_SCHEMA
    return json.loads(got.grammar.text)


def fits(value: object, schema: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def test_without_tools() -> None:
    for choice in (None, "none"):
        assert plan(None, tool_choice=choice) == ToolPlan()


def test_auto_is_the_default_with_tools() -> None:
    got = plan(tools=[WEATHER, CLOCK])
    assert got == plan(tools=[WEATHER, CLOCK], tool_choice="auto", parallel_tool_calls=True)
    assert (got.mode, got.forced, got.grammar) == ("auto", False, None)
    assert got.for_template == (WEATHER, CLOCK)
    assert got.calls_finish == "tool_calls"
    assert got.parsing is not None
    assert (got.parsing.format, got.parsing.parallel) == ("hermes", True)
    assert got.parsing.tools == (ToolSpec("weather", PARAMETERS), ToolSpec("clock"))


def test_none_keeps_the_tools_in_the_prompt() -> None:
    got = plan(None, tools=[CLOCK], tool_choice="none")
    assert got == ToolPlan(for_template=(CLOCK,))
    assert plan(None, exclude=True, tools=[CLOCK], tool_choice="none") == ToolPlan()


def test_required_is_a_list_of_calls() -> None:
    got = plan(tools=[WEATHER, CLOCK], tool_choice="required")
    schema = schema_of(got)
    call = {"name": "weather", "parameters": {"city": "x"}}
    assert got.forced
    assert got.calls_finish == "tool_calls"
    assert fits([call], schema)
    assert fits([call, {"name": "clock", "parameters": {}}], schema)
    for wrong in ([], call, [{"name": "x", "parameters": {}}], [{"name": "weather"}]):
        assert not fits(wrong, schema)
    assert not fits([{"name": "weather", "parameters": {}}], schema)


def test_one_call_only_without_parallel_calls() -> None:
    got = plan(tools=[CLOCK], tool_choice="required", parallel_tool_calls=False)
    call = {"name": "clock", "parameters": {}}
    assert fits([call], schema_of(got))
    assert not fits([call, call], schema_of(got))
    assert got.parsing is not None
    assert not got.parsing.parallel


def test_named_is_the_arguments_alone() -> None:
    got = plan(tools=[WEATHER, CLOCK], tool_choice=named("weather"))
    assert schema_of(got) == PARAMETERS
    assert got.calls_finish == "stop"
    assert got.parsing is not None
    assert (got.parsing.mode, got.parsing.name) == ("named", "weather")
    assert plan(tools=[CLOCK], tool_choice={"function": {"name": "clock"}}).mode == "named"


@pytest.mark.parametrize("parameters", [None, {}])
def test_missing_parameters_are_an_empty_object(parameters: dict[str, Any] | None) -> None:
    assert arguments_schema(parameters) == {"type": "object", "properties": {}}


def test_references_still_point_to_their_own_schema() -> None:
    tools = [ToolSpec("clock"), ToolSpec("tree", TREE)]
    schema = calls_schema(tools, parallel=True)

    def call(arguments: object) -> list[Any]:
        return [{"name": "tree", "parameters": arguments}]

    assert fits(call({"leaf": 1, "inner": {"leaf": {"$ref": "#"}}, "$ref": 2}), schema)
    assert not fits(call({"leaf": 2}), schema)
    assert not fits(call({"inner": {"other": 1}}), schema)
    assert not fits(call({"$ref": "x"}), schema)


def test_strict_tools_bind_calls_the_model_chooses_to_make() -> None:
    got = plan(tools=[STRICT, CLOCK])
    assert got.grammar is not None
    assert got.grammar.kind is GrammarKind.STRUCTURAL_TAG
    assert "city" in got.grammar.text
    assert not got.forced
    assert got.parsing is not None
    assert [tool.strict for tool in got.parsing.tools] == [True, False]
    assert plan("pythonic", tools=[STRICT]).grammar is None  # cannot be expressed


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"not": value}
    return value


def with_parameters(parameters: object) -> dict[str, Any]:
    return {"function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "x"}, "tool_choice"),
        ({"tool_choice": named("weather")}, "tool_choice"),
        ({"tools": []}, "tools"),
        ({"tools": [], "tool_choice": "none"}, "tools"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": named("weather")}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {**named("clock"), "type": "x"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {}}, "tool_choice.function"),
        ({"tools": [CLOCK], "tool_choice": {"function": "clock"}}, "tool_choice.function"),
        ({"tools": [CLOCK], "tool_choice": {"function": {}}}, "tool_choice.function.name"),
        ({"tools": [CLOCK], "tool_choice": {"function": {"name": 3}}}, "tool_choice.function.name"),
        ({"tools": [with_parameters(deep(70))]}, "tools"),
        ({"tools": [with_parameters({"const": math.nan})]}, "tools"),
        ({"tools": [with_parameters({"const": "\ud800"})]}, "tools"),
        ({"tools": [CLOCK] * 1025}, "tools"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_choices_that_cannot_be(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("choice", [None, "auto", "required", named("clock")])
def test_calls_nobody_could_read_are_refused(choice: Any) -> None:
    with pytest.raises(InvalidRequest, match="tool call parser") as caught:
        plan(None, tools=[CLOCK], tool_choice=choice)
    assert caught.value.param is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$ref", "type", "properties", "$defs", "function", "name"]), inner
        )
    ),
    max_leaves=8,
)


@given(
    parameters=JSON,
    strict=JSON,
    choice=st.sampled_from(["auto", "none", "required", named("f")]) | JSON,
    parser=st.sampled_from([None, "hermes", "qwen3_coder", "pythonic"]),
)
def test_anything_is_planned_or_refused(
    parameters: Any, strict: Any, choice: Any, parser: str | None
) -> None:
    tool = {"function": {"name": "f", "parameters": parameters, "strict": strict}}
    try:
        got = plan(parser, tools=[tool], tool_choice=choice)
    except InvalidRequest:
        return
    assert got.forced == (got.grammar is not None and choice not in (None, "auto"))
    if got.grammar is not None:
        assert isinstance(json.loads(got.grammar.text), dict)
