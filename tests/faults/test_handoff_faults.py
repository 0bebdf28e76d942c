"""A handoff that goes wrong at every stage: the answer stays right, both ledgers go to idle."""

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import Unavailable
from contracts.events import PathTaken, WorkerEvent
from contracts.ids import RequestId, WorkerId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from engine.scheduler import Scheduler
from kv_transfer.flight import ReadResult
from kv_transfer.rank_transfers import RankTransfers
from kv_transfer.transfer_thread import Chain, TransferThread
from tests.support.reference import greedy
from tests.support.split_cluster import SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

NEW = 10
PARAMS = SamplingParams(max_tokens=NEW, temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
async def cluster(llama: Path) -> AsyncIterator[SplitCluster]:
    async with split_cluster(llama) as running:
        yield running


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, VOCAB) for _ in range(length)]


def request_for(prompt: list[int], **changes: object) -> GenerationRequest:
    request = GenerationRequest(new_request_id(), tuple(prompt), PARAMS)
    return replace(request, **changes)  # type: ignore[arg-type]


async def started(cluster: SplitCluster, request: GenerationRequest) -> str:
    """Submit to P and give back its params once it has answered."""
    answer = cluster.expect(request)
    cluster.sessions[Role.PREFILL].submit(request, handoff=True)
    await cluster.until(answer, lambda: bool(answer.kv_transfer_params))
    return answer.kv_transfer_params


async def test_reused_blocks_are_detected(
    cluster: SplitCluster, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P frees and reuses exported blocks between D's data reads and its check of the words."""
    landed = Chain.ended

    def reuse(scheduler: Scheduler) -> None:
        scheduler.pool.generations.bump(scheduler.pool.holders("leased"))

    def ended(self: Chain, *args: Any) -> None:
        cluster.prefill._host.call(reuse).result(10)
        landed(self, *args)

    monkeypatch.setattr(Chain, "ended", ended)
    prompt = prompt_of(70)
    answer = await cluster.generate(prompt, PARAMS)
    assert answer.tokens[0] == greedy(llama, "llama", prompt, NEW)
    assert (answer.path, answer.cause) == ("recomputed", "FenceBroken")
    await cluster.idle()


async def test_a_revoked_transfer_is_recomputed(cluster: SplitCluster, llama: Path) -> None:
    prompt = prompt_of(90, 1)
    request = request_for(prompt)
    params = await started(cluster, request)
    answer = cluster.answers[request.request_id]
    await cluster.until(answer, lambda: bool(answer.tokens[0]))
    cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
    await until(lambda: cluster.prefill.status()["transfers"] == 0)
    cluster.sessions[Role.DECODE].adopt(request, params)
    await cluster.until(answer, lambda: answer.over)
    assert answer.tokens[0] == greedy(llama, "llama", prompt, NEW)
    assert (answer.path, answer.cause) == ("recomputed", "TransferFailed")
    await cluster.idle()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.005)


async def test_an_unclaimed_transfer_expires(llama: Path) -> None:
    async with split_cluster(llama, prefill={"lease_ms": 200}) as cluster:
        await started(cluster, request_for(prompt_of(40)))
        await until(lambda: cluster.prefill.status()["ended_transfers"] == {"expired": 1})
        await cluster.idle()


