"""A worker of several ranks, each a process of its own: the tokens of transformers' generate.

Also what the ranks hold, and what happens when one of them dies or hangs.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.errors import ConfigurationError, EngineFailure
from contracts.events import RequestFailed, TokensOut
from contracts.ids import Incarnation, RequestId, WorkerId, new_request_id
from contracts.memory import KvMemory
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerConfig
from engine.host import EngineHost
from engine.model import load_model
from engine.rank_group import RankGroup
from engine.scheduler import EngineEvent
from tests.support.reference import greedy
from tests.support.tiny_models import VOCAB, build_tiny

LENGTHS = (1, 15, 17, 33, 150)
NEW = 16
BLOCK = 16


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    def build(arch: str, kv_heads: int = 2) -> Path:
        return build_tiny(arch, root / f"{arch}-{kv_heads}", num_key_value_heads=kv_heads)

    return cache(build)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(23)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


class Driver:
    """An engine, and what it says of each request: (choice, tokens), or its failure."""

    def __init__(self, host: EngineHost) -> None:
        self.host = host
        self.tokens: dict[RequestId, dict[int, list[int]]] = {}
        self.over: dict[RequestId, set[int]] = {}
        self.failure: BaseException | None = None
        self.changed = asyncio.Event()

    def on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokensOut):
                choices = self.tokens[event.request_id]
                choices.setdefault(event.choice, []).extend(event.token_ids)
                if event.finish is not None:
                    self.over[event.request_id].add(event.choice)
            elif isinstance(event, RequestFailed):
                raise AssertionError(event)
        self.changed.set()

    def on_failure(self, error: BaseException) -> None:
        assert self.failure is None, "told twice"
        self.failure = error
        self.changed.set()

    async def submit(self, prompt: Sequence[int], n: int = 1, max_tokens: int = NEW) -> RequestId:
        request_id = new_request_id()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, n=n)
        request = GenerationRequest(request_id, tuple(prompt), params)
        self.tokens[request_id], self.over[request_id] = {}, set()
        await asyncio.wrap_future(
            self.host.call(lambda scheduler: scheduler.add(request, export=False))
        )
        return request_id

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(100):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def finish(self, request_id: RequestId, n: int = 1) -> list[list[int]]:
        await self.until(lambda: len(self.over[request_id]) == n)
        return [self.tokens[request_id][choice] for choice in range(n)]


@asynccontextmanager
async def engine(
    folder: Path, size: int, *, service: str = "", **changes: Any
) -> AsyncIterator[Driver]:
    config = WorkerConfig(
        role=Role.DECODE,
        worker_id=WorkerId("ranks"),
        model_path=str(folder),
        cluster_key="a key",
        tensor_parallel_size=size,
        **{"num_threads": 1, "kv_memory_bytes": 4 << 20, "check_ledger": True, **changes},
    )
    host = EngineHost(config, Incarnation(7), service)
    driver = Driver(host)
    try:
        await host.start(driver.on_events, driver.on_failure)
        yield driver
    finally:
        await asyncio.to_thread(host.stop)


def followers(host: EngineHost) -> Any:
    assert host.followers is not None
    return host.followers


CASES = [
    pytest.param("llama", 2, 2, id="llama-2"),
    pytest.param("llama", 4, 4, id="llama-4"),
    pytest.param("qwen3", 2, 2, id="qwen3-2"),
    pytest.param("gemma2", 2, 2, id="gemma2-2"),
    pytest.param("starcoder2", 2, 2, id="biases-2"),
    pytest.param("glm4", 2, 2, id="gathered-mlp-2"),
    pytest.param("mixtral", 2, 2, id="mixtral-2"),
    pytest.param("qwen3_moe", 4, 4, id="qwen3-moe-4"),
]


@pytest.mark.parametrize(("arch", "kv_heads", "size"), CASES)
async def test_greedy_tokens_equal_transformers(
    arch: str, kv_heads: int, size: int, models: Any
) -> None:
    folder = models(arch, kv_heads)
    async with engine(folder, size) as driver:
        asked = [await driver.submit(prompt) for prompt in prompts()]
        fork = await driver.submit(prompts()[2][:-3], n=2)  # its last block is copied
        for prompt, request_id in zip(prompts(), asked, strict=True):
            expected = greedy(folder, arch, prompt, NEW)
            assert (await driver.finish(request_id)) == [expected], f"prompt of {len(prompt)}"
        expected = greedy(folder, arch, prompts()[2][:-3], NEW)
        assert (await driver.finish(fork, 2)) == [expected] * 2
        again = await driver.submit(prompts()[4])  # most of it from the prefix cache
        assert (await driver.finish(again)) == [greedy(folder, arch, prompts()[4], NEW)]
        memories = driver.host.parts.rank_memory
        assert len(memories) == size
        assert {memory.num_kv_heads for memory in memories} == {kv_heads // size}


async def test_preempted_sequences_are_exact(models: Any) -> None:
    """So few blocks that sequences take turns: they come back with other tables."""
    folder, new = models("llama"), 60
    tight = [(prompt * 3)[:40] for prompt in prompts()[1:5]]
    async with engine(folder, 2, kv_memory_bytes=20 * 12288) as driver:
        asked = [await driver.submit(prompt, max_tokens=new) for prompt in tight]
        found = [await driver.finish(request_id) for request_id in asked]
        assert found == [[greedy(folder, "llama", prompt, new)] for prompt in tight]
        assert driver.host.parts.scheduler.preemptions > 0


async def test_evicted_prefixes_come_back_to_every_rank(models: Any) -> None:
    """Each rank keeps its own heads of them in host memory."""
    folder = models("llama")
    many = [(prompt * 7)[:100] for prompt in prompts()[1:]]
    memory: dict[str, Any] = {"kv_memory_bytes": 14 * 12288, "kv_offload_bytes": 4 << 20}
    async with engine(folder, 2, **memory) as driver:
        for _ in range(2):
            for prompt in many:
                found = await driver.finish(await driver.submit(prompt))
                assert found == [greedy(folder, "llama", prompt, NEW)]
        status: Any = driver.host.status()
        assert status["loaded_bytes"] > 0
        assert status["loaded_bytes"] % 12288 == 0  # of both ranks
        assert status["offload"]["total"] == (4 << 20) // 12288


async def test_followers_have_the_same_generations_and_their_own_heads(models: Any) -> None:
    folder = models("llama")
    async with engine(folder, 2) as driver:
        for prompt in prompts():
            await driver.finish(await driver.submit(prompt))
        mine, theirs = driver.host.parts.rank_memory
        pid = followers(driver.host).pids[0]
        count = mine.num_blocks
        words = read_memory(os.getpid(), mine.words_address, 8 * count).view(np.uint64)
        assert np.array_equal(
            words, read_memory(pid, theirs.words_address, 8 * count).view(np.uint64)
        )
        assert len(set(words.tolist())) > 1
        own, other = (blocks(os.getpid(), mine), blocks(pid, theirs))
        written = [bool(block.any()) for block in own]
        assert written == [bool(block.any()) for block in other]
        assert sum(written) > 10
        assert not np.array_equal(own, other)


def read_memory(pid: int, address: int, size: int) -> Any:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return np.frombuffer(memory.read(size), np.uint8)


def blocks(pid: int, memory: KvMemory) -> Any:
    size = memory.bytes_per_block * memory.num_blocks
    return read_memory(pid, memory.base_address, size).reshape(memory.num_blocks, -1)


async def test_a_killed_rank_ends_an_idle_engine(models: Any) -> None:
    async with engine(models("llama"), 2) as driver:
        os.kill(followers(driver.host).pids[0], signal.SIGKILL)
        await driver.until(lambda: driver.failure is not None)
        assert "rank 1 of this worker has ended (with status -9)" in str(driver.failure)
        with pytest.raises(EngineFailure, match="rank 1"):
            driver.host.engine.assert_pulse()
        with pytest.raises(EngineFailure):
            await driver.submit([1, 2, 3])


async def test_a_killed_rank_ends_a_busy_engine(models: Any) -> None:
    async with engine(models("llama"), 2) as driver:
        asked = await driver.submit(prompts()[4])
        await driver.until(lambda: bool(driver.tokens[asked]))
        os.kill(followers(driver.host).pids[0], signal.SIGKILL)
        await driver.until(lambda: driver.failure is not None or bool(driver.over[asked]))
        await driver.until(lambda: driver.failure is not None)
        with pytest.raises(EngineFailure):
            driver.host.engine.assert_pulse()


async def test_a_rank_that_hangs_ends_the_engine(models: Any) -> None:
    async with engine(models("llama"), 2) as driver:
        followers(driver.host).group._limit = timedelta(seconds=0.5)
        pid = followers(driver.host).pids[0]
        os.kill(pid, signal.SIGSTOP)
        await driver.submit(prompts()[0])
        await driver.until(lambda: driver.failure is not None)
        assert "dead or stuck" in str(driver.failure)
    assert not alive(pid)


async def test_the_ranks_end_with_the_engine(models: Any) -> None:
    async with engine(models("llama"), 2) as driver:
        pid = followers(driver.host).pids[0]
        await driver.finish(await driver.submit(prompts()[1]))
        began = time.monotonic()
    assert not alive(pid)
    assert time.monotonic() - began < 10
    assert driver.failure is None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_what_only_a_follower_cannot_do_is_told_by_the_worker(models: Any) -> None:
    with pytest.raises(EngineFailure, match=r"ModuleNotFoundError.*nowhere"):
        async with engine(models("llama"), 2, service="nowhere:serve"):
            raise AssertionError("served")


async def test_too_little_memory_is_refused_as_ever(models: Any) -> None:
    with pytest.raises(ConfigurationError, match="hold only"):
        async with engine(models("llama"), 2, kv_memory_bytes=20_000):
            raise AssertionError("served")


async def test_a_service_runs_beside_the_steps_of_each_follower(models: Any) -> None:
    async with engine(models("llama"), 2, service="tests.support.rank_echo:serve") as driver:
        asked = await driver.submit(prompts()[1])
        (end,) = followers(driver.host).service_ends
        end.settimeout(20)
        rank, memory = json.loads(end.makefile().readline())
        assert rank == 1
        assert KvMemory(**memory) == driver.host.parts.rank_memory[1]
        end.sendall(b"hello")
        assert end.recv(5) == b"hello"
        await driver.finish(asked)


@pytest.mark.parametrize(
    ("arch", "size", "reason"),
    [
        ("llama", 3, "'llama': it has 4 attention heads, which do not divide by 3"),
        ("llama", 4, "'llama': it has 2 KV heads, which do not divide by 4"),
        ("gpt_oss", 2, "'gpt_oss': transformers has no tensor-parallel plan for it"),
        ("stablelm", 2, "'stablelm': transformers has no tensor-parallel plan for it"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    arch: str, size: int, reason: str, models: Any, tmp_path: Path
) -> None:
    def meet() -> None:
        raise AssertionError("refused before any rank waits for another")

    with pytest.raises(ConfigurationError, match=f"tensor_parallel_size {size} .* {reason}"):
        load_model(models(arch), group=RankGroup(0, size, tmp_path, meet))


@pytest.mark.parametrize("arch", ["phi3", "olmo2"])
async def test_attention_that_is_not_split_is_refused_by_name(arch: str, models: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{arch}.* its plan leaves 4 of 4 heads on each"):
        async with engine(models(arch), 2):
            raise AssertionError("served")
