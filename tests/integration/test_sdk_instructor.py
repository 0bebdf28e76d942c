"""instructor runs unmodified against Baton."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from tests.support.live_server import LiveServer
from tests.support.sdk_server import MODEL, sdk_server

instructor = pytest.importorskip("instructor")

MESSAGES: Any = [{"role": "user", "content": "Which paint?"}]


class Paint(BaseModel):
    """What to paint with."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    layers: Literal[1, 2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with sdk_server(tmp_path_factory.mktemp("sdk")) as running:
        yield running


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_structured_output(server: LiveServer, mode: str) -> None:
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
        paint, answer = patched.chat.completions.create_with_completion(
            model=MODEL,
            messages=MESSAGES,
            response_model=Paint,
            max_retries=0,
            max_tokens=200,
            temperature=0,
        )
    assert isinstance(paint, Paint)
    assert answer.usage.completion_tokens > 0


def test_partial_stream(server: LiveServer) -> None:
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        states = list(
            patched.chat.completions.create_partial(
                model=MODEL,
                messages=MESSAGES,
                response_model=Paint,
                max_tokens=200,
                temperature=0,
            )
        )
    assert len(states) > 1
    Paint.model_validate(states[-1].model_dump())
    assert states[-1].colour in ("red", "blue")
