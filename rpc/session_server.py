"""The worker's end of sessions: many routers, one service; errors become events or statuses."""

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from grpc import aio

from contracts.errors import (
    ConfigurationError,
    EngineFailure,
    InvalidRequest,
    ServingError,
    Unavailable,
)
from contracts.events import WorkerEvent, WorkerLoad
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.worker import WorkerInfo
from rpc.backlog import Backlog, event_bytes, merged, packed
from rpc.convert import event_to_pb, info_to_pb, load_to_pb, request_from_pb
from rpc.duplex import Duplex
from rpc.errors import abort_with, failed
from rpc.frames import FRAME_PAYLOAD_BYTES, FrameReader, FrameWriter
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerServicer
from rpc.served import Served
from rpc.wire import MISSED_BEATS, PROTOCOL_VERSION, SESSION_BEAT_S

_log = logging.getLogger(__name__)

_Context = aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame]


class SessionSink(Protocol):
    """Where a worker puts what one router must know."""

    session_id: str

    def send(self, events: Iterable[WorkerEvent]) -> None:
        """Gather events; the next frame carries them all (S4). Event-loop thread only.

        Silently drops after the loss of the session.
        """


class WorkerService(Protocol):
    """What a worker does for routers. Called on the event-loop thread; must not block."""

    @property
    def info(self) -> WorkerInfo:
        """The worker's hello."""

    def load(self) -> WorkerLoad:
        """Now; asked for each frame."""

    def submit(self, request: GenerationRequest, handoff: bool, sink: SessionSink) -> None:
        """Take a request. A ServingError raised here fails that request only."""

    def adopt(self, request: GenerationRequest, kv_transfer_params: str, sink: SessionSink) -> None:
        """Take a request whose KV a P computes. A ServingError fails that request only."""

    def abort(self, request_id: RequestId, attempt: int) -> None:
        """Stop that attempt; unknown ones are ignored."""

    def session_lost(self, sink: SessionSink) -> None:
        """Abort all of that session's requests (S2). Exactly once per session, the last call."""

    def status(self) -> dict[str, object]:
        """Ledger, transfers, counters: JSON, for people and tests."""

    async def audit(self) -> list[str]:
        """What is wrong with this worker's blocks, see EngineHost.audit."""


class RouterSession:
    """One session of one router; also its SessionSink."""

    def __init__(
        self,
        service: WorkerService,
        hello: pb.RouterHello,
        context: _Context,
        number: int,
        beat_s: float,
        missed: int,
    ) -> None:
        self.session_id = f"{hello.router_id}/{hello.epoch}#{number}"
        self.router_id = hello.router_id
        self.incarnation = hello.incarnation
        self.epoch = hello.epoch
        self._service = service
        self._backlog = Backlog[WorkerEvent]()
        self._writer = FrameWriter()
        self._reader = FrameReader()
        self.duplex = Duplex[pb.RouterFrame, pb.WorkerFrame](
            f"session {self.session_id}",
            read=context.read,
            write=context.write,
            receive=self._receive,
            frames=self._frames,
            beat_s=beat_s,
            missed=missed,
        )

    async def greet(self, context: _Context, hello: pb.RouterFrame) -> None:
        """Answer the router's hello; both are number 0 of their direction."""
        self._reader.accept(hello)
        reply = pb.WorkerFrame(hello=info_to_pb(self._service.info, epoch=self.epoch))
        for frame in self._writer.numbered(reply):
            await context.write(frame)

    def send(self, events: Iterable[WorkerEvent]) -> None:
        """See SessionSink."""
        if self.duplex.ended:
            return
        try:
            for event in events:
                self._backlog.add(event, event_bytes(event))
        except Unavailable as error:
            self.duplex.end(str(error))
        self.duplex.wake()

    def _frames(self, beat: bool) -> Iterator[pb.WorkerFrame]:
        items, sizes = self._backlog.take()
        if len(items) > 1:
            items = merged(items)
            sizes = [event_bytes(event) for event in items]
        for run in packed(items, sizes, FRAME_PAYLOAD_BYTES):
            yield from self._writer.numbered(
                pb.WorkerFrame(events=map(event_to_pb, run), load=load_to_pb(self._service.load()))
            )
        if beat and not items:
            yield from self._writer.numbered(pb.WorkerFrame(load=load_to_pb(self._service.load())))

    def _receive(self, frame: pb.RouterFrame) -> None:
        whole = self._reader.accept(frame)
        if whole is None:
            return
        for submit in whole.submits:
            self._take(submit, None)
        for adopt in whole.adopts:
            self._take(adopt.submit, adopt.kv_transfer_params)
        for abort in whole.aborts:
            try:
                self._service.abort(RequestId(abort.request_id), abort.attempt)
            except Exception:
                _log.exception("abort of request %s", abort.request_id)

    def _take(self, submit: pb.Submit, kv_transfer_params: str | None) -> None:
        try:
            request = request_from_pb(submit)
            if kv_transfer_params is None:
                self._service.submit(request, submit.handoff, self)
            else:
                self._service.adopt(request, kv_transfer_params, self)
        except ServingError as error:
            self._fail(submit, error)
        except Exception as error:
            _log.exception("taking request %s", submit.request_id)
            self._fail(submit, EngineFailure(f"{type(error).__name__} while taking the request"))

    def _fail(self, submit: pb.Submit, error: ServingError) -> None:
        self.send([failed(RequestId(submit.request_id), submit.attempt, error)])


