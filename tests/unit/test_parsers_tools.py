# ruff: noqa: RUF001
"""Each tool format: what its markup gives, at once, by character and cut anywhere."""

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.parsers.registry import TOOL_PARSERS, ToolParsing
from tests.support.parsed import TOOLS, Call, auto, cut, parse, through

OSLO = '{"city": "Oslo"}'
# Nested, with markers of several formats, quotes, brackets and other scripts in strings.
HARD = (
    '{"city": "Åre }]\\" </tool_call> \\\\", "area": {"a": [1, {"b": "{[</tool_calls>"}]}, '
    '"near": ["東京", "🌍", "[TOOL_CALLS]"]}'
)


@dataclass(frozen=True)
class Row:
    format: str
    text: str
    calls: tuple[Call, ...] = ()
    content: str = ""


def weather(arguments: str = OSLO) -> Call:
    return "get_weather", arguments


def hermes(arguments: str = OSLO, name: str = "get_weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def hermes_rows() -> list[Row]:
    one, now = hermes(), hermes("{}", "now")
    rows = {
        one: ([weather()], ""),
        one + "\n" + now: ([weather(), ("now", "{}")], ""),
        "I will look.\n" + one: ([weather()], "I will look.\n"),
        " \n" + one: ([weather()], ""),
        one + "\nDone.": ([weather()], "\nDone."),
        one + " and " + now + " end": ([weather(), ("now", "{}")], " and  end"),
        hermes(HARD): ([weather(HARD)], ""),
        '<tool_call>{"arguments": {"city":"Oslo"} , "x": [1], "name":"get_weather"}</tool_call>': (
            [weather('{"city":"Oslo"}')],
            "",
        ),
        '<tool_call>{"name": "now"}</tool_call>': ([("now", "{}")], ""),
        '<tool_call>{"name": "now", "arguments": null}</tool_call>': ([("now", "{}")], ""),
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>': (
            [("now", '{"a": 1}')],
            "",
        ),
        f'<tool_call>{{"type": "function", "function": {NOW_CALL}}}</tool_call>': (
            [("now", "{}")],
            "",
        ),
        f'<tool_call>[{NOW_CALL}, {{"name": "x", "arguments": {{}}}}]</tool_call>': (
            [("now", "{}"), ("x", "{}")],
            "",
        ),
        # Malformed: plain text.
        "<tool_call>soon</tool_call>": ([], "<tool_call>soon</tool_call>"),
        '<tool_call>{"arguments": {}}</tool_call>': (
            [],
            '<tool_call>{"arguments": {}}</tool_call>',
        ),
        '<tool_call>{"name": 5, "arguments": {}}': ([], '<tool_call>{"name": 5, "arguments": {}}'),
        "a < b, <tool_cal": ([], "a < b, <tool_cal"),
        "<tool_call> <tool_call>" + now.removeprefix("<tool_call>"): (
            [("now", "{}")],
            "<tool_call> ",
        ),
        "  ": ([], "  "),
        # A bracket too many, or one missing.
        one.replace("}\n<", "}}\n<"): ([weather()], ""),
        '<tool_call>{"name": "now", "arguments": {"a": 1</tool_call> x': (
            [("now", '{"a": 1')],
            " x",
        ),
        # Cut.
        one[:-12]: ([weather()], ""),
        one[:-5]: ([weather()], ""),
        through(one, '{"c'): ([weather('{"c')], ""),
        through(one, "get_"): ([], through(one, "get_")),
    }
    return [Row("hermes", text, tuple(calls), content) for text, (calls, content) in rows.items()]


def deepseek(*calls: str) -> str:
    return f"<｜tool▁calls▁begin｜>{''.join(calls)}<｜tool▁calls▁end｜>"


def deepseek_v3(arguments: str = OSLO, name: str = "get_weather") -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>"
    )


