"""Requests that are nearly right: a valid one with values, keys or bytes changed."""

import json
import math
import random
from typing import Any

Json = dict[str, Any]

VALID: dict[str, list[Any]] = {
    "max_tokens": [1, 2, 8],
    "max_completion_tokens": [1, 5],
    "min_tokens": [0, 1, 2],
    "n": [1, 2, 3],
    "temperature": [0, 0.7, 2.0],
    "top_p": [0.1, 1.0],
    "top_k": [-1, 1, 40],
    "min_p": [0.0, 0.3],
    "seed": [0, -1, 2**63 - 1],
    "stop": ["a", ["the", " e"], []],
    "stop_token_ids": [[300], []],
    "ignore_eos": [True, False],
    "frequency_penalty": [-2, 0.5, 2],
    "presence_penalty": [-1, 1],
    "repetition_penalty": [0.5, 1.3],
    "logit_bias": [{"300": 5}, {"2": 100}, {}],
    "allowed_token_ids": [[300, 301, 2], [400]],
    "bad_words": [["sea", " the"], []],
    "use_beam_search": [True],
    "length_penalty": [0.5, 2.0],
    "prompt_logprobs": [0, 2],
    "echo": [True],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "include_stop_str_in_output": [True],
    "truncate_prompt_tokens": [-1, 3, 40],
    "add_special_tokens": [True],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, "a"]}}},
    ],
    "structured_outputs": [
        {"choice": ["a", "b"]},
        {"regex": "[a-z]{3}"},
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"grammar": 'root ::= "a" | "b" root'},
        {"json_object": True},
    ],
    "priority": [-5, 0, 7],
    "cache_salt": ["salt"],
    "request_id": ["same-id"],
    "kv_transfer_params": [{}, {"do_remote_decode": True}, {"do_remote_prefill": True}],
    "vllm_xargs": [{"a": 1}, {"b": ["x"]}],
    "logits_processors": [["tests.support.processors.never_300"], ["os.system"]],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "user": ["me"],
    "model": ["demo"],
}
CHAT: dict[str, list[Any]] = {
    "logprobs": [True],
    "top_logprobs": [0, 3],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]],
    "tool_choice": [
        "none",
        "auto",
        "required",
        {"type": "function", "function": {"name": "f"}},
    ],
    "parallel_tool_calls": [False],
    "reasoning_effort": ["none", "low"],
    "include_reasoning": [False],
    "add_generation_prompt": [False],
    "continue_final_message": [True],
    "chat_template": ["{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}x"],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "documents": [[{"title": "a", "text": "b"}]],
    "mm_processor_kwargs": [{}],
}
TEXT: dict[str, list[Any]] = {"logprobs": [0, 2], "suffix": ["x"]}
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e300, 10**20, -(2**63), 2**63, 1 << 70),
    *(math.nan, math.inf, -math.inf, "", "a", "\x00", "1", "nan", "😀" * 50, "\ud800", "x" * 5000),
    *([], [None], [[]], [1, "a"], [-1], [2**40], ["", ""], {}, {"": None}, {"a": {"b": {}}}),
    {"type": "function"},
    {"type": "json_schema"},
    {"regex": "(" * 50},
    {"regex": "(a{1,500}){1,500}"},
    {"json": {"$ref": "#"}},
    {"grammar": "root ::= root"},
    {"role": "user", "content": [{"type": "image_url"}]},
]
MESSAGES: list[Any] = [
    {"role": "user", "content": "Tell me about the sea."},
    {"role": "system", "content": "Be short."},
    {"role": "assistant", "content": "Yes", "reasoning": "hm"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    },
]
PROMPTS: list[Any] = ["The sea", ["one", "two"], [300, 301], [[300], [301, 302]], "", []]


def mutated(draws: random.Random, *, chat: bool) -> bytes:
    """The bytes of a request to the chat or the text endpoint."""
    body: Json = {"max_tokens": 4}
    if chat:
        body["messages"] = draws.choices(MESSAGES, k=draws.choice([1, 1, 2, 4]))
    else:
        body["prompt"] = draws.choice(PROMPTS)
    known = VALID | (CHAT if chat else TEXT)
    for name in draws.sample(sorted(known), draws.choice([0, 1, 2, 3, 5])):
        body[name] = draws.choice(known[name])
    for _ in range(draws.choice([0, 0, 1, 1, 2])):
        body = _change(draws, body, sorted(known))
    text = json.dumps(body).encode()
    return _damage(draws, text) if draws.random() < 0.1 else text


def _change(draws: random.Random, body: Json, names: list[str]) -> Json:
    """A copy with one value, somewhere in it, replaced by a strange one."""
    copy: Json = json.loads(json.dumps(body))
    place: Any = copy
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys or draws.random() < 0.1:
            if isinstance(place, dict):
                place[draws.choice(names)] = draws.choice(STRANGE)
            else:
                place.append(draws.choice(STRANGE))
            return copy
        key = draws.choice(keys)
        if isinstance(place[key], dict | list) and draws.random() < 0.6:
            place = place[key]
            continue
        place[key] = draws.choice(STRANGE)
        return copy


def _damage(draws: random.Random, text: bytes) -> bytes:
    """Bytes changed, doubled or cut."""
    at = draws.randrange(len(text))
    match draws.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + bytes([draws.randrange(256)]) + text[at + 1 :]
        case 2:
            return text[:at] + text[at:] * 2
        case _:
            return text[:at] + b"[" * 2000 + text[at:]
