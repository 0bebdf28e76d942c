"""GET /openapi.json: every route, what it takes and all that it may answer."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.config import RouterConfig
from router.endpoints import answer_types as out
from router.endpoints.completions_schema import CompletionRequest
from router.endpoints.responses_request import SHARED, ResponsesRequest
from router.endpoints.tokenize_schema import DetokenizeRequest, TokenizeRequest
from router.responses import version
from router.schema import ChatRequest

_REF = "#/components/schemas/{model}"
_REASONS = {
    400: "The request is wrong; `param` names the field",
    401: "Missing or wrong API key",
    403: "Switched off",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too many requests at once; try again after `Retry-After` seconds",
    500: "A fault of the server",
    501: "The model cannot do that",
    503: "No worker can serve this now; try again",
}
_CHECKED = (400, 404, 408, 413, 429, 500, 503)
_GENERATES = (*_CHECKED, 501)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` is a model, a media type, or None for an empty body."""

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | str | None
    takes: type[BaseModel] | None = None
    events: type[BaseModel] | None = None  # of its stream
    errors: tuple[int, ...] = ()
    free: bool = False  # no key is needed
    empty_503: bool = False
    parameters: tuple[dict[str, Any], ...] = field(default=())


_REQUEST_ID: dict[str, Any] = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Comes back as a header and is part of the answer's id",
    "schema": {"type": "string"},
}
_RANK: dict[str, Any] = {
    "name": "X-data-parallel-rank",
    "in": "header",
    "description": "Checked against the number of decode workers; anything but a number is ignored",
    "schema": {"type": "string"},
}
_MODEL_ID: dict[str, Any] = {
    "name": "model_id",
    "in": "path",
    "required": True,
    "description": "A served name; it may hold slashes",
    "schema": {"type": "string", "minLength": 1},
}


def operations(config: RouterConfig) -> list[Operation]:
    """All that this router offers."""
    both = (_REQUEST_ID, _RANK)

    def post(path: str, summary: str, **more: Any) -> Operation:
        return Operation("post", path, summary, parameters=both, **more)

    found = [
        post(
            "/v1/chat/completions",
            "Answer a conversation",
            answer=out.ChatCompletion,
            takes=ChatRequest,
            events=out.ChatCompletionChunk,
            errors=_GENERATES,
        ),
        post(
            "/v1/completions",
            "Continue a text",
            answer=out.Completion,
            takes=CompletionRequest,
            events=out.CompletionChunk,
            errors=_GENERATES,
        ),
        post(
            "/v1/responses",
            "Answer a conversation, in OpenAI's newer form; nothing is stored",
            answer=out.Response,
            takes=ResponsesRequest,
            events=out.ResponseEvent,
            errors=_GENERATES,
        ),
        post(
            "/tokenize",
            "Token ids of a text or of a conversation",
            answer=out.Tokenized,
            takes=TokenizeRequest,
            errors=_CHECKED,
        ),
        post(
            "/detokenize",
            "Text of token ids",
            answer=out.Detokenized,
            takes=DetokenizeRequest,
            errors=_CHECKED,
        ),
        Operation("get", "/v1/models", "All served names", out.ModelList),
        Operation(
            "get",
            "/v1/models/{model_id}",
            "One served name",
            out.ModelCard,
            errors=(404,),
            parameters=(_MODEL_ID,),
        ),
        Operation("get", "/load", "Requests being answered", out.Load),
        Operation("get", "/health", "Whether it can serve", None, free=True, empty_503=True),
        Operation("get", "/ping", "Whether it lives", None, free=True),
        Operation("post", "/ping", "Whether it lives", None, free=True),
        Operation("get", "/version", "Of the server", out.Version, free=True),
        Operation("get", "/metrics", "Prometheus text", "text/plain", free=True),
    ]
    if config.enable_render:
        for path, takes, answer in (
            ("/v1/chat/completions/render", ChatRequest, out.RenderedChat),
            ("/v1/completions/render", CompletionRequest, out.RenderedCompletion),
        ):
            found.append(
                post(
                    path,
                    "The prompt and the parameters, without an answer",
                    answer=answer,
                    takes=takes,
                    errors=_CHECKED,
                )
            )
    return found


def openapi_document(config: RouterConfig) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    offered = operations(config)
    paths: dict[str, dict[str, Any]] = {}
    for operation in offered:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, config)
    components: dict[str, Any] = {"schemas": _schemas(offered)}
    if config.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": version()},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, config: RouterConfig) -> dict[str, Any]:
    guarded = bool(config.api_keys) and not operation.free
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "responses": _responses(operation, guarded=guarded),
    }
    if operation.parameters:
        found["parameters"] = list(operation.parameters)
    if operation.takes is not None:
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.takes)}},
        }
    if guarded:
        found["security"] = [{"key": []}]
    return found


def _operation_id(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").strip("/").split("/")
    return "_".join([operation.method, *words])


def _responses(operation: Operation, *, guarded: bool) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Well"}
    if isinstance(operation.answer, str):
        good["content"] = {operation.answer: {"schema": {"type": "string"}}}
    elif operation.answer is not None:
        good["content"] = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.events is not None:
        good["description"] = (
            f"The whole, or with `stream` events whose data is a {operation.events.__name__}"
        )
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    found = {"200": good}
    if operation.empty_503:
        found["503"] = {"description": _REASONS[503]}
    for status in sorted({*operation.errors, *((401,) if guarded else ())}):
        found[str(status)] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": _ref(out.Error)}},
        }
        if status in (429, 503):
            found[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return found


def _schemas(offered: Iterable[Operation]) -> dict[str, Any]:
    used: set[type[BaseModel]] = {
        model
        for operation in offered
        for model in (operation.takes, operation.answer, operation.events)
        if model is not None and not isinstance(model, str)
    }
    models: list[type[BaseModel]] = [*used, out.Error, out.Message]
    ordered = sorted(models, key=_name)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    found: dict[str, Any] = _tidied(schemas["$defs"])
    chat = found[ChatRequest.__name__]["properties"]
    messages = {"type": "array", "minItems": 1, "items": _ref(out.Message)}
    chat["messages"] = messages
    responses = found[ResponsesRequest.__name__]["properties"]
    found[ResponsesRequest.__name__]["properties"] = {
        **responses,
        **{name: chat[name] for name in SHARED},
    }
    return found


def _tidied(value: Any) -> Any:
    """Limits under JSON Schema's names; without titles, which repeat the names."""
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _tidied(item) for key, item in value.items()}
    if isinstance(found.get("title"), str):
        del found["title"]
    for ours, theirs in (("ge", "minimum"), ("le", "maximum")):
        if isinstance(found.get(ours), int):
            found[theirs] = found.pop(ours)
    return found


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
