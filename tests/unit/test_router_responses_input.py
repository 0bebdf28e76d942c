"""Items of a Responses conversation as chat messages, and names of fields there and back."""

from typing import Any

import pytest

from contracts.errors import InvalidRequest
from router.endpoints.responses_input import chat_messages
from router.endpoints.responses_request import parse_responses_request, their_param


def call(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def chat_call(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def thoughts(text: str, key: str = "content") -> dict[str, Any]:
    return {"type": "reasoning", key: [{"type": "reasoning_text", "text": text}]}


USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "o"}
TOOL = {"role": "tool", "tool_call_id": "1", "content": "o"}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        pytest.param("u", [USER], id="text"),
        pytest.param([USER, ASSISTANT, USER], [USER, ASSISTANT, USER], id="messages"),
        pytest.param(
            [call("1"), call("2"), OUTPUT],
            [{"role": "assistant", "tool_calls": [chat_call("1"), chat_call("2")]}, TOOL],
            id="calls-of-one-turn",
        ),
        pytest.param(
            [thoughts("t"), ASSISTANT, call("1")],
            [{**ASSISTANT, "reasoning": "t", "tool_calls": [chat_call("1")]}],
            id="one-turn",
        ),
        pytest.param(
            [ASSISTANT, ASSISTANT], [ASSISTANT, ASSISTANT], id="two-messages-are-two-turns"
        ),
        pytest.param(
            [call("1"), OUTPUT, call("2")],
            [
                {"role": "assistant", "tool_calls": [chat_call("1")]},
                TOOL,
                {"role": "assistant", "tool_calls": [chat_call("2")]},
            ],
            id="a-result-ends-the-turn",
        ),
        pytest.param(
            [call("1"), thoughts("t"), ASSISTANT],
            [
                {"role": "assistant", "tool_calls": [chat_call("1")]},
                {**ASSISTANT, "reasoning": "t"},
            ],
            id="thoughts-begin-a-turn",
        ),
        pytest.param(
            [thoughts("s", "summary"), ASSISTANT], [{**ASSISTANT, "reasoning": "s"}], id="summary"
        ),
        pytest.param(
            [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, ASSISTANT],
            [ASSISTANT],
            id="encrypted-thoughts-are-left-out",
        ),
    ],
)
def test_items(items: Any, messages: list[dict[str, Any]]) -> None:
    assert chat_messages(items, None) == messages
    system = {"role": "system", "content": "s"}
    assert chat_messages(items, "s") == [system, *messages]


def test_tools_and_formats_are_translated() -> None:
    tools: list[Any] = [{"type": "function", "name": name, "parameters": {}} for name in ("f", "g")]
    body = {
        "input": "u",
        "tools": tools,
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "g"}],
        },
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "max_output_tokens": 5,
        "top_k": 3,
        "nonsense": 1,
    }
    asked = parse_responses_request(body)
    assert asked.chat_body == {
        "messages": [USER],
        "tools": [{"type": "function", "function": {"name": "g", "parameters": {}}}],
        "tool_choice": "required",
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "n",
                "description": None,
                "schema": {"type": "object"},
                "strict": None,
            },
        },
        "reasoning_effort": "low",
        "max_completion_tokens": 5,
        "top_k": 3,
    }
    assert [tool["name"] for tool in asked.echoed["tools"]] == ["f", "g"]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_no_tools_need_no_choice(choice: str | None) -> None:
    asked = parse_responses_request({"input": "u", "tools": [], "tool_choice": choice})
    assert not {"tools", "tool_choice"} & set(asked.chat_body)


def test_allowed_tools_are_among_the_tools() -> None:
    choice = {"type": "allowed_tools", "tools": [{"type": "function", "name": "h"}]}
    with pytest.raises(InvalidRequest):
        parse_responses_request({"input": "u", "tool_choice": choice})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, None),
        ("messages", "input"),
        ("body.messages.0", "body.input.0"),
        ("max_completion_tokens", "max_output_tokens"),
        ("body.response_format", "body.text.format"),
        ("temperature", "temperature"),
    ],
)
def test_names(ours: str | None, theirs: str | None) -> None:
    assert their_param(ours) == theirs