async def test_a_held_read_is_quarantined_until_it_lands(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that outlives its deadline: recomputed elsewhere, its blocks held until it ends."""
    held = asyncio.Event()
    original = TransferThread._poll

    def poll(self: TransferThread, connector: object) -> bool:
        return False if not held.is_set() else original(self, connector)  # type: ignore[arg-type]

    async with split_cluster(llama, decode={"read_timeout_ms": 300}) as cluster:
        monkeypatch.setattr(TransferThread, "_poll", poll)
        prompt = prompt_of(100, 2)
        answer = await cluster.generate(prompt, PARAMS)
        assert answer.tokens[0] == greedy(llama, "llama", prompt, NEW)
        assert (answer.path, answer.cause) == ("recomputed", "TransferFailed")
        ledger = cluster.decode.status()["ledger"]
        assert isinstance(ledger, dict)
        assert ledger["quarantined"] == 7
        held.set()
        await cluster.idle()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads end only once this is set; `polled` of it says that one is under way."""
    event = threading.Event()
    event.polled = threading.Event()  # type: ignore[attr-defined]
    original = TransferThread._poll

    def poll(self: TransferThread, connector: object) -> bool:
        if self._in_flight:
            event.polled.set()  # type: ignore[attr-defined]
        return False if not event.is_set() else original(self, connector)  # type: ignore[arg-type]

    monkeypatch.setattr(TransferThread, "_poll", poll)
    return event


async def being_read(cluster: SplitCluster, held: threading.Event, seed: int) -> GenerationRequest:
    """A request whose read hangs; P has drawn token 1."""
    request = request_for(prompt_of(100, seed))
    params = await started(cluster, request)
    cluster.sessions[Role.DECODE].adopt(request, params)
    await until(held.polled.is_set)  # type: ignore[attr-defined]
    answer = cluster.answers[request.request_id]
    await cluster.until(answer, lambda: bool(answer.tokens[0]))
    return request


def quarantined(cluster: SplitCluster) -> int:
    ledger = cluster.decode.status()["ledger"]
    assert isinstance(ledger, dict)
    return int(ledger["quarantined"])


@pytest.mark.parametrize("how", ["revoked", "no P any more"])
async def test_a_read_is_given_up_when_its_transfer_ends(
    cluster: SplitCluster, llama: Path, held: threading.Event, how: str
) -> None:
    """Recomputed before the read's own deadline."""
    request = await being_read(cluster, held, 15)
    answer = cluster.answers[request.request_id]
    if how == "revoked":
        (transfer,) = cluster.prefill._exports
        revoked = cluster.prefill._exports.revoke(transfer.transfer_id, "pressure")
        cluster.prefill._finish_transfer(revoked)
    else:
        assert cluster.prefill._server is not None
        await cluster.prefill._server.stop(0)
    await cluster.until(answer, lambda: answer.over, timeout_s=5.0)
    assert answer.tokens[0] == greedy(llama, "llama", list(request.prompt_ids), NEW)
    cause = "TransferGone" if how == "revoked" else "Unavailable"
    assert (answer.path, answer.cause) == ("recomputed", cause)
    assert quarantined(cluster) > 0
    assert await cluster.decode.audit() == []
    held.set()
    await cluster.idle()


async def test_a_lost_link_is_claimed_anew(
    cluster: SplitCluster, llama: Path, held: threading.Event
) -> None:
    """L3: the read goes on, and the release finds its way over the new link (L4)."""
    request = await being_read(cluster, held, 16)
    answer = cluster.answers[request.request_id]
    peers = cluster.decode._peers
    assert peers is not None
    (task,) = peers._opening.values()
    await task.result().link.close()
    (export,) = cluster.prefill._exports
    await until(lambda: next(iter(cluster.prefill._exports)).claimer not in (None, export.claimer))
    held.set()
    await cluster.until(answer, lambda: answer.over)
    assert answer.tokens[0] == greedy(llama, "llama", list(request.prompt_ids), NEW)
    assert answer.path == "remote"
    await cluster.idle()
    assert cluster.prefill.ended_transfers == {"released": 1}


async def test_a_release_is_repeated_over_the_next_link(
    cluster: SplitCluster, llama: Path, held: threading.Event
) -> None:
    """The link is lost with the release unsent: P need not wait for the lease to end."""
    request = await being_read(cluster, held, 17)
    peers = cluster.decode._peers
    assert peers is not None
    (task,) = peers._opening.values()
    cluster.decode.abort(request.request_id, 0)  # its release waits to be written
    await task.result().link.close()
    await until(lambda: cluster.prefill.ended_transfers == {"released": 1})
    held.set()
    await cluster.idle()


@pytest.mark.parametrize("when", ["queued", "started", "adopted", "streaming"])
async def test_an_abort_in_any_window_releases_both_sides(cluster: SplitCluster, when: str) -> None:
    params = SamplingParams(max_tokens=800, temperature=0.0)
    request = replace(request_for(prompt_of(150, 3)), params=params)
    answer = cluster.expect(request)
    cluster.sessions[Role.PREFILL].submit(request, handoff=True)
    if when != "queued":
        await cluster.until(answer, lambda: bool(answer.kv_transfer_params))
    if when in ("adopted", "streaming"):
        cluster.sessions[Role.DECODE].adopt(request, answer.kv_transfer_params)
        await cluster.until(answer, lambda: answer.adopted is not None)
    if when == "streaming":
        await cluster.until(answer, lambda: len(answer.tokens[0]) > 5)
    cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
    cluster.sessions[Role.DECODE].abort(request.request_id, 0)
    await cluster.idle(timeout_s=2.0)


async def test_lost_sessions_release_everything(cluster: SplitCluster) -> None:
    params = SamplingParams(max_tokens=800, temperature=0.0)
    for seed in range(4):
        request = replace(request_for(prompt_of(60, seed)), params=params)
        kv_transfer_params = await started(cluster, request)
        if seed % 2:
            cluster.sessions[Role.DECODE].adopt(request, kv_transfer_params)
    await until(lambda: cluster.decode.status()["requests"] == 2)
    for session in cluster.sessions.values():
        await session.close()
    await cluster.idle(timeout_s=5.0)
    with pytest.raises(Unavailable):
        cluster.sessions[Role.DECODE].submit(request, handoff=False)


@pytest.mark.parametrize("field", ["transfer_id", "remote_num_tokens", "prompt_digest", "mac"])
async def test_edited_params_are_refused_and_nothing_is_read(
    cluster: SplitCluster, field: str
) -> None:
    request = request_for(prompt_of(50, 4))
    params = json.loads(await started(cluster, request))
    value = params[field]
    params[field] = value + 1 if isinstance(value, int) else value[:-2] + "00"
    answer = cluster.answers[request.request_id]
    cluster.sessions[Role.DECODE].adopt(request, json.dumps(params))
    await cluster.until(answer, lambda: bool(answer.failure))
    assert answer.failure.startswith("InvalidRequest")
    handoffs = cluster.decode.status()["handoffs"]
    assert isinstance(handoffs, dict)
    assert handoffs["num_bytes"] == 0
    cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
    await cluster.idle()


async def test_params_of_another_prompt_are_refused(cluster: SplitCluster) -> None:
    request = request_for(prompt_of(50, 5))
    params = await started(cluster, request)
    other = replace(request, prompt_ids=tuple(prompt_of(50, 6)))
    answer = cluster.answers[request.request_id]
    cluster.sessions[Role.DECODE].adopt(other, params)
    await cluster.until(answer, lambda: bool(answer.failure))
    assert "another prompt" in answer.failure
    cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
    await cluster.idle()


async def test_replayed_params_are_refused_by_p(cluster: SplitCluster, llama: Path) -> None:
    """Params used once: a second adoption finds the transfer gone, and recomputes."""
    prompt = prompt_of(64, 7)
    request = request_for(prompt)
    answer = await cluster.send(request, split=True)
    again = replace(request, request_id=RequestId("again"))
    second = cluster.expect(again)
    cluster.sessions[Role.DECODE].adopt(again, answer.kv_transfer_params)
    await cluster.until(second, lambda: second.over)
    assert second.tokens == answer.tokens
    assert (second.path, second.cause) == ("recomputed", "TransferGone")
    await cluster.idle()


async def test_a_decode_worker_that_is_full_refuses_at_once(llama: Path) -> None:
    async with split_cluster(llama, decode={"kv_memory_bytes": 8 * 12288}) as cluster:
        request = request_for(prompt_of(200, 8))
        params = await started(cluster, request)
        answer = cluster.answers[request.request_id]
        cluster.sessions[Role.DECODE].adopt(request, params)
        await cluster.until(answer, lambda: answer.adopted is not None)
        assert answer.adopted is not None
        assert not answer.adopted.accepted
        assert "context" in answer.adopted.reason
        cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
        await cluster.idle()


async def test_an_abort_while_reserving_gives_the_blocks_back(cluster: SplitCluster) -> None:
    """The engine answers only after nobody waits for the reservation any more."""
    request = request_for(prompt_of(80, 13))
    params = await started(cluster, request)
    answer = cluster.answers[request.request_id]
    await cluster.until(answer, lambda: bool(answer.tokens[0]))
    busy = threading.Event()
    cluster.decode._host.call(lambda _: busy.wait(10))
    assert cluster.decode._tools is not None
    line = cluster.decode._tools.line
    try:
        cluster.sessions[Role.DECODE].adopt(request, params)
        await until(lambda: len(line) == 1)
        cluster.sessions[Role.DECODE].abort(request.request_id, 0)
        await until(lambda: cluster.prefill.status()["transfers"] == 0)
    finally:
        busy.set()
    await cluster.idle()


async def test_a_replay_of_several_choices_starts_once(cluster: SplitCluster, llama: Path) -> None:
    prompt = prompt_of(30, 14)
    truth = greedy(llama, "llama", prompt, NEW)
    seen: list[WorkerEvent] = []
    cluster.on_event = lambda worker, event: seen.append(event)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, n=2)
    outputs = (tuple(truth[:3]), tuple(truth[:5]))
    request = request_for(prompt, params=params, output_ids=outputs, attempt=1)
    answer = cluster.expect(request)
    answer.tokens = [list(output) for output in outputs]
    cluster.sessions[Role.DECODE].submit(request, handoff=False)
    await cluster.until(answer, lambda: answer.over)
    assert answer.tokens == [truth, truth]
    assert sum(isinstance(event, PathTaken) for event in seen) == 1
    await cluster.idle()


