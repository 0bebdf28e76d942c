"""The HTTP application: one line a route; what a route does is in `router.endpoints`."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

from contracts.errors import EngineFailure, ServingError
from contracts.worker import Role, WorkerAddress
from router.chat import ChatService
from router.config import RouterConfig
from router.directory import WorkerDirectory
from router.endpoints import responses_api
from router.endpoints.calls import error_response, json_response, run_call, run_plain
from router.endpoints.chat import check_chat, render_chat
from router.endpoints.completions import check_completion, render_completion
from router.endpoints.models import model_card, model_list
from router.endpoints.openapi import openapi_document
from router.endpoints.tokenize import detokenize, tokenize
from router.http_errors import error_body
from router.metrics import RouterMetrics
from router.middleware import ApiKeyMiddleware, RequestIdMiddleware
from router.prompt import ChatPrompts
from router.responses import version
from router.session import Listener, OpenSession, Session
from router.workers import WorkerPool

Route = Callable[[Request], Awaitable[Response]]


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
        chat_template=config.chat_template,
        content_format=config.chat_template_content_format,
        inline_chars=config.inline_prompt_chars,
        timeout_s=config.template_timeout_s,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = RouterMetrics(config.served_model_name)
        pool = WorkerPool(
            directory,
            open_session,
            router_id=config.router_id,
            cluster_key=config.cluster_key,
            on_broken=lambda role: metrics.lost_sessions.labels(role.value).inc(),
        )
        app.state.serving = _Serving(ChatService(config, prompts, pool, metrics), int(time.time()))
        pool.start()
        try:
            yield
        finally:
            await pool.close()
            prompts.close()

    app = FastAPI(
        title="Baton",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    if config.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=config.api_keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(config.allowed_origins),
        allow_methods=list(config.allowed_methods),
        allow_headers=list(config.allowed_headers),
        allow_credentials=config.allow_credentials,
        expose_headers=["X-Request-Id"],
    )
    app.add_middleware(RequestIdMiddleware)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    for path, route, methods in _routes(config):
        app.add_route(path, route, methods=methods)
    return app


def stop_admission(app: FastAPI) -> None:
    """From now on refuse requests (503) and say so in /health; what runs goes on to its end."""
    serving: _Serving | None = getattr(app.state, "serving", None)
    if serving is not None:
        serving.service.closing = True


@dataclass(frozen=True, slots=True)
class _Serving:
    """What the routes need; `started` (Unix seconds) is when this replica did."""

    service: ChatService
    started: int


def _serving(request: Request) -> _Serving:
    serving: _Serving = request.app.state.serving
    return serving


def _routes(config: RouterConfig) -> list[tuple[str, Route, list[str]]]:
    """Paths, what they do, methods. `router.endpoints.openapi` tells the same to clients."""
    document = openapi_document(config)

    async def openapi(request: Request) -> Response:
        return json_response(document)

    found: list[tuple[str, Route, list[str]]] = [
        ("/v1/chat/completions", _chat, ["POST"]),
        ("/v1/completions", _completions, ["POST"]),
        ("/v1/responses", _responses, ["POST"]),
        ("/v1/responses/{response_id}", _stored_response, ["GET", "DELETE"]),
        ("/v1/responses/{response_id}/cancel", _stored_response, ["POST"]),
        ("/v1/responses/{response_id}/input_items", _stored_response, ["GET"]),
        ("/v1/models", _models, ["GET"]),
        ("/v1/models/{model_id:path}", _model, ["GET"]),
        ("/tokenize", _plain(tokenize), ["POST"]),
        ("/detokenize", _plain(detokenize), ["POST"]),
        ("/health", _health, ["GET"]),
        ("/load", _load, ["GET"]),
        ("/metrics", _metrics, ["GET"]),
        ("/ping", _ping, ["GET", "POST"]),
        ("/version", _version, ["GET"]),
    ]
    if config.enable_render:
        found += [
            ("/v1/chat/completions/render", _plain(render_chat), ["POST"]),
            ("/v1/completions/render", _plain(render_completion), ["POST"]),
        ]
    if config.enable_openapi:
        found.append(("/openapi.json", openapi, ["GET"]))
    return found


# What generates


async def _chat(request: Request) -> Response:
    service = _serving(request).service
    return await run_call(request, service, lambda body, id_: check_chat(service, body, id_))


async def _completions(request: Request) -> Response:
    service = _serving(request).service
    return await run_call(request, service, lambda body, id_: check_completion(service, body, id_))


async def _responses(request: Request) -> Response:
    service = _serving(request).service
    return await run_call(
        request,
        service,
        lambda body, id_: responses_api.check_response(service, body, id_),
        translate=responses_api.translate,
    )


async def _stored_response(request: Request) -> Response:
    raise responses_api.stored(request.path_params["response_id"])


# What does not


def _plain(
    work: Callable[[ChatService, dict[str, object]], Awaitable[dict[str, Any]]],
) -> Route:
    async def route(request: Request) -> Response:
        service = _serving(request).service
        return await run_plain(request, service, lambda body: work(service, body))

    return route


async def _models(request: Request) -> Response:
    serving = _serving(request)
    return json_response(model_list(serving.service, serving.started))


async def _model(request: Request) -> Response:
    serving = _serving(request)
    name = request.path_params["model_id"]
    return json_response(model_card(serving.service, name, serving.started))


async def _health(request: Request) -> Response:
    """200 if a request could be served: there is a D, and a P unless aggregated."""
    service = _serving(request).service
    pool = service.pool
    able = pool.able(Role.DECODE) and (service.config.aggregated or pool.able(Role.PREFILL))
    return Response(status_code=200 if able and not service.closing else 503)


async def _load(request: Request) -> Response:
    return json_response({"server_load": _serving(request).service.in_flight})


async def _metrics(request: Request) -> Response:
    service = _serving(request).service
    text = service.metrics.render(service.pool.snapshot())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _version(request: Request) -> Response:
    return json_response({"version": version()})


async def _ping(request: Request) -> Response:
    return Response(status_code=200)


# Errors outside of calls


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the same body as everything else."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }
    body = error_body(error.status_code, messages.get(error.status_code, str(error.detail)))
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    """The server logs it and goes on."""
    return error_response(EngineFailure("unexpected error in the router"))
