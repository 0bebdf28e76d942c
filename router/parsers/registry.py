"""Parsers by name, which one a model wants, and the parser of one choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from router.deltas import OutputParser
from router.parsers import headed_calls, reasoning, tags, xml_calls
from router.parsers.detect import detect_reasoning_parser, detect_tool_parser
from router.parsers.harmony import Harmony, HarmonyForm
from router.parsers.headed_calls import HeadedCalls, MistralCalls
from router.parsers.json_calls import JsonCalls, JsonForm, NamedCall, required_calls
from router.parsers.output import (
    ChainParser,
    NewId,
    Output,
    Plain,
    Stage,
    function_id,
    long_id,
    short_id,
)
from router.parsers.pythonic_calls import PythonicCalls, PythonicForm
from router.parsers.source import Grammar, Reader
from router.parsers.specs import ToolParsing, ToolSpec
from router.parsers.tags import TagForm, structural_tag_text
from router.parsers.xml_calls import GlmCalls, XmlCalls, XmlForm

__all__ = [
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "ReasoningFormat",
    "ToolFormat",
    "ToolParsing",
    "ToolSpec",
    "detect_reasoning_parser",
    "detect_tool_parser",
    "make_output_parser",
    "may_think",
    "reasoning_end",
    "register",
    "starts_inside",
    "structural_tag",
]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    `make` gives a grammar for one choice. `needs_special_tokens`: markers may be special tokens,
    so these must stay in the text. `tags`: what a grammar for strict tools needs; without it they
    cannot be constrained.
    """

    make: Callable[[ToolParsing], Grammar] | None  # None: calls are messages of harmony
    needs_special_tokens: bool = True
    new_id: NewId = long_id
    tags: tuple[TagForm, ...] = ()


