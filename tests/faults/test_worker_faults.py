"""A worker's own faults and a stranger's claims: nobody waits for ever, nothing leaks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.errors import EngineFailure, TransferFailed
from contracts.handoff import Claim, Release
from contracts.ids import RequestId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from decode_worker.peers import TransferMessage
from engine.host import ModelComputer
from engine.plan import StepPlan, StepResult
from kv_transfer.params import HANDOFF_SCOPE, KvTransferParams, decode_and_verify
from tests.support.reference import greedy
from tests.support.split_cluster import KEY, SplitCluster, split_cluster
from tests.support.tiny_models import build_tiny

NEW = 10
PROMPT = list(range(5, 75))
PARAMS = SamplingParams(max_tokens=NEW, temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
async def cluster(llama: Path) -> AsyncIterator[SplitCluster]:
    async with split_cluster(llama) as running:
        yield running


def break_engine(worker: object, monkeypatch: pytest.MonkeyPatch, after_steps: int) -> None:
    """The worker's computer raises in the step after `after_steps` more."""
    broken = worker._host.engine._computer  # type: ignore[attr-defined]
    original = ModelComputer.compute
    left = [after_steps]

    def compute(self: ModelComputer, plan: StepPlan) -> StepResult:
        if self is broken:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("out of order")
        return original(self, plan)

    monkeypatch.setattr(ModelComputer, "compute", compute)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("split", [True, False])
async def test_a_failed_decode_engine_fails_its_requests(
    cluster: SplitCluster, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    break_engine(cluster.decode, monkeypatch, after_steps=4)
    answer = await cluster.generate(PROMPT, PARAMS, split=split, timeout_s=10)
    assert answer.failure.startswith("EngineFailure")
    with pytest.raises(EngineFailure):
        cluster.decode.assert_pulse()
    assert cluster.decode.load().draining, "routers choose another"
    again = await cluster.generate(PROMPT, PARAMS, split=False, timeout_s=10)
    assert again.failure.startswith("Unavailable")
    assert cluster.decode.status()["requests"] == 0
    await until(lambda: cluster.prefill.status()["transfers"] == 0)


async def test_a_failed_prefill_engine_ends_its_transfers(
    cluster: SplitCluster, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router hears of it, and a D that waits for the rest of the prompt recomputes."""
    break_engine(cluster.prefill, monkeypatch, after_steps=1)
    request = GenerationRequest(new_request_id(), tuple(PROMPT), PARAMS)
    answer = await cluster.send(request, split=True, timeout_s=10)
    assert answer.failure.startswith("EngineFailure")
    await until(lambda: cluster.prefill.status()["transfers"] == 0)
    assert cluster.prefill.status()["requests"] == 0
    cluster.sessions[Role.DECODE].abort(request.request_id, 0)
    again = await cluster.generate(PROMPT, PARAMS, split=False)
    assert again.tokens[0] == greedy(llama, "llama", PROMPT, NEW)


async def test_only_the_claimer_releases(cluster: SplitCluster) -> None:
    """A stranger is refused the claim; its Release must not end the claimer's transfer."""
    request = GenerationRequest(new_request_id(), tuple(PROMPT), PARAMS)
    params = await claimed_elsewhere(cluster, request)
    stranger = replace(request, request_id=RequestId("stranger"))
    answer = cluster.expect(stranger)
    cluster.sessions[Role.DECODE].adopt(
        stranger, cluster.answers[request.request_id].kv_transfer_params
    )
    await cluster.until(answer, lambda: answer.over)
    assert (answer.path, answer.cause) == ("recomputed", "ClaimRefused")
    assert cluster.prefill.status()["ended_transfers"] == {}
    cluster.prefill.release(Release(params.transfer_id), claimer)
    assert cluster.prefill.status()["ended_transfers"] == {"released": 1}
    await cluster.idle()


class _Claimer:
    def send(self, message: object) -> None:
        pass


claimer = _Claimer()


async def claimed_elsewhere(cluster: SplitCluster, request: GenerationRequest) -> KvTransferParams:
    """A transfer that another D has claimed."""
    answer = cluster.expect(request)
    cluster.sessions[Role.PREFILL].submit(request, handoff=True)
    await cluster.until(answer, lambda: bool(answer.tokens[0]))
    params = decode_and_verify(answer.kv_transfer_params, KEY, HANDOFF_SCOPE)
    cluster.prefill.claim(Claim(params.transfer_id, "nonce", params.prompt_digest), claimer)
    return params


async def test_a_transfer_is_not_awaited_on_a_lost_link(cluster: SplitCluster) -> None:
    await cluster.generate(PROMPT, PARAMS)
    peers = cluster.decode._peers
    assert peers is not None
    (task,) = peers._opening.values()
    peer = task.result()
    heard: list[TransferMessage | None] = []
    await peer.link.close()
    request = GenerationRequest(new_request_id(), tuple(PROMPT), PARAMS)
    params = await claimed_elsewhere(cluster, request)
    with pytest.raises(TransferFailed):
        peers.listen(peer, params.transfer_id, heard.append)
    cluster.prefill.release(Release(params.transfer_id), claimer)
    answer = await cluster.generate(PROMPT, PARAMS, salt="again")
    assert answer.path == "remote", "the next one opens a new link"
    await cluster.idle()
