"""A worker's one gRPC server: sessions for routers and, on P, links for Ds."""

import asyncio
import logging

from grpc import aio

from contracts.errors import ConfigurationError
from rpc.auth import AuthInterceptor
from rpc.pb.worker_pb2_grpc import add_PeerServicer_to_server, add_WorkerServicer_to_server
from rpc.peer_server import PeerService, PeerServicer
from rpc.session_server import SessionServicer, WorkerService
from rpc.wire import MISSED_BEATS, PEER_BEAT_S, SERVER_OPTIONS, SESSION_BEAT_S

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 1.0


class RpcServer:
    """Made by `start`; serves until `stop`. Belongs to the event loop that started it."""

    def __init__(
        self, server: aio.Server, port: int, sessions: SessionServicer, peers: PeerServicer | None
    ) -> None:
        self.port = port
        self._server = server
        self._sessions = sessions
        self._peers = peers

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        *,
        cluster_key: str,
        worker: WorkerService,
        peer: PeerService | None = None,
        session_beat_s: float = SESSION_BEAT_S,
        peer_beat_s: float = PEER_BEAT_S,
        missed: int = MISSED_BEATS,
    ) -> "RpcServer":
        """Bind and serve.

        Args:
            host: name or IP address to listen on.
            port: 0 picks a free one; `port` of the result is the one in use.
            cluster_key: every call must prove that it has the same.
            worker: answers sessions.
            peer: answers peer links; None on a D.
            session_beat_s: seconds between beats of sessions.
            peer_beat_s: seconds between the beats that Ds send.
            missed: silent beats after which the other side is lost.

        Raises:
            ConfigurationError: the port is in use or cannot be bound, or the key is empty.
        """
        interceptor = AuthInterceptor(cluster_key)
        server = aio.server(interceptors=[interceptor], options=SERVER_OPTIONS)
        sessions = SessionServicer(worker, beat_s=session_beat_s, missed=missed)
        add_WorkerServicer_to_server(sessions, server)
        peers: PeerServicer | None = None
        if peer is not None:
            peers = PeerServicer(peer, beat_s=peer_beat_s, missed=missed)
            add_PeerServicer_to_server(peers, server)
        try:
            bound = server.add_insecure_port(
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            )
        except RuntimeError as error:
            await server.stop(None)
            raise ConfigurationError(
                f"cannot listen on port {port} of {host}: it is in use or not ours; "
                "choose another port, or 0 for any free one"
            ) from error
        await server.start()
        _log.info("serving on %s:%d", host, bound)
        return cls(server, bound, sessions, peers)

    async def stop(self, grace_s: float) -> None:
        """End all streams and close the port. Idempotent.

        What the streams have gathered is still written, for `grace_s` seconds at most. The
        services have heard of every loss when this returns.
        """
        servicers: list[SessionServicer | PeerServicer] = [self._sessions]
        if self._peers is not None:
            servicers.append(self._peers)
        await asyncio.gather(*(servicer.close(grace_s) for servicer in servicers))
        await self._server.stop(_STOP_TIMEOUT_S)