async def test_a_replay_repeats_and_loses_nothing(cluster: SplitCluster, llama: Path) -> None:
    prompt = prompt_of(45, 9)
    truth = greedy(llama, "llama", prompt, NEW)
    seen: list[tuple[WorkerId, WorkerEvent]] = []
    cluster.on_event = lambda worker, event: seen.append((worker, event))
    request = request_for(prompt, output_ids=(tuple(truth[:4]),), attempt=1)
    answer = cluster.expect(request)
    answer.tokens[0] = list(truth[:4])
    cluster.sessions[Role.DECODE].submit(request, handoff=False)
    await cluster.until(answer, lambda: answer.over)
    assert answer.tokens[0] == truth
    positions = [event.position for _, event in seen if hasattr(event, "position")]
    assert positions[0] == 4
    await cluster.idle()


async def test_a_claim_after_the_end_is_no_recompute(cluster: SplitCluster, llama: Path) -> None:
    """Token 1 ended the request before D's claim came: D has nothing to do for it."""
    prompt = prompt_of(40, 10)
    first = greedy(llama, "llama", prompt, 1)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, eos_token_ids=(first[0],))
    request = replace(request_for(prompt), params=params)
    answer = await cluster.send(replace(request, request_id=RequestId("other")), split=False)
    assert answer.tokens[0] == first
    kv_transfer_params = await started(cluster, request)
    await cluster.until(cluster.answers[request.request_id], lambda: answer.over)
    await until(lambda: cluster.prefill.status()["ended_transfers"] == {"ended": 1})
    cluster.sessions[Role.DECODE].adopt(request, kv_transfer_params)
    answer = cluster.answers[request.request_id]
    await cluster.until(answer, lambda: answer.adopted is not None)
    await cluster.idle()
    assert cluster.decode.totals.recompute_causes == {}