class ReasoningFormat(Protocol):
    """How a family of models marks its thoughts; `start` opens and `end` closes them."""

    @property
    def start(self) -> str: ...  # noqa: D102

    @property
    def end(self) -> str: ...  # noqa: D102

    @property
    def needs_special_tokens(self) -> bool: ...  # noqa: D102

    def starts_inside(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the first text will be thoughts."""
        ...

    def may_think(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether thoughts may come at all."""
        ...

    def make(
        self, tail: str, template_kwargs: Mapping[str, Any], following: Stage, *, functions: bool
    ) -> Grammar:
        """A grammar for one choice; it gives content to `following`, and finishes it.

        `functions`: calls that are written as messages are wanted.
        """
        ...


def _json(
    *openings: str, closings: tuple[str, ...] = (), bare: str = ""
) -> Callable[[ToolParsing], Grammar]:
    form = JsonForm(openings, closings, bare)
    return lambda tools: JsonCalls(form, tools)


def _xml(form: XmlForm) -> Callable[[ToolParsing], Grammar]:
    return lambda tools: XmlCalls(form, tools)


def _pythonic(
    opening: str = "", closing: str = "", *, listed: bool = True
) -> Callable[[ToolParsing], Grammar]:
    form = PythonicForm(opening, closing, listed)
    return lambda tools: PythonicCalls(form, tools)


_HERMES = ToolFormat(_json("<tool_call>", closings=("</tool_call>",)), tags=(tags.HERMES,))
_LLAMA = ToolFormat(_json("<|python_tag|>", bare="{["), tags=(tags.LLAMA,))
_QWEN_XML = ToolFormat(_xml(xml_calls.QWEN), tags=(tags.QWEN,))
_GLM = ToolFormat(GlmCalls, tags=(tags.GLM,))
_TAGGED_LIST = ToolFormat(_json("<tool_calls>", closings=("</tool_calls>",)), tags=(tags.JAMBA,))

TOOL_PARSERS: dict[str, ToolFormat] = {
    "hermes": _HERMES,
    "qwen3_json": _HERMES,
    "granite4": _HERMES,
    "longcat": ToolFormat(_json("<longcat_tool_call>", closings=("</longcat_tool_call>",))),
    "llama3_json": _LLAMA,
    "llama4_json": _LLAMA,
    "mistral": ToolFormat(MistralCalls, new_id=short_id, tags=tags.MISTRAL),
    "qwen3_coder": _QWEN_XML,
    "qwen3_xml": _QWEN_XML,
    "seed_oss": ToolFormat(_xml(xml_calls.SEED), tags=(tags.SEED,)),
    "minimax_m2": ToolFormat(_xml(xml_calls.MINIMAX), tags=(tags.MINIMAX,)),
    "minimax": ToolFormat(_json("<tool_calls>", closings=("</tool_calls>",))),
    "deepseek_v3": ToolFormat(
        lambda _: HeadedCalls(headed_calls.DEEPSEEK), tags=(tags.DEEPSEEK_V3,)
    ),
    "deepseek_v31": ToolFormat(
        lambda _: HeadedCalls(headed_calls.DEEPSEEK), tags=(tags.DEEPSEEK_V31,)
    ),
    "deepseek_v32": ToolFormat(_xml(xml_calls.DSML), tags=(tags.DSML,)),
    "kimi_k2": ToolFormat(
        lambda _: HeadedCalls(headed_calls.KIMI), new_id=function_id, tags=(tags.KIMI,)
    ),
    "glm45": _GLM,
    "glm47": _GLM,
    "granite": ToolFormat(
        _json("<|tool_call|>", "<tool_call>", closings=("</tool_call>",), bare="["),
        tags=tags.GRANITE,
    ),
    "jamba": _TAGGED_LIST,
    "hunyuan_a13b": _TAGGED_LIST,
    "internlm": ToolFormat(_json("<|action_start|><|plugin|>", closings=("<|action_end|>",))),
    "phi4_mini_json": ToolFormat(_json("functools"), needs_special_tokens=False, tags=(tags.PHI4,)),
    "xlam": ToolFormat(
        _json("```json", "[TOOL_CALLS]", "<tool_call>", closings=("```", "</tool_call>"), bare="[")
    ),
    "pythonic": ToolFormat(_pythonic(), needs_special_tokens=False),
    "llama4_pythonic": ToolFormat(_pythonic("<|python_start|>", "<|python_end|>")),
    "olmo3": ToolFormat(_pythonic("<function_calls>", "</function_calls>", listed=False)),
    "openai": ToolFormat(None, tags=(tags.HARMONY,)),
}
"""The formats of `tool_choice: auto`, by name."""

REASONING_PARSERS: dict[str, ReasoningFormat] = {
    "deepseek_r1": reasoning.DEEPSEEK_R1,
    "deepseek_v3": reasoning.DEEPSEEK_V3,
    "deepseek_v31": reasoning.DEEPSEEK_V3,
    "deepseek_v32": reasoning.DEEPSEEK_V3,
    "qwen3": reasoning.QWEN3,
    "glm45": reasoning.QWEN3,
    "holo2": reasoning.DEEPSEEK_R1,
    "step3": reasoning.DEEPSEEK_R1,
    "minimax_m2": reasoning.DEEPSEEK_R1,
    "olmo3": reasoning.DEEPSEEK_R1,
    "nemotron_v3": reasoning.DEEPSEEK_R1,
    "seed_oss": reasoning.SEED_OSS,
    "kimi_k2": reasoning.KIMI_K2,
    "granite": reasoning.GRANITE,
    "mistral": reasoning.MISTRAL,
    "openai_gptoss": HarmonyForm(),
}
"""The formats of thoughts, by name."""


def register(
    name: str,
    *,
    tools: ToolFormat | None = None,
    reasoning: ReasoningFormat | None = None,
) -> None:
    """Add a format, or replace the one of that name. For operators' plug-ins, at start."""
    if tools is not None:
        TOOL_PARSERS[name] = tools
    if reasoning is not None:
        REASONING_PARSERS[name] = reasoning


def make_output_parser(
    *,
    reasoning: str | None,
    tools: ToolParsing | None,
    tail: str,
    template_kwargs: Mapping[str, Any],
    new_id: NewId | None = None,
) -> OutputParser | None:
    """The parser of one choice; None: all text is content.

    Args:
        reasoning: a name in `REASONING_PARSERS`; None: thoughts are not looked for.
        tools: None: calls are not looked for.
        tail: the end of the prompt's text, special tokens shown; the last turn is enough.
        template_kwargs: the variables that the template was rendered with.
        new_id: makes the ids of calls, where the model wrote none; None: as the format wants them.

    Raises:
        KeyError: a name is unknown.
    """
    if reasoning is None and tools is None:
        return None
    style = TOOL_PARSERS[tools.format] if tools is not None and tools.format else None
    new_id = new_id or (style.new_id if style else long_id)
    out = Output(new_id=new_id, parallel=tools.parallel if tools else True)
    thoughts = REASONING_PARSERS[reasoning] if reasoning is not None else None
    stage: Stage = Plain(out)
    if tools is not None:
        if tools.mode == "named":
            stage = Reader(NamedCall(tools.name or ""), out)
        elif tools.mode == "required":
            stage = Reader(required_calls(tools), out)
        elif style is None:
            raise KeyError("no format of tool calls")
        elif style.make is not None:
            stage = Reader(style.make(tools), out)
        elif not isinstance(thoughts, HarmonyForm):
            stage = Reader(Harmony(tail, stage, reasoning=False, functions=True), out)
    if thoughts is not None:
        grammar = thoughts.make(tail, template_kwargs, stage, functions=tools is not None)
        stage = Reader(grammar, out)
    return ChainParser(stage, out)


def reasoning_end(name: str) -> str:
    """The text that ends the thoughts; what follows it is the answer."""
    return REASONING_PARSERS[name].end


def reasoning_start(name: str) -> str:
    """The text with which thoughts begin, where the prompt does not open them."""
    return REASONING_PARSERS[name].start


def starts_inside(name: str, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether a generation starts within the thoughts, by the end of its prompt."""
    return REASONING_PARSERS[name].starts_inside(tail, template_kwargs)


def may_think(name: str, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether thoughts may come at all."""
    return REASONING_PARSERS[name].may_think(tail, template_kwargs)


def structural_tag(format: str, tools: tuple[ToolSpec, ...], parallel: bool) -> str | None:
    """The structural tag (JSON text) that holds strict tools to their schemas.

    Returns:
        None: no tool is strict, or this format cannot be constrained.
    """
    return structural_tag_text(TOOL_PARSERS[format].tags, tools, parallel=parallel)
