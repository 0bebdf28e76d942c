# ruff: noqa: RUF001  (the bars of DeepSeek's markers are not the ASCII one)
"""Thoughts between markers: `<think> … </think>` and what other models write instead.

Text is given on as it was written: of all white space around the markers nothing is dropped but
what stands before an opening at the start. An opening is only looked for there (`anywhere`: in all
of the text), and behind the first closing everything is content.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

from router.parsers.output import Output, Stage
from router.parsers.source import NO_MARKERS, Markers, Source, Steps

# What separates the turns of a conversation in the prompts of the usual models.
_TURN = re.compile(
    r"<\|[^|<>]*\|>|<｜[^｜<>]*｜>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<seed:[be]os>"
    r"|\]~[^\[]*\]|\[e~\["
)


class Where(Enum):
    """Where a generation starts, as its prompt tells."""

    INSIDE = "inside"  # the prompt opens the thoughts
    BEHIND = "behind"  # the prompt closes them
    UNKNOWN = "unknown"  # it does neither


@dataclass(frozen=True, slots=True)
class ThinkForm:
    """How a family of models marks its thoughts.

    `assumed`: where neither prompt nor output opens the thoughts, they are open. `default`:
    whether the model thinks if the template's variables do not say. `implied`: markers that end
    thoughts without being dropped.
    """

    openings: tuple[str, ...] = ("<think>",)
    closings: tuple[str, ...] = ("</think>",)
    assumed: bool = False
    default: bool = True
    anywhere: bool = False
    implied: tuple[str, ...] = ()
    needs_special_tokens: bool = True

    def where(self, tail: str, template_kwargs: Mapping[str, Any]) -> Where:
        """Where the generation starts after a prompt that ends with `tail`."""
        marked = _marked(tail, self.openings, self.closings)
        if marked is not None:
            return marked
        if not self.switched_on(template_kwargs):
            return Where.BEHIND
        return Where.INSIDE if self.assumed else Where.UNKNOWN

    def switched_on(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the template's variables let the model think."""
        for name in ("enable_thinking", "thinking"):
            if (value := template_kwargs.get(name)) is not None:
                return bool(value)
        return self.default

    @property
    def start(self) -> str:
        """What opens the thoughts."""
        return self.openings[0]

    @property
    def end(self) -> str:
        """What closes the thoughts."""
        return self.closings[0]

    def starts_inside(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the first text will be thoughts, an opening or not."""
        return self.where(tail, template_kwargs) is Where.INSIDE

    def may_think(self, tail: str, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether thoughts may come at all."""
        return self.where(tail, template_kwargs) is not Where.BEHIND

    def make(
        self, tail: str, template_kwargs: Mapping[str, Any], following: Stage, *, functions: bool
    ) -> "Think":
        """A grammar for one choice."""
        return Think(self, self.where(tail, template_kwargs), following)


@lru_cache(maxsize=8)  # the choices of a request ask for the same, and the tail may be long
def _marked(tail: str, openings: tuple[str, ...], closings: tuple[str, ...]) -> Where | None:
    """Where the last marker of the last turn leaves the text; None: there is no marker."""
    turn = tail[max((match.end() for match in _TURN.finditer(tail)), default=0) :]
    opened = max(map(turn.rfind, openings))
    closed = max(map(turn.rfind, closings))
    if opened == closed:
        return None
    return Where.INSIDE if opened > closed else Where.BEHIND


class Think:
    """Thoughts, then content, which goes to the next stage."""

    def __init__(self, form: ThinkForm, where: Where, following: Stage) -> None:
        self._openings = Markers(*form.openings)
        self._closings = Markers(*form.closings, *form.implied)
        self._implied = form.implied
        self._anywhere = form.anywhere
        self._where = where
        self._next = following
        self.thinking = where is Where.INSIDE

    def read(self, source: Source, out: Output) -> Steps[None]:
        """The grammar."""
        following = self._next
        if self._where is not Where.BEHIND:
            source.mark()
            yield from source.space()
            if (yield from source.either(self._openings)) is not None:
                source.commit()
                self.thinking = True
            else:
                source.undo()
                if self._anywhere and not self.thinking:
                    opening = yield from source.until(self._openings, following.push)
                    self.thinking = opening is not None
        if self.thinking:
            word = yield from source.until(self._closings, out.reasoning)
            self.thinking = word is None
            if word in self._implied:
                following.push(word)
        yield from source.until(NO_MARKERS, following.push)
        following.finish()


HERE = ("Here is my ", "Here's my ")
DEEPSEEK_R1 = ThinkForm(assumed=True)
DEEPSEEK_V3 = ThinkForm(assumed=True, default=False)
QWEN3 = ThinkForm()
KIMI_K2 = ThinkForm(assumed=True, implied=("<|tool_calls_section_begin|>",))
SEED_OSS = ThinkForm(("<seed:think>",), ("</seed:think>",), assumed=True)
MISTRAL = ThinkForm(("[THINK]",), ("[/THINK]",), anywhere=True)
GRANITE = ThinkForm(
    tuple(start + "thought process:" for start in HERE),
    tuple(start + "response:" for start in HERE),
    needs_special_tokens=False,
)
