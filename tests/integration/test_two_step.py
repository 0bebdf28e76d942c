"""The two-step handoff as an outside proxy drives it, over real workers, gRPC and NIXL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.demo_model import ensure_demo_model
from contracts.worker import Role
from tests.support.conformance import assert_same
from tests.support.live_server import LiveServer, LoopThread, live_server

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "demo",
    "messages": [
        {"role": "user", "content": "Tell me of the sea, the wind and the long way home."}
    ],
    "max_tokens": 12,
    "ignore_eos": True,
    "return_token_ids": True,
}
GREEDY = {**BODY, "temperature": 0.0}
# What the usual proxies send first.
ASK: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = ensure_demo_model(tmp_path_factory.mktemp("two-step") / "demo")
    thread = LoopThread()
    try:
        router = {"allow_kv_transfer_params": True, "two_step_lease_ms": 1500}
        with live_server(thread, model, router=router, worker={"prefix_caching": False}) as running:
            yield running
            running.wait_idle()
    finally:
        thread.close()


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http
    server.wait_idle()


def post(client: httpx.Client, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prefill(client: httpx.Client, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    first = post(client, {**body, "max_tokens": 1, "kv_transfer_params": ASK}, path)
    assert first["usage"]["completion_tokens"] == 1
    assert first["choices"][0]["finish_reason"] == "length"
    params: dict[str, Any] = first["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    return params


def computed(server: LiveServer) -> int:
    """Prompt tokens that the D ran through the model."""

    async def read() -> int:
        return int(server.workers[Role.DECODE].status()["computed_prompt_tokens"])

    return server.thread.call(read())


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 7, "n": 3}, id="three-samples"),
        pytest.param(
            {"temperature": 1.0, "seed": 3, "min_tokens": 4, "logprobs": True, "top_logprobs": 2},
            id="rules-of-the-first-token",
        ),
        pytest.param({"structured_outputs": {"regex": "[ab]{8}"}, "seed": 1}, id="grammar"),
    ],
)
def test_both_steps_give_the_direct_answer(
    server: LiveServer, client: httpx.Client, extra: dict[str, Any]
) -> None:
    body = {**BODY, **extra}
    direct = post(client, body)
    before = computed(server)
    without = {name: value for name, value in body.items() if name != "min_tokens"}
    params = prefill(client, without)
    second = post(client, {**body, "kv_transfer_params": params})
    # The D runs the last token alone, so log-probabilities may differ in their last digits.
    assert_same(second["choices"], direct["choices"])
    assert second["usage"] == direct["usage"]
    assert second["kv_transfer_params"] is None
    assert computed(server) - before == 1  # the KV was handed over: only the last token is run


def test_a_stream_takes_the_second_step(client: httpx.Client) -> None:
    direct = post(client, GREEDY)["choices"][0]["message"]["content"]
    body = {**GREEDY, "stream": True, "kv_transfer_params": prefill(client, GREEDY)}
    text = client.post(CHAT, json=body).text
    assert text.endswith("data: [DONE]\n\n")
    chunks = [httpx.Response(200, content=line[6:]).json() for line in text.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == direct


def test_text_completions_take_both_steps(client: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "The sea was calm", "max_tokens": 9, "temperature": 0.0}
    direct = post(client, body, "/v1/completions")
    params = prefill(client, body, "/v1/completions")
    second = post(client, {**body, "kv_transfer_params": params}, "/v1/completions")
    assert second["choices"] == direct["choices"]


def test_what_nobody_comes_for_is_freed(server: LiveServer, client: httpx.Client) -> None:
    params = prefill(client, GREEDY)
    server.wait_idle()  # the lease is over
    before = bytes_read(server)
    refused = client.post(CHAT, json={**GREEDY, "kv_transfer_params": params})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "kv_transfer_params"
    assert "expired" in error["message"]
    assert bytes_read(server) == before


def bytes_read(server: LiveServer) -> int:
    (handoffs,) = [s["handoffs"] for s in server.ledgers() if "handoffs" in s]
    assert isinstance(handoffs, dict)
    return int(handoffs["num_bytes"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_handoff_serves_once(server: LiveServer, client: httpx.Client, stream: bool) -> None:
    params = prefill(client, GREEDY)
    post(client, {**GREEDY, "kv_transfer_params": params})
    before = bytes_read(server)
    body = {**GREEDY, "stream": stream, "kv_transfer_params": params}
    again = client.post(CHAT, json=body)
    assert again.status_code == 400, again.text
    assert "released" in again.json()["error"]["message"]
    assert bytes_read(server) == before
    server.wait_idle()


def test_prompt_scores_are_computed_with_the_prompt(
    server: LiveServer, client: httpx.Client
) -> None:
    body = {**GREEDY, "prompt_logprobs": 1}
    direct = post(client, body)
    first = post(client, {**body, "max_tokens": 1, "kv_transfer_params": ASK})
    assert_same(first["prompt_logprobs"], direct["prompt_logprobs"])
    second = post(client, {**body, "kv_transfer_params": first["kv_transfer_params"]})
    assert_same(second["prompt_logprobs"], direct["prompt_logprobs"])
    assert_same(second["choices"], direct["choices"])


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"remote_port": 1}, id="address"),
        pytest.param({"mac": "0" * 64}, id="mac"),
        pytest.param({"prompt_digest": "0" * 64}, id="digest"),
        pytest.param({"further": 1}, id="added"),
    ],
)
def test_edited_params_are_refused(client: httpx.Client, edit: dict[str, Any]) -> None:
    params = prefill(client, GREEDY)
    response = client.post(CHAT, json={**GREEDY, "kv_transfer_params": {**params, **edit}})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "kv_transfer_params"


def test_params_of_another_prompt_are_refused(client: httpx.Client) -> None:
    other = {**GREEDY, "messages": [{"role": "user", "content": "Something else."}]}
    params = prefill(client, GREEDY)
    response = client.post(CHAT, json={**other, "kv_transfer_params": params})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "kv_transfer_params"


def test_the_first_step_is_no_stream(client: httpx.Client) -> None:
    response = client.post(CHAT, json={**GREEDY, "stream": True, "kv_transfer_params": ASK})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "kv_transfer_params"


def test_without_the_switch_they_change_nothing(tmp_path: Path) -> None:
    model = ensure_demo_model(tmp_path / "demo")
    thread = LoopThread()
    try:
        with live_server(thread, model) as closed, httpx.Client(base_url=closed.url) as http:
            answer = post(http, {**GREEDY, "kv_transfer_params": ASK})
            assert answer["usage"]["completion_tokens"] == BODY["max_tokens"]
            assert answer["kv_transfer_params"] is None
            closed.wait_idle()
    finally:
        thread.close()
