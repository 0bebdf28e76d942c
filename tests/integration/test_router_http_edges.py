"""The HTTP API over fake workers: bad input, what is around it, real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fake_worker import until
from tests.support.router_http import Served, listening, serve

# Bad input


@pytest.mark.parametrize(
    ("fields", "status", "kind", "param"),
    [
        ({"temperature": "hot"}, 400, "Bad Request", "body.temperature"),
        ({"temperature": 3}, 400, "BadRequestError", "temperature"),
        ({"messages": []}, 400, "BadRequestError", "messages"),
        ({"messages": None}, 400, "Bad Request", "body.messages"),
        ({"model": "gpt"}, 404, "NotFoundError", "model"),
        ({"frequency_penalty": 3}, 400, "BadRequestError", "frequency_penalty"),
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


async def test_cors_settings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "allowed_origins": ("http://a.example",),
        "allowed_methods": ("POST",),
        "allowed_headers": ("x-mine",),
        "allow_credentials": True,
    }
    async with serve(tmp_path, **settings) as served:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-mine",
        }
        found = []
        for origin, more in (
            ("http://a.example", {}),
            ("http://b.example", {}),
            ("http://a.example", {"access-control-request-method": "GET"}),
            ("http://a.example", {"access-control-request-headers": "x-other"}),
        ):
            headers = {"origin": origin, **asked, **more}
            response = await served.client.options("/v1/models", headers=headers)
            found.append(response.status_code)
        answer = await served.client.get("/v1/models", headers={"origin": "http://a.example"})
    assert found == [200, 400, 400, 400]
    assert answer.headers["access-control-allow-origin"] == "http://a.example"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id"


@pytest.mark.parametrize(
    ("rank", "status"),
    [("0", 200), (" 1 ", 200), ("2", 400), ("-1", 400), ("first", 200), ("1.5", 200), ("", 200)],
)
async def test_data_parallel_rank(tmp_path: Path, rank: str, status: int) -> None:
    async with serve(tmp_path, "pdd") as served:
        response = await served.client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}]},
            headers={"X-data-parallel-rank": rank, "traceparent": "nonsense"},
        )
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "X-data-parallel-rank"


async def test_a_path_is_what_it_is(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert (await served.client.get("/health/")).status_code == 404
        head = await served.client.head("/health")
        wrong = await served.client.put("/v1/completions")
    assert (head.status_code, head.content) == (200, b"")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


async def test_load(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        served.d.pause_at = 0
        first = asyncio.create_task(served.full())
        await until(lambda: served.d.paused.is_set())
        busy = (await served.client.get("/load")).json()
        served.d.resume()
        await first
        idle = (await served.client.get("/load")).json()
    assert (busy, idle) == ({"server_load": 1}, {"server_load": 0})


async def test_a_bug_of_ours_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path) as served:
        service = served.app.state.serving.service
        monkeypatch.setattr(service, "prompts", None)
        response = await served.chat()
        assert service.in_flight == 0
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"
    assert "NoneType" not in response.text
    assert "a request failed" in caplog.text


@pytest.mark.parametrize(
    ("path", "fields", "count"),
    [("/v1/completions", {"prompt": ["a", "b", "c"]}, 3), ("/v1/responses", {"input": "a"}, 1)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_the_siblings_that_leaves_is_aborted(
    tmp_path: Path, path: str, fields: dict[str, Any], count: int, stream: bool
) -> None:
    async with serve(tmp_path) as served, client_of(served) as client:
        served.d.pause_at = 2
        request = asyncio.create_task(
            client.post(path, json={**fields, "stream": stream}, timeout=30)
        )
        await until(lambda: len(served.d.adopted) == count and served.d.paused.is_set())
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: len(served.d.aborted) == count)
        await until(lambda: served.idle)
        assert served.app.state.serving.service.in_flight == 0


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
async def client_of(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(served.app) as (_, url), httpx.AsyncClient(base_url=url) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], **fields}


async def test_chunks_arrive_one_by_one_with_the_right_headers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, client_of(served) as client:
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
    async with serve(tmp_path) as served, client_of(served) as client:
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
        client_of(served) as client,
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