def deepseek_v31(arguments: str = OSLO, name: str = "get_weather") -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def kimi(arguments: str = OSLO, call_id: str = "functions.get_weather:0") -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def kimi_section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


KIMI_NOW = kimi("{}", "functions.now:1")
LLAMA = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
NOW_CALL = '{"name": "now", "arguments": {}}'
BOTH = (weather(), ("now", "{}"))

QWEN = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
QWEN_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
QWEN_ARGUMENTS = '{"city": "Oslo", "days": 3}'


def qwen(**values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{v}\n</parameter>\n" for key, v in values.items())
    return f"<tool_call>\n<function=get_weather>\n{parameters}</function>\n</tool_call>"


MINIMAX = (
    '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
    "</minimax:tool_call>"
)
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">7</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="other" string="false">[1, 2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo\n</arg_value>\n"
    "<arg_key>days</arg_key><arg_value>3</arg_value>\n<arg_key>x</arg_key>\n"
    '<arg_value>{"a": 1}</arg_value>\n</tool_call>'
)
GLM_ARGUMENTS = '{"city": "Oslo\\n", "days": 3, "x": {"a": 1}}'
HARMONY = (
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    + OSLO
    + "<|call|>"
)

ROWS = [
    *hermes_rows(),
    *(replace(row, format="qwen3_json") for row in hermes_rows()[:3]),
    Row("granite4", hermes(), (weather(),)),
    Row("longcat", f"Hm <longcat_tool_call>{CALL}</longcat_tool_call>", (weather(),), "Hm "),
    # llama
    Row("llama3_json", LLAMA, (weather(),)),
    Row("llama3_json", "<|python_tag|>" + LLAMA, (weather(),)),
    Row("llama4_json", f"{LLAMA}; {NOW_CALL}", BOTH),
    Row("llama3_json", f"\n[{LLAMA}, {NOW_CALL}]", BOTH),
    Row("llama3_json", LLAMA.replace(OSLO, HARD), (weather(HARD),)),
    Row("llama3_json", '{"name": "Ann", "age": 3}', (), '{"name": "Ann", "age": 3}'),
    Row("llama3_json", '{"a": {"name": "now"}}', (), '{"a": {"name": "now"}}'),
    Row("llama3_json", "See: " + LLAMA, (), "See: " + LLAMA),
    Row("llama3_json", "See: <|python_tag|>" + LLAMA, (weather(),), "See: "),
    Row("llama3_json", "<|python_tag|>print(1)", (), "<|python_tag|>print(1)"),
    Row("llama3_json", LLAMA + "\nDone; ok", (weather(),), "\nDone; ok"),
    Row("llama3_json", LLAMA[:-4], (weather('{"city": "Osl'),)),
    # mistral
    Row("mistral", f"[TOOL_CALLS] [{CALL}, {NOW_CALL}]", BOTH),
    Row("mistral", f"[TOOL_CALLS]get_weather{OSLO}[TOOL_CALLS]now{{}}", BOTH),
    Row("mistral", f"Hm[TOOL_CALLS]get_weather[ARGS]{HARD}", (weather(HARD),), "Hm"),
    Row("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{OSLO}", (weather(),)),
    Row("mistral", '[TOOL_CALLS]get_weather{"city', (weather('{"city'),)),
    Row("mistral", "[TOOL_CALLS]get_weather", (), "[TOOL_CALLS]get_weather"),
    Row("mistral", "[TOOL_CALLS][1, 2] [x]", (), "[TOOL_CALLS][1, 2] [x]"),
    Row("mistral", f"[TOOL_CALLS][{CALL}, 7] z", (weather(),), ", 7] z"),
    # qwen3_coder
    Row("qwen3_coder", QWEN, (weather(QWEN_ARGUMENTS),)),
    Row("qwen3_xml", f"Hm\n{QWEN}\n{QWEN_NOW}", (weather(QWEN_ARGUMENTS), ("now", "{}")), "Hm\n"),
    Row("qwen3_coder", QWEN.removeprefix("<tool_call>\n"), (weather(QWEN_ARGUMENTS),)),
    Row(
        "qwen3_coder",
        qwen(
            city='a "b"\n\n</tool_call>{\\', exact="True", near="[\"x\", 'y']", area="{'a': None}"
        ),
        (
            weather(
                '{"city": "a \\"b\\"\\n\\n</tool_call>{\\\\", "exact": true, '
                '"near": ["x", "y"], "area": {"a": null}}'
            ),
        ),
    ),
    Row(
        "qwen3_coder",
        qwen(city="null", unit="null", ratio="1.5", days="many", other="5", near='["東京"]'),
        (
            weather(
                '{"city": "null", "unit": null, "ratio": 1.5, "days": "many", "other": "5", '
                '"near": ["東京"]}'
            ),
        ),
    ),
    Row("qwen3_coder", qwen(city=""), (weather('{"city": ""}'),)),
    Row("qwen3_coder", QWEN.replace("\n</parameter>", ""), (weather(QWEN_ARGUMENTS),)),
    Row("qwen3_coder", through(QWEN, "\nOs"), (weather('{"city": "Os'),)),
    Row("qwen3_coder", through(QWEN, "Oslo\n</pa"), (weather('{"city": "Oslo\\n</pa'),)),
    Row("qwen3_coder", QWEN[:-24], (weather(QWEN_ARGUMENTS[:-1]),)),
    Row("qwen3_coder", through(QWEN, "=get_w"), (), through(QWEN, "=get_w")),
    Row("qwen3_coder", "<tool_call>{}</tool_call>", (), "<tool_call>{}</tool_call>"),
    Row("qwen3_coder", "<function=f>text</function>", (), "<function=f>text</function>"),
    Row("qwen3_coder", "<function=a b>\n</function>", (), "<function=a b>\n</function>"),
    Row(
        "seed_oss",
        QWEN.replace("tool_call>", "seed:tool_call>"),
        (weather(QWEN_ARGUMENTS),),
    ),
    Row("minimax_m2", MINIMAX, (weather(QWEN_ARGUMENTS), ("now", "{}"))),
    Row("minimax_m2", "a<minimax:tool_call>b", (), "a<minimax:tool_call>b"),
    Row("minimax", f"<tool_calls>\n{CALL}\n{NOW_CALL}\n</tool_calls>", BOTH),
    Row("deepseek_v32", "Hm\n\n" + DSML, (weather('{"city": "7", "other": [1, 2]}'),), "Hm\n\n"),
    # glm
    Row("glm45", GLM, (weather(GLM_ARGUMENTS),)),
    Row(
        "glm47",
        "Hm<tool_call>now</tool_call>\n" + GLM,
        (("now", "{}"), weather(GLM_ARGUMENTS)),
        "Hm",
    ),
    Row("glm45", through(GLM, "Oslo\n</"), (weather('{"city": "Oslo\\n</'),)),
    Row("glm45", "<tool_call>not a call</tool_call>", (), "<tool_call>not a call</tool_call>"),
    # deepseek
    Row("deepseek_v3", deepseek(deepseek_v3()), (weather(),)),
    Row("deepseek_v3", "Hm" + deepseek(deepseek_v3(), "\n", deepseek_v3("{}", "now")), BOTH, "Hm"),
    Row("deepseek_v3", deepseek(deepseek_v3(HARD)) + " x", (weather(HARD),), " x"),
    Row("deepseek_v3", through(deepseek_v3(), "}\n``"), (weather(),)),
    Row("deepseek_v3", deepseek("soon"), (), deepseek("soon")),
    Row("deepseek_v31", deepseek(deepseek_v31(), deepseek_v31("{}", "now")), BOTH),
    Row("deepseek_v31", through(deepseek_v31(), '{"cit'), (weather('{"cit'),)),
    Row("deepseek_v31", deepseek(deepseek_v31("7")), (), deepseek(deepseek_v31("7"))),
    # kimi
    Row("kimi_k2", kimi_section(kimi()), (weather(),)),
    Row("kimi_k2", f"Hm {kimi_section(kimi(), KIMI_NOW)}", BOTH, "Hm "),
    Row("kimi_k2", kimi_section(kimi(HARD)), (weather(HARD),)),
    Row("kimi_k2", through(kimi_section(kimi()), '{"c'), (weather('{"c'),)),
    Row("kimi_k2", "<|tool_call_begin|>oops", (), "<|tool_call_begin|>oops"),
    # lists
    Row("granite", f"<|tool_call|>[{CALL}, {NOW_CALL}]", BOTH),
    Row("granite", f"<tool_call>[{CALL}]", (weather(),)),
    Row("granite", f"[{CALL}]", (weather(),)),
    Row("granite", "[1, 2]", (), "[1, 2]"),
    Row("jamba", f"<tool_calls>[\n    {CALL},\n    {NOW_CALL}\n]</tool_calls>", BOTH),
    Row("jamba", "<tool_calls>[]</tool_calls>", (), "<tool_calls>[]</tool_calls>"),
    Row("hunyuan_a13b", f"Hm\n<tool_calls>[{CALL}]</tool_calls>", (weather(),), "Hm\n"),
    Row("internlm", f"Hm<|action_start|><|plugin|>{LLAMA}<|action_end|>", (weather(),), "Hm"),
    Row("phi4_mini_json", f"functools[{CALL}, {NOW_CALL}]", BOTH),
    Row("phi4_mini_json", "import functools\n", (), "import functools\n"),
    Row("xlam", f"[{CALL}, {NOW_CALL}]", BOTH),
    Row("xlam", f"Hm\n```json\n[{CALL}]\n```", (weather(),), "Hm\n"),
    Row("xlam", f"<tool_call>[{CALL}]</tool_call> x", (weather(),), " x"),
    Row("xlam", '["a"]', (), '["a"]'),
    # pythonic
    Row("pythonic", "[get_weather(city='Oslo'), now()]", BOTH),
    Row(
        "pythonic",
        " [get_weather(city='a\\'),(]\"\\n', near=['東京', \"x\"], days=-3, exact=True, "
        "area={'a': (1, None)}, ratio=1.5)]",
        (
            weather(
                '{"city": "a\'),(]\\"\\n", "near": ["東京", "x"], "days": -3, "exact": true, '
                '"area": {"a": [1, null]}, "ratio": 1.5}'
            ),
        ),
    ),
    Row("pythonic", "[1, 2]", (), "[1, 2]"),
    Row("pythonic", "[see(a=1)]", (), "[see(a=1)]"),
    Row("pythonic", "[now(a=open('x'))]", (), "[now(a=open('x'))]"),
    Row("pythonic", "[now(a=b'x')]", (), "[now(a=b'x')]"),
    Row("pythonic", "[now(a=1e999)]", (), "[now(a=1e999)]"),
    Row("pythonic", "[now('x')]", (), "[now('x')]"),
    Row("pythonic", "[now(a=" + "[" * 100, (), "[now(a=" + "[" * 100),
    Row("pythonic", "[now(a=" + "-" * 90000 + "1)]", (), "[now(a=" + "-" * 90000 + "1)]"),
    Row("pythonic", "[now(), x] y", (("now", "{}"),), ", x] y"),
    Row("pythonic", "[get_weather(city='Oslo', days=", (weather(OSLO[:-1]),)),
    Row("pythonic", "[get_weather(city='Os", (), "[get_weather(city='Os"),
    Row("pythonic", "Use [now()]", (), "Use [now()]"),
    Row("llama4_pythonic", "Hm<|python_start|>[now()]<|python_end|>", (("now", "{}"),), "Hm"),
    Row("llama4_pythonic", "[now()]", (("now", "{}"),)),
    Row(
        "olmo3",
        "Hm\n<function_calls>\nget_weather(city='Oslo')\nnow(a=true, b=null)\n</function_calls>",
        (weather(), ("now", '{"a": true, "b": null}')),
        "Hm\n",
    ),
    Row("olmo3", "[now()]", (), "[now()]"),
    # harmony
    Row("openai", HARMONY, (weather(),)),
    Row("openai", HARMONY.removeprefix("<|start|>assistant"), (weather(),)),
    Row(
        "openai",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        (("now", "{}"),),
    ),
    Row("openai", f"<|channel|>final<|message|>Hi<|end|>{HARMONY}", (weather(),), "Hi"),
    Row(
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|>" + through(HARMONY, '{"cit'),
        (weather('{"cit'),),
        "I look.",
    ),
    Row("openai", "plain", (), "plain"),
    Row("openai", " to=you", (), " to=you"),
    Row("openai", "<|channel|>fin", (), "<|channel|>fin"),
]


