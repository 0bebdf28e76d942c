"""Tokens through the split cluster equal `transformers`, whatever the path, the load, the cache."""

import asyncio
import random
from pathlib import Path

import pytest

from contracts.events import FinishReason
from contracts.sampling import SamplingParams
from tests.support.reference import greedy
from tests.support.split_cluster import Answer, SplitCluster, split_cluster
from tests.support.tiny_models import ARCHITECTURES, VOCAB, build_tiny

NEW = 12
LENGTHS = (1, 2, 15, 16, 17, 32, 63, 100, 255, 500)
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def prompts_of(arch: str) -> list[list[int]]:
    draw = random.Random(arch)
    return [[draw.randrange(2, VOCAB) for _ in range(length)] for length in LENGTHS]


async def at_most(
    cluster: SplitCluster, prompts: list[list[int]], width: int, *, split: bool
) -> list[Answer]:
    gate = asyncio.Semaphore(width)

    async def one(prompt: list[int]) -> Answer:
        async with gate:
            return await cluster.generate(prompt, GREEDY, split=split)

    return await asyncio.gather(*(one(prompt) for prompt in prompts))


@pytest.mark.parametrize("arch", ARCHITECTURES)
async def test_every_architecture_split(arch: str, models: Path) -> None:
    folder = build_tiny(arch, models / arch)
    prompts = prompts_of(arch)
    truth = [greedy(folder, arch, prompt, NEW) for prompt in prompts]
    async with split_cluster(folder, prefill={"kv_memory_bytes": 12 << 20}) as cluster:
        cold = await at_most(cluster, prompts, 8, split=True)
        assert [a.failure for a in cold] == [""] * len(prompts)
        assert [a.tokens[0] for a in cold] == truth
        assert {a.path for a in cold} == {"remote"}
        # D computed none of the prompts: the KV really moved.
        assert cluster.decode.status()["computed_prompt_tokens"] == 0
        assert all(a.num_bytes > 0 for a in cold)

        # Again, with hits in both caches; then all of it on D alone.
        warm = await at_most(cluster, prompts, 8, split=True)
        assert [a.tokens[0] for a in warm] == truth
        assert [a.cached_tokens for a in warm] == [
            (len(prompt) - 1) // 16 * 16 for prompt in prompts
        ]
        assert cluster.decode.status()["computed_prompt_tokens"] == 0
        local = await at_most(cluster, prompts, 8, split=False)
        assert [a.tokens[0] for a in local] == truth
        assert {a.path for a in local} == {"local"}
        await cluster.idle()


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return build_tiny("llama", models / "llama")


SAMPLED = [
    SamplingParams(max_tokens=20, temperature=1.0, seed=7),
    SamplingParams(max_tokens=20, temperature=0.8, top_k=20, seed=2**64 - 1, n=3),
    SamplingParams(max_tokens=20, temperature=1.3, top_p=0.8, seed=99, n=2),
    SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, top_k=50, seed=123456789),
]


async def test_sampled_tokens_do_not_depend_on_path_or_batch(llama: Path) -> None:
    prompt = prompts_of("sampled")[6]
    async with split_cluster(llama) as cluster:
        alone = [await cluster.generate(prompt, p, split=False, salt="a") for p in SAMPLED]
        split = [await cluster.generate(prompt, p, split=True, salt="b") for p in SAMPLED]
        crowd = prompts_of("crowd")
        answers = await asyncio.gather(
            *(
                cluster.generate(prompt, p, split=i % 2 == 0, salt="c")
                for i, p in enumerate(SAMPLED)
            ),
            *(cluster.generate(other, GREEDY, split=True, salt="c") for other in crowd[:7]),
        )
        for one, two, three in zip(alone, split, answers, strict=False):
            assert one.tokens == two.tokens == three.tokens
        several = alone[1].tokens
        assert len({tuple(tokens) for tokens in several}) == 3, "choices have their own streams"
        await cluster.idle()


async def test_logprobs_are_those_of_the_model(llama: Path) -> None:
    import torch

    from tests.support.reference import stock_model

    prompt = prompts_of("logprobs")[5]
    params = SamplingParams(max_tokens=5, temperature=0.9, seed=3, logprobs=4)
    async with split_cluster(llama) as cluster:
        answer = await cluster.generate(prompt, params)
        tokens, entries = answer.tokens[0], answer.logprobs[0]
        assert len(entries) == len(tokens) == 5
        with torch.inference_mode():
            logits = stock_model(llama, "llama")(torch.tensor([prompt + tokens])).logits[0]
        truth = torch.log_softmax(logits.float(), dim=-1)
        for index, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            row = truth[len(prompt) - 1 + index]
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
            best = torch.topk(row, 4)
            assert [t for t, _ in entry.top] == best.indices.tolist()
            assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)


async def test_ends(llama: Path) -> None:
    prompt = prompts_of("ends")[4]
    async with split_cluster(llama) as cluster:
        full = (await cluster.generate(prompt, GREEDY)).tokens[0]
        # Token 1 ends it: no decode, the transfer is taken back as ended.
        first = SamplingParams(max_tokens=9, temperature=0.0, eos_token_ids=(full[0],))
        answer = await cluster.generate(prompt, first)
        assert answer.tokens == [full[:1]]
        assert answer.finish == [FinishReason.STOP]
        later = full[4]
        stop = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=(later,))
        answer = await cluster.generate(prompt, stop)
        assert answer.tokens == [full[: full.index(later) + 1]]
        assert answer.finish == [FinishReason.STOP]
        answer = await cluster.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
        assert answer.tokens == [full[:1]]
        assert answer.finish == [FinishReason.LENGTH]
        await cluster.idle()


@pytest.mark.parametrize("split", [True, False])
async def test_preemption_changes_no_token(llama: Path, split: bool) -> None:
    prompts = [prompt[:40] or prompt for prompt in prompts_of("tight")[4:]]
    new = 60
    params = SamplingParams(max_tokens=new, temperature=0.0)
    truth = [greedy(llama, "llama", prompt, new) for prompt in prompts]
    # A decode cache too small for all of them to grow at once.
    blocks = 20 * 12288
    async with split_cluster(llama, decode={"kv_memory_bytes": blocks}) as cluster:
        answers = await asyncio.gather(
            *(cluster.generate(prompt, params, split=split) for prompt in prompts)
        )
        assert [a.failure for a in answers] == [""] * len(prompts)
        assert [a.tokens[0] for a in answers] == truth
        preemptions = cluster.decode.status()["preemptions"]
        assert isinstance(preemptions, int)
        assert preemptions > 0
        await cluster.idle()