class SessionServicer(WorkerServicer):
    """The Worker service: decode, one call, encode."""

    def __init__(
        self,
        service: WorkerService,
        *,
        beat_s: float = SESSION_BEAT_S,
        missed: int = MISSED_BEATS,
        hello_timeout_s: float = 5.0,
    ) -> None:
        self._service = service
        self._beat_s = beat_s
        self._missed = missed
        self._hello_timeout_s = hello_timeout_s
        self._served = Served[RouterSession]()
        self._current: dict[str, RouterSession] = {}  # per router
        self._opened = 0

    async def Session(  # type: ignore[override]  # the reader-writer API
        self, request_iterator: Any, context: _Context
    ) -> None:
        """Serve one session until its end."""
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first: Any = await context.read()
            session = self._admit(first, context)
        except TimeoutError:
            await abort_with(context, Unavailable("no hello came"))
        except ServingError as error:
            await abort_with(context, error)
        reason = "the router is gone"
        with self._served.serving(session):
            try:
                await self._supersede(session)
                async with asyncio.timeout(self._hello_timeout_s):
                    await session.greet(context, first)
                reason = await session.duplex.run()
            except TimeoutError:
                reason = "the hello was not taken in time"
            except (ServingError, aio.BaseError) as error:
                reason = str(error)
            finally:
                self._leave(session, reason)
        if not self._served.closing:
            await abort_with(context, Unavailable(reason))

    async def Status(
        self, request: pb.StatusRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.StatusReply:
        """The worker's status as JSON."""
        try:
            findings = {"findings": await self._service.audit()} if request.audit else {}
            status = self._service.status() | findings
            return pb.StatusReply(json=json.dumps(status, default=str))
        except ServingError as error:
            await abort_with(context, error)
        except Exception as error:
            _log.exception("status")
            await abort_with(context, EngineFailure(f"{type(error).__name__} in status"))

    async def close(self, grace_s: float) -> None:
        """End all sessions, once what they have gathered is written or `grace_s` has passed."""
        await self._served.close(grace_s, "the worker stops")

    def _admit(self, first: Any, context: _Context) -> RouterSession:
        if self._served.closing:
            raise Unavailable("the worker stops")
        if first is aio.EOF or not first.HasField("hello"):
            raise InvalidRequest("the first message is no hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ConfigurationError(
                f"this worker speaks protocol version {PROTOCOL_VERSION}, "
                f"the router {hello.protocol_version}"
            )
        current = self._current.get(hello.router_id)
        if (
            current is not None
            and current.incarnation == hello.incarnation
            and current.epoch > hello.epoch
        ):
            raise Unavailable(f"epoch {hello.epoch} is over, {current.epoch} is open")
        self._opened += 1
        return RouterSession(
            self._service, hello, context, self._opened, self._beat_s, self._missed
        )

    async def _supersede(self, session: RouterSession) -> None:
        """End the router's older session first: its requests are aborted before new ones come."""
        older = self._current.get(session.router_id)
        self._current[session.router_id] = session
        if older is not None:
            older.duplex.end(f"epoch {session.epoch} replaces epoch {older.epoch}")
            await self._served.gone(older)

    def _leave(self, session: RouterSession, reason: str) -> None:
        session.duplex.end(reason)
        if self._current.get(session.router_id) is session:
            del self._current[session.router_id]
        _log.info("session %s is over: %s", session.session_id, reason)
        try:
            self._service.session_lost(session)
        except Exception:
            _log.exception("session_lost of %s", session.session_id)
