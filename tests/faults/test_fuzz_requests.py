"""Mutated requests: no answer but 200 and 4xx, then a server that works and holds nothing.

BATON_FUZZ_REQUESTS is their number and BATON_FUZZ_SEED where they begin; a failure names its seed.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.demo_model import ensure_demo_model
from tests.support.live_server import LiveServer, LoopThread, live_server
from tests.support.mutations import mutated

REQUESTS = int(os.environ.get("BATON_FUZZ_REQUESTS", "300"))
SEED = int(os.environ.get("BATON_FUZZ_SEED", "0"))
AT_ONCE = 16
PATHS = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = ensure_demo_model(tmp_path_factory.mktemp("fuzz") / "demo")
    pattern = r"tests\.support\.processors\.\w+"
    thread = LoopThread()
    try:
        with live_server(
            thread,
            model,
            router={
                "trust_request_chat_template": True,
                "tool_call_parser": "hermes",
                "logits_processor_pattern": pattern,
                "allow_kv_transfer_params": True,
                "template_timeout_s": 2.0,
                "max_model_len": 256,  # answers without a limit end soon
                "two_step_lease_ms": 2000,  # and so does what nobody comes for
            },
            worker={"logits_processor_pattern": pattern},
        ) as running:
            yield running
    finally:
        thread.close()


async def send(client: httpx.AsyncClient, seed: int) -> tuple[int, str]:
    """One request; some clients leave early. Returns the status and the answer's text."""
    draws = random.Random(seed)
    path = PATHS[0] if draws.random() < 0.8 else PATHS[1]
    body = mutated(draws, chat=path == PATHS[0])
    headers = {"Content-Type": "application/json"}
    leaves = draws.random() < 0.1
    try:
        async with client.stream("POST", path, content=body, headers=headers) as answer:
            if leaves:
                async for _ in answer.aiter_raw():
                    return answer.status_code, ""
            return answer.status_code, (await answer.aread()).decode()
    except httpx.TimeoutException:
        raise AssertionError(f"no answer to seed {seed}: {body[:500]!r}") from None


def check(seed: int, status: int, text: str) -> None:
    assert status in (200, 400, 404, 413, 429), f"seed {seed}: {status} {text[:500]}"
    if status != 200:
        error = json.loads(text)["error"] if text else {"code": status}
        assert error["code"] == status, f"seed {seed}"
    elif text.startswith("data:"):
        assert text.endswith("data: [DONE]\n\n"), f"seed {seed}"
        assert '"code":5' not in text, f"seed {seed}: {text[-500:]}"
    elif text:
        json.loads(text)["choices"]


@pytest.mark.timeout(max(300, REQUESTS))
async def test_mutated_requests_do_no_harm(server: LiveServer) -> None:
    statuses: Counter[int] = Counter()
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        before = await client.post(PATHS[0], json={**question, "temperature": 0})
        seeds = iter(range(SEED, SEED + REQUESTS))

        async def worker() -> None:
            for seed in seeds:
                status, text = await send(client, seed)
                check(seed, status, text)
                statuses[status] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(worker())
        assert statuses.total() == REQUESTS
        assert statuses[200] > REQUESTS * 0.1, "the mutations must leave some requests valid"
        assert statuses[400] > REQUESTS * 0.1
        assert (await client.get("/health")).status_code == 200
        after = await client.post(PATHS[0], json={**question, "temperature": 0})
        assert after.json()["choices"] == before.json()["choices"]
    await server.idle()


def test_mutations_are_repeatable(tmp_path: Path) -> None:
    bodies = [mutated(random.Random(seed), chat=True) for seed in (1, 1, 2)]
    assert bodies[0] == bodies[1] != bodies[2]
