"""Prefill and decode workers of different tensor-parallel sizes: exact, whoever has more ranks."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from contracts.errors import EngineFailure
from contracts.sampling import SamplingParams
from tests.support.reference import greedy
from tests.support.split_cluster import SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

NEW = 12
LENGTHS = (1, 15, 16, 17, 63, 100, 255)
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)
SIZES = [(1, 2), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(2, VOCAB) for _ in range(length)] for length in LENGTHS]


def ranks(size: int) -> dict[str, object]:
    patient = {"lease_ms": 60_000, "read_timeout_ms": 60_000}  # many processes, few cores
    return {"tensor_parallel_size": size, "kv_memory_bytes": 8 << 20, **patient}


async def answers(cluster: SplitCluster, *, split: bool) -> tuple[list[list[int]], set[str]]:
    """Tokens, and the paths taken."""
    found = await asyncio.gather(
        *(cluster.generate(prompt, GREEDY, split=split) for prompt in prompts())
    )
    assert [answer.failure for answer in found] == [""] * len(LENGTHS)
    return [answer.tokens[0] for answer in found], {answer.path for answer in found}


@pytest.mark.parametrize(("p_ranks", "d_ranks"), SIZES)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
async def test_tokens_equal_transformers(
    arch: str, p_ranks: int, d_ranks: int, models: Path
) -> None:
    folder = build_tiny(arch, models / arch)
    truth = [greedy(folder, arch, prompt, NEW) for prompt in prompts()]
    async with split_cluster(folder, prefill=ranks(p_ranks), decode=ranks(d_ranks)) as cluster:
        assert await answers(cluster, split=True) == (truth, {"remote"})
        # D computed none of the prompts: all heads really moved.
        assert cluster.decode.status()["computed_prompt_tokens"] == 0
        assert await answers(cluster, split=True) == (truth, {"remote"})  # with hits on both sides
        assert await answers(cluster, split=False) == (truth, {"local"})
        await cluster.idle()
        assert await cluster.prefill.audit() == []
        assert await cluster.decode.audit() == []


async def test_four_ranks_to_two(models: Path) -> None:
    folder = build_tiny("llama", models / "llama-4", num_key_value_heads=4)
    truth = [greedy(folder, "llama", prompt, NEW) for prompt in prompts()]
    async with split_cluster(folder, prefill=ranks(4), decode=ranks(2)) as cluster:
        assert await answers(cluster, split=True) == (truth, {"remote"})
        await cluster.idle()


async def test_one_rank_with_other_words_is_enough_to_recompute(models: Path) -> None:
    """F9: P's rank 1 alone says that a block has a new owner."""
    folder = build_tiny("llama", models / "llama")
    prompt = prompts()[5]
    async with split_cluster(folder, prefill=ranks(2), decode=ranks(2)) as cluster:
        memory = cluster.prefill._host.parts.rank_memory[1]
        (process,) = cluster.prefill._host.rank_processes
        overwrite(process.pid, memory.words_address, 8 * memory.num_blocks)
        cluster.prefill._host.parts.words.take_bumped = lambda: ()  # type: ignore[method-assign]
        answer = await cluster.generate(prompt, GREEDY)
        assert answer.tokens[0] == greedy(folder, "llama", prompt, NEW)
        assert (answer.path, answer.cause) == ("recomputed", "FenceBroken")
        await cluster.idle()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_dead_rank_is_the_end_of_its_worker_alone(side: str, models: Path) -> None:
    folder = build_tiny("llama", models / "llama")
    prompt = prompts()[5]
    async with split_cluster(folder, prefill=ranks(2), decode=ranks(2)) as cluster:
        victim, other = cluster.prefill, cluster.decode
        if side == "decode":
            victim, other = cluster.decode, cluster.prefill  # type: ignore[assignment]
        truth = greedy(folder, "llama", prompt, NEW)
        assert (await cluster.generate(prompt, GREEDY)).tokens[0] == truth
        os.kill(victim._host.rank_processes[0].pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while not fails(victim):  # noqa: ASYNC110 - what changes it is another process
                await asyncio.sleep(0.01)
        other.assert_pulse()
        if side == "prefill":
            local = await cluster.generate(prompt, GREEDY, split=False)
            assert local.tokens[0] == truth
        else:
            answer = await cluster.generate(prompt, GREEDY)
            assert answer.failure


def overwrite(pid: int, address: int, num_bytes: int) -> None:
    """Of another process."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"\xff" * num_bytes)


def fails(worker: object) -> bool:
    try:
        worker.assert_pulse()  # type: ignore[attr-defined]
    except EngineFailure:
        return True
    return False
