"""/tokenize, /detokenize and /v1/chat/completions/render over fake workers."""

from pathlib import Path
from typing import Any

import pytest

from router.endpoints.answer_types import Detokenized, RenderedChat, Tokenized
from tests.support.router_http import serve

CHAT = {"messages": [{"role": "user", "content": "the cat 🙂"}]}


async def test_a_text_there_and_back(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        body = {"prompt": "the <|im_end|> cat 🙂", "return_token_strs": True}
        response = await served.client.post("/tokenize", json=body)
        there = Tokenized.model_validate_json(response.text)
        response = await served.client.post("/detokenize", json={"tokens": there.tokens})
        back = Detokenized.model_validate_json(response.text)
        empty = (await served.client.post("/tokenize", json={"prompt": ""})).json()
        end = served.tokenizer.token_to_id("<|im_end|>")
    assert back.prompt == body["prompt"]
    assert there.count == len(there.tokens) == len(there.token_strs or ())
    assert (there.max_model_len, end in there.tokens) == (512, True)
    assert (empty["count"], empty["tokens"], empty["token_strs"]) == (0, [], None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
    ],
    ids=str,
)
async def test_a_chat_has_the_ids_of_its_prompt(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serve(tmp_path, tool_call_parser="hermes") as served:
        tokenized = (await served.client.post("/tokenize", json=CHAT | fields)).json()
        response = await served.client.post("/v1/chat/completions/render", json=CHAT | fields)
        rendered = RenderedChat.model_validate_json(response.text)
        assert not served.p.submitted
        await served.full(**CHAT, **fields, max_tokens=1)
        (request, _) = served.p.submitted[0]
    assert tuple(tokenized["tokens"]) == request.prompt_ids
    assert tuple(rendered.prompt_token_ids) == request.prompt_ids
    assert rendered.model == "org/demo"


async def test_render_resolves_all_parameters(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        body = {**CHAT, "temperature": 0.5, "seed": 3, "stop_token_ids": [4], "logit_bias": {7: 2}}
        response = await served.client.post("/v1/chat/completions/render", json=body)
    params = response.json()["sampling_params"]
    assert (params["temperature"], params["seed"], params["stop_token_ids"]) == (0.5, 3, [4])
    assert params["logit_bias"] == {"7": 2.0}
    assert params["max_tokens"] == 512 - len(response.json()["prompt_token_ids"])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", **CHAT}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "body.prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/detokenize", {}, 400, "body.tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, 400, "body.tokens.0"),
        ("/v1/chat/completions/render", {**CHAT, "top_p": 0}, 400, "top_p"),
    ],
    ids=str,
)
async def test_bad_requests(
    tmp_path: Path, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    async with serve(tmp_path) as served:
        response = await served.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_rendering_can_be_switched_off(tmp_path: Path) -> None:
    async with serve(tmp_path, enable_render=False, enable_openapi=False) as served:
        for path in ("/v1/chat/completions/render", "/v1/completions/render"):
            assert (await served.client.post(path, json=CHAT)).status_code == 404
        assert (await served.client.get("/openapi.json")).status_code == 404
