"""What is prepared for a request fails it alone, and can be dropped at any time."""

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from contracts.worker import Role
from tests.support import logit_tricks
from tests.support.byte_tokenizer import END, add_byte_tokenizer
from tests.support.split_cluster import SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

TRICKS = "tests.support.logit_tricks."
ALLOWED: dict[str, object] = {"logits_processor_pattern": logit_tricks.NAMES}
PLAIN = SamplingParams(max_tokens=8, temperature=0.0)
BAD = Grammar(GrammarKind.REGEX, "(unclosed", end_token_ids=(END,))
SLOW = replace(PLAIN, processors=(ProcessorSpec(TRICKS + "Slow", args="[]"),))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")
    add_byte_tokenizer(folder)
    return folder


@pytest.fixture
def slow() -> Iterator[threading.Event]:
    """The event that lets `Slow` be made; it is, at the latest, at the test's end."""
    logit_tricks.ENTERED.clear()
    logit_tricks.GO_ON.clear()
    yield logit_tricks.GO_ON
    logit_tricks.GO_ON.set()


def request_of(params: SamplingParams) -> GenerationRequest:
    draw = random.Random("prepare")
    prompt = tuple(draw.randrange(2, VOCAB) for _ in range(40))
    return GenerationRequest(new_request_id(), prompt, params)


async def entered() -> None:
    """Wait until a `Slow` is being made."""
    async with asyncio.timeout(10):
        while not logit_tricks.ENTERED.is_set():  # noqa: ASYNC110 - set in a thread
            await asyncio.sleep(0.005)


async def serves(cluster: SplitCluster) -> None:
    """A plain request is well, and nothing is held."""
    answer = await cluster.generate([5, 6, 7], PLAIN)
    assert answer.failure == ""
    assert len(answer.tokens[0]) == 8
    await cluster.idle()


@pytest.mark.parametrize("split", [True, False])
async def test_what_cannot_be_prepared_fails_before_any_compute(llama: Path, split: bool) -> None:
    async with split_cluster(llama) as cluster:
        bad = await cluster.send(request_of(replace(PLAIN, grammar=BAD)), split=split)
        assert bad.failure.startswith("InvalidRequest: ")
        denied = replace(PLAIN, processors=(ProcessorSpec(TRICKS + "prefer_even"),))
        answer = await cluster.send(request_of(denied), split=split)
        assert answer.failure.startswith("InvalidRequest: ")
        assert answer.param == "logits_processors"
        for worker in (cluster.prefill, cluster.decode):
            assert worker.status()["computed_prompt_tokens"] == 0
        await serves(cluster)


async def test_d_alone_cannot_prepare_it(llama: Path) -> None:
    """P has computed the prompt; D gives everything back."""
    async with split_cluster(llama) as cluster:
        request = request_of(PLAIN)
        answer = cluster.expect(request)
        cluster.sessions[Role.PREFILL].submit(request, handoff=True)
        await cluster.until(answer, lambda: bool(answer.kv_transfer_params))
        bad = replace(request, params=replace(PLAIN, grammar=BAD))
        cluster.sessions[Role.DECODE].adopt(bad, answer.kv_transfer_params)
        await cluster.until(answer, lambda: answer.over)
        assert answer.failure.startswith("InvalidRequest: ")
        await serves(cluster)


@pytest.mark.parametrize("count", [0, 3])
async def test_a_draw_that_fails(llama: Path, count: int) -> None:
    """On P (the first token) or on D; n choices end together, neighbours go on."""
    failing = replace(
        PLAIN, n=2, processors=(ProcessorSpec(TRICKS + "FailAfter", args=f"[{count}]"),)
    )
    async with split_cluster(llama, prefill=ALLOWED, decode=ALLOWED) as cluster:
        for split in (True, False):
            answer, other = await asyncio.gather(
                cluster.send(request_of(failing), split=split),
                cluster.send(request_of(PLAIN), split=split),
            )
            assert answer.failure.startswith("EngineFailure: ")
            assert [len(tokens) for tokens in answer.tokens] == [count, count]
            assert other.failure == ""
        await serves(cluster)


@pytest.mark.parametrize("place", ["prefill", "local", "adopt"])
@pytest.mark.parametrize("how", ["abort", "session"])
async def test_a_request_leaves_while_it_is_prepared(
    llama: Path, slow: threading.Event, place: str, how: str
) -> None:
    async with split_cluster(llama, prefill=ALLOWED, decode=ALLOWED) as cluster:
        request = request_of(SLOW)
        role = Role.PREFILL if place == "prefill" else Role.DECODE
        answer = cluster.expect(request)
        if place == "adopt":
            plain = replace(request, params=PLAIN)
            cluster.sessions[Role.PREFILL].submit(plain, handoff=True)
            await cluster.until(answer, lambda: bool(answer.kv_transfer_params))
            cluster.sessions[Role.DECODE].adopt(request, answer.kv_transfer_params)
        else:
            cluster.sessions[role].submit(request, handoff=place == "prefill")
        await entered()
        worker = cluster.prefill if place == "prefill" else cluster.decode
        assert worker.load().waiting == 1
        if how == "abort":
            cluster.sessions[role].abort(request.request_id, 0)
        else:
            await cluster.sessions[role].close()
        if place == "adopt":
            cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
        await cluster.idle()
        assert worker.load().waiting == 0
        slow.set()
        if how == "abort":
            await serves(cluster)
        assert len(answer.tokens[0]) <= (place == "adopt"), "P's token 1, and none of D's"
        assert answer.failure == ""
        await cluster.idle()


async def test_closing_while_a_request_is_prepared(llama: Path, slow: threading.Event) -> None:
    async with split_cluster(llama, prefill=ALLOWED, decode=ALLOWED) as cluster:
        request = request_of(SLOW)
        cluster.expect(request)
        cluster.sessions[Role.DECODE].submit(request, handoff=False)
        await entered()
    slow.set()  # only now: closing did not wait for the thread that makes the processor


async def test_a_deadline_ends_the_preparation(llama: Path, slow: threading.Event) -> None:
    async with split_cluster(llama, prefill=ALLOWED, decode=ALLOWED) as cluster:
        request = replace(request_of(SLOW), deadline_s=0.1)
        answer = await cluster.send(request, split=True)
        assert answer.failure.startswith("Overloaded: ")
        slow.set()
        await serves(cluster)
