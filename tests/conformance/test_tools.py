"""Tools and what a model's calls become. The model writes noise, so a grammar writes its calls."""

import json
import re
from typing import Any

import pytest

from tests.support.conformance import Api, as_joined, joined, text_of

field = pytest.mark.field
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"enum": [1, 2, 3]},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, CLOCK]


def writes(text: str) -> dict[str, Any]:
    """Fields that make the model write just this."""
    return {"structured_outputs": {"regex": re.escape(text)}, "max_tokens": 200}


CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)
OTHER = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@field("tool_choice", "tools", "response.choices.message.tool_calls")
@field(
    "response.choices.message.tool_calls.id",
    "response.choices.message.tool_calls.type",
    "response.choices.message.tool_calls.function",
    "response.choices.message.tool_calls.function.name",
    "response.choices.message.tool_calls.function.arguments",
)
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}], ids=["default", "auto"])
def test_auto(api: Api, choice: dict[str, Any]) -> None:
    fields = {"tools": TOOLS, **choice, **writes(f"I look.\n{CALL}\n{OTHER}")}
    answer = api.chat(**fields)
    (found,) = answer["choices"]
    assert found["finish_reason"] == "tool_calls"
    assert (found["message"]["content"] or "").strip() == "I look."
    calls = found["message"]["tool_calls"]
    assert [call["type"] for call in calls] == ["function"] * 2
    assert [call["function"]["name"] for call in calls] == ["get_weather", "get_time"]
    arguments = [json.loads(call["function"]["arguments"]) for call in calls]
    assert arguments == [{"city": "Rome", "days": 2}, {}]
    assert len({call["id"] for call in calls}) == 2
    assert joined(api.chunks(**fields)) == as_joined(answer)


@field("tool_choice")
def test_auto_without_a_call(api: Api) -> None:
    answer = api.chat(tools=TOOLS)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert not answer["choices"][0]["message"].get("tool_calls")
    assert text_of(answer) != ""


@field("tool_choice")
def test_none_parses_nothing(api: Api) -> None:
    answer = api.chat(tools=TOOLS, tool_choice="none", **writes(CALL))
    assert text_of(answer) == CALL
    assert not answer["choices"][0]["message"].get("tool_calls")
    assert answer["choices"][0]["finish_reason"] == "stop"


def check_call(call: dict[str, Any]) -> None:
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Paris", "Rome")
        assert arguments["days"] in (1, 2, 3)
    else:
        assert call["function"]["name"] == "get_time"
        assert arguments == {}


@field("tool_choice", "tools", "response.choices.finish_reason")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_required(api: Api, seed: int) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "temperature": 1,
        "seed": seed,
    }
    answer = api.chat(**fields)
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    check_call(call)
    assert choice["finish_reason"] == "tool_calls"
    assert not choice["message"]["content"]
    assert joined(api.chunks(**fields)) == as_joined(answer)


@field("parallel_tool_calls")
def test_parallel_tool_calls(api: Api) -> None:
    fields = {"tools": TOOLS, **writes(f"{CALL}\n{OTHER}")}
    both = api.chat(**fields)["choices"][0]["message"]["tool_calls"]
    assert len(both) == 2
    single = api.chat(parallel_tool_calls=False, **fields)
    (call,) = single["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert joined(api.chunks(parallel_tool_calls=False, **fields)) == as_joined(single)


@field("parallel_tool_calls")
def test_required_calls_may_be_several(api: Api) -> None:
    """A comma after the first call goes on to a second, unless calls may not be parallel."""
    comma = api.encode(",")[0]
    fields: dict[str, Any] = {
        "tools": [CLOCK],
        "tool_choice": "required",
        "max_tokens": 150,
        "logit_bias": {str(comma): 100},
    }
    many = api.chat(**fields)["choices"][0]["message"]["tool_calls"]
    assert len(many) > 1
    single = api.chat(parallel_tool_calls=False, **fields)
    assert len(single["choices"][0]["message"]["tool_calls"]) == 1


@field("tool_choice")
def test_named(api: Api) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 200,
        "temperature": 1,
        "seed": 4,
    }
    answer = api.chat(**fields)
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    check_call(call)
    assert choice["finish_reason"] == "stop"
    assert joined(api.chunks(**fields)) == as_joined(answer)


@field("tool_choice")
def test_a_call_cut_by_the_limit_is_returned_as_it_is(api: Api) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = api.chat(tools=TOOLS, tool_choice=named, max_tokens=4)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith("{")


@field("tool_choice")
def test_broken_markup_is_content(api: Api) -> None:
    broken = "<tool_call>\nget_weather of Rome\n</tool_call>"
    fields = {"tools": TOOLS, **writes(broken)}
    answer = api.chat(**fields)
    assert "get_weather of Rome" in text_of(answer)
    assert not answer["choices"][0]["message"].get("tool_calls")
    assert joined(api.chunks(**fields)) == as_joined(answer)


@field("tool_choice")
def test_a_call_that_breaks_after_its_name_stays_a_call(api: Api) -> None:
    """In a stream the name is out already, and the full answer says the same."""
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>'
    fields = {"tools": TOOLS, **writes(broken)}
    answer = api.chat(**fields)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert joined(api.chunks(**fields)) == as_joined(answer)


@field("n")
def test_every_sample_has_its_own_grammar_and_calls(api: Api) -> None:
    answer = api.chat(
        tools=TOOLS, tool_choice="required", n=3, temperature=1, seed=6, max_tokens=300
    )
    for choice in answer["choices"]:
        for call in choice["message"]["tool_calls"]:
            if choice["finish_reason"] == "tool_calls":
                check_call(call)
