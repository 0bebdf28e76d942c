"""A cluster without Ray, as the help of `baton worker` shows it: three processes."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable

from tests.support.commands import ENVIRONMENT, TIMEOUT_S, Command, healthy, wait_for


def complete(url: str) -> int:
    """Tokens of a completion."""
    body = {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello!"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(json.loads(answer.read())["usage"]["completion_tokens"])


def test_three_processes_serve_and_end_well(start: Callable[..., Command], model: str) -> None:
    flags = ("--num-threads", "1", "--kv-memory", "16MiB")
    workers = [start("worker", role, model, *flags) for role in ("prefill", "decode")]
    prefill, decode = (
        worker.ready(rf"^baton worker ready role={role} address=(127\.0\.0\.1:\d+) id=\S+$")
        for worker, role in zip(workers, ("prefill", "decode"), strict=True)
    )
    addresses = ("--prefill", prefill, "--decode", decode)
    router = start("router", model, *addresses, "--port", "0")
    url = router.ready(r"^baton router ready url=(http://127\.0\.0\.1:\d+)$")
    wait_for(lambda: healthy(url), "a healthy router")
    assert complete(url) == 8

    status = [sys.executable, "-m", "cluster.cli", "status", "--check", "--json", prefill, decode]
    shown = subprocess.run(status, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in shown.stdout.splitlines())
    assert (first["role"], second["role"]) == ("prefill", "decode")
    assert first["ended_transfers"] == {"released": 1}  # so the handoff was used

    for command in (*workers, router):  # where it is, without an end of its work
        command.process.send_signal(signal.SIGUSR1)
        for told in ("most recent call first", "Stack for <Task"):
            wait_for(lambda: told in command.output, told)  # noqa: B023 - called at once
    assert complete(url) == 8

    for command, number in zip((*workers, router), (15, 2, 15), strict=True):
        assert command.end(signal.Signals(number)) == 0


def test_a_signal_while_the_model_loads_ends_the_worker(
    start: Callable[..., Command], model: str
) -> None:
    worker = start("worker", "decode", model)
    wait_for(lambda: "starting decode worker" in worker.output, "the start to begin")
    assert worker.end(signal.SIGTERM) == 0


def test_a_taken_port_is_one_line(start: Callable[..., Command], model: str) -> None:
    decode = ("--decode", "127.0.0.1:1")
    router = start("router", model, *decode, "--port", "0")
    port = router.ready(r"^baton router ready url=http://127\.0\.0\.1:(\d+)$")
    second = start("router", model, *decode, "--port", port)
    assert second.process.wait(TIMEOUT_S) == 2
    assert f"port {port} on 127.0.0.1 is in use by python" in second.output
    assert "Traceback" not in second.output
