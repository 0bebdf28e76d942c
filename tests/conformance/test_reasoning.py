"""Thoughts, on a server with a reasoning parser. A logits processor writes them."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.conformance import Api, as_joined, assert_same, joined

field = pytest.mark.field
EOS = 2
THOUGHT, SAID = "Salt, I think; 🙂.", "The sea is salty."


def script(api: Api, text: str, *, end: bool = True) -> dict[str, Any]:
    """Fields that make the model write just this."""
    ids = [*api.encode(text), *([EOS] if end else [])]
    processor = {"qualname": "tests.support.processors.Script", "args": [ids]}
    return {"logits_processors": [processor], "max_tokens": 100}


@pytest.fixture
def thinking(own_server: Callable[..., Any]) -> Api:
    api: Api = own_server(router={"reasoning_parser": "qwen3"})[0]
    return api


@field(
    "response.choices.message.reasoning",
    "response.choices.message.reasoning_content",
    "response.choices.message.content",
)
def test_thoughts_are_split_from_the_answer(thinking: Api) -> None:
    fields = script(thinking, f"<think>{THOUGHT}</think>{SAID}")
    answer = thinking.chat(**fields)
    message = answer["choices"][0]["message"]
    assert message["reasoning"].strip() == THOUGHT
    assert message["reasoning_content"] == message["reasoning"]
    assert message["content"].strip() == SAID
    ids = thinking.ids(**fields)
    assert answer["usage"]["completion_tokens"] == len(ids)
    chunks = thinking.chunks(**fields, return_token_ids=True, logprobs=True)
    full = thinking.chat(**fields, return_token_ids=True, logprobs=True)
    assert joined(chunks) == as_joined(full)
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")


@field("include_reasoning")
def test_include_reasoning(thinking: Api) -> None:
    fields = script(thinking, f"<think>{THOUGHT}</think>{SAID}")
    whole = thinking.chat(**fields, return_token_ids=True, logprobs=True)
    answer = thinking.chat(**fields, include_reasoning=False, return_token_ids=True, logprobs=True)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == whole["choices"][0]["message"]["content"]
    assert choice["message"].get("reasoning") is None
    assert choice["message"].get("reasoning_content") is None
    assert_same(answer["usage"], whole["usage"])  # thought all the same
    shown = thinking.decode(choice["token_ids"])
    assert THOUGHT not in shown
    assert SAID in shown
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    chunks = thinking.chunks(
        **fields, include_reasoning=False, return_token_ids=True, logprobs=True
    )
    assert joined(chunks) == as_joined(answer)


def test_thoughts_without_an_end_are_all_there_is(thinking: Api) -> None:
    answer = thinking.chat(**script(thinking, f"<think>{THOUGHT}"))
    message = answer["choices"][0]["message"]
    assert message["reasoning"].strip() == THOUGHT
    assert not message["content"]


@field("chat_template_kwargs")
def test_without_thinking_all_is_content(thinking: Api) -> None:
    fields = script(thinking, SAID)
    answer = thinking.chat(**fields, chat_template_kwargs={"enable_thinking": False})
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (SAID, None)


@field("structured_outputs", "response_format")
@pytest.mark.parametrize(
    "constraint",
    [
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}},
            }
        },
    ],
    ids=["choice", "schema"],
)
def test_a_constraint_binds_after_the_thoughts(thinking: Api, constraint: dict[str, Any]) -> None:
    fields = script(thinking, f"<think>{THOUGHT}</think>", end=False)
    answer = thinking.chat(**fields, **constraint)
    (choice,) = answer["choices"]
    assert choice["message"]["reasoning"].strip() == THOUGHT
    assert choice["message"]["content"].strip().strip('"') in ("yes", "no")
    assert choice["finish_reason"] == "stop"


@field("tool_choice")
def test_calls_after_thoughts(thinking: Api) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    fields = script(thinking, f"<think>{THOUGHT} {call}</think>{call}")
    fields["tools"] = [{"type": "function", "function": {"name": "f"}}]
    answer = thinking.chat(**fields)
    (choice,) = answer["choices"]
    assert len(choice["message"]["tool_calls"]) == 1  # those in the thoughts are thoughts
    assert call in choice["message"]["reasoning"]
    assert choice["finish_reason"] == "tool_calls"
    assert joined(thinking.chunks(**fields)) == as_joined(answer)


@field("tool_choice")
def test_a_forced_call_after_thoughts(thinking: Api) -> None:
    fields = script(thinking, f"<think>{THOUGHT}</think>", end=False)
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    answer = thinking.chat(**fields, tools=[tool], tool_choice="required")
    (choice,) = answer["choices"]
    assert choice["message"]["reasoning"].strip() == THOUGHT
    assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} == {"f"}