async def test_long_prompts_are_read_in_several_calls(
    cluster: SplitCluster, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `read` call has a time limit, so none may be for an unbounded amount."""
    calls: list[int] = []
    original = RankTransfers.read

    async def read(self: RankTransfers, *args: Any, **options: Any) -> ReadResult:
        result = await original(self, *args, **options)
        calls.append(result.num_bytes)
        return result

    monkeypatch.setattr(RankTransfers, "read", read)
    monkeypatch.setattr("decode_worker.handoff._READ_BYTES", 2 * 12288)
    prompt = prompt_of(100, 11)
    answer = await cluster.generate(prompt, PARAMS)
    assert answer.tokens[0] == greedy(llama, "llama", prompt, NEW)
    assert answer.path == "remote"
    assert max(calls) <= 2 * 12288
    assert sum(calls) == answer.num_bytes == 7 * 12288
    await cluster.idle()


async def test_a_full_decode_worker_reserves_in_order_of_arrival(llama: Path) -> None:
    """A big prompt is not overtaken without end; an abort while waiting gives the turn on."""
    async with split_cluster(llama, decode={"kv_memory_bytes": 16 * 12288}) as cluster:
        pool = cluster.decode._host.parts.scheduler.pool
        held = await asyncio.wrap_future(cluster.decode._host.call(lambda _: pool.allocate(10)))
        big, gone, small = (
            request_for(prompt_of(length, 12 + length)) for length in (110, 100, 17)
        )
        for request in (big, gone, small):
            params = await started(cluster, request)
            answer = cluster.answers[request.request_id]
            if request is not small:
                cluster.sessions[Role.DECODE].adopt(request, params)
                await cluster.until(answer, lambda: answer.adopted is not None)  # noqa: B023
        del params
        small_answer = cluster.answers[small.request_id]
        cluster.sessions[Role.DECODE].adopt(small, small_answer.kv_transfer_params)
        await cluster.until(small_answer, lambda: small_answer.adopted is not None)
        cluster.sessions[Role.DECODE].abort(gone.request_id, 0)
        cluster.sessions[Role.PREFILL].abort(gone.request_id, 0)
        await until(lambda: cluster.decode.status()["requests"] == 2)
        assert not small_answer.path
        await asyncio.wrap_future(cluster.decode._host.call(lambda _: pool.release(held)))
        big_answer = cluster.answers[big.request_id]
        await cluster.until(big_answer, lambda: big_answer.over)
        await cluster.until(small_answer, lambda: small_answer.over)
        assert {big_answer.path, small_answer.path} == {"remote"}
        await cluster.idle()
