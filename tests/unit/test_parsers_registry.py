# ruff: noqa: RUF001
"""Names, detection by template, ids of calls, structural tags."""

import json
import re
from typing import Any

import pytest

from router.deltas import Content, ToolCallStart
from router.parsers.json_calls import JsonCalls, JsonForm
from router.parsers.reasoning import ThinkForm
from router.parsers.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ToolFormat,
    ToolParsing,
    ToolSpec,
    detect_reasoning_parser,
    detect_tool_parser,
    make_output_parser,
    register,
    structural_tag,
)
from tests.support.parsed import TOOLS, auto, parse


@pytest.mark.parametrize(
    ("template", "model_type", "tools", "reasoning"),
    [
        pytest.param(
            "<tool_call>\n{{ '{\"arguments\": ' }}", "qwen2", "hermes", None, id="qwen2.5"
        ),
        pytest.param("<tool_call>{arguments}<think>", "qwen3", "hermes", "qwen3", id="qwen3"),
        pytest.param("<tool_call>\n<function=x>", "qwen3_moe", "qwen3_coder", None, id="coder"),
        pytest.param(
            "[TOOL_CALLS][THINK][/THINK]", "mistral", "mistral", "mistral", id="magistral"
        ),
        pytest.param("<|python_tag|>", "llama", "llama3_json", None, id="llama3"),
        pytest.param(
            "<｜Assistant｜><｜tool▁calls▁begin｜>```json</think>",
            "deepseek_v3",
            "deepseek_v3",
            "deepseek_r1",
            id="r1",
        ),
        pytest.param(
            "{% if thinking %}<｜Assistant｜></think><｜tool▁calls▁begin｜>",
            "deepseek_v3",
            "deepseek_v31",
            "deepseek_v3",
            id="v3.1",
        ),
        pytest.param("", "gpt_oss", "openai", "openai_gptoss", id="gpt-oss by type"),
        pytest.param("<|channel|><|message|>", "x", "openai", "openai_gptoss", id="harmony"),
        pytest.param(
            "<|tool_calls_section_begin|>", "kimi_k2", "kimi_k2", None, id="kimi instruct"
        ),
        pytest.param("<arg_key><tool_call><think>", "glm4_moe", "glm45", "glm45", id="glm"),
        pytest.param("<minimax:tool_call><think>", "m2", "minimax_m2", "minimax_m2", id="minimax"),
        pytest.param("<seed:tool_call><seed:think>", "seed", "seed_oss", "seed_oss", id="seed"),
        pytest.param("<|start_of_role|><|tool_call|>", "granite", "granite", None, id="granite"),
        pytest.param("{{ messages }}", "llama", None, None, id="plain"),
    ],
)
def test_detection(
    template: str, model_type: str, tools: str | None, reasoning: str | None
) -> None:
    assert detect_tool_parser(template, model_type) == tools
    assert detect_reasoning_parser(template, model_type) == reasoning
    assert tools is None or tools in TOOL_PARSERS
    assert reasoning is None or reasoning in REASONING_PARSERS


@pytest.mark.parametrize(
    ("format", "text", "pattern"),
    [
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', r"chatcmpl-tool-[0-9a-f]{32}"),
        ("mistral", "[TOOL_CALLS]now{}", r"[a-zA-Z0-9]{9}"),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}", "123456789"),
        (
            "kimi_k2",
            "<|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}",
            r"functions\.now:7",
        ),
    ],
)
def test_ids(format: str, text: str, pattern: str) -> None:
    parser = make_output_parser(reasoning=None, tools=auto(format), tail="", template_kwargs={})
    assert parser is not None
    (start, *_) = parser.push(text)
    assert isinstance(start, ToolCallStart)
    assert re.fullmatch(pattern, start.call_id)


def test_forced_calls_have_the_ids_of_their_format() -> None:
    parser = make_output_parser(
        reasoning=None,
        tools=ToolParsing("named", "mistral", TOOLS, "now"),
        tail="",
        template_kwargs={},
    )
    assert parser is not None
    (start, *_) = parser.push("{}")
    assert isinstance(start, ToolCallStart)
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", start.call_id)


def test_unknown_names() -> None:
    for reasoning, tools in ((None, auto("no-such")), ("no-such", None)):
        with pytest.raises(KeyError):
            make_output_parser(reasoning=reasoning, tools=tools, tail="", template_kwargs={})


def test_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.parsers.registry.TOOL_PARSERS", dict(TOOL_PARSERS))
    monkeypatch.setattr("router.parsers.registry.REASONING_PARSERS", dict(REASONING_PARSERS))
    register(
        "ours",
        tools=ToolFormat(lambda tools: JsonCalls(JsonForm(("@",)), tools)),
        reasoning=ThinkForm(("((",), ("))",)),
    )
    parsed = parse(['((Hm)) @{"name": "now"}'], reasoning="ours", tools=auto("ours"))
    assert (parsed.reasoning, parsed.content, parsed.calls) == ("Hm", "", [("now", "{}")])


def test_text_without_markers_goes_on_at_once() -> None:
    parser = make_output_parser(
        reasoning="qwen3", tools=auto("hermes"), tail="", template_kwargs={}
    )
    assert parser is not None
    assert parser.push("It") == [Content("It")]
    assert parser.push(" is 1 ") == [Content(" is 1 ")]
    assert parser.push("< 2 <tool") == [Content("< 2 ")]
    assert parser.push("_box>") == [Content("<tool_box>")]
    assert parser.push("") == []


