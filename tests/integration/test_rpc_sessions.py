"""Sessions over real gRPC on loopback."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc import aio

from contracts.errors import (
    ConfigurationError,
    InvalidRequest,
    OutOfBlocks,
    Overloaded,
    Unavailable,
)
from contracts.events import FinishReason, PrefillStarted, RequestFailed, TokensOut
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.request import GenerationRequest
from rpc.auth import credentials
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerStub
from rpc.server import RpcServer
from rpc.session_client import SessionListener, WorkerSession
from rpc.session_server import SessionSink
from rpc.status import fetch_status
from rpc.wire import MAX_FRAME_BYTES
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    INFO,
    FakeRouter,
    FakeWorker,
    a_request,
    address_of,
    eventually,
    tokens,
)

BEAT_S = 0.05


@asynccontextmanager
async def serving(worker: FakeWorker, beat_s: float = BEAT_S) -> AsyncIterator[RpcServer]:
    server = await RpcServer.start(
        "127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=worker, session_beat_s=beat_s
    )
    try:
        yield server
    finally:
        await server.stop(0.5)


@asynccontextmanager
async def session_to(
    port: int, listener: SessionListener, *, epoch: int = 1, beat_s: float = BEAT_S
) -> AsyncIterator[WorkerSession]:
    session = await open_session(port, listener, epoch=epoch, beat_s=beat_s)
    try:
        yield session
    finally:
        await session.close()


async def open_session(
    port: int,
    listener: SessionListener,
    *,
    epoch: int = 1,
    incarnation: int = 3,
    cluster_key: str = CLUSTER_KEY,
    timeout_s: float = 5.0,
    beat_s: float = BEAT_S,
) -> WorkerSession:
    return await WorkerSession.open(
        address_of(port),
        router_id="router",
        incarnation=incarnation,
        epoch=epoch,
        cluster_key=cluster_key,
        listener=listener,
        timeout_s=timeout_s,
        beat_s=beat_s,
    )


def stub_call(
    stack: AsyncExitStack, channel: aio.Channel
) -> aio.StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]:
    """A bare call, for what a well-behaved router never does."""
    call = WorkerStub(channel).Session(metadata=aio.Metadata(*credentials(CLUSTER_KEY)))
    stack.callback(call.cancel)
    return call


async def read_to_end(call: aio.StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]) -> None:
    while await call.read() is not aio.EOF:
        pass


async def test_a_request_and_its_events() -> None:
    def answer(request: GenerationRequest, sink: SessionSink) -> None:
        sink.send([PrefillStarted(request.request_id, 0, '{"a": 1}', 2)])
        sink.send([TokensOut(request.request_id, 0, 0, 0, (9,), finish=FinishReason.STOP)])

    worker, router = FakeWorker(on_submit=answer), FakeRouter()
    request = replace(a_request("r1", range(1000)), output_ids=((4, 5), ()), finished=(1,))
    async with serving(worker) as server, session_to(server.port, router) as session:
        assert session.info == INFO
        assert not session.lost
        session.submit(request, handoff=True)
        await eventually(lambda: len(router.events) == 2)
        session.adopt(a_request("r2"), '{"do_remote_prefill": true}')
        session.abort(RequestId("r2"), 4)
        await eventually(lambda: worker.aborted)
    assert worker.submitted == [(request, True)]
    assert worker.adopted == [(a_request("r2"), '{"do_remote_prefill": true}')]
    assert worker.aborted == [("r2", 4)]
    assert router.events[:2] == [
        PrefillStarted(RequestId("r1"), 0, '{"a": 1}', 2),
        TokensOut(RequestId("r1"), 0, 0, 0, (9,), finish=FinishReason.STOP),
    ]
    assert router.loads[0].free_blocks == 9
    steps = [load.step for load in router.loads]
    assert steps == sorted(steps)


async def test_loss_is_told_once_on_both_sides() -> None:
    worker, router = FakeWorker(), FakeRouter()
    async with serving(worker) as server:
        session = await open_session(server.port, router)
        session.submit(a_request(), handoff=False)
        await eventually(lambda: worker.sinks)
        await session.close()
        await session.close()
        assert session.lost
        assert router.lost == ["closed by this router"]
        await eventually(lambda: worker.lost)
        with pytest.raises(Unavailable, match="d-0 is lost"):
            session.submit(a_request(), handoff=False)
        session.abort(RequestId("r"), 0)
        worker.sinks[0].send([tokens("r", 0, [1])])  # dropped
    assert worker.lost == [worker.sinks[0].session_id]
    assert len(router.lost) == 1
    assert router.events == []


async def test_the_server_stops_with_sessions_open() -> None:
    worker, router = FakeWorker(), FakeRouter()
    async with serving(worker) as server, session_to(server.port, router) as session:
        session.submit(a_request(), handoff=False)
        await eventually(lambda: worker.sinks)
        worker.sinks[0].send([tokens("r", 0, [5])])
        await server.stop(2.0)
        assert len(worker.lost) == 1
        await eventually(lambda: session.lost)
        assert router.events == [tokens("r", 0, [5])]  # what was gathered is still written
    assert len(router.lost) == 1


async def test_idle_sessions_live_on_beats() -> None:
    worker, router = FakeWorker(), FakeRouter()
    async with serving(worker, 0.02) as server, session_to(server.port, router, beat_s=0.02) as s:
        await eventually(lambda: len(router.loads) > 15)  # three times the time-out
        assert not s.lost
        assert worker.lost == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        pytest.param(Overloaded("full"), "Overloaded", "full", id="serving-error"),
        pytest.param(OutOfBlocks(5, 2), "OutOfBlocks", "5 KV blocks wanted", id="with-fields"),
    ],
)
async def test_an_error_fails_that_request_only(error: Exception, kind: str, message: str) -> None:
    def answer(request: GenerationRequest, sink: SessionSink) -> None:
        if request.request_id == "bad":
            raise error
        sink.send([tokens(request.request_id, 0, [1])])

    router = FakeRouter()
    worker = FakeWorker(on_submit=answer)
    async with serving(worker) as server, session_to(server.port, router) as session:
        session.submit(a_request("bad"), handoff=False)
        session.adopt(a_request("bad"), "{}")
        session.submit(a_request("good"), handoff=False)
        await eventually(lambda: len(router.events) == 3)
        assert not session.lost
    failed = [event for event in router.events if isinstance(event, RequestFailed)]
    assert [event.kind for event in failed] == [kind, kind]
    assert all(message in event.message for event in failed)
    assert tokens("good", 0, [1]) in router.events


async def test_a_bug_in_the_service_is_an_engine_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(request: GenerationRequest, sink: SessionSink) -> None:
        raise KeyError(request.request_id)

    router = FakeRouter()
    worker = FakeWorker(on_submit=answer)
    async with serving(worker) as server, session_to(server.port, router) as session:
        session.submit(a_request("bad"), handoff=False)
        await eventually(lambda: router.events)
        assert not session.lost
    assert isinstance(router.events[0], RequestFailed)
    assert router.events[0].kind == "EngineFailure"
    assert "taking request bad" in caplog.text


async def test_a_bug_in_the_listener_ends_the_session(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeRouter):
        def on_events(self, worker_id: WorkerId, events: Any) -> None:
            raise KeyError("bug")

    worker, router = FakeWorker(), Broken()
    worker.on_submit = lambda request, sink: sink.send([tokens("r", 0, [1])])
    async with serving(worker) as server, session_to(server.port, router) as session:
        session.submit(a_request(), handoff=False)
        await eventually(lambda: router.lost)
        await eventually(lambda: worker.lost)
    assert "internal error: KeyError" in router.lost[0]
    assert "closing the stream" in caplog.text


async def test_while_a_write_is_blocked_events_gather() -> None:
    """A router that does not read: all that follows the blocked frame is few frames, merged."""
    worker = FakeWorker()
    async with serving(worker, 5.0) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        hello = pb.RouterHello(router_id="slow", epoch=1, protocol_version=1)
        await call.write(pb.RouterFrame(hello=hello))
        submit = pb.Submit(request_id="r", params=pb.SamplingParams(max_tokens=1))
        await call.write(pb.RouterFrame(sequence=1, submits=[submit]))
        await eventually(lambda: worker.sinks)
        sink = worker.sinks[0]
        for number in range(400):  # 4 MB: more than the window takes
            sink.send([PrefillStarted(RequestId(f"big{number}"), 0, "x" * 10_000, 0)])
            await asyncio.sleep(0)
        for position in range(5000):
            sink.send([tokens("r", position, [position])])
        steps = worker.steps
        frames: list[pb.WorkerFrame] = []
        while not any(event.HasField("tokens") for frame in frames[-1:] for event in frame.events):
            frame = await call.read()
            assert isinstance(frame, pb.WorkerFrame)
            frames.append(frame)
        assert all(frame.ByteSize() <= MAX_FRAME_BYTES for frame in frames)
        assert [frame.sequence for frame in frames] == list(range(len(frames)))
        events = [event for frame in frames for event in frame.events]
        assert len(events) == 401
        assert len(events[-1].tokens.token_ids) == 4 * 5000
        assert worker.steps - steps < 40


async def test_long_requests_and_events_travel_in_pieces() -> None:
    worker, router = FakeWorker(), FakeRouter()
    worker.on_submit = lambda request, sink: sink.send(
        [PrefillStarted(request.request_id, 0, "y" * 700_000, 1), tokens("r", 0, [1])]
    )
    request = a_request("r", range(300_000))
    async with serving(worker) as server, session_to(server.port, router) as session:
        session.submit(a_request("small"), handoff=False)
        session.submit(request, handoff=False)
        session.submit(a_request("after"), handoff=False)
        await eventually(lambda: len(router.events) == 6)
    assert [taken.request_id for taken, _ in worker.submitted] == ["small", "r", "after"]
    assert worker.submitted[1][0] == request
    assert router.events[0] == PrefillStarted(RequestId("small"), 0, "y" * 700_000, 1)


async def test_a_request_too_long_for_a_session_is_refused_alone() -> None:
    router = FakeRouter()
    async with serving(FakeWorker()) as server, session_to(server.port, router) as session:
        with pytest.raises(InvalidRequest, match="too long"):
            session.submit(a_request("r", range(9_000_000)), handoff=False)
        assert not session.lost


async def test_a_router_that_never_reads_is_lost_before_memory_is() -> None:
    worker = FakeWorker()
    async with serving(worker, 5.0) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        hello = pb.RouterHello(router_id="slow", epoch=1, protocol_version=1)
        await call.write(pb.RouterFrame(hello=hello))
        submit = pb.Submit(request_id="r", params=pb.SamplingParams(max_tokens=1))
        await call.write(pb.RouterFrame(sequence=1, submits=[submit]))
        await eventually(lambda: worker.sinks)
        text = "x" * 1_000_000
        for number in range(100):  # 1 MB each, never copied: the bound is 64 MiB
            worker.sinks[0].send([PrefillStarted(RequestId("r"), 0, text, 0)])
            if number < 20:  # the first ones fill the window
                await asyncio.sleep(0)
        await eventually(lambda: worker.lost)


@pytest.mark.parametrize("sequence", [pytest.param(0, id="repeat"), pytest.param(2, id="gap")])
async def test_a_wrong_sequence_number_closes_the_session(sequence: int) -> None:
    worker = FakeWorker()
    async with serving(worker) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        hello = pb.RouterHello(router_id="odd", epoch=1, protocol_version=1)
        await call.write(pb.RouterFrame(hello=hello))
        await call.write(pb.RouterFrame(sequence=sequence))
        with pytest.raises(aio.AioRpcError) as caught:
            await read_to_end(call)
        assert f"frame {sequence} arrived where 1 was due" in (caught.value.details() or "")
        await eventually(lambda: worker.lost)


@pytest.mark.parametrize(
    ("first", "code", "text"),
    [
        pytest.param(
            pb.RouterFrame(hello=pb.RouterHello(router_id="r", protocol_version=99)),
            grpc.StatusCode.FAILED_PRECONDITION,
            "version 1, the router 99",
            id="version",
        ),
        pytest.param(pb.RouterFrame(), grpc.StatusCode.INVALID_ARGUMENT, "no hello", id="no-hello"),
    ],
)
async def test_a_bad_hello_is_refused(
    first: pb.RouterFrame, code: grpc.StatusCode, text: str
) -> None:
    worker = FakeWorker()
    async with serving(worker) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        await call.write(first)
        with pytest.raises(aio.AioRpcError, match=text) as caught:
            await call.read()
        assert caught.value.code() is code
    assert worker.lost == []


async def test_a_silent_router_is_lost() -> None:
    """The stream is open and the process alive, but no beat comes."""
    worker = FakeWorker()
    async with serving(worker) as server, AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(f"127.0.0.1:{server.port}"))
        call = stub_call(stack, channel)
        hello = pb.RouterHello(router_id="frozen", epoch=1, protocol_version=1)
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
