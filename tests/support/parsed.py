"""What a parser made of a text, however it was cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart
from router.parsers.registry import ToolParsing, ToolSpec, make_output_parser

WEATHER = ToolSpec(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "near": {"type": "array", "items": {"type": "string"}},
            "area": {"$ref": "#/$defs/area"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "ratio": {"type": ["number", "null"]},
        },
        "$defs": {"area": {"type": "object"}},
    },
)
NOW = ToolSpec("now")
TOOLS = (WEATHER, NOW)

Call = tuple[str, str]  # name, arguments


@dataclass
class Parsed:
    """All deltas of a choice, joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list[Call])
    ids: list[str] = field(default_factory=list[str])

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            match delta:
                case Content(text):
                    assert text
                    self.content += text
                case Reasoning(text):
                    assert text
                    self.reasoning += text
                case ToolCallStart(index, call_id, name):
                    assert index == len(self.calls)
                    self.calls.append((name, ""))
                    self.ids.append(call_id)
                case ToolArguments(index, text):
                    assert text
                    assert index == len(self.calls) - 1
                    name, before = self.calls[index]
                    self.calls[index] = (name, before + text)


def auto(format: str, *, parallel: bool = True, tools: tuple[ToolSpec, ...] = TOOLS) -> ToolParsing:
    return ToolParsing("auto", format, tools, parallel=parallel)


def through(text: str, part: str) -> str:
    """The text up to the end of a part of it."""
    return text[: text.index(part) + len(part)]


def parse(
    pieces: Sequence[str],
    *,
    reasoning: str | None = None,
    tools: ToolParsing | None = None,
    tail: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Parsed:
    """Push the pieces one after the other and finish."""
    parser = make_output_parser(
        reasoning=reasoning,
        tools=tools,
        tail=tail,
        template_kwargs=template_kwargs or {},
        new_id=lambda name, index: f"{name}-{index}",
    )
    assert parser is not None
    parsed = Parsed()
    for piece in pieces:
        parsed.add(parser.push(piece))
        assert parser.calls == len(parsed.calls)
    parsed.add(parser.finish())
    assert parser.calls == len(parsed.calls)
    return parsed


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    ends = [0, *sorted({min(place, len(text)) for place in places}), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]
