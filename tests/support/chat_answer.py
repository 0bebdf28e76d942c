"""An answer's two forms, made from the same tokens and brought into one shape."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.ids import RequestId
from contracts.sampling import SamplingParams
from router.choice import Choice
from router.detokenizer import Vocabulary
from router.job import Usage
from router.pieces import Piece
from router.responses import Answer, AnswerHead
from router.rules import OutputRules
from router.sse import ChunkEncoder
from tests.support.fake_worker import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
EOS, OTHER_EOS = (TOKENIZER.token_to_id(t) or 0 for t in ("<|im_end|>", "<|endoftext|>"))
PROMPT = tuple(TOKENIZER.encode("prompt").ids)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def out(
    position: int,
    token_ids: Sequence[int],
    finish: FinishReason | None = None,
    logprobs: Sequence[TokenLogprob] = (),
    choice: int = 0,
) -> TokensOut:
    tokens = tuple(token_ids)
    return TokensOut(RequestId("r"), 0, choice, position, tokens, tuple(logprobs), finish)


def frames(
    token_ids: Sequence[int],
    finish: FinishReason,
    cuts: Sequence[int] = (),
    num_top: int | None = None,
) -> list[TokensOut]:
    """The same tokens in as many frames as there are cuts, and one more."""
    borders = sorted({0, *(cut for cut in cuts if 0 < cut < len(token_ids)), len(token_ids)})
    scores = [
        TokenLogprob(-0.5 - i, tuple((t + k, -0.25 - k) for k in range(num_top or 0)))
        for i, t in enumerate(token_ids)
    ]
    return [
        out(
            start,
            token_ids[start:end],
            finish if end == len(token_ids) else None,
            () if num_top is None else scores[start:end],
        )
        for start, end in pairwise(borders)
    ]


@dataclass
class Told:
    """What a client knows in the end."""

    role: str | None = None
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class Chat:
    """One request's settings; `run` makes a choice of them and sends it frames."""

    rules: OutputRules = field(default_factory=OutputRules)
    params: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=500, eos_token_ids=(EOS, OTHER_EOS))
    )
    echo: str = ""
    want_token_ids: bool = True

    @property
    def head(self) -> AnswerHead:
        return AnswerHead(
            "chatcmpl-1",
            1,
            "m",
            PROMPT,
            want_token_ids=self.want_token_ids,
            want_logprobs=self.params.logprobs is not None,
            echo=self.echo,
        )

    def choice(self, index: int = 0) -> Choice:
        return Choice(index, PROMPT, self.params, self.rules, VOCABULARY)

    def run(self, events: Sequence[TokensOut]) -> list[Piece]:
        choice, pieces = self.choice(), list[Piece]()
        for event in events:
            emitted = pieces[-1].completion_tokens if pieces else 0
            reasoned = pieces[-1].reasoning_tokens if pieces else 0
            piece = choice.add(event, emitted, reasoned)
            if piece is not None:
                pieces.append(piece)
        return pieces

    def usage(self, pieces: Sequence[Piece]) -> Usage:
        reasoned = pieces[-1].reasoning_tokens if self.rules.make_parser else None
        return Usage(len(PROMPT), pieces[-1].completion_tokens, 0, reasoned)

    def body(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        answer = Answer(self.head, 1)
        for piece in pieces:
            answer.add(piece)
        body: dict[str, Any] = json.loads(json.dumps(answer.body(self.usage(pieces), "hash")))
        return body

    def full(self, pieces: Sequence[Piece]) -> Told:
        body = self.body(pieces)
        choice = body["choices"][0]
        message = choice["message"]
        return Told(
            role=message["role"],
            content=message["content"] or "",
            reasoning=message["reasoning"] or "",
            calls=message.get("tool_calls", []),
            token_ids=choice["token_ids"] or [],
            logprobs=(choice["logprobs"] or {}).get("content", []),
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
            prompt_token_ids=body["prompt_token_ids"],
        )

    def chunks(self, pieces: Sequence[Piece], **options: bool) -> list[dict[str, Any]]:
        encoder = ChunkEncoder(self.head, **options)
        usage = self.usage(pieces)
        text = "".join(encoder.encode(piece, usage) for piece in pieces)
        text += encoder.end(usage).decode()
        blocks = text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def joined(chunks: Sequence[dict[str, Any]], index: int = 0) -> Told:
    """A choice's chunks put together, as a client would; checks what holds for each chunk."""
    told = Told()
    mine = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
    for at, chunk in enumerate(mine):
        part = chunk["choices"][0]
        delta = part["delta"]
        assert ("role" in delta) == (at == 0)
        assert (part["finish_reason"] is not None) == (at == len(mine) - 1)
        assert len({"content", "reasoning", "tool_calls"} & delta.keys()) == 1
        told.role = delta.get("role", told.role)
        told.content += delta.get("content", "")
        told.reasoning += delta.get("reasoning", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", ()):
            _add_call(told.calls, call)
        entries = (part["logprobs"] or {}).get("content", [])
        told.token_ids += part.get("token_ids", [])
        told.logprobs += entries
        if "prompt_token_ids" in chunk:
            assert at == 0
            told.prompt_token_ids = chunk["prompt_token_ids"]
        told.finish_reason = part["finish_reason"]
        told.stop_reason = part.get("stop_reason")
    return told


def _add_call(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    index = call.pop("index")
    if "id" in call:
        assert index == len(calls)
        assert call["function"]["arguments"] == ""
        calls.append(call)
    else:
        calls[index]["function"]["arguments"] += call["function"]["arguments"]
