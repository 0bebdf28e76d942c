"""Both sides short of memory: running decodes go first, and nothing waits for ever (M3, L6)."""

import asyncio
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from engine.plan import StepPlan, StepResult
from tests.support.reference import greedy
from tests.support.split_cluster import SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

NEW = 10
BLOCK_BYTES = 12288
PARAMS = SamplingParams(max_tokens=NEW, temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def request_for(length: int, seed: int, **changes: object) -> GenerationRequest:
    draw = random.Random(seed)
    prompt = tuple(draw.randrange(2, VOCAB) for _ in range(length))
    request = GenerationRequest(new_request_id(), prompt, PARAMS)
    return replace(request, **changes)  # type: ignore[arg-type]


async def started(cluster: SplitCluster, request: GenerationRequest) -> str:
    answer = cluster.expect(request)
    cluster.sessions[Role.PREFILL].submit(request, handoff=True)
    await cluster.until(answer, lambda: bool(answer.kv_transfer_params))
    return answer.kv_transfer_params


async def until_held(cluster: SplitCluster, state: str, count: int) -> None:
    async with asyncio.timeout(20):
        while True:
            ledger = cluster.decode.status()["ledger"]
            assert isinstance(ledger, dict)
            if ledger[state] == count:
                return
            await asyncio.sleep(0.005)


async def test_a_decode_takes_the_memory_of_a_handoff_that_still_waits(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M3: the reservation goes back, the handoff waits again, and both answers are right."""
    async with split_cluster(llama, decode={"kv_memory_bytes": 14 * BLOCK_BYTES}) as cluster:
        gate = threading.Event()
        original = cluster.prefill._host.engine._computer

        class Gated:  # P has given the params and computes nothing yet
            forget = original.forget

            def compute(self, plan: StepPlan) -> StepResult:
                gate.wait(60)
                return original.compute(plan)

        monkeypatch.setattr(cluster.prefill._host.engine, "_computer", Gated())
        growing = request_for(
            30, 1, params=SamplingParams(max_tokens=120, temperature=0.0, eos_token_ids=())
        )
        arriving = request_for(100, 2)
        first = cluster.expect(growing)
        cluster.sessions[Role.DECODE].submit(growing, handoff=False)
        await cluster.until(first, lambda: bool(first.tokens[0]))
        params = await started(cluster, arriving)
        cluster.sessions[Role.DECODE].adopt(arriving, params)
        await until_held(cluster, "reserved", 7)
        await cluster.until(first, lambda: first.over)  # it grew into what was reserved
        assert cluster.decode.status()["preemptions"] == 0
        gate.set()
        second = cluster.answers[arriving.request_id]
        await cluster.until(second, lambda: second.over)
        assert second.path == "remote"
        assert second.tokens[0] == greedy(llama, "llama", list(arriving.prompt_ids), NEW)
        assert first.tokens[0] == greedy(llama, "llama", list(growing.prompt_ids), 120)
        assert await cluster.decode.audit() == []
        await cluster.idle()


async def test_p_takes_back_what_a_full_d_has_claimed(llama: Path) -> None:
    """L6: D has no memory, so it cannot read; P needs the blocks; both requests get answers."""
    async with split_cluster(
        llama,
        prefill={"kv_memory_bytes": 9 * BLOCK_BYTES},
        decode={"kv_memory_bytes": 16 * BLOCK_BYTES},
    ) as cluster:
        pool = cluster.decode._host.parts.scheduler.pool
        held = await asyncio.wrap_future(cluster.decode._host.call(lambda _: pool.allocate(12)))
        waiting = request_for(100, 3)
        params = await started(cluster, waiting)
        answer = cluster.answers[waiting.request_id]
        cluster.sessions[Role.DECODE].adopt(waiting, params)
        await cluster.until(answer, lambda: bool(answer.tokens[0]))
        other = request_for(90, 4)
        await started(cluster, other)  # has P's memory, so the first transfer was taken back
        assert cluster.prefill.ended_transfers == {"pressure": 1}
        await asyncio.wrap_future(cluster.decode._host.call(lambda _: pool.release(held)))
        await cluster.until(answer, lambda: answer.over)
        assert (answer.path, answer.cause) == ("recomputed", "TransferGone")
        assert answer.tokens[0] == greedy(llama, "llama", list(waiting.prompt_ids), NEW)
        cluster.sessions[Role.PREFILL].abort(other.request_id, 0)
        await cluster.idle()
