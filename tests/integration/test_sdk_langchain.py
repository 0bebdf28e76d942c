"""langchain-openai runs unmodified against Baton."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient
from pydantic import BaseModel, ConfigDict

from tests.support.live_server import LiveServer
from tests.support.sdk_server import MODEL, sdk_server

langchain_openai = pytest.importorskip("langchain_openai")

QUESTION = "Tell me about the sea."


class Paint(BaseModel):
    """What to paint with."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    layers: Literal[1, 2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with sdk_server(tmp_path_factory.mktemp("sdk")) as running:
        yield running


@pytest.fixture(scope="module")
def chat(server: LiveServer) -> Iterator[Callable[..., Any]]:
    """Makes models. The HTTP clients that they would make are never closed, so they get one."""
    with DefaultHttpxClient() as client:
        yield lambda **fields: langchain_openai.ChatOpenAI(
            model=MODEL,
            base_url=server.base_url,
            api_key="none",
            http_client=client,
            **{"temperature": 0, "max_tokens": 12, "max_retries": 0, **fields},
        )


def test_chat_and_stream(chat: Callable[..., Any]) -> None:
    answer = chat().invoke(QUESTION)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    longer = chat(max_tokens=200)  # tokens that come fast share chunks
    pieces = list(longer.stream(QUESTION))
    assert len(pieces) > 2
    assert "".join(piece.content for piece in pieces) == longer.invoke(QUESTION).content


async def test_asynchronous(chat: Callable[..., Any]) -> None:
    async with DefaultAsyncHttpxClient() as client:
        model = chat(http_async_client=client)
        answer = await model.ainvoke(QUESTION)
        assert answer.content == "".join([piece.content async for piece in model.astream(QUESTION)])


def test_tools(chat: Callable[..., Any]) -> None:
    bound = chat(max_tokens=200).bind_tools(
        [Paint], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "Paint"
    Paint.model_validate(call["args"])
    streamed = None
    for piece in bound.stream(QUESTION):
        streamed = piece if streamed is None else streamed + piece
    assert streamed is not None
    assert [one["args"] for one in streamed.tool_calls] == [call["args"]]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Callable[..., Any], method: str) -> None:
    model = chat(max_tokens=200).with_structured_output(Paint, method=method)
    assert isinstance(model.invoke(QUESTION), Paint)


def test_a_conversation_with_a_tool_result(chat: Callable[..., Any]) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    call = {"name": "Paint", "args": {"colour": "red", "layers": 1}, "id": "call-1"}
    talk = [
        messages.SystemMessage("Be short."),
        messages.HumanMessage(QUESTION),
        messages.AIMessage("", tool_calls=[call]),
        messages.ToolMessage("done", tool_call_id="call-1"),
    ]
    assert chat().bind_tools([Paint]).invoke(talk).content
