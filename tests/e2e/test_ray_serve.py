"""`baton serve --demo` as a person runs it: real Ray, Serve, HAProxy, router and workers."""

import json
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from openai import OpenAI

from cluster.demo_model import ensure_demo_model
from tests.support.served import END_S, START_S, Served, all_listening, healthy, listening, wait_for

pytestmark = pytest.mark.ray


def post(url: str, **body: Any) -> tuple[str, str]:
    """Status line's content type and the body of a chat completion."""
    message = {"role": "user", "content": "Tell me about the sea."}
    data = json.dumps({"model": "demo", "messages": [message], "temperature": 0} | body).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def complete(url: str) -> str:
    _, body = post(url, max_tokens=16)
    content = json.loads(body)["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("s"), "--port", "0")
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    return served.wait_until_ready()


def test_a_completion_and_a_stream_say_the_same(url: str) -> None:
    content = complete(url)
    kind, body = post(url, max_tokens=16, stream=True, stream_options={"include_usage": True})
    assert kind.startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == content
    assert chunks[-1]["usage"]["completion_tokens"] == 16


def test_the_openai_client_gets_the_same_text_either_way(url: str) -> None:
    ask: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me about rivers."}],
        "max_tokens": 24,
        "temperature": 0.9,
        "seed": 3,
        "n": 2,
    }
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(**ask)
        texts = ["", ""]
        for chunk in client.chat.completions.create(**ask, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in answer.choices] == texts
    assert texts[0] != texts[1]


def metric(url: str, name: str) -> list[float]:
    """All samples of a metric, whatever their labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return [float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_holds_nothing(url: str, stream: bool) -> None:
    gone = metric(url, "baton:client_disconnects_total")[0]
    body = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 4000}
    content = json.dumps(body | {"stream": stream, "ignore_eos": True}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        wait_for(lambda: sum(metric(url, "baton:worker_running")) > 0, END_S, "it to run")
    wait_for(lambda: sum(metric(url, "baton:worker_running")) == 0, END_S, "both sides' release")
    assert metric(url, "vllm:num_requests_running") == [0.0]
    assert metric(url, "baton:client_disconnects_total") == [gone + 1]


def test_every_handoff_is_measured(url: str) -> None:
    before = metric(url, "baton:handoff_bytes_count")[0]
    post(url, max_tokens=4, messages=[{"role": "user", "content": "Something not said before."}])
    assert metric(url, "baton:handoff_bytes_count") == [before + 1]
    for name in ("bytes", "descriptors", "read_seconds", "gigabytes_per_second"):
        assert metric(url, f"baton:handoff_{name}_sum")[0] > 0


def test_the_printed_curl_works(served: Served, url: str) -> None:
    (command,) = re.findall(r"^curl .*$", served.output, re.MULTILINE)
    answer = subprocess.run(
        command.replace("curl", "curl -s -f"), shell=True, capture_output=True, timeout=60
    )
    assert answer.returncode == 0
    assert answer.stdout.rstrip().endswith(b"data: [DONE]")


def test_only_this_machine_can_reach_what_we_open(served: Served, url: str) -> None:
    addresses = {
        c.laddr.ip
        for process in served.named("haproxy")
        for c in process.net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_a_dead_registry_and_then_a_dead_worker_are_replaced(served: Served, url: str) -> None:
    before = complete(url)
    (registry,) = served.named("ray::Registry")
    (decoder,) = served.named("ray::ServeReplica:baton:DecodeWorker")
    registry.kill()
    assert complete(url) == before  # no request needs the registry
    decoder.kill()
    wait_for(lambda: not healthy(url), END_S, "the router to miss the worker")
    # The new worker can only be found through the restarted registry.
    wait_for(lambda: healthy(url), START_S, "the new worker")
    assert complete(url) == before


def test_sigterm_ends_everything_within_seconds(served: Served, url: str) -> None:
    """The last test with this cluster."""
    family = served.family()
    ports = listening(family)
    assert len(family) > 8
    served.process.terminate()
    assert served.process.wait(END_S) == 0
    assert not [process for process in family if process.is_running()]
    assert not ports & all_listening()
    assert not list(served.temporary.glob("baton-*"))


def test_kill_9_leaves_no_process_and_no_port(tmp_path_factory: pytest.TempPathFactory) -> None:
    served = Served(tmp_path_factory.mktemp("k"), "--port", "0")
    try:
        url = served.wait_until_ready()
        assert complete(url)
        family = served.family()
        ports = listening(family)
        assert int(url.rpartition(":")[2]) in ports
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        wait_for(lambda: not any(p.is_running() for p in family), END_S, "all processes to end")
        assert not ports & all_listening()
        wait_for(lambda: not list(served.temporary.glob("baton-*")), END_S, "the files to go")
    finally:
        served.close()


def test_a_model_that_cannot_be_served_is_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("u")
    model = ensure_demo_model(folder / "spoilt")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    served = Served(folder, "--port", "0", model=(str(model),))
    try:
        assert served.process.wait(START_S) == 1
        (line,) = [line for line in served.output.splitlines() if "baton: error" in line]
        assert re.search(r"the (prefill|decode) worker cannot start: UnsupportedModel: ", line)
        assert "Traceback" not in served.output
    finally:
        served.close()
