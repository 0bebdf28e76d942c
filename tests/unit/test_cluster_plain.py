import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cluster.cli import main
from cluster.plain import StatusDirectory
from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role, WorkerAddress
from rpc.server import RpcServer
from tests.support.rpc_fakes import CLUSTER_KEY, INFO, FakeWorker

LEDGER = {"free": 6, "cached": 1, "owned": 1, "leased": 1, "reserved": 1, "quarantined": 0}


def worker(incarnation: int = 7, total: int = 10) -> FakeWorker:
    status: dict[str, object] = {
        "worker_id": "d-0",
        "role": "decode",
        "incarnation": incarnation,
        "ledger": {**LEDGER, "total": total},
    }
    return FakeWorker(info=replace(INFO, incarnation=Incarnation(incarnation)), status_value=status)


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = await RpcServer.start("127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=worker())
    yield server
    await server.stop(0)


async def test_a_given_address_becomes_a_worker_once_it_answers(server: RpcServer) -> None:
    where = f"127.0.0.1:{server.port}"
    nobody = "127.0.0.1:1"
    directory = StatusDirectory(
        [(Role.DECODE, where), (Role.PREFILL, nobody)], cluster_key=CLUSTER_KEY
    )
    listed = await anext(directory.watch())
    assert listed == (WorkerAddress(WorkerId("d-0"), Role.DECODE, where, Incarnation(7)),)


async def test_a_restarted_worker_is_listed_with_its_new_incarnation(server: RpcServer) -> None:
    port = server.port
    watch = StatusDirectory([(Role.DECODE, f"127.0.0.1:{port}")], CLUSTER_KEY).watch()
    assert [address.incarnation for address in await anext(watch)] == [7]
    await server.stop(0)
    again = await RpcServer.start("127.0.0.1", port, cluster_key=CLUSTER_KEY, worker=worker(8))
    try:
        assert [address.incarnation for address in await anext(watch)] == [8]
    finally:
        await again.stop(0)


async def test_a_worker_of_the_other_role_or_key_is_not_listed(server: RpcServer) -> None:
    where = f"127.0.0.1:{server.port}"
    for directory in (
        StatusDirectory([(Role.PREFILL, where)], CLUSTER_KEY),
        StatusDirectory([(Role.DECODE, where)], "another key than theirs"),
    ):
        assert await anext(directory.watch()) == ()


@pytest.mark.parametrize(
    ("total", "findings", "wrong"),
    [
        pytest.param(10, [], "", id="good"),
        pytest.param(11, [], "not 11", id="sums"),
        pytest.param(10, ["blocks 4: is leased, but for no transfer"], "blocks 4", id="leak"),
    ],
)
async def test_status_checks_the_ledger(
    total: int,
    findings: list[str],
    wrong: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATON_CLUSTER_KEY", CLUSTER_KEY)
    fake = worker(total=total)
    fake.findings = findings
    served = await RpcServer.start("127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=fake)
    try:
        argv = ["status", "--check", f"127.0.0.1:{served.port}"]
        assert await asyncio.to_thread(main, argv) == (1 if wrong else 0)
    finally:
        await served.stop(0)
    output = capsys.readouterr().out
    assert "decode worker d-0" in output
    assert wrong in output
    assert ("WRONG" in output) == bool(wrong)
    assert ("every block is accounted for" in output) == (not wrong)
