"""What an answer says, in one form whether it was streamed or not, and whether it is right."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.client import DONE

TOLERANCE = 1e-4  # of log-probabilities, in float32
Json = dict[str, Any]


class Wrong(Exception):
    """An answer that cannot be right; the first word names the kind."""


@dataclass(eq=False)
class Choice:
    """One choice, whole."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list[list[str]])  # name, arguments
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    finish: str = ""


Choices = dict[int, Choice]


def whole(answer: Mapping[str, Any], choices: int) -> Choices:
    """A full answer.

    Raises:
        Wrong: something is missing.
    """
    found = {}
    for part in answer["choices"]:
        choice = found[part["index"]] = Choice()
        _take(choice, part, part.get("message") or {}, [])
    _check(found, choices)
    tokens = sum(len(choice.token_ids) for choice in found.values())
    if answer["usage"]["completion_tokens"] != tokens:
        raise Wrong(f"usage: {answer['usage']} but {tokens} tokens")
    return found


def streamed(events: Iterable[Json], choices: int) -> Choices:
    """A stream's events, without the last `[DONE]`.

    Raises:
        Wrong: an error event, or something is missing or comes twice.
    """
    found: Choices = {}
    usage: Json | None = None
    for event in events:
        if "error" in event:
            raise Wrong(f"error-event: {event}")
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = found.setdefault(part["index"], Choice())
            if choice.finish:
                raise Wrong(f"stream: choice {part['index']} goes on after its end")
            _take(choice, part, part.get("delta") or {}, choice.calls)
    _check(found, choices)
    tokens = sum(len(choice.token_ids) for choice in found.values())
    if usage is not None and usage["completion_tokens"] != tokens:
        raise Wrong(f"usage: {usage} but {tokens} tokens")
    return found


def events_of(payloads: Iterable[str]) -> list[str]:
    """The payloads of a complete stream, without its end mark.

    Raises:
        Wrong: the end mark is missing.
    """
    found = list(payloads)
    if not found or found[-1] != DONE:
        raise Wrong(f"cut: the stream ends without {DONE} after {len(found)} events")
    return found[:-1]


def _take(choice: Choice, part: Json, message: Json, calls: list[list[str]]) -> None:
    choice.text += message.get("content") or part.get("text") or ""
    choice.token_ids += part.get("token_ids") or []
    choice.finish = part.get("finish_reason") or ""
    scores = part.get("logprobs") or {}
    entries = scores.get("content") or []
    choice.logprobs += [entry["logprob"] for entry in entries]
    choice.logprobs += [value for value in scores.get("token_logprobs") or [] if value is not None]
    for index, call in enumerate(message.get("tool_calls") or []):
        while len(calls) <= call.get("index", index):
            calls.append(["", ""])
        one = calls[call.get("index", index)]
        one[0] += call["function"].get("name") or ""
        one[1] += call["function"].get("arguments") or ""
    choice.calls = calls


def _check(found: Choices, choices: int) -> None:
    if sorted(found) != list(range(choices)):
        raise Wrong(f"choices: {sorted(found)}, not {choices}")
    endless = [index for index, choice in found.items() if not choice.finish]
    if endless:
        raise Wrong(f"finish: choices {endless} have no end")


def assert_equal(found: Choices, known: Choices) -> None:
    """Two answers to the same question.

    Raises:
        Wrong: they differ.
    """
    for index, one in known.items():
        other = found[index]
        for name in ("token_ids", "text", "calls", "finish"):
            left, right = getattr(one, name), getattr(other, name)
            if left != right:
                raise Wrong(f"differs: {name} of choice {index}: {left!r}, now {right!r}")
        if len(one.logprobs) != len(other.logprobs) or any(
            abs(a - b) > TOLERANCE for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ):
            raise Wrong(f"differs: logprobs of choice {index}: {one.logprobs}, {other.logprobs}")
