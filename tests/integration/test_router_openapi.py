"""/openapi.json tells the truth: every route is in it, and every answer fits it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from starlette.routing import Route

from tests.support.router_http import Served, events, serve

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
HIDDEN = {"/openapi.json", "/v1/responses/{response_id}"}  # itself, and what only ever says 404


async def document(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = (await served.client.get("/openapi.json")).json()
    return found


async def test_every_route_is_documented(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        paths = (await document(served))["paths"]
        routes = {
            (route.path.replace(":path", ""), method.lower())
            for route in served.app.routes
            if isinstance(route, Route)
            for method in route.methods or ()
            if method != "HEAD" and not route.path.startswith(tuple(HIDDEN))
        }
    assert {(path, method) for path, item in paths.items() for method in item} == routes


async def test_the_document_is_whole(tmp_path: Path) -> None:
    async with serve(tmp_path, api_keys=("k",)) as served:
        found = await document(served)
    assert found["openapi"].startswith("3.1")
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(found)
    named = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= set(schemas)
    identifiers = [o["operationId"] for item in found["paths"].values() for o in item.values()]
    assert len(set(identifiers)) == len(identifiers)
    for path, item in found["paths"].items():
        for operation in item.values():
            guarded = path not in ("/health", "/ping", "/version", "/metrics")
            assert ("security" in operation) == guarded
            assert ("401" in operation["responses"]) == guarded


def check(found: dict[str, Any], path: str, method: str, response: httpx.Response) -> None:
    """The answer is one of those that the document lists."""
    listed = found["paths"][path][method]["responses"][str(response.status_code)]
    content = listed.get("content")
    if content is None:
        assert response.content == b""
        return
    media = response.headers["content-type"].partition(";")[0]
    assert media in content
    if media == "application/json":
        schema = {**content[media]["schema"], "components": found["components"]}
        Draft202012Validator(schema).validate(response.json())


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1, "prompt_logprobs": 1}),
    ("/v1/chat/completions", {**CHAT, "return_token_ids": True}),
    ("/v1/chat/completions", {**CHAT, "temperature": 9}),
    ("/v1/chat/completions", {**CHAT, "model": "gpt"}),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "echo": True}),
    ("/v1/completions", {"prompt": "a", "stream": True}),
    ("/v1/completions", {"prompt": 1}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/responses", {"input": "a", "stream": True}),
    ("/v1/responses", {"input": "a", "store": True}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", CHAT),
    ("/detokenize", {"tokens": [1]}),
    ("/detokenize", {"tokens": "a"}),
    ("/v1/chat/completions/render", {**CHAT, "bad_words": ["a"]}),
    ("/v1/completions/render", {"prompt": "a"}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=str)
async def test_answers_fit(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with serve(tmp_path) as served:
        found = await document(served)
        response = await served.client.post(path, json=body)
    check(found, path, "post", response)
    asked = found["components"]["schemas"][
        found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"][
            "$ref"
        ].rpartition("/")[2]
    ]
    if response.status_code == 200:
        Draft202012Validator({**asked, "components": found["components"]}).validate(body)


async def test_answers_of_the_others_fit(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        found = await document(served)
        for path in ("/v1/models", "/load", "/health", "/ping", "/version", "/metrics"):
            check(found, path, "get", await served.client.get(path))
        for name in ("org/demo", "gpt"):
            response = await served.client.get(f"/v1/models/{name}")
            check(found, "/v1/models/{model_id}", "get", response)
    async with serve(tmp_path, "") as served:
        check(found, "/health", "get", await served.client.get("/health"))
        response = await served.client.post("/v1/chat/completions", json=CHAT)
        check(found, "/v1/chat/completions", "post", response)
        assert response.status_code == 503


async def test_chunks_fit(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        found = await document(served)
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await served.stream(
            stream_options=options, logprobs=True, return_token_ids=True, n=2, temperature=0.5
        )
        body = {"prompt": "a", "stream": True, "stream_options": options, "logprobs": 1}
        texts = events((await served.client.post("/v1/completions", json=body)).text)
    for name, all_of_it in (("ChatCompletionChunk", chunks), ("CompletionChunk", texts)):
        schema = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
        validator = Draft202012Validator(schema)
        for chunk in all_of_it:
            validator.validate(chunk)
