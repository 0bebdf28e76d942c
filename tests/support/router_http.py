"""The router's HTTP API over fake workers, as tests serve it."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
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

    def official(self, api_key: str = "any") -> openai.AsyncOpenAI:
        """The official client, talking to this app."""
        transport: Any = self.client  # its own kind of client is a fork of this one
        return openai.AsyncOpenAI(
            api_key=api_key, base_url="http://test/v1", http_client=transport, max_retries=0
        )

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
async def listening(
    app: FastAPI, *, send_buffer_bytes: int | None = None, **settings: Any
) -> AsyncIterator[tuple[uvicorn.Server, str]]:
    """The app on a real socket: the server, and its URL. Its lifespan belongs to the caller."""
    config = uvicorn.Config(app, lifespan="off", log_level="warning", ws="none", **settings)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes is not None:  # its connections inherit that
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    port = listener.getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
        listener.close()


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
