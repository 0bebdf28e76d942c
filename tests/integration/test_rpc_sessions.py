"""Sessions over real gRPC on loopback: what travels, and what breaks one."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc import aio

from contracts.errors import (
    InvalidRequest,
    OutOfBlocks,
    Overloaded,
    Unavailable,
)
from contracts.events import FinishReason, PrefillStarted, RequestFailed, TokensOut
from contracts.ids import RequestId, WorkerId
from contracts.request import GenerationRequest
from rpc.pb import worker_pb2 as pb
from rpc.session_server import SessionSink
from rpc.wire import MAX_FRAME_BYTES, PROTOCOL_VERSION
from tests.support.rpc_fakes import (
    INFO,
    FakeRouter,
    FakeWorker,
    a_request,
    eventually,
    tokens,
)
from tests.support.rpc_sessions import (
    open_session,
    read_to_end,
    serving,
    session_to,
    stub_call,
)


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
        hello = pb.RouterHello(router_id="slow", epoch=1, protocol_version=PROTOCOL_VERSION)
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
        hello = pb.RouterHello(router_id="slow", epoch=1, protocol_version=PROTOCOL_VERSION)
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
        hello = pb.RouterHello(router_id="odd", epoch=1, protocol_version=PROTOCOL_VERSION)
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
            f"version {PROTOCOL_VERSION}, the router 99",
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
