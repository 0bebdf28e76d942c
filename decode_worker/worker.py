"""The D role: adopts prefills from P, or computes prompts itself, and streams the tokens.

Everything here runs on the event loop; the engine's thread is reached by commands and heard by
events. Handlers are idempotent (protocol notes, section 8).
"""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace

from contracts.errors import (
    ClaimRefused,
    EngineFailure,
    InvalidRequest,
    ServingError,
    TransferGone,
    Unavailable,
)
from contracts.events import (
    Adopted,
    PathTaken,
    PrefillStarted,
    RequestFailed,
    TokensOut,
    WorkerLoad,
)
from contracts.handoff import PeerHello
from contracts.ids import Incarnation, RequestId, new_incarnation
from contracts.request import GenerationRequest
from contracts.worker import WorkerAddress, WorkerConfig, WorkerInfo
from decode_worker.handoff import ClaimDeniedByP, Handoff, HandoffTools, NotPrepared
from decode_worker.health import QuarantineWatch
from decode_worker.machine import AbortedAtP, HandoffEnded
from decode_worker.peers import PeerTable
from decode_worker.quarantine import Quarantine
from decode_worker.totals import HandoffTotals
from decode_worker.turns import Line
from engine.audit import Known
from engine.guide import Guide
from engine.host import EngineHost, needs_guide
from engine.overdue import Overdue, start_housekeeping
from engine.preparations import Preparations
from engine.scheduler import EngineEvent
from engine.sequence import Progress, Started, blocks_for
from kv_transfer.digest import prompt_digest, semantic_hash
from kv_transfer.layout import PROTOCOL_VERSION
from kv_transfer.params import HANDOFF_SCOPE, decode_and_verify
from kv_transfer.rank_server import RANK_SERVICE
from kv_transfer.rank_transfers import RankTransfers
from rpc.errors import failed
from rpc.server import RpcServer
from rpc.session_server import SessionSink

log = logging.getLogger(__name__)

Key = tuple[RequestId, int]  # request and attempt
_ABORT_COMES_S = 0.25
_TAKE_ANEW = "take the first step again, or send the request without kv_transfer_params"
_CLOSE_STEP_S = 1.0


@dataclass(slots=True, eq=False)
class _Decode:
    """One request on this D. `handoff` runs until the sequence is in the engine."""

    request: GenerationRequest
    sink: SessionSink
    path: str
    handoff: "asyncio.Task[None] | None" = None
    pull: Handoff | None = None  # what that task drives
    need_blocks: int = 0  # promised at Adopt, until reserved or given up
    num_finished: int = 0
    started: bool = False  # told so; a replay of several choices starts several sequences


