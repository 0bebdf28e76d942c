"""Sessions over real gRPC on loopback: loss, refusal, endings."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc import aio

from contracts.errors import (
    ConfigurationError,
    Unavailable,
)
from contracts.events import PrefillStarted
from contracts.ids import Incarnation, RequestId, WorkerId
from rpc.auth import credentials
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerStub
from rpc.server import RpcServer
from rpc.status import fetch_status
from rpc.wire import PROTOCOL_VERSION
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    INFO,
    FakeRouter,
    FakeWorker,
    a_request,
    eventually,
)
from tests.support.rpc_sessions import (
    open_session,
    read_to_end,
    serving,
    session_to,
    stub_call,
)


async def test_a_silent_router_is_lost() -> None:
    """The stream is open and the process alive, but no beat comes."""
    worker = FakeWorker()
    async with serving(worker) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        hello = pb.RouterHello(router_id="frozen", epoch=1, protocol_version=PROTOCOL_VERSION)
        await call.write(pb.RouterFrame(hello=hello))
        with pytest.raises(aio.AioRpcError, match="silent for 4 beats of 50 ms"):
            await read_to_end(call)
        await eventually(lambda: worker.lost)


async def test_a_newer_epoch_replaces_the_older_session() -> None:
    worker, old, new, late = FakeWorker(), FakeRouter(), FakeRouter(), FakeRouter()
    async with serving(worker) as server, session_to(server.port, old, epoch=1) as first:
        first.submit(a_request("one"), handoff=False)
        await eventually(lambda: worker.submitted)
        async with session_to(server.port, new, epoch=2) as second:
            assert worker.log == ["submit one", "lost"]  # before the new one may submit
            second.submit(a_request("two"), handoff=False)
            await eventually(lambda: len(worker.submitted) == 2)
            await eventually(lambda: old.lost)
            assert "epoch 2 replaces epoch 1" in old.lost[0]
            with pytest.raises(Unavailable, match="epoch 1 is over, 2 is open"):
                await open_session(server.port, late, epoch=1)
            restarted = await open_session(server.port, late, epoch=1, incarnation=4)
            await eventually(lambda: new.lost)
            await restarted.close()
    assert worker.lost == ["router/1#1", "router/2#2", "router/1#3"]


async def test_another_key_opens_nothing() -> None:
    worker = FakeWorker()
    async with serving(worker) as server:
        with pytest.raises(Unavailable, match="another cluster key"):
            await open_session(server.port, FakeRouter(), cluster_key="wrong")
        with pytest.raises(ConfigurationError, match="another cluster key"):
            await fetch_status(f"127.0.0.1:{server.port}", cluster_key="wrong")
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await WorkerStub(channel).Status(pb.StatusRequest())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.lost == []


async def test_the_token_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(FakeWorker()) as server, session_to(server.port, FakeRouter()):
        pass
    assert credentials(CLUSTER_KEY)[0][1] not in caplog.text
    assert CLUSTER_KEY not in caplog.text
    assert "is over" in caplog.text


async def test_status() -> None:
    worker = FakeWorker()
    async with serving(worker) as server:
        address = f"127.0.0.1:{server.port}"
        assert await fetch_status(address, cluster_key=CLUSTER_KEY) == {"free": 3}
    with pytest.raises(Unavailable, match=address):
        await fetch_status(address, cluster_key=CLUSTER_KEY, timeout_s=2)


async def test_a_port_in_use_is_named() -> None:
    async with serving(FakeWorker()) as server:
        with pytest.raises(ConfigurationError, match=f"port {server.port} of 127.0.0.1"):
            await RpcServer.start(
                "127.0.0.1", server.port, cluster_key=CLUSTER_KEY, worker=FakeWorker()
            )


async def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cluster key is empty"):
        await RpcServer.start("127.0.0.1", 0, cluster_key="", worker=FakeWorker())


async def test_nobody_listens() -> None:
    async with serving(FakeWorker()) as server:
        port = server.port
    with pytest.raises(Unavailable, match=f"worker d-0 at 127.0.0.1:{port}"):
        await open_session(port, FakeRouter(), timeout_s=2.0)


async def test_somebody_listens_but_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
            await open_session(port, FakeRouter(), timeout_s=0.3)


@pytest.mark.parametrize(
    ("info", "text"),
    [
        pytest.param(replace(INFO, worker_id=WorkerId("d-9")), "d-9 answers", id="worker"),
        pytest.param(replace(INFO, incarnation=Incarnation(8)), "it restarted", id="incarnation"),
    ],
)
async def test_another_worker_answers_there(info: Any, text: str) -> None:
    worker = FakeWorker(info=info)
    async with serving(worker) as server:
        with pytest.raises(Unavailable, match=text):
            await open_session(server.port, FakeRouter())
        await eventually(lambda: worker.lost)


async def test_open_can_be_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        opening = asyncio.create_task(open_session(port, FakeRouter()))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening


WORKER_PROCESS = """
import asyncio
from rpc.server import RpcServer
from tests.support.rpc_fakes import CLUSTER_KEY, FakeWorker, tokens

