"""The full answer of a chat that is not streamed, and what both kinds of answer share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from router.job import Usage
from router.logprobs import PromptEntry, logprobs_json, prompt_logprobs_json
from router.pieces import Gathered, Piece


def version() -> str:
    """The installed version; `0` when run from a bare checkout."""
    try:
        return metadata.version("baton-serve")
    except metadata.PackageNotFoundError:
        return "0"


_VERSION = version()


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What is the same in every chunk of an answer, and what the client asked to see.

    `echo` is text that goes in front of each choice's content.
    """

    response_id: str
    created: int  # Unix seconds
    model: str
    prompt_ids: tuple[int, ...]
    want_token_ids: bool = False
    want_logprobs: bool = False
    want_prompt_logprobs: bool = False
    role: str = "assistant"
    echo: str = ""


def fingerprint(semantic_hash: str | None) -> str:
    """A stable text for build and model: it changes when results may change."""
    digest = hashlib.sha256(f"{_VERSION}|{semantic_hash}".encode()).hexdigest()
    return f"fp_{digest[:12]}"


def usage_json(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        body["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return body


class Answer:
    """Gathers pieces into the body of a full answer."""

    def __init__(self, head: AnswerHead, num_choices: int) -> None:
        self._head = head
        self.choices = [Gathered() for _ in range(num_choices)]

    def add(self, piece: Piece) -> None:
        """Take the next piece of its choice."""
        self.choices[piece.choice].add(piece)

    @property
    def num_entries(self) -> int:
        """How many tokens come with log-probabilities."""
        return sum(len(choice.entries) for choice in self.choices)

    def body(
        self,
        usage: Usage,
        semantic_hash: str | None,
        *,
        prompt: Sequence[PromptEntry] | None = None,
        kv_transfer_params: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """The JSON body. `prompt` is shown if the client wants the prompt's log-probabilities."""
        head = self._head
        scored = prompt is not None and head.want_prompt_logprobs
        return {
            "id": head.response_id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(i, choice) for i, choice in enumerate(self.choices)],
            "usage": usage_json(usage),
            "service_tier": None,
            "system_fingerprint": fingerprint(semantic_hash),
            "prompt_logprobs": prompt_logprobs_json(prompt or ()) if scored else None,
            "prompt_token_ids": list(head.prompt_ids) if head.want_token_ids else None,
            "kv_transfer_params": kv_transfer_params,
        }

    def _choice(self, index: int, choice: Gathered) -> dict[str, Any]:
        head = self._head
        return {
            "index": index,
            "message": message_json(choice, role=head.role, echo=head.echo),
            "logprobs": logprobs_json(choice.entries) if head.want_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if head.want_token_ids else None,
        }


def message_json(choice: Gathered, *, role: str, echo: str) -> dict[str, Any]:
    """The `message` object. No content beside calls or thoughts is null, not empty."""
    content, reasoning = echo + choice.content, choice.reasoning or None
    message: dict[str, Any] = {
        "role": role,
        "content": content if content or not (choice.calls or reasoning) else None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
    }
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls.values()
        ]
    return message
