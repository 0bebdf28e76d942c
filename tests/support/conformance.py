"""The conformance suite's client: the official `openai` package, answers as plain JSON."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIStatusError, OpenAI
from tokenizers import Tokenizer

QUESTION = "Tell me about the sea."
_BIG_BYTES = 100_000  # whole vocabularies of log-probabilities: seconds to parse
TOLERANCE = 1e-4  # of log-probabilities, in float32
_CHANGING = frozenset({"id", "created", "cached_tokens", "kv_transfer_params"})
Json = dict[str, Any]


class Refused(Exception):
    """An error answer: HTTP status and the `error` object."""

    def __init__(self, status: int, error: Json) -> None:
        super().__init__(f"{status} {error}")
        self.status = status
        self.error = error


@dataclass
class Api:
    """One server. Every answer is also written down, to compare servers by.

    Without other wishes a request is greedy and short, and asks one short question.
    """

    client: OpenAI
    model: str
    tokenizer: Tokenizer
    url: str  # http://host:port
    answers: list[Json] = field(default_factory=list[Json])

    def body(self, content: Any = QUESTION, **fields: Any) -> Json:
        """A request's fields, with the suite's defaults."""
        message = {"role": "user", "content": content}
        defaults = {"model": self.model, "messages": [message], "temperature": 0}
        limit = {} if "max_completion_tokens" in fields else {"max_tokens": 8}
        return {**defaults, **limit, **fields}

    def chat(self, content: Any = QUESTION, **fields: Any) -> Json:
        """The full answer.

        Raises:
            Refused: an error answer.
        """
        arguments = self._arguments(self.body(content, **fields))
        try:
            raw = self.client.chat.completions.with_raw_response.create(**arguments)
        except APIStatusError as error:
            raise Refused(error.status_code, error.response.json()["error"]) from None
        if len(raw.content) < _BIG_BYTES:
            raw.parse()  # the client's own types must take it
        answer: Json = json.loads(raw.content)
        self.answers.append(answer)
        return answer

    def chunks(self, content: Any = QUESTION, **fields: Any) -> list[Json]:
        """The stream's chunks.

        Raises:
            Refused: an error answer instead of a stream.
        """
        arguments = self._arguments(self.body(content, **fields))
        try:
            with self.client.chat.completions.create(**arguments, stream=True) as stream:
                return [chunk.model_dump(exclude_unset=True) for chunk in stream]
        except APIStatusError as error:
            raise Refused(error.status_code, error.response.json()["error"]) from None

    def _arguments(self, body: Json) -> Json:
        """What the client names itself as such, the rest as `extra_body`."""
        extra = {key: value for key, value in body.items() if key not in _OPENAI}
        named = {key: value for key, value in body.items() if key in _OPENAI}
        return {**named, "extra_body": extra}

    def refused(self, content: Any = QUESTION, **fields: Any) -> Refused:
        """The error that a request gets; streamed or not makes no difference."""
        try:
            answer = self.chat(content, **fields)
        except Refused as refusal:
            return refusal
        raise AssertionError(f"not refused: {str(answer)[:300]}")

    def post(self, path: str, body: Json, headers: Mapping[str, str] | None = None) -> Json:
        """Any other endpoint.

        Raises:
            Refused: an error answer.
        """
        response = httpx.post(self.url + path, json=body, headers=headers, timeout=60)
        answer: Json = response.json()
        if response.status_code != 200:
            raise Refused(response.status_code, answer["error"])
        return answer

    def prompt(self, content: Any = QUESTION, **fields: Any) -> str:
        """The prompt's text as the model saw it."""
        return self.decode(self.prompt_ids(content, **fields))

    def prompt_ids(self, content: Any = QUESTION, **fields: Any) -> list[int]:
        """The prompt's token ids."""
        answer = self.chat(content, return_token_ids=True, **{"max_tokens": 1, **fields})
        ids: list[int] = answer["prompt_token_ids"]
        assert len(ids) == answer["usage"]["prompt_tokens"]
        return ids

    def ids(self, content: Any = QUESTION, **fields: Any) -> list[int]:
        """The first choice's generated token ids."""
        answer = self.chat(content, return_token_ids=True, **fields)
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


_OPENAI = frozenset(inspect.signature(OpenAI(api_key="-").chat.completions.create).parameters) - {
    "extra_body",
    "extra_headers",
    "extra_query",
    "timeout",
}


def text_of(answer: Json, index: int = 0) -> str:
    """A choice's content."""
    content = answer["choices"][index]["message"]["content"]
    assert isinstance(content, str), answer
    return content


def joined(chunks: list[Json]) -> dict[int, Json]:
    """A stream put together: what the full answer has, choice by choice."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"],
                {
                    "role": None,
                    "content": "",
                    "reasoning": "",
                    "tool_calls": [],
                    "logprobs": [],
                    "token_ids": [],
                    "finish_reason": None,
                    "stop_reason": None,
                },
            )
            assert choice["finish_reason"] is None, "something follows the finish"
            _join(choice, part)
    assert all(choice["finish_reason"] for choice in choices.values()), "a choice has no end"
    return {index: choices[index] for index in sorted(choices)}


def _join(choice: Json, part: Json) -> None:
    delta = part["delta"]
    if delta.get("role"):
        assert choice["role"] is None, "the role comes once"
        choice["role"] = delta["role"]
    choice["content"] += delta.get("content") or ""
    choice["reasoning"] += delta.get("reasoning") or ""
    for call in delta.get("tool_calls") or []:
        calls = choice["tool_calls"]
        if call["index"] == len(calls):
            assert call["id"]
            assert call["function"]["name"]
            calls.append({"name": call["function"]["name"], "arguments": ""})
        else:
            assert not call.get("id")
            assert not call["function"].get("name")
        calls[call["index"]]["arguments"] += call["function"].get("arguments") or ""
    choice["logprobs"] += (part.get("logprobs") or {}).get("content") or []
    choice["token_ids"] += part.get("token_ids") or []
    if part["finish_reason"]:
        choice["finish_reason"] = part["finish_reason"]
        choice["stop_reason"] = part.get("stop_reason")


def as_joined(answer: Json) -> dict[int, Json]:
    """A full answer in the form of `joined`."""
    return {
        choice["index"]: {
            "role": choice["message"]["role"],
            "content": choice["message"]["content"] or "",
            "reasoning": choice["message"].get("reasoning") or "",
            "tool_calls": [
                {key: call["function"][key] for key in ("name", "arguments")}
                for call in choice["message"].get("tool_calls") or []
            ],
            "logprobs": (choice["logprobs"] or {}).get("content") or [],
            "token_ids": choice.get("token_ids") or [],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in answer["choices"]
    }


def assert_same(one: Any, other: Any, where: str = "answer") -> None:
    """Two servers' answers are equal, but for what every answer has of its own."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [{key for key, value in d.items() if value is not None} for d in (one, other)]
        assert keys[0] == keys[1], where
        for key in keys[0] - _CHANGING:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), f"{where}: {one} {other}"
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert abs(one - other) <= TOLERANCE, where
    else:
        assert one == other, f"{where}: {one!r} {other!r}"
