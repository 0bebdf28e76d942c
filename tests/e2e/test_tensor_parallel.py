"""`baton worker decode --tensor-parallel-size 2` and a router, as ordinary processes."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from functools import partial

import psutil
import pytest

from tests.support.commands import TIMEOUT_S, Command, healthy, wait_for

READY = r"^baton worker ready role=decode address=(127\.0\.0\.1:\d+) id=\S+$"
FLAGS = ("--num-threads", "1", "--kv-memory", "16MiB")


def complete(url: str) -> list[int]:
    body = {
        "model": "demo",
        "max_tokens": 24,
        "temperature": 0,
        "prompt": list(range(40, 90)),
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        tokens: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
        return tokens


def ranks(worker: Command) -> list[psutil.Process]:
    """The followers: children that were started with the worker's own interpreter."""
    return [
        child
        for child in psutil.Process(worker.process.pid).children()
        if any("engine.rank_main" in argument for argument in child.cmdline())
    ]


def ended(process: psutil.Process) -> bool:
    return not process.is_running()


def test_two_ranks_answer_as_one_and_a_killed_one_ends_the_worker(
    start: Callable[..., Command], model: str
) -> None:
    answers = []
    for size in ("1", "2"):
        worker = start("worker", "decode", model, *FLAGS, "--tensor-parallel-size", size)
        router = start("router", model, "--decode", worker.ready(READY), "--port", "0")
        url = router.ready(r"^baton router ready url=(http://127\.0\.0\.1:\d+)$")
        wait_for(partial(healthy, url), "a healthy router")
        answers.append(complete(url))
        assert router.end(signal.SIGTERM) == 0
        if size == "1":
            assert worker.end(signal.SIGTERM) == 0
    assert answers[0] == answers[1]
    assert len(answers[0]) == 24

    (follower,) = ranks(worker)
    os.kill(follower.pid, signal.SIGKILL)
    assert worker.process.wait(TIMEOUT_S) == 1
    assert "rank 1 of this worker has ended (with status -9)" in worker.output


def test_prefill_with_two_ranks_and_decode_with_one_or_two(
    start: Callable[..., Command], model: str
) -> None:
    prefill = start("worker", "prefill", model, *FLAGS, "--tensor-parallel-size", "2")
    p_address = prefill.ready(READY.replace("decode", "prefill"))
    answers = []
    for size in ("1", "2"):
        decode = start("worker", "decode", model, *FLAGS, "--tensor-parallel-size", size)
        d_address = decode.ready(READY)
        for at in (("--prefill", p_address), ()):
            router = start("router", model, *at, "--decode", d_address, "--port", "0")
            url = router.ready(r"^baton router ready url=(http://127\.0\.0\.1:\d+)$")
            wait_for(partial(healthy, url), "a healthy router")
            answers.append(complete(url))
            with urllib.request.urlopen(f"{url}/metrics", timeout=60) as metrics:
                path = "remote" if at else "local"
                assert f'baton:path_total{{path="{path}"}} 1.0' in metrics.read().decode()
            assert router.end(signal.SIGTERM) == 0
        assert decode.end(signal.SIGTERM) == 0
    assert prefill.end(signal.SIGTERM) == 0
    assert answers == [answers[0]] * 4


def test_ranks_end_with_a_signal_or_with_their_worker(
    start: Callable[..., Command], model: str
) -> None:
    for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -9)):
        worker = start("worker", "decode", model, *FLAGS, "--tensor-parallel-size", "2")
        worker.ready(READY)
        (follower,) = ranks(worker)
        assert worker.end(number) == status
        wait_for(partial(ended, follower), "the follower's end")


@pytest.mark.parametrize(
    ("role", "size", "line"),
    [
        ("decode", "3", "it has 8 attention heads, which do not divide by 3"),
        ("prefill", "3", "it has 8 attention heads, which do not divide by 3"),
        ("decode", "99", "setting tensor_parallel_size (from the command line): "),
    ],
)
def test_what_does_not_work_is_one_line(
    role: str, size: str, line: str, start: Callable[..., Command], model: str
) -> None:
    worker = start("worker", role, model, *FLAGS, "--tensor-parallel-size", size)
    assert worker.process.wait(TIMEOUT_S) == 2
    assert line in worker.output
    assert "Traceback" not in worker.output
