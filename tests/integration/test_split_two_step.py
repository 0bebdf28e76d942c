"""The two-step protocol: P computes a prompt for nobody yet, D draws all tokens itself."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import Grammar, GrammarKind, SamplingParams
from contracts.worker import Role
from tests.support.byte_tokenizer import END, add_byte_tokenizer
from tests.support.split_cluster import SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")
    add_byte_tokenizer(folder)
    return folder


def request_of(name: str, length: int, params: SamplingParams) -> GenerationRequest:
    draw = random.Random(name)
    prompt = tuple(draw.randrange(2, VOCAB) for _ in range(length))
    return GenerationRequest(new_request_id(), prompt, params)


KINDS = {
    "greedy": SamplingParams(max_tokens=10, temperature=0.0, logprobs=2),
    "several": SamplingParams(max_tokens=10, seed=77, n=3, frequency_penalty=0.5),
    "beams": SamplingParams(max_tokens=10, n=3, beam=True),
    "grammar": SamplingParams(
        max_tokens=20,
        seed=3,
        eos_token_ids=(END,),
        grammar=Grammar(GrammarKind.REGEX, "[a-f]{3}(x|yy)", end_token_ids=(END,)),
    ),
    "one": SamplingParams(max_tokens=1, seed=9, n=2),
}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64])
async def test_d_draws_what_it_draws_alone(llama: Path, length: int) -> None:
    async with split_cluster(llama) as cluster:
        for name, params in KINDS.items():
            request = request_of(f"two-step{length}", length, params)
            alone = await cluster.send(replace(request, cache_salt="alone"), split=False)
            computed = cluster.decode.status()["computed_prompt_tokens"]
            for _ in range(2):  # cold, then with hits in both caches
                again = replace(request, request_id=new_request_id(), cache_salt=name)
                answer = await cluster.redraw(again)
                assert answer.failure == ""
                assert answer.path == "remote"
                assert answer.tokens == alone.tokens
                assert answer.finish == alone.finish
            now = cluster.decode.status()["computed_prompt_tokens"]
            assert isinstance(now, int)
            assert isinstance(computed, int)
            assert now == computed + 2, "one prompt token each"
        await cluster.idle()


async def step_one(cluster: SplitCluster, request: GenerationRequest, lease_ms: int | None) -> str:
    """P's part; the params it gave."""
    params = SamplingParams(max_tokens=2, temperature=0.0)
    first = replace(request, request_id=new_request_id(), params=params, lease_ms=lease_ms)
    answer = cluster.expect(first)
    cluster.sessions[Role.PREFILL].submit(first, handoff=True)
    await cluster.until(answer, lambda: bool(answer.tokens[0]))
    return answer.kv_transfer_params


async def test_p_keeps_the_kv_for_as_long_as_was_asked(llama: Path) -> None:
    request = request_of("lease", 40, KINDS["greedy"])
    async with split_cluster(llama) as cluster:
        params = await step_one(cluster, request, lease_ms=60_000)
        assert '"lease_ms":60000' in params
        # Until one that was begun later, under the worker's own lease, is over.
        await step_one(cluster, request_of("own", 40, KINDS["greedy"]), lease_ms=None)
        async with asyncio.timeout(30):
            while not cluster.prefill.ended_transfers:  # noqa: ASYNC110 - bounded, rare
                await asyncio.sleep(0.02)
        assert cluster.prefill.ended_transfers == {"expired": 1}
        answer = cluster.expect(request)
        cluster.sessions[Role.DECODE].adopt(replace(request, redraw=True), params)
        await cluster.until(answer, lambda: answer.over)
        assert answer.path == "remote"
        await cluster.idle()


async def test_after_the_lease_d_refuses(llama: Path) -> None:
    request = request_of("late", 40, KINDS["several"])
    async with split_cluster(llama) as cluster:
        params = await step_one(cluster, request, lease_ms=1)
        await cluster.idle()  # P has let go of it
        assert cluster.prefill.ended_transfers == {"expired": 1}
        answer = cluster.expect(request)
        cluster.sessions[Role.DECODE].adopt(replace(request, redraw=True), params)
        await cluster.until(answer, lambda: answer.over)
        assert answer.failure.startswith("TransferGone")
        assert "expired" in answer.failure
        await cluster.idle()


async def test_a_prompt_as_long_as_p_can_take(llama: Path) -> None:
    """P's own token 1 ends at its context's end, which takes the transfer back."""
    request = request_of("full", 95, replace(KINDS["greedy"], max_tokens=4))
    async with split_cluster(llama, prefill={"max_model_len": 96}) as cluster:
        alone = await cluster.send(
            replace(request, request_id=new_request_id(), cache_salt="alone"), split=False
        )
        answer = await cluster.redraw(request)
        assert answer.path == "recomputed"
        assert answer.tokens == alone.tokens
        await cluster.idle()


async def test_params_that_only_the_router_repeats_are_good(llama: Path) -> None:
    """Its second attempt, after it lost the D that had used them, is no fault of the client's."""
    request = request_of("again", 40, KINDS["greedy"])
    async with split_cluster(llama) as cluster:
        alone = await cluster.send(
            replace(request, request_id=new_request_id(), cache_salt="alone"), split=False
        )
        params = await step_one(cluster, request, lease_ms=60_000)
        first = cluster.expect(request)
        cluster.sessions[Role.DECODE].adopt(replace(request, redraw=True), params)
        await cluster.until(first, lambda: first.over)
        again = replace(request, redraw=True, attempt=1)
        answer = cluster.expect(again)
        cluster.sessions[Role.DECODE].adopt(again, params)
        await cluster.until(answer, lambda: answer.over)
        assert (answer.path, answer.cause) == ("recomputed", "TransferGone")
        assert answer.tokens == alone.tokens
        await cluster.idle()
