"""Every form of message, and what a template gets to see of it."""

from typing import Any

import pytest

from contracts.errors import InvalidRequest
from router.messages import template_messages, text_of


def normal(*messages: dict[str, Any], parts: bool = False, developer: bool = False) -> Any:
    return template_messages(messages, as_parts=parts, knows_developer=developer)


def test_text_parts_of_all_kinds() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
        {"type": "thinking", "thinking": "e"},
        "f",
    ]
    message = {"role": "user", "content": content}
    assert normal(message)[0]["content"] == "a\nb\nc\nd\ne\nf"
    assert normal(message, parts=True)[0]["content"] == [
        {"type": "text", "text": letter} for letter in "abcdef"
    ]


@pytest.mark.parametrize("message", [{"role": "x"}, {"role": "x", "content": None}])
def test_no_content_is_empty(message: dict[str, Any]) -> None:
    assert normal(message)[0] == {"role": "x", "content": ""}
    assert normal(message, parts=True)[0] == {"role": "x", "content": []}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": "", "content": "x"},
        {"role": 3, "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "user", "content": [None]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [{"type": "other", "function": {}}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {}}]},
        {"role": "assistant", "tool_calls": [{"type": "function"}]},
        {"role": "assistant", "tool_calls": [None]},
    ],
)
def test_bad_messages(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]") as caught:
        normal(message)
    assert caught.value.param == "messages"


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest):
        normal()


def test_developer_becomes_system_where_the_template_does_not_know_it() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "b"},
    ]
    assert [m["role"] for m in normal(*messages, developer=True)] == ["system", "user", "developer"]
    assert normal(*messages) == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("sent", "seen"), [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("{broken", {}), ("[1]", {})]
)
def test_arguments_of_earlier_calls_are_objects(sent: object, seen: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": sent}}
    message = normal({"role": "assistant", "content": None, "tool_calls": [call]})[0]
    assert message["tool_calls"][0]["function"]["arguments"] == seen
    assert "tool_calls" not in normal({"role": "assistant", "tool_calls": []})[0]
    for kind in ({}, {"type": None}):  # null is the same as absent
        said = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}, **kind}]}
        assert normal(said)[0]["tool_calls"][0]["type"] == "function"


def test_what_is_passed_on() -> None:
    message = normal({"role": "tool", "tool_call_id": "1", "name": "f", "content": "x", "odd": 1})[
        0
    ]
    assert message == {"role": "tool", "tool_call_id": "1", "name": "f", "content": "x"}


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_thoughts_come_under_every_name(key: str) -> None:
    message = normal({"role": "assistant", "content": "x", key: "why", "refusal": None})[0]
    names = ("reasoning", "reasoning_content", "thinking")
    assert [message[name] for name in names] == ["why"] * 3
    assert not set(names) & set(normal({"role": "user", "content": "x", key: "why"})[0])
    assert not set(names) & set(normal({"role": "assistant", "content": "x", key: ""})[0])


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ({"role": "system", "content": "a"}, {"role": "system", "content": "a"}),
        (
            {"role": "user", "content": "a", "name": "ann"},
            {"role": "user", "content": "a", "name": "ann"},
        ),
        ({"role": "critic", "content": ["a"]}, {"role": "critic", "content": "a"}),
        (
            {"role": "function", "name": "f", "content": [{"type": "text", "text": "a"}]},
            {"role": "function", "name": "f", "content": "a"},
        ),
        (
            {"role": "assistant", "content": None, "refusal": "no", "audio": {"id": "x"}},
            {"role": "assistant", "content": ""},
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "assistant", "content": ""},
        ),
        ({"role": "user", "content": "a", "name": 3, "x": {}}, {"role": "user", "content": "a"}),
    ],
)
def test_forms(sent: dict[str, Any], seen: dict[str, Any]) -> None:
    assert normal(sent)[0] == seen


def test_results_of_calls_are_one_text_whatever_the_template_wants() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("tool", "function"):
        message = {"role": role, "tool_call_id": "1", "content": content}
        assert normal(message, parts=True)[0]["content"] == "a\nb"


def test_a_text_stays_a_text_for_a_template_that_takes_both() -> None:
    part = {"type": "text", "text": "a"}
    for sent, seen in (("a", "a"), ([part], [part]), (None, "")):
        messages = [{"role": "user", "content": sent}]
        got = template_messages(messages, as_parts=True, keeps_text=True, knows_developer=False)
        assert got[0]["content"] == seen


def test_system_texts_and_parts_merge() -> None:
    part = {"type": "text", "text": "b"}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "a"},
        {"role": "system", "content": [part]},
    ]
    got = template_messages(messages, as_parts=True, keeps_text=True, knows_developer=False)
    assert got == [{"role": "system", "content": [{"type": "text", "text": "a"}, part]}]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_media_is_refused_by_its_name(kind: str) -> None:
    message = {"role": "user", "content": [{"type": kind, kind: {"url": "data:,x"}}]}
    with pytest.raises(InvalidRequest, match=f"'{kind}'; this model takes text parts only"):
        normal(message)


def test_the_callers_messages_are_left_alone() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    message["tool_calls"] = [call]
    normal(message)[0]["tool_calls"][0]["function"]["arguments"]["x"] = 1
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_the_text_of_a_message() -> None:
    assert text_of({"content": ["a", {"type": "text", "text": "b"}]}) == "a\nb"
    assert text_of({"content": None}) == text_of({}) == ""
