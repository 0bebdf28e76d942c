"""The router's HTTP API over scripted workers: what a client sees."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer

from contracts.ids import WorkerId
from contracts.request import GenerationRequest
from contracts.worker import Role
from router.app import create_app
from router.config import RouterConfig
from tests.support.fake_worker import FakeCluster, FakeWorker, until, write_model_folder

TEXTS = ["It is so: the cat 🙂 sat.", "Über the mat — €5!", "the other"]


@dataclass
class Served:
    """An app over workers, and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient
    tokenizer: Tokenizer
    workers: list[FakeWorker] = field(default_factory=list[FakeWorker])

    @property
    def p(self) -> FakeWorker:
        return self.workers[0]

    @property
    def d(self) -> FakeWorker:
        return self.workers[1]

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def full(self, **fields: Any) -> dict[str, Any]:
        response = await self.chat(**fields)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    async def stream(self, **fields: Any) -> list[dict[str, Any]]:
        response = await self.chat(stream=True, **fields)
        assert response.status_code == 200, response.text
        return events(response.text)

    @property
    def idle(self) -> bool:
        return all(worker.running == 0 for worker in self.workers)


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended properly."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def joined(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """One choice of a stream, put together."""
    parts = [
        c["choices"][0] for c in chunks if c.get("choices") and c["choices"][0]["index"] == index
    ]
    ends = [part for part in parts if part["finish_reason"] is not None]
    assert len(ends) == 1
    assert ends[0] is parts[-1]
    entries = [part["logprobs"]["content"] for part in parts if part["logprobs"]]
    return {
        "role": [part["delta"]["role"] for part in parts if "role" in part["delta"]],
        "content": "".join(part["delta"].get("content", "") for part in parts),
        "token_ids": [t for part in parts for t in part.get("token_ids", ())],
        "logprobs": [entry for some in entries for entry in some],
        "finish_reason": ends[0]["finish_reason"],
        "stop_reason": ends[0]["stop_reason"],
    }


@asynccontextmanager
async def serve(
    tmp_path: Path, roles: str = "pd", texts: Sequence[str] = TEXTS, **settings: Any
) -> AsyncIterator[Served]:
    folder = write_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    assert eos is not None

    outputs = [[*tokenizer.encode(text).ids, eos] for text in texts]

    def script(request: GenerationRequest, choice: int) -> list[int]:
        return outputs[choice % len(outputs)]

    workers = [
        FakeWorker(WorkerId(f"{role}{i}"), Role.PREFILL if role == "p" else Role.DECODE, script)
        for i, role in enumerate(roles)
    ]
    cluster = FakeCluster(*workers)
    config = RouterConfig(
        model_path=str(folder),
        served_model_name="org/demo",
        cluster_key="k",
        **{"model_aliases": ("demo",), "worker_wait_s": 0.05, **settings},
    )
    app = create_app(config, cluster, open_session=cluster.open_session)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await until(lambda: all(worker.sessions for worker in workers))
            served = Served(app, client, tokenizer, workers)
            yield served


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


# Bad input


@pytest.mark.parametrize(
    ("fields", "status", "kind", "param"),
    [
        ({"temperature": "hot"}, 400, "Bad Request", "body.temperature"),
        ({"temperature": 3}, 400, "BadRequestError", "temperature"),
        ({"messages": []}, 400, "BadRequestError", "messages"),
        ({"messages": None}, 400, "Bad Request", "body.messages"),
        ({"model": "gpt"}, 404, "NotFoundError", "model"),
        ({"frequency_penalty": 1}, 400, "BadRequestError", "frequency_penalty"),
        ({"messages": [{"role": "user", "content": "x " * 800}]}, 400, None, "input_tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            None,
            "messages",
        ),
        ({"stop_token_ids": [10**6]}, 400, None, "stop_token_ids"),
        ({"max_tokens": 513}, 400, None, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(
    tmp_path: Path,
    fields: dict[str, Any],
    status: int,
    kind: str | None,
    param: str,
    stream: bool,
) -> None:
    async with serve(tmp_path) as served:
        response = await served.chat(stream=stream, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, status, param)
    assert error["type"] == (kind or "BadRequestError")
    assert not served.p.submitted


@pytest.mark.parametrize(
    ("content", "media", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"messages": [{"role":"user","content":"x"}], "top_p": NaN}', "application/json", 400),
        (b'{"messages": [{"role":"user","content":"\\ud800"}]}', "application/json", 400),
        (b'{"messages": [{"role":"user","content":"x"}]}', "text/plain", 400),
        (b" " * 3000, "application/json", 413),
    ],
)
async def test_bad_bodies(tmp_path: Path, content: bytes, media: str, status: int) -> None:
    async with serve(tmp_path, max_body_bytes=2000) as served:
        response = await served.client.post(
            "/v1/chat/completions", content=content, headers={"content-type": media}
        )
        chunked = await served.client.post(
            "/v1/chat/completions", content=pieces(content), headers={"content-type": media}
        )
    assert response.status_code == chunked.status_code == status
    assert response.json()["error"]["code"] == status


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 500):
        yield content[start : start + 500]


async def test_unknown_paths_and_methods(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        unknown = await served.client.get("/v2/nothing")
        wrong = await served.client.get("/v1/chat/completions")
        no_model = await served.client.get("/v1/models/gpt")
    assert [r.status_code for r in (unknown, wrong, no_model)] == [404, 405, 404]
    for response in (unknown, wrong, no_model):
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == response.status_code


async def test_unknown_and_neutral_fields_pass(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        await served.full(
            model="demo",
            frequency_penalty=0,
            tools=None,
            tool_choice="none",
            response_format={"type": "text"},
            skip_special_tokens=True,
            nonsense={"deep": [1]},
            seed=None,
        )
        await served.full(model="")


# Around it


async def test_keys(tmp_path: Path) -> None:
    async with serve(tmp_path, api_keys=("one", "two")) as served:
        for value in (None, "Bearer", "Bearer three", "Basic one", "one"):
            headers = {} if value is None else {"authorization": value}
            for path in ("/v1/models", "/v1/unknown"):
                response = await served.client.get(path, headers=headers)
                assert response.status_code == 401
                error = response.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert (error["type"], error["code"]) == ("AuthenticationError", 401)
        for value in ("Bearer two", "bearer one"):
            response = await served.client.get("/v1/models", headers={"authorization": value})
            assert response.status_code == 200
        for path in ("/health", "/metrics", "/version", "/ping"):
            assert (await served.client.get(path)).status_code == 200
        options = await served.client.options("/v1/models")
        assert options.status_code != 401


async def test_cors(tmp_path: Path) -> None:
    async with serve(tmp_path, api_keys=("one",)) as served:
        response = await served.client.options(
            "/v1/chat/completions",
            headers={"origin": "http://a.example", "access-control-request-method": "POST"},
        )
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "*"


async def test_request_ids(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        headers = {"x-request-id": "from-header"}
        body = {"messages": [{"role": "user", "content": "x"}], "request_id": "from-body"}
        response = await served.client.post("/v1/chat/completions", json=body, headers=headers)
        error = await served.client.get("/v1/models/gpt", headers=headers)
        again = [await served.full(request_id="same") for _ in range(2)]
        drawn = {(await served.full())["id"] for _ in range(2)}
    assert response.json()["id"] == "chatcmpl-from-header"
    assert response.headers["x-request-id"] == error.headers["x-request-id"] == "from-header"
    assert [body["id"] for body in again] == ["chatcmpl-same"] * 2
    assert len(drawn) == 2
    inner = [request.request_id for request, _ in served.p.submitted]
    assert len(set(inner)) == len(inner)


async def test_models(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        listed = (await served.client.get("/v1/models")).json()
        one = (await served.client.get("/v1/models/org/demo")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["org/demo", "demo"]
    assert listed["data"][0] == one
    assert (one["object"], one["max_model_len"], one["parent"]) == ("model", 512, None)
    assert str(tmp_path) not in json.dumps(listed)


@pytest.mark.parametrize(
    ("roles", "aggregated", "able"),
    [("pd", False, True), ("p", False, False), ("d", False, False), ("d", True, True)],
)
async def test_health(tmp_path: Path, roles: str, aggregated: bool, able: bool) -> None:
    async with serve(tmp_path, roles, aggregated=aggregated) as served:
        response = await served.client.get("/health")
    assert (response.status_code, response.content) == (200 if able else 503, b"")


async def test_metrics(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        await served.full()
        await served.full(max_tokens=2)
        await served.chat(temperature=5)
        text = (await served.client.get("/metrics")).text
    for line in (
        'vllm:request_success_total{finished_reason="stop",model_name="org/demo"} 1.0',
        'vllm:request_success_total{finished_reason="length",model_name="org/demo"} 1.0',
        'vllm:time_to_first_token_seconds_count{model_name="org/demo"} 2.0',
        'vllm:e2e_request_latency_seconds_count{model_name="org/demo"} 2.0',
        'vllm:num_requests_running{model_name="org/demo"} 0.0',
        'baton:path_total{path="remote"} 2.0',
        'baton:placements_total{path="remote",reason="disaggregated"} 2.0',
        'baton:request_errors_total{kind="InvalidRequest"} 1.0',
    ):
        assert line in text.splitlines()


async def test_version_and_ping(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert isinstance((await served.client.get("/version")).json()["version"], str)
        assert (await served.client.post("/ping")).status_code == 200


# Over a real socket


@asynccontextmanager
async def listening(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    config = uvicorn.Config(served.app, port=0, lifespan="off", log_level="warning", ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        await task


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], **fields}


async def test_chunks_arrive_one_by_one_with_the_right_headers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, listening(served) as client:
        served.d.pause_at = 3
        async with client.stream(
            "POST", "/v1/chat/completions", json=body(stream=True)
        ) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["x-accel-buffering"] == "no"
            assert response.headers["cache-control"] == "no-cache"
            lines = response.aiter_lines()
            assert "assistant" in await anext(lines)
            await until(lambda: served.d.paused.is_set())
            served.d.resume()
            rest = [line async for line in lines]
        assert rest[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("window", ["queued", "prefilled", "decoding"])
async def test_a_client_that_leaves_is_aborted_everywhere(
    tmp_path: Path, stream: bool, window: str
) -> None:
    async with serve(tmp_path) as served, listening(served) as client:
        served.p.pause_at = {"queued": -1, "prefilled": 0, "decoding": None}[window]
        served.d.pause_at = 2 if window == "decoding" else 0
        request = asyncio.create_task(
            client.post("/v1/chat/completions", json=body(stream=stream), timeout=30)
        )
        waiting = served.p if window == "queued" else served.d
        await until(lambda: waiting.paused.is_set())
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: waiting.aborted)
        await until(lambda: served.idle)
        assert len(waiting.aborted) == 1
        if window != "decoding":
            assert len(served.p.aborted) == 1
        text = (await served.client.get("/metrics")).text
        assert "baton:client_disconnects_total 1.0" in text
        assert 'vllm:num_requests_running{model_name="org/demo"} 0.0' in text


async def test_a_client_that_does_not_read_is_cut_off_and_others_go_on(tmp_path: Path) -> None:
    long = ["the cat sat on the mat " * 4000]
    async with (
        serve(tmp_path, "d", texts=long, aggregated=True, write_buffer_bytes=20_000) as served,
        listening(served) as client,
    ):
        served.workers[0].max_model_len = served.workers[0].max_prompt_tokens = 1_000_000
        served.workers[0].session.lose()
        await until(lambda: len(served.workers[0].sessions) == 2)
        port = client.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        content = json.dumps(body(stream=True, return_token_ids=True, logprobs=True)).encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        await until(lambda: served.workers[0].aborted, timeout_s=60)
        other = await served.full(max_tokens=5)
        assert other["usage"]["completion_tokens"] == 5
        answer = await asyncio.wait_for(reader.read(), 30)  # to the connection's end
        writer.close()
        assert b"assistant" in answer
        assert b"[DONE]" not in answer
        await until(lambda: served.idle)
