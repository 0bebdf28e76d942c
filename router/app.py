"""The HTTP shell: routes decode, call, and encode."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from contracts.errors import EngineFailure, NotFound, ServingError
from contracts.worker import Role, WorkerAddress
from router.body import check_media_type, parse_object, read_body
from router.chat import ChatCall, ChatService
from router.config import RouterConfig
from router.directory import WorkerDirectory
from router.disconnect import ClientGone, unless_disconnected
from router.http_errors import body_of, encode, error_body, headers_of, status_of
from router.metrics import RouterMetrics
from router.middleware import ApiKeyMiddleware, RequestIdMiddleware
from router.prompt import ChatPrompts
from router.request import Generation
from router.responses import Answer, version
from router.sse import ChunkEncoder, EventStream
from router.workers import Listener, OpenSession, Session, WorkerPool

logger = logging.getLogger(__name__)

_CLIENT_CLOSED = 499  # nobody reads it; for the access log


async def open_grpc_session(
    address: WorkerAddress,
    *,
    router_id: str,
    incarnation: int,
    epoch: int,
    cluster_key: str,
    listener: Listener,
) -> Session:
    """The real opener; imported late, so that a router without workers needs no gRPC."""
    from rpc.session_client import WorkerSession

    return await WorkerSession.open(
        address,
        router_id=router_id,
        incarnation=incarnation,
        epoch=epoch,
        cluster_key=cluster_key,
        listener=listener,
    )


def create_app(
    config: RouterConfig,
    directory: WorkerDirectory,
    *,
    open_session: OpenSession = open_grpc_session,
) -> FastAPI:
    """The application. Its lifespan opens the sessions and closes them.

    Raises:
        ConfigurationError: the model folder lacks a tokenizer or a chat template.
    """
    prompts = ChatPrompts.load(
        config.model_path,
        inline_chars=config.inline_prompt_chars,
        timeout_s=config.template_timeout_s,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool = WorkerPool(
            directory, open_session, router_id=config.router_id, cluster_key=config.cluster_key
        )
        metrics = RouterMetrics(config.served_model_name)
        app.state.routes = _Routes(ChatService(config, prompts, pool, metrics), int(time.time()))
        pool.start()
        try:
            yield
        finally:
            await pool.close()
            prompts.close()

    app = FastAPI(title="Baton", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    if config.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=config.api_keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(config.allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
    )
    app.add_middleware(RequestIdMiddleware)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_routes(app)
    return app


def _add_routes(app: FastAPI) -> None:
    async def models(request: Request) -> Response:
        return JSONResponse(_routes(request).models())

    async def model(request: Request) -> Response:
        return JSONResponse(_routes(request).model(request.path_params["model_id"]))

    async def health(request: Request) -> Response:
        return Response(status_code=200 if _routes(request).healthy() else 503)

    async def metrics(request: Request) -> Response:
        text = _routes(request).metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version_route(request: Request) -> Response:
        return JSONResponse({"version": version()})

    async def ping(request: Request) -> Response:
        return Response(status_code=200)

    async def chat(request: Request) -> Response:
        return await _routes(request).chat(request)

    table: list[tuple[str, Callable[[Request], Any], list[str]]] = [
        ("/v1/chat/completions", chat, ["POST"]),
        ("/v1/models", models, ["GET"]),
        ("/v1/models/{model_id:path}", model, ["GET"]),
        ("/health", health, ["GET"]),
        ("/metrics", metrics, ["GET"]),
        ("/version", version_route, ["GET"]),
        ("/ping", ping, ["GET", "POST"]),
    ]
    for path, endpoint, methods in table:
        app.add_route(path, endpoint, methods=methods)


def _routes(request: Request) -> "_Routes":
    routes: _Routes = request.app.state.routes
    return routes


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return _error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the same body as everything else."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }
    body = error_body(error.status_code, messages.get(error.status_code, str(error.detail)))
    return _json(body, error.status_code, dict(error.headers or {}))


def _error_response(error: ServingError) -> Response:
    return _json(body_of(error), status_of(error)[0], headers_of(error))


def _json(
    body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        encode(body), status_code=status, headers=headers, media_type="application/json"
    )


@dataclass(frozen=True, slots=True)
class _Routes:
    """What the routes do; `created` (Unix seconds) is when this replica started."""

    service: ChatService
    created: int

    # Chat

    async def chat(self, request: Request) -> Response:
        """Answer a chat request; whatever happens, no generation outlives its client."""
        try:
            self.service.enter()
        except ServingError as error:
            self.service.refused(error)
            return _error_response(error)
        streaming = False
        try:
            response = await self._chat(request)
            streaming = isinstance(response, EventStream)
            return response
        except (ClientGone, ClientDisconnect):
            self.service.metrics.disconnects.inc()
            return Response(status_code=_CLIENT_CLOSED)
        except asyncio.CancelledError:  # how Ray Serve tells that the client has left
            self.service.metrics.disconnects.inc()
            raise
        except ServingError as error:
            return _error_response(error)
        except Exception:  # a bug of ours is still an answer
            logger.exception("chat request failed")
            return _error_response(EngineFailure("unexpected error in the router"))
        finally:
            if not streaming:
                self.service.leave()

    async def _chat(self, request: Request) -> Response:
        try:
            call = await self._check(request)
        except ServingError as error:
            self.service.refused(error)
            raise
        generation = self.service.start(call)
        keep = False
        try:
            if not call.stream:
                return await unless_disconnected(request.receive, self._full(call, generation))
            await unless_disconnected(request.receive, generation.outbox.ready())
            keep = True
            encoder = ChunkEncoder(
                call.head,
                include_usage=call.include_usage,
                continuous_usage=call.continuous_usage,
            )
            return EventStream(generation, encoder, self.service.metrics, self.service.leave)
        finally:
            if not keep:
                await generation.aclose()

    async def _check(self, request: Request) -> ChatCall:
        check_media_type(request.headers.get("content-type"))
        body = await read_body(
            request.stream(),
            request.headers.get("content-length"),
            self.service.config.max_body_bytes,
        )
        check = self.service.check(parse_object(body), request.headers.get("x-request-id"))
        return await unless_disconnected(request.receive, check)

    async def _full(self, call: ChatCall, generation: Generation) -> Response:
        answer = Answer(call.head, call.job.params.n)
        while pieces := await generation.outbox.take():
            for piece in pieces:
                answer.add(piece)
        return _json(answer.body(generation.usage, generation.semantic_hash))

    # The rest

    def models(self) -> dict[str, Any]:
        """All names under which the model is served."""
        return {"object": "list", "data": [self._card(n) for n in self.service.config.names]}

    def model(self, name: str) -> dict[str, Any]:
        """One card.

        Raises:
            NotFound: not a served name.
        """
        if name not in self.service.config.names:
            raise NotFound(f"the model {name[:80]!r} does not exist", "model")
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "baton",
            "root": self.service.config.served_model_name,
            "parent": None,
            "max_model_len": self.service.known_max_model_len(),
            "permission": [],
        }

    def healthy(self) -> bool:
        """Whether a request could be served: a D, and a P unless aggregated."""
        pool = self.service.pool
        return pool.able(Role.DECODE) and (
            self.service.config.aggregated or pool.able(Role.PREFILL)
        )

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self.service.metrics.render(self.service.pool.snapshot())
