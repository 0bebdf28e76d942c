"""Many cheap concurrent requests and what came of each, comparable with an undisturbed run."""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=180, sock_connect=10)
_TOLERANCE = 1e-3  # of log-probabilities: the sums of another batch
Json = dict[str, Any]

_WORDS = "sea river stone lamp north quiet seven paper cloud engine bread glass".split(" ")  # noqa: SIM905
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 60},
                "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 8},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": _TOOL["function"]["parameters"]},  # type: ignore[index]
}
# Everything that a replay must carry over: draws, several choices, scores, grammars.
_KINDS: tuple[Json, ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 0.8, "seed": 2, "n": 2},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.9, "seed": 3, "tools": [_TOOL], "tool_choice": "required"},
    {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.6, "stream": False},
    {"temperature": 0.9, "seed": 5, "response_format": _SCHEMA},
    {"temperature": 0.8, "seed": 6, "n": 2, "logprobs": True, "stop": ["zzzz"]},
)
_STRUCTURED = ("tools", "response_format")


def varied(
    count: int, *, tokens: tuple[int, int], seed: int = 0, model: str = "demo"
) -> list[Json]:
    """`count` request bodies of all kinds, each with its own prompt and a length in `tokens`."""
    draw = random.Random(seed)
    bodies = []
    for number in range(count):
        words = draw.choices(_WORDS, k=draw.choice((4, 30, 200)))
        body: Json = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"{number} {' '.join(words)}"}],
            "max_tokens": draw.randint(*tokens),
            "stream": True,
            **_KINDS[number % len(_KINDS)],
        }
        if not any(key in body for key in _STRUCTURED):
            body["ignore_eos"] = True
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        bodies.append(body)
    return bodies


@dataclass
class Choice:
    """One choice of an answer."""

    text: str = ""
    calls: dict[int, str] = field(default_factory=dict[int, str])  # name and arguments
    tokens: list[str] = field(default_factory=list[str])  # where log-probabilities were asked
    logprobs: list[float] = field(default_factory=list[float])
    finish: str | None = None

    def take(self, part: Json) -> None:
        """A message, or a piece of one."""
        self.text += part.get("content") or ""
        for index, call in enumerate(part.get("tool_calls") or []):
            index = call.get("index", index)
            function = call["function"]
            said = (function.get("name") or "") + (function.get("arguments") or "")
            self.calls[index] = self.calls.get(index, "") + said

    def score(self, logprobs: Json | None) -> None:
        """What `logprobs` of a choice says."""
        for entry in (logprobs or {}).get("content") or []:
            self.tokens.append(entry["token"])
            self.logprobs.append(entry["logprob"])


@dataclass(eq=False)
class Answer:
    """What a client has got so far. `error` is empty if all was well, or nothing is yet."""

    status: int = 0
    pieces: int = 0  # events with something in them
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    usage: tuple[int, int] | None = None
    done: bool = False  # it came to its regular end
    error: str = ""
    over_at: float = math.inf  # time.monotonic()

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.over_at < math.inf

    def differs(self, other: "Answer") -> str:
        """How it is not what `other` is; empty if it is."""
        if self.error or not self.done:
            return self.error or "it did not end"
        if self.usage != other.usage:
            return f"usage {self.usage}, not {other.usage}"
        if self.choices.keys() != other.choices.keys():
            return f"choices {sorted(self.choices)}, not {sorted(other.choices)}"
        for index, choice in self.choices.items():
            expected = other.choices[index]
            for name in ("text", "calls", "tokens", "finish"):
                got, wanted = getattr(choice, name), getattr(expected, name)
                if got != wanted:
                    return f"choice {index}: {name} {got!r}, not {wanted!r}"
            near = (
                math.isclose(a, b, abs_tol=_TOLERANCE)
                for a, b in zip(choice.logprobs, expected.logprobs, strict=True)
            )
            if not all(near):
                return f"choice {index}: log-probabilities differ"
        return ""

    def take(self, event: Json) -> None:
        """A chunk, or the whole answer."""
        if "error" in event:
            self.error = f"error {event['error']}"
        if event.get("usage"):
            usage = event["usage"]
            self.usage = (usage["prompt_tokens"], usage["completion_tokens"])
        for part in event.get("choices", ()):
            self.pieces += 1
            choice = self.choices.setdefault(part["index"], Choice())
            choice.take(part.get("delta") or part.get("message") or {})
            choice.score(part.get("logprobs"))
            choice.finish = part.get("finish_reason") or choice.finish


async def ask(session: aiohttp.ClientSession, url: str, body: Json, answer: Answer) -> None:
    """Send one request and fill `answer`; whatever goes wrong is written there."""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:300]}"
            elif not body["stream"]:
                answer.take(await response.json())
                answer.done = True
            else:
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        answer.done = True
                    elif line.startswith(b"data: "):
                        answer.take(json.loads(line[6:]))
                if not answer.done and not answer.error:
                    answer.error = "it ended without [DONE]"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        answer.error = answer.error or f"{type(error).__name__}: {error}"
    finally:
        answer.over_at = time.monotonic()


class Traffic:
    """Closed loops that send requests of a pool again and again; an async context manager.

    Leaving it lets what runs end. `answers` has every request that was begun, with its body's
    place in the pool.
    """

    def __init__(self, url: str, pool: Sequence[Json], *, clients: int, seed: int = 0) -> None:
        self.answers: list[tuple[int, Answer]] = []
        self._url = url
        self._pool = pool
        self._clients = clients
        self._draw = random.Random(seed)
        self._stop = False
        self._current: dict[int, Answer] = {}

    async def __aenter__(self) -> "Traffic":
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)
        loops = (self._loop(client) for client in range(self._clients))
        self._tasks = [asyncio.create_task(loop, name="client") for loop in loops]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        try:
            if error[0] is not None:
                for task in self._tasks:
                    task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=error[0] is not None)
        finally:
            await self._session.close()

    async def _loop(self, client: int) -> None:
        while not self._stop:
            place = self._draw.randrange(len(self._pool))
            self._current[client] = answer = Answer()
            self.answers.append((place, answer))
            await ask(self._session, self._url, self._pool[place], answer)

    def stop(self) -> None:
        """Begin no more requests."""
        self._stop = True

    def running(self) -> list[Answer]:
        """Answers that have begun to come and not ended."""
        return [a for a in self._current.values() if a.pieces and not a.done and not a.error]

    def open(self) -> list[Answer]:
        """Requests that are not over."""
        return [answer for _, answer in self.answers if not answer.over]

    def ended(self) -> int:
        """How many requests are over."""
        return len(self.answers) - len(self.open())

    def wrong(self, expected: Sequence[Answer]) -> list[str]:
        """What differs from the undisturbed answers, for people."""
        found = ((place, answer.differs(expected[place])) for place, answer in self.answers)
        return [f"request {place}: {how}" for place, how in found if how]


async def undisturbed(url: str, pool: Sequence[Json]) -> list[Answer]:
    """The answers of a healthy cluster, by place in the pool.

    Raises:
        AssertionError: one is none.
    """
    answers = [Answer() for _ in pool]
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        await asyncio.gather(
            *(ask(session, url, body, answer) for body, answer in zip(pool, answers, strict=True))
        )
    for place, answer in enumerate(answers):
        assert answer.done, f"request {place}, after {answer.pieces} pieces: {answer.error}"
        assert not answer.error, f"request {place}: {answer.error}"
    return answers


async def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait without stopping the clients."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s:.0f} s for {what}") from None
