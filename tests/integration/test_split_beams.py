"""Beam search over one prefill and one handoff equals the naive one over the stock model."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.events import FinishReason
from contracts.sampling import SamplingParams
from tests.support.naive_beams import naive_beams
from tests.support.reference import stock_model
from tests.support.split_cluster import Answer, SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def prompt_of(name: str, length: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(2, VOCAB) for _ in range(length)]


class Truth:
    """The stock model's best next tokens."""

    def __init__(self, folder: Path) -> None:
        self._model = stock_model(folder, "llama")
        self._known: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def best(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        key = tuple(tokens)
        if key not in self._known:
            with torch.inference_mode():
                logits = self._model(torch.tensor([tokens])).logits[0, -1].float()
            values, ids = torch.topk(torch.log_softmax(logits, dim=-1), 16)
            self._known[key] = list(zip(ids.tolist(), values.tolist(), strict=True))
        return self._known[key][:count]

    def beams(self, prompt: list[int], params: SamplingParams) -> list[tuple[list[int], str]]:
        return naive_beams(
            self.best,
            prompt,
            params.n,
            params.max_tokens,
            params.eos_token_ids,
            params.length_penalty,
        )


def found(answer: Answer) -> list[tuple[list[int], str]]:
    assert answer.failure == ""
    return [
        (tokens, finish.value if finish is not None else "")
        for tokens, finish in zip(answer.tokens, answer.finish, strict=True)
    ]


def handoffs(cluster: SplitCluster) -> object:
    counters = cluster.decode.status()["handoffs"]
    assert isinstance(counters, dict)
    return counters["adopted"]


@pytest.mark.parametrize("length", [5, 16, 37])
async def test_beams_are_the_naive_ones(llama: Path, length: int) -> None:
    prompt = prompt_of("beams", length)
    truth = Truth(llama)
    async with split_cluster(llama) as cluster:
        for n in (1, 2, 3, 4):
            plain = SamplingParams(max_tokens=10, n=n, beam=True, temperature=0.7)
            end = truth.beams(prompt, plain)[0][0][3]
            ends = (end, truth.best(prompt, 2)[1][0])
            for params in (
                plain,
                replace(plain, length_penalty=2.0, eos_token_ids=ends),
                replace(plain, length_penalty=0.0, eos_token_ids=ends),
                replace(plain, max_tokens=20, length_penalty=-1.5, eos_token_ids=ends),
            ):
                expected = truth.beams(prompt, params)
                before = handoffs(cluster)
                split = await cluster.generate(prompt, params)
                assert found(split) == expected
                assert handoffs(cluster) == before + (split.path == "remote")  # type: ignore[operator]
                assert cluster.decode.status()["computed_prompt_tokens"] == 0
        for params in (plain, replace(plain, eos_token_ids=ends), replace(plain, max_tokens=1)):
            local = await cluster.generate(prompt, params, split=False)
            assert found(local) == truth.beams(prompt, params)
        await cluster.idle()


async def test_one_token_ends_on_p(llama: Path) -> None:
    prompt = prompt_of("one", 20)
    truth = Truth(llama)
    params = SamplingParams(max_tokens=1, n=3, beam=True)
    every = tuple(token for token, _ in truth.best(prompt, 6))
    async with split_cluster(llama) as cluster:
        answer = await cluster.generate(prompt, params)
        assert found(answer) == [([token], "length") for token in every[:3]]
        closed = replace(params, max_tokens=9, eos_token_ids=every)
        answer = await cluster.generate(prompt, closed)
        assert found(answer) == [([token], "stop") for token in every[:3]]
        await cluster.idle()
        assert handoffs(cluster) == 0


@pytest.mark.parametrize("asked", [0, 2, 12])
async def test_log_probabilities_of_beams(llama: Path, asked: int) -> None:
    """As many as asked for, be they fewer or more than the candidates."""
    prompt = prompt_of("logprobs", 20)
    truth = Truth(llama)
    params = SamplingParams(max_tokens=6, n=2, beam=True, logprobs=asked)
    async with split_cluster(llama) as cluster:
        for split in (True, False):
            answer = await cluster.generate(prompt, params, split=split)
            assert found(answer) == truth.beams(prompt, replace(params, logprobs=None))
            for tokens, entries in zip(answer.tokens, answer.logprobs, strict=True):
                assert len(entries) == len(tokens)
                for index, entry in enumerate(entries):
                    best = truth.best(prompt + tokens[:index], 16)
                    assert entry.logprob == pytest.approx(dict(best)[tokens[index]], abs=1e-3)
                    assert [token for token, _ in entry.top] == [t for t, _ in best[:asked]]
        await cluster.idle()


@pytest.mark.parametrize("split", [True, False])
async def test_beams_survive_tight_memory(llama: Path, split: bool) -> None:
    """Several searches on a D where they cannot all grow at once."""
    truth = Truth(llama)
    prompts = [prompt_of(f"tight{number}", 30 + number) for number in range(3)]
    params = SamplingParams(max_tokens=40, n=4, beam=True)
    blocks = 20 * 12288
    async with split_cluster(llama, decode={"kv_memory_bytes": blocks}) as cluster:
        answers = await asyncio.gather(
            *(cluster.generate(prompt, params, split=split) for prompt in prompts)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert found(answer) == truth.beams(prompt, params)
        preemptions = cluster.decode.status()["preemptions"]
        assert isinstance(preemptions, int)
        assert preemptions > 0
        await cluster.idle()


async def test_beams_beside_other_requests(llama: Path) -> None:
    truth = Truth(llama)
    beams = SamplingParams(max_tokens=12, n=3, beam=True)
    sampled = SamplingParams(max_tokens=12, n=3, seed=5)
    prompts = [prompt_of(f"beside{number}", 20 + number) for number in range(4)]
    async with split_cluster(llama) as cluster:
        alone = [await cluster.generate(p, sampled, split=False, salt="x") for p in prompts]
        answers = await asyncio.gather(
            *(cluster.generate(p, params) for params in (beams, sampled) for p in prompts)
        )
        for prompt, answer in zip(prompts, answers[:4], strict=True):
            assert found(answer) == truth.beams(prompt, beams)
            assert answer.finish == [FinishReason.LENGTH] * 3
        assert [a.tokens for a in answers[4:]] == [a.tokens for a in alone]
        await cluster.idle()
