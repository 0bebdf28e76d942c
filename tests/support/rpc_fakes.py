"""Both sides of the rpc package as simple recorders: fakes of our own Protocols."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from contracts.events import TokensOut, WorkerEvent, WorkerLoad
from contracts.handoff import (
    Claim,
    ClaimGranted,
    FromPrefill,
    PeerHello,
    Release,
)
from contracts.ids import Incarnation, RequestId, TransferId, WorkerId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerAddress, WorkerInfo
from rpc.peer_client import PeerLink
from rpc.peer_server import PeerSink
from rpc.session_server import SessionSink

CLUSTER_KEY = "a key for tests"

INFO = WorkerInfo(
    worker_id=WorkerId("d-0"),
    role=Role.DECODE,
    incarnation=Incarnation(7),
    semantic_hash="hash",
    max_model_len=4096,
    max_prompt_tokens=4000,
    block_size=16,
    total_blocks=256,
    attention_backend="test",
    device="cpu",
    version="0",
)


def address_of(port: int, info: WorkerInfo = INFO) -> WorkerAddress:
    """Where a worker of this test listens."""
    return WorkerAddress(info.worker_id, info.role, f"127.0.0.1:{port}", info.incarnation)


def a_request(name: str = "r", prompt: Sequence[int] = (1, 2, 3)) -> GenerationRequest:
    """A small valid request."""
    return GenerationRequest(RequestId(name), tuple(prompt), SamplingParams(max_tokens=8))


def tokens(
    name: str, position: int, token_ids: Sequence[int], choice: int = 0, attempt: int = 0
) -> TokensOut:
    """New tokens of a request."""
    return TokensOut(RequestId(name), attempt, choice, position, tuple(token_ids))


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for a condition; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


@dataclass(eq=False)
class FakeWorker:
    """A WorkerService that records; `on_submit` decides what a submit or adopt does."""

    info: WorkerInfo = INFO
    on_submit: Callable[[GenerationRequest, SessionSink], None] = lambda request, sink: None
    submitted: list[tuple[GenerationRequest, bool]] = field(default_factory=list)
    adopted: list[tuple[GenerationRequest, str]] = field(default_factory=list)
    aborted: list[tuple[RequestId, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    sinks: list[SessionSink] = field(default_factory=list)
    steps: int = 0
    status_value: dict[str, object] = field(default_factory=lambda: {"free": 3})
    findings: list[str] = field(default_factory=list)

    def load(self) -> WorkerLoad:
        self.steps += 1
        return WorkerLoad(step=self.steps, running=2, free_blocks=9, total_blocks=256)

    def submit(self, request: GenerationRequest, handoff: bool, sink: SessionSink) -> None:
        self.submitted.append((request, handoff))
        self.log.append(f"submit {request.request_id}")
        self._seen(sink)
        self.on_submit(request, sink)

    def adopt(self, request: GenerationRequest, kv_transfer_params: str, sink: SessionSink) -> None:
        self.adopted.append((request, kv_transfer_params))
        self._seen(sink)
        self.on_submit(request, sink)

    def abort(self, request_id: RequestId, attempt: int) -> None:
        self.aborted.append((request_id, attempt))
        self.log.append(f"abort {request_id}")

    def session_lost(self, sink: SessionSink) -> None:
        self.lost.append(sink.session_id)
        self.log.append("lost")

    def status(self) -> dict[str, object]:
        return self.status_value

    async def audit(self) -> list[str]:
        return self.findings

    def _seen(self, sink: SessionSink) -> None:
        if sink not in self.sinks:
            self.sinks.append(sink)


@dataclass(eq=False)
class FakeRouter:
    """A SessionListener that records."""

    events: list[WorkerEvent] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # events a frame
    loads: list[WorkerLoad] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def on_events(self, worker_id: WorkerId, events: Sequence[WorkerEvent]) -> None:
        self.events.extend(events)
        self.batches.append(len(events))

    def on_load(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        self.loads.append(load)

    def on_lost(self, worker_id: WorkerId, reason: str) -> None:
        self.lost.append(reason)


def peer_hello(incarnation: int, version: int = 1, semantic_hash: str = "hash") -> PeerHello:
    """A hello of either side."""
    return PeerHello(Incarnation(incarnation), version, semantic_hash, "{}", (b"agent",))


def _grant(claim: Claim, link: PeerSink) -> ClaimGranted:
    return ClaimGranted(claim.transfer_id, (1, 2), (2**63 + 1, 5), 32, 16, 2000)


@dataclass(eq=False)
class FakePrefill:
    """A PeerService that records; the functions decide what it answers."""

    hello: PeerHello = field(default_factory=lambda: peer_hello(1))
    on_open: Callable[[PeerHello, PeerSink], None] = lambda remote, link: None
    on_claim: Callable[[Claim, PeerSink], ClaimGranted] = _grant
    opened: list[PeerHello] = field(default_factory=list)
    links: list[PeerSink] = field(default_factory=list)
    released: list[TransferId] = field(default_factory=list)
    beats: int = 0
    lost: list[PeerSink] = field(default_factory=list)

    def peer_opened(self, remote: PeerHello, link: PeerSink) -> None:
        self.on_open(remote, link)
        self.opened.append(remote)
        self.links.append(link)

    def claim(self, claim: Claim, link: PeerSink) -> ClaimGranted:
        return self.on_claim(claim, link)

    def reading(self, transfer_id: TransferId, link: PeerSink) -> None:
        pass

    def release(self, release: Release, link: PeerSink) -> None:
        self.released.append(release.transfer_id)

    def beat(self, link: PeerSink) -> None:
        self.beats += 1

    def peer_lost(self, link: PeerSink) -> None:
        self.lost.append(link)


@dataclass(eq=False)
class FakeDecode:
    """A PeerListener that records."""

    messages: list[FromPrefill] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def on_message(self, link: PeerLink, message: FromPrefill) -> None:
        self.messages.append(message)

    def on_lost(self, link: PeerLink, reason: str) -> None:
        self.lost.append(reason)
