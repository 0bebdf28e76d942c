"""The full answer of a request that is not streamed, and what both kinds of answer share."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from router.choice import LogprobEntry, Piece
from router.job import Usage


def version() -> str:
    """The installed version; `0` when run from a bare checkout."""
    try:
        return metadata.version("baton-serve")
    except metadata.PackageNotFoundError:
        return "0"


_VERSION = version()


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What is the same in every chunk of an answer, and what the client asked to see."""

    response_id: str
    created: int  # Unix seconds
    model: str
    prompt_ids: tuple[int, ...]
    want_token_ids: bool = False
    want_logprobs: bool = False


def fingerprint(semantic_hash: str | None) -> str:
    """A stable text for build and model: it changes when results may change."""
    digest = hashlib.sha256(f"{_VERSION}|{semantic_hash}".encode()).hexdigest()
    return f"fp_{digest[:12]}"


def usage_json(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def logprobs_json(entries: Iterable[LogprobEntry]) -> dict[str, Any]:
    """The `logprobs` object of a choice or chunk."""
    return {
        "content": [
            {
                **_token_json(entry.token, entry.logprob),
                "top_logprobs": [_token_json(token, value) for token, value in entry.top],
            }
            for entry in entries
        ]
    }


def _token_json(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


@dataclass(slots=True)
class _Gathered:
    """One choice's pieces."""

    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    entries: list[LogprobEntry] = field(default_factory=list[LogprobEntry])
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Answer:
    """Gathers pieces into the body of a full answer."""

    def __init__(self, head: AnswerHead, num_choices: int) -> None:
        self._head = head
        self._choices = [_Gathered() for _ in range(num_choices)]

    def add(self, piece: Piece) -> None:
        """Take the next piece of its choice."""
        choice = self._choices[piece.choice]
        choice.texts.append(piece.text)
        choice.token_ids.extend(piece.token_ids)
        choice.entries.extend(piece.logprobs)
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            choice.stop_reason = piece.stop_reason

    def body(self, usage: Usage, semantic_hash: str | None) -> dict[str, Any]:
        """The JSON body."""
        head = self._head
        return {
            "id": head.response_id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(i, choice) for i, choice in enumerate(self._choices)],
            "usage": usage_json(usage),
            "service_tier": None,
            "system_fingerprint": fingerprint(semantic_hash),
            "prompt_logprobs": None,
            "prompt_token_ids": list(head.prompt_ids) if head.want_token_ids else None,
            "kv_transfer_params": None,
        }

    def _choice(self, index: int, choice: _Gathered) -> dict[str, Any]:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(choice.texts),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
                "reasoning_content": None,
            },
            "logprobs": logprobs_json(choice.entries) if self._head.want_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self._head.want_token_ids else None,
        }
