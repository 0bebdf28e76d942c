"""Peer links over real gRPC on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc import aio

from contracts.errors import ClaimRefused, ServingError, TransferGone, Unavailable
from contracts.handoff import (
    Beat,
    ChunkReady,
    Claim,
    ClaimDenied,
    ClaimGranted,
    FirstTokens,
    PeerHello,
    Release,
    ReleaseAck,
    Revoked,
)
from contracts.ids import TransferId
from rpc.auth import credentials
from rpc.convert_peer import decode_frame
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import PeerStub
from rpc.peer_client import PeerLink
from rpc.peer_server import PeerSink
from rpc.server import RpcServer
from tests.support.rpc_fakes import (
    CLUSTER_KEY,
    FakeDecode,
    FakePrefill,
    FakeWorker,
    eventually,
    peer_hello,
    tokens,
)

BEAT_S = 0.05
T1 = TransferId("t1")
CLAIM = Claim(T1, "nonce", "digest")


@asynccontextmanager
async def serving(peer: FakePrefill | None, beat_s: float = BEAT_S) -> AsyncIterator[RpcServer]:
    server = await RpcServer.start(
        "127.0.0.1", 0, cluster_key=CLUSTER_KEY, worker=FakeWorker(), peer=peer, peer_beat_s=beat_s
    )
    try:
        yield server
    finally:
        await server.stop(0.5)


async def open_link(
    port: int, listener: FakeDecode, *, hello: PeerHello | None = None, key: str = CLUSTER_KEY
) -> PeerLink:
    return await PeerLink.open(
        f"127.0.0.1:{port}",
        hello=hello or peer_hello(2),
        cluster_key=key,
        listener=listener,
        beat_s=BEAT_S,
        timeout_s=2.0,
    )


@asynccontextmanager
async def linked(port: int, listener: FakeDecode) -> AsyncIterator[PeerLink]:
    link = await open_link(port, listener)
    try:
        yield link
    finally:
        await link.close()


async def read_to_end(call: aio.StreamStreamCall[pb.DecodeFrame, pb.PrefillFrame]) -> None:
    while await call.read() is not aio.EOF:
        pass


async def test_a_transfer_from_claim_to_release() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with serving(prefill) as server, linked(server.port, decode) as link:
        assert link.remote == prefill.hello
        assert prefill.opened == [peer_hello(2)]
        link.send(CLAIM)
        await eventually(lambda: decode.messages)
        sink = prefill.links[0]
        sink.send(ChunkReady(T1, 32))
        sink.send(FirstTokens(T1, (tokens("r", 0, [4]), tokens("r", 0, [5], choice=1))))
        link.send(Release(T1))
        await eventually(lambda: prefill.released)
        sink.send(Revoked(TransferId("t2"), "pressure"))
        await eventually(lambda: len(decode.messages) == 5)
    assert decode.messages == [
        ClaimGranted(T1, (1, 2), (2**63 + 1, 5), 32, 16, 2000),
        ChunkReady(T1, 32),
        FirstTokens(T1, (tokens("r", 0, [4]), tokens("r", 0, [5], choice=1))),
        ReleaseAck(T1),
        Revoked(TransferId("t2"), "pressure"),
    ]
    assert prefill.released == [T1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(TransferGone("ended"), "TransferGone", id="gone"),
        pytest.param(ClaimRefused("another claimer"), "ClaimRefused", id="refused"),
        pytest.param(KeyError("a bug"), "EngineFailure", id="bug"),
    ],
)
async def test_a_denied_claim(
    error: Exception, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def deny(claim: Claim, link: PeerSink) -> ClaimGranted:
        raise error

    decode = FakeDecode()
    async with serving(FakePrefill(on_claim=deny)) as server, linked(server.port, decode) as link:
        link.send(CLAIM)
        await eventually(lambda: decode.messages)
        assert not link.lost
    denied = decode.messages[0]
    assert isinstance(denied, ClaimDenied)
    assert (denied.transfer_id, denied.kind) == (T1, kind)
    assert ("claim of transfer t1" in caplog.text) == (kind == "EngineFailure")
    if isinstance(error, ServingError):
        assert denied.message == str(error)


async def test_acknowledged_at_is_when_the_echoed_beat_was_sent() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    before = time.monotonic()
    async with serving(prefill) as server, linked(server.port, decode) as link:
        opened_at = link.acknowledged_at
        assert before <= opened_at <= time.monotonic()
        await eventually(lambda: prefill.beats > 12)  # three times the time-out
        assert not link.lost
        await eventually(lambda: link.acknowledged_at > opened_at + 8 * BEAT_S)
        assert link.acknowledged_at < time.monotonic()
    assert prefill.lost == prefill.links
    assert decode.messages == []


async def test_an_unrenewed_beat_is_not_acknowledged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakePrefill):
        def beat(self, link: PeerSink) -> None:
            link.send(ChunkReady(T1, 1))  # the link itself lives
            raise KeyError("bug")

    decode = FakeDecode()
    async with serving(Broken()) as server, linked(server.port, decode) as link:
        opened_at = link.acknowledged_at
        await eventually(lambda: len(decode.messages) > 8)
        assert link.acknowledged_at == opened_at
        assert not link.lost
    assert "renewing the leases" in caplog.text


async def test_a_silent_prefill_is_lost() -> None:
    """P's process lives and its stream is open, but nothing comes back."""
    prefill, decode = FakePrefill(), FakeDecode()
    async with serving(prefill) as server, linked(server.port, decode) as link:
        prefill.beat = _raises  # type: ignore[method-assign]  # so no beat is echoed
        await eventually(lambda: link.lost)
        await eventually(lambda: decode.lost)
        link.send(CLAIM)  # dropped
    assert decode.lost == ["silent for 4 beats of 50 ms"]


