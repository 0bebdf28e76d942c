"""The audit of live workers: quiet however busy they are, and sure about a single leaked block."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.status import show_status
from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role
from rpc.status import fetch_status
from tests.support.split_cluster import KEY, SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

AUDITS = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@asynccontextmanager
async def load(cluster: SplitCluster, width: int = 6) -> AsyncIterator[list[int]]:
    """Requests of all kinds without end, some of them aborted; the list counts those that end."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(64)]
    done: list[int] = []

    async def one() -> None:
        while True:
            prompt = shared[: draw.choice([0, 16, 48, 64])]
            prompt = prompt + [draw.randrange(2, VOCAB) for _ in range(draw.randint(1, 90))]
            params = SamplingParams(
                max_tokens=draw.randint(1, 8), n=draw.choice([1, 1, 3]), beam=draw.random() < 0.2
            )
            request = GenerationRequest(new_request_id(), tuple(prompt), params)
            sent = asyncio.create_task(cluster.send(request, split=draw.random() < 0.8))
            if draw.random() < 0.3:
                await asyncio.wait({sent}, timeout=draw.random() * 0.05)
                for session in cluster.sessions.values():
                    session.abort(request.request_id, 0)
                sent.cancel()
            await asyncio.wait({sent})
            if sent.cancelled():
                continue
            if sent.result().failure:
                assert sent.result().failure.startswith("refused: ")  # then the router aborts
                cluster.sessions[Role.PREFILL].abort(request.request_id, 0)
            done.append(1)

    tasks = [asyncio.create_task(one()) for _ in range(width)]
    try:
        yield done
        assert all(not task.done() for task in tasks), [t.exception() for t in tasks if t.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_busy_workers_give_no_finding(llama: Path) -> None:
    # Memory is short, so that there are evictions, preemptions and waiting handoffs too.
    small: dict[str, object] = {"kv_memory_bytes": 40 * 12288}
    offload = {**small, "kv_offload_bytes": 60 * 12288}
    async with (
        split_cluster(llama, prefill=small, decode=offload) as cluster,
        load(cluster) as done,
    ):
        count = 0
        while count < AUDITS or len(done) < 20:
            count += 1
            found = [*await cluster.prefill.audit(), *await cluster.decode.audit()]
            assert found == [], count
            await asyncio.sleep(0)


async def test_what_is_leaked_under_load_is_found(llama: Path) -> None:
    async with split_cluster(llama) as cluster, load(cluster):
        for worker in (cluster.prefill, cluster.decode):
            call = worker._host.call
            first, second = await asyncio.wrap_future(call(lambda s: s.pool.allocate(2)))
            leak = f"blocks {first}, {second}: is owned, but for no sequence"
            assert await worker.audit() == [leak]
            await asyncio.wrap_future(call(lambda s, block=first: s.pool.lease([block])))  # type: ignore[misc]
            assert await worker.audit() == [f"blocks {first}: is leased, but for no transfer", leak]


async def test_two_audits_at_once(llama: Path) -> None:
    async with split_cluster(llama) as cluster, load(cluster, width=3):
        assert await asyncio.gather(*(cluster.prefill.audit() for _ in range(8))) == [[]] * 8


async def test_status_check_asks_for_the_audit(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with split_cluster(llama) as cluster:
        addresses = [cluster.addresses[role] for role in Role]

        def status(check: bool, as_json: bool = False) -> int:
            return show_status(addresses, cluster_key=KEY, check=check, as_json=as_json)

        assert await asyncio.to_thread(status, True) == 0
        assert capsys.readouterr().out.count("every block is accounted for") == 2
        assert "findings" not in await fetch_status(addresses[0], cluster_key=KEY)

        taken = cluster.decode._host.call(lambda scheduler: scheduler.pool.allocate(1))
        (block,) = await asyncio.wrap_future(taken)
        assert await asyncio.to_thread(status, False) == 0
        assert await asyncio.to_thread(status, True, True) == 1
        assert await asyncio.to_thread(status, True) == 1
        wrong = f"  WRONG: blocks {block}: is owned, but for no sequence\n"
        assert wrong in capsys.readouterr().out
