"""The HTTP API over fake workers: answers and faults."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_worker import until
from tests.support.router_http import TEXTS, events, joined, serve

# Answers


async def test_full_answer(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.p.cached_tokens = 4
        body = await served.full(user="someone", request_id="mine")
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        num_prompt = len(served.tokenizer.encode(prompt).ids)
        num_output = len(served.tokenizer.encode(TEXTS[0]).ids) + 1
    assert body["id"] == "chatcmpl-mine"
    assert body["object"] == "chat.completion"
    assert body["model"] == "org/demo"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == TEXTS[0]
    assert choice["message"]["role"] == "assistant"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert (choice["logprobs"], choice["token_ids"]) == (None, None)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    for key in ("prompt_token_ids", "prompt_logprobs", "kv_transfer_params", "service_tier"):
        assert body[key] is None
    assert isinstance(body["system_fingerprint"], str)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 0.7},
        {"max_tokens": 1},
        {"max_completion_tokens": 4},
        {"stop": ["cat", "never"]},
        {"stop": " the", "n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"logprobs": True, "stop": [": the"], "return_token_ids": True},
        {"return_token_ids": True, "n": 2},
        {"ignore_eos": True, "max_tokens": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["pd", "dd"])
@pytest.mark.parametrize("frame", [1, 4])
async def test_a_stream_joins_to_the_full_answer(
    tmp_path: Path, fields: dict[str, Any], mode: str, frame: int
) -> None:
    async with serve(tmp_path, mode, aggregated=mode == "dd") as served:
        for worker in served.workers:
            worker.tokens_per_frame = frame
        full = await served.full(**fields)
        chunks = await served.stream(stream_options={"include_usage": True}, **fields)
        await until(lambda: served.idle)
    assert [chunk["choices"] for chunk in chunks].count([]) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == full["usage"]
    heads = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    assert len(heads) == 1
    assert next(iter(heads))[1] == "chat.completion.chunk"
    for choice in full["choices"]:
        got = joined(chunks, choice["index"])
        assert got["role"] == ["assistant"]
        assert got["content"] == choice["message"]["content"]
        assert got["finish_reason"] == choice["finish_reason"]
        assert got["stop_reason"] == choice["stop_reason"]
        assert got["token_ids"] == (choice["token_ids"] or [])
        assert got["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
    if fields.get("return_token_ids"):
        assert chunks[0]["prompt_token_ids"] == full["prompt_token_ids"]
        assert sum("prompt_token_ids" in chunk for chunk in chunks) == fields.get("n", 1)


async def test_split_and_aggregated_answer_alike(tmp_path: Path) -> None:
    answers = []
    for mode in ("pd", "d"):
        async with serve(tmp_path / mode, mode, aggregated=mode == "d") as served:
            body = await served.full(n=2, logprobs=True, top_logprobs=1, return_token_ids=True)
        answers.append({k: v for k, v in body.items() if k not in ("id", "created")})
    assert answers[0] == answers[1]


async def test_the_role_comes_with_the_first_text(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        chunks = await served.stream()
    first = chunks[0]["choices"][0]
    assert first["delta"]["role"] == "assistant"
    assert TEXTS[0].startswith(first["delta"]["content"])
    assert first["delta"]["content"]
    assert first["finish_reason"] is None
    assert "usage" not in chunks[0]


async def test_one_token_has_a_first_and_a_finish_chunk(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        chunks = await served.stream(max_tokens=1)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "length"]
    assert not served.d.adopted


async def test_running_usage(tmp_path: Path) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serve(tmp_path) as served:
        chunks = await served.stream(stream_options=options)
        alone = await served.stream(stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == counts[-2]
    assert all("usage" not in chunk for chunk in alone)


async def test_a_stop_string_across_tokens(tmp_path: Path) -> None:
    async with serve(tmp_path, texts=["abcdef ghi"]) as served:
        body = await served.full(stop=["zz", "de"], return_token_ids=True)
        await until(lambda: served.idle)
    choice = body["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "de")
    shown = served.tokenizer.decode(choice["token_ids"])
    assert shown == "abcde"
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])


async def test_stop_token_ids(tmp_path: Path) -> None:
    async with serve(tmp_path, texts=["abcdef"]) as served:
        token = served.tokenizer.encode("d").ids[0]
        body = await served.full(stop_token_ids=[token], return_token_ids=True)
    choice = body["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    assert choice["token_ids"][-1] == token


async def test_log_probabilities(tmp_path: Path) -> None:
    async with serve(tmp_path, texts=["a€"]) as served:
        body = await served.full(logprobs=True, top_logprobs=2)
        bare = await served.full(logprobs=True)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "", "", "€", "<|im_end|>"]
    assert content[3]["bytes"] == list("€".encode())
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert [e["top_logprobs"] for e in bare["choices"][0]["logprobs"]["content"]] == [[]] * 5


async def test_seeds_reach_the_workers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        await served.full(seed=-7)
        await served.full(seed=-1)
        await served.full()
    seeds = [request.params.seed for request, _ in served.p.submitted]
    assert seeds[0] == 2**64 - 7
    assert len(set(seeds)) == 3


# Faults


async def test_refused_handoffs_still_answer(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.d.refuse_adopts = True
        body = await served.full()
        await until(lambda: served.idle)
    assert body["choices"][0]["message"]["content"] == TEXTS[0]
    assert served.p.aborted


async def test_a_decode_worker_lost_in_mid_stream_is_not_noticed(tmp_path: Path) -> None:
    async with serve(tmp_path, "pdd") as served:
        served.d.pause_at = 5
        reading = asyncio.create_task(served.stream(n=2, stream_options={"include_usage": True}))
        await until(lambda: served.d.paused.is_set())
        served.d.session.lose()
        chunks = await reading
    for index in range(2):
        assert joined(chunks, index)["content"] == TEXTS[index]
    tokens = sum(len(served.tokenizer.encode(text).ids) + 1 for text in TEXTS[:2])
    assert chunks[-1]["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "status"),
    [("EngineFailure", 500), ("Overloaded", 429), ("Unavailable", 503), ("InvalidRequest", 400)],
)
async def test_failures_before_the_first_token_are_http_errors(
    tmp_path: Path, kind: str, status: int, stream: bool
) -> None:
    async with serve(tmp_path) as served:
        for worker in served.workers:
            worker.fail_kind = kind
        response = await served.chat(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_failures_after_the_first_token_are_events(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.d.fail_kind_at = 3
        response = await served.chat(stream=True)
        full = await served.chat()
    assert response.status_code == 200
    chunks = events(response.text)
    assert chunks[-1]["error"]["code"] == 500
    assert chunks[-1]["error"].keys() == {"message", "type", "param", "code"}
    assert "scripted" not in response.text
    assert full.status_code == 500


async def test_no_workers(tmp_path: Path) -> None:
    async with serve(tmp_path, "") as served:
        response = await served.chat()
        assert (await served.client.get("/health")).status_code == 503
        card = (await served.client.get("/v1/models")).json()["data"][0]
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert card["max_model_len"] is None


async def test_too_many_requests_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path, max_inflight=1) as served:
        served.d.pause_at = 0
        first = asyncio.create_task(served.full())
        await until(lambda: served.d.paused.is_set())
        second = await served.chat()
        served.d.resume()
        await first
        third = await served.chat(stream=True)
        fourth = await served.chat()
    assert second.status_code == 429
    assert second.headers["retry-after"]
    assert (third.status_code, fourth.status_code) == (200, 200)
