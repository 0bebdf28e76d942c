"""Requests that are much work: it is done beside the event loop, or refused."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import router.chat
import router.endpoints.calls
import router.endpoints.completions
import router.endpoints.responses_api
from router.body import MAX_MARKS
from router.request import Generation
from tests.support.fake_worker import until
from tests.support.router_http import Served, events, serve

USER = {"role": "user", "content": "hi"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{index}",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    }
    for index in range(500)
]


def threads_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """The threads that a function will have run in."""
    inner: Callable[..., Any] = getattr(module, name)
    seen: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.get_ident())
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, noting)
    return seen


@pytest.mark.parametrize(
    ("path", "module", "names", "body"),
    [
        (
            "/v1/chat/completions",
            router.chat,
            ("parse_chat_request", "plan_tools", "plan_answer", "resolve"),
            {"messages": [USER], "tools": TOOLS, "tool_choice": "required"},
        ),
        (
            "/v1/completions",
            router.endpoints.completions,
            ("parse_completion_request", "resolve"),
            {"prompt": "hi", "max_tokens": 2, "vllm_xargs": {"x": ["text"] * 20_000}},
        ),
        (
            "/v1/responses",
            router.endpoints.responses_api,
            ("parse_responses_request",),
            {"input": "hi", "tools": [{"type": "function", **t["function"]} for t in TOOLS]},  # type: ignore[dict-item]
        ),
    ],
    ids=["chat", "completions", "responses"],
)
async def test_big_bodies_are_checked_in_threads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    module: Any,
    names: tuple[str, ...],
    body: dict[str, Any],
) -> None:
    seen = [threads_of(monkeypatch, module, name) for name in names]
    seen.append(threads_of(monkeypatch, router.endpoints.calls, "parse_object"))
    async with serve(tmp_path, tool_call_parser="hermes") as served:
        response = await served.client.post(path, json={**body, "padding": "x" * (1 << 16)})
        assert response.status_code == 200, response.text
    assert all(threads and threading.get_ident() not in threads for threads in seen)


async def test_small_bodies_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threads_of(monkeypatch, router.chat, "parse_chat_request")
    async with serve(tmp_path) as served:
        await served.full(max_tokens=2)
    assert seen == [threading.get_ident()]


async def test_too_many_values(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        response = await served.client.post(
            "/v1/completions",
            content=b'{"prompt":[' + b"1," * MAX_MARKS + b"1]}",
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code == 413
    assert "values" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"tools": [1] * 200_000}, {"include": [1] * 200_000}, {"metadata": {"a": 1, "b": 2}}],
    ids=["tools", "include", "metadata"],
)
async def test_wrong_items_are_told_of_once(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A wrong list costs no more than its first item."""
    async with serve(tmp_path) as served:
        response = await served.client.post("/v1/responses", json={"input": "hi", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(f"body.{next(iter(fields))}")


# Big answers


async def test_long_lists_of_log_probabilities(tmp_path: Path) -> None:
    """An answer that is written in a thread is the same as one that is streamed."""
    fields = {
        "messages": [{"role": "user", "content": "the cat sat " * 50}],
        "max_tokens": 300,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 3,
    }
    async with serve(tmp_path) as served:
        full = await served.full(**fields, prompt_logprobs=2)
        chunks = await served.stream(**fields)
    entries = full["choices"][0]["logprobs"]["content"]
    assert len(entries) == 300
    assert len(full["prompt_logprobs"]) == full["usage"]["prompt_tokens"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    assert [entry for part in parts if part for entry in part["content"]] == entries


async def test_an_echoed_prompts_scores_are_named_once_and_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    inner = Generation.prompt_entries

    def noting(self: Generation) -> Any:
        seen.append(threading.get_ident())
        return inner(self)

    monkeypatch.setattr(Generation, "prompt_entries", noting)
    body = {"prompt": [5, 6, 7] * 100, "max_tokens": 2, "echo": True, "logprobs": 1, "n": 3}
    async with serve(tmp_path) as served:
        response = await served.client.post("/v1/completions", json={**body, "stream": True})
        streamed = events(response.text)
        assert len(seen) == 1
        assert threading.get_ident() not in seen
        full = (await served.client.post("/v1/completions", json=body)).json()
    for choice in full["choices"]:
        parts = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == choice["index"]]
        tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert len(tokens) == 302


@pytest.mark.parametrize("stream", [False, True])
async def test_many_log_probabilities_of_a_response(tmp_path: Path, stream: bool) -> None:
    body = {"input": "hi", "max_output_tokens": 300, "ignore_eos": True, "top_logprobs": 2}
    async with serve(tmp_path) as served:
        response = await served.client.post("/v1/responses", json={**body, "stream": stream})
    assert response.status_code == 200
    whole = response.json() if not stream else last_event(response.text)["response"]
    assert len(whole["output"][0]["content"][0]["logprobs"]) == 300


def last_event(text: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(text.rstrip().rpartition("data: ")[2])
    return event


async def test_echo_shows_the_prompt_that_was_left(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        body = {"prompt": "the cat sat", "echo": True, "logprobs": 0, "max_tokens": 2}
        cut = {**body, "truncate_prompt_tokens": 2}
        choice = (await served.client.post("/v1/completions", json=cut)).json()["choices"][0]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert choice["text"].startswith(" cat sat")


# What a client says of an earlier answer


@pytest.mark.parametrize("cached", [10**400, 10**6, 7])
async def test_a_made_up_number_of_cached_tokens(tmp_path: Path, cached: int) -> None:
    params = {
        "do_remote_prefill": True,
        "semantic_hash": "hash",
        "remote_prefill_cached_tokens": cached,
    }
    async with serve(tmp_path, allow_kv_transfer_params=True) as served:
        params["semantic_hash"] = served.d.semantic_hash
        usage = (await served.full(max_tokens=2, kv_transfer_params=params))["usage"]
        assert served.d.adopted
        await until(lambda: _in_flight(served) == 0)
    assert usage["prompt_tokens_details"]["cached_tokens"] == min(
        cached, usage["prompt_tokens"] - 1
    )


def _in_flight(served: Served) -> int:
    count: int = served.app.state.serving.service.in_flight
    return count