def check(row: Row, pieces: list[str]) -> None:
    parsed = parse(pieces, tools=auto(row.format))
    assert (parsed.calls, parsed.content) == (list(row.calls), row.content)
    assert parsed.reasoning == ""


IDS = [f"{row.format}-{index}" for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_at_once(row: Row) -> None:
    check(row, [row.text])


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.text) < 1000])
def test_by_character(row: Row) -> None:
    check(row, list(row.text))


@given(st.sampled_from(ROWS), st.lists(st.integers(0, 300), max_size=12))
def test_cut_anywhere(row: Row, places: list[int]) -> None:
    check(row, cut(row.text, places))


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.text) < 1000])
def test_any_beginning_is_the_same_however_it_is_cut(row: Row) -> None:
    for end in range(len(row.text)):
        text = row.text[:end]
        assert parse([text], tools=auto(row.format)) == parse(list(text), tools=auto(row.format))


def test_every_format_is_tested() -> None:
    assert {row.format for row in ROWS} == set(TOOL_PARSERS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.calls], ids=lambda row: row.format)
def test_without_parallel_calls_the_first_is_kept(row: Row) -> None:
    parsed = parse(list(row.text), tools=auto(row.format, parallel=False))
    assert parsed.calls == list(row.calls[:1])
    assert parsed.content == row.content


