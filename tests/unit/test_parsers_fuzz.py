# ruff: noqa: RUF001
"""Any text, of which models write a lot: no parser raises, and nothing is lost."""

import json
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, ToolParsing
from tests.support.parsed import TOOLS, auto, cut, parse

FRAGMENTS = st.sampled_from(
    [
        *"<>[]{}()\"'\\:,;=/|` \n\tab1",
        *("é", "東", "🌍", "\\ud800", "\\u00e9", "true", "null", "-1.5e3", "1e999"),
        *("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "functools", "```json"),
        *("<function=", "get_weather", "now", "</function>", "<parameter=", "</parameter>"),
        *("city", "days", "near", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        *('{"name": "now", "arguments": ', '"name"', '"arguments"', '"parameters"', '"now"'),
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call|>", "```"),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "function"),
        *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_calls_section_begin|>"),
        *("<|tool_call_begin|>", "functions.now:0", "<|tool_call_argument_begin|>"),
        *("<|tool_call_end|>", "<|tool_calls_section_end|>", "<seed:tool_call>"),
        *("<minimax:tool_call>", '<invoke name="', '">', '<parameter name="', "</invoke>"),
        *("<｜DSML｜function_calls>", '<｜DSML｜invoke name="', '<｜DSML｜parameter name="'),
        *('" string="true">', "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
        *("<|start|>", "assistant", "<|channel|>", "analysis", "commentary", "final"),
        *(" to=functions.now", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>"),
        *("<function_calls>", "</function_calls>", "<|python_start|>", "now(", "city='a'", "b=[1]"),
        *("<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>"),
        *("Here is my thought process:", "Here is my response:", "Here is"),
        *("<|action_start|><|plugin|>", "<longcat_tool_call>"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=25).map("".join)
PLACES = st.lists(st.integers(0, 200), max_size=10)
FORMATS = sorted(TOOL_PARSERS)


@pytest.mark.parametrize("format", FORMATS)
@given(text=TEXTS, places=PLACES)
@settings(max_examples=120, deadline=None)
def test_calls(format: str, text: str, places: list[int]) -> None:
    whole = parse([text], tools=auto(format))
    assert parse(cut(text, places), tools=auto(format)) == whole
    assert parse(list(text), tools=auto(format)) == whole
    if not whole.calls and format != "openai":
        assert whole.content == text
    (whole.content + "".join(name + arguments for name, arguments in whole.calls)).encode()


@pytest.mark.parametrize("name", sorted(REASONING_PARSERS))
@given(text=TEXTS, places=PLACES, format=st.sampled_from(FORMATS))
@settings(max_examples=60, deadline=None)
def test_thoughts_and_calls(name: str, text: str, places: list[int], format: str) -> None:
    whole = parse([text], reasoning=name, tools=auto(format))
    assert parse(cut(text, places), reasoning=name, tools=auto(format)) == whole
    alone = parse([text], reasoning=name)
    assert len(alone.reasoning) + len(alone.content) <= len(text)
    assert alone.reasoning in text


@given(text=TEXTS, places=PLACES, mode=st.sampled_from(["required", "named"]))
def test_forced_calls(text: str, places: list[int], mode: Literal["required", "named"]) -> None:
    tools = ToolParsing(mode, "hermes", TOOLS, "now")
    whole = parse([text], tools=tools)
    assert parse(cut(text, places), tools=tools) == whole
    if mode == "named":
        assert whole.calls == [("now", text.lstrip())]
    elif not whole.calls:
        assert whole.content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(st.text(), JSON, max_size=4)
WRAPPED = {
    "hermes": '<tool_call>{"name": "now", "arguments": %s}</tool_call>',
    "llama3_json": '{"name": "now", "parameters": %s}',
    "mistral": "[TOOL_CALLS]now%s",
    "granite": '<|tool_call|>[{"arguments": %s, "name": "now"}]',
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n%s\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": "<|tool_call_begin|>functions.now:3<|tool_call_argument_begin|>%s<|tool_call_end|>",
    "openai": "<|channel|>commentary to=functions.now<|message|>%s<|call|>",
}


@pytest.mark.parametrize("format", sorted(WRAPPED))
@given(arguments=ARGUMENTS, ascii_only=st.booleans(), places=PLACES)
@settings(max_examples=60)
def test_arguments_come_as_they_were_written(
    format: str, arguments: dict[str, object], ascii_only: bool, places: list[int]
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    if format == "openai" and "<|" in written:
        return  # never in a string: there they would be tokens
    parsed = parse(cut(WRAPPED[format] % written, places), tools=auto(format))
    assert parsed.calls == [("now", written)]
    assert parsed.content == ""


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@given(arguments=st.dictionaries(st.sampled_from(["a", "b", "c_1"]), LITERALS), places=PLACES)
def test_python_arguments(arguments: dict[str, object], places: list[int]) -> None:
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    parsed = parse(cut(f"[now({written}), now()]", places), tools=auto("pythonic"))
    assert parsed.content == ""
    assert [json.loads(text) for _, text in parsed.calls] == [arguments, {}]


@given(value=st.text(st.characters(codec="utf-8", exclude_characters="<")), places=PLACES)
def test_text_values(value: str, places: list[int]) -> None:
    text = f"<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n</function>"
    parsed = parse(cut(text, places), tools=auto("qwen3_coder"))
    assert json.loads(parsed.calls[0][1]) == {"city": value}
