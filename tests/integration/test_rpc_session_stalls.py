"""Sessions whose ends stand still for a while, or do not read."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from contracts.errors import Overloaded
from contracts.ids import RequestId
from rpc.backlog import Backlog
from rpc.duplex import Duplex
from rpc.session_client import WorkerSession
from rpc.wire import MAX_BACKLOG_BYTES
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    FakeRouter,
    FakeWorker,
    a_request,
    address_of,
    eventually,
)
from tests.support.rpc_sessions import serving, session_to

PATIENT_WORKER = """
import asyncio
from rpc.server import RpcServer
from tests.support.rpc_fakes import CLUSTER_KEY, FakeWorker, tokens

async def main():
    async def go_on(sink):
        for position in range(100_000):
            sink.send([tokens("r", position, [1])])
            await asyncio.sleep(0.05)

    tasks = []
    worker = FakeWorker(on_submit=lambda request, sink: tasks.append(
        asyncio.create_task(go_on(sink))))
    server = await RpcServer.start(
        "127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=worker, session_beat_s=0.1, missed=1000)
    print(server.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def patient_worker() -> Iterator[int]:
    """The port of a worker that forgives silence, so that only our own end can lose patience."""
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT_WORKER], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("stalls", "stall_s"), [(1, 2.0), (20, 0.15)], ids=["one-long", "many-without-a-pause"]
)
async def test_a_loop_that_stood_still_reads_before_it_judges(
    patient_worker: int, stalls: int, stall_s: float
) -> None:
    """Twenty beats of ours pass while we read nothing; the worker was never silent."""
    router = FakeRouter()
    session = await WorkerSession.open(
        address_of(patient_worker),
        router_id="router",
        incarnation=3,
        epoch=1,
        cluster_key=CLUSTER_KEY,
        listener=router,
        beat_s=0.1,
    )
    try:
        session.submit(a_request(), handoff=False)
        await eventually(lambda: router.events)
        for _ in range(stalls):
            time.sleep(stall_s)  # noqa: ASYNC251 - that is the point
            await asyncio.sleep(0)
        before = len(router.events)
        await eventually(lambda: len(router.events) > before + 3)
        assert not session.lost
        assert not router.lost
    finally:
        await session.close()


async def test_a_write_that_never_ends_ends_the_stream() -> None:
    """The other side beats, so it is not lost, and yet takes nothing."""

    async def read() -> int:
        await asyncio.sleep(0.001)
        return 0

    async def write(frame: int) -> None:
        await asyncio.Event().wait()

    duplex = Duplex[int, int](
        "test",
        read=read,
        write=write,
        receive=lambda frame: None,
        frames=lambda beat: [1],
        beat_s=0.005,
        missed=4,
    )
    async with asyncio.timeout(10):
        assert await duplex.run() == "the other side does not read"


async def test_slow_writes_are_fine_as_long_as_they_end() -> None:
    written = 0

    async def read() -> int:
        await asyncio.sleep(0.001)
        return 0

    async def write(frame: int) -> None:
        nonlocal written
        await asyncio.sleep(0.02)  # ten beats
        written += 1

    duplex = Duplex[int, int](
        "test",
        read=read,
        write=write,
        receive=lambda frame: None,
        frames=lambda beat: range(12),
        beat_s=0.002,
        missed=1000,
    )
    running = asyncio.create_task(duplex.run())
    await eventually(lambda: written >= 12)
    assert not running.done()
    duplex.end("enough")
    await running


async def test_what_a_worker_cannot_take_is_refused_and_the_session_lives() -> None:
    """Prompts fill half of the bound; aborts still go out, and nothing of what runs is lost."""
    worker, router = FakeWorker(), FakeRouter()
    async with serving(worker) as server, session_to(server.port, router) as session:
        prompt = range(1 << 20)  # 4 MiB of ids
        sent = 0
        with pytest.raises(Overloaded, match="does not keep up"):  # noqa: PT012
            while True:
                session.submit(a_request(f"r{sent}", prompt), handoff=False)
                sent += 1
        assert 4 << 20 <= sent * (4 << 20) <= MAX_BACKLOG_BYTES // 2
        session.abort(RequestId("r0"), 0)
        await eventually(lambda: worker.aborted, timeout_s=20)
        session.submit(a_request("later"), handoff=False)
        await eventually(lambda: len(worker.submitted) == sent + 1, timeout_s=20)
        assert not session.lost


def test_half_of_a_backlog() -> None:
    backlog = Backlog[int](max_bytes=10, max_items=4)
    assert not backlog.is_half_full(5)
    assert backlog.is_half_full(6)
    backlog.add(1, 1)
    assert not backlog.is_half_full()
    backlog.add(2, 1)
    assert backlog.is_half_full()