def required(*, parallel: bool = True) -> ToolParsing:
    return ToolParsing("required", "hermes", TOOLS, parallel=parallel)


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        pytest.param(f"[{LLAMA}]", [weather()], "", id="one"),
        pytest.param(f"[ {LLAMA} , {LLAMA}\n]\n", [weather(), weather()], "", id="two"),
        pytest.param(f"[{LLAMA[:-4]}", [weather('{"city": "Osl')], "", id="cut"),
        pytest.param("Sorry", [], "Sorry", id="no call"),
    ],
)
def test_required(text: str, calls: list[Call], content: str) -> None:
    for pieces in ([text], list(text)):
        parsed = parse(pieces, tools=required())
        assert (parsed.calls, parsed.content) == (calls, content)


def test_required_once() -> None:
    parsed = parse([f"[{LLAMA}, {LLAMA}]"], tools=required(parallel=False))
    assert parsed.calls == [weather()]


@pytest.mark.parametrize(
    ("text", "arguments"), [(OSLO, OSLO), ("\n" + OSLO, OSLO), ('{"ci', '{"ci'), ("", "")]
)
def test_named(text: str, arguments: str) -> None:
    tools = ToolParsing("named", "mistral", TOOLS, name="get_weather")
    for pieces in ([text], list(text)):
        parsed = parse(pieces, tools=tools)
        assert (parsed.calls, parsed.content) == ([weather(arguments)], "")


def test_arguments_are_json() -> None:
    for row in ROWS:
        parsed = parse([row.text], tools=auto(row.format))
        for name, arguments in parsed.calls[:-1]:
            assert isinstance(json.loads(arguments), dict), name
