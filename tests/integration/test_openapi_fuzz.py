"""schemathesis over /openapi.json: no 5xx, and no answer that the document does not tell of."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.live_server import LiveServer
from tests.support.sdk_server import sdk_server

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 25  # of each operation


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with sdk_server(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: LiveServer) -> dict[str, Any]:
    """By name, such as `POST /v1/chat/completions`."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.label: operation for operation in found}


def test_the_document_tells_of_every_route(operations: dict[str, Any]) -> None:
    assert {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /tokenize",
        "POST /detokenize",
        "GET /v1/models",
        "GET /health",
        "GET /version",
        "GET /metrics",
    } <= set(operations)


def short(body: Any) -> Any:
    """Valid requests end soon: their limits are lowered, nothing else is touched."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = body.get(name)
            if value is None or (isinstance(value, int) and value > 4):
                body[name] = 4
    return body


def test_no_undocumented_answer(operations: dict[str, Any], server: LiveServer) -> None:
    checks = schemathesis.checks
    wanted = [
        checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    for operation in operations.values():

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.body = short(case.body)
            case.call_and_validate(checks=wanted, timeout=60)

        check()
    server.wait_idle()
