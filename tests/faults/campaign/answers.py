"""Answers in one form, streamed or not, chat or text; and whether two are the same."""

from collections.abc import Iterable
from typing import Any

from tests.faults.campaign.client import Json, Reply

TOLERANCE = 1e-4  # of log-probabilities


class Alternatives(list[tuple[str, float]]):
    """Tokens and their log-probabilities, best first. The last place may go to either of two."""


_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class Wrong(Exception):
    """An answer that must not be."""


def canonical(reply: Reply, *, stream: bool) -> Json:
    """The choices by index, and the usage.

    Raises:
        Wrong: the reply is no answer, or contradicts itself.
    """
    if reply.problem or not reply.complete:
        raise Wrong(f"the connection broke: {reply.problem} after {reply.body[-200:]!r}")
    if reply.status != 200:
        raise Wrong(f"HTTP {reply.status}: {reply.body[:500]!r}")
    if not stream:
        answer = reply.json
        choices = {choice["index"]: _full(choice) for choice in answer["choices"]}
        return {"choices": choices, "usage": _usage(answer["usage"])}
    events, done = reply.events()
    if not done:
        raise Wrong(f"the stream has no [DONE]: {reply.body[-300:]!r}")
    return joined(events)


def joined(events: list[Json], *, partial: bool = False) -> Json:
    """A stream put together. `partial`: it was cut, so ends may be missing."""
    choices: dict[int, Json] = {}
    usage: Json | None = None
    for event in events:
        if "error" in event:
            raise Wrong(f"an error in the stream: {event['error']}")
        if event.get("usage"):
            if usage is not None:
                raise Wrong("usage came twice")
            usage = _usage(event["usage"])
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], _empty())
            if choice["finish_reason"]:
                raise Wrong("something follows a choice's finish")
            _add(choice, part)
    if partial:
        return {"choices": choices, "usage": usage}
    if usage is None:
        raise Wrong("no usage came")
    if not all(choice["finish_reason"] for choice in choices.values()):
        raise Wrong("a choice has no end")
    return {"choices": choices, "usage": usage}


def _empty() -> Json:
    return {
        "text": "",
        "reasoning": "",
        "calls": [],
        "logprobs": [],
        "token_ids": [],
        "finish_reason": None,
        "stop_reason": None,
    }


def _add(choice: Json, part: Json) -> None:
    delta = part.get("delta") or {}
    choice["text"] += delta.get("content") or part.get("text") or ""
    choice["reasoning"] += delta.get("reasoning") or ""
    for call in delta.get("tool_calls") or []:
        calls = choice["calls"]
        if call["index"] == len(calls):
            calls.append({"name": call["function"]["name"], "arguments": ""})
        calls[call["index"]]["arguments"] += call["function"].get("arguments") or ""
    choice["logprobs"] += _logprobs(part.get("logprobs"))
    choice["token_ids"] += part.get("token_ids") or []
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
        choice["stop_reason"] = part.get("stop_reason")


def _full(choice: Json) -> Json:
    message = choice.get("message") or {}
    calls = [
        {key: call["function"][key] for key in ("name", "arguments")}
        for call in message.get("tool_calls") or []
    ]
    return {
        "text": message.get("content") or choice.get("text") or "",
        "reasoning": message.get("reasoning") or "",
        "calls": calls,
        "logprobs": _logprobs(choice.get("logprobs")),
        "token_ids": choice.get("token_ids") or [],
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
    }


def _alternatives(found: Iterable[tuple[str, float]]) -> Alternatives:
    return Alternatives(sorted(found, key=lambda one: (-one[1], one[0])))


def _logprobs(found: Json | None) -> list[Any]:
    """[token, log-probability, alternatives], for chat and for text."""
    if not found:
        return []
    if "content" in found:
        return [
            [
                one["token"],
                one["logprob"],
                _alternatives((t["token"], t["logprob"]) for t in one["top_logprobs"]),
            ]
            for one in found["content"] or []
        ]
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return [
        [token, value, _alternatives((top or {}).items())]
        for token, value, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    ]


def _usage(usage: Json) -> Json:
    return {name: usage[name] for name in _USAGE}


def differences(expected: Any, found: Any, where: str = "answer") -> str:
    """Where two answers differ; empty if they do not."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return f"{where}: {sorted(expected)} and {sorted(found)}"
        pairs = [(expected[key], found[key], f"{where}.{key}") for key in expected]
    elif isinstance(expected, Alternatives) and isinstance(found, Alternatives):
        return _other_alternatives(expected, found, where)
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        if len(expected) != len(found):
            return f"{where}: {len(expected)} and {len(found)} items: {expected!r} {found!r}"[:900]
        pairs = [
            (one, other, f"{where}[{index}]")
            for index, (one, other) in enumerate(zip(expected, found, strict=True))
        ]
    elif isinstance(expected, float) and isinstance(found, float):
        return "" if abs(expected - found) <= TOLERANCE else f"{where}: {expected} {found}"
    else:
        return "" if expected == found else f"{where}: {expected!r} {found!r}"[:900]
    return next((d for one, other, at in pairs if (d := differences(one, other, at))), "")


def _other_alternatives(expected: Alternatives, found: Alternatives, where: str) -> str:
    ours, theirs = [[value for _, value in one] for one in (expected, found)]
    if difference := differences(ours, theirs, where):
        return difference
    last = min(ours, default=0.0)
    for one, other in ((expected, dict(found)), (found, dict(expected))):
        for token, value in one:
            if token not in other and value - last > 2 * TOLERANCE:
                return f"{where}: {token!r} of {value} is missing"
    return ""


def is_start_of(expected: Json, part: Json) -> str:
    """Why the cut stream `part` is no beginning of the answer; empty if it is."""
    for index, choice in part["choices"].items():
        whole = expected["choices"].get(index)
        if whole is None:
            return f"choice {index} is not expected"
        for key in ("text", "token_ids", "reasoning"):
            if whole[key][: len(choice[key])] != choice[key]:
                return f"choice {index}.{key}: {whole[key]!r} {choice[key]!r}"
    return ""
