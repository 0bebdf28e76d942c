# ruff: noqa: RUF001
"""Thoughts, alone and before calls; where they start by the end of the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.parsers.registry import (
    REASONING_PARSERS,
    ToolParsing,
    make_output_parser,
    may_think,
    reasoning_end,
    starts_inside,
)
from tests.support.parsed import TOOLS, auto, cut, parse

OPEN = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
NEITHER = "<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
ANALYSIS = "<|channel|>analysis<|message|>Hm…<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes"


@dataclass(frozen=True)
class Row:
    name: str
    text: str
    reasoning: str
    content: str
    tail: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


ROWS = [
    Row("deepseek_r1", "Hm.</think>Yes", "Hm.", "Yes", OPEN),
    Row("deepseek_r1", "Hm.</think>\n\nYes", "Hm.", "\n\nYes", NEITHER),
    Row("deepseek_r1", "<think>\nHm.\n</think>Yes", "\nHm.\n", "Yes"),
    Row("deepseek_r1", "\n<think>Hm </thin", "Hm </thin", ""),
    Row("deepseek_r1", "no end < here", "no end < here", "", OPEN),
    Row("deepseek_r1", " Yes", "", " Yes", CLOSED),
    Row("deepseek_r1", "a</think>b</think><think>c", "a", "b</think><think>c", OPEN),
    Row("deepseek_r1", "a<think>b</think>c", "a<think>b", "c", OPEN),
    Row("deepseek_r1", "Hm</think>", "Hm", ""),
    Row("deepseek_r1", "", "", ""),
    Row("qwen3", "<think>\nHm\n</think>\n\nYes", "\nHm\n", "\n\nYes", NEITHER),
    Row("qwen3", "Hm\n</think>\n\nYes", "Hm\n", "\n\nYes", OPEN),
    Row("qwen3", "Hm", "Hm", "", OPEN),
    Row("qwen3", " Yes, see <think> there", "", " Yes, see <think> there", NEITHER),
    Row("qwen3", "Yes </think>", "", "Yes </think>", CLOSED, {"enable_thinking": False}),
    Row("qwen3", "<think>Yes", "", "<think>Yes", NEITHER, {"enable_thinking": False}),
    Row("qwen3", "<thin", "", "<thin", NEITHER),
    Row("deepseek_v3", "Yes", "", "Yes", "<｜Assistant｜></think>"),
    Row("deepseek_v3", "Yes", "", "Yes"),
    Row("deepseek_v3", "Hm</think>Yes", "Hm", "Yes", "<｜Assistant｜><think>"),
    Row("deepseek_v31", "Hm</think>Yes", "Hm", "Yes", "", {"thinking": True}),
    Row("deepseek_v32", "Yes", "", "Yes", "", {"thinking": False}),
    Row("glm45", "\n<think>Hm</think>\nYes", "Hm", "\nYes", "<|assistant|>"),
    Row("holo2", "Hm</think>Yes", "Hm", "Yes"),
    Row("step3", "Hm</think>Yes", "Hm", "Yes"),
    Row("olmo3", "Hm</think>Yes", "Hm", "Yes"),
    Row("nemotron_v3", "Yes", "", "Yes", "", {"enable_thinking": False}),
    Row("minimax_m2", "Hm</think>Yes", "Hm", "Yes", "]~b]ai\n<think>\n"),
    Row("seed_oss", "<seed:think>Hm</seed:think>Yes", "Hm", "Yes", "<seed:bos>assistant\n"),
    Row("kimi_k2", "<think>Hm</think>Yes", "Hm", "Yes"),
    Row("kimi_k2", "Yes", "", "Yes", "", {"thinking": False}),
    Row("kimi_k2", "Hm<|tool_calls_section_begin|>", "Hm", "<|tool_calls_section_begin|>"),
    Row("mistral", "[THINK]Hm[/THINK]Yes", "Hm", "Yes", "[/INST]"),
    Row("mistral", "So[THINK]Hm[/THINK]Yes[TH", "Hm", "SoYes[TH", "[/INST]"),
    Row("mistral", "Yes [/THINK]", "", "Yes [/THINK]", "[/INST]"),
    Row(
        "granite",
        "Here is my thought process: Hm. Here is my response: Yes",
        " Hm. ",
        " Yes",
    ),
    Row(
        "granite", "Here's my thought process:a Here is b Here's my response:c", "a Here is b ", "c"
    ),
    Row("granite", "Here is my answer", "", "Here is my answer"),
    Row("openai_gptoss", ANALYSIS + FINAL, "Hm…", "Yes", "<|start|>assistant"),
    Row("openai_gptoss", ANALYSIS[:-7], "Hm…", "", "<|start|>assistant"),
    Row("openai_gptoss", "m<|end|>" + FINAL, "m", "Yes", "<|start|>assistant" + ANALYSIS[:-9]),
    Row("openai_gptoss", " indeed", "", " indeed", "<|start|>assistant" + FINAL),
    Row("openai_gptoss", "plain", "", "plain"),
    Row(
        "openai_gptoss",
        ANALYSIS + "<|start|>assistant<|channel|>commentary to=functions.now<|message|>{}",
        "Hm…",
        "<|start|>assistant<|channel|>commentary to=functions.now<|message|>{}",
    ),
]


def check(row: Row, pieces: list[str]) -> None:
    parsed = parse(pieces, reasoning=row.name, tail=row.tail, template_kwargs=row.kwargs)
    assert (parsed.reasoning, parsed.content) == (row.reasoning, row.content)
    assert parsed.calls == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_at_once_and_by_character(row: Row) -> None:
    check(row, [row.text])
    check(row, list(row.text))


@given(st.sampled_from(ROWS), st.lists(st.integers(0, 100), max_size=8))
def test_cut_anywhere(row: Row, places: list[int]) -> None:
    check(row, cut(row.text, places))


def test_every_format_is_tested() -> None:
    assert {row.name for row in ROWS} == set(REASONING_PARSERS)


@pytest.mark.parametrize(
    ("name", "tail", "kwargs", "inside", "may"),
    [
        pytest.param("qwen3", OPEN, {}, True, True, id="opened by the prompt"),
        pytest.param("qwen3", CLOSED, {}, False, False, id="closed by the prompt"),
        pytest.param("qwen3", NEITHER, {}, False, True, id="open to the model"),
        pytest.param("qwen3", NEITHER, {"enable_thinking": False}, False, False, id="off"),
        pytest.param("qwen3", "<think>" + NEITHER, {}, False, True, id="of the user"),
        pytest.param("qwen3", "</think>a" + NEITHER, {}, False, True, id="of an earlier turn"),
        pytest.param("qwen3", OPEN + "So far", {}, True, True, id="continued in thoughts"),
        pytest.param("qwen3", CLOSED + "So far", {}, False, False, id="continued behind them"),
        pytest.param("deepseek_r1", NEITHER, {}, True, True, id="assumed"),
        pytest.param("deepseek_v3", "", {}, False, False, id="off by default"),
        pytest.param("openai_gptoss", "<|start|>assistant", {}, False, True, id="harmony"),
        pytest.param(
            "openai_gptoss", "<|start|>assistant" + FINAL, {}, False, False, id="harmony answer"
        ),
        pytest.param(
            "openai_gptoss", "<|start|>assistant" + ANALYSIS[:-7], {}, True, True, id="analysis"
        ),
    ],
)
def test_where_a_generation_starts(
    name: str, tail: str, kwargs: dict[str, Any], inside: bool, may: bool
) -> None:
    assert starts_inside(name, tail, kwargs) is inside
    assert may_think(name, tail, kwargs) is may


def test_ends() -> None:
    assert reasoning_end("qwen3") == "</think>"
    assert reasoning_end("mistral") == "[/THINK]"
    assert reasoning_end("granite") == "Here is my response:"
    assert reasoning_end("openai_gptoss") == "<|channel|>final<|message|>"


def test_thinking_follows_the_text() -> None:
    parser = make_output_parser(reasoning="qwen3", tools=None, tail="", template_kwargs={})
    assert parser is not None
    seen = [parser.thinking]
    for piece in ("<think>", "Hm", "</think>", "Yes"):
        parser.push(piece)
        seen.append(parser.thinking)
    assert seen == [False, True, True, False, False]


def test_thinking_in_harmony() -> None:
    parser = make_output_parser(reasoning="openai_gptoss", tools=None, tail="", template_kwargs={})
    assert parser is not None
    seen = [parser.thinking]
    for piece in (ANALYSIS, FINAL, "."):
        parser.push(piece)
        seen.append(parser.thinking)
    assert seen == [True, True, False, False]


def test_without_names_there_is_no_parser() -> None:
    assert make_output_parser(reasoning=None, tools=None, tail="", template_kwargs={}) is None


@pytest.mark.parametrize(
    ("reasoning", "tools", "text", "thoughts", "content", "calls"),
    [
        pytest.param(
            "qwen3",
            auto("hermes"),
            f"<think>{CALL}</think>\n\n{CALL}",
            CALL,
            "",
            [("now", "{}")],
            id="calls in thoughts are thoughts",
        ),
        pytest.param(
            "deepseek_r1",
            ToolParsing("named", "hermes", TOOLS, "now"),
            "Hm</think>\n{}",
            "Hm",
            "",
            [("now", "{}")],
            id="named",
        ),
        pytest.param(
            "deepseek_r1",
            ToolParsing("required", "hermes", TOOLS),
            'Hm</think>[{"name": "now", "parameters": {}}]',
            "Hm",
            "",
            [("now", "{}")],
            id="required",
        ),
        pytest.param(
            "kimi_k2",
            auto("kimi_k2"),
            "Hm<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0"
            "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            "Hm",
            "",
            [("now", "{}")],
            id="calls end thoughts",
        ),
        pytest.param(
            "openai_gptoss",
            auto("openai"),
            ANALYSIS + "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json"
            "<|message|>{}<|call|>",
            "Hm…",
            "I look.",
            [("now", "{}")],
            id="harmony",
        ),
        pytest.param(
            None, auto("openai"), ANALYSIS + FINAL, "", "Hm…Yes", [], id="harmony without thoughts"
        ),
        pytest.param(
            "openai_gptoss",
            ToolParsing("named", "openai", TOOLS, "now"),
            ANALYSIS + "<|start|>assistant<|channel|>final<|message|>{}",
            "Hm…",
            "",
            [("now", "{}")],
            id="harmony named",
        ),
        pytest.param(
            "openai_gptoss",
            ToolParsing("named", "openai", TOOLS, "now"),
            "<|channel|>commentary to=functions.now<|message|>{}",
            "",
            "",
            [("now", "{}")],
            id="harmony named, the model's way",
        ),
        pytest.param(
            "openai_gptoss",
            auto("hermes"),
            ANALYSIS + FINAL + CALL,
            "Hm…",
            "Yes",
            [("now", "{}")],
            id="harmony thoughts and other calls",
        ),
    ],
)
def test_thoughts_then_calls(
    reasoning: str | None,
    tools: ToolParsing,
    text: str,
    thoughts: str,
    content: str,
    calls: list[tuple[str, str]],
) -> None:
    for pieces in ([text], list(text)):
        parsed = parse(pieces, reasoning=reasoning, tools=tools)
        assert (parsed.reasoning, parsed.content, parsed.calls) == (thoughts, content, calls)
