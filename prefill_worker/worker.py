"""The P role: computes prompts, exports their KV under a lease, tells router and D token 1.

Everything here runs on the event loop; the engine's thread is reached by commands and heard by
events. Handlers are idempotent (protocol notes, section 8).
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import cast

from contracts.errors import ClaimRefused, EngineFailure, InvalidRequest, Unavailable
from contracts.events import PrefillStarted, PromptScores, RequestFailed, TokensOut, WorkerLoad
from contracts.handoff import (
    ChunkReady,
    Claim,
    ClaimGranted,
    FirstTokens,
    FromPrefill,
    PeerHello,
    Release,
    Revoked,
)
from contracts.ids import (
    BlockId,
    Incarnation,
    RequestId,
    TransferId,
    new_incarnation,
    new_transfer_id,
)
from contracts.request import GenerationRequest
from contracts.worker import WorkerAddress, WorkerConfig, WorkerInfo
from engine.audit import Known
from engine.guide import Guide
from engine.host import EngineHost, needs_guide
from engine.overdue import Overdue, start_housekeeping
from engine.preparations import Preparations
from engine.scheduler import EngineEvent
from engine.sequence import Progress, Started
from kv_transfer.digest import prompt_digest, semantic_hash
from kv_transfer.layout import PROTOCOL_VERSION, KvLayout, compatible
from kv_transfer.leases import Ended, ExportState, ExportTable
from kv_transfer.rank_server import RANK_SERVICE
from kv_transfer.rank_transfers import RankTransfers
from prefill_worker.signing import signed_params
from rpc.errors import failed
from rpc.peer_server import PeerSink
from rpc.server import RpcServer
from rpc.session_server import SessionSink

log = logging.getLogger(__name__)

_REVOKE_AFTER_S = 0.5  # L6
Key = tuple[RequestId, int]  # request and attempt


@dataclass(slots=True, eq=False)
class _Prefill:
    """One request on this P, until its transfer is over (or, without one, its tokens are out)."""

    request: GenerationRequest
    handoff: bool
    sink: SessionSink
    transfer_id: TransferId | None = None
    first_tokens: list[TokensOut] = field(default_factory=list[TokensOut])
    num_finished: int = 0


class PrefillWorker:
    """An ordinary process's prefill worker; Serve's deployment is a shell around it."""

    def __init__(self, config: WorkerConfig, *, incarnation: Incarnation | None = None) -> None:
        self._config = config
        self._incarnation = new_incarnation() if incarnation is None else incarnation
        self._host = EngineHost(config, self._incarnation, RANK_SERVICE)
        self._exports = ExportTable(config.lease_ms / 1000, time.monotonic)
        self._requests: dict[Key, _Prefill] = {}
        self._overdue = Overdue[Key]()
        self._by_transfer: dict[TransferId, Key] = {}
        self._preparations = Preparations(self._host, config.max_waiting)
        self._transfers: RankTransfers | None = None
        self._server: RpcServer | None = None
        self._housekeeper: asyncio.Task[None] | None = None
        self._draining = False
        self._blocked_since: float | None = None
        self.ended_transfers: dict[str, int] = {}  # by reason

    # -- life -------------------------------------------------------------------------------

    async def start(self) -> WorkerAddress:
        """Load, register the memory, listen. Returns where routers and peers find it."""
        parts = await self._host.start(self._on_engine_events, self._on_engine_failure)
        self._semantic_hash = semantic_hash(parts.model_digest)
        name = f"{self._config.worker_id}-{self._incarnation:x}"
        ranks = self._host.rank_processes
        self._transfers = await RankTransfers(parts.rank_memory, name, ranks, reads=False).start()
        self._hello = PeerHello(
            incarnation=self._incarnation,
            protocol_version=PROTOCOL_VERSION,
            semantic_hash=self._semantic_hash,
            layout=self._transfers.layout.encode(),
            agent_metadata=self._transfers.metadata,
        )
        self._info = self._host.info(self._semantic_hash)
        self._server = await RpcServer.start(
            self._config.host,
            self._config.port,
            cluster_key=self._config.cluster_key,
            worker=self,
            peer=self,
        )
        self._housekeeper = start_housekeeping(
            lambda: self._overdue.tell(self._expire, self._requests),
            self._expire_leases,
            self._relieve,
        )
        return self._config.address(self._server.port, self._incarnation)

    def assert_pulse(self) -> None:
        """Raise EngineFailure if a thread is dead or stuck."""
        self._host.engine.assert_pulse()
        if self._transfers is not None:
            self._transfers.assert_pulse()

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more; return when nothing runs and no transfer is open, or after a time."""
        self._draining = True
        deadline = time.monotonic() + timeout_s

        def open_work() -> bool:
            return bool(self._requests or len(self._exports))

        while open_work() and time.monotonic() < deadline:  # noqa: ASYNC110 - bounded, rare
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End everything. Idempotent; accepts a worker that never started."""
        self._draining = True
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
            self._housekeeper = None
        for export in list(self._exports):  # so that Ds need not find out by themselves
            self._finish_transfer(self._exports.revoke(export.transfer_id, "closing"))
        if self._server is not None:  # first: nobody waits for an engine that is stuck
            await self._server.stop(0.5)
            self._server = None
        await self._preparations.close()
        if self._transfers is not None:
            await self._transfers.close()
            self._transfers = None
        await asyncio.to_thread(self._host.stop)

    # -- WorkerService ----------------------------------------------------------------------

    @property
    def info(self) -> WorkerInfo:
        """The Hello to routers."""
        return self._info

    def load(self) -> WorkerLoad:
        """What rides on every frame; what is not yet in the engine counts as waiting."""
        load = self._host.engine.load
        waiting = load.waiting + len(self._preparations)
        return replace(
            load,
            waiting=waiting,
            draining=self._draining,
            expired_transfers=self.ended_transfers.get("expired", 0),
            revoked_transfers=self.ended_transfers.get("pressure", 0),
        )

    def submit(self, request: GenerationRequest, handoff: bool, sink: SessionSink) -> None:
        """Queue a prompt. With `handoff` its KV is exported when it is scheduled."""
        if self._draining:
            raise Unavailable("this prefill worker is draining")
        key = (request.request_id, request.attempt)
        if key in self._requests:
            raise InvalidRequest(f"request {request.request_id} is here already")
        self._host.parts.scheduler.check_fits(request)
        prefill = _Prefill(request, handoff, sink)
        if needs_guide(request.params):
            self._preparations.start(
                key,
                request,
                lambda guide: self._add(key, prefill, guide),
                lambda error: self._added(key, error),
            )
        else:
            self._add(key, prefill, None)
        self._requests[key] = prefill
        self._overdue.add(key, request.deadline_s)

    def adopt(self, request: GenerationRequest, kv_transfer_params: str, sink: SessionSink) -> None:
        """Refused: a prefill worker does not decode for others."""
        raise InvalidRequest("a prefill worker does not adopt")

    def abort(self, request_id: RequestId, attempt: int) -> None:
        """Drop a request and whatever it holds here. Idempotent."""
        self._drop((request_id, attempt), "aborted")

    def session_lost(self, sink: SessionSink) -> None:
        """As an abort for each of its requests, but a claimed and complete transfer runs on."""
        for key, prefill in list(self._requests.items()):
            if prefill.sink is not sink:
                continue
            export = self._exports.get(prefill.transfer_id) if prefill.transfer_id else None
            if export is None or not export.claimed or export.ready_tokens < export.num_tokens:
                self._drop(key, "aborted")

    def status(self) -> dict[str, object]:
        """For people and tests."""
        return self._host.status() | {
            "role": str(self._config.role),
            "worker_id": self._config.worker_id,
            "incarnation": self._incarnation,
            "requests": len(self._requests),
            "draining": self._draining,
            "transfers": len(self._exports),
            "ended_transfers": dict(self.ended_transfers),
        }

    async def audit(self) -> list[str]:
        """See EngineHost.audit."""

        def known() -> Known:
            leased = Counter[int](block for export in self._exports for block in export.block_ids)
            return Known(frozenset(self._requests), leased=leased)

        return await self._host.audit(known)

    # -- PeerService ------------------------------------------------------------------------

    @property
    def hello(self) -> PeerHello:
        """What a D needs to read here; only ever sent over the authenticated link (C4)."""
        return self._hello

    def peer_opened(self, remote: PeerHello, link: PeerSink) -> None:
        """Refuse a D that computes something else or keeps it otherwise."""
        if remote.semantic_hash != self._semantic_hash:
            raise ClaimRefused(
                f"semantic hash: P {self._semantic_hash[:12]}, D {remote.semantic_hash[:12]}"
            )
        compatible(KvLayout.decode(self._hello.layout), KvLayout.decode(remote.layout))

    def claim(self, claim: Claim, link: PeerSink) -> ClaimGranted:
        """Grant what D may read, once (C1, C2)."""
        if self._exports.ended(claim.transfer_id) == "ended":
            # Token 1 came before the claim: before the denial, so that D does not recompute.
            link.send(Revoked(claim.transfer_id, "ended"))
        words = self._host.parts.words
        return self._exports.claim(
            claim.transfer_id,
            claim.nonce,
            claim.prompt_digest,
            cast(Hashable, link),
            lambda blocks: words.read(tuple(blocks)),
        )

    def reading(self, transfer_id: TransferId, link: PeerSink) -> None:
        """D has begun to read: not the first to be taken back (L6)."""
        self._exports.reading(transfer_id, cast(Hashable, link))

    def release(self, release: Release, link: PeerSink) -> None:
        """D is done with the blocks: only its claimer can be (C2). Idempotent; rpc acknowledges."""
        if self._exports.is_claimer(release.transfer_id, cast(Hashable, link), release.nonce):
            self._finish_transfer(self._exports.release(release.transfer_id))

    def beat(self, link: PeerSink) -> None:
        """Renew all claims of the link (L2)."""
        self._exports.renew(cast(Hashable, link))

    def peer_lost(self, link: PeerSink) -> None:
        """Renewal stops, nothing else (L3)."""
        self._exports.lost_claimer(cast(Hashable, link))

    # -- inside -----------------------------------------------------------------------------

    def _add(self, key: Key, prefill: _Prefill, guide: Guide | None) -> None:
        request, export = prefill.request, prefill.handoff
        loop = asyncio.get_running_loop()
        added = self._host.call(
            lambda scheduler: scheduler.add(request, export=export, guide=guide)
        )
        added.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._added, key, done.exception())
        )

    def _added(self, key: Key, error: BaseException | None) -> None:
        if error is None:
            return
        prefill = self._requests.pop(key, None)
        if prefill is not None:
            prefill.sink.send([failed(*key, error)])

    def _on_engine_failure(self, error: BaseException) -> None:
        """Fail what is not complete. Complete transfers stay: nothing writes their blocks now."""
        self._draining = True
        failure = EngineFailure(f"the engine failed: {type(error).__name__}")
        for key, prefill in list(self._requests.items()):
            export = self._exports.get(prefill.transfer_id) if prefill.transfer_id else None
            if export is None or export.state is not ExportState.READY:
                self._drop(key, "failed")
                prefill.sink.send([failed(*key, failure)])

    def _on_engine_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            key = (event.request_id, event.attempt)
            prefill = self._requests.get(key)
            if isinstance(event, Started):
                self._started(key, prefill, event)
            elif prefill is None:
                continue
            elif isinstance(event, Progress):
                self._progress(prefill, event)
            elif isinstance(event, TokensOut):
                self._tokens(key, prefill, event)
            else:
                self._told(key, prefill, event)

    def _started(self, key: Key, prefill: _Prefill | None, event: Started) -> None:
        if prefill is None:  # aborted between its planning and now
            if event.export:
                self._host.call(lambda scheduler: scheduler.pool.unlease(event.block_ids))
            return
        params = self._export(key, prefill, event) if event.export else ""
        prefill.sink.send(
            [PrefillStarted(event.request_id, event.attempt, params, event.cached_tokens)]
        )

    def _export(self, key: Key, prefill: _Prefill, event: Started) -> str:
        request = prefill.request
        transfer_id = new_transfer_id()
        prefill.transfer_id = transfer_id
        self._by_transfer[transfer_id] = key
        digest = prompt_digest(self._semantic_hash, request.cache_salt, request.prompt_ids)
        block_ids = tuple(BlockId(block) for block in event.block_ids)
        num_tokens = len(request.prompt_ids)
        lease_ms = self._config.lease_ms if request.lease_ms is None else request.lease_ms
        self._exports.create(transfer_id, block_ids, num_tokens, digest, lease_ms / 1000)
        assert self._server is not None
        return signed_params(
            request,
            event,
            transfer_id=transfer_id,
            incarnation=self._incarnation,
            digest=digest,
            semantic_hash=self._semantic_hash,
            lease_ms=lease_ms,
            port=self._server.port,
            config=self._config,
        )

    def _progress(self, prefill: _Prefill, event: Progress) -> None:
        transfer_id = prefill.transfer_id
        if transfer_id is None:
            return
        # A running sequence offers full blocks only; the last one when it has ended (F3).
        size, total = self._config.block_size, len(prefill.request.prompt_ids)
        computed = event.computed_tokens
        ready = total if computed >= total else computed // size * size
        link = self._exports.ready(transfer_id, ready)
        _send(link, ChunkReady(transfer_id, ready))

    def _tokens(self, key: Key, prefill: _Prefill, event: TokensOut) -> None:
        prefill.sink.send([event])
        prefill.num_finished += event.finish is not None
        params = prefill.request.params
        num_choices = params.n - len(prefill.request.finished)
        if not prefill.handoff:
            if prefill.num_finished == num_choices:
                del self._requests[key]
            return
        prefill.first_tokens.append(event)
        transfer_id = prefill.transfer_id
        # Beams that go on are all in one event; those that are over have one each, as others.
        expected = 1 if params.beam and event.finish is None else num_choices
        if len(prefill.first_tokens) < expected or transfer_id is None:
            return
        if prefill.num_finished == num_choices:
            self._finish_transfer(self._exports.revoke(transfer_id, "ended"))
            return
        link = self._exports.complete(transfer_id, prefill.first_tokens)
        _send(link, FirstTokens(transfer_id, tuple(prefill.first_tokens)))

    def _told(self, key: Key, prefill: _Prefill, event: PromptScores | RequestFailed) -> None:
        if isinstance(event, RequestFailed):
            self._drop(key, "failed")
        prefill.sink.send([event])

    def _drop(self, key: Key, reason: str) -> None:
        prefill = self._requests.pop(key, None)
        if prefill is None:
            return
        self._preparations.cancel(key)
        self._host.call(lambda scheduler: scheduler.abort(*key))
        if prefill.transfer_id is not None:
            self._finish_transfer(self._exports.revoke(prefill.transfer_id, reason))

    def _finish_transfer(self, ended: Ended | None) -> None:
        """Free an ended transfer's blocks at once, and tell D unless D itself ended it."""
        if ended is None:
            return
        self.ended_transfers[ended.reason] = self.ended_transfers.get(ended.reason, 0) + 1
        key = self._by_transfer.pop(ended.transfer_id)
        prefill = self._requests.pop(key, None)
        if ended.in_prefill and prefill is not None and ended.reason != "ended":
            self._host.call(lambda scheduler: scheduler.abort(*key))
            if ended.reason == "released":  # D wants none of it: the router hears of it from D
                log.info("request %s: released by D before its prefill ended", key[0])
        blocks = ended.block_ids
        self._host.call(lambda scheduler: scheduler.pool.unlease(blocks))
        if ended.reason != "released":
            _send(ended.claimer, Revoked(ended.transfer_id, ended.reason))

    def _expire_leases(self) -> None:
        for ended in self._exports.expired():
            log.warning("transfer %s: the lease is over", ended.transfer_id)
            self._finish_transfer(ended)

    def _expire(self, key: Key) -> None:
        if prefill := self._requests.get(key):
            self._drop(key, "aborted")
            prefill.sink.send([failed(*key, Unavailable("the request's deadline has passed"))])

    def _relieve(self) -> None:
        """Take a finished transfer that nobody reads back when a prefill lacks memory (L6)."""
        now = time.monotonic()
        if not self._host.parts.scheduler.blocked:
            self._blocked_since = None
            return
        if self._blocked_since is None:
            self._blocked_since = now
        if now - self._blocked_since < _REVOKE_AFTER_S:
            return
        for transfer_id in self._exports.revocable()[:1]:
            self._finish_transfer(self._exports.revoke(transfer_id, "pressure"))
            self._blocked_since = now


def _send(link: object, message: FromPrefill) -> None:
    if link is not None:  # claimers are the links themselves
        link.send(message)  # type: ignore[attr-defined]
