"""The traffic: what is asked, how, and who leaves when. A plan depends on its seed and number."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.demo_model import PROSE
from tests.support.mutations import mutated

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
Json = dict[str, Any]
Draws = random.Random

_WORDS = PROSE.split()
_SHARED = [" ".join(_WORDS[start : start + 90]) for start in (0, 60, 150, 240)]
LEAVING = 0.34  # of all clients
LEASE_S = 30.0  # of what nobody adopts, with some room


@dataclass(frozen=True, slots=True)
class Leave:
    """A client that goes before its answer is complete."""

    how: Literal["soon", "events", "stalls"]
    after_s: float = 0.0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: its answer is the same each time, streamed or not."""

    kind: str
    path: str
    fields: Json
    choices: int = 1

    @property
    def may_take_two_steps(self) -> bool:
        """One prompt, no beams, no scores of the prompt (docs/api.md)."""
        unfit = {"use_beam_search", "prompt_logprobs", "echo"} & set(self.fields)
        return not unfit and not isinstance(self.fields.get("prompt"), list)


@dataclass(frozen=True, slots=True)
class Plan:
    """One request."""

    index: int
    kind: str
    path: str
    body: Json = field(default_factory=dict[str, Any])
    choices: int = 1
    leave: Leave | None = None
    reference: int | None = None  # the answer is known
    two_step: Literal["", "adopt", "abandon"] = ""
    raw: bytes | None = None  # mutated: an error of the client's is a right answer

    @property
    def stream(self) -> bool:
        """Whether server-sent events are asked for."""
        return bool(self.body.get("stream"))


class Mix:
    """All plans of a run."""

    def __init__(self, seed: int, *, num_references: int = 24) -> None:
        self._seed = seed
        draws = Draws(f"{seed} references")
        self.references = tuple(ask(draws) for _ in range(num_references))
        self._numbers = list(range(num_references))
        self._two_step = [i for i, one in enumerate(self.references) if one.may_take_two_steps]

    def forget_reference(self, number: int) -> None:
        """Its answer could not be learnt: it is asked no more."""
        self._numbers.remove(number)
        self._two_step = [one for one in self._two_step if one != number]

    def plan(self, index: int, *, room_s: float) -> Plan:
        """Request number `index`; traffic goes on for `room_s`, then all must be idle."""
        draws = Draws(f"{self._seed} {index}")
        roll = draws.random()
        if roll < 0.08:
            return self._malformed(draws, index, lease_fits=room_s > LEASE_S)
        if roll < 0.14 and self._two_step:
            return self._handoff(draws, index, lease_fits=room_s > LEASE_S)
        if roll < 0.145:
            return _flood(draws, index)
        if roll < 0.40 and self._numbers:
            number = draws.choice(self._numbers)
            return _sent(draws, index, self.references[number], number)
        return _sent(draws, index, ask(draws), None)

    def _handoff(self, draws: Draws, index: int, *, lease_fits: bool) -> Plan:
        number = draws.choice(self._two_step)
        abandon = draws.random() < 0.4 and lease_fits
        plan = _sent(draws, index, self.references[number], number)
        step: Literal["adopt", "abandon"] = "abandon" if abandon else "adopt"
        leave = None if abandon else plan.leave
        return replace(plan, kind=f"two-step {step}", two_step=step, leave=leave)

    def _malformed(self, draws: Draws, index: int, *, lease_fits: bool) -> Plan:
        chat = draws.random() < 0.8
        while True:
            raw = mutated(draws, chat=chat)
            if lease_fits or b"do_remote_decode" not in raw:
                return Plan(index, "mutated", CHAT if chat else TEXT, raw=raw)


def _sent(draws: Draws, index: int, question: Ask, reference: int | None) -> Plan:
    body = {**question.fields, "model": "demo"}
    if draws.random() < 0.6 and "prompt_logprobs" not in body:
        body["stream"] = True
        if draws.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    if draws.random() < 0.05:
        body["priority"] = draws.randrange(-3, 4)
    leave = _leave(draws, stream="stream" in body) if draws.random() < LEAVING else None
    kind = question.kind if reference is None else "reference"
    return Plan(index, kind, question.path, body, question.choices, leave, reference)


def _leave(draws: Draws, *, stream: bool) -> Leave:
    roll = draws.random()
    if not stream or roll < 0.4:  # queued, prefilling, or a little later
        return Leave("soon", after_s=draws.choice([0.0, 0.002, 0.01, 0.03, 0.1, 0.3]))
    if roll < 0.9:
        return Leave("events", events=draws.choice([1, 1, 2, 3, 5, 9, 20]))
    return Leave("stalls", after_s=draws.choice([0.2, 1.0, 3.0]))


