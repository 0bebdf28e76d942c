"""Streams say exactly what the full answers say, many at once and of all kinds."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.conformance import Api, Json, as_joined, assert_same, joined

field = pytest.mark.field
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"where": {"enum": ["here", "there"]}},
            "required": ["where"],
        },
    },
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "here", "ünü": "🙂"}}\n</tool_call>'
DETAILS = {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
EMOJI = "🙂👩‍👩‍👧 ünïcödé 漢字 🇺🇳"

KINDS: list[dict[str, Any]] = [
    {"max_tokens": 24},
    {"max_tokens": 24, "temperature": 1.2, "seed": 11, **DETAILS},
    {"max_tokens": 30, "n": 3, "temperature": 1.0, "seed": 4, **DETAILS},
    {"max_tokens": 60, "structured_outputs": {"choice": [EMOJI]}, **DETAILS},
    {"max_tokens": 200, "tools": [TOOL], "structured_outputs": {"regex": re.escape("So: " + CALL)}},
    {"max_tokens": 200, "tools": [TOOL], "structured_outputs": {"regex": re.escape(CALL * 2)}},
    {
        "max_tokens": 200,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        **DETAILS,
    },
    {
        "max_tokens": 100,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
    },
    {"max_tokens": 20, "stop": ["e", "sea"]},
    {"max_tokens": 20, "stop": [" t"], "include_stop_str_in_output": True, **DETAILS},
    {"max_tokens": 16, "frequency_penalty": 1.5, "presence_penalty": 0.5, **DETAILS},
    {"max_tokens": 6, "use_beam_search": True, "n": 3, "return_token_ids": True},
    {"max_tokens": 1},
    {"max_tokens": 12, "logit_bias": {"1": 100}, "skip_special_tokens": False, **DETAILS},
    # Single bytes: characters that never become whole, or do so late
    {"max_tokens": 24, "allowed_token_ids": list(range(3, 259)), "temperature": 2.0, "seed": 3},
    {
        "max_tokens": 24,
        "allowed_token_ids": list(range(130, 259)),
        "temperature": 2.0,
        "seed": 8,
        **DETAILS,
    },
]


def both(api: Api, kind: int) -> tuple[Json, list[Json]]:
    fields = KINDS[kind % len(KINDS)]
    content = f"Question {kind}: what is the sea?"
    options = {"include_usage": True, "continuous_usage_stats": bool(kind % 2)}
    full = api.chat(content, **fields)
    return full, api.chunks(content, stream_options=options, **fields)


@field("stream", "n", "return_token_ids", "logprobs", "tools", "stop")
def test_a_stream_joins_to_the_full_answer_32_at_once(api: Api) -> None:
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda kind: both(api, kind), range(32)))
    for kind, (full, chunks) in enumerate(found):
        assert_same(joined(chunks), as_joined(full), f"kind {kind}")
        assert_same(chunks[-1]["usage"], full["usage"], f"usage of kind {kind}")
    api.answers.clear()  # they come in any order; each kind alone is compared below


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_each_kind_alone(api: Api, kind: int) -> None:
    full, chunks = both(api, kind)
    assert_same(joined(chunks), as_joined(full))


@field("stream")
def test_no_chunk_holds_part_of_a_character(api: Api) -> None:
    chunks = api.chunks(structured_outputs={"choice": [EMOJI]}, max_tokens=60)
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(1 for piece in pieces if piece) > 5


@field("logprobs", "return_token_ids")
def test_ids_and_log_probabilities_come_with_their_tokens(api: Api) -> None:
    for chunk in api.chunks(max_tokens=12, **DETAILS):
        for choice in chunk["choices"]:
            entries = (choice.get("logprobs") or {}).get("content") or []
            assert len(entries) == len(choice.get("token_ids") or [])