def _raises(link: PeerSink) -> None:
    raise Unavailable("frozen")


async def test_a_silent_decode_is_lost() -> None:
    prefill = FakePrefill()
    async with serving(prefill) as server:
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = PeerStub(channel).Link(metadata=aio.Metadata(*credentials(CLUSTER_KEY)))
            await call.write(decode_frame(peer_hello(2)))
            await call.write(decode_frame(Beat(1)))
            with pytest.raises(aio.AioRpcError, match="silent for 4 beats of 50 ms"):
                await read_to_end(call)
            assert prefill.beats == 1
            await eventually(lambda: prefill.lost)
        prefill.links[0].send(Revoked(T1, "aborted"))  # dropped
    assert len(prefill.lost) == 1


async def test_loss_is_told_once_on_both_sides() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with serving(prefill) as server, linked(server.port, decode) as link:
        await server.stop(1.0)
        await eventually(lambda: decode.lost)
        await link.close()
        assert link.lost
    assert prefill.lost == prefill.links
    assert len(decode.lost) == 1


async def test_what_p_refuses() -> None:
    def refuse(remote: PeerHello, link: PeerSink) -> None:
        if remote.semantic_hash != "hash":
            raise ClaimRefused(f"semantic hash {remote.semantic_hash}, not hash")

    prefill, decode = FakePrefill(on_open=refuse), FakeDecode()
    async with serving(prefill) as server:
        with pytest.raises(ClaimRefused, match="semantic hash other, not hash"):
            await open_link(server.port, decode, hello=peer_hello(2, semantic_hash="other"))
        with pytest.raises(Unavailable, match="protocol version 1, the decode worker 9"):
            await open_link(server.port, decode, hello=peer_hello(2, version=9))
        with pytest.raises(Unavailable, match="another cluster key"):
            await open_link(server.port, decode, key="wrong")
    assert (prefill.lost, decode.lost) == ([], [])


async def test_a_worker_without_peer_service_and_nobody() -> None:
    async with serving(None) as server:
        with pytest.raises(Unavailable, match="Method not found"):
            await open_link(server.port, FakeDecode())
    with pytest.raises(Unavailable, match=f"127.0.0.1:{server.port}"):
        await open_link(server.port, FakeDecode())


async def test_a_large_grant_and_metadata() -> None:
    """A prompt of a million tokens, and agents with many regions: more than gRPC's 4 MiB."""
    blocks = tuple(range(400_000))
    grant = ClaimGranted(T1, blocks, blocks, len(blocks) * 16, 0, 2000)
    hello = PeerHello(peer_hello(1).incarnation, 1, "hash", "{}", (bytes(6_000_000), b"r1"))
    prefill, decode = FakePrefill(hello=hello, on_claim=lambda claim, link: grant), FakeDecode()
    async with serving(prefill, 0.5) as server, linked(server.port, decode) as link:
        assert [len(agent) for agent in link.remote.agent_metadata] == [6_000_000, 2]
        link.send(CLAIM)
        await eventually(lambda: decode.messages)
    assert decode.messages == [grant]


async def test_messages_keep_their_order_under_load() -> None:
    prefill, decode = FakePrefill(), FakeDecode()
    async with serving(prefill) as server, linked(server.port, decode) as link:
        for number in range(500):
            prefill.links[0].send(ChunkReady(T1, number))
            link.send(Release(TransferId(str(number))))
            if number % 50 == 0:
                await asyncio.sleep(0)
        await eventually(lambda: len(decode.messages) == 1000)
    assert prefill.released == [str(number) for number in range(500)]
    ready = [message for message in decode.messages if isinstance(message, ChunkReady)]
    assert ready == [ChunkReady(T1, number) for number in range(500)]
