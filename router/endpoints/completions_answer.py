"""Text completions as clients see them: the full answer and the chunks of a stream."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.errors import ServingError
from router.job import Usage
from router.logprobs import LIGHT_ENTRIES, LogprobEntry, PromptEntry, prompt_logprobs_json
from router.offload import dumps, dumps_in_steps
from router.pieces import Gathered, Piece
from router.responses import fingerprint, usage_json
from router.sse import DONE, error_events


@dataclass(frozen=True, slots=True)
class CompletionHead:
    """What is the same in all chunks, and what the client asked to see.

    `echoes` holds each prompt's text if it is to be shown in front of its choices. Choices are
    numbered prompt by prompt, `n` of each.
    """

    response_id: str
    created: int  # Unix seconds
    model: str
    prompts: tuple[tuple[int, ...], ...]
    n: int = 1
    echoes: tuple[str, ...] = ()
    want_token_ids: bool = False
    want_logprobs: bool = False
    want_prompt_logprobs: bool = False
    scores_only: bool = False  # what was generated is not shown

    @property
    def num_choices(self) -> int:
        """Of all prompts together."""
        return self.n * len(self.prompts)

    def prompt_of(self, choice: int) -> int:
        """The number of a choice's prompt."""
        return choice // self.n

    def echo_of(self, choice: int) -> str:
        """What is shown in front of a choice."""
        return self.echoes[choice // self.n] if self.echoes else ""


PromptScores = Sequence[Sequence[PromptEntry] | None]
"""By prompt: the entries of its tokens, None if there are none."""


class LegacyLogprobs:
    """The `logprobs` object of one choice, which counts text offsets from chunk to chunk.

    Offsets are characters of the choice's text as its tokens spell it, the echoed prompt included.
    """

    def __init__(self) -> None:
        self._offset = 0

    def take(
        self, entries: Iterable[LogprobEntry], prompt: Iterable[PromptEntry] = ()
    ) -> dict[str, Any]:
        """The object for further tokens, after those of an echoed prompt."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        rows = [
            *((p.token, p.logprob, tuple((t, v) for _, t, v in p.top)) for p in prompt),
            *((entry.token, entry.logprob, entry.top) for entry in entries),
        ]
        for token, value, top in rows:
            tokens.append(token)
            values.append(value)
            tops.append(None if value is None else _top(token, value, top))
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _top(token: str, value: float, top: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The best by text, and the token itself; of those that read the same the best counts."""
    found: dict[str, float] = {}
    for name, logprob in top:
        found.setdefault(name, logprob)
    found.setdefault(token, value)
    return found


class CompletionAnswer:
    """Gathers pieces into the body of a full answer."""

    def __init__(self, head: CompletionHead) -> None:
        self._head = head
        self._choices = [Gathered() for _ in range(head.num_choices)]

    def add(self, piece: Piece) -> None:
        """Take the next piece of its choice."""
        self._choices[piece.choice].add(piece)

    @property
    def num_entries(self) -> int:
        """How many output tokens come with log-probabilities."""
        return sum(len(choice.entries) for choice in self._choices)

    def body(
        self,
        usage: Usage,
        semantic_hash: str | None,
        scores: PromptScores,
        kv_transfer_params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The JSON body."""
        head = self._head
        return {
            "id": head.response_id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(i, c, scores) for i, c in enumerate(self._choices)],
            "usage": usage_json(shown_usage(head, usage)),
            "service_tier": None,
            "system_fingerprint": fingerprint(semantic_hash),
            "kv_transfer_params": kv_transfer_params,
        }

    def _choice(self, index: int, choice: Gathered, scores: PromptScores) -> dict[str, Any]:
        head = self._head
        number = head.prompt_of(index)
        prompt = scores[number] or ()
        if head.scores_only:
            choice = Gathered(finish_reason="length")
        logprobs = LegacyLogprobs().take(choice.entries, prompt if head.echoes else ())
        return {
            "index": index,
            "text": head.echo_of(index) + choice.content,
            "logprobs": logprobs if head.want_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if head.want_token_ids else None,
            "prompt_token_ids": list(head.prompts[number]) if head.want_token_ids else None,
            "prompt_logprobs": prompt_logprobs_json(prompt) if head.want_prompt_logprobs else None,
        }


class CompletionChunks:
    """Pieces to events."""

    def __init__(
        self,
        head: CompletionHead,
        scores: Callable[[int], Sequence[PromptEntry] | None],
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        """`scores` gives the entries of a prompt by its number, once one of its pieces came."""
        self._head = head
        self._scores = scores
        self._include_usage = include_usage
        self._continuous = include_usage and continuous_usage
        self._logprobs = [LegacyLogprobs() for _ in range(head.num_choices)]
        self._always = head.want_token_ids or head.want_logprobs
        self._scored: dict[int, Sequence[PromptEntry]] = {}  # by prompt, for its other choices
        self._waiting = [head.n] * len(head.prompts)  # choices that have not begun

    def heavy(self, pieces: Sequence[Piece]) -> bool:
        """Whether a long prompt's log-probabilities are among these."""
        return bool(self._head.want_logprobs and self._head.echoes) and any(
            piece.first and self._long(piece.choice) for piece in pieces
        )

    def _long(self, choice: int) -> bool:
        return len(self._head.prompts[self._head.prompt_of(choice)]) > LIGHT_ENTRIES

    def encode(self, piece: Piece, usage: Usage) -> str:
        """The chunk of a piece; empty if there is nothing to see in it."""
        head = self._head
        index, text = piece.choice, piece.text
        echo = head.echo_of(index) if piece.first else ""
        scored = piece.first and bool(head.echoes)
        entries: Sequence[LogprobEntry] = piece.logprobs
        token_ids: Sequence[int] = piece.token_ids
        if head.scores_only:
            text, entries, token_ids = "", (), ()
        finished = piece.finish_reason is not None
        if not (echo or text or piece.first or finished or self._always):
            return ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + text,
            "logprobs": None,
            "finish_reason": "length" if head.scores_only and finished else piece.finish_reason,
            "stop_reason": None if head.scores_only else piece.stop_reason,
        }
        number = head.prompt_of(index)
        if head.want_logprobs:
            prompt = self._entries(number) if scored else ()
            choice["logprobs"] = self._logprobs[index].take(entries, prompt)
        if head.want_token_ids:
            choice["token_ids"] = list(token_ids)
            if piece.first:
                choice["prompt_token_ids"] = list(head.prompts[number])
        running = self._running(piece, usage) if self._continuous else None
        return self._event([choice], running, heavy=scored and self._long(index))

    def end(self, usage: Usage) -> bytes:
        """The last events: usage if it was asked for, then the end mark."""
        if not self._include_usage:
            return DONE
        return self._event([], usage_json(shown_usage(self._head, usage))).encode() + DONE

    def error(self, error: ServingError) -> bytes:
        """The error, then the end mark."""
        return error_events(error)

    def _entries(self, number: int) -> Sequence[PromptEntry]:
        """Those of a prompt, for the next of its choices."""
        entries = self._scored.pop(number, None) or self._scores(number) or ()
        self._waiting[number] -= 1
        if self._waiting[number]:
            self._scored[number] = entries
        return entries

    def _running(self, piece: Piece, usage: Usage) -> dict[str, Any]:
        now = Usage(usage.prompt_tokens, piece.completion_tokens, usage.cached_tokens)
        return usage_json(shown_usage(self._head, now))

    def _event(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, *, heavy: bool = False
    ) -> str:
        head = self._head
        chunk: dict[str, Any] = {
            "id": head.response_id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }
        if usage is not None:
            chunk["usage"] = usage
        return event(chunk, heavy=heavy)


def event(body: dict[str, Any], name: str = "", *, heavy: bool = False) -> str:
    """One server-sent event; a heavy one is written in a thread."""
    data = dumps_in_steps(body) if heavy else dumps(body)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


def shown_usage(head: CompletionHead, usage: Usage) -> Usage:
    """The counts; what is generated only to score a prompt counts nothing."""
    completion = 0 if head.scores_only else usage.completion_tokens
    return Usage(usage.prompt_tokens, completion, usage.cached_tokens)