def _flood(draws: Draws, index: int) -> Plan:
    """Megabytes that a client asks for, begins to read, and does not take."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": _words(draws, 8)}],
        **{"n": 4, "temperature": 1.0, "seed": index, "max_tokens": 300, "ignore_eos": True},
        **{"logprobs": True, "top_logprobs": 20, "stream": True},
    }
    return Plan(index, "flood", CHAT, body, 4, Leave("stalls", after_s=draws.choice([2.0, 6.0])))


# Questions


def ask(draws: Draws) -> Ask:
    """A question that decides everything: greedy, or with a seed."""
    fields: Json = {
        "max_tokens": draws.choice([1, 2, 4, 8, 16, 24, 48]),
        "return_token_ids": True,
        **_sampling(draws),
    }
    path = CHAT if draws.random() < 0.7 else TEXT
    kind, extra = draws.choices(_EXTRAS, weights=_WEIGHTS)[0]
    if kind == "tools":
        path = CHAT
    choices = 1
    if path == CHAT:
        fields["messages"] = _messages(draws)
    else:
        fields["prompt"] = _prompt(draws)
        texts = isinstance(fields["prompt"], list) and isinstance(fields["prompt"][0], str)
        choices = len(fields["prompt"]) if texts else 1
    fields |= extra(draws, path)
    if kind == "beams":  # nothing is drawn
        fields = {name: value for name, value in fields.items() if name not in _OF_DRAWS}
    elif fields["temperature"] > 0 and draws.random() < 0.3:
        fields["n"] = draws.choice([2, 3])
    if draws.random() < 0.05:
        fields["cache_salt"] = f"salt {draws.getrandbits(40)}"
    return Ask(kind, path, fields, choices * int(fields.get("n", 1)))


def _words(draws: Draws, count: int) -> str:
    return " ".join(draws.choices(_WORDS, k=count))


def _content(draws: Draws) -> str:
    return _words(draws, draws.choices([3, 12, 60, 250], weights=[4, 4, 2, 1])[0])


def _messages(draws: Draws) -> list[Json]:
    messages: list[Json] = []
    if draws.random() < 0.5:
        messages.append({"role": "system", "content": draws.choice(_SHARED)})
    for _ in range(draws.choice([0, 0, 0, 1, 2])):
        messages.append({"role": "user", "content": _words(draws, 8)})
        messages.append({"role": "assistant", "content": _words(draws, 8)})
    return [*messages, {"role": "user", "content": _content(draws)}]


def _prompt(draws: Draws) -> Any:
    roll = draws.random()
    if roll < 0.5:
        return f"{draws.choice(_SHARED)} {_content(draws)}"
    if roll < 0.75:
        return _content(draws)
    if roll < 0.9:
        return [draws.randrange(300, 2000) for _ in range(draws.choice([5, 40, 200]))]
    return [_words(draws, 5), _words(draws, 30)]


_OF_DRAWS = frozenset(
    ["seed", "top_p", "top_k", "repetition_penalty", "frequency_penalty", "min_tokens"]
)


def _sampling(draws: Draws) -> Json:
    if draws.random() < 0.5:
        return {"temperature": 0}
    fields: Json = {"temperature": draws.choice([0.6, 1.0]), "seed": draws.getrandbits(40)}
    for name, values in (
        ("top_p", [0.5, 0.95]),
        ("top_k", [5, 40]),
        ("repetition_penalty", [1.2]),
        ("frequency_penalty", [0.5]),
        ("min_tokens", [1]),
        ("ignore_eos", [True]),
    ):
        if draws.random() < 0.25:
            fields[name] = draws.choice(values)
    return fields


def _plain(draws: Draws, path: str) -> Json:
    return {}


def _logprobs(draws: Draws, path: str) -> Json:
    if path == TEXT:
        return {"logprobs": draws.choice([0, 3])}
    return {"logprobs": True, "top_logprobs": draws.choice([0, 2, 5])}


def _stop(draws: Draws, path: str) -> Json:
    return {"stop": draws.choice([["e"], [" th", "ing"], ["a", "o"], ["zzz"]])}


def _beams(draws: Draws, path: str) -> Json:
    return {"use_beam_search": True, "n": draws.choice([2, 3]), "temperature": 0}


def _scores(draws: Draws, path: str) -> Json:
    return {"prompt_logprobs": draws.choice([0, 1])}


_NAMES = ["weather", "search", "name", "size", "colour", "count"]


def _structured(draws: Draws, path: str) -> Json:
    """Of few kinds: workers keep 256 MiB of compiled grammars, which would take hours to fill."""
    name = draws.choice(_NAMES)
    schema = {
        "type": "object",
        "properties": {name: {"enum": [1, "two"]}, "flag": {"type": "boolean"}},
        "required": [name, "flag"],
        "additionalProperties": False,
    }
    forms: list[Json] = [
        {"structured_outputs": {"choice": ["left", "right", name]}},
        {"structured_outputs": {"regex": f"[a-f]{{{draws.randrange(2, 9)}}}"}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"grammar": f'root ::= "{name}" | "b" root'}},
    ]
    if path == CHAT:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        forms += [{"response_format": form}, {"response_format": {"type": "json_object"}}]
    return draws.choice(forms)


def _tools(draws: Draws, path: str) -> Json:
    name = draws.choice(_NAMES)
    parameters = {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}
    choice: Any = draws.choice(
        ["auto", "none", "required", {"type": "function", "function": {"name": name}}]
    )
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"tools": [tool], "tool_choice": choice}


_EXTRAS: list[tuple[str, Callable[[Draws, str], Json]]] = [
    ("plain", _plain),
    ("logprobs", _logprobs),
    ("stop", _stop),
    ("structured", _structured),
    ("tools", _tools),
    ("beams", _beams),
    ("scores", _scores),
]
_WEIGHTS = [40, 12, 10, 14, 10, 5, 4]


def body_bytes(body: Json) -> bytes:
    """As it goes over the wire."""
    return json.dumps(body, separators=(",", ":")).encode()