class DecodeWorker:
    """An ordinary process's decode worker; Serve's deployment is a shell around it."""

    def __init__(self, config: WorkerConfig, *, incarnation: Incarnation | None = None) -> None:
        self._config = config
        self._incarnation = new_incarnation() if incarnation is None else incarnation
        self._host = EngineHost(config, self._incarnation, RANK_SERVICE)
        self._requests: dict[Key, _Decode] = {}
        self._transfers: RankTransfers | None = None
        self._peers: PeerTable | None = None
        self._tools: HandoffTools | None = None
        self._quarantine = Quarantine(self._unquarantine)
        self._watch = QuarantineWatch(self._quarantine, limit_s=config.quarantine_ms / 1000)
        self._housekeeper: asyncio.Task[None] | None = None
        self._server: RpcServer | None = None
        self._overdue = Overdue[Key]()
        self._preparations = Preparations(self._host, config.max_waiting)
        self._stopping = False
        self.totals = HandoffTotals()

    # -- life -------------------------------------------------------------------------------

    async def start(self) -> WorkerAddress:
        """Load, register the memory, listen. Returns where routers find it."""
        parts = await self._host.start(self._on_engine_events, self._on_engine_failure)
        self._semantic_hash = semantic_hash(parts.model_digest)
        name = f"{self._config.worker_id}-{self._incarnation:x}"
        ranks = self._host.rank_processes
        self._transfers = await RankTransfers(parts.rank_memory, name, ranks, reads=True).start()
        hello = PeerHello(
            incarnation=self._incarnation,
            protocol_version=PROTOCOL_VERSION,
            semantic_hash=self._semantic_hash,
            layout=self._transfers.layout.encode(),
            agent_metadata=self._transfers.metadata,
        )
        self._peers = PeerTable(hello, self._config.cluster_key, self._transfers)
        self._tools = HandoffTools(
            host=self._host,
            peers=self._peers,
            transfers=self._transfers,
            quarantine=self._quarantine,
            line=Line(),
            block_size=self._config.block_size,
            read_timeout_s=self._config.read_timeout_ms / 1000,
        )
        self._info = self._host.info(self._semantic_hash)
        self._housekeeper = start_housekeeping(
            lambda: self._overdue.tell(self._expire, self._requests), self._judge_quarantine
        )
        self._server = await RpcServer.start(
            self._config.host,
            self._config.port,
            cluster_key=self._config.cluster_key,
            worker=self,
        )
        return self._config.address(self._server.port, self._incarnation)

    def assert_pulse(self) -> None:
        """Raise EngineFailure if a thread is dead or stuck, or too much memory is (Q2)."""
        self._host.engine.assert_pulse()
        if self._transfers is not None:
            self._transfers.assert_pulse()
        self._watch.check(len(self._requests))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more; return when nothing runs, or after `timeout_s`."""
        self._stopping = True
        deadline = time.monotonic() + timeout_s
        while self._requests and time.monotonic() < deadline:  # noqa: ASYNC110 - bounded, rare
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End everything. Idempotent; accepts a worker that never started."""
        self._stopping = True
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
            self._housekeeper = None
        handoffs = [d.handoff for d in self._requests.values() if d.handoff is not None]
        for key in list(self._requests):
            self.abort(*key)
        if self._server is not None:  # first: nobody waits for an engine that is stuck
            await self._server.stop(0.5)
            self._server = None
        if handoffs:
            await asyncio.wait(handoffs, timeout=_CLOSE_STEP_S)
        await self._preparations.close()
        if self._peers is not None:
            await self._peers.close()
            self._peers = None
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
        pending = sum(1 for decode in self._requests.values() if decode.handoff is not None)
        waiting = load.waiting + pending + len(self._preparations)
        return replace(load, waiting=waiting, draining=self._draining)

    def submit(self, request: GenerationRequest, handoff: bool, sink: SessionSink) -> None:
        """Compute a request from its prompt (path `local`), or go on with a replayed one."""
        if handoff:
            raise InvalidRequest("a decode worker does not export prefills")
        key = (request.request_id, request.attempt)
        self._admit(request, sink, "local")
        if not needs_guide(request.params):
            self._add(request, None)
            return
        try:
            self._preparations.start(
                key,
                request,
                lambda guide: self._add(request, guide),
                lambda error: self._fail(key, error),
            )
        except ServingError:
            del self._requests[key]
            raise

    def adopt(self, request: GenerationRequest, kv_transfer_params: str, sink: SessionSink) -> None:
        """Accept or refuse a handoff at once (M6), then pull it while P computes."""
        assert self._tools is not None
        params = decode_and_verify(kv_transfer_params, self._config.cluster_key, HANDOFF_SCOPE)
        if params.semantic_hash != self._semantic_hash:
            raise ClaimRefused("P serves another model, or the same one otherwise")
        digest = prompt_digest(self._semantic_hash, request.cache_salt, request.prompt_ids)
        if params.prompt_digest != digest:
            raise ClaimRefused("the params belong to another prompt")
        refusal = self._refusal(request)
        if refusal:
            sink.send([Adopted(request.request_id, request.attempt, False, refusal)])
            return
        decode = self._admit(request, sink, "remote")
        decode.need_blocks = self._need(request)
        handoff = Handoff(request, params, digest, self._tools)
        sink.send([Adopted(request.request_id, request.attempt, True)])
        decode.pull = handoff
        decode.handoff = asyncio.create_task(self._pull(decode, handoff), name="baton-handoff")

    def abort(self, request_id: RequestId, attempt: int) -> None:
        """Drop a request and whatever it holds here and on P. Idempotent."""
        decode = self._requests.pop((request_id, attempt), None)
        if decode is None:
            return
        if decode.handoff is not None:
            decode.handoff.cancel()  # its blocks are given back on the way out
        self._preparations.cancel((request_id, attempt))
        self._host.call(lambda scheduler: scheduler.abort(request_id, attempt))

    def session_lost(self, sink: SessionSink) -> None:
        """Abort all requests of the session: the router replays them (S2)."""
        for key, decode in list(self._requests.items()):
            if decode.sink is sink:
                self.abort(*key)

    def status(self) -> dict[str, object]:
        """For people and tests."""
        return self._host.status() | {
            "role": str(self._config.role),
            "worker_id": self._config.worker_id,
            "incarnation": self._incarnation,
            "requests": len(self._requests),
            "draining": self._draining,
            "peers": self._peers.num_open if self._peers else 0,
            "quarantine_s": round(self._quarantine.oldest_s, 3),
            "handoffs": self.totals.status(),
        }

    async def audit(self) -> list[str]:
        """See EngineHost.audit."""

        def known() -> Known:
            pulls = [d.pull for d in self._requests.values() if d.pull is not None]
            held = frozenset(p.reservation for p in pulls if p.reservation is not None)
            return Known(frozenset(self._requests), Counter(), self._quarantine.blocks(), held)

        return await self._host.audit(known)

    # -- inside -----------------------------------------------------------------------------

    @property
    def _draining(self) -> bool:
        return self._stopping or self._watch.draining

    def _unquarantine(self, blocks: tuple[int, ...]) -> None:
        self._host.call(lambda scheduler: scheduler.pool.unquarantine(blocks))

    def _judge_quarantine(self) -> None:
        if self._watch.look(self._host.parts.cache.num_blocks):
            log.error("reads that do not end; draining: %s", self._watch.draining)

    def _expire(self, key: Key) -> None:
        if decode := self._requests.get(key):
            self.abort(*key)
            decode.sink.send([failed(*key, Unavailable("the request's deadline has passed"))])

    def _need(self, request: GenerationRequest) -> int:
        size = self._config.block_size
        return blocks_for(len(request.prompt_ids) + 1, size) + request.params.n - 1

    def _refusal(self, request: GenerationRequest) -> str:
        """Why this D cannot take a handoff now; empty if it can (M6)."""
        if self._draining:
            return "draining"
        if len(self._requests) >= self._config.max_waiting + self._config.max_running:
            return f"{len(self._requests)} requests are here"
        scheduler = self._host.parts.scheduler
        try:
            scheduler.check_fits(request)
        except InvalidRequest as error:
            return str(error)
        promised = sum(decode.need_blocks for decode in self._requests.values())
        if promised + self._need(request) > scheduler.pool.total:
            return f"{promised} KV blocks are promised to handoffs already"
        return ""

    def _admit(self, request: GenerationRequest, sink: SessionSink, path: str) -> _Decode:
        if self._draining:
            raise Unavailable("this decode worker is draining")
        key = (request.request_id, request.attempt)
        if key in self._requests:
            raise InvalidRequest(f"request {request.request_id} is here already")
        self._host.parts.scheduler.check_fits(request)
        decode = _Decode(request, sink, path, num_finished=len(request.finished))
        self._requests[key] = decode
        self._overdue.add(key, request.deadline_s)
        return decode

    def _add(self, request: GenerationRequest, guide: Guide | None) -> None:
        key = (request.request_id, request.attempt)
        loop = asyncio.get_running_loop()
        added = self._host.call(lambda scheduler: scheduler.add(request, export=False, guide=guide))
        added.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._added, key, done.exception())
        )

    def _added(self, key: Key, error: BaseException | None) -> None:
        if error is not None:
            self._fail(key, error)

    def _fail(self, key: Key, error: BaseException) -> None:
        decode = self._requests.pop(key, None)
        if decode is not None:
            decode.sink.send([failed(*key, error)])

    async def _pull(self, decode: _Decode, handoff: Handoff) -> None:
        """A handoff's task: ends with the sequence in the engine, by either path."""
        request = decode.request
        key = (request.request_id, request.attempt)
        try:
            try:
                await handoff.run(lambda done: self._joined(decode, done))
            except NotPrepared:
                raise
            except ClaimDeniedByP as error:
                if request.redraw and not request.attempt:  # whoever brought them must hear it
                    self._fail(key, type(error.cause)(f"{error.cause}; {_TAKE_ANEW}"))
                else:
                    await self._recompute(decode, handoff, error.cause)
            except AbortedAtP as error:
                await asyncio.sleep(_ABORT_COMES_S)  # the router's to D, too, as a rule
                await self._recompute(decode, handoff, TransferGone(str(error)))
            except HandoffEnded:
                if not request.redraw:
                    self._requests.pop(key, None)
                    return
                # P's own token 1 says nothing of the one drawn here.
                await self._recompute(decode, handoff, TransferGone("P took it back: ended"))
            except Exception as error:
                if not isinstance(error, ServingError):
                    log.exception("request %s: a handoff met a fault of ours", request.request_id)
                await self._recompute(decode, handoff, error)
        except NotPrepared as error:
            self._fail(key, error.cause)
        except Exception as error:
            log.exception("request %s: the recompute could not begin", request.request_id)
            self._fail(key, error)
        finally:
            decode.handoff = decode.pull = None
            decode.need_blocks = 0
            await handoff.close()

    def _joined(self, decode: _Decode, handoff: Handoff) -> None:
        request, stats = decode.request, handoff.stats
        self.totals.add_joined(stats)
        taken = PathTaken(
            request.request_id,
            request.attempt,
            "remote",
            num_bytes=stats.num_bytes,
            num_descriptors=stats.num_descriptors,
            read_s=stats.read_s,
        )
        first = _told(request, handoff)
        decode.num_finished += sum(tokens.finish is not None for tokens in first)
        decode.sink.send([taken, *first])

    async def _recompute(self, decode: _Decode, handoff: Handoff, error: Exception) -> None:
        """The handoff failed: compute the prompt here, going on from token 1 if it is known."""
        cause = type(error).__name__
        self.totals.add_recomputed(cause)
        request = decode.request
        log.warning("request %s: recomputing (%s: %s)", request.request_id, cause, error)
        decode.path = "recomputed"
        events: list[PathTaken | TokensOut] = [
            PathTaken(request.request_id, request.attempt, "recomputed", cause)
        ]
        first = _told(request, handoff)
        if first:
            ended = tuple(tokens.choice for tokens in first if tokens.finish is not None)
            finished = request.finished + ended
            outputs: list[tuple[int, ...]] = [()] * request.params.n
            for tokens in first:
                outputs[tokens.choice] = tokens.token_ids
            request = replace(request, output_ids=tuple(outputs), finished=finished)
            decode.num_finished = len(finished)
            events += first
        decode.sink.send(events)
        await handoff.prepared()
        self._add(request, handoff.guide)

    def _on_engine_failure(self, error: BaseException) -> None:
        """Fail all requests: none of them will get another token here."""
        self._stopping = True
        failure = EngineFailure(f"the engine failed: {type(error).__name__}")
        for key, decode in list(self._requests.items()):
            if decode.handoff is not None:
                decode.handoff.cancel()
            self._preparations.cancel(key)
            self._fail(key, failure)

    def _on_engine_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            key = (event.request_id, event.attempt)
            decode = self._requests.get(key)
            if decode is None or isinstance(event, Progress):
                continue
            if isinstance(event, Started):
                if decode.path == "local" and not decode.started:
                    decode.started = True
                    decode.sink.send([PrefillStarted(*key, "", event.cached_tokens)])
                    decode.sink.send([PathTaken(*key, "local")])
                continue
            decode.sink.send([event])
            if isinstance(event, RequestFailed):
                del self._requests[key]
            elif isinstance(event, TokensOut) and event.finish is not None:
                decode.num_finished += 1
                if decode.num_finished == decode.request.params.n:
                    del self._requests[key]


def _told(request: GenerationRequest, handoff: Handoff) -> tuple[TokensOut, ...]:
    """P's first tokens, if they are part of the answer: those of beams are candidates only."""
    return () if request.redraw or request.params.beam else handoff.first_tokens
