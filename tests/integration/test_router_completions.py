"""POST /v1/completions over fake workers."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from router.endpoints.answer_types import Completion, CompletionChunk, RenderedCompletion
from tests.support.fake_worker import until
from tests.support.router_http import TEXTS, Served, events, serve


async def complete(served: Served, **fields: Any) -> dict[str, Any]:
    response = await served.client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    Completion.model_validate_json(response.text)
    return body


async def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "hi", "stream": True, **fields}
    response = await served.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    chunks = events(response.text)
    for chunk in chunks:
        CompletionChunk.model_validate_json(json.dumps(chunk))
    return chunks


def ids(served: Served, text: str) -> list[int]:
    return list(served.tokenizer.encode(text).ids)


async def test_a_text(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.p.cached_tokens = 1
        body = await complete(served, max_tokens=100, request_id="mine")
        short = await complete(served)
        (request, _), *_ = served.p.submitted
    (choice,) = body["choices"]
    assert (body["id"], body["object"], body["model"]) == (
        "cmpl-mine",
        "text_completion",
        "org/demo",
    )
    assert choice["text"] == TEXTS[0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert body["usage"]["prompt_tokens"] == len(ids(served, "hi"))
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert request.prompt_ids == tuple(ids(served, "hi"))
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 16  # the default of this endpoint


async def test_the_four_forms_of_a_prompt(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        one, two = ids(served, "the cat"), ids(served, "and then")
        forms = ["the cat", ["the cat", "and then"], one, [one, two], ["the cat", two]]
        counts = [1, 2, 1, 2, 2]
        for form, count in zip(forms, counts, strict=True):
            served.p.submitted.clear()
            body = await complete(served, prompt=form, return_token_ids=True)
            sent = [list(request.prompt_ids) for request, _ in served.p.submitted]
            assert sent == [one, two][:count]
            assert [choice["prompt_token_ids"] for choice in body["choices"]] == sent
            assert body["usage"]["prompt_tokens"] == sum(map(len, sent))


async def test_choices_are_numbered_prompt_by_prompt(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        fields = {
            "prompt": ["one", "two"],
            "n": 2,
            "max_tokens": 100,
            "temperature": 0.5,
            "echo": True,
        }
        body = await complete(served, **fields)
        chunks = await stream(served, **fields, stream_options={"include_usage": True})
        await until(lambda: served.idle)
    expected = ["one" + TEXTS[0], "one" + TEXTS[1], "two" + TEXTS[0], "two" + TEXTS[1]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [joined(chunks, index)["text"] for index in range(4)] == expected
    assert chunks[-1]["usage"] == body["usage"]
    assert chunks[-1]["choices"] == []
    assert body["usage"]["completion_tokens"] == 2 * sum(
        len(ids(served, text)) + 1 for text in TEXTS[:2]
    )


def joined(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    parts = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    return {
        "text": "".join(part["text"] for part in parts),
        "token_ids": [i for part in parts for i in part.get("token_ids") or ()],
        "finish_reason": [p["finish_reason"] for p in parts if p["finish_reason"] is not None],
        "logprobs": {
            key: [value for one in logprobs for value in one[key]]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        },
    }


@pytest.mark.parametrize("frame", [1, 4])
@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": 2}, {"return_token_ids": True}, {"stop": " cat"}, {"echo": True}],
    ids=str,
)
async def test_a_stream_joins_to_the_full_answer(
    tmp_path: Path, fields: dict[str, Any], frame: int
) -> None:
    async with serve(tmp_path) as served:
        for worker in served.workers:
            worker.tokens_per_frame = frame
        full = (await complete(served, max_tokens=50, **fields))["choices"][0]
        got = joined(await stream(served, max_tokens=50, **fields), 0)
    assert got["text"] == full["text"]
    assert got["finish_reason"] == [full["finish_reason"]]
    assert got["token_ids"] == (full["token_ids"] or [])
    if full["logprobs"] is not None:
        assert got["logprobs"] == full["logprobs"]
        tokens = full["logprobs"]["tokens"]
        offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        assert full["logprobs"]["text_offset"] == offsets
        tops = full["logprobs"]["top_logprobs"]
        assert all(token in top for token, top in zip(tokens, tops, strict=True))


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_scores_the_prompt(tmp_path: Path, streamed: bool) -> None:
    async with serve(tmp_path) as served:
        fields = {"prompt": "the cat sat", "echo": True, "logprobs": 1, "max_tokens": 3}
        if streamed:
            choice = joined(await stream(served, **fields), 0)
        else:
            choice = (await complete(served, **fields))["choices"][0]
            assert len(choice["prompt_logprobs"]) == len(ids(served, "the cat sat"))
    logprobs = choice["logprobs"]
    num_prompt = len(ids(served, "the cat sat"))
    assert len(logprobs["tokens"]) == num_prompt + 3
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:num_prompt] == [-0.5 * i for i in range(1, num_prompt)]
    assert logprobs["text_offset"][num_prompt] == len("the cat sat")


async def test_scoring_alone_generates_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        fields = {"prompt": "the cat", "echo": True, "logprobs": 0, "max_tokens": 0}
        body = await complete(served, **fields, return_token_ids=True)
        chunks = await stream(served, **fields, stream_options={"include_usage": True})
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (
        "the cat",
        "length",
        [],
    )
    assert "".join(choice["logprobs"]["tokens"]) == "the cat"
    assert body["usage"]["completion_tokens"] == 0
    assert joined(chunks, 0)["text"] == "the cat"
    assert joined(chunks, 0)["logprobs"] == choice["logprobs"]
    assert chunks[-1]["usage"] == body["usage"]


async def test_tokens_may_be_named_by_their_ids(tmp_path: Path) -> None:
    async with serve(tmp_path, return_tokens_as_token_ids=True) as served:
        fields = {"prompt": "the cat", "echo": True, "logprobs": 1, "max_tokens": 2}
        (choice,) = (await complete(served, **fields, return_token_ids=True))["choices"]
    everything = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in everything]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "body.prompt"),
        ({"prompt": []}, "body.prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "body.prompt"),
        ({"prompt": [True]}, "body.prompt"),
        ({"prompt": ["a", 1]}, "body.prompt"),
        ({"prompt": {"text": "a"}}, "body.prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a"] * 4}, "prompt"),
        ({"prompt": "x " * 900}, "input_tokens"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -2}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=str,
)
async def test_bad_requests(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with serve(tmp_path, max_batch=3) as served:
        body = {"prompt": "hi", **fields}
        response = await served.client.post("/v1/completions", json=body)
        assert not served.p.submitted
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_failure_of_one_prompt_ends_all(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        for worker in served.workers:
            worker.fail_kind = "Overloaded"
        body = {"prompt": ["a", "b", "c"]}
        full = await served.client.post("/v1/completions", json=body)
        streamed = await served.client.post("/v1/completions", json={**body, "stream": True})
        for worker in served.workers:
            worker.fail_kind = ""
        served.d.fail_kind_at = 3
        late = await served.client.post("/v1/completions", json={**body, "stream": True})
        await until(lambda: served.idle)
    assert (full.status_code, streamed.status_code, late.status_code) == (429, 429, 200)
    assert events(late.text)[-1]["error"]["code"] == 500


async def test_render(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        body = {"prompt": ["a", "b"], "temperature": 0.5, "logit_bias": {"5": 1}}
        response = await served.client.post("/v1/completions/render", json=body)
        rendered = RenderedCompletion.model_validate(response.json())
        assert not served.p.submitted
    first, second = rendered.prompts
    assert first.prompt_token_ids == ids(served, "a")
    assert second.prompt_token_ids == ids(served, "b")
    assert first.sampling_params["temperature"] == 0.5
    assert first.sampling_params["max_tokens"] == 16
    assert first.sampling_params["logit_bias"] == {"5": 1.0}


async def test_the_official_client(tmp_path: Path) -> None:
    async with serve(tmp_path, api_keys=("one",)) as served:
        client = served.official("one")
        answer = await client.completions.create(
            model="org/demo", prompt="hi", max_tokens=50, logprobs=1
        )
        parts = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(
                model="org/demo", prompt="hi", max_tokens=50, stream=True
            )
        ]
        wrong = served.official("two")
        with pytest.raises(openai.AuthenticationError):
            await wrong.completions.create(model="org/demo", prompt="hi")
    assert answer.choices[0].text == "".join(parts) == TEXTS[0]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens
