"""Keys and request ids around an app that says which path it was asked for."""

import hmac
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from router import middleware
from router.middleware import ApiKeyMiddleware, RequestIdMiddleware


def client(*keys: str) -> httpx.AsyncClient:
    async def anything(request: Request) -> Response:
        return PlainTextResponse(request.url.path)

    methods = ["GET", "POST", "OPTIONS"]
    app: Any = Starlette(routes=[Route("/{rest:path}", anything, methods=methods)])
    if keys:
        app = ApiKeyMiddleware(app, keys)
    transport = httpx.ASGITransport(app=RequestIdMiddleware(app))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/tokenize", "/detokenize", "/inference/v1/generate", "/load", "/", "/x"]
)
async def test_everything_needs_a_key(path: str) -> None:
    async with client("one", "two") as c:
        for value in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer three",
            "Basic one",
            "one",
            "Bearer on",
        ):
            headers = {} if value is None else {"authorization": value}
            response = await c.post(path, headers=headers)
            assert response.status_code == 401, value
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "AuthenticationError"
        for value in ("Bearer one", "bearer two", "BEARER  one"):
            assert (await c.post(path, headers={"authorization": value})).text == path
        assert (await c.request("OPTIONS", path)).status_code == 200


async def test_some_paths_are_open() -> None:
    async with client("one") as c:
        for path in ("/health", "/metrics", "/version", "/ping", "/openapi.json"):
            assert (await c.get(path)).text == path
        for path in ("/health/", "/healthy", "/version/v1/models", "//health"):
            assert (await c.get(path)).status_code == 401


async def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    class Watched:
        @staticmethod
        def compare_digest(token: bytes, key: bytes) -> bool:
            compared.append(key)
            return hmac.compare_digest(token, key)

    monkeypatch.setattr(middleware, "hmac", Watched)
    async with client("one", "two", "three") as c:
        await c.get("/v1/models", headers={"authorization": "Bearer one"})
    assert compared == [b"one", b"two", b"three"]


@pytest.mark.parametrize("sent", ["a", "with space", "x" * 256])
async def test_a_request_id_comes_back(sent: str) -> None:
    async with client("key") as c:
        response = await c.get("/v1/models", headers={"x-request-id": sent})
    assert (response.status_code, response.headers["x-request-id"]) == (401, sent)


@pytest.mark.parametrize("sent", [b"", b"  ", b"x" * 257, b"a\tb", "ü".encode(), b"\x7f"])
async def test_one_that_is_not_fit_to_be_shown_does_not(sent: bytes) -> None:
    async with client() as c:
        response = await c.get("/v1/models", headers=[(b"x-request-id", sent)])
        assert "x-request-id" not in response.headers
        assert "x-request-id" not in (await c.get("/v1/models")).headers
