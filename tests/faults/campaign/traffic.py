"""The requests of a campaign: a fixed pool made from its seed, and what each must be answered."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.campaign import answers
from tests.faults.campaign.client import Client, Json
from tests.faults.campaign.cluster import MODEL, ROUTERS, Cluster
from tests.faults.campaign.model import ARCHITECTURE, END_TOKEN

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
POOL = 150
_WORDS = (
    *("the", "sea", "wind", "long", "way", "home", "answer", "block", "chain", "river", "tower"),
    *("light", "morning", "garden", "number", "piece", "listen", "travel", "school", "silver"),
    *("stone", "letter", "kitchen", "window", "shadow", "market", "follow", "deliver"),
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
                "required": ["city", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"enum": [1, 22, 333]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["colour", "count", "flags"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """One of the pool. `plain`: greedy text without rules, which a stock model answers alike."""

    number: int
    path: str
    body: Json
    kind: str
    plain: bool = False
    can_stream: bool = True
    two_step: bool = True  # its second step draws the same tokens as the direct way

    def asked(self, *, stream: bool, salt: str) -> Json:
        """The body to send."""
        body = dict(self.body)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if salt:
            body["cache_salt"] = salt
        return body


def questions(seed: int, count: int = POOL) -> list[Question]:
    """The pool of a seed."""
    draws = random.Random(f"pool {seed}")
    openings = [_words(draws, n) for n in (12, 40, 80)]
    return [_question(draws, number, openings) for number in range(count)]


def _words(draws: random.Random, count: int) -> str:
    return " ".join(draws.choice(_WORDS) for _ in range(count))


def _question(draws: random.Random, number: int, openings: Sequence[str]) -> Question:
    kinds = (
        *("plain",) * 9,
        *("sampled",) * 4,
        *("several", "several", "logprobs", "logprobs", "stop", "min_tokens", "penalties"),
        *(
            "schema",
            "regex",
            "choice",
            "tools",
            "named_tool",
            "ids",
            "ids",
            "long",
            "beams",
            "talkative",
        ),
    )
    kind = kinds[number % len(kinds)]
    length = draws.choice((1, 3, 8, 20, 40, 90, 160))
    text = _words(draws, length)
    if draws.random() < 0.3:
        text = f"{draws.choice(openings)} {text}"
    chat = draws.random() < 0.6 or kind in ("schema", "tools", "named_tool")
    body: Json = {
        "model": MODEL,
        "max_tokens": draws.choice((1, 4, 8, 12, 16, 24)),
        "temperature": 0,
        "return_token_ids": True,
    }
    if draws.random() < 0.6:
        body["ignore_eos"] = True
    if kind == "ids":
        chat = False
        count = draws.choice((1, 17, 64, 200, 300))
        body["prompt"] = [draws.randrange(300, 2000) for _ in range(count)]
    elif chat:
        body["messages"] = [{"role": "user", "content": text}]
        if draws.random() < 0.3:
            body["messages"].insert(0, {"role": "system", "content": openings[0]})
    else:
        body["prompt"] = text
    body |= _extra(draws, kind, chat=chat)
    return Question(
        number,
        CHAT if chat else TEXT,
        body,
        kind,
        plain=kind in ("plain", "ids", "long"),
        can_stream=kind != "beams",
        two_step=kind != "beams",
    )


def _extra(draws: random.Random, kind: str, *, chat: bool) -> Json:
    sampled = {"temperature": draws.choice((0.7, 1.0)), "seed": draws.randrange(1 << 31)}
    logprobs: Json = {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
    match kind:
        case "sampled":
            return {**sampled, **draws.choice(({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}))}
        case "several":
            return {**sampled, "n": draws.choice((2, 3))}
        case "logprobs":
            return draws.choice(({}, sampled)) | logprobs
        case "stop":  # letters that random text soon has
            return {"stop": draws.choice((["e"], ["an", "o"], ["zz", "t"])), "max_tokens": 24}
        case "min_tokens":
            return {"min_tokens": 6, "max_tokens": 12, "ignore_eos": False}
        case "penalties":
            return {"presence_penalty": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.1}
        case "schema":
            form = {"name": "it", "schema": _SCHEMA, "strict": True}
            return {
                "response_format": {"type": "json_schema", "json_schema": form},
                "max_tokens": 90,
                "ignore_eos": False,
            }
        case "regex":
            return {
                "structured_outputs": {"regex": "(ab|cd){4}[0-9]{3}"},
                "max_tokens": 30,
                "ignore_eos": False,
            }
        case "choice":
            choice = {"choice": ["yes, of course", "no, never", "perhaps later"]}
            return {"structured_outputs": choice, "max_tokens": 30, "ignore_eos": False}
        case "tools" | "named_tool":
            named = {"type": "function", "function": {"name": "get_weather"}}
            return {
                "tools": _TOOLS,
                "tool_choice": "required" if kind == "tools" else named,
                "max_tokens": 90,
                "ignore_eos": False,
            }
        case "talkative":  # some 100 KiB, for clients that read slowly
            many: Json = {"logprobs": True, "top_logprobs": 20} if chat else {"logprobs": 20}
            return {**many, "max_tokens": 48, "ignore_eos": True}
        case "long":
            return {"max_tokens": 48, "ignore_eos": True}
        case "beams":
            return {"use_beam_search": True, "n": 2, "max_tokens": 6}
    return {}


async def expectations(cluster: Cluster, pool: Sequence[Question]) -> dict[int, Json]:
    """What each question is answered when nothing goes wrong."""
    found: dict[int, Json] = {}
    places = asyncio.Semaphore(4)

    async def ask(question: Question) -> None:
        async with places:
            port = cluster[ROUTERS[question.number % 2]].port
            body = question.asked(stream=False, salt="")
            reply = await Client(port, question.path, body, f"truth.{question.number}").run()
            try:
                found[question.number] = answers.canonical(reply, stream=False)
            except answers.Wrong as wrong:
                raise AssertionError(f"undisturbed, {question}: {wrong}") from wrong

    async with asyncio.TaskGroup() as tasks:
        for question in pool:
            tasks.create_task(ask(question))
    return found


async def check_plain(
    cluster: Cluster, model: Path, pool: Sequence[Question], expected: dict[int, Json]
) -> int:
    """Compare the greedy ones with what the stock model generates; how many there were."""
    import torch

    from tests.support.reference import greedy

    torch.set_num_threads(1)
    checked = 0
    for question in pool:
        if not question.plain:
            continue
        body = question.asked(stream=False, salt="")
        reply = await Client(cluster[ROUTERS[0]].port, question.path, body, "reference").run()
        choice = reply.json["choices"][0]
        prompt = reply.json.get("prompt_token_ids") or choice["prompt_token_ids"]
        ids = choice["token_ids"]
        if question.body.get("ignore_eos"):
            truth = greedy(model, ARCHITECTURE, prompt, len(ids))
            ended = truth[-1:] == [END_TOKEN]  # the stock model cannot go on after it
            alike = ids[: len(truth)] == truth and (ended or len(ids) == len(truth))
            if not alike or expected[question.number]["choices"][0]["token_ids"] != ids:
                raise AssertionError(f"{question}: {ids}, the stock model says {truth}")
            checked += 1
    return checked