async def main():
    worker = FakeWorker(on_submit=lambda request, sink: sink.send([tokens("r", 0, [1])]))
    server = await RpcServer.start(
        "127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=worker, session_beat_s=0.1)
    print(server.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def worker_process() -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER_PROCESS], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


async def lose(
    process: "subprocess.Popen[str]", action: Callable[[int], None]
) -> tuple[FakeRouter, float]:
    """Open a session, do something to the worker; what the router heard, and after how long."""
    assert process.stdout is not None
    port = int(await asyncio.to_thread(process.stdout.readline))
    router = FakeRouter()
    session = await open_session(port, router, beat_s=0.1)
    try:
        session.submit(a_request(), handoff=False)
        await eventually(lambda: router.events)
        start = asyncio.get_running_loop().time()
        action(process.pid)
        await eventually(lambda: router.lost)
        taken_s = asyncio.get_running_loop().time() - start
    finally:
        await session.close()
    assert len(router.lost) == 1
    return router, taken_s


async def test_a_stopped_process_is_lost(worker_process: Any) -> None:
    router, taken_s = await lose(worker_process, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert "silent for 4 beats" in router.lost[0]
    assert taken_s < 2.0  # beats of 100 ms


async def test_a_killed_process_is_lost(worker_process: Any) -> None:
    router, taken_s = await lose(worker_process, lambda pid: os.kill(pid, signal.SIGKILL))
    assert "silent" not in router.lost[0]  # the connection says so itself
    assert taken_s < 2.0


ROUTER_PROCESS = """
import asyncio, sys
from rpc.session_client import WorkerSession
from tests.support.rpc_fakes import CLUSTER_KEY, FakeRouter, a_request, address_of

async def main():
    session = await WorkerSession.open(
        address_of(int(sys.argv[1])), router_id="r", incarnation=1, epoch=1,
        cluster_key=CLUSTER_KEY, listener=FakeRouter(), beat_s=0.1)
    session.submit(a_request(), handoff=False)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_stopped_router_is_lost_though_a_write_is_blocked() -> None:
    worker = FakeWorker()
    async with serving(worker, 0.1) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ROUTER_PROCESS, str(server.port)
        )
        try:
            await eventually(lambda: worker.sinks, timeout_s=20)
            os.kill(process.pid, signal.SIGSTOP)
            for _ in range(20):  # far more than the sockets and windows of both sides hold
                worker.sinks[0].send([PrefillStarted(RequestId("r"), 0, "x" * 1_000_000, 0)])
                await asyncio.sleep(0.001)
            await eventually(lambda: worker.lost)
            start = asyncio.get_running_loop().time()
            await server.stop(1.0)
            assert (
                asyncio.get_running_loop().time() - start < 5.0
            )  # the keepalive, 2 s, not a dead socket
        finally:
            process.kill()
            await process.wait()
    assert len(worker.lost) == 1


EXITS = {
    "closed": "await session.close(); await server.stop(1)",
    "open": "pass",
    "server-first": "await server.stop(1); await session.close()",
    "sys-exit": "await session.close(); await server.stop(1); raise SystemExit(0)",
    "busy": "session.submit(a_request(), handoff=False)",
}


@pytest.mark.parametrize("ending", EXITS)
def test_the_interpreter_exits_quietly(ending: str) -> None:
    """No poller, fork or pending-task noise on the way out, however little was closed."""
    program = f"""
import asyncio, gc
from rpc.server import RpcServer
from rpc.session_client import WorkerSession
from tests.support.rpc_fakes import *

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no fault
    worker = FakeWorker(on_submit=lambda request, sink: sink.send([tokens("r", 0, [1])]))
    server = await RpcServer.start("127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=worker)
    router = FakeRouter()
    session = await WorkerSession.open(
        address_of(server.port), router_id="r", incarnation=1, epoch=1,
        cluster_key=CLUSTER_KEY, listener=router, beat_s=0.01)
    session.submit(a_request(), handoff=False)
    await eventually(lambda: router.events)
    {EXITS[ending]}

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