def test_arguments_stream() -> None:
    parser = make_output_parser(reasoning=None, tools=auto("hermes"), tail="", template_kwargs={})
    assert parser is not None
    parser.push('<tool_call>{"name": "now", "arguments": ')
    pieces = [parser.push(piece) for piece in ('{"a": "x', " y", '"', "}")]
    assert [[getattr(delta, "text", None) for delta in piece] for piece in pieces] == [
        ['{"a": "x'],
        [" y"],
        ['"'],
        ["}"],
    ]


def test_after_a_long_failure_what_was_read_is_not_read_again() -> None:
    """Else a text full of openings would take quadratic time."""
    inner = '<tool_call>{"name": "now"}'
    short, long = ('<tool_call>{"a": {' + " " * size + inner for size in (10, 2000))
    assert parse([short], tools=auto("hermes")).calls == [("now", "{}")]
    parsed = parse([long], tools=auto("hermes"))
    assert (parsed.calls, parsed.content) == ([], long)


STRICT = ToolSpec(
    "get_weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    strict=True,
)
LOOSE = ToolSpec("now")
GOOD, BAD = '{"city": "Oslo", "days": 3}', '{"city": 5}'
XML = "<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n%s\n</parameter>"
# Format, text with %s for the arguments, right ones, wrong ones.
WRITTEN: list[tuple[str, str, str, str]] = [
    (
        "hermes",
        'Hm\n<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
        GOOD,
        BAD,
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": %s}', GOOD, BAD),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n%s\n</function>\n</tool_call>",
        XML % 3,
        XML % "x",
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n%s\n</function>\n</seed:tool_call>",
        XML % 3,
        XML % "x",
    ),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Oslo</parameter>\n<parameter name="days">%s</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
        "3",
        "x",
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">%s</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "3",
        "x",
    ),
    (
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>",
        "3",
        "x",
    ),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n%s\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        GOOD,
        BAD,
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>%s"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        GOOD,
        BAD,
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>%s<|tool_call_end|><|tool_calls_section_end|>",
        GOOD,
        BAD,
    ),
    (
        "jamba",
        'Hm <tool_calls>[{"name": "get_weather", "arguments": %s}, '
        '{"name": "now", "arguments": {"any": 1}}]</tool_calls>',
        GOOD,
        BAD,
    ),
    ("phi4_mini_json", 'functools[{"name": "get_weather", "arguments": %s}]', GOOD, BAD),
    ("mistral", "[TOOL_CALLS]get_weather[ARGS]%s", GOOD, BAD),
    ("mistral", "[TOOL_CALLS]get_weather%s", GOOD, BAD),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}]', GOOD, BAD),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": %s}]', GOOD, BAD),
    ("granite", '<tool_call>[{"name": "get_weather", "arguments": %s}]', GOOD, BAD),
    (
        "openai",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.get_weather <|constrain|>json<|message|>%s",
        GOOD,
        BAD,
    ),
]


@pytest.mark.parametrize(("format", "text", "good", "bad"), WRITTEN)
def test_structural_tags(format: str, text: str, good: str, bad: str) -> None:
    """Text that the parser understands fits the grammar, unless the arguments are wrong."""
    xgrammar: Any = pytest.importorskip("xgrammar")
    testing: Any = pytest.importorskip("xgrammar.testing")
    tag = structural_tag(format, (STRICT, LOOSE), parallel=True)
    assert tag is not None
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    parsed = parse([text % good], tools=auto(format, tools=(STRICT, LOOSE)))
    assert json.loads(parsed.calls[0][1]) == json.loads(GOOD)
    assert testing._is_grammar_accept_string(grammar, text % good)
    assert not testing._is_grammar_accept_string(grammar, text % bad)
    if format != "llama3_json":
        assert testing._is_grammar_accept_string(grammar, "No call.")


def test_every_format_with_tags_is_tested() -> None:
    with_tags = {format.tags for format in TOOL_PARSERS.values() if format.tags}
    assert {TOOL_PARSERS[name].tags for name, *_ in WRITTEN} == with_tags


def test_structural_tags_only_for_strict_tools() -> None:
    assert structural_tag("hermes", (LOOSE,), parallel=True) is None
    assert structural_tag("pythonic", (STRICT,), parallel=True) is None


@pytest.mark.parametrize("parallel", [True, False])
def test_structural_tags_without_parallel_calls(parallel: bool) -> None:
    xgrammar: Any = pytest.importorskip("xgrammar")
    testing: Any = pytest.importorskip("xgrammar.testing")
    tag = structural_tag("hermes", (STRICT, LOOSE), parallel=parallel)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    assert testing._is_grammar_accept_string(grammar, call)
    assert testing._is_grammar_accept_string(grammar, call + call) is parallel


def test_a_strict_tool_without_parameters_takes_none() -> None:
    xgrammar: Any = pytest.importorskip("xgrammar")
    testing: Any = pytest.importorskip("xgrammar.testing")
    tag = structural_tag("llama3_json", (ToolSpec("now", strict=True),), parallel=True)
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    accepts = testing._is_grammar_accept_string
    assert accepts(grammar, '{"name": "now", "parameters": {}}')
    assert not accepts(grammar, '{"name": "now", "parameters": {"a": 1}}')
