"""A stream that is over leaves no connection behind, without help of the garbage collector."""

import gc
from collections.abc import Iterator

import psutil
import pytest

from rpc.peer_client import PeerLink
from rpc.server import RpcServer
from rpc.session_client import WorkerSession
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    FakeDecode,
    FakePrefill,
    FakeRouter,
    FakeWorker,
    address_of,
    eventually,
    peer_hello,
)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def connections(port: int) -> int:
    found = psutil.Process().net_connections(kind="tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in found)


async def test_sessions_and_links_that_were_closed_keep_no_connection(no_collector: None) -> None:
    server = await RpcServer.start(
        "127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=FakeWorker(), peer=FakePrefill()
    )
    try:
        for epoch in range(1, 4):
            session = await WorkerSession.open(
                address_of(server.port),
                router_id="r",
                incarnation=1,
                epoch=epoch,
                cluster_key=CLUSTER_KEY,
                listener=FakeRouter(),
            )
            link = await PeerLink.open(
                f"127.0.0.1:{server.port}",
                hello=peer_hello(2),
                cluster_key=CLUSTER_KEY,
                listener=FakeDecode(),
            )
            assert connections(server.port) >= 2
            await session.close()
            await link.close()
        del session, link
        await eventually(lambda: connections(server.port) == 0)
    finally:
        await server.stop(0.5)
