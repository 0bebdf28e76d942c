"""A session server and its clients, as tests open them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from grpc import aio

from rpc.auth import credentials
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerStub
from rpc.server import RpcServer
from rpc.session_client import SessionListener, WorkerSession
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    FakeWorker,
    address_of,
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
