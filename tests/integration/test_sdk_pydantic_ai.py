"""pydantic-ai runs unmodified against Baton."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from tests.support.live_server import LiveServer
from tests.support.sdk_server import MODEL, sdk_server

pydantic_ai = pytest.importorskip("pydantic_ai")
pytest.importorskip("pydantic_ai.models.openai")

QUESTION = "Which paint?"


class Paint(BaseModel):
    """What to paint with."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    layers: Literal[1, 2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with sdk_server(tmp_path_factory.mktemp("sdk")) as running:
        yield running


@asynccontextmanager
async def agent(server: LiveServer, **fields: Any) -> AsyncIterator[Any]:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async with AsyncOpenAI(base_url=server.base_url, api_key="none") as client:
        model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
        settings = {"temperature": 0, "max_tokens": 200}
        yield pydantic_ai.Agent(model, model_settings=settings, **fields)


async def test_chat_and_stream(server: LiveServer) -> None:
    async with agent(server) as talker:  # 200 tokens: those that come fast share chunks
        answer = await talker.run(QUESTION)
        assert answer.output
        async with talker.run_stream(QUESTION) as stream:
            texts = [text async for text in stream.stream_text(debounce_by=None)]
    assert texts[-1] == answer.output
    assert len(texts) > 2


async def test_structured_output_by_a_forced_tool(server: LiveServer) -> None:
    async with agent(server, output_type=Paint) as painter:
        answer = await painter.run(QUESTION)
    assert isinstance(answer.output, Paint)


async def test_structured_output_by_a_schema(server: LiveServer) -> None:
    async with agent(server, output_type=pydantic_ai.NativeOutput(Paint)) as painter:
        answer = await painter.run(QUESTION)
    assert isinstance(answer.output, Paint)


async def test_tools(server: LiveServer) -> None:
    """The model has to call something: the tool, or the one that gives the answer."""
    called: list[str] = []

    def look(where: Literal["here", "there"]) -> str:
        """Look somewhere."""
        called.append(where)
        return "nothing"

    limits = pydantic_ai.UsageLimits(request_limit=20)
    async with agent(server, output_type=Paint, tools=[look]) as painter:
        answer = await painter.run(QUESTION, usage_limits=limits)
    assert isinstance(answer.output, Paint)
    assert set(called) <= {"here", "there"}
