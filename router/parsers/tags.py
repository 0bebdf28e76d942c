# ruff: noqa: RUF001  (the bars of DeepSeek's markers are not the ASCII one)
"""Structural tags: free text, but once a call starts its arguments follow their schema.

The JSON is that of xgrammar: `{"type": "structural_tag", "format": {"type": "triggered_tags", …}}`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.parsers.specs import ToolSpec

Format = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TagForm:
    """How a call is written, as far as a grammar needs it.

    `trigger BEFORE name AFTER arguments end`: each of `calls` gives before, after and end.
    `trigger` begins them all, or the `section`, which holds calls and nothing but `separator`
    between them. `numbered`: a number and the text in it stand before the arguments.
    """

    trigger: str
    calls: tuple[tuple[str, str, str], ...]
    section: tuple[str, str] | None = None
    separator: str = ""
    style: str = "json"
    numbered: str = ""


def structural_tag_text(
    forms: Sequence[TagForm], tools: Sequence[ToolSpec], *, parallel: bool
) -> str | None:
    """The structural tag of a family's markup; None: nothing is to be constrained."""
    if not forms or not any(tool.strict for tool in tools):
        return None
    tags: list[Format] = []
    for form in forms:
        calls = [_tag(form, call, tool) for tool in tools for call in form.calls]
        if form.section is None:
            tags += calls
            continue
        content = {
            "type": "tags_with_separator",
            "tags": calls,
            "separator": form.separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        begin, end = form.section
        tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
    triggered = {
        "type": "triggered_tags",
        "triggers": sorted({form.trigger for form in forms}),
        "tags": tags,
        "stop_after_first": not parallel,
    }
    return json.dumps({"type": "structural_tag", "format": triggered}, ensure_ascii=False)


def _tag(form: TagForm, call: tuple[str, str, str], tool: ToolSpec) -> Format:
    before, after, end = call
    content: Format = {"type": "json_schema", "json_schema": _schema(tool), "style": form.style}
    if form.numbered:
        number = {"type": "regex", "pattern": r"\d+"}
        behind = {"type": "const_string", "value": form.numbered}
        content = {"type": "sequence", "elements": [number, behind, content]}
    return {"type": "tag", "begin": before + tool.name + after, "content": content, "end": end}


def _schema(tool: ToolSpec) -> Any:
    """A tool that is not strict takes any arguments; one without parameters takes none."""
    if not tool.strict:
        return True
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return dict(tool.parameters)


def _listed(opening: str, closing: str) -> TagForm:
    call = ('{"name": "', '", "arguments": ', "}")
    return TagForm(opening.strip(), (call,), section=(opening + "[", "]" + closing), separator=", ")


def _xml(section: str) -> TagForm:
    begin = f"<{section}>\n<function="
    end = f"\n</function>\n</{section}>"
    return TagForm(begin, ((begin, ">\n", end),), style="qwen_xml")


HERMES = TagForm(
    "<tool_call>", (('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),)
)
LLAMA = TagForm('{"name": "', (('{"name": "', '", "parameters": ', "}"),))
QWEN = _xml("tool_call")
SEED = _xml("seed:tool_call")
MINIMAX = TagForm(
    "<minimax:tool_call>",
    (('<invoke name="', '">\n', "</invoke>\n"),),
    section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
    style="minimax_xml",
)
DSML = TagForm(
    "<｜DSML｜function_calls>",
    (('<｜DSML｜invoke name="', '">\n', "</｜DSML｜invoke>\n"),),
    section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    style="deepseek_xml",
)
GLM = TagForm("<tool_call>", (("<tool_call>", "\n", "\n</tool_call>"),), style="glm_xml")
_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK_V3 = TagForm(
    "<｜tool▁calls▁begin｜>",
    (
        (
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
        ),
    ),
    section=_DEEPSEEK_SECTION,
    separator="\n",
)
DEEPSEEK_V31 = TagForm(
    "<｜tool▁calls▁begin｜>",
    (("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),),
    section=_DEEPSEEK_SECTION,
)
KIMI = TagForm(
    "<|tool_calls_section_begin|>",
    (("<|tool_call_begin|>functions.", ":", "<|tool_call_end|>"),),
    section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    numbered="<|tool_call_argument_begin|>",
)
MISTRAL = (
    TagForm(
        "[TOOL_CALLS]",
        (("[TOOL_CALLS]", "[ARGS]", ""), ("[TOOL_CALLS]", "", "")),
    ),
    _listed("[TOOL_CALLS]", ""),
    _listed("[TOOL_CALLS] ", ""),
)
GRANITE = (_listed("<|tool_call|>", ""), _listed("<tool_call>", ""))
JAMBA = _listed("<tool_calls>", "</tool_calls>")
PHI4 = _listed("functools", "")
# The call token ends the generation, so no text follows the arguments.
HARMONY = TagForm(
    "<|channel|>commentary to=functions.",
    (
        ("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
        ("<|channel|>commentary to=functions.", "<|constrain|>json<|message|>", ""),
        ("<|channel|>commentary to=functions.", " json<|message|>", ""),
    ),
)
