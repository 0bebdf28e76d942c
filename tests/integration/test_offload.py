"""Prompts whose KV went to host memory and came back: same tokens, nothing computed twice."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from tests.support.reference import greedy
from tests.support.split_cluster import Answer, SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

NEW = 6
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)
HOST = {"kv_offload_bytes": 4 << 20}
BLOCKS = 14


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return build_tiny("llama", models / "llama")


def prompts_of(seed: str, count: int, length: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCAB) for _ in range(length)] for _ in range(count)]


@pytest.mark.parametrize(
    ("arch", "block_bytes"),
    [("llama", 12288), ("gemma2", 12288), ("qwen3_moe", 12288)],
)
@pytest.mark.parametrize("split", [True, False], ids=["split", "aggregated"])
async def test_an_evicted_prefix_comes_back(
    arch: str, block_bytes: int, split: bool, models: Path
) -> None:
    folder = build_tiny(arch, models / arch)
    prompts = prompts_of(arch, 5, 100)  # 7 blocks each: two of them fill the cache
    truth = [greedy(folder, arch, prompt, NEW) for prompt in prompts]
    small: dict[str, object] = {"kv_memory_bytes": BLOCKS * block_bytes, **HOST}
    async with split_cluster(folder, prefill=small, decode=small) as cluster:
        worker = cluster.prefill if split else cluster.decode
        for visit in range(3):
            answers = [await cluster.generate(p, GREEDY, split=split) for p in prompts]
            assert [a.tokens[0] for a in answers] == truth
            assert [a.cached_tokens for a in answers] == [96 * (visit > 0)] * len(prompts)
            assert {a.path for a in answers} == {"remote" if split else "local"}
        await cluster.idle()
        status: Any = worker.status()
        assert status["evictions"] > 0
        assert status["computed_prompt_tokens"] == len(prompts) * (100 + 2 * 4)
        assert status["loaded_bytes"] > 0
        assert status["offload"]["total"] == (4 << 20) // block_bytes
        if split:  # D keeps what it was handed, and reads it once only
            decode: Any = cluster.decode.status()
            assert decode["loaded_bytes"] > 0
            assert decode["computed_prompt_tokens"] == 0
            assert all(a.num_bytes <= block_bytes for a in answers), "the last block at most"
        assert [await cluster.prefill.audit(), await cluster.decode.audit()] == [[], []]


def mixed(draw: random.Random) -> list[tuple[list[int], SamplingParams, bool]]:
    """Prompts that share beginnings, some with several choices or beams, some to be aborted."""
    trunk = prompts_of("trunk", 3, 80)
    made = []
    for number in range(40):
        prompt = draw.choice(trunk)[: draw.choice([16, 48, 79, 80])]
        prompt = prompt + [draw.randrange(2, VOCAB) for _ in range(draw.randint(1, 40))]
        kind = draw.choice(["greedy", "sampled", "beams"])
        if kind == "beams":
            params = SamplingParams(max_tokens=5, n=2, beam=True)
        elif kind == "sampled":
            params = SamplingParams(max_tokens=draw.randint(1, 20), n=3, seed=number)
        else:
            params = SamplingParams(max_tokens=draw.randint(1, 30), temperature=0.0)
        made.append((prompt, params, number % 7 == 6))
    return made


async def crowd(cluster: SplitCluster, *, split: bool) -> list[list[list[int]]]:
    """The answers to all of `mixed` but the aborted, six at a time."""
    gate = asyncio.Semaphore(6)

    async def one(prompt: list[int], params: SamplingParams, abort: bool) -> Answer | None:
        async with gate:
            request = GenerationRequest(new_request_id(), tuple(prompt), params)
            sent = asyncio.create_task(cluster.send(request, split=split))
            if not abort and not (answer := await sent).failure.startswith("refused"):
                return answer
            await asyncio.wait({sent}, timeout=0.03)
            sent.cancel()
            for role in Role:
                cluster.sessions[role].abort(request.request_id, 0)
            await asyncio.wait({sent})
        return None if abort else await one(prompt, params, abort)  # as routers do

    answers = await asyncio.gather(*(one(*each) for each in mixed(random.Random(4))))
    assert [a.failure for a in answers if a is not None and a.failure] == []
    return [a.tokens for a in answers if a is not None]


@pytest.mark.parametrize("split", [True, False], ids=["split", "aggregated"])
async def test_answers_are_those_without_host_memory(llama: Path, split: bool) -> None:
    """With evictions, preemptions, forks and aborts, and host memory that is itself too small."""
    tight: dict[str, object] = {"kv_memory_bytes": 30 * 12288}
    async with split_cluster(llama, prefill={}, decode={}) as roomy:
        truth = await crowd(roomy, split=split)
    for slots in (5, 300):
        more: dict[str, object] = {**tight, "kv_offload_bytes": slots * 12288}
        async with split_cluster(llama, prefill=more, decode=more) as cluster:
            assert await crowd(cluster, split=split) == truth, slots
            assert await crowd(cluster, split=split) == truth, slots
            await cluster.idle()
            status: Any = cluster.decode.status()
            assert status["offloaded_bytes"] > 0
            assert status["loaded_bytes"] > 0
            assert sum(status["offload"][s] for s in ("free", "cached", "loading")) == slots
            assert [await cluster.prefill.audit(), await cluster.decode.audit()] == [[], []]
